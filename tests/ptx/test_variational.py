"""The variational bound and its gradient on the device: the bits of the CPU kernel, decoder included."""

from __future__ import annotations

import pytest
import torch
from helpers.native_layout import SUM_BLOCK
from ptx.calls.variational import MEAN, NONE, SUM, TABLE, variational
from ptx.harness import DTYPES, Cpu, Device, check, same_bits, with_changes

from diffkern.ops import VARIATIONAL_COLUMNS

pytestmark = pytest.mark.full  # test_every_op.py has each op once

COUNTS = (1, 4, 5, 1009, SUM_BLOCK, SUM_BLOCK + 1, 2 * SUM_BLOCK + 5)


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "padded", "strided"])
def test_sizes(device: Device, cpu: Cpu, state: torch.dtype, layout: str) -> None:
    for k, count in enumerate(COUNTS):
        check(device, cpu, variational(layout, 2, (count,) if layout != "strided" else (count, 1), state, first=k))
    check(device, cpu, variational(layout, 8, (5, 60), state, tensor_noise=True))


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_every_row(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    for learned in (True, False):
        call = variational("contiguous", 8, (700,), state, learned=learned)
        if not learned:
            call.table = TABLE * (torch.tensor([name != "r1" for name in VARIATIONAL_COLUMNS]))
        check(device, cpu, call)


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("pred_dtype", DTYPES, ids=str)
def test_prediction_dtypes(device: Device, cpu: Cpu, state: torch.dtype, pred_dtype: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last", "strided"):
        check(device, cpu, variational(layout, 4, (4, 59), state, pred_dtype=pred_dtype, first=2))


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_channels_last(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    for shape in ((3, 19, 23), (320, 7)):
        for tensor_noise in (False, True):
            check(device, cpu, variational("channels_last", 2, shape, state, tensor_noise=tensor_noise, first=3))


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_special_values(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    """Infinities, NaN, huge and tiny predictions: the same bits, and nothing is trapped or lost."""
    got = check(device, cpu, variational("contiguous", 8, (257,), state, special=True))
    assert got["value"].isnan().any()


@pytest.mark.parametrize("reduction", [NONE, MEAN, SUM])
def test_reductions(device: Device, cpu: Cpu, reduction: int) -> None:
    for state in DTYPES:
        for grad in (False, True):
            check(device, cpu, variational("contiguous", 5, (1300,), state, reduction=reduction, grad=grad))


def test_one_sample_does_not_know_the_others(device: Device) -> None:
    whole = variational("contiguous", 4, (1500,), torch.float32)
    got = device.run(whole)
    for b in range(4):
        inputs = {name: tensor[b : b + 1].clone() for name, tensor in whole.inputs.items()}
        assert whole.index is not None
        assert whole.seeds is not None
        alone = with_changes(whole, batch=1, inputs=inputs, index=whole.index[b : b + 1], seeds=whole.seeds[b : b + 1])
        one = device.run(alone)
        for name in ("value", "means", "grad", "grad_w"):
            assert same_bits(one[name].reshape(-1), got[name].reshape(4, -1)[b].clone()), name


@pytest.mark.parametrize("bad", [-1, 8])
def test_index_outside_the_table_gives_nan(device: Device, bad: int) -> None:
    for state in (torch.float32, torch.float64):
        call = variational("contiguous", 2, (70,), state)
        got = device.run(with_changes(call, index=torch.tensor([1, bad])))
        for name in ("value", "means", "grad", "grad_w"):
            assert got[name].reshape(2, -1)[1].isnan().all(), name
            assert not got[name].reshape(2, -1)[0].isnan().any(), name


def test_what_a_row_lacks_is_nan(device: Device) -> None:
    without_w = device.run(variational("contiguous", 2, (70,), torch.float32, learned=False))
    assert without_w["value"][0].isnan()  # row 0 learns its variance
    assert not without_w["value"][1].isnan()
    call = with_changes(variational("contiguous", 1, (70,), torch.float32), seeds=None)
    assert device.run(call)["grad"].isnan().all()


def test_empty(device: Device) -> None:
    assert device.run(variational("contiguous", 0, (7,), torch.float32, reduction=SUM))["value"].tolist() == [0]
    assert device.run(variational("contiguous", 0, (7,), torch.float32, reduction=MEAN))["value"].isnan().all()
