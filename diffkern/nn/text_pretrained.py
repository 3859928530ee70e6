"""Text encoders of transformers, CLIP and T5, from folders on disk."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffkern import records
from diffkern.extras import need
from diffkern.modes import neutral
from diffkern.vocabulary import LONGEST, check_tokens

__all__ = ["PretrainedText", "PretrainedTextConfig"]

_MODELS = {  # by the class that a folder's config.json names: which class reads it, and whether padding is hidden
    "CLIPModel": ("CLIPTextModel", False),
    "CLIPTextModel": ("CLIPTextModel", False),
    "CLIPTextModelWithProjection": ("CLIPTextModelWithProjection", False),
    "T5EncoderModel": ("T5EncoderModel", True),
    "T5ForConditionalGeneration": ("T5EncoderModel", True),
}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class PretrainedTextConfig:
    """A `PretrainedText`; `PretrainedText.from_folder` fills it from the folder.

    folder             where transformers wrote the encoder: config.json and safetensors
    tokenizer          where it wrote the tokenizer
    model              its class: CLIPTextModel, CLIPTextModelWithProjection or T5EncoderModel
    context_channels   width of its output
    vector_channels    width of the vector of a whole text, 0: none is given
    length             L, the tokens of a text, which longer ones are cut to
    layer              which layer's output is the context: -1 the last with its norm, -2 the one before, without
    dtype              of its weights
    """

    folder: str
    tokenizer: str
    model: Literal["CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"]
    context_channels: int
    vector_channels: int = 0
    length: int = 77
    layer: int = -1
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"

    def __post_init__(self) -> None:
        records.check_fields(self, "PretrainedTextConfig.")
        for name, least, most in (("context_channels", 1, 1 << 20), ("vector_channels", 0, 1 << 20)):
            if not least <= getattr(self, name) <= most:
                raise ValueError(f"PretrainedTextConfig.{name} must lie in {least}..{most}, got {getattr(self, name)}")
        if not 1 <= self.length <= LONGEST:
            raise ValueError(f"PretrainedTextConfig.length must lie in 1..{LONGEST}, got {self.length}")
        if self.layer > -1:
            raise ValueError(f"PretrainedTextConfig.layer must be negative, counted from the last, got {self.layer}")
        if self.vector_channels and self.model == "T5EncoderModel":
            raise ValueError(
                f"PretrainedTextConfig.vector_channels must be 0 for T5, which has no vector of a text, got "
                f"{self.vector_channels}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> PretrainedTextConfig:
        """A configuration from `to_dict` or from its JSON; ValueError for an unknown name and for another type."""
        return records.record(PretrainedTextConfig, values, "PretrainedTextConfig.")


class PretrainedText(nn.Module):
    """Tokens int64 [B, L] to the context [B, L, context_channels] of CLIP or T5, frozen, from a folder of transformers.

        text = PretrainedText.from_folder("sd/text_encoder")         # and sd/tokenizer beside it
        model = TextConditioned.of(UNet(config), text)               # tokens in, as with a `TextEncoder`
        network(x, t, text.condition(text.tokens(["a red house"])))  # or by hand

    Nothing is fetched, nothing is unpickled and no code of the folder is run. CLIP sees its padding, as Stable
    Diffusion has it (Rombach et al. 2021, arXiv 2112.10752); T5's padding is hidden and its context is 0. The encoder
    is read when it is first used and goes where the tokens are; its weights are no parameters of this module:
    optimisers, averages and checkpoints leave them alone, and what is stored with a model is this configuration.

    MissingExtra without transformers; FileNotFoundError for a folder that is not there; ValueError for another model.
    """

    def __init__(self, config: PretrainedTextConfig) -> None:
        super().__init__()
        self.config = config
        self._read: dict[str, Any] = {}

    @classmethod
    def from_folder(
        cls,
        folder: str | os.PathLike[str],
        tokenizer: str | os.PathLike[str] | None = None,
        *,
        length: int | None = None,
        layer: int = -1,
        pooled: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ) -> PretrainedText:
        """The encoder in a folder; ``pooled``: the vector of a whole text is given to the network too (CLIP alone).

        ``tokenizer``: its folder; None: the same one, or where a pipeline of diffusers has it. ``length``: what the
        tokenizer was made for if None, 77 where it does not say.
        """
        path = Path(folder)
        data = records.parse(_file(path, "config.json").read_bytes(), "JSON", str(path / "config.json"))
        named = (data.get("architectures") or [None])[0] if isinstance(data, dict) else None
        if named not in _MODELS:
            raise ValueError(f"folder must have one of {', '.join(_MODELS)}, got {records.shown(named)} in {path}")
        model = _MODELS[named][0]
        inner = data.get("text_config") or data
        width = inner.get("d_model" if model == "T5EncoderModel" else "hidden_size")
        vector = data.get("projection_dim") if model.endswith("Projection") else width
        if tokenizer is None:
            beside = path.with_name(path.name.replace("text_encoder", "tokenizer"))
            tokenizer = path if (path / "tokenizer_config.json").is_file() or not beside.is_dir() else beside
        made: dict[str, Any] = {"layer": layer, "dtype": dtype, "vector_channels": vector if pooled else 0}
        known = {"folder": str(path), "tokenizer": str(tokenizer), "model": model, "context_channels": width}
        found = cls(PretrainedTextConfig.from_dict({**known, **made}))
        most = int(getattr(found._tokenizer(), "model_max_length", 77))
        length = (most if most <= LONGEST else 77) if length is None else length
        found.config = dataclasses.replace(found.config, length=length)
        return found

    @property
    def null(self) -> Tensor:
        """int64 [L]: the empty text."""
        return self.tokens("")[0]

    def tokens(self, texts: str | Sequence[str]) -> Tensor:
        """int64 [B, L] of texts, on the CPU; longer ones are cut."""
        given = [texts] if isinstance(texts, str) else list(texts)
        found = self._tokenizer()(given, padding="max_length", truncation=True, max_length=self.config.length)
        return torch.tensor(found["input_ids"], dtype=torch.int64, device="cpu")

    @torch.no_grad()
    def condition(self, tokens: Tensor) -> dict[str, Tensor]:
        """What a network is given: "context" [B, L, context_channels], and "vector" [B, vector_channels] if pooled."""
        check_tokens(tokens, None)
        config, model = self.config, self._model(tokens.device)
        hides, kept, asked = _MODELS[config.model][1], None, {}
        if hides:
            kept = tokens != self._tokenizer().pad_token_id
            # A text of padding alone would attend to nothing: its first token counts as one.
            seen = kept | (torch.arange(tokens.shape[1], device=tokens.device) == 0)
            asked = {"attention_mask": seen.to(torch.int64)}
        out = model(input_ids=tokens, output_hidden_states=config.layer != -1, **asked)
        context = out.last_hidden_state if config.layer == -1 else out.hidden_states[config.layer]
        found = {"context": context if kept is None else context * kept[..., None].to(context.dtype)}
        if config.vector_channels:
            found["vector"] = out.text_embeds if config.model.endswith("Projection") else out.pooler_output
        return found

    def forward(self, tokens: Tensor) -> Tensor:
        return self.condition(tokens)["context"]

    def _tokenizer(self) -> Any:
        if "tokenizer" not in self._read:
            library = need("transformers", "transformers", "text")
            path = Path(self.config.tokenizer)
            _file(path, "tokenizer_config.json")
            self._read["tokenizer"] = library.AutoTokenizer.from_pretrained(
                str(path), local_files_only=True, trust_remote_code=False
            )
        return self._read["tokenizer"]

    def _model(self, device: torch.device) -> Any:
        """The encoder, on the device of the tokens."""
        if "model" not in self._read:
            library, config = need("transformers", "transformers", "text"), self.config
            _file(Path(config.folder), "config.json")
            read = getattr(library, config.model).from_pretrained
            try:
                with neutral():
                    model = read(
                        config.folder, local_files_only=True, use_safetensors=True, dtype=_DTYPES[config.dtype]
                    )
            except OSError as error:
                reason = " ".join(str(error).split())[:200]
                raise ValueError(
                    f"folder must have the weights of {config.model} as safetensors, got {reason}"
                ) from error
            self._read["model"] = model.eval().requires_grad_(False)
        found = self._read["model"]
        return found if found.device == device else found.to(device)


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(f"there is no {name} in {folder}, which transformers' save_pretrained writes")
    return folder / name
