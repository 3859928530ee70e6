"""The step with a learned variance on the device: the bits of the CPU kernel."""

from __future__ import annotations

import random

import pytest
import torch
from ptx.calls.learned_step import ROWS, learned_row, learned_step, wanted
from ptx.harness import (
    DTYPES,
    Cpu,
    Device,
    check,
    same_bits,
    values,
    with_changes,
)

from diffkern.plan import LEARNED_COLUMNS

pytestmark = pytest.mark.full  # test_every_op.py has each op once

LAYOUTS = ("contiguous", "misaligned", "padded", "channels_last", "channels_last_misaligned", "strided")


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_rows(device: Device, cpu: Cpu, state: torch.dtype, name: str) -> None:
    mask = torch.uint8 if name == "masked" else None
    check(device, cpu, learned_step("contiguous", 2, (1031,), state, ROWS[name], mask_dtype=mask))
    outputs = wanted(state, state)
    check(device, cpu, learned_step("contiguous", 2, (264,), state, ROWS[name], mask_dtype=mask, outputs=outputs))


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(device: Device, cpu: Cpu, state: torch.dtype, layout: str) -> None:
    for name in ("range", "masked"):
        for shape in ((3, 11, 13), (4, 64), (40, 9)):
            mask = state if name == "masked" else None
            outputs = wanted(state, torch.float32)
            check(device, cpu, learned_step(layout, 2, shape, state, ROWS[name], mask_dtype=mask, outputs=outputs))


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_halves_of_one_tensor(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    """m and v as they come: the first and the second C channels of [B, 2C, ...]."""
    for shape in ((3, 64), (3, 21)):  # chunks of v aligned, and not
        both = values(9, 2, (6, shape[1]), state)
        call = learned_step("contiguous", 2, shape, state, ROWS["clip"])
        call.inputs["m"], call.inputs["v"] = both[:, :3], both[:, 3:]
        together = check(device, cpu, call)
        apart = {"m": both[:, :3].clone(), "v": both[:, 3:].clone()}
        again = check(device, cpu, with_changes(call, inputs=call.inputs | apart))
        assert same_bits(together["out"], again["out"])


@pytest.mark.parametrize("state", DTYPES, ids=str)
@pytest.mark.parametrize("m_dtype", DTYPES, ids=str)
def test_model_dtypes(device: Device, cpu: Cpu, state: torch.dtype, m_dtype: torch.dtype) -> None:
    for layout in ("contiguous", "misaligned", "channels_last", "strided"):
        for copies in (1, 2):
            outputs = wanted(state, m_dtype, copies)
            check(device, cpu, learned_step(layout, 2, (4, 67), state, ROWS["clip"], m_dtype=m_dtype, outputs=outputs))


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_masks_and_noise_tensors(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last", "strided", "misaligned"):
        check(device, cpu, learned_step(layout, 2, (3, 131), state, ROWS["range"], tensor_noise=True))
        for mask in (torch.uint8, state):
            check(device, cpu, learned_step(layout, 2, (4, 65), state, ROWS["masked"], mask_dtype=mask))
            call = learned_step(layout, 2, (4, 65), state, ROWS["masked"], mask_dtype=mask, tensor_noise=True)
            check(device, cpu, call)


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_special_values(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    """Infinite, huge and NaN log-variances: 0, infinity and NaN, the same on both."""
    for name in ("clip", "slope", "masked"):
        mask = torch.uint8 if name == "masked" else None
        outputs = wanted(state, torch.float16)
        call = learned_step("contiguous", 2, (803,), state, ROWS[name], mask_dtype=mask, special=True, outputs=outputs)
        got = check(device, cpu, call)
        assert got["out"].isnan().any()
        assert got["out"].isinf().any()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 8, 9, 31, 1023, 1024, 1025, 2047, 2049, 4099])
def test_sizes(device: Device, cpu: Cpu, count: int) -> None:
    for state in DTYPES:
        for layout in ("contiguous", "padded"):
            outputs = wanted(state, torch.bfloat16, 2)
            call = learned_step(layout, 2, (count,), state, ROWS["range"], outputs=outputs, m_dtype=torch.float16)
            check(device, cpu, call)


@pytest.mark.parametrize("seed", range(12))
def test_random_calls(device: Device, cpu: Cpu, seed: int) -> None:
    """Any subset of the terms, any dtypes, layout, outputs and source of the row."""
    rng = random.Random(seed)
    names = ("p", "q", "a", "b", "d", "g", "k", "known_s", "known_n", "r0", "r1")
    for _ in range(4):
        columns: dict[str, float] = {c: rng.uniform(-2, 2) for c in names if rng.random() < 0.6}
        columns |= {"stream": rng.randrange(2**53), "known_stream": rng.randrange(2**53)}
        if rng.random() < 0.5:
            columns["clip"] = rng.uniform(0.5, 3)
        state, shape = rng.choice(DTYPES), (rng.choice([1, 3, 4, 9]), rng.randrange(1, 400))
        outputs = {n: d for n, d in wanted(state, rng.choice(DTYPES)).items() if rng.random() < 0.7}
        call = learned_step(
            rng.choice(LAYOUTS), rng.choice([1, 2, 3]), shape, state, learned_row(**columns),
            m_dtype=rng.choice(DTYPES), mask_dtype=rng.choice([None, torch.uint8, state]), outputs=outputs,
            tensor_noise=rng.random() < 0.3, special=rng.random() < 0.3,
        )  # fmt: skip
        expected = check(device, cpu, call)
        assert call.row is not None
        table = torch.tensor([learned_row(), list(call.row), learned_row(a=5.0)], dtype=torch.float64)
        got = device.run(with_changes(call, row=None, table=table, first=1))
        assert all(same_bits(got[n], expected[n]) for n in expected)


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_rows_from_a_table(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    names = list(ROWS)
    table = torch.tensor([ROWS[n] for n in names], dtype=torch.float64)
    batch = len(names)
    for layout in ("contiguous", "channels_last", "misaligned"):
        base = learned_step(layout, batch, (3, 90), state, ROWS["masked"], mask_dtype=torch.uint8)
        base.outputs |= wanted(state, torch.float32)
        for index in (
            torch.arange(batch, dtype=torch.int64),
            torch.arange(batch, dtype=torch.int32).flip(0),
            torch.tensor(names.index("clip"), dtype=torch.int64),
        ):
            check(device, cpu, with_changes(base, row=None, table=table, index=index))


@pytest.mark.parametrize("bad", [-1, 7, -(2**63)])
def test_index_outside_the_table_gives_nan(device: Device, cpu: Cpu, bad: int) -> None:
    table = torch.tensor(list(ROWS.values()), dtype=torch.float64)
    for state in DTYPES:
        for layout in ("contiguous", "channels_last"):
            call = learned_step(layout, 3, (4, 33), state, ROWS["masked"], mask_dtype=torch.uint8)
            call = with_changes(call, row=None, table=table, outputs=call.outputs | wanted(state, state, 2))
            got = device.run(with_changes(call, index=torch.tensor([1, bad, 5], dtype=torch.int64)))
            good = cpu.run(with_changes(call, index=torch.tensor([1, 0, 5], dtype=torch.int64)))
            for name, tensor in got.items():
                for b in range(tensor.shape[0]):
                    if b % 3 == 1:
                        assert tensor[b].isnan().all(), name
                    else:
                        assert same_bits(tensor[b], good[name][b]), name


@pytest.mark.parametrize("column", ["w", "r", "e0", "e1", "e2", "e3", "A", "B", "D"])
def test_terms_of_another_step_give_nan(device: Device, column: str) -> None:
    """A row on the device cannot be refused by a sentence."""
    other = list(ROWS["clip"])
    other[LEARNED_COLUMNS.index(column)] = 0.5
    table = torch.tensor([ROWS["clip"], other], dtype=torch.float64)
    call = learned_step("contiguous", 2, (70,), torch.float32, ROWS["clip"], outputs=wanted(torch.float32, None))
    got = device.run(with_changes(call, row=None, table=table, index=torch.tensor([0, 1])))
    for name, tensor in got.items():
        assert tensor[1].isnan().all(), name
        assert not tensor[0].isnan().any(), name


@pytest.mark.parametrize("missing", ["x", "m", "v", "known", "seeds", "noise"])
def test_operand_that_is_not_there_gives_nan(device: Device, missing: str) -> None:
    for from_table in (False, True):
        call = learned_step(
            "contiguous", 2, (70,), torch.float32, ROWS["masked"],
            mask_dtype=torch.uint8, tensor_noise=missing == "noise",
        )  # fmt: skip
        call.outputs |= wanted(torch.float32, torch.bfloat16)
        if missing in ("seeds", "noise"):
            call.seeds = None
        if missing != "seeds":
            del call.inputs[missing]
        if from_table:
            call = with_changes(call, row=None, table=torch.tensor([ROWS["masked"]], dtype=torch.float64))
        for name, tensor in device.run(call).items():
            assert tensor.isnan().all(), name


def test_what_a_row_does_not_need_is_not_read(device: Device, cpu: Cpu) -> None:
    for state in DTYPES:
        full = learned_step("contiguous", 2, (264,), state, ROWS["range"], tensor_noise=True)
        for name, kept in (("fixed", {"x", "m", "noise"}), ("last", {"x", "m"})):
            poison = {n: torch.full_like(t, float("nan")) for n, t in full.inputs.items() if n not in kept}
            out = check(device, cpu, with_changes(full, inputs=full.inputs | poison, row=ROWS[name]))["out"]
            assert not out.isnan().any()
            assert set(device.launches[0]["unique_sectors"]["per_buffer"]) == kept | {"out"}


@pytest.mark.parametrize("state", DTYPES, ids=str)
def test_in_place(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    for layout in LAYOUTS:
        call = learned_step(layout, 2, (4, 70), state, ROWS["masked"], mask_dtype=state, outputs=wanted(state, state))
        check(device, cpu, with_changes(call, in_place={"out": "x"}))
        check(device, cpu, with_changes(call, in_place={"out": "x", "x0": "known"}))


def test_empty_and_one_launch(device: Device) -> None:
    for batch, count in ((0, 5), (3, 0)):
        device.run(learned_step("contiguous", batch, (count,), torch.float32, ROWS["range"]))
        assert not device.launches
    device.run(learned_step("contiguous", 5, (3, 40, 40), torch.float32, ROWS["masked"], mask_dtype=torch.uint8))
    assert len(device.launches) == 1


def test_dtypes_must_agree(device: Device) -> None:
    call = learned_step("contiguous", 1, (8,), torch.float32, ROWS["range"])
    call.outputs["x0"] = torch.float64
    with pytest.raises(AssertionError, match="launcher returned 1"):
        device.run(call)
