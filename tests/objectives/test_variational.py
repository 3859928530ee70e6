"""The variational bound as a training and evaluation objective: closed forms, identities, and what it refuses."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.op_cases import check_sentence, same_bits
from helpers.oracles import Gaussian
from torch import Tensor

import diffkern
from diffkern import ops, schedules, streams
from diffkern.objectives import losses, variational

LINEAR = schedules.linear(100, 1e-3, 0.2)
DATA = Gaussian(0.1, 0.3)


def images(n: int, *shape: int) -> Tensor:
    """Samples of DATA on the grid of uint8 images."""
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * DATA.std + DATA.mean
    return ((x.clamp(-1, 1) * 127.5 + 127.5).round() / 127.5 - 1).float()


def exact_term(schedule: schedules.DiscreteSchedule, t: int, variance: str) -> float:
    """E[L_t] in bits of the exact model on DATA: only the spread of x0 given x_t is left in the means."""
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    spread = DATA.std**2 * sigma**2 / (alpha**2 * DATA.std**2 + sigma**2)
    coef_x0, _, beta_tilde = (float(c) for c in schedule.posterior(t))
    model = beta_tilde if variance == "beta_tilde" else float(schedule.beta(t))
    ratio = beta_tilde / model
    return 0.5 * (ratio - 1 - math.log(ratio) + coef_x0**2 * spread / model) / math.log(2)


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "score", "velocity", "mu"])
@pytest.mark.parametrize("variance", ["beta", "beta_tilde"])
def test_terms_of_the_exact_model(prediction: str, variance: str) -> None:
    """Monte Carlo over 200,000 numbers against the closed form, for every prediction the same."""
    x0 = torch.randn(20, 10_000, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * DATA.std + DATA.mean
    table = variational.variational_table(LINEAR, prediction, variance)
    for t in (1, 7, 50, 99):
        index = torch.full((20,), t)
        rows, seeds = LINEAR.table(prediction), ops.seeds(t, 20)
        x_t = ops.noising(x0, rows, index, seeds=seeds)[0]
        pred = DATA.predict(LINEAR, prediction, x_t, t)
        bits = ops.variational(pred, x0, table, index, seeds=seeds, reduction="none")[1][:, 1].mean().item()
        # The variance of a squared normal: a relative error of sqrt(2 / 200,000) a standard deviation.
        assert bits == pytest.approx(exact_term(LINEAR, t, variance), rel=4 * math.sqrt(2 / 200_000))


def test_the_whole_bound() -> None:
    """bits_per_dim of the exact model: prior, terms and decoder against closed form and numerical integration."""
    x0 = images(6, 3, 32, 32)

    def model(x_t: Tensor, t: Tensor) -> Tensor:
        return DATA.predict(LINEAR, "eps", x_t.double(), int(t[0])).float()

    seeds = ops.seeds(3, 6)
    got = variational.bits_per_dim(model, x0, LINEAR, seeds=seeds, clip=math.inf)
    assert got.terms.shape == got.mse.shape == (6, 100)
    torch.testing.assert_close(got.total, got.prior + got.terms.sum(1))
    expected = sum(exact_term(LINEAR, t, "beta_tilde") for t in range(1, 100))
    assert got.terms[:, 1:].sum(1).mean().item() == pytest.approx(expected, rel=0.01)
    # L_T: alpha^2 E[x0^2] and sigma^2 against a standard normal
    alpha, sigma = float(LINEAR.alpha(99)), float(LINEAR.sigma(99))
    prior = 0.5 * (sigma**2 - 1 - math.log(sigma**2) + alpha**2 * x0.double().square().mean()) / math.log(2)
    assert got.prior.mean().item() == pytest.approx(float(prior), rel=1e-9)
    # The bound is above the entropy of the data: ln(std sqrt(2 pi e)) nats in units of a bin.
    entropy = math.log2(DATA.std * 127.5 * math.sqrt(2 * math.pi * math.e))
    assert entropy < got.total.mean().item() < entropy + 2  # 100 steps of a fixed variance are not tight
    alone = variational.bits_per_dim(model, x0[2:3], LINEAR, seeds=seeds[2:3], clip=math.inf)
    for a, b in zip(alone, got, strict=True):
        assert same_bits(a[0], b[2])


def test_decoder_term_is_l0() -> None:
    """The entry t = 0 of the table is the decoder around the predicted x0 with variance beta_tilde_1 (or learned)."""
    x0 = images(4, 3, 8, 8)
    seeds, index = ops.seeds(0, 4), torch.zeros(4, dtype=torch.int64)
    x_t = losses.noised(x0, index, LINEAR, seeds=seeds)
    pred = DATA.predict(LINEAR, "eps", x_t.double(), 0).float()
    mean = diffkern.convert(pred, x_t, index, LINEAR, "eps", "x0")
    std = math.sqrt(float(LINEAR.posterior(1)[2]))
    table = variational.variational_table(LINEAR)
    w = torch.full_like(pred, -1.0)  # v = 0: beta_tilde
    both = torch.cat([pred, w], 1)
    means = ops.variational(both, x0, table, index, seeds=seeds, stream=streams.TRAINING, reduction="none")[1]
    bits = means[:, 1]
    torch.testing.assert_close(bits, variational.decoder_bits(x0, mean, std), rtol=2e-5, atol=1e-6)
    below = torch.special.ndtr((x0.double() + 1 / 255 - mean.double()) / std)
    above = torch.special.ndtr((x0.double() - 1 / 255 - mean.double()) / std)
    mass = torch.where(x0 < -0.999, below, torch.where(x0 > 0.999, 1 - above, below - above))
    naive = -mass.log2().flatten(1).mean(1).float()  # the definition, good enough where bins are not far out
    torch.testing.assert_close(bits, naive, rtol=1e-4, atol=1e-5)


def test_learned_variance() -> None:
    w = torch.tensor([[-1.0], [1.0], [0.0]]).expand(3, 5)
    t = torch.tensor([1, 50, 99])
    got = variational.learned_log_variance(w, t, LINEAR).double()
    beta, tilde = LINEAR.betas[t].log(), LINEAR.posterior(t)[2].log()
    for b, expected in enumerate((tilde[0], beta[1], (beta[2] + tilde[2]) / 2)):
        torch.testing.assert_close(got[b], expected.expand(5), rtol=1e-6, atol=1e-6)
    # The table says the same: w = 1 is the fixed variance beta, w = -1 beta_tilde, w = 0 the number 0.5.
    x0, seeds, index = images(3, 2, 7), ops.seeds(0, 3), torch.tensor([1, 50, 99])
    pred = torch.randn(3, 2, 7, generator=torch.Generator().manual_seed(0))
    learned = variational.variational_table(LINEAR)
    for value, fixed in ((1.0, "beta"), (-1.0, "beta_tilde"), (0.0, 0.5)):
        both = torch.cat([pred, torch.full_like(pred, value)], 1)
        a = ops.variational(both, x0, learned, index, seeds=seeds, reduction="none")[1]
        table = variational.variational_table(LINEAR, "eps", fixed)
        b = ops.variational(pred, x0, table, index, seeds=seeds, reduction="none")[1]
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_hybrid_loss_is_its_definition() -> None:
    """L_simple + 0.001 T L_t; the bound's gradient reaches the variance and nothing of it the mean."""
    x0, seeds, t = images(4, 3, 6, 6), ops.seeds(5, 4), torch.tensor([0, 3, 60, 99])
    pred = torch.randn(4, 6, 6, 6, generator=torch.Generator().manual_seed(2)).requires_grad_()
    hybrid = variational.hybrid_loss(pred, x0, t, LINEAR, seeds=seeds)
    simple = losses.prediction_loss(pred[:, :3], x0, t, LINEAR, seeds=seeds)
    bound = variational.vlb_loss(pred, x0, t, LINEAR, seeds=seeds)
    torch.testing.assert_close(hybrid, simple + 1e-3 * bound, rtol=1e-5, atol=1e-6)
    (g_hybrid,), (g_simple,), (g_bound,) = (torch.autograd.grad(v, pred) for v in (hybrid, simple, bound))
    assert same_bits(g_hybrid[:, :3].contiguous(), g_simple[:, :3].contiguous())
    torch.testing.assert_close(g_hybrid[:, 3:], 1e-3 * g_bound[:, 3:], rtol=1e-5, atol=1e-9)
    assert (g_bound[:, :3] != 0).any()  # the bound alone does train the mean


def test_the_bound_is_least_at_the_exact_model() -> None:
    """Training the variance by the bound finds E[(mean error)^2]: its gradient is 0 there."""
    x0 = torch.randn(8, 1, 50_000, generator=torch.Generator().manual_seed(1)) * DATA.std + DATA.mean
    t, seeds = torch.full((8,), 20), ops.seeds(1, 8)
    x_t = losses.noised(x0, t, LINEAR, seeds=seeds)
    m = DATA.predict(LINEAR, "eps", x_t.double(), 20).float()
    alpha, sigma = float(LINEAR.alpha(20)), float(LINEAR.sigma(20))
    spread = DATA.std**2 * sigma**2 / (alpha**2 * DATA.std**2 + sigma**2)
    coef_x0, _, beta_tilde = (float(c) for c in LINEAR.posterior(20))
    best = math.log(beta_tilde + coef_x0**2 * spread)
    low, high = math.log(beta_tilde), math.log(float(LINEAR.betas[20]))
    best_w = 2 * (best - low) / (high - low) - 1

    def slope(w: float) -> float:
        both = torch.cat([m, torch.full_like(m, w)], 1).requires_grad_()
        loss = variational.vlb_loss(both, x0, t, LINEAR, seeds=seeds)
        return float(torch.autograd.grad(loss, both)[0][:, 1:].sum())

    assert slope(best_w - 0.1) < 0 < slope(best_w + 0.1)
    assert abs(slope(best_w)) < 0.1 * abs(slope(best_w + 0.1))


def test_bad_input() -> None:
    x0, t, seeds = torch.zeros(2, 3, 4), torch.tensor([1, 2]), ops.seeds(0, 2)
    learned = r"pred must have shape \[2, 6, 4\] for a learned variance \(mean and variance as halves of the channels\)"
    check_sentence(lambda: variational.hybrid_loss(x0, x0, t, LINEAR, seeds=seeds), learned + r", got \[2, 3, 4\]")
    fixed = r"pred must have shape \[2, 3, 4\] for a fixed variance, got \[2, 6, 4\]"
    both = torch.zeros(2, 6, 4)
    check_sentence(lambda: variational.vlb_loss(both, x0, t, LINEAR, variance="beta", seeds=seeds), fixed)
    names = r"variance must be 'beta', 'beta_tilde', 'learned' or a number in \[0, 1\], got "
    check_sentence(lambda: variational.variational_table(LINEAR, variance="gamma"), names + "'gamma'")
    check_sentence(lambda: variational.variational_table(LINEAR, variance=1.5), names + "1.5")
    check_sentence(lambda: variational.variational_table(LINEAR, clip=0.0), "clip must be positive")
    check_sentence(lambda: variational.variational_table(LINEAR, half_bin=-1.0), "half_bin must be positive, got -1.0")
    check_sentence(lambda: variational.decoder_bits(x0, x0, 0.0), "std must be positive, got 0.0")
    flow = schedules.flow()
    check_sentence(
        lambda: variational.vlb_loss(both, x0, t, flow, seeds=seeds),  # type: ignore[arg-type]
        "schedule must be discrete for a variational bound, got FlowSchedule",
    )
    check_sentence(
        lambda: variational.vlb_loss(both, x0, t.double(), LINEAR, seeds=seeds),
        r"t must be integers of shape \[\] or \[2\] \(one time a sample\), got torch.float64 \[2\]",
    )


def test_progress_is_a_bar_a_label_or_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    x0, seeds = torch.zeros(1, 2), ops.seeds(0, 1)
    schedule = schedules.linear(3)
    plain = variational.bits_per_dim(lambda x, t: x, x0, schedule, seeds=seeds)
    assert capsys.readouterr().err == ""
    for progress, label in ((True, "bits_per_dim"), ("the bound", "the bound")):
        found = variational.bits_per_dim(lambda x, t: x, x0, schedule, seeds=seeds, progress=progress)
        assert torch.equal(found.total, plain.total)
        shown = capsys.readouterr().err
        assert label in shown
        assert "3/3" in shown
    with pytest.raises(ValueError, match="progress must be True, False or the label of a bar, got builtin"):
        variational.bits_per_dim(lambda x, t: x, x0, schedule, seeds=seeds, progress=iter)  # type: ignore[arg-type]
