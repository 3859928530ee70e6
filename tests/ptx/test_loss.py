"""The loss and its gradient on the device: the bits of the CPU kernel, whatever the grid."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.native_layout import SUM_BLOCK
from ptx.calls.loss import MEAN, NONE, SUM, loss
from ptx.harness import DTYPES, Cpu, Device, check, same_bits, with_changes

pytestmark = pytest.mark.full  # test_every_op.py has each op once

COUNTS = (1, 3, 4, 5, 31, 1009, SUM_BLOCK - 1, SUM_BLOCK, SUM_BLOCK + 1, 2 * SUM_BLOCK + 5)


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "padded", "strided"])
def test_sizes(device: Device, cpu: Cpu, state: torch.dtype, layout: str) -> None:
    for count in COUNTS:
        shape = (count,) if layout != "strided" else (count, 1)
        check(device, cpu, loss(layout, 2, shape, state))
    check(device, cpu, loss(layout, 3, (5, 100) if layout == "strided" else (500,), state, tensor_noise=True))


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("pred_dtype", DTYPES, ids=str)
def test_prediction_dtypes(device: Device, cpu: Cpu, state: torch.dtype, pred_dtype: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last", "misaligned", "strided"):
        check(device, cpu, loss(layout, 3, (4, 259), state, pred_dtype=pred_dtype))


@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pred_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wide_gradients_of_narrow_predictions(
    device: Device, cpu: Cpu, state: torch.dtype, pred_dtype: torch.dtype
) -> None:
    for layout in ("contiguous", "channels_last", "misaligned", "strided"):
        check(device, cpu, loss(layout, 3, (4, 259), state, pred_dtype=pred_dtype, grad_dtype=torch.float32))


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "channels_last_misaligned"])
def test_channels_last(device: Device, cpu: Cpu, state: torch.dtype, layout: str) -> None:
    for shape in ((3, 19, 23), (4, 16, 32), (320, 7), (1100, 2)):
        check(device, cpu, loss(layout, 2, shape, state))
        check(device, cpu, loss(layout, 2, shape, state, tensor_noise=True))


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_reductions(device: Device, cpu: Cpu, state: torch.dtype, reduction: int) -> None:
    for batch in (1, 2, 7):
        for grad in (False, True):
            check(device, cpu, loss("contiguous", batch, (70,), state, reduction=reduction, grad=grad))


def test_large_batch(device: Device, cpu: Cpu) -> None:
    """More samples than lanes: each lane adds several."""
    for reduction in (MEAN, SUM):
        check(device, cpu, loss("contiguous", 600, (3,), torch.float32, reduction=reduction))


def test_many_blocks(device: Device, cpu: Cpu) -> None:
    """More blocks of 1024 than lanes."""
    for state in (torch.float32, torch.bfloat16):
        check(
            device,
            cpu,
            loss("contiguous", 1, (259 * SUM_BLOCK + 13,), state, reduction=MEAN, grad=False, tensor_noise=True),
        )


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_special_values(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    check(device, cpu, loss("contiguous", 3, (900,), state, special=True))


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_grid_and_batch_do_not_matter(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    """Vector, scalar and strided kernels (of different block sizes), alone or in a batch: one result a sample."""
    call = loss("contiguous", 4, (2, 1204), state)
    whole = device.run(call)
    for layout in ("misaligned", "padded", "strided"):
        other = device.run(loss(layout, 4, (2, 1204), state))
        assert same_bits(other["value"], whole["value"])
        assert same_bits(other["grad"], whole["grad"])
    assert call.index is not None
    assert call.seeds is not None
    for b in (3, 0):
        one = with_changes(
            call, batch=1, inputs={n: t[b : b + 1] for n, t in call.inputs.items()},
            index=call.index[b : b + 1], seeds=call.seeds[b : b + 1],
        )  # fmt: skip
        assert same_bits(device.run(one)["value"][0], whole["value"][b])


def test_value_is_the_mean_squared_error(device: Device) -> None:
    call = loss("contiguous", 3, (1500,), torch.float32, tensor_noise=True)
    got = device.run(call)
    assert call.table is not None
    for b in range(3):
        u, v, weight = call.table[b].tolist()
        pred, x0, z = (call.inputs[n][b].double() for n in ("pred", "x0", "noise"))
        difference = pred - (u * x0 + v * z)
        assert math.isclose(got["value"][b].item(), weight * difference.square().mean().item(), rel_tol=1e-5)
        torch.testing.assert_close(got["grad"][b].double(), 2 * weight / 1500 * difference, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bad", [-1, 5, 2**32 + 1])
def test_index_outside_the_table_gives_nan(device: Device, cpu: Cpu, bad: int) -> None:
    for state in DTYPES:
        call = loss("contiguous", 3, (70,), state)
        got = device.run(with_changes(call, index=torch.tensor([1, bad, 2])))
        good = cpu.run(with_changes(call, index=torch.tensor([1, 0, 2])))
        for name in ("value", "grad"):
            assert got[name][1].isnan().all()
            assert same_bits(got[name][::2].contiguous(), good[name][::2].contiguous())
        total = device.run(with_changes(call, index=torch.tensor([1, bad, 2]), reduction=MEAN))["value"]
        assert total.isnan().all()


def test_noise_that_nobody_gave_is_nan(device: Device) -> None:
    got = device.run(with_changes(loss("contiguous", 2, (70,), torch.float32), seeds=None, index=torch.tensor([0, 2])))
    assert got["value"][0].isnan()
    assert got["grad"][0].isnan().all()
    assert not got["value"][1].isnan()  # row 2 has v = 0


def test_empty(device: Device) -> None:
    got = device.run(loss("contiguous", 3, (0,), torch.float32))["value"]
    assert got.isnan().all()  # as torch's mean of nothing
    assert device.run(loss("contiguous", 0, (7,), torch.float32, reduction=SUM))["value"].tolist() == [0]
    device.run(loss("contiguous", 0, (7,), torch.float32))
    assert not device.launches
