"""A network that is given texts: tokens go through an encoder, whose output its transformer blocks attend to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffkern import records
from diffkern.names import Attention
from diffkern.nn.embedded import switch_attention
from diffkern.nn.plain import Snapshot, is_plain, version
from diffkern.nn.text import TextEncoder, TextEncoderConfig
from diffkern.nn.text_pretrained import PretrainedText, PretrainedTextConfig
from diffkern.nn.wrappers import _data, _Wrapper, _WrapperConfig

__all__ = ["TextConditioned", "TextConditionedConfig"]

_TEXTS: dict[str, tuple[type[nn.Module], type]] = {
    "TextEncoderConfig": (TextEncoder, TextEncoderConfig),
    "PretrainedTextConfig": (PretrainedText, PretrainedTextConfig),
}
_KINDS = {name: pair[1] for name, pair in _TEXTS.items()}
Rows = Callable[[int, Tensor, Tensor, Any], Tensor]


@dataclasses.dataclass(frozen=True)
class TextConditionedConfig(_WrapperConfig):
    """A `TextConditioned`: the network's configuration and the encoder's, each as plain data with its name as "kind".

    network   a `UNetConfig` with transformer blocks, a context and no classes
    text      a `TextEncoderConfig` or a `PretrainedTextConfig`
    """

    text: dict[str, Any]

    def __post_init__(self) -> None:
        super().__post_init__()
        inner, text = self.inner, self.text_config
        object.__setattr__(self, "text", records.kind_of(text, _KINDS, "text", "give one of these"))
        if getattr(inner, "classes", 0):
            raise ValueError(
                f"TextConditionedConfig.network must have classes = 0, its condition being text, got {inner.classes}"
            )
        for name in ("context_channels", "vector_channels"):
            own, given = getattr(inner, name, 0), getattr(text, name)
            if own != given:
                raise ValueError(
                    f"TextConditionedConfig.network must have {name} = {given}, those of the text, got {own}"
                )

    @property
    def text_config(self) -> Any:
        """The configuration of the encoder."""
        return records.of_kind(self.text, _KINDS, "text")

    @property
    def time_scale(self) -> float:
        """Of the network inside."""
        return float(self.inner.time_scale)


class TextConditioned(_Wrapper):
    """A network F and an encoder: ``model(x, t, tokens) = F(x, t, {"context": encoder(tokens)})``.

    tokens int64 [B, L], which ``model.tokens(["seven, thick", ...])`` makes; None: the empty text, `null`, which
    `diffkern.Diffusion` puts in place of dropped conditions and guides by. A dict has "tokens" and what else F takes.
    With `PretrainedText` F may have ``vector_channels``, and is given the vector of the whole text too; the encoder is
    then neither trained nor stored. Rombach et al. 2021 (arXiv 2112.10752), section 3.3; lecture 002, text conditions.

    In a run of `diffkern.sample` a text is encoded once. x, t and the result as of F. ValueError as of F, and for
    tokens of another shape, number or vocabulary.
    """

    CONFIG = TextConditionedConfig
    config: TextConditionedConfig

    def __init__(
        self, config: TextConditionedConfig, network: nn.Module | None = None, text: nn.Module | None = None
    ) -> None:
        super().__init__(config, network)
        self.text: Any = _TEXTS[config.text["kind"]][0](config.text_config) if text is None else text

    @classmethod
    def of(cls, network: nn.Module, text: Any) -> TextConditioned:
        """The wrapper around this network and this encoder, or a new encoder of this configuration."""
        known = {encoder.__name__: config for encoder, config in _TEXTS.values()}
        if isinstance(text, tuple(_KINDS.values())):
            text = _TEXTS[type(text).__name__][0](text)
        if type(text).__name__ not in known:
            raise ValueError(f"text must be one of {', '.join(known)} or its config, got {type(text).__name__}")
        inner: Any = network
        stored = records.kind_of(text.config, _KINDS, "text", "give one of these")
        return cls(cls.CONFIG(_data(getattr(inner, "config", inner)), stored), network, text)

    @property
    def null(self) -> Tensor:
        """int64 [L]: the tokens of the empty text, the condition that means none."""
        found: Tensor = self.text.null
        return found

    def tokens(self, texts: str | Sequence[str]) -> Tensor:
        """int64 [B, L] of texts, on the device of the weights; ValueError for words that the encoder does not know."""
        found: Tensor = self.text.tokens(texts)
        return found.to(next(self.network.parameters()).device)

    @property
    def checkpointing(self) -> bool:
        """Whether the network's blocks run again in the backward pass and keep nothing inside."""
        return bool(getattr(self.network, "checkpointing", False))

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        self.network.checkpointing = value  # type: ignore[assignment]

    def set_attention(self, attention: Attention) -> TextConditioned:
        """Switches the network to the kernels of "diffkern" or of "torch", as `UNet.set_attention`; the model."""
        inner: Any = self.network
        inner.set_attention(attention)
        switch_attention(self.text, attention)
        self.config = dataclasses.replace(self.config, network=_data(inner.config))
        return self

    def pieces(self) -> list[list[nn.Module]]:
        """How FSDP2 may cut the model: the network's pieces, then the encoder."""
        inner: Any = self.network
        return [*inner.pieces(), *([[self.text]] if any(True for _ in self.text.parameters()) else [])]

    def _given(self, cond: Any, batch: int) -> dict[str, Any]:
        """The condition of the network inside."""
        given = dict(cond) if isinstance(cond, Mapping) else {"tokens": cond}
        tokens = given.pop("tokens", given.pop("class", None))  # what a `Diffusion` with a degradation calls them
        if tokens is None:
            tokens = self.null.expand(batch, -1).to(next(self.network.parameters()).device)
        if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.shape[0] != batch:
            got = list(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise ValueError(f"cond must be tokens, int64 [{batch}, L], got {got}")
        return {**given, **self.text.condition(tokens)}

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        found: Tensor = self.network(x, t, self._given(cond, x.shape[0]))
        return found

    def sampling_rows(self, times: Tensor, cond: Any, batch: int) -> Rows | None:
        """A function of (i, x, t, cond) that is this model at ``times[i]``, with its bits, and reads the text once.

        None where something watches a module, or the encoder is different in every call (dropout).
        """
        modules = [self, *self.text.modules()]
        random = any(isinstance(m, nn.Dropout) and m.training and m.p > 0.0 for m in modules)
        unseen = any(t.is_inference() for t in [*_tensors(cond), *self.text.parameters()])
        if random or unseen or type(self) is not TextConditioned or not all(is_plain(m, type(m)) for m in modules):
            return None
        given = self._given(cond, batch)
        offer: Any = getattr(self.network, "sampling_rows", None)
        rows = None if offer is None else offer(times, given, batch)
        return None if rows is None else _Read(self, rows, cond, given, modules, times.device.type)


def _tensors(cond: Any) -> list[Tensor]:
    values = cond.values() if isinstance(cond, Mapping) else [cond]
    return [t for t in values if isinstance(t, Tensor)]


class _Read:
    """A model over the rows of a plan, whose text was read: the model itself where that is no longer what it was."""

    def __init__(self, model: Any, rows: Rows, cond: Any, given: dict[str, Any], modules: list[Any], kind: str) -> None:
        self.model, self.rows, self.cond, self.given, self.kind = model, rows, cond, given, kind
        self._links = [(m._modules, *pair) for m in modules for pair in m._modules.items()]
        weights = [(m._parameters, *pair) for m in modules for pair in m._parameters.items() if pair[1] is not None]
        self._weights = [(*weight, Snapshot(weight[2])) for weight in weights]
        self._mark = self._state()

    def _state(self) -> list[Any]:
        kind = self.kind
        mode = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_grad_enabled()
        return [mode, *((id(t), version(t)) for t in _tensors(self.cond))]

    def _holds(self) -> bool:
        if self._state() != self._mark or not all(place.get(name) is part for place, name, part in self._links):
            return False
        return all(place.get(name) is p and snapshot.is_of(p) for place, name, p, snapshot in self._weights)

    def __call__(self, i: int, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        if cond is self.cond and x.shape[0] == self.given["context"].shape[0] and self._holds():
            return self.rows(i, x, t, self.given)
        found: Tensor = self.model(x, t) if cond is None else self.model(x, t, cond)
        return found
