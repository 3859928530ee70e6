"""linear_rows on the device: the bits of the CPU, and each weight read once for the rows of a block."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from ptx.calls.linear_rows import Linear, check_linear, on_device
from ptx.harness import DTYPES, Cpu, Device, same_bits, values

from diffkern import reference

pytestmark = pytest.mark.full

states = pytest.mark.parametrize("state", DTYPES, ids=str)


@states
def test_sizes(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    """Whole blocks of rows and outputs and parts of them, inputs beyond the lanes and fewer, rows apart."""
    for k, (rows, inputs, outputs) in enumerate([(1, 37, 11), (9, 16, 8), (4, 3, 3), (5, 64, 17), (1, 1, 1)]):
        call = Linear(rows, inputs, outputs, state, silu=k % 2 == 0, bias=k != 1, pad=3 * (k % 3))
        check_linear(device, cpu, call)
        check_linear(device, cpu, replace(call, silu=not call.silu))


@states
def test_special_values(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    for silu in (True, False):
        got = check_linear(device, cpu, Linear(6, 19, 5, state, silu, special=True))
        assert got.isnan().any()


def test_value(device: Device) -> None:
    call = Linear(5, 40, 9, torch.float32)
    x, weight = values(1, 5, (40,), torch.float32), values(2, 9, (40,), torch.float32)
    exact = reference.linear_rows(x, weight, values(3, 9, (2,), torch.float32)[:, 1], act="silu")
    torch.testing.assert_close(on_device(device, call).double(), exact, rtol=1e-5, atol=1e-5)


def test_a_row_has_its_bits_alone(device: Device) -> None:
    whole = on_device(device, Linear(7, 40, 9, torch.float32))
    assert same_bits(on_device(device, Linear(1, 40, 9, torch.float32, of=7))[0], whole[0])


def test_weights_are_read_once_a_block_of_rows(device: Device) -> None:
    on_device(device, Linear(4, 64, 16, torch.float32, silu=False, bias=False))
    (launch,) = device.launches
    warps_of_weights, warps_of_x = 64 // 16 * 16 // 2, 64 // 16 * 16 // 2 * 4
    assert sum(entry["accesses"] for entry in launch["global_load"]["by_width"].values()) == 32 * (
        warps_of_weights + warps_of_x
    )
