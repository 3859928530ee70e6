"""The log-density of a step and its gradient on the device: the bits of the CPU kernel, for rows of every kind."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.native_layout import SUM_BLOCK
from ptx.calls.step_logprob import LEARNED_ROWS, ROWS, density
from ptx.harness import DTYPES, Cpu, Device, check, row, same_bits, with_changes

from diffkern import reference
from diffkern.plan import COLUMNS

pytestmark = pytest.mark.full  # test_every_op.py has each op once

COUNTS = (1, 3, 4, 5, 31, 1009, SUM_BLOCK - 1, SUM_BLOCK, SUM_BLOCK + 1, 2 * SUM_BLOCK + 5)


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "padded", "strided"])
def test_sizes(device: Device, cpu: Cpu, state: torch.dtype, layout: str) -> None:
    for k, count in enumerate(COUNTS):
        shape = (count,) if layout != "strided" else (count, 1)
        check(device, cpu, density(layout, 2, shape, state, ROWS["everything"] if k % 2 else None))
        check(device, cpu, density(layout, 2, shape, state, learned=True))


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_every_row_by_value_and_from_the_table(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    for learned, rows in ((False, ROWS), (True, LEARNED_ROWS)):
        table = check(device, cpu, density("contiguous", len(rows), (700,), state, learned=learned))
        for b, values_of_row in enumerate(rows.values()):
            call = density("contiguous", len(rows), (700,), state, values_of_row, learned=learned)
            got = check(device, cpu, call)
            for name, tensor in got.items():
                assert same_bits(tensor[b].clone(), table[name][b].clone()), name


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("m_dtype", DTYPES, ids=str)
def test_prediction_dtypes(device: Device, cpu: Cpu, state: torch.dtype, m_dtype: torch.dtype) -> None:
    for k, layout in enumerate(("contiguous", "channels_last", "misaligned", "strided")):
        check(device, cpu, density(layout, 5, (4, 59), state, m_dtype=m_dtype, learned=k % 2 == 0))
        check(device, cpu, density(layout, 2, (4, 59), state, ROWS["guided"], m_dtype=m_dtype, grad=k % 2 == 0))


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_without_gradient_or_guidance(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    for grad in (False, True):
        for learned in (False, True):
            check(device, cpu, density("contiguous", 4, (1300,), state, grad=grad, learned=learned))
        check(device, cpu, density("contiguous", 2, (1300,), state, ROWS["ddpm"], grad=grad, doubled=False))


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_special_values(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    """Infinities, NaN, huge and tiny numbers: the same bits, and NaN is not lost."""
    for learned in (False, True):
        got = check(device, cpu, density("contiguous", 6, (257,), state, learned=learned, special=True))
        assert got["value"].isnan().any()
        assert got["value"][3] == 0  # the silent row


def test_many_blocks(device: Device, cpu: Cpu) -> None:
    """More blocks of 1024 than lanes."""
    for state in (torch.float32, torch.bfloat16):
        call = density("contiguous", 1, (259 * SUM_BLOCK + 13,), state, ROWS["ddpm"], grad=False, doubled=False)
        call.inputs = {name: call.inputs[name] for name in ("after", "x", "u")}
        check(device, cpu, call)


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_grid_and_batch_do_not_matter(device: Device, state: torch.dtype) -> None:
    """Vector, scalar and strided kernels (of different block sizes), alone or in a batch: one result a sample."""
    for learned in (False, True):
        call = density("contiguous", 4, (2, 1204), state, learned=learned)
        whole = device.run(call)
        for layout in ("misaligned", "padded", "strided"):
            other = device.run(density(layout, 4, (2, 1204), state, learned=learned))
            assert all(same_bits(other[name], whole[name]) for name in ("value", *call.outputs))
        assert call.index is not None
        for b in (3, 0):
            alone = with_changes(
                call, batch=1, inputs={n: t[b : b + 1] for n, t in call.inputs.items()}, index=call.index[b : b + 1]
            )
            got = device.run(alone)
            for name in ("value", *call.outputs):
                assert same_bits(got[name][0].clone(), whole[name][b].clone()), name


def test_is_the_log_density(device: Device) -> None:
    """Against the reference, which is checked against torch.distributions."""
    for learned, rows in ((False, ROWS), (True, LEARNED_ROWS)):
        call = density("contiguous", len(rows), (2, 750), torch.float32, learned=learned)
        got, given = device.run(call), call.inputs
        m = torch.cat([given["u"], given["v"]], 1) if learned else given["u"]
        states = (given["after"], given["x"], m, given.get("c"), *(given[f"h{k}"] for k in range(4)))
        assert call.table is not None
        exact = reference.step_logprob(*states, table=call.table, index=call.index)
        torch.testing.assert_close(got["value"].double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("bad", [-1, 6, 2**32 + 1])
def test_index_outside_the_table_gives_nan(device: Device, cpu: Cpu, bad: int) -> None:
    for state in DTYPES:
        call = density("contiguous", 3, (70,), state)
        got = device.run(with_changes(call, index=torch.tensor([1, bad, 2])))
        good = cpu.run(with_changes(call, index=torch.tensor([1, 0, 2])))
        for name in ("value", "grad_u", "grad_c"):
            assert got[name][1].isnan().all(), name
            assert same_bits(got[name][::2].contiguous(), good[name][::2].contiguous()), name


def test_a_row_that_is_not_such_a_gaussian_gives_nan(device: Device) -> None:
    for changes in ({"r": 0.1}, {"g": math.inf}, {"g": math.nan}):
        bad = row(**({"p": 1.2, "q": -0.7, "b": 0.6, "g": 0.2} | changes))
        call = density("contiguous", 2, (70,), torch.float32)
        call.table, call.index = torch.tensor([ROWS["ddpm"], bad], dtype=torch.float64), torch.tensor([0, 1])
        for got in (device.run(call), device.run(with_changes(call, table=None, index=None, row=bad))):
            for name in ("value", "grad_u", "grad_c"):
                assert got[name][1].isnan().all(), (name, changes)
    learned = density("contiguous", 1, (70,), torch.float32, learned=True)
    learned.table = torch.tensor([[*row(a=1.0, d=-0.3, w=2.0, g=0.5), 0.0, 1.0]], dtype=torch.float64)
    assert device.run(learned)["value"].isnan().all()


@pytest.mark.parametrize("missing", ["x", "u", "c", "h0", "h3"])
def test_what_a_row_lacks_is_nan(device: Device, missing: str) -> None:
    call = density("contiguous", 2, (70,), torch.float32, grad=False)
    call.inputs = {name: t for name, t in call.inputs.items() if name != missing}
    got = device.run(with_changes(call, index=torch.tensor([3, 4])))["value"]
    assert got[0] == 0  # the silent row reads nothing
    assert got[1].isnan()


def test_empty(device: Device) -> None:
    got = device.run(density("contiguous", 3, (0,), torch.float32, ROWS["ddpm"]))["value"]
    assert got.tolist() == [0.0, 0.0, 0.0]
    device.run(density("contiguous", 0, (7,), torch.float32, ROWS["ddpm"]))
    assert not device.launches


def test_columns_of_a_learned_row() -> None:
    assert {len(r) for r in LEARNED_ROWS.values()} == {len(COLUMNS) + 2}
