"""What the drop-ins make their rows of, and the dtypes and layouts that are plain torch's."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffkern import ops, streams
from diffkern.compat.kit import rows
from diffkern.plan import COLUMNS, LEARNED_COLUMNS, Row

CPU = torch.device("cpu")


def test_a_row_is_that_of_a_plan() -> None:
    values = {"a": 0.5, "d": -2.0, "clip": 1.0, "e3": 3.0}
    assert rows.row_of(**values) == list(Row(**values).coefficients())
    assert rows.table_by_rows(rows.row_of(), rows.row_of(**values)).tolist() == [
        list(Row().coefficients()),
        list(Row(**values).coefficients()),
    ]
    many = rows.table_of(2, a=torch.tensor([0.5, 0.25]), clip=1.0)
    assert many[1].tolist() == list(Row(a=0.25, clip=1.0, stream=streams.STEP + 1).coefficients())
    learned = rows.table_of(1, LEARNED_COLUMNS, r1=0.5)
    assert (learned.shape[1], learned[0, -1]) == (len(COLUMNS) + 2, 0.5)


@pytest.mark.parametrize("inference", [False, True])
def test_a_row_a_sample(inference: bool) -> None:
    """Numbers and tensors, also where the first caller is in inference mode."""
    rows._blank.__wrapped__.cache_clear()
    with torch.inference_mode(inference):
        table = rows.of_samples(3, CPU, a=1.0, d=torch.tensor([1.0, 2.0, 3.0]))
    assert not rows._blank(CPU).is_inference()
    assert table.tolist() == [list(Row(a=1.0, d=d).coefficients()) for d in (1.0, 2.0, 3.0)]


def test_columns() -> None:
    table = rows.table_of(2, a=1.0)
    other = rows.with_columns(table, a=torch.tensor([3.0, 4.0]), b=2.0)
    assert rows.column(other, "a").tolist() == [3.0, 4.0]
    assert rows.column(other, "b").tolist() == [2.0, 2.0]
    assert rows.column(table, "a").tolist() == [1.0, 1.0]


def test_split_rows_do_in_two_what_one_does() -> None:
    table = rows.table_of(1, p=1.5, q=-0.5, clip=0.7, a=0.3, b=0.6, e0=0.2, e2=-0.1)
    x, m, h0, h1, h2 = torch.randn(5, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    clean, rest = rows.split(table)
    x0 = ops.step(x, m, table=clean)[0].clamp(-0.7, 0.7)
    want = ops.step(x, m, None, h0, h1, h2, table=table)[0]
    torch.testing.assert_close(ops.step(x, m, None, x0, h0, h1, h2, table=rest)[0], want, rtol=1e-14, atol=1e-14)


def test_dtypes() -> None:
    half, brain, single, double = torch.float16, torch.bfloat16, torch.float32, torch.float64
    assert rows.promote(half) == half
    assert rows.promote(half, brain) == single
    assert rows.promote(half, half, double) == double
    assert (rows.wide(), rows.wide(half), rows.wide(half, double)) == (single, single, double)
    x = torch.ones(2)
    assert rows.as_dtype(x, single) is x
    assert rows.as_dtype(x, double).dtype == double


LAYOUTS = {
    "contiguous": torch.randn(2, 3, 8, 6),
    "channels last": torch.randn(2, 3, 8, 6).to(memory_format=torch.channels_last),
    "every second row": torch.randn(2, 3, 8, 6)[:, :, ::2],
    "permuted": torch.randn(6, 3, 8, 2).permute(3, 1, 0, 2),
    "one sample for all": torch.randn(1, 3, 8, 6).expand(2, -1, -1, -1),
    "one number a sample": torch.randn(3, 1, 1).expand(2, 3, 8, 6),
}


@pytest.mark.parametrize("like", LAYOUTS.values(), ids=LAYOUTS)
def test_a_state_lies_as_plain_torch_would_lay_it(like: Tensor) -> None:
    """The order in memory decides which element gets which draw of randn_like: that of 2 x + y, x the state."""
    y = torch.randn(like.shape)
    found, want = rows.in_format(y, like), 2 * like + torch.zeros_like(like)
    assert torch.equal(found, y)
    assert order(found) == order(want)
    draws = []
    for state in (found, want):
        torch.manual_seed(0)
        draws.append(torch.randn_like(state))
    assert torch.equal(*draws)
    assert math.prod(found.shape) == found.untyped_storage().size() // 4


def order(x: Tensor) -> list[int]:
    return sorted(range(x.ndim), key=lambda d: -x.stride()[d])
