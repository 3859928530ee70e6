"""Quantile, dynamic threshold and moments: the bits of torch.quantile, layouts, sizes, special values, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.op_cases import LAYOUTS, SHAPES, arrange, check_sentence, same_bits, threads, values
from helpers.quantiles import TORCH_TAKES_THESE_STEPS, by_sorting, rows, torch_quantile
from helpers.tolerances import STATE_DTYPES, check
from torch import Tensor

from diffkern import ops, reference

QS = (0.0, 0.1, 0.3, 0.5, 0.77, 0.995, 1.0)
# One task a sample up to 65536 elements, then parts; blocks of 1024; primes.
COUNTS = (1, 2, 3, 31, 32, 33, 1009, 1024, 1025, 4099, 65521, 65536, 65537, 131101)
INF, NAN = math.inf, math.nan
dtypes = pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def same(a: Tensor, b: Tensor) -> bool:
    """Equal bits, where every NaN equals every NaN."""
    a, b = (torch.where(t.isnan(), torch.zeros_like(t), t) for t in (a, b))
    return same_bits(a, b)


def check_quantile(x: Tensor, q: float, what: str = "") -> None:
    got, expected = ops.quantile(x, q), torch_quantile(x, q)
    assert got.dtype == wide(x).dtype
    assert torch.equal(got.isnan(), expected.isnan()), (what, q, got, expected)
    assert same(got, expected), (what, q, got, expected)
    s = expected.clamp(1.0, 1.75).reshape(-1, *(1,) * (x.dim() - 1))
    thresholded = (torch.clamp(wide(x), -s, s) / s).to(x.dtype)
    out = ops.dynamic_threshold(x, q, 1.75)
    assert out.dtype == x.dtype
    assert torch.equal(out.isnan(), thresholded.isnan()), (what, q)
    assert same(out, thresholded), (what, q)


# ----------------------------------------------------------------------------------------------------------- quantile
@dtypes
@pytest.mark.parametrize("count", COUNTS)
def test_bits_of_torch(dtype: torch.dtype, count: int) -> None:
    x = 1.5 * values((3, count), count, dtype)
    for q in QS if count < 65000 else (0.0, 0.3, 0.995):
        check_quantile(x, q, f"{dtype}, {count}")


@dtypes
def test_layouts(dtype: torch.dtype) -> None:
    for shape in [s for s in SHAPES if 0 not in s] + [(1, 3, 200, 131)]:
        for layout in LAYOUTS:
            x = values(shape, 2, dtype, layout)
            check_quantile(x, 0.3, f"{shape}, {layout}")
            out = ops.dynamic_threshold(x)
            assert same_bits(out, ops.dynamic_threshold(x.contiguous()))


@dtypes
def test_ties(dtype: torch.dtype) -> None:
    for x in (
        torch.full((2, 1000), -0.75),
        torch.zeros(2, 1000) * -1,
        torch.randint(-3, 4, (1, 70000)).float() / 2,
        torch.arange(1024).remainder(2).repeat(2, 1) * 1.25,
        torch.cat([torch.zeros(1, 999), torch.full((1, 1), 3.0)], 1),
    ):
        for q in QS:
            check_quantile(x.to(dtype), q, "ties")


@dtypes
def test_extremes(dtype: torch.dtype) -> None:
    """Every exponent, subnormal numbers, neighbours that differ in the last bit."""
    info = torch.finfo(dtype)
    spread = torch.logspace(math.log10(info.tiny) - 2, math.log10(info.max) - 0.1, 5001, dtype=torch.float64)
    neighbours = 1.0 + torch.arange(3000, dtype=torch.float64) * info.eps
    for x in (spread.flip(0), -spread, neighbours, torch.tensor([info.max, -info.tiny, info.smallest_normal / 4])):
        for q in QS:
            check_quantile(x[None].to(dtype), q, "extremes")


@dtypes
@pytest.mark.parametrize("count", [5, 1031, 70001])
def test_infinities_and_nan(dtype: torch.dtype, count: int) -> None:
    """As torch: NaN anywhere gives NaN, an infinity only where it is one of the two ranks or both."""
    x = values((8, count), 3, dtype)
    x[0, 2], x[1, 4], x[2, :3] = INF, -INF, INF
    x[3, 1], x[4, count - 1], x[5] = NAN, -NAN, NAN
    x[6, 0], x[6, 1], x[7] = NAN, INF, -INF
    for q in (*QS, 0.999, 1 - 1.5 / count) if count < 2000 else (0.3, 1 - 1.5 / count):
        check_quantile(x, q, f"special, {count}")
    got = ops.quantile(x, 0.25)
    assert got.isnan().tolist() == [False, False, False, True, True, True, True, True]


def test_nan_of_any_bits_is_nan() -> None:
    for pattern in (0x7FC00000, 0x7F800001, 0x7FFFFFFF, -0x400000, -1, -0x7FFFFF):
        x = values((1, 100), 1)
        x.view(torch.int32)[0, 50] = pattern
        assert ops.quantile(x, 0.0).isnan().item(), hex(pattern)
    for pattern in (0x7FF0000000000001, 0x7FF8000000000000, 2**63 - 1, -1, -(2**51)):
        y = values((1, 100), 1, torch.float64)
        y.view(torch.int64)[0, 50] = pattern
        assert ops.quantile(y, 0.0).isnan().item(), hex(pattern)


@pytest.mark.full
def test_more_than_torch_takes() -> None:
    """More than 2^24 elements a sample: where float32 ranks would lose whole positions."""
    count = 2**24 + 77
    x = torch.randn(1, count, generator=torch.Generator().manual_seed(0))
    assert same_bits(ops.quantile(x, 0.995), by_sorting(x, 0.995))
    assert same_bits(ops.quantile(x, 1.0), x.abs().amax(1))
    mean, deviation = ops.moments(x)[0].tolist()
    assert mean == pytest.approx(x.double().mean().item(), abs=1e-8)
    assert deviation == pytest.approx(x.double().std().item(), rel=1e-6)


@dtypes
@pytest.mark.parametrize("count", [100, 3000, 131073])
def test_a_sample_alone_and_any_thread_count(dtype: torch.dtype, count: int) -> None:
    x = values((3, count), 4, dtype)
    with threads(1):
        expected = ops.quantile(x, 0.9), ops.dynamic_threshold(x, 0.9), ops.moments(x)
    for n in (1, 2, 3):
        with threads(n):
            for b in range(3):
                one = x[b : b + 1]
                alone = ops.quantile(one, 0.9), ops.dynamic_threshold(one, 0.9), ops.moments(one)
                assert all(same_bits(a[0], e[b]) for a, e in zip(alone, expected, strict=True))
            whole = ops.quantile(x, 0.9), ops.dynamic_threshold(x, 0.9), ops.moments(x)
            assert all(same_bits(a, e) for a, e in zip(whole, expected, strict=True))


def test_the_steps_are_those_of_torch() -> None:
    """The oracle of the other tests: torch itself on CPUs with FMA since it takes ranks in float64 (seen in 2.14)."""
    modern = tuple(int(n) for n in torch.__version__.split(".")[:2]) >= (2, 14)
    if modern and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert TORCH_TAKES_THESE_STEPS
    for dtype in STATE_DTYPES:
        x = values((5, 1009), 1, dtype)
        for q in QS:
            got = by_sorting(x, q)
            torch.testing.assert_close(got, torch.quantile(rows(x).abs(), q, dim=1), rtol=1e-4, atol=0)
            assert same_bits(ops.quantile(x, q), got)


def test_reference() -> None:
    x = values((3, 4, 50), 5)
    for q in QS:
        torch.testing.assert_close(ops.quantile(x, q).double(), reference.quantile(x, q), rtol=1e-6, atol=0)
        got = ops.dynamic_threshold(x, q, 1.5).double()
        torch.testing.assert_close(got, reference.dynamic_threshold(x, q, 1.5), rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------------------------------------------------- threshold
def test_small_images_are_left_alone() -> None:
    """s is never below 1: an x0 inside [-1, 1] keeps its bits."""
    x = values((3, 3, 17, 16), 1).clamp(-1, 1)
    assert same_bits(ops.dynamic_threshold(x), x)


def test_maximum() -> None:
    x = torch.cat([values((1, 5000), 1), 50 * values((1, 5000), 2)])
    for maximum in (1.0, 2.0, INF):
        s = ops.quantile(x, 0.9).clamp(1, maximum)[:, None]
        assert same_bits(ops.dynamic_threshold(x, 0.9, maximum), x.clamp(-s, s) / s)
    assert ops.dynamic_threshold(x, 0.9).abs().max().item() == 1.0


@dtypes
def test_out_and_in_place(dtype: torch.dtype) -> None:
    for shape in ((3, 5, 7, 11), (2, 3, 160, 150)):
        for layout in ("contiguous", "channels_last", "permuted", "sliced"):
            x = values(shape, 1, dtype, layout)
            expected = ops.dynamic_threshold(x, 0.7, 2.0)
            for target in ("contiguous", "channels_last", "permuted", "sliced"):
                out = arrange(torch.full(shape, -7.0, dtype=dtype), target)
                assert ops.dynamic_threshold_out(x, 0.7, 2.0, out=out) is out
                assert same_bits(out, expected)
            version = x._version
            assert same_bits(ops.dynamic_threshold_out(x, 0.7, 2.0, out=x), expected)
            assert x._version > version


# ------------------------------------------------------------------------------------------------------------ moments
@dtypes
def test_moments(dtype: torch.dtype) -> None:
    for k, shape in enumerate([s for s in SHAPES if 0 not in s[:1]] + [(2, 3, 200, 131), (2, 70001)]):
        for layout in LAYOUTS:
            x = 0.7 * values(shape, k, dtype, layout) + 0.3
            got, exact = ops.moments(x), reference.moments(x)
            assert got.dtype == wide(x).dtype
            assert got.shape == (shape[0], 2)
            flat = rows(x)
            plain = torch.stack([flat.mean(1), flat.std(1) if flat.shape[1] > 1 else flat.mean(1) * NAN], 1)
            for column, what in ((0, "mean"), (1, "deviation")):
                # Mean and deviation may be as good as 0: the error of a sum is measured by the size of what is added.
                size = flat.double().abs().mean(1).nan_to_num()
                both = [t[:, column].double() + size for t in (got, exact, plain)]
                check(*both, f"{what}, {shape}, {layout}", wide(x).dtype)


def test_moments_far_from_zero() -> None:
    """Two passes: a mean much larger than the deviation costs no digits of it."""
    x = 1000.0 + values((3, 70000), 1)
    got, exact = ops.moments(x), reference.moments(x)
    torch.testing.assert_close(got.double(), exact, rtol=2e-6, atol=0)


def test_moments_of_little() -> None:
    one = ops.moments(torch.tensor([[3.0], [-2.0]]))
    assert one[:, 0].tolist() == [3.0, -2.0]
    assert one[:, 1].isnan().all()
    assert ops.moments(torch.zeros(2, 0)).isnan().all()
    assert ops.moments(torch.zeros(0, 4)).shape == (0, 2)
    assert ops.quantile(torch.zeros(0, 4), 0.5).shape == (0,)
    assert ops.dynamic_threshold(torch.zeros(0, 4)).shape == (0, 4)
    constant = ops.moments(torch.full((1, 3000), 0.5))
    assert constant.tolist() == [[0.5, 0.0]]
    special = ops.moments(torch.tensor([[1.0, NAN], [1.0, INF]]))
    assert special[0].isnan().all()
    assert special[1, 0].item() == INF
    assert special[1, 1].isnan().item()


# ------------------------------------------------------------------------------------------------- compile, bad input
@pytest.mark.full
def test_compile_and_export() -> None:
    def everything(x: Tensor) -> tuple[Tensor, ...]:
        out = torch.empty_like(x)
        ops.dynamic_threshold_out(x, 0.9, 1.5, out=out)
        return ops.quantile(x, 0.9) * 2, ops.dynamic_threshold(x * 2, 0.9), ops.moments(x) + 1, out + 1

    x = values((3, 2, 5, 7), 1)
    compiled = torch.compile(everything, fullgraph=True)
    for y in (x, values((4, 2, 5, 7), 2)):
        for got, expected in zip(compiled(y), everything(y), strict=True):
            assert same_bits(got, expected)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return everything(x)

    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(Module(), (x,), dynamic_shapes=({0: batch},))
    y = values((5, 2, 5, 7), 3)
    for got, expected in zip(exported.module()(y), everything(y), strict=True):
        assert same_bits(got, expected)


def test_meta() -> None:
    x = torch.empty(3, 2, 5, dtype=torch.bfloat16, device="meta")
    assert (ops.quantile(x, 0.5).shape, ops.quantile(x, 0.5).dtype) == ((3,), torch.float32)
    assert (ops.moments(x.double()).shape, ops.moments(x.double()).dtype) == ((3, 2), torch.float64)
    assert ops.dynamic_threshold(x).dtype == torch.bfloat16


def test_bad_input() -> None:
    x = values((2, 3, 4), 1)
    check_sentence(lambda: ops.quantile(x, 1.5), r"diffkern\.quantile: q must be in \[0, 1\], got 1\.5")
    check_sentence(lambda: ops.quantile(x, -0.1), r"diffkern\.quantile: q must be in \[0, 1\], got -0\.1")
    check_sentence(lambda: ops.dynamic_threshold(x, NAN), r"diffkern\.dynamic_threshold: q must be .*, got -?nan")
    limit = r"diffkern\.dynamic_threshold: maximum must be at least 1 \(inf: no limit\), got "
    check_sentence(lambda: ops.dynamic_threshold(x, 0.9, 0.5), limit + r"0\.5")
    check_sentence(lambda: ops.dynamic_threshold(x, 0.9, NAN), limit + r"-?nan")
    empty = r"must have an element in each sample, got shape \[2, 0, 4\]"
    check_sentence(lambda: ops.quantile(x[:, :0], 0.5), r"diffkern\.quantile: x " + empty)
    check_sentence(lambda: ops.dynamic_threshold(x[:, :0]), r"diffkern\.dynamic_threshold: x0 " + empty)
    for function, name in ((lambda t: ops.quantile(t, 0.5), "x"), (ops.dynamic_threshold, "x0"), (ops.moments, "x")):
        check_sentence(lambda f=function: f(x[0, 0, 0]), rf"{name} must have a batch dimension, got a tensor without")
        floats = rf"{name} must be float64, float32, float16 or bfloat16, got int64"
        check_sentence(lambda f=function: f(x.long()), floats)
        leaf = x.clone().requires_grad_()
        refused = r"not differentiable, and a tensor requires grad: use torch\.no_grad\(\)"
        check_sentence(lambda f=function, leaf=leaf: f(leaf), refused)
        with torch.no_grad():
            function(leaf)
    out = torch.empty(2, 3, 5)
    shape = r"diffkern\.dynamic_threshold: out must have the shape of x0 \[2, 3, 4\], got \[2, 3, 5\]"
    check_sentence(lambda: ops.dynamic_threshold_out(x, out=out), shape)
    dtype = r"out must have the dtype of x0 \(float32\), got float16"
    check_sentence(lambda: ops.dynamic_threshold_out(x, out=torch.empty(2, 3, 4).half()), dtype)
    check_sentence(lambda: ops.dynamic_threshold_out(x, out=x[:1].expand(2, 3, 4)), r"out must not have stride 0")
    buffer = torch.zeros(30)
    part = r"out must not overlap x0 in memory \(the same tensor, in place, is fine\)"
    check_sentence(lambda: ops.dynamic_threshold_out(buffer[:24].view(2, 12), out=buffer[6:].view(2, 12)), part)
    check_sentence(lambda: ops.dynamic_threshold_out(x, out=torch.empty_like(x, device="meta")), r"out must be on the")
