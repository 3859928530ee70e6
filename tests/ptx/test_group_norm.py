"""group_norm_act and its gradient on the device: the bits of the CPU, and how rows are shared among blocks."""

from __future__ import annotations

import pytest
import torch
from ptx.calls.group_norm import NAMES, RUN, Norm, check_norm, on_device, parameters
from ptx.harness import DTYPES, Cpu, Device, same_bits, values

from diffkern import reference

pytestmark = pytest.mark.full  # test_every_op.py has each op once

states = pytest.mark.parametrize("state", DTYPES, ids=str)
LAYOUTS = ("contiguous", "misaligned", "padded", "channels_last", "channels_last_misaligned")


def norm(layout: str, batch: int, shape: tuple[int, ...], state: torch.dtype, groups: int, silu: bool = True) -> Norm:
    return Norm(layout, batch, shape, state, groups, silu, parameters(batch, shape[0], state))


@states
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes(device: Device, cpu: Cpu, state: torch.dtype, layout: str) -> None:
    """Blocks of positions that are not whole, chunks that are and are not, groups of one channel, one position."""
    for shape, groups in (((6, 5, 7), 3), ((8, 16, 9), 8), ((4, RUN + 3, 1), 2), ((70, 1, 1), 7), ((40, 3, 3), 1)):
        check_norm(device, cpu, norm(layout, 2, shape, state, groups, silu=groups != 3))


@pytest.mark.parametrize("present", [(), NAMES[:1], NAMES[1:3], NAMES[3:4], NAMES[:4], NAMES[4:]], ids=str)
def test_parameters_that_are_absent(device: Device, cpu: Cpu, present: tuple[str, ...]) -> None:
    for layout in ("contiguous", "channels_last"):
        given = parameters(2, 6, torch.float32, present)
        check_norm(device, cpu, Norm(layout, 2, (6, 9, 5), torch.bfloat16, 2, True, given))


@states
def test_special_values(device: Device, cpu: Cpu, state: torch.dtype) -> None:
    for layout in ("contiguous", "channels_last"):
        call = norm(layout, 2, (32, 3, 5), state, 16)
        call.special = True
        got = check_norm(device, cpu, call)["y"]
        assert got.isnan().any()
        assert not got.isnan().all()


def test_value(device: Device) -> None:
    for layout in ("contiguous", "channels_last"):
        call = norm(layout, 2, (6, 9, 40), torch.float32, 2)
        x = values(1, 2, call.shape, torch.float32, layout)
        assert call.parameters is not None
        exact = reference.group_norm_act(x, 2, **call.parameters)
        torch.testing.assert_close(on_device(device, call)["y"].double(), exact, rtol=1e-5, atol=1e-5)


def test_a_sample_alone(device: Device) -> None:
    call = norm("contiguous", 3, (6, 9, 40), torch.float32, 2)
    assert call.parameters is not None
    whole = on_device(device, call)["y"]
    one = {k: t[:1] if t.dim() == 2 else t for k, t in call.parameters.items()}
    alone = on_device(device, Norm("contiguous", 1, call.shape, torch.float32, 2, True, one))["y"]
    assert same_bits(alone[0], whole[0])


def test_the_rows_of_a_group_are_shared_among_blocks(device: Device) -> None:
    """One group of one sample: more than one block sums it, and elements move 16 bytes at a time, once each way."""
    for layout in ("contiguous", "channels_last"):
        call = norm(layout, 1, (8, 32, 128), torch.float32, 1)
        on_device(device, call)
        sums, _, apply = device.launches[:3]
        assert sums["grid"][0] > 1
        assert apply["grid"][0] > 1
        size = 8 * 32 * 128 * 4
        assert apply["global_load"]["by_width"][16]["accesses"] >= size // 16
        assert apply["global_store"]["by_width"][16]["accesses"] == size // 16
