"""The sampler step on the device: the bits of the CPU kernel for rows of every kind."""

from __future__ import annotations

import random

import pytest
import torch
from ptx.calls.step import ROWS, step, wanted
from ptx.harness import DTYPES, Cpu, Device, check, row, same_bits, with_changes

from diffkern.plan import COLUMNS

pytestmark = pytest.mark.full  # test_every_op.py has each op once

LAYOUTS = ("contiguous", "misaligned", "padded", "channels_last", "channels_last_misaligned", "strided")


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_rows(device: Device, cpu: Cpu, state: torch.dtype, name: str) -> None:
    mask = torch.uint8 if name in ("inpaint", "everything") else None
    check(device, cpu, step("contiguous", 2, (1031,), state, ROWS[name], mask_dtype=mask))
    check(device, cpu, step("contiguous", 2, (264,), state, ROWS[name], mask_dtype=mask, outputs=wanted(state, state)))


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: Device, cpu: Cpu, state: torch.dtype, layout: str) -> None:
    for name in ("ddim", "ddpm", "everything"):
        for shape in ((3, 11, 13), (4, 64), (40, 9)):
            mask = state if name == "everything" else None
            outputs = wanted(state, torch.float32)
            check(device, cpu, step(layout, 2, shape, state, ROWS[name], mask_dtype=mask, outputs=outputs))


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("m_dtype", DTYPES, ids=str)
def test_model_dtypes(device: Device, cpu: Cpu, state: torch.dtype, m_dtype: torch.dtype) -> None:
    for layout in ("contiguous", "misaligned", "channels_last", "strided"):
        for copies in (1, 2):
            outputs = wanted(state, m_dtype, copies)
            call = step(
                layout, 2, (4, 67), state, ROWS["guided"], m_dtype=m_dtype, outputs=outputs, doubled=copies == 2
            )
            check(device, cpu, call)


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_masks(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    for mask in (torch.uint8, state):
        for layout in ("contiguous", "channels_last", "strided", "misaligned"):
            check(device, cpu, step(layout, 2, (4, 65), state, ROWS["inpaint"], mask_dtype=mask))
            check(device, cpu, step(layout, 2, (4, 65), state, ROWS["inpaint"], mask_dtype=mask, tensor_noise=True))
    check(device, cpu, step("contiguous", 2, (65,), state, ROWS["ddim"], mask_dtype=torch.uint8))  # known = 0


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_noise_tensors(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    for name in ("ddpm", "late noise", "first"):
        for layout in ("contiguous", "channels_last", "strided", "misaligned"):
            check(device, cpu, step(layout, 2, (3, 131), state, ROWS[name], tensor_noise=True))


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_special_values(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    for name in ("ddpm", "multistep", "everything"):
        mask = torch.uint8 if name == "everything" else None
        outputs = wanted(state, torch.float16)
        call = step("contiguous", 2, (803,), state, ROWS[name], mask_dtype=mask, special=True, outputs=outputs)
        check(device, cpu, call)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 31, 1023, 1024, 1025, 2047, 2049, 4099])
def test_sizes(device: Device, cpu: Cpu, count: int) -> None:
    for state in DTYPES:
        for layout in ("contiguous", "padded"):
            outputs = wanted(state, torch.bfloat16, 2)
            check(device, cpu, step(layout, 2, (count,), state, ROWS["ddpm"], outputs=outputs, m_dtype=torch.float16))


@pytest.mark.parametrize("seed", range(24))
def test_random_calls(device: Device, cpu: Cpu, seed: int) -> None:
    """Any subset of the terms, any dtypes, layout, outputs and source of the row."""
    rng = random.Random(seed)
    for _ in range(4):
        columns = {c: rng.uniform(-2, 2) for c in COLUMNS[:-2] if rng.random() < 0.4}
        columns |= {"stream": rng.randrange(2**53), "known_stream": rng.randrange(2**53)}
        if "clip" in columns:
            columns["clip"] = rng.uniform(0.5, 3)
        state, shape = rng.choice(DTYPES), (rng.choice([1, 3, 4, 9]), rng.randrange(1, 400))
        mask = rng.choice([None, torch.uint8, state])
        outputs = {n: d for n, d in wanted(state, rng.choice(DTYPES), rng.choice([1, 2])).items() if rng.random() < 0.7}
        if "next2" in outputs and "next" not in outputs:
            del outputs["next2"]
        call = step(
            rng.choice(LAYOUTS), rng.choice([1, 2, 3]), shape, state, row(**columns), m_dtype=rng.choice(DTYPES),
            mask_dtype=mask, outputs=outputs, tensor_noise=rng.random() < 0.3, special=rng.random() < 0.3,
            doubled=rng.random() < 0.5,
        )  # fmt: skip
        expected = check(device, cpu, call)
        if rng.random() < 0.5:  # the same row from a table on the device
            assert call.row is not None
            table = torch.tensor([row(), list(call.row), row(a=5.0)], dtype=torch.float64)
            got = device.run(with_changes(call, row=None, table=table, first=1))
            assert all(same_bits(got[n], expected[n]) for n in expected)


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_rows_from_a_table(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    names = list(ROWS)
    table = torch.tensor([ROWS[n] for n in names], dtype=torch.float64)
    batch = len(names)
    for layout in ("contiguous", "channels_last", "misaligned"):
        base = step(layout, batch, (3, 90), state, ROWS["everything"], mask_dtype=torch.uint8)
        base.outputs |= wanted(state, torch.float32)
        for index in (
            torch.arange(batch, dtype=torch.int64),
            torch.arange(batch, dtype=torch.int32).flip(0),
            torch.tensor(names.index("ddpm"), dtype=torch.int64),
            torch.tensor(names.index("everything"), dtype=torch.int32),
        ):
            check(device, cpu, with_changes(base, row=None, table=table, index=index))
        check(device, cpu, with_changes(base, row=None, table=table, first=names.index("multistep")))


@pytest.mark.parametrize("bad", [-1, 11, 2**31 + 1, -(2**63)])
def test_index_outside_the_table_gives_nan(device: Device, cpu: Cpu, bad: int) -> None:
    table = torch.tensor(list(ROWS.values()), dtype=torch.float64)
    for state in DTYPES:
        for layout in ("contiguous", "channels_last"):
            call = step(layout, 3, (4, 33), state, ROWS["everything"], mask_dtype=torch.uint8)
            call = with_changes(call, row=None, table=table, outputs=call.outputs | wanted(state, state, 2))
            got = device.run(with_changes(call, index=torch.tensor([1, bad, 9], dtype=torch.int64)))
            good = cpu.run(with_changes(call, index=torch.tensor([1, 0, 9], dtype=torch.int64)))
            for name, tensor in got.items():
                for b in range(tensor.shape[0]):
                    if b % 3 == 1:
                        assert tensor[b].isnan().all(), name
                    else:
                        assert same_bits(tensor[b], good[name][b]), name


@pytest.mark.parametrize("missing", ["x", "u", "c", "h0", "h1", "h2", "h3", "known", "seeds", "noise"])
def test_operand_that_is_not_there_gives_nan(device: Device, missing: str) -> None:
    for from_table in (False, True):
        call = step(
            "contiguous", 2, (70,), torch.float32, ROWS["everything"],
            mask_dtype=torch.uint8, tensor_noise=missing == "noise",
        )  # fmt: skip
        call.outputs |= wanted(torch.float32, torch.bfloat16)
        if missing == "seeds":
            call.seeds = None
        else:
            del call.inputs[missing]
        if missing == "noise":
            call.seeds = None
        if from_table:
            call = with_changes(call, row=None, table=torch.tensor([ROWS["everything"]], dtype=torch.float64))
        for name, tensor in device.run(call).items():
            assert tensor.isnan().all(), name


def test_coefficient_zero_reads_nothing(device: Device, cpu: Cpu) -> None:
    """Operands of terms that are not at work may hold NaN, and are not touched."""
    for state in DTYPES:
        call = step("contiguous", 2, (264,), state, ROWS["everything"], mask_dtype=torch.uint8, tensor_noise=True)
        poison = {n: torch.full_like(t, float("nan")) for n, t in call.inputs.items() if n not in ("x", "u", "mask")}
        columns = {"a": 1.0, "d": -0.3}
        call = with_changes(call, inputs=call.inputs | poison, row=row(**columns))
        del call.inputs["mask"]
        out = check(device, cpu, call)["out"]
        assert not out.isnan().any()
        touched = device.launches[0]["unique_sectors"]["per_buffer"]
        assert set(touched) == {"x", "u", "out"}


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_in_place(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    for layout in LAYOUTS:
        call = step(layout, 2, (4, 70), state, ROWS["everything"], mask_dtype=state, outputs=wanted(state, state))
        check(device, cpu, with_changes(call, in_place={"out": "x"}))
        check(device, cpu, with_changes(call, in_place={"out": "x", "x0": "h0", "s": "h3"}))


def test_empty(device: Device) -> None:
    for batch, count in ((0, 5), (3, 0)):
        device.run(step("contiguous", batch, (count,), torch.float32, ROWS["ddim"]))
        assert not device.launches


def test_one_launch(device: Device) -> None:
    device.run(step("contiguous", 5, (3, 40, 40), torch.float32, ROWS["everything"], mask_dtype=torch.uint8))
    assert len(device.launches) == 1


def test_dtypes_must_agree(device: Device) -> None:
    call = step("contiguous", 1, (8,), torch.float32, ROWS["ddim"])
    call.outputs["x0"] = torch.float64
    with pytest.raises(AssertionError, match="launcher returned 1"):
        device.run(call)
