"""Quantile, threshold and moments on the device: the bits of the CPU, in one block a sample and in many."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.core_headers import constant
from helpers.native_layout import SUM_BLOCK
from helpers.quantiles import torch_quantile
from ptx.calls.statistics import moments, quantile
from ptx.harness import DTYPES, Call, Cpu, Device, check, same_bits, with_changes

pytestmark = pytest.mark.full  # test_every_op.py has each op once

PART = constant("kQuantilePart")  # up to here one block of threads takes a sample
states = pytest.mark.parametrize("state", DTYPES, ids=str)


# ----------------------------------------------------------------------------------------------------------- quantile
@states
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "padded", "strided"])
def test_sizes(device: Device, cpu: Cpu, state: torch.dtype, layout: str) -> None:
    for count in (1, 2, 3, 7, 511, 1025, 4099):
        for q in (0.0, 0.31, 0.995, 1.0) if count < 10 else (0.31,):
            check(device, cpu, quantile(layout, 2, (count, 1) if layout == "strided" else (count,), state, q))


@states
def test_the_quantile_of_torch(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    for q in (0.0, 0.5, 0.77, 1.0):
        call = quantile("contiguous", 3, (1531,), state, q, None)
        got = check(device, cpu, call)["value"][:, 0]
        assert same_bits(got, torch_quantile(call.inputs["x"], q))


@states
def test_channels_last(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    for layout in ("channels_last", "channels_last_misaligned"):
        check(device, cpu, quantile(layout, 2, (5, 19, 23), state))


@states
def test_special_values(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    """Infinities, NaN, both zeros and subnormal numbers; ties in one digit, and ranks that part in each of them."""
    check(device, cpu, quantile("contiguous", 3, (900,), state, 0.4, special=True))
    for x in (
        torch.full((2, 700), -0.75),
        torch.cat([torch.zeros(1, 500), torch.full((1, 500), 3.0)], 1),
        torch.tensor([[1.0, 2.0, math.inf, math.inf]]),
        torch.tensor([[1.0, math.nan, 3.0]]),
    ):
        for q in (0.0, 0.5, 0.995):
            call = quantile("contiguous", len(x), (x.shape[1],), state, q)
            got = check(device, cpu, with_changes(call, inputs={"x": x.to(state)}))["value"][:, 0]
            assert same_bits(got, torch_quantile(x.to(state), q))


@pytest.mark.parametrize("state", [torch.float32, torch.float64], ids=str)
def test_neighbours(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    """The two ranks first differ in the first, a middle or the last bits of the key."""
    eps = torch.finfo(state).eps
    for step in (1.0, 2.0**-12, 2.0**-20, eps):
        call = quantile("contiguous", 1, (101,), state, 0.495, None)
        x = 1 + step * torch.arange(101, dtype=torch.float64)[torch.randperm(101)]
        got = check(device, cpu, with_changes(call, inputs={"x": x[None].to(state)}))["value"][:, 0]
        assert same_bits(got, torch_quantile(x[None].to(state), 0.495))


@pytest.mark.parametrize("state", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_many_blocks(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    """A sample in parts: counted by several blocks, with a last part that is not whole. No block waits for the host."""
    if state == torch.float32:
        assert len(device_launches(device, quantile("contiguous", 1, (PART,), state))) == 1
    layouts = ("contiguous", "misaligned") if state == torch.float32 else ("contiguous",)
    for layout in layouts:
        call = quantile(layout, 2, (PART + 2501,), state, 0.7)
        got = check(device, cpu, call)
        assert same_bits(got["value"][:, 0], torch_quantile(call.inputs["x"], 0.7))
        passes = 6 if state == torch.float64 else 3
        assert len(device.launches) == 1 + 2 * passes + 1
        assert [launch["grid"][0] for launch in device.launches][:3] == [1, 5, 1]


def device_launches(device: Device, call: Call) -> list[object]:
    device.run(call)
    return device.launches


def test_many_blocks_of_special_values(device: Device, cpu: Cpu) -> None:
    call = quantile("contiguous", 2, (PART + 5,), torch.float32, 0.5)
    x = torch.full((2, PART + 5), 0.5)
    x[0, -1] = math.nan
    got = check(device, cpu, with_changes(call, inputs={"x": x}))
    assert got["value"].isnan().flatten().tolist() == [True, False]
    assert got["out"][0].isnan().all()


@states
def test_in_place(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    check(device, cpu, with_changes(quantile("contiguous", 2, (1100,), state), in_place={"out": "x"}))


def test_a_sample_does_not_know_the_others(device: Device) -> None:
    call = quantile("contiguous", 3, (2100,), torch.float32)
    whole = device.run(call)
    for b in range(3):
        one = device.run(with_changes(call, batch=1, inputs={"x": call.inputs["x"][b : b + 1].clone()}))
        assert same_bits(one["value"][0], whole["value"][b])
        assert same_bits(one["out"][0], whole["out"][b])


def test_traffic(device: Device) -> None:
    """Three reads of each element for the digits and one for the threshold, 16 bytes at a time, one write."""
    for state in DTYPES:
        call = quantile("contiguous", 2, (8192,), state)
        device.run(call)
        (launch,) = device.launches
        size, passes = 2 * 8192 * state.itemsize, 6 if state == torch.float64 else 3
        assert launch["global_load"]["by_width"][16]["accesses"] == (passes + 1) * size // 16
        assert launch["global_store"]["by_width"][16]["accesses"] == size // 16
        assert launch["unique_sectors"]["read_bytes"] == size


# ------------------------------------------------------------------------------------------------------------ moments
@states
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "padded", "strided"])
def test_moments_of_sizes(device: Device, cpu: Cpu, state: torch.dtype, layout: str) -> None:
    for count in (1, 2, 5, 1009, SUM_BLOCK, SUM_BLOCK + 1, 3 * SUM_BLOCK + 5):
        check(device, cpu, moments(layout, 3, (count, 1) if layout == "strided" else (count,), state))
    check(device, cpu, moments("channels_last", 2, (5, 19, 23), state))
    check(device, cpu, moments("contiguous", 2, (700,), state, special=True))


def test_moments_are_right(device: Device, cpu: Cpu) -> None:
    """Past 64 blocks the CPU takes other ways, past 256 each lane adds several."""
    for count in (64 * SUM_BLOCK + 1, 259 * SUM_BLOCK + 13):
        call = moments("contiguous", 1, (count,), torch.float32)
        mean, deviation = check(device, cpu, call)["value"][0].tolist()
        x = call.inputs["x"].double()
        assert math.isclose(mean, x.mean().item(), abs_tol=1e-6)
        assert math.isclose(deviation, x.std().item(), rel_tol=1e-6)


def test_moments_of_a_sample_alone(device: Device) -> None:
    call = moments("contiguous", 3, (2100,), torch.bfloat16)
    whole = device.run(call)["value"]
    for b in range(3):
        one = device.run(with_changes(call, batch=1, inputs={"x": call.inputs["x"][b : b + 1].clone()}))["value"]
        assert same_bits(one[0], whole[b])


def test_moments_read_twice(device: Device) -> None:
    for state in DTYPES:
        device.run(moments("contiguous", 2, (4096,), state))
        size = 2 * 4096 * state.itemsize
        for launch in device.launches[::2]:
            assert launch["global_load"]["by_width"][16]["accesses"] == size // 16
            assert launch["shared"]["bank_conflicts"] == 0


def test_empty(device: Device) -> None:
    assert device.run(moments("contiguous", 2, (0,), torch.float32))["value"].isnan().all()
    for call in (moments("contiguous", 0, (7,), torch.float32), quantile("contiguous", 0, (7,), torch.float32)):
        device.run(call)
        assert not device.launches
