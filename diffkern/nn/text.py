"""Text as a condition: the encoder of a small vocabulary, whose output a UNet's transformer blocks attend to.

Texts are tokens, int64 [B, L], which `Vocabulary` makes of words; `diffkern.nn.TextConditioned` puts encoder and
network together, and `diffkern.nn.PretrainedText` is CLIP or T5 in the encoder's place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffkern import records
from diffkern.modes import readable
from diffkern.nn.heads import count_heads
from diffkern.nn.transformer import TransformerBlock
from diffkern.vocabulary import PAD, Vocabulary, check_tokens

__all__ = ["TextEncoder", "TextEncoderConfig", "Vocabulary"]

LARGEST, DEEPEST = 1 << 14, 256
"""Of every width, and of the number of layers."""


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """A `TextEncoder`.

    words, length      the `Vocabulary`: its words, and L, the tokens of a text
    context_channels   width of what comes out, that of the network's context
    width              of the layers
    depth              number of layers
    heads              of attention in each
    dropout            in them
    """

    words: tuple[str, ...]
    length: int
    context_channels: int = 64
    width: int = 64
    depth: int = 2
    heads: int = 4
    dropout: float = 0.0

    def __post_init__(self) -> None:
        records.check_fields(self, "TextEncoderConfig.")
        _ = self.vocabulary  # raises
        for name, least, most in (("context_channels", 1, LARGEST), ("width", 1, LARGEST), ("depth", 0, DEEPEST)):
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"TextEncoderConfig.{name} must lie in {least}..{most}, got {records.shown(value)}")
        try:
            count_heads(self.width, self.heads)
        except ValueError as error:
            raise ValueError(f"TextEncoderConfig.heads does not fit: {error}") from None
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"TextEncoderConfig.dropout must lie in [0, 1), got {self.dropout}")

    @staticmethod
    def of(vocabulary: Vocabulary, **options: Any) -> TextEncoderConfig:
        """An encoder of this vocabulary."""
        return TextEncoderConfig(vocabulary.words, vocabulary.length, **options)

    @property
    def vocabulary(self) -> Vocabulary:
        """Its words and their numbers."""
        return Vocabulary(self.words, self.length)

    @property
    def vector_channels(self) -> int:
        """Width of the vector of a whole text: there is none."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any]) -> TextEncoderConfig:
        """A configuration from `to_dict` or from its JSON; ValueError for an unknown name and for another type."""
        return records.record(TextEncoderConfig, values, "TextEncoderConfig.")


class TextEncoder(nn.Module):
    """Tokens int64 [B, l], l <= L, to the context [B, l, context_channels]: a transformer over the words of a text.

        h = E[token] + P[position],   layers on h,   context = W LayerNorm(h)

    The layers are `TransformerBlock`s without a context: LayerNorm before attention and GEGLU (Vaswani et al. 2017,
    with the norms before). Padding is seen by no word, and its own context is 0, so a text has the same context however
    far it is padded. Lecture 002, text conditions; Rombach et al. 2021 (arXiv 2112.10752), section 3.3.

    ValueError for other tokens; where values are not read (a GPU), NaN for one that the vocabulary does not have.
    """

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.config, self.vocabulary = config, config.vocabulary
        self.words = nn.Embedding(self.vocabulary.size, config.width)
        self.positions = nn.Parameter(0.1 * torch.randn(config.length, config.width))
        self.layers = nn.ModuleList(
            TransformerBlock(config.width, 0, config.heads, config.dropout) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.width)
        self.leave = nn.Linear(config.width, config.context_channels)

    @property
    def null(self) -> Tensor:
        """int64 [L]: the empty text."""
        return self.vocabulary.null

    def tokens(self, texts: str | Sequence[str]) -> Tensor:
        """int64 [B, L] of texts, on the device of the weights; ValueError for an unknown word."""
        return self.vocabulary.tokens(texts).to(self.positions.device)

    def condition(self, tokens: Tensor) -> dict[str, Tensor]:
        """What a network is given: {"context": [B, l, context_channels]}."""
        return {"context": self(tokens)}

    def forward(self, tokens: Tensor) -> Tensor:
        size, length = self.vocabulary.size, self.config.length
        check_tokens(tokens, size if isinstance(tokens, Tensor) and readable(tokens) else None)
        if not 1 <= tokens.shape[1] <= length:
            raise ValueError(f"tokens must be 1..{length} a text, got {list(tokens.shape)}")
        if tokens.device != self.positions.device:
            raise ValueError(
                f"tokens must be on {self.positions.device}, the device of the weights, got {tokens.device}"
            )
        outside = (tokens < 0) | (tokens >= size)
        kept = tokens != PAD
        h = self.words(tokens.clamp(0, size - 1)) + self.positions[: tokens.shape[1]]
        # A text of padding alone would attend to nothing: its first token counts as one.
        seen = kept | (torch.arange(tokens.shape[1], device=tokens.device) == 0)
        for layer in self.layers:
            h = layer(h, None, seen[:, None, None])
        found: Tensor = self.leave(self.norm(h))
        found = torch.where(kept[..., None], found, torch.zeros((), dtype=found.dtype, device=found.device))
        return found.masked_fill(outside.any(1)[:, None, None], float("nan"))
