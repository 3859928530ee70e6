"""The fused variational bound: against the reference in every dtype and layout, exact bins, its bits, bad input."""

from __future__ import annotations

import math

import mpmath as mp
import numpy as np
import pytest
import torch
from helpers.op_cases import LAYOUTS, SHAPES, arrange, check_sentence, native_draws, same_bits, threads, values
from helpers.tolerances import STATE_DTYPES, check, coarser
from torch import Tensor

from diffkern import ops, reference
from diffkern.ops import VARIATIONAL_COLUMNS

REDUCTIONS = ["none", "mean", "sum"]


def row(**columns: float) -> list[float]:
    defaults = {"v": 1.0, "q": -0.7, "clip": math.inf, "k2": 3.0, "bin": 1 / 255, "w_squares": 0.5, "w_bound": 0.1}
    return [{**defaults, "w_mean": 1.0, **columns}.get(name, 0.0) for name in VARIATIONAL_COLUMNS]


KL = [
    row(r0=0.3, r1=0.3),
    row(r0=0.4, r1=0.1, u=0.3, v=-0.9, clip=1.0),
    row(r1=0.2, clip=1.0, w_mean=0.0),
    row(r0=0.2, u=1.0, v=0.0, w_squares=0.0),
]
DECODERS = [row(r0=0.1, r1=0.3, inv_std=s, q=q) for s, q in ((9.0, -0.1), (90.0, -0.01), (2.0, 0.3), (900.0, -0.003))]
TABLE = torch.tensor([*KL, *DECODERS], dtype=torch.float64)
FIXED = TABLE * torch.tensor([float(name != "r1") for name in VARIATIONAL_COLUMNS]).double()


def images(shape: tuple[int, ...], seed: int, dtype: torch.dtype, layout: str = "contiguous") -> Tensor:
    """Integers 0..255 scaled to [-1, 1], a tenth of them in each open bin."""
    levels = torch.randint(-30, 286, shape, generator=torch.Generator().manual_seed(seed)).clamp(0, 255)
    return arrange((levels / 127.5 - 1).to(dtype), layout)


def compare(ours: Tensor, exact: Tensor, plain: Tensor, what: str, dtype: torch.dtype) -> None:
    """The rule of tolerances.py; in float64, where the reference is no better than the kernel, 12 digits."""
    if dtype == torch.float64:
        size = exact.abs().max().item()
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-12 * size, msg=lambda text: f"{what}: {text}")
    else:
        check(ours, exact, plain, what, dtype)


def prediction(shape: tuple[int, ...], seed: int, dtype: torch.dtype, layout: str, learned: bool) -> Tensor:
    return values((shape[0], 2 * shape[1], *shape[2:]) if learned else shape, seed, dtype, layout).requires_grad_()


@pytest.mark.parametrize("shape", [s for s in SHAPES if len(s) > 1 and 0 not in s], ids=str)
@pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)
def test_against_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Value, means and gradient for learned and fixed variance, every layout, a prediction of every dtype."""
    seeds, index = ops.seeds(4, shape[0]), torch.arange(shape[0]) * 3 % len(TABLE)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for k, layout in enumerate(LAYOUTS):
        learned, table = (True, TABLE) if k % 2 == 0 else (False, FIXED)
        pred_dtype = STATE_DTYPES[(STATE_DTYPES.index(dtype) + k) % 4]
        x0, pred = images(shape, 1, dtype, layout), prediction(shape, 3, pred_dtype, layout, learned)
        source = {"seeds": seeds, "stream": 9} if k < 3 else {"noise": values(shape, 2, dtype, LAYOUTS[k - 1])}
        wide_pred, plain_pred = (pred.detach().to(t).requires_grad_() for t in (torch.float64, wide))
        reduction = REDUCTIONS[k % 3]
        ours, means = ops.variational(pred, x0, table, index, **source, reduction=reduction)
        assert ours.dtype == means.dtype == wide
        with native_draws():
            exact, exact_means = reference.variational(wide_pred, x0, table, index, **source, reduction=reduction)
            plain, plain_means = reference.variational(
                plain_pred, x0, table, index, **source, reduction=reduction, compute=wide
            )
        compare(ours, exact, plain, f"{reduction}, {layout}", wide)
        compare(means, exact_means, plain_means, f"means, {layout}", wide)
        grads = [torch.autograd.grad(a.sum(), b)[0] for a, b in ((ours, pred), (exact, wide_pred), (plain, plain_pred))]
        assert grads[0].dtype == pred_dtype
        compare(*grads, f"gradient, {reduction}, {layout}", coarser(pred_dtype, wide))


# --------------------------------------------------------------------------------------------------------- the decoder
def exact_bits(x0: float, mean: float, std: float) -> float:
    """-log2 of the Gaussian's mass in the bin of x0, with 40 digits."""
    mp.mp.dps = 40
    half = mp.mpf(1) / 255

    def upper(x: object) -> object:
        return mp.erfc(x / mp.sqrt(2)) / 2

    low, high = (mp.mpf(x0) - half - mp.mpf(mean)) / mp.mpf(std), (mp.mpf(x0) + half - mp.mpf(mean)) / mp.mpf(std)
    if x0 < -1 + half:
        mass = upper(-high)
    elif x0 > 1 - half:
        mass = upper(low)
    elif low > 0:
        mass = upper(low) - upper(high)
    else:
        mass = upper(-high) - upper(-low)
    return float(-mp.log(mass, 2))


@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
def test_decoder_is_the_integral_over_the_bin(dtype: torch.dtype, allowed: float) -> None:
    """1e-6 of the exact integral in bits, relative where there are many bits: everywhere, also far out in the tails."""
    generator = np.random.default_rng(0)
    worst = 0.0
    for std in (1e-3, 0.004, 0.01, 0.05, 0.3, 1.0):
        alone = row(u=1.0, v=0.0, q=1.0, inv_std=1 / std, w_squares=0.0, w_bound=1.0)
        table = torch.tensor([alone], dtype=torch.float64)
        x0 = torch.tensor([0, 1, 40, 127, 200, 254, 255]).repeat_interleave(40) / 127.5 - 1
        error = torch.from_numpy(generator.standard_normal(len(x0)) * std * generator.choice([0.3, 1, 5], len(x0)))
        mean = (x0 + error).to(dtype)
        x0 = x0.to(dtype)
        means = ops.variational(mean[:, None], x0[:, None], table, noise=x0[:, None], reduction="none")[1]
        # What the kernel is given: the rounded numbers, and their difference, which is exact near each other.
        std_used = 1 / float(torch.tensor(1 / std, dtype=dtype))
        for x, m, got in zip(x0.double().tolist(), mean.double().tolist(), means[:, 1].tolist(), strict=True):
            exact = exact_bits(x, m, std_used)
            worst = max(worst, abs(got - exact) / max(1.0, abs(exact)))
    assert worst < allowed, worst


def test_decoder_far_out_stays_finite_and_exact() -> None:
    """Where guided-diffusion's formula stops at 1e-12 (39.9 bits), the bits go on growing with their square."""
    table = torch.tensor([row(u=1.0, v=0.0, q=1.0, inv_std=1000.0, w_squares=0.0, w_bound=1.0)], dtype=torch.float64)
    x0 = torch.zeros(3, 1)
    mean = torch.tensor([[0.1], [1.0], [30.0]]).requires_grad_()
    value, means = ops.variational(mean, x0, table, noise=x0, reduction="none")
    for m, got in zip(mean.flatten().tolist(), means[:, 1].tolist(), strict=True):
        assert got == pytest.approx(exact_bits(0.0, m, 1e-3), rel=1e-6)
    (grad,) = torch.autograd.grad(value.sum(), mean)
    torch.testing.assert_close(
        grad.flatten(), (mean.detach().flatten() - 1 / 255) * 1e6 / math.log(2), rtol=2e-3, atol=0
    )


# ----------------------------------------------------------------------------------------------------------- the bits
def run(pred: Tensor, x0: Tensor, index: Tensor, seeds: Tensor, reduction: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.diffkern.variational(pred, x0, TABLE, index, seeds, 4, None, reduction, True)


def test_bits_do_not_depend_on_threads_or_batch() -> None:
    shape = (4, 3, 131, 67)
    x0, pred = images(shape, 1, torch.float32), prediction(shape, 2, torch.float32, "contiguous", True).detach()
    seeds, index = ops.seeds(2, 4), torch.tensor([0, 1, 2, 5])
    with threads(1):
        expected = [run(pred, x0, index, seeds, reduction) for reduction in range(3)]
    for n in (2, 3):
        with threads(n):
            for reduction in range(3):
                got = run(pred, x0, index, seeds, reduction)
                assert all(same_bits(a, b) for a, b in zip(got, expected[reduction], strict=True)), (n, reduction)
    for b in range(4):
        one = run(*(t[b : b + 1] for t in (pred, x0, index, seeds)))
        assert all(same_bits(a[0], e[b]) for a, e in zip(one, expected[0], strict=True))
    for layout in ("permuted", "sliced"):
        got = run(arrange(pred, layout), arrange(x0, layout), index, seeds)
        assert all(same_bits(a, b) for a, b in zip(got, expected[0], strict=True))


@pytest.mark.parametrize("learned", [True, False])
def test_gradcheck(learned: bool) -> None:
    shape, table = (8, 2, 3), TABLE if learned else FIXED
    pred = prediction(shape, 1, torch.float64, "contiguous", learned)
    x0, index = images(shape, 2, torch.float64), torch.arange(8)

    def value(pred: Tensor) -> Tensor:
        return ops.variational(pred, x0, moving, index, seeds=ops.seeds(0, 8), reduction="none")[0]

    moving = table.clone()
    moving[:, VARIATIONAL_COLUMNS.index("w_mean")] = 1.0
    assert torch.autograd.gradcheck(value, (pred,))


@pytest.mark.full
def test_compile_and_export() -> None:
    shape = (3, 2, 5, 4)
    x0, pred = images(shape, 1, torch.float32), prediction(shape, 2, torch.float32, "contiguous", True)
    seeds, index = ops.seeds(0, 3), torch.tensor([0, 4, 2])

    def loss(pred: Tensor, index: Tensor) -> Tensor:
        return ops.variational(pred * 2, x0, TABLE, index, seeds=seeds)[0]

    compiled = torch.compile(loss, fullgraph=True)
    (expected,), (got,) = (torch.autograd.grad(f(pred, index), pred) for f in (loss, compiled))
    assert same_bits(got, expected)

    class Module(torch.nn.Module):
        def forward(self, pred: Tensor, index: Tensor) -> Tensor:
            return loss(pred, index)

    exported = torch.export.export(Module(), (pred.detach(), index))
    assert same_bits(exported.module()(pred.detach(), index), loss(pred.detach(), index))


def test_upstream_gradients() -> None:
    shape = (3, 2, 7)
    x0, pred, seeds = (
        images(shape, 1, torch.float32),
        prediction(shape, 2, torch.float32, "contiguous", True),
        ops.seeds(0, 3),
    )
    each = ops.variational(pred, x0, TABLE[:3], seeds=seeds, reduction="none")[0]
    weights = torch.tensor([0.5, 0.0, -3.0])
    scaled = torch.autograd.grad(each, pred, weights, retain_graph=True)[0]
    one = torch.autograd.grad(each.sum(), pred)[0]
    torch.testing.assert_close(scaled, one * weights[:, None, None])
    with pytest.raises(RuntimeError, match=r"differentiable once only, use diffkern\.reference\.variational"):
        torch.autograd.grad(ops.variational(pred, x0, TABLE[:3], seeds=seeds)[0], pred, create_graph=True)


def test_bad_input() -> None:
    x0, pred, seeds = torch.zeros(2, 3, 4), torch.zeros(2, 6, 4), ops.seeds(0, 2)

    def call(pred: Tensor = pred, x0: Tensor = x0, table: Tensor = TABLE[:1], **kwargs: object) -> object:
        return ops.variational(pred, x0, table, **{"seeds": seeds, **kwargs})  # type: ignore[arg-type]

    shape = r"pred must have the shape of x0 \[2, 3, 4\] \(fixed variance\) or twice its channels \(learned\), got "
    check_sentence(lambda: call(torch.zeros(2, 5, 4)), shape + r"\[2, 5, 4\]")
    check_sentence(lambda: call(torch.zeros(2, 6, 5)), shape + r"\[2, 6, 5\]")
    check_sentence(lambda: call(torch.zeros(4, 3, 4)), shape + r"\[4, 3, 4\]")
    learns = r"pred must have twice the channels of x0: the row learns its variance with r1 = 0\.3"
    check_sentence(lambda: call(torch.zeros(2, 3, 4)), learns)
    check_sentence(
        lambda: call(table=TABLE[:1, :11].contiguous()), r"table must have shape \[rows, 12\], got \[1, 11\]"
    )
    for column, bad, sentence in (
        ("clip", 0.0, r"clip must be positive \(inf: no clipping\), got 0 in row 0"),
        ("inv_std", -2.0, r"inv_std must not be negative \(0: no decoder\), got -2 in row 0"),
        ("bin", 0.0, r"bin must be positive where the decoder is at work, got 0 in row 0"),
        ("q", math.nan, r"table must not hold NaN, got NaN in row 0, column 2"),
    ):
        table = TABLE[4:5].clone()
        table[0, VARIATIONAL_COLUMNS.index(column)] = bad
        check_sentence(lambda table=table: call(table=table), sentence)
    check_sentence(lambda: call(noise=x0), r"give either seeds \(noise by address\) or noise \(a tensor\), got both")
    check_sentence(lambda: call(reduction="max"), r"reduction must be one of none, mean, sum, got 'max'")
    check_sentence(lambda: call(reduction=[1]), r"reduction must be one of none, mean, sum, got \[1\]")
    check_sentence(lambda: call(index=torch.tensor([0, 1])), r"index must be in \[0, 1\), the rows of the table, got 1")
    check_sentence(
        lambda: call(x0=x0.clone().requires_grad_()), r"differentiable in pred only, and x0, noise or table requires"
    )
    check_sentence(lambda: call(x0=x0.int()), r"x0 must be float64, float32, float16 or bfloat16, got int32")
    check_sentence(lambda: call(pred.to("meta")), r"pred must be on the device of x0 \(cpu\)")
