"""randn on the device: known answers, and the bits of the CPU kernel for every dtype, size and layout."""

from __future__ import annotations

import math

import pytest
import torch
from ptx.calls.randn import randn
from ptx.harness import DTYPES, Call, Cpu, Device, check, seeds_for

pytestmark = pytest.mark.full  # test_every_op.py has each op once

COUNTS = (0, 1, 3, 4, 5, 31, 64, 1009, 1023, 1024, 1025, 2053)

# Salmon et al., Random123 kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


def _words(text: str) -> list[int]:
    return [int(w, 16) for w in text.split()]


def philox(seed: int, stream: int, q: int) -> list[int]:
    """Philox4x32-10 in Python integers."""
    c = [q & 0xFFFFFFFF, q >> 32, stream & 0xFFFFFFFF, stream >> 32]
    k0, k1 = seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k1, a & 0xFFFFFFFF]
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c


def normal(seed: int, stream: int, i: int) -> float:
    """Element i of a sample, in float64 from the exact u and angle (design: Box and Muller on word pairs)."""
    r = philox(seed, stream, i // 4)
    even, odd = r[(i % 4) // 2 * 2], r[(i % 4) // 2 * 2 + 1]
    radius, angle = math.sqrt(-2 * math.log((even + 0.5) * 2.0**-32)), 2 * math.pi * odd * 2.0**-32
    return radius * (math.sin(angle) if i % 2 else math.cos(angle))


def test_philox_known_answers(device: Device) -> None:
    keys, expected = [], []
    for counter, key, result in KNOWN:
        c, k = _words(counter), _words(key)
        seed, stream, q = k[0] | k[1] << 32, c[2] | c[3] << 32, c[0] | c[1] << 32
        assert philox(seed, stream, q) == _words(result)
        keys += [seed, stream, q]
        expected += _words(result)
    inputs = torch.tensor([k - (k >> 63 << 64) for k in keys], dtype=torch.int64)
    words = torch.empty(4 * len(KNOWN), dtype=torch.int32)
    host = device.host
    lib = device.library()
    host.register(inputs, readonly=True)
    host.register(words, init=False)
    try:
        import ctypes

        assert lib.dk_philox(ctypes.c_void_p(inputs.data_ptr()), ctypes.c_void_p(words.data_ptr()), len(KNOWN)) == 0
        host.check()
    finally:
        host.release()
    assert [w & 0xFFFFFFFF for w in words.tolist()] == expected


def test_normals_are_box_muller(device: Device) -> None:
    call = randn("contiguous", 2, (401,), torch.float32, stream=(5 << 40) + 7)
    out = device.run(call)["out"]
    assert call.seeds is not None
    expected = [[normal(seed, call.stream, i) for i in range(401)] for seed in call.seeds.tolist()]
    torch.testing.assert_close(out.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "misaligned", "padded", "strided"])
def test_sizes(device: Device, cpu: Cpu, dtype: torch.dtype, layout: str) -> None:
    for count in COUNTS:
        shape = (count,) if layout != "strided" else (count, 1)
        check(device, cpu, randn(layout, 2 if count > 1000 else 3, shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(3, 343), (4, 256), (4, 8, 40), (5, 3), (37, 13), (64, 20), (300, 5), (601, 2), (1500, 1), (1, 77)],
    ids=str,
)
def test_channels_last(device: Device, cpu: Cpu, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for layout in ("channels_last", "channels_last_misaligned"):
        check(device, cpu, randn(layout, 2, shape, dtype))


@pytest.mark.parametrize("shape", [(3, 5, 7), (2, 3, 4, 5), (2, 3, 2, 3, 2, 5)], ids=str)
def test_strided_dimensions(device: Device, cpu: Cpu, shape: tuple[int, ...]) -> None:
    check(device, cpu, randn("strided", 2, shape, torch.float32))


def test_batch_and_position_do_not_matter(device: Device) -> None:
    whole = device.run(randn("contiguous", 4, (1030,), torch.float32))["out"]
    call = randn("misaligned", 4, (1030,), torch.float32)
    assert call.seeds is not None
    for b in (3, 1):
        one = Call("randn", "misaligned", 1, (1030,), {}, {"out": torch.float32}, seeds=call.seeds[b : b + 1], stream=3)
        assert torch.equal(device.run(one)["out"][0], whole[b])


def test_one_seed_for_all_samples(device: Device, cpu: Cpu) -> None:
    call = randn("contiguous", 3, (100,), torch.float32)
    call.seeds = seeds_for(1).expand(3)
    out = check(device, cpu, call)["out"]
    assert torch.equal(out[0], out[2])


def test_more_samples_than_a_grid_dimension(device: Device, cpu: Cpu) -> None:
    batch = 65537  # two slices of 32769: the first, the last of the first slice, the first of the second, the last
    call = randn("contiguous", batch, (3,), torch.float32)
    blocks = [0, 32768, 32769, 65536, 65537]  # 65537: beyond the batch
    got, expected = device.run(call, complete=False, only_ctas=blocks)["out"], cpu.run(call)["out"]
    assert device.launches[0]["grid"] == (1, 32769, 2)
    for b in blocks[:-1]:
        assert torch.equal(got[b], expected[b])


@pytest.mark.full
def test_beyond_32_bit_addresses(device_of, cpu: Cpu) -> None:  # type: ignore[no-untyped-def]
    """The last block of a tensor of more than 2^32 bytes and 2^31 elements (pages that nobody touches cost nothing)."""
    device = device_of("sm_80")
    count = 2**31 + 4099
    out = torch.empty(1, count, dtype=torch.float16)
    seeds = seeds_for(1)
    host = device.host
    from ptx import harness

    call = Call("randn", "contiguous", 1, (count,), {}, {"out": torch.float16}, seeds=seeds, stream=3)
    host.register(out, "out")
    host.register(seeds, "seeds", readonly=True)
    try:
        last = (count + 2047) // 2048 - 1
        lib = device.library(only_ctas=[last], race_global=False, stats=False)
        assert harness._invoke(lib, call, {}, {"out": out}, torch.empty(0)) == 0
        host.check()
    finally:
        host.release()
    got = out[0, last * 2048 :].double()
    expected = [normal(int(seeds[0]), 3, i) for i in range(last * 2048, count)]
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-3, atol=1e-6)
