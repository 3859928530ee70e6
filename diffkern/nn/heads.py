"""How channels are cut into attention heads, and whose kernels attend."""

from __future__ import annotations


def count_heads(channels: int, num_heads: int = 1, num_head_channels: int | None = None) -> int:
    """The number of heads: `num_heads`, or channels / `num_head_channels` where that is given.

    ValueError where the channels cannot be divided so, or a head would get a number that the kernels do not take:
    multiples of 8 up to 256, and 512.
    """
    if num_head_channels is not None:
        if num_head_channels < 1 or channels % num_head_channels:
            raise ValueError(f"num_head_channels must divide the {channels} channels, got {num_head_channels}")
        num_heads = channels // num_head_channels
    if num_heads < 1 or channels % num_heads:
        raise ValueError(f"num_heads must divide the {channels} channels, got {num_heads}")
    dim = channels // num_heads
    if dim != 512 and (dim % 8 or dim > 256):
        raise ValueError(
            f"the channels of a head must be a multiple of 8 up to 256, or 512, got {dim} ({channels} channels in "
            f"{num_heads} heads)"
        )
    return num_heads


def check_attention(name: str, value: object) -> None:
    """Raise ValueError unless the argument ``name`` is one of `Attention`."""
    if value not in ("diffkern", "torch"):
        raise ValueError(f"{name} must be one of diffkern, torch, got {value!r}")
