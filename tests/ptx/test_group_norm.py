"""group_norm_act and its gradient on the device: the bits of the CPU, and how rows are shared among blocks."""

from __future__ import annotations

import pytest
import torch
from ptx.calls.group_norm import (
    FACTORS,
    NAMES,
    ROWS,
    RUN,
    SUMS,
    Norm,
    check_norm,
    in_memory,
    on_cpu,
    on_device,
    parameters,
    tensors_of,
)
from ptx.harness import DTYPES, Cpu, Device, same_bits, values

from diffkern import reference

pytestmark = pytest.mark.full  # test_every_op.py has each op once

states = pytest.mark.parametrize("state", DTYPES, ids=str)
WHOLE_GROUPS = 128  # csrc/cuda/group_norm.cu
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


def whole(layout: str, channels: int, inner: tuple[int, ...], state: torch.dtype, groups: int) -> Norm:
    """Of as few samples as fill a card with groups."""
    return norm(layout, -(-WHOLE_GROUPS // groups), (channels, *inner), state, groups, silu=channels != 32)


@pytest.mark.parametrize(
    ("layout", "state"), list(zip((*LAYOUTS, "contiguous", "channels_last"), DTYPES * 2, strict=False)), ids=str
)
def test_groups_in_shared_memory(device: Device, cpu: Cpu, layout: str, state: torch.dtype) -> None:
    """Chunks that are whole and are not, one position; NaN stays in its group."""
    for channels, inner, groups in ((128, (3, 1), 64), (128, (8,), 16), (64, (2,), 32), (32, (1,), 32)):
        call = whole(layout, channels, inner, state, groups)
        call.special = channels == 64
        got = check_norm(device, cpu, call)["y"]
        assert "whole_kernel" in device.launches[0]["kernel"]
        assert bool(got.isnan().any()) == call.special
        assert not got.isnan().all()


def test_blocks_of_sums_of_a_group_in_shared_memory(device: Device, cpu: Cpu) -> None:
    """More than one, the last with a rest; channels_last takes more than one of a channel by a thread each."""
    for layout, channels, positions, groups in (("contiguous", 1, RUN + 3, 1), ("channels_last", 8, ROWS + 3, 8)):
        call = whole(layout, channels, (positions,), torch.float16, groups)
        check_norm(device, cpu, call)
        assert "whole_kernel" in device.launches[0]["kernel"]


def test_groups_too_few_or_too_large_for_that_are_read_twice(device: Device, cpu: Cpu) -> None:
    call = norm("contiguous", WHOLE_GROUPS // 4 - 1, (4, 3), torch.float32, 4)
    check_norm(device, cpu, call)
    assert "sums_kernel" in device.launches[0]["kernel"]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_group_in_shared_memory_is_read_once(device: Device, layout: str) -> None:
    """By one kernel, in which nothing else moves 16 bytes at a time."""
    call = whole(layout, 64, (8, 8), torch.float32, 16)
    on_device(device, call)
    forward, backward, chunks = *device.launches[:2], call.batch * 64 * 64 * 4 // 16
    assert "whole_kernel" in forward["kernel"]
    assert "factors_kernel" in backward["kernel"]
    assert forward["global_load"]["by_width"][16]["accesses"] == chunks
    assert forward["global_store"]["by_width"][16]["accesses"] == chunks
    # Read, summed, finished, applied. Sums go through global memory, whose races inside a block nobody here sees.
    assert forward["barriers"] == 3 * WHOLE_GROUPS


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_last_elements_past_2_to_the_31(device: Device, layout: str) -> None:
    """The last block of sums and the last of elements, of a sample whose pages in between nobody touches. What the
    others would have made is given: the factors of y = scale (x - mean) + offset and, with x for the gradient too,
    d x = scale x + slope (x - mean) + level. Contiguous rows are no whole chunks: a thread has one element, and there
    are more than 2^31 of them."""
    last, channels, positions = layout == "channels_last", 8, 2**28 + 515
    block, count = ROWS if last else RUN, channels * positions
    blocks = -(-positions // block)
    of_sums = (blocks * channels - 1) // (128 if last else 4)  # a thread a partial, or a warp
    of_elements = (count // 8 - 1 if last else count - 1) // 128  # 16 bytes a thread, or one element
    x, out = torch.empty(count, dtype=torch.float16), torch.empty(count, dtype=torch.float16)
    x[-8192:] = values(1, 1, (8192,), torch.float16)[0]
    factors, partials = values(2, 1, (FACTORS, channels), torch.float32)[0], torch.zeros(blocks, 2, channels)
    work = {"factors": factors, "partials": partials, "mean": torch.zeros(1), "rstd": torch.zeros(1)}
    work["sums"] = torch.zeros(SUMS * channels, dtype=torch.float64)

    rows = x.view(positions, channels).t() if last else x.view(channels, positions)
    row = rows[-1, -(positions % block) :].double()
    mean, scale, offset, slope, level = factors.double()[:, torch.arange(-17, 0) % channels if last else [-1] * 17]
    near = x[-17:].double()
    y, dx = scale * (near - mean) + offset, scale * near + slope * (near - mean) + level
    squares, products = (row - row.mean()).square().sum(), (row * (row - factors[0, -1])).sum()
    call = Norm(layout, 1, (channels, positions), torch.float16, 1, silu=False)
    for grad, name, expected, second in ((False, "y", y, squares), (True, "dx", dx, products)):
        tensors = {"x": x.view(1, count), "grad": x.view(1, count), name: out.view(1, count), **work}
        in_memory(device, call, tensors, grad, only_ctas=[of_sums, of_elements])
        torch.testing.assert_close(out[-17:].double(), expected, rtol=2e-3, atol=1e-2)
        torch.testing.assert_close(partials[-1, :, -1].double(), torch.stack([row.sum(), second]), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_samples_2_to_the_31_elements_apart(device: Device, cpu: Cpu, layout: str) -> None:
    call = Norm(layout, 2, (8, 9, 5), torch.float16, 2)
    expected, (given, _, work) = on_cpu(cpu, call), tensors_of(call)
    memory = torch.empty(2**31 + 8192, dtype=torch.float16)
    far = {"memory": memory}
    for k, (name, t) in enumerate({**given, "y": expected["y"], "dx": expected["dx"]}.items()):
        far[name] = memory.as_strided(t.shape, (2**31 + 64, *t.stride()[1:]), 1024 * k)
        far[name].copy_(t if name in given else torch.zeros(()))
    made = {name: torch.zeros_like(expected[name]) for name in ("mean", "rstd")}
    for grad in (False, True):
        in_memory(device, call, {**far, **made, **work}, grad)
    for name in ("y", "dx"):
        assert same_bits(far[name], expected[name])
