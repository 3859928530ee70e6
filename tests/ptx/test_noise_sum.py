"""noise_sum on the device: the bits of the CPU kernel for every dtype, size, layout and number of terms."""

from __future__ import annotations

import pytest
import torch
from ptx.calls.noise_sum import noise_sum
from ptx.harness import DTYPES, Call, Cpu, Device, check, seeds_for, with_changes

pytestmark = pytest.mark.full  # test_every_op.py has each op once

COUNTS = (0, 1, 5, 31, 1023, 1025, 2053)  # the walk over quads is that of randn, which has more


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "padded", "strided"])
def test_sizes(device: Device, cpu: Cpu, dtype: torch.dtype, layout: str) -> None:
    for count in COUNTS:
        shape = (count,) if layout != "strided" else (count, 1)
        check(device, cpu, noise_sum(layout, 2, shape, dtype, n=3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [0, 1, 2, 24, 64])
def test_terms(device: Device, cpu: Cpu, dtype: torch.dtype, n: int) -> None:
    for layout, shape in (("contiguous", (131,)), ("misaligned", (67,)), ("channels_last", (3, 23))):
        check(device, cpu, noise_sum(layout, 2, shape, dtype, n))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 343), (4, 256), (5, 3), (37, 13), (64, 20), (300, 5), (1500, 1)], ids=str)
def test_channels_last(device: Device, cpu: Cpu, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for layout in ("channels_last", "channels_last_misaligned"):
        check(device, cpu, noise_sum(layout, 2, shape, dtype, n=3))


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 4, 5)], ids=str)
def test_strided_dimensions(device: Device, cpu: Cpu, shape: tuple[int, ...]) -> None:
    check(device, cpu, noise_sum("strided", 2, shape, torch.float32))


def test_one_term_is_randn(device: Device) -> None:
    for dtype in DTYPES:
        call = noise_sum("contiguous", 3, (1030,), dtype)
        call.terms = ([7], [1.0])
        randn = Call("randn", "contiguous", 3, (1030,), {}, {"out": dtype}, seeds=call.seeds, stream=7)
        assert torch.equal(device.run(call)["out"], device.run(randn)["out"])


def test_batch_and_position_do_not_matter(device: Device) -> None:
    call = noise_sum("contiguous", 4, (1030,), torch.float32)
    whole = device.run(call)["out"]
    assert call.seeds is not None
    for b in (3, 1):
        one = with_changes(call, layout="misaligned", batch=1, seeds=call.seeds[b : b + 1])
        assert torch.equal(device.run(one)["out"][0], whole[b])


def test_one_seed_for_all_samples(device: Device, cpu: Cpu) -> None:
    call = noise_sum("contiguous", 3, (100,), torch.float32)
    call.seeds = seeds_for(1).expand(3)
    out = check(device, cpu, call)["out"]
    assert torch.equal(out[0], out[2])


def test_more_samples_than_a_grid_dimension(device: Device, cpu: Cpu) -> None:
    batch = 65537  # two slices of 32769
    call = noise_sum("contiguous", batch, (3,), torch.float32, n=2)
    blocks = [0, 32768, 32769, 65536, 65537]  # 65537: beyond the batch
    got, expected = device.run(call, complete=False, only_ctas=blocks)["out"], cpu.run(call)["out"]
    for b in blocks[:-1]:
        assert torch.equal(got[b], expected[b])
