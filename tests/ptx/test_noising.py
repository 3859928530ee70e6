"""Forward noising on the device: the bits of the CPU kernel."""

from __future__ import annotations

import random

import pytest
import torch
from ptx.calls.noising import noising, table
from ptx.harness import DTYPES, Cpu, Device, check, same_bits

pytestmark = pytest.mark.full  # test_every_op.py has each op once

COUNTS = (1, 3, 5, 31, 1009, 1023, 1024, 1025, 2051)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "padded", "strided"])
@pytest.mark.parametrize("tensor_noise", [False, True], ids=["address", "tensor"])
def test_sizes(device: Device, cpu: Cpu, dtype: torch.dtype, layout: str, tensor_noise: bool) -> None:
    for count in COUNTS:
        shape = (count,) if layout != "strided" else (3, count // 3 + 1)
        check(device, cpu, noising(layout, 2, shape, dtype, tensor_noise=tensor_noise))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["channels_last", "channels_last_misaligned"])
@pytest.mark.parametrize("tensor_noise", [False, True], ids=["address", "tensor"])
def test_channels_last(device: Device, cpu: Cpu, dtype: torch.dtype, layout: str, tensor_noise: bool) -> None:
    for shape in ((3, 17, 21), (4, 16, 16), (320, 7), (1100, 2)):
        check(device, cpu, noising(layout, 2, shape, dtype, tensor_noise=tensor_noise))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(device: Device, cpu: Cpu, dtype: torch.dtype) -> None:
    check(device, cpu, noising("contiguous", 3, (801,), dtype, special=True))


def test_every_row_and_index(device: Device, cpu: Cpu) -> None:
    for index in (
        torch.arange(8, dtype=torch.int64),
        torch.arange(8, dtype=torch.int32),
        torch.tensor(3, dtype=torch.int64),
        torch.tensor(7, dtype=torch.int32),
        torch.arange(16, dtype=torch.int64)[::2].clamp(max=7),
        torch.tensor([5]).expand(8),
    ):
        check(device, cpu, noising("contiguous", 8, (100,), torch.float32, index=index))
    check(device, cpu, noising("contiguous", 8, (100,), torch.float32, index=None, every=1))
    check(device, cpu, noising("contiguous", 8, (100,), torch.float32, index=None, table=table(1)))


@pytest.mark.parametrize("outputs", [("out",), ("out", "target"), ("out", "eps")], ids="-".join)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
def test_outputs(device: Device, cpu: Cpu, outputs: tuple[str, ...], layout: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        check(device, cpu, noising(layout, 8, (4, 55), dtype, outputs=outputs))


def test_in_place(device: Device, cpu: Cpu) -> None:
    for dtype in DTYPES:
        for layout in ("contiguous", "channels_last", "strided"):
            check(device, cpu, noising(layout, 2, (4, 301), dtype, in_place={"out": "x0"}))
        check(device, cpu, noising("contiguous", 2, (900,), dtype, tensor_noise=True, in_place={"eps": "noise"}))


def test_more_than_one_block(device: Device, cpu: Cpu) -> None:
    rng = random.Random(0)
    for dtype in DTYPES:
        check(device, cpu, noising("contiguous", 3, (rng.randrange(5000, 9000),), dtype))
        check(device, cpu, noising("channels_last", 2, (3, rng.randrange(2000, 3000)), dtype))


@pytest.mark.parametrize("bad", [-1, 8, 2**31, -(2**63)])
def test_index_outside_the_table_gives_nan(device: Device, cpu: Cpu, bad: int) -> None:
    index = torch.tensor([1, bad, 2], dtype=torch.int64)
    for dtype in DTYPES:
        got = device.run(noising("contiguous", 3, (70,), dtype, index=index))
        good = cpu.run(noising("contiguous", 3, (70,), dtype, index=torch.tensor([1, 0, 2])))
        for name, tensor in got.items():
            assert tensor[1].isnan().all(), name
            assert same_bits(tensor[0], good[name][0]), name
            assert same_bits(tensor[2], good[name][2]), name


def test_noise_that_nobody_gave_is_nan(device: Device) -> None:
    call = noising("contiguous", 2, (70,), torch.float32, outputs=("out",), seeds=None, index=torch.tensor([0, 5]))
    out = device.run(call)["out"]
    assert out[0].isnan().all()
    assert not out[1].isnan().any()  # row 5 has n = v = 0


def test_empty(device: Device) -> None:
    for batch, count in ((0, 5), (3, 0)):
        device.run(noising("contiguous", batch, (count,), torch.float32))
        assert not device.launches


def test_dtypes_must_agree(device: Device) -> None:
    call = noising("contiguous", 1, (8,), torch.float32)
    call.outputs["target"] = torch.float64
    with pytest.raises(AssertionError, match="launcher returned 1"):
        device.run(call)
