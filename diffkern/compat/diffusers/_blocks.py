"""What the replaced blocks share: when a layer's numbers may be read, where a result may be written, norm and SiLU.

A block is replaced by giving the object a subclass of diffusers' class (`module.__class__ = ...`), of the same name and
without a constructor or a parameter of its own. Why not a `forward` of the instance: accelerate's and diffusers' own
hooks put theirs there, over what they find, and take it out again, so two owners would overwrite each other; and pickle
looks a bound method up by its name on the object that it is just making, which gives diffusers' method back. A class
survives copies, pickles, hooks, `torch.compile` (whose guards look at it), checkpointing and `isinstance`, and all that
goes by the name of a class (`_no_split_modules`, saved configs).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffkern.compat.kit.kernels import why_not_on
from diffkern.names import Activation
from diffkern.nn.plain import is_plain
from diffkern.ops import group_norm_act


def plus(made: Tensor, x: Tensor, layer: Any) -> Tensor:
    """made + x, written into `made` where the plain layer of torch that has just made it is the only one to know it."""
    if made.dtype == x.dtype and made.shape == x.shape and is_fresh(layer):
        return made.add_(x)
    return made + x


def last_of(layers: Any) -> Any:
    """The linear layer of [linear, dropout] where that is all that happens to its result, for `plus`; else None."""
    return layers[0] if is_plain(layers[1], nn.Dropout) else None


def is_fresh(layer: Any) -> bool:
    """Whether what the layer returned may be written to: neither hooks nor its gradient have kept it."""
    return is_plain(layer, nn.Conv2d) or is_plain(layer, nn.Linear)


def normed(
    norm: Any,
    act: Any,
    x: Tensor,
    *,
    add: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
) -> Tensor:
    """act(norm(x + add) (1 + scale) + shift), in one op where norm is torch's GroupNorm and act its SiLU or None.

    add, scale and shift [B, C] or [1, C], or None.
    """
    if is_plain(norm, nn.GroupNorm) and why_not_on(x) is None:
        fused = is_plain(act, nn.SiLU)
        scale, shift, add = (t if t is None else t.expand(x.shape[0], -1) for t in (scale, shift, add))
        y = by_op(norm, x, fused, scale=scale, shift=shift, add=add)
        return y if fused or act is None else act(y)
    y = norm(x if add is None else x + _spread(add, x))
    if scale is not None and shift is not None:
        y = y * (1 + _spread(scale, x)) + _spread(shift, x)
    return y if act is None else act(y)


def by_op(norm: Any, x: Tensor, silu: bool, **operands: Tensor | None) -> Tensor:
    """A GroupNorm's numbers by `diffkern.group_norm_act`."""
    act: Activation | None = "silu" if silu else None
    return group_norm_act(x, norm.num_groups, norm.weight, norm.bias, **operands, eps=norm.eps, act=act)


def _spread(t: Tensor, x: Tensor) -> Tensor:
    """[B, C] over the positions of x."""
    return t.reshape(*t.shape, *[1] * (x.dim() - 2))


def will_differentiate(*tensors: Tensor) -> bool:
    """Whether a gradient may be asked through what is made of these."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
