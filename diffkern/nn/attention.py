"""Attention blocks of diffusion UNets over `diffkern.spatial_attention` and `diffkern.attention`.

The first two work on [B, C, positions...], contiguous or channels_last, and move nothing between the 1 x 1 convolutions
and the attention. With ``attention="torch"`` the same formula runs in `F.scaled_dot_product_attention`, for exporters
that know torch's operators alone (ONNX).
"""

from __future__ import annotations

import math
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern.checks import unknown
from diffkern.names import Attention, HeadOrder
from diffkern.nn.heads import check_attention, count_heads
from diffkern.nn.norm import GroupNormAct
from diffkern.nn.plain import is_plain
from diffkern.ops import attention, spatial_attention

__all__ = ["AttentionPool", "SpatialCrossAttention", "SpatialSelfAttention"]


def _silent(channels: int) -> nn.Conv1d:
    """A 1 x 1 convolution of zeros: a block that ends with it starts as the identity."""
    conv = nn.Conv1d(channels, channels, 1)
    for parameter in conv.parameters():
        nn.init.zeros_(parameter)
    return conv


def spatial_attention_by_torch(qkv: Tensor, num_heads: int, order: HeadOrder) -> Tensor:
    """What `diffkern.spatial_attention` computes, in torch's operators."""
    part, axes = {"new": (1, (3, num_heads, -1)), "legacy": (2, (num_heads, 3, -1)), "edm": (3, (num_heads, -1, 3))}[
        order
    ]
    q, k, v = (t.transpose(-1, -2) for t in qkv.flatten(2).unflatten(1, axes).unbind(part))  # [B, heads, N, D]
    out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(-1, -2).flatten(1, 2).unflatten(2, qkv.shape[2:])


class _Block(nn.Module):
    """What both blocks share: the norm, 1 x 1 convolutions over any positions, weights of any 1 x 1 shape."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        num_head_channels: int | None,
        groups: int,
        eps: float,
        attention: Attention,
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_attention("attention", attention)
        if groups < 1 or channels % groups:
            raise ValueError(f"groups must divide the {channels} channels, got {groups}")
        self.channels = channels
        self.num_heads = count_heads(channels, num_heads, num_head_channels)
        self.residual_scale = residual_scale
        self.norm = GroupNormAct(groups, channels, eps, silu=False)
        self.attention = attention

    @property
    def attention(self) -> Attention:
        """Whose kernels run, the norm's too: "diffkern" or "torch"."""
        return self.norm.attention

    @attention.setter
    def attention(self, value: Attention) -> None:
        self.norm.attention = value

    def _check(self, x: Tensor) -> None:
        if x.dim() < 3 or x.shape[1] != self.channels:
            raise ValueError(f"x must have shape (B, {self.channels}, positions...), got {tuple(x.shape)}")

    def _joined(self, x: Tensor, branch: Tensor) -> Tensor:
        total = x + branch
        return total if self.residual_scale == 1.0 else total * self.residual_scale

    @staticmethod
    def _pointwise(conv: nn.Conv1d, x: Tensor) -> Tensor:
        """The 1 x 1 convolution; of channels_last as a product of what lies there, which keeps the format.

        A layer that is more than one (LoRA, hooks) is called.
        """
        if not is_plain(conv, nn.Conv1d):
            made: Tensor = conv(x.flatten(2)).unflatten(2, x.shape[2:])
            return made
        if x.dim() == 4 and x.stride(1) == 1:
            return F.linear(x.permute(0, 2, 3, 1), conv.weight[..., 0], conv.bias).permute(0, 3, 1, 2)
        if x.dim() == 4:
            return F.conv2d(x, conv.weight[..., None], conv.bias)
        return F.conv1d(x.flatten(2), conv.weight, conv.bias).unflatten(2, x.shape[2:])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        """1 x 1 weights of a linear layer, a one- or a two-dimensional convolution fit alike."""
        for name, module in self.named_children():
            key = f"{prefix}{name}.weight"
            given = state_dict.get(key)
            if isinstance(module, nn.Conv1d) and isinstance(given, Tensor) and given.dim() in (2, 4):
                if math.prod(given.shape[2:]) != 1:
                    raise ValueError(f"{key} must be the weight of a 1 x 1 convolution, got {tuple(given.shape)}")
                state_dict[key] = given.reshape(*given.shape[:2], 1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class SpatialSelfAttention(_Block):
    """GroupNorm, 1 x 1 to q, k, v, self-attention over all positions, 1 x 1, plus the input: [B, C, ...] to the same.

    The attention block of DDPM (Ho et al. 2020) and ADM (Dhariwal and Nichol 2021). Parameters have the names and the
    shapes of guided-diffusion's AttentionBlock (`norm`, `qkv`, `proj_out`, 1 x 1 weights as [out, in, 1]), so that
    `load_state_dict` takes its weights; those of linear layers and two-dimensional convolutions are reshaped. Heads:
    `num_heads`, or channels / `num_head_channels`. `order` as in `diffkern.spatial_attention`: weights of OpenAI's
    checkpoints need "legacy". ADM: groups 32, eps 1e-5; DDPM: eps 1e-6, one head. The last layer starts at zero.
    `attention`: "diffkern", or "torch" for `F.scaled_dot_product_attention`; the attribute may be set at any time.
    The sum with the input is multiplied by `residual_scale`.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        num_head_channels: int | None = None,
        *,
        order: HeadOrder = "new",
        groups: int = 32,
        eps: float = 1e-5,
        attention: Attention = "diffkern",
        residual_scale: float = 1.0,
    ) -> None:
        super().__init__(channels, num_heads, num_head_channels, groups, eps, attention, residual_scale)
        if order not in get_args(HeadOrder):
            raise ValueError(unknown("order", order, get_args(HeadOrder)))
        self.order = order
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = _silent(channels)

    def forward(self, x: Tensor) -> Tensor:
        self._check(x)
        qkv = self._pointwise(self.qkv, self.norm(x))
        if self.attention == "torch":
            out = spatial_attention_by_torch(qkv, self.num_heads, self.order)
        else:
            if self.order == "edm":
                qkv = qkv.contiguous()  # in channels_last the channels of such a head are not contiguous
            out = spatial_attention(qkv, self.num_heads, self.order)
        return self._joined(x, self._pointwise(self.proj_out, out))


class SpatialCrossAttention(_Block):
    """GroupNorm, 1 x 1 to q, attention of all positions to a context, 1 x 1, plus the input: [B, C, ...] to the same.

    The context [B, T, E] (the 77 tokens of a text encoder, say) becomes k and v in one linear layer. Parameters:
    `norm`, `q` [C, C, 1], `kv` [2 C, E] with k's rows first, `proj_out` [C, C, 1]. The last layer starts at zero.
    `attention` as in `SpatialSelfAttention`.
    """

    def __init__(
        self,
        channels: int,
        context_channels: int,
        num_heads: int = 1,
        num_head_channels: int | None = None,
        *,
        groups: int = 32,
        eps: float = 1e-5,
        attention: Attention = "diffkern",
    ) -> None:
        super().__init__(channels, num_heads, num_head_channels, groups, eps, attention)
        self.context_channels = context_channels
        self.q = nn.Conv1d(channels, channels, 1)
        self.kv = nn.Linear(context_channels, 2 * channels)
        self.proj_out = _silent(channels)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        self._check(x)
        if context.dim() != 3 or context.shape[0] != x.shape[0] or context.shape[2] != self.context_channels:
            raise ValueError(
                f"context must have shape ({x.shape[0]}, tokens, {self.context_channels}), got {tuple(context.shape)}"
            )
        heads = self.num_heads
        q = self._pointwise(self.q, self.norm(x)).flatten(2).unflatten(1, (heads, -1)).transpose(-1, -2)
        k, v = self.kv(context).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, heads, T, D]
        run = F.scaled_dot_product_attention if self.attention == "torch" else attention
        out = run(q, k, v).transpose(-1, -2).flatten(1, 2).unflatten(2, x.shape[2:])
        return x + self._pointwise(self.proj_out, out)


class AttentionPool(nn.Module):
    """[B, C, H, W] to [B, labels]: attention over the positions and their mean, read at the mean, and a linear layer.

    Radford et al. 2021 (CLIP), as in Dhariwal and Nichol 2021: learned positions [C, 1 + H W], the mean first.
    """

    attention: Attention = "diffkern"

    def __init__(self, positions: int, channels: int, heads: int, labels: int) -> None:
        super().__init__()
        self.heads = heads
        self.positions = nn.Parameter(torch.randn(channels, positions + 1) / channels**0.5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.leave = nn.Linear(channels, labels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2)
        if tokens.shape[2] + 1 != self.positions.shape[1]:
            raise ValueError(
                f"the classifier pools {self.positions.shape[1] - 1} positions, the image_size of its configuration, "
                f"got {tuple(x.shape[2:])}"
            )
        tokens = torch.cat([tokens.mean(dim=2, keepdim=True), tokens], dim=2) + self.positions.to(x.dtype)
        q, k, v = self.qkv(tokens.transpose(1, 2)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        run = F.scaled_dot_product_attention if self.attention == "torch" else attention
        out: Tensor = self.leave(run(q[:, :, :1], k, v).flatten(1))
        return out
