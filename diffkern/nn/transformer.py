"""Transformer blocks over the positions of an image: self-attention, attention to a context, a gated layer."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from diffkern.names import Attention
from diffkern.nn.heads import count_heads
from diffkern.nn.norm import GroupNormAct
from diffkern.ops import attention


class TransformerBlock(nn.Module):
    """LayerNorm and self-attention, LayerNorm and attention to a context, LayerNorm and GEGLU, each with its skip.

    The block of latent diffusion (Rombach et al. 2022; lecture 002 on text). ``block(tokens, context)``: tokens
    [B, N, C]; context [B, T, 2 C], keys then values as ``block.kv`` makes them of the context tokens [B, T, E], or None
    for a block without a context (`context_channels` 0). GEGLU (Shazeer 2020): value gelu(gate), four times as wide.
    ``mask``: bool [B, 1, 1, N], the tokens that self-attention sees (by torch's kernel); None: all.
    """

    attention: Attention = "diffkern"

    def __init__(self, channels: int, context_channels: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = count_heads(channels, heads)
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out1 = nn.Linear(channels, channels)
        if context_channels:
            self.norm2 = nn.LayerNorm(channels)
            self.q = nn.Linear(channels, channels, bias=False)
            self.kv = nn.Linear(context_channels, 2 * channels, bias=False)
            self.out2 = nn.Linear(channels, channels)
        self.norm3 = nn.LayerNorm(channels)
        self.ff_enter = nn.Linear(channels, 8 * channels)
        self.ff_leave = nn.Linear(4 * channels, channels)
        self.dropout = nn.Dropout(dropout)

    @property
    def crosses(self) -> bool:
        """Whether the block attends to a context."""
        return hasattr(self, "kv")

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """[B, N, C] of queries [B, N, C], and keys and values [B, T, C], split into heads where they lie."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if mask is not None:
            return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        run = F.scaled_dot_product_attention if self.attention == "torch" else attention
        return run(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, tokens: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(self.norm1(tokens)).chunk(3, dim=-1)
        tokens = tokens + self.dropout(self.out1(self._attended(q, k, v, mask)))
        if context is not None:
            k, v = context.chunk(2, dim=-1)
            tokens = tokens + self.dropout(self.out2(self._attended(self.q(self.norm2(tokens)), k, v)))
        value, gate = self.ff_enter(self.norm3(tokens)).chunk(2, dim=-1)
        out: Tensor = tokens + self.ff_leave(self.dropout(value * F.gelu(gate)))
        return out


class SpatialTransformer(nn.Module):
    """GroupNorm, 1 x 1, transformer blocks over all positions, 1 x 1, plus the input: [B, C, H, W] to the same.

    ``block(x, contexts)``: one entry [B, T, 2 C] for each transformer block that attends to a context. In
    channels_last the tokens are x itself, without copies. `heads`: as in `count_heads`.
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        depth: int,
        heads: int,
        *,
        groups: int = 32,
        eps: float = 1e-6,
        dropout: float = 0.0,
        attention: Attention = "diffkern",
        zero_init: bool = True,
    ) -> None:
        super().__init__()
        self.norm = GroupNormAct(groups, channels, eps, silu=False)
        self.enter = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, context_channels, heads, dropout) for _ in range(depth))
        self.leave = nn.Linear(channels, channels)
        if zero_init:
            nn.init.zeros_(self.leave.weight)
            nn.init.zeros_(self.leave.bias)
        self.set_attention(attention)

    @property
    def transformers(self) -> list[TransformerBlock]:
        """The transformer blocks."""
        return [block for block in self.blocks if isinstance(block, TransformerBlock)]

    def set_attention(self, attention: Attention) -> None:
        """The kernels of every block: "diffkern" or "torch"."""
        self.norm.attention = attention
        for block in self.transformers:
            block.attention = attention

    def forward(self, x: Tensor, contexts: tuple[Tensor, ...] = ()) -> Tensor:
        tokens = self.enter(self.norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        left = list(contexts)
        for block in self.transformers:
            tokens = block(tokens, left.pop(0) if block.crosses else None)
        out = self.leave(tokens).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        return x + out
