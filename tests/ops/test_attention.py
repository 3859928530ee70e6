"""`attention` forward: against float64 in every dtype, head dim and layout; NaN, large logits, bits, far memory."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.attention_bounds import attention_floors
from helpers.attention_cases import ALL_LAYOUTS, DIMS, DTYPES, LAYOUTS, check_error, inputs, plain
from helpers.op_cases import check_sentence, same_bits, threads
from helpers.suites import few
from helpers.tolerances import check
from torch import Tensor

import diffkern
from diffkern import reference

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
SMALL_N = (1, 63, 64, 65, 77, 127, 256)


def compare(q: Tensor, k: Tensor, v: Tensor, what: str, scale: float | None = None) -> None:
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    every = torch.ops.diffkern.attention(q, k, v, factor)
    # Sums are those of the weights as the product with v has them, so in bfloat16 each may be rounded.
    bound = {torch.float64: 1e-13, torch.bfloat16: 2.0**-9}.get(q.dtype, 4e-6)
    for part, out, sums in zip(*(t.split(1024, 2) for t in (q, *every)), strict=True):  # weights of all: gigabytes
        exact, lse = reference.attention(part, k, v, scale)
        floor = attention_floors(part, k, v, factor).out if q.dtype == torch.float64 else None  # which alone reads it
        check_error(out, exact, plain(part, k, v, scale), what, floor)
        torch.testing.assert_close(sums.double(), lse, rtol=bound, atol=bound * (1 + q.shape[-1] ** 0.5), msg=what)


# ------------------------------------------------------------------------------------------------------------ accuracy
@dtypes
@pytest.mark.parametrize("dim", DIMS)
def test_sizes(dim: int, dtype: torch.dtype) -> None:
    """Every tail of a tile, self- and cross-attention, the layouts in turn."""
    names = list(LAYOUTS)
    for i, n in enumerate(SMALL_N):
        for j, m in enumerate((n, 77) if i % 2 else (n, 130)):
            q, k, v = (names[(dim // 8 + i * 3 + j + part) % len(names)] for part in (0, 1, 3))
            compare(*inputs((1, 1 + n % 2, n, m, dim), dtype, (q, k, v), n), f"N {n}, M {m}, D {dim}, {q}, {k}, {v}")


@dtypes
@pytest.mark.parametrize(("n", "dim"), few([(1000, 40), (1000, 160), (4096, 64), (4096, 512)], "1000-40"))
def test_many_tokens(n: int, dim: int, dtype: torch.dtype) -> None:
    layouts = ("bhnd", "bhdn", "bhdn") if dim % 16 else ("bhdn", "bhdn", "bhnd")
    compare(*inputs((1, 1, n, n, dim), dtype, layouts), f"N {n}, D {dim}")


@pytest.mark.parametrize("dim", range(8, 257, 8))
def test_every_head_dim(dim: int) -> None:
    dtype = DTYPES[dim // 8 % 3]
    compare(*inputs((1, 2, 33, 21, dim), dtype, ("bhdn", "bhnd", "bhdn")), f"D {dim}, {dtype}")


@dtypes
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_layouts(layout: str, dtype: torch.dtype) -> None:
    """All pairs of the layout of q and that of k, or of v."""
    for i, other in enumerate(ALL_LAYOUTS):
        shape, layouts = ((2, 3, 49, 35, 24), (layout, other, layout))
        if i % 2:
            shape, layouts = ((3, 2, 5, 70, 16), (layout, layout, other))
        compare(*inputs(shape, dtype, layouts), f"{shape}, {layouts}")


def test_float64() -> None:
    for n, m, dim in ((1, 1, 8), (65, 77, 40), (130, 64, 512)):
        compare(*inputs((2, 2, n, m, dim), torch.float64, ("bhdn", "bhnd", "bhdn")), f"{n}, {m}, {dim}")


@dtypes
@pytest.mark.parametrize("scale", [1.0, 0.37, -0.25, 0.0])
def test_scale(scale: float, dtype: torch.dtype) -> None:
    compare(*inputs((2, 2, 70, 90, 16), dtype), f"scale {scale}", scale)
    out = diffkern.attention(*inputs((2, 2, 70, 90, 16), dtype), scale=scale)
    assert same_bits(out, torch.ops.diffkern.attention(*inputs((2, 2, 70, 90, 16), dtype), scale)[0])


def test_default_scale() -> None:
    q, k, v = inputs((1, 2, 9, 7, 40))
    assert same_bits(diffkern.attention(q, k, v), diffkern.attention(q, k, v, 1 / math.sqrt(40)))


# ------------------------------------------------------------------------------------------------------- strides of out
@pytest.mark.parametrize("layout", ALL_LAYOUTS)
def test_out_has_the_order_of_q(layout: str) -> None:
    q, k, v = inputs((2, 3, 10, 6, 16), layouts=(layout, "bhnd", "bhnd"))
    out = diffkern.attention(q, k, v)
    orders = {"bnhd": (0, 2, 1, 3), "bhdn": (0, 1, 3, 2), "hbnd": (1, 0, 2, 3), "bdhn": (0, 3, 1, 2)}
    name = {"slice of qkv": "bhdn", "unaligned bhdn": "bhdn"}.get(layout, layout)
    assert out.permute(orders.get(name, (0, 1, 2, 3))).is_contiguous()


# ---------------------------------------------------------------------------------------------------- difficult numbers
PLACES: dict[str, tuple[int, tuple[int, ...]]] = {
    "q": (0, (0, 1, 37, 5)),
    "first q": (0, (0, 0, 0, 0)),
    "k": (1, (0, 1, 66, 3)),
    "last k": (1, (1, 0, 99, 15)),
    "v": (2, (0, 0, 70, 7)),
    "last v": (2, (1, 1, 99, 0)),
}


@dtypes
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", PLACES)
def test_nan_and_infinity_go_where_the_formula_takes_them(place: str, value: float, dtype: torch.dtype) -> None:
    for layouts in (("bhnd", "bhnd", "bhnd"), ("bhdn", "bhdn", "bhdn")):
        tensors = inputs((2, 2, 70, 100, 16), dtype, layouts)
        which, index = PLACES[place]
        tensors[which][index] = value
        exact = reference.attention(*tensors)[0]
        out = diffkern.attention(*tensors)
        assert torch.equal(out.isnan(), exact.isnan()), f"{int(out.isnan().sum())}, not {int(exact.isnan().sum())}"
        assert torch.equal(out.isinf(), exact.isinf())
        finite = exact.isfinite()
        torch.testing.assert_close(out.double()[finite], exact[finite], rtol=2e-2, atol=2e-2)


@dtypes
def test_all_keys_nan(dtype: torch.dtype) -> None:
    q, k, v = inputs((1, 1, 70, 130, 16), dtype)
    assert diffkern.attention(q, torch.full_like(k, math.nan), v).isnan().all()


@dtypes
@pytest.mark.parametrize("size", [2.0**4, 2.0**7])
def test_large_logits(size: float, dtype: torch.dtype) -> None:
    """Logits past the exponentials' and float16's range: exact in float32, so softmax is what is compared."""
    q, k, v = inputs((1, 2, 100, 150, 16), torch.float64)
    q, k = ((t * 4).round() * size for t in (q, k))
    q, k, v = (t.to(dtype) for t in (q, k, v))
    assert (q.double() @ k.double().transpose(-1, -2)).abs().max() > (65504 if size > 100 else 1e4)
    exact = reference.attention(q, k, v)[0]
    out = diffkern.attention(q, k, v)
    assert out.isfinite().all()
    check(out, exact, exact.to(dtype), "large logits")


@dtypes
def test_rising_logits(dtype: torch.dtype) -> None:
    """Every tile of keys has a new maximum, far above the last, or none has."""
    q, k, v = inputs((1, 1, 66, 400, 8), dtype)
    q = torch.ones_like(q)
    for sign in (1, -1):
        steps = (sign * torch.arange(400).div(16).floor() / 8).to(dtype)[:, None].expand_as(k[0, 0])
        compare(q, steps.expand_as(k).contiguous(), v, f"rising {sign}", 2.0)


# ----------------------------------------------------------------------------------------------- the same bits, always
@dtypes
@pytest.mark.parametrize("dim", [40, 64, 512])
@pytest.mark.parametrize("layout", ["bhnd", "bhdn", "bnhd"])
def test_a_sample_does_not_know_its_batch(layout: str, dim: int, dtype: torch.dtype) -> None:
    shape = (3, 2, 130, 77, dim)
    q, k, v = inputs(shape, dtype, (layout, layout, layout))
    whole, lse = torch.ops.diffkern.attention(q, k, v, 0.2)
    for pick in ([0], [2], [1, 0], [2, 2, 2, 1]):
        part = [ALL_LAYOUTS[layout](t[pick]) for t in (q, k, v)]
        out, sums = torch.ops.diffkern.attention(*part, 0.2)
        assert same_bits(out, whole[pick])
        assert same_bits(sums, lse[pick])
    assert same_bits(torch.ops.diffkern.attention(q[:, 1:], k[:, 1:], v[:, 1:], 0.2)[0], whole[:, 1:])


@dtypes
def test_threads_and_repetition_change_no_bit(dtype: torch.dtype) -> None:
    for shape in ((1, 1, 700, 300, 40), (2, 3, 129, 70, 64), (5, 1, 64, 64, 512)):
        q, k, v = inputs(shape, dtype, ("bhdn", "bhnd", "bhdn"))
        results = []
        for n in (1, 2, 3, 7, 2):
            with threads(n):
                results.append(diffkern.attention(q, k, v))
        assert all(same_bits(r, results[0]) for r in results[1:])


# ------------------------------------------------------------------------------------------------------- odd memory
def test_nothing_to_do() -> None:
    for shape in ((0, 2, 5, 3, 8), (2, 0, 5, 3, 8), (2, 2, 0, 3, 8)):
        q, k, v = inputs(shape)
        out, lse = torch.ops.diffkern.attention(q, k, v, 1.0)
        assert out.shape == q.shape
        assert lse.shape == q.shape[:3]


@dtypes
def test_elements_past_2_to_the_31(dtype: torch.dtype) -> None:
    """Two samples 2^31 elements apart, of which the pages between are never touched."""
    shape, far = (2, 1, 9, 11, 16), 2**31 + 3
    try:
        memory = torch.empty(far + 4096, dtype=dtype)
    except RuntimeError as error:
        pytest.skip(f"no address space: {error}")
    near = inputs(shape, dtype, ("bhdn", "bhnd", "bhdn"))
    expected = diffkern.attention(*near)
    for which in range(3):
        tensors = list(near)
        strides = list(near[which].stride())
        strides[0] = far
        tensors[which] = memory.as_strided(near[which].shape, strides, 5).copy_(near[which])
        assert same_bits(diffkern.attention(*tensors), expected)


PEAK = """
import torch
from diffkern import ops
n, dim = 8192, 8
def status(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) * 1024
def run(n, dtype, backward):
    tensors = [torch.randn(1, 1, n, dim, dtype=dtype).requires_grad_(backward) for _ in "qkv"]
    open("/proc/self/clear_refs", "w").write("5")
    before = status("VmRSS:")
    out = ops.attention(*tensors)
    result = torch.autograd.grad(out.sum(), tensors) if backward else out
    return status("VmHWM:") - before
for dtype in (torch.float32, torch.bfloat16):
    for backward in (False, True):
        run(300, dtype, backward)
        print(run(n, dtype, backward))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.full
def test_no_matrix_of_logits_in_memory() -> None:
    """The process' own peak, the kernels' tiles included: a small part of the 256 MiB of 8192 x 8192 logits."""
    folder = Path(diffkern.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", PEAK], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peaks = [int(line) / 2**20 for line in done.stdout.split()]
    assert len(peaks) == 4
    assert max(peaks[::2]) < 4, f"forward: {peaks[::2]} MiB"
    assert max(peaks[1::2]) < 12, f"forward and backward: {peaks[1::2]} MiB"


# ------------------------------------------------------------------------------------------------------------ bad input
Q, K, V = inputs((2, 3, 5, 7, 16))


def _with(q: Tensor = Q, k: Tensor = K, v: Tensor = V, **more: float) -> Callable[[], object]:
    return lambda: diffkern.attention(q, k, v, **more)


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "dims": (_with(q=Q[0]), r"q must have 4 dimensions, \[batch, heads, tokens, channels\], got \[3, 5, 16\]"),
    "dims of v": (_with(v=V[None]), r"v must have 4 dimensions, .*, got \[1, 2, 3, 7, 16\]"),
    "head dim 12": (
        lambda: diffkern.attention(*(t[..., :12] for t in (Q, K, V))),
        r"the channels of q \(its last dimension\) must be a multiple of 8 up to 256, or 512, got 12$",
    ),
    "head dim 0": (
        lambda: diffkern.attention(*(t[..., :0] for t in (Q, K, V))),
        r"the channels of q .*, or 512, got 0$",
    ),
    "head dim 264": (lambda: diffkern.attention(*inputs((1, 1, 2, 2, 264))), r"the channels of q .*, got 264$"),
    "head dim 1024": (lambda: diffkern.attention(*inputs((1, 1, 2, 2, 1024))), r"the channels of q .*, got 1024$"),
    "channels differ": (
        _with(k=K[..., :8]),
        r"k must have batch, heads and channels of q: shape \[2, 3, 7, 16\], got \[2, 3, 7, 8\]",
    ),
    "heads differ": (_with(k=K[:, :2]), r"k must have .*: shape \[2, 3, 7, 16\], got \[2, 2, 7, 16\]"),
    "batch differs": (_with(k=K[:1]), r"k must have .*: shape \[2, 3, 7, 16\], got \[1, 3, 7, 16\]"),
    "tokens of v": (_with(v=V[:, :, :6]), r"v must have the shape of k \[2, 3, 7, 16\], got \[2, 3, 6, 16\]"),
    "no keys": (_with(k=K[:, :, :0], v=V[:, :, :0]), r"k must have at least one token, got shape \[2, 3, 0, 16\]"),
    "dtype of k": (_with(k=K.half()), r"k must have the dtype of q \(float32\), got float16"),
    "dtype of v": (_with(v=V.double()), r"v must have the dtype of q \(float32\), got float64"),
    "integers": (
        lambda: diffkern.attention(*(t.int() for t in (Q, K, V))),
        r"q must be float64, float32, float16 or bfloat16, got int32",
    ),
    "complex": (
        lambda: diffkern.attention(*(t.to(torch.complex64) for t in (Q, K, V))),
        r"q must be float64, float32, float16 or bfloat16, got complex64",
    ),
    "device": (_with(k=K.to("meta")), r"k must be on the device of q \(cpu\), got meta"),
    "sparse": (_with(q=Q.to_sparse()), r"q must be a dense \(strided\) tensor, got layout torch.sparse_coo"),
    "strides": (
        _with(k=torch.zeros(2, 3, 14, 32)[:, :, ::2, ::2]),
        r"k must have stride 1 in its tokens or its channels \(its last two dimensions\), "
        r"got strides \[1344, 448, 64, 2\] for shape \[2, 3, 7, 16\]",
    ),
    "scale NaN": (_with(scale=math.nan), r"scale must be finite, got nan"),
    "scale list": (_with(scale=[1]), r"scale must be one number or None, got \[1\]"),
    "scale huge": (_with(scale=10**400), r"scale must be one number or None, got 1000"),
    "scale infinite": (_with(scale=math.inf), r"scale must be finite, got inf"),
    "scale beyond float32": (_with(scale=-1e39), r"scale must be finite in float32, got -1e\+39"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str) -> None:
    call, sentence = BAD[case]
    check_sentence(call, r"^diffkern\.attention: " + sentence)


def test_one_token_needs_no_contiguous_axis() -> None:
    """Its stride is the step to nothing."""
    q, k, v = inputs((2, 3, 1, 1, 16))
    sparse = [torch.zeros(2, 3, 2, 32)[:, :, ::2, ::2].copy_(t) for t in (q, k, v)]
    assert same_bits(diffkern.attention(*sparse), diffkern.attention(q, k, v))
