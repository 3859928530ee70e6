"""Noise by address: known answers, the same bits everywhere, accuracy, and quality on 10^8 draws."""

from __future__ import annotations

import math
import os
import re
import struct
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from helpers.lazy import Lazy
from helpers.op_cases import LAYOUTS, SHAPES, arrange, same_bits, threads

from diffkern import _C, ops, reference, streams

special, stats = Lazy("scipy.special"), Lazy("scipy.stats")

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
U64 = 2**64


def native(seed: int, stream: int, quad: int, quads: int) -> np.ndarray:
    """Normals of any counter, straight from the kernel: float32 [quads, 4]."""
    return np.frombuffer(_C.normals(seed % U64, stream % U64, quad % U64, quads), dtype=np.float32).reshape(-1, 4)


def hex_bits(x: np.ndarray) -> list[str]:
    return [f"{bits:08x}" for bits in x.view(np.uint32).ravel().tolist()]


# --------------------------------------------------------------------------------------------------- known answers
# Random123's kat_vectors, philox4x32 with 10 rounds: counter (4 words), key (2 words), result.
PHILOX = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
# Our own: seed, stream, quad and the bits of its four normals. Any change here breaks every image anybody has made.
NORMALS = [
    (0, 0, 0, "3f7dbb33 bf6cb6b0 bf1e1b9f bef6d1b2"),
    (1, 0, 0, "3ec2c3e4 be97b1be be7f370d bf807dbd"),
    (0, 1, 0, "3f88a6cb bed9c6b5 c0178cdf be6d0d85"),
    (0, 0, 1, "be1d5353 3e392a68 3f54ec98 3e4a2da3"),
    (-1, 0, 0, "3f8c9ec9 3f21de90 3f255714 3f3ac13d"),
    (2**63 - 1, 2**40, 7, "3fa34f96 3f5b39d8 bf7ceb38 be38392e"),
    (-(2**63), 2**53 - 1, 255, "c00c1c29 3f10daa3 3f336eed bfd20ced"),
    (42, 2**41 + 3, 65537, "3f5c82bc bf440ca3 bd806a47 bfa478da"),
    (7, 0, 2**32 - 1, "3f047314 3ee794da bfe47339 3fdc67a5"),
    (7, 0, 2**32, "3f92ee03 3fb8b43c be8cbd35 bb536856"),
    (-3, 2**40, 2**61, "3fed7ed8 3e160b9e 4025844f 3ea1ea5a"),
    (2**32, 2**32, 2**32, "3f8572cc 3f06b48d bdaafafa be522785"),
]


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), PHILOX)
def test_philox_published_vectors(counter: str, key: str, result: str) -> None:
    c, k = words(counter), words(key)
    seed, stream, quad = k[0] | k[1] << 32, c[2] | c[3] << 32, c[0] | c[1] << 32
    assert reference.philox(seed, stream, np.array([quad], dtype=np.uint64)).tolist() == [words(result)]
    # The native generator shows its words through the normals only: right words, or this could not be.
    exact = reference.normal(np.array([words(result)], dtype=np.uint32))
    np.testing.assert_allclose(native(seed, stream, quad, 1), exact, rtol=5e-7)


@pytest.mark.parametrize(("seed", "stream", "quad", "bits"), NORMALS)
def test_normals_known_answers(seed: int, stream: int, quad: int, bits: str) -> None:
    assert hex_bits(native(seed, stream, quad, 1)) == bits.split()
    if quad < 2**18 and 0 <= stream < streams.LIMIT:
        x = ops.randn([1, 4 * quad + 4], torch.tensor([seed]), stream)
        assert hex_bits(x[0, -4:].numpy()) == bits.split()


# Draws past 6 sigma, found by searching 4 10^9 elements: seed, element, value.
FAR = [
    (11, 27426939, "c0c29129"),
    (17, 32630653, "40c24a64"),
    (32, 16772569, "c0c97f10"),
    (93, 23259656, "c0c97ab6"),
]


@pytest.mark.parametrize(("seed", "element", "bits"), FAR)
def test_draws_past_six_sigma(seed: int, element: int, bits: str) -> None:
    assert hex_bits(native(seed, 0, element // 4, 1))[element % 4] == bits
    assert abs(struct.unpack(">f", bytes.fromhex(bits))[0]) > 6


def test_counters_carry_into_the_high_word() -> None:
    """Counters around 2^32 (elements around 2^34), which no tensor of this test could hold."""
    for quad in (2**32 - 24, 2**32 - 3, 2**33 + 5, 2**63 - 9, 2**64 - 21):
        drawn = native(-12345, 2**53 - 1, quad, 48)
        counters = np.arange(48, dtype=np.uint64) + np.uint64(quad)
        np.testing.assert_allclose(drawn, exact_normals(reference.philox(-12345, 2**53 - 1, counters))[0], rtol=5e-7)


def test_randn_is_the_reference() -> None:
    seeds = torch.tensor([0, -1, 2**63 - 1, -(2**63), 77])
    for stream in (0, 1, streams.TRAINING, streams.LIMIT - 1):
        ours, exact = ops.randn([5, 3, 17], seeds, stream), reference.randn([5, 3, 17], seeds, stream)
        torch.testing.assert_close(ours.double(), exact, rtol=5e-7, atol=1e-7)


def test_seeds_mix() -> None:
    """`seeds(s, n, first)`: sample j is the same in every split, neighbours share nothing, values are fixed."""
    assert ops.seeds(0, 3).tolist() == SEEDS_OF_ZERO
    assert torch.equal(ops.seeds(7, 9)[4:], ops.seeds(7, 5, first=4))
    assert ops.seeds(-1, 2).tolist() == ops.seeds(2**64 - 1, 2).tolist()
    assert len({s for job in range(64) for s in ops.seeds(job, 64).tolist()}) == 64 * 64
    bits = np.unpackbits(np.concatenate([ops.seeds(job, 4096).numpy() for job in range(8)]).view(np.uint8))
    assert abs(bits.mean() - 0.5) < 5 * 0.5 / math.sqrt(bits.size)
    for n, first in ((-1, 0), (3, -2)):
        with pytest.raises(ValueError, match=rf"must not be negative, got n={n}, first={first}"):
            ops.seeds(0, n, first=first)


SEEDS_OF_ZERO = [575854417547002445, 617872476682209134, -8822135691287025272]


# ------------------------------------------------------------------------------------------------ the same bits
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_dtypes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """float64 is the float32 normal widened, 16-bit dtypes are it rounded; `out` of any strides holds the same."""
    seeds = ops.seeds(3, shape[0])
    expected = ops.randn(shape, seeds, 5).to(dtype)
    assert same_bits(ops.randn(shape, seeds, 5, dtype=dtype), expected)
    for layout in LAYOUTS:
        if layout != "expanded":
            out = arrange(torch.full(shape, math.nan, dtype=dtype), layout)
            assert ops.randn(shape, seeds, 5, out=out) is out
            assert same_bits(out, expected), layout


def test_channels_last_3d_and_permuted() -> None:
    seeds = ops.seeds(1, 2)
    for channels in (1, 3, 4, 16, 17, 64):
        shape = (2, channels, 5, 6, 7)
        expected = ops.randn(shape, seeds)
        out = torch.empty(shape).to(memory_format=torch.channels_last_3d)
        assert same_bits(ops.randn(shape, seeds, out=out), expected), channels
        for order in ((0, 2, 1, 3, 4), (1, 0, 4, 3, 2), (4, 3, 2, 1, 0), (2, 0, 3, 1, 4)):
            inverse = np.argsort(order).tolist()
            out = torch.empty([shape[d] for d in order]).permute(inverse)
            assert same_bits(ops.randn(shape, seeds, out=out), expected), (channels, order)


def test_bits_do_not_depend_on_threads_batch_or_position() -> None:
    shape = (6, 3, 97, 101)
    seeds = ops.seeds(9, 6)
    with threads(1):
        expected = ops.randn(shape, seeds, 3)
    for n in (2, 3, 5):
        with threads(n):
            assert same_bits(ops.randn(shape, seeds, 3), expected)
    assert same_bits(
        torch.cat([ops.randn((k, *shape[1:]), s, 3) for k, s in zip((1, 2, 3), seeds.split([1, 2, 3]), strict=True)]),
        expected,
    )
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    assert same_bits(ops.randn(shape, seeds[order], 3), expected[order])
    # Element i does not depend on how many follow.
    assert same_bits(ops.randn((6, 1001), seeds, 3), expected.flatten(1)[:, :1001])
    # One seed for all samples, as an expanded tensor.
    assert same_bits(ops.randn(shape, seeds[:1].expand(6), 3), expected[:1].expand(shape))


# ---------------------------------------------------------------------------------------------------- accuracy
def exact_normals(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The exact function of the rounded u and t (design: float32), in float64 and without cancellation; u, t."""
    even, odd = w[:, 0::2], w[:, 1::2]
    u = (even.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32)
    k = (odd + np.uint32(2**29)) >> np.uint32(30)
    t = (odd - (k << np.uint32(30))).view(np.int32).astype(np.float32) * np.float32(2 * math.pi * 2.0**-32)
    sine, cosine = np.sin(t.astype(np.float64)), np.cos(t.astype(np.float64))
    radius = np.sqrt(-2 * np.log(u.astype(np.float64)))
    first = radius * np.choose(k, [cosine, -sine, -cosine, sine])
    second = radius * np.choose(k, [sine, cosine, -sine, -cosine])
    return np.stack([first, second], axis=2).reshape(len(w), 4), np.stack([u, t], axis=2)


def test_within_four_ulp() -> None:
    """MEASURED_ULP is the worst of these draws."""
    worst = 0.0
    for seed in range(4):
        counters = np.arange(2**18, dtype=np.uint64)
        exact = exact_normals(reference.philox(seed, 2, counters))[0]
        ours = native(seed, 2, 0, len(counters)).astype(np.float64)
        spacing = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
        worst = max(worst, float((np.abs(ours - exact) / spacing).max()))
    assert worst <= 4.0
    assert worst == pytest.approx(MEASURED_ULP, rel=0.01)


MEASURED_ULP = 2.584


def test_float64_oracle_against_mpmath() -> None:
    """The oracle above in 40 digits, on draws that include the smallest and the largest of many."""
    w = reference.philox(1, 2, np.arange(2**16, dtype=np.uint64))
    exact, ut = exact_normals(w)
    size = np.abs(exact).max(axis=1)
    picked = [*np.argsort(np.abs(exact).min(axis=1))[:20], *np.argsort(size)[-20:], *range(20)]
    with mpmath.workdps(40):
        for i in picked:
            for pair in range(2):
                u, t = (mpmath.mpf(float(v)) for v in ut[i, pair])
                k = ((int(w[i, 2 * pair + 1]) + 2**29) >> 30) % 4
                radius = mpmath.sqrt(-2 * mpmath.log(u))
                c, s = mpmath.cos(t), mpmath.sin(t)
                lanes = [(c, s), (-s, c), (-c, -s), (s, -c)][k]
                for lane in range(2):
                    truth = radius * lanes[lane]
                    assert abs(float(truth) - exact[i, 2 * pair + lane]) <= 1e-14 * abs(float(truth))


# ----------------------------------------------------------------------------------------------------- quality
CHUNK, CHUNKS = 2**18, 384  # 1.007 10^8 draws, a cache full at a time
MOMENTS = [0.0, 1.0, 0.0, 3.0, 0.0, 15.0]


@pytest.mark.full
def test_moments_distribution_and_tails() -> None:
    n = CHUNK * CHUNKS
    assert n >= 10**8
    bins = 2**16
    counts = torch.zeros(bins, dtype=torch.int64)
    sums = torch.zeros(6, dtype=torch.float64)
    limits = (3.0, 4.0, 4.5, 5.0, 5.5, 6.0)
    tails = dict.fromkeys(limits, 0)
    out = torch.empty(4, CHUNK // 4)
    for chunk in range(CHUNKS):
        x = ops.randn(out.shape, ops.seeds(chunk, 4), chunk % 3, out=out).flatten().double()
        square = x * x
        powers = [x, square, square * x, square * square, square * square * x, square * square * square]
        sums += torch.stack([p.sum() for p in powers])
        counts += torch.bincount((torch.special.ndtr(x) * bins).long().clamp_(max=bins - 1), minlength=bins)
        for limit in limits:
            tails[limit] += int((square > limit**2).sum())
    for power, (total, mean) in enumerate(zip(sums.tolist(), MOMENTS, strict=True), start=1):
        variance = math.prod(range(2 * power - 1, 0, -2)) - mean**2  # E x^2p = (2p - 1)!!
        assert abs(total / n - mean) < 5 * math.sqrt(variance / n), f"moment {power}"
    # Kolmogorov-Smirnov at 65536 quantiles.
    distance = float((counts.cumsum(0) / n - torch.arange(1, bins + 1) / bins).abs().max())
    assert stats.kstwobign.sf(distance * math.sqrt(n)) > 1e-4, distance
    # And chi-squared over them, which sees what is local.
    chi = float(((counts - n / bins) ** 2).sum()) / (n / bins)
    assert abs(chi - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))
    for limit, count in tails.items():
        expected = n * math.erfc(limit / math.sqrt(2))
        assert stats.poisson.cdf(count, expected) > 1e-6, (limit, count, expected)
        assert stats.poisson.sf(count - 1, expected) > 1e-6, (limit, count, expected)


def test_tail_probability_of_the_transform() -> None:
    """P(|x| > a) of the transform itself, over its every u: right past 6 sigma up to the largest draw, 6.76."""
    even = np.arange(2**16, dtype=np.float64)
    radius = np.sqrt(-2 * np.log(even * 2.0**-32 + 2.0**-33))  # exact: 16-bit integers
    for limit, tolerance in ((5.0, 1e-4), (5.5, 1e-3), (6.0, 0.01), (6.25, 0.02), (6.5, 0.15)):
        angle = np.arccos(np.minimum(limit / radius, 1.0))  # |cos| > limit / R on a share 2 angle / pi of the circle
        probability = float((2 * angle / math.pi).sum()) / 2**32
        assert probability == pytest.approx(special.erfc(limit / math.sqrt(2)), rel=tolerance), limit


@pytest.mark.full
def test_no_correlation_between_neighbours() -> None:
    """Neighbouring seeds, streams and elements; of values and of squares; 4 10^6 pairs each."""
    n = 2**22
    base = ops.randn([1, n], torch.tensor([1000]), 50)[0].double()
    pairs = {}
    for step in (1, 2, 3, 2**32):
        pairs[f"seed + {step}"] = ops.randn([1, n], torch.tensor([1000 + step]), 50)[0].double()
        pairs[f"stream + {step}"] = ops.randn([1, n], torch.tensor([1000]), 50 + step)[0].double()
    for lag in (1, 2, 3, 4, 5, 7, 8, 16, 1024):
        pairs[f"element + {lag}"] = base.roll(lag)
    for name, other in pairs.items():
        assert abs(float((base * other).mean())) < 5 / math.sqrt(n), name
        squares = (base * base - 1) * (other * other - 1) / 2
        assert abs(float(squares.mean())) < 5 / math.sqrt(n), f"squares, {name}"


# ------------------------------------------------------------------------------------------------- large tensors
def available_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.long
@pytest.mark.skipif(available_memory() < 8 * 2**30, reason="needs 8 GiB of free memory")
def test_more_than_two_to_the_31_elements() -> None:
    count = 2**31 + 1031
    out = torch.empty(1, count, dtype=torch.bfloat16)
    ops.randn([1, count], torch.tensor([3]), 8, out=out)
    for quad in (0, 2**29 - 3, 2**29, count // 4 - 5):
        expected = torch.from_numpy(native(3, 8, quad, 5).copy()).flatten().to(torch.bfloat16)
        assert same_bits(out[0, 4 * quad : 4 * quad + 20], expected), quad
    # A step over as many, in place: the mask is an expanded byte.
    last = out[0, -7:].clone()
    from helpers.op_cases import table

    ops.step_out(out, None, table=table({"a": 2.0}), out=out)
    assert same_bits(out[0, -7:], 2 * last)


def test_offsets_past_two_to_the_31() -> None:
    """Samples so far apart in memory, of which only what is written is ever given to the process."""
    from helpers.op_cases import table

    n, apart = 1031, 2**31 + 1031
    out = torch.empty(apart + n, dtype=torch.bfloat16).as_strided((2, n), (apart, 1))
    seeds = ops.seeds(3, 2)
    expected = ops.randn([2, n], seeds, 8, dtype=torch.bfloat16)
    ops.randn([2, n], seeds, 8, out=out)
    assert same_bits(out, expected)
    ops.step_out(out, None, table=table({"a": 2.0}), out=out)
    assert same_bits(out, 2 * expected)


def test_indices_are_64_bit(root: Path) -> None:
    """Static: in csrc/core and csrc/cpu, 32-bit loop variables count dimensions, columns, lanes, chains of sums, parts
    of a tensor, instruction sets, terms of a sum, and rows and vectors held in registers only."""
    small = {"chain", "column", "d", "k", "j", "r", "half", "lane", "level", "part", "round", "row", "term", "w"}
    for path in [*(root / "csrc/core").iterdir(), *(root / "csrc/cpu").iterdir(), *(root / "csrc/bind").iterdir()]:
        for kind, name in re.findall(r"for \((?:const )?(int|int32_t|unsigned|uint32_t) (\w+)", path.read_text()):
            assert name in small, f"{path.name}: {kind} {name}"
        for cast in re.findall(r"static_cast<(?:int|int32_t)>\(([^()]*)\)", path.read_text()):
            assert not re.search(r"count|batch|begin|numel|offset|sizes|stride", cast), f"{path.name}: {cast}"
