"""Group normalisation, modulation and SiLU as one module over one op."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from diffkern.names import Attention
from diffkern.ops import group_norm_act


def count_groups(channels: int, groups: int = 8, group_channels: int = 1) -> int:
    """The largest number of groups, at most `groups`, of at least `group_channels` each, that divides the channels."""
    most = max(1, min(groups, channels // group_channels))
    return next(n for n in range(most, 0, -1) if channels % n == 0)


def group_norm_act_by_torch(
    x: Tensor, norm: nn.GroupNorm, silu: bool, add: Tensor | None, scale: Tensor | None, shift: Tensor | None
) -> Tensor:
    """What `diffkern.ops.group_norm_act` computes, in torch's operators."""
    ones = [1] * (x.dim() - 2)
    if add is not None:
        x = x + add.unflatten(1, (-1, *ones))
    h = F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)
    if scale is not None:
        h = h * (1.0 + scale.unflatten(1, (-1, *ones)))
    if shift is not None:
        h = h + shift.unflatten(1, (-1, *ones))
    return F.silu(h) if silu else h


class GroupNormAct(nn.GroupNorm):
    """act((1 + scale) GroupNorm(x + add) + shift) by one op, `diffkern.ops.group_norm_act`, its formula there.

    A `torch.nn.GroupNorm` with affine parameters that also modulates and activates: x [B, C, ...], contiguous or
    channels_last, in any dtype whichever the parameters have; `add`, `scale` and `shift` [B, C] or None. `silu`:
    whether SiLU follows. `attention`: "torch" for the same formula in torch's operators (ONNX).
    """

    attention: Attention = "diffkern"

    def __init__(self, groups: int, channels: int, eps: float = 1e-5, *, silu: bool = True) -> None:
        super().__init__(groups, channels, eps=eps)
        self.silu = silu

    def forward(
        self, x: Tensor, *, add: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None
    ) -> Tensor:
        if self.attention == "torch":
            return group_norm_act_by_torch(x, self, self.silu, add, scale, shift)
        return group_norm_act(
            x,
            self.num_groups,
            self.weight,
            self.bias,
            add=add,
            scale=scale,
            shift=shift,
            eps=self.eps,
            act="silu" if self.silu else None,
        )
