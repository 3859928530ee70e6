"""What torch's counter of operations says of ours: the products of the formula, forward and backward."""

from __future__ import annotations

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import diffkern
from diffkern import ops
from diffkern.ops.flops import FLOP_FORMULAS


def counted(run: object) -> int:
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    with counter:
        run()  # type: ignore[operator]
    return int(counter.get_total_flops())


def test_attention_counts_its_products() -> None:
    q, k, v = (torch.randn(2, 3, n, 8, requires_grad=True) for n in (5, 7, 7))
    product = 2 * 2 * 3 * 5 * 7 * 8
    assert counted(lambda: ops.attention(q, k, v)) == 2 * product
    out = ops.attention(q, k, v)
    assert counted(lambda: out.sum().backward()) == 5 * product
    qkv = torch.randn(2, 3 * 3 * 8, 2, 3, requires_grad=True)
    out = ops.spatial_attention(qkv, num_heads=3)
    assert counted(lambda: ops.spatial_attention(qkv, num_heads=3)) == 2 * (2 * 2 * 3 * 6 * 6 * 8)
    assert counted(lambda: out.sum().backward()) == 5 * (2 * 2 * 3 * 6 * 6 * 8)


def test_a_convolution_counts_as_torchs_own() -> None:
    x, weight = torch.randn(2, 16, 9, 8), torch.randn(32, 16, 3, 3)
    assert counted(lambda: diffkern.conv3x3(x, weight)) == counted(lambda: F.conv2d(x, weight, padding=1))
    upsampled = counted(lambda: diffkern.conv3x3(x, weight, upsample=True))
    assert upsampled == 4 * counted(lambda: F.conv2d(x, weight, padding=1))


def test_a_linear_layer_over_rows_counts_as_torchs_own() -> None:
    x, weight = torch.randn(5, 16), torch.randn(8, 16)
    assert counted(lambda: diffkern.linear_rows(x, weight)) == counted(lambda: F.linear(x, weight)) == 2 * 5 * 16 * 8
