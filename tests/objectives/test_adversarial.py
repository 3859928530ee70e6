"""Adversarial losses against NumPy, finite differences and the closed forms of two known densities."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffkern import ops, streams
from diffkern.draws import uniform_by_address
from diffkern.names import AdversarialName
from diffkern.objectives.adversarial import (
    ADVERSARIAL,
    CollapseWatch,
    adaptive_weight,
    discriminator_loss,
    generator_loss,
    gradient_penalty,
    jensen_shannon,
    optimal_discriminator,
    optimal_logits,
    r1_penalty,
    r2_penalty,
    ratio_of_norms,
    saturation,
    started,
)

# Two Gaussians on a fine grid with its quadrature weights: integrals to about 1e-12.
GRID = torch.linspace(-30.0, 30.0, 60_001, dtype=torch.float64)
WIDTH = GRID[1] - GRID[0]


def gaussian(mean: float, std: float) -> Tensor:
    return torch.exp(-0.5 * ((GRID - mean) / std) ** 2) / (std * math.sqrt(2.0 * math.pi))


P, Q = gaussian(-0.7, 1.1), gaussian(0.9, 1.7)
BINARY: list[AdversarialName] = ["minimax", "non_saturating"]


def random(shape: tuple[int, ...], seed: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------------- formulas and shapes


def sigmoid(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return 1.0 / (1.0 + np.exp(-x))


# (discriminator's of real and fake, generator's of fake and real), as the papers print them.
FORMULAS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "minimax": (
        lambda r, f: -np.log(sigmoid(r)) - np.log(1.0 - sigmoid(f)),
        lambda f, r: np.log(1.0 - sigmoid(f)),
    ),
    "non_saturating": (
        lambda r, f: -np.log(sigmoid(r)) - np.log(1.0 - sigmoid(f)),
        lambda f, r: -np.log(sigmoid(f)),
    ),
    "hinge": (
        lambda r, f: -np.minimum(0.0, r - 1.0) - np.minimum(0.0, -f - 1.0),
        lambda f, r: -f,
    ),
    "least_squares": (
        lambda r, f: 0.5 * (r - 1.0) ** 2 + 0.5 * f**2,
        lambda f, r: 0.5 * (f - 1.0) ** 2,
    ),
    "wasserstein": (lambda r, f: f - r, lambda f, r: -f),
    "relativistic": (
        lambda r, f: -np.log(sigmoid(r - f)),
        lambda f, r: -np.log(sigmoid(f - r)),
    ),
}


def test_every_name_has_its_formula() -> None:
    assert set(FORMULAS) == set(ADVERSARIAL) == set(get_args(AdversarialName))


@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("shape", [(5,), (3, 1), (4, 1, 3, 5)], ids=str)
def test_losses_are_those_of_numpy(kind: AdversarialName, shape: tuple[int, ...]) -> None:
    real, fake = random(shape, 1), random(shape, 2)
    for_discriminator, for_generator = FORMULAS[kind]
    per_sample = for_discriminator(real.numpy(), fake.numpy()).reshape(shape[0], -1).mean(1)
    np.testing.assert_allclose(discriminator_loss(real, fake, kind, "none").numpy(), per_sample, rtol=1e-12)
    assert float(discriminator_loss(real, fake, kind)) == pytest.approx(per_sample.mean(), rel=1e-12)
    assert float(discriminator_loss(real, fake, kind, "sum")) == pytest.approx(per_sample.sum(), rel=1e-12)
    per_sample = for_generator(fake.numpy(), real.numpy()).reshape(shape[0], -1).mean(1)
    np.testing.assert_allclose(generator_loss(fake, kind, real, "none").numpy(), per_sample, rtol=1e-12)
    assert float(generator_loss(fake, kind, real)) == pytest.approx(per_sample.mean(), rel=1e-12)


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_gradients_are_those_of_finite_differences(kind: AdversarialName) -> None:
    real, fake = random((3, 2), 3).requires_grad_(), random((3, 2), 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda r, f: discriminator_loss(r, f, kind, "none"), (real, fake))
    assert torch.autograd.gradcheck(lambda f, r: generator_loss(f, kind, r, "none"), (fake, real.detach()))


@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_a_sure_discriminator_gives_numbers(kind: AdversarialName) -> None:
    """From logits: log sigmoid(200) is 0 and log(1 - sigmoid(200)) is -200, in float16 too."""
    far = torch.tensor([200.0, -200.0], dtype=torch.float16).requires_grad_()
    for loss in (discriminator_loss(far, -far, kind), generator_loss(far, kind, -far)):
        assert loss.dtype == torch.float32
        (gradient,) = torch.autograd.grad(loss, far)
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient).all()


def test_the_binary_kinds_differ_in_the_generator_alone() -> None:
    real, fake = random((7,), 5), random((7,), 6)
    assert torch.equal(discriminator_loss(real, fake, "minimax"), discriminator_loss(real, fake, "non_saturating"))
    assert not torch.equal(generator_loss(fake, "minimax"), generator_loss(fake, "non_saturating"))


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda x: discriminator_loss(x, x, "hing"),
            r"kind must be one of minimax, .*, got 'hing': did you mean 'hinge'",
        ),
        (lambda x: generator_loss(x, "wgan"), "kind must be one of minimax, .*, got 'wgan'"),
        (lambda x: discriminator_loss(x, x[:2]), r"fake must have the shape of real, \[3, 2\], got \[2, 2\]"),
        (lambda x: generator_loss(x, "relativistic"), "real must be given where kind is 'relativistic', got None"),
        (lambda x: generator_loss(x, "relativistic", x[:1]), r"fake must have the shape of real, \[1, 2\]"),
        (lambda x: discriminator_loss(x.long(), x), r"real must be floating-point logits \[B, ...\], got torch.int64"),
        (lambda x: generator_loss(x.sum()), r"fake must be floating-point logits \[B, ...\], got .* \[\]"),
        (lambda x: generator_loss([x]), r"fake must be a tensor \[B, ...\], got list"),
        (lambda x: generator_loss(x, reduction="avg"), "reduction must be one of none, mean, sum, got 'avg'"),
        (lambda x: r1_penalty(lambda x: x, x[:, 0]), r"real must be floating-point samples \[B, ...\]"),
        (lambda x: r2_penalty(lambda x: x.sum(), x), r"discriminator must return logits \[3, ...\], got shape \[\]"),
        (
            lambda x: r1_penalty(lambda x: x.detach(), x),
            "discriminator must be differentiable in x, got logits without",
        ),
        (
            lambda x: gradient_penalty(lambda x: x, x, x[:2]),
            r"fake must have the shape of real, \[3, 2\], got \[2, 2\]",
        ),
        (lambda x: optimal_discriminator(-x.abs(), x), "p must be a density, not negative, got -"),
        (lambda x: jensen_shannon(x.abs(), x[:1].abs(), x), r"q must have the shape of p, \[3, 2\], got \[1, 2\]"),
        (lambda x: optimal_logits(x.abs(), x.abs(), "wasserstein"), "kind must be one with an optimum without further"),
        (lambda x: optimal_logits(x.abs(), x.abs(), "ls"), "kind must be one of minimax, .*, got 'ls'"),
        (lambda x: started(-1, 3), "step must be an integer of at least 0, got -1"),
        (lambda x: ratio_of_norms(x, x, 0.0), "most must be positive, got 0.0"),
        (lambda x: adaptive_weight(x, x.sum(), x), r"reconstruction must be one number, .* got shape \[3, 2\]"),
        (
            lambda x: adaptive_weight(x.sum(), x.sum(), x),
            "reconstruction must depend on last_layer, got a loss without",
        ),
        (lambda x: CollapseWatch(0), "steps must be an integer of at least 1, got 0"),
        (lambda x: CollapseWatch(1, math.nan), "least must be positive and finite, got nan"),
        (lambda x: CollapseWatch(1, kind="wgan"), "kind must be one of minimax, .*, got 'wgan'"),  # type: ignore[arg-type]
        (
            lambda x: CollapseWatch(1).load_state({"sure": 1}),
            "state must have the entries sure, flat, broken, got sure",
        ),
    ],
)
def test_bad_input_is_said_in_one_sentence(call: Callable[[Tensor], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        call(random((3, 2), 7))


# ----------------------------------------------------------------------------------------------------- closed forms


def expected(kind: AdversarialName, logits: Tensor, p: Tensor = P, q: Tensor = Q) -> Tensor:
    """E of the discriminator's loss, by quadrature; x and G are drawn apart, so each term is weighted alone."""
    zero = torch.zeros_like(logits)
    both = discriminator_loss(zero, zero, kind, "none")  # what the other term is at 0, halves of which are known
    of_real = discriminator_loss(logits, zero, kind, "none") - 0.5 * both
    of_fake = discriminator_loss(zero, logits, kind, "none") - 0.5 * both
    if kind == "least_squares":  # whose halves at 0 are 1/2 and 0
        of_real, of_fake = of_real + 0.25, of_fake - 0.25
    return WIDTH * (p * of_real + q * of_fake).sum()


def test_the_value_at_the_optimal_discriminator_is_that_of_jensen_and_shannon() -> None:
    """E_p log D* + E_q log(1 - D*) = -2 log 2 + 2 JSD, each side by its own formula, and JSD from its two KLs."""
    D = optimal_discriminator(P, Q)
    value = float(WIDTH * (P * D.log() + Q * (1.0 - D).log()).nan_to_num().sum())
    m = 0.5 * (P + Q)
    kl = [float(WIDTH * (f * (f / m).log()).nan_to_num().sum()) for f in (P, Q)]
    assert value == pytest.approx(-2.0 * math.log(2.0) + sum(kl), abs=1e-9)
    assert float(jensen_shannon(P, Q, WIDTH)) == pytest.approx(0.5 * sum(kl), abs=1e-12)
    for kind in BINARY:
        assert float(expected(kind, optimal_logits(P, Q, kind))) == pytest.approx(-value, abs=1e-9)
    torch.testing.assert_close(torch.sigmoid(optimal_logits(P, Q)), D, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("minimax", 2.0 * math.log(2.0) - 2.0 * float(jensen_shannon(P, Q, WIDTH))),
        ("hinge", float(2.0 * WIDTH * torch.minimum(P, Q).sum())),
        ("least_squares", float(0.5 * WIDTH * (P * Q / (P + Q)).nan_to_num().sum())),
    ],
)
def test_the_optimum_has_its_value_and_no_other_logits_have_less(kind: AdversarialName, value: float) -> None:
    best = optimal_logits(P, Q, kind)
    assert float(expected(kind, best)) == pytest.approx(value, abs=1e-9)
    for size in (0.3, -0.3, 0.01, -0.01):
        for change in (torch.sin(GRID), torch.cos(3.0 * GRID), torch.ones_like(GRID)):
            assert float(expected(kind, best + size * change)) >= value - 1e-12
    at_rest = {"minimax": 2.0 * math.log(2.0), "hinge": 2.0, "least_squares": 0.25}[kind]
    assert float(expected(kind, optimal_logits(P, P, kind), P, P)) == pytest.approx(at_rest, abs=1e-9)


def test_the_relativistic_optimum_is_the_same_ratio() -> None:
    """E over pairs (x, G) of softplus(C(G) - C(x)) on a coarse grid: log(p/q) has zero slope, and any constant."""
    p, q = P[25_000:35_000:200], Q[25_000:35_000:200]
    p, q = p / p.sum(), q / q.sum()
    pairs = p[:, None] * q[None, :]

    def mean(C: Tensor) -> Tensor:
        n = len(C)
        real, fake = C[:, None].expand(n, n).flatten(), C[None, :].expand(n, n).flatten()
        return (pairs.flatten() * discriminator_loss(real, fake, "relativistic", "none")).sum()

    best = optimal_logits(p, q, "relativistic").requires_grad_()
    (slope,) = torch.autograd.grad(mean(best), best)
    assert slope.abs().max() < 1e-12
    with torch.no_grad():
        least = float(mean(best))
        assert float(mean(best + 3.0)) == pytest.approx(least, rel=1e-12)
        assert float(mean(best + 0.1 * torch.sin(torch.arange(len(p))))) > least
        assert least < math.log(2.0)
        assert float(mean(torch.zeros_like(p))) == pytest.approx(math.log(2.0), rel=1e-12)


def test_wasserstein_over_lipschitz_functions_is_the_distance() -> None:
    """Of N(m, s) and N(m', s) it is |m - m'|, reached by a line of slope 1."""
    p, q = gaussian(-0.4, 1.3), gaussian(0.8, 1.3)
    assert float(expected("wasserstein", -GRID, p, q)) == pytest.approx(-1.2, abs=1e-9)
    for C in (torch.sin(GRID), -0.9 * GRID, -GRID.abs()):
        assert float(expected("wasserstein", C, p, q)) > -1.2


def test_where_neither_density_is() -> None:
    p, q = torch.tensor([0.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 0.0])
    assert optimal_discriminator(p, q).tolist() == [0.5, 0.0, 1.0]
    assert optimal_logits(p, q).tolist() == [0.0, -math.inf, math.inf]
    assert optimal_logits(p, q, "hinge").tolist() == [0.0, -1.0, 1.0]
    assert float(jensen_shannon(p / 2.0, q, torch.tensor(1.0))) == pytest.approx(math.log(2.0))


def test_minimax_saturates_where_the_other_pulls_hardest() -> None:
    """The curves are the losses' own gradients; at D = 1e-4 they differ ten thousandfold, at 1/2 not at all."""
    logits = torch.linspace(-12.0, 12.0, 97, dtype=torch.float64).requires_grad_()
    curves = saturation(logits.detach())
    for kind, curve in (("minimax", curves.minimax), ("non_saturating", curves.non_saturating)):
        (slope,) = torch.autograd.grad(generator_loss(logits, kind, reduction="sum"), logits)  # type: ignore[arg-type]
        torch.testing.assert_close(curve, slope, rtol=1e-12, atol=1e-15)
    assert torch.equal(curves.D, torch.sigmoid(logits.detach()))
    early = saturation(torch.logit(torch.tensor([1e-4, 0.5], dtype=torch.float64)))
    torch.testing.assert_close(early.non_saturating / early.minimax, torch.tensor([9999.0, 1.0]).double())


# ---------------------------------------------------------------------------------------------------------- penalties


def network(outputs: int = 1, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, outputs)).double()


def slopes(net: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """d mean logit / dx by central differences, one sample at a time."""
    found = torch.zeros_like(x).flatten(1)
    for j in range(found.shape[1]):
        along = torch.zeros_like(found)
        along[:, j] = step
        ahead, behind = (net(x + s * along.view_as(x)).detach().flatten(1).mean(1) for s in (1.0, -1.0))
        found[:, j] = (ahead - behind) / (2.0 * step)
    return found


@pytest.mark.parametrize("outputs", [1, 4])
def test_penalties_are_those_of_finite_differences(outputs: int) -> None:
    net, real, fake = network(outputs), random((5, 3, 4), 1, 1.0), random((5, 3, 4), 2, 1.0)
    seeds = ops.seeds(3, 5)
    u = uniform_by_address(seeds, streams.ADVERSARIAL + 2).reshape(5, 1, 1)
    norm = slopes(net, u * real + (1.0 - u) * fake).norm(dim=1)
    for target in (1.0, 0.0):
        found = gradient_penalty(net, real, fake, seeds=seeds, target=target, reduction="none")
        torch.testing.assert_close(found.detach(), (norm - target).square(), rtol=1e-6, atol=1e-9)
    r1 = r1_penalty(net, real, reduction="none")
    torch.testing.assert_close(r1.detach(), 0.5 * slopes(net, real).square().sum(1), rtol=1e-6, atol=1e-9)
    r2 = r2_penalty(net, fake, reduction="sum")
    torch.testing.assert_close(float(r2.detach()), float(0.5 * slopes(net, fake).square().sum()), rtol=1e-6, atol=1e-9)


def test_penalties_have_gradients_in_the_discriminator_and_in_nothing_else() -> None:
    net, real, fake = network(), random((3, 3, 4), 1, 1.0), random((3, 3, 4), 2, 1.0).requires_grad_()
    weight = net[1].weight  # type: ignore[index]
    penalties: list[Callable[[], Tensor]] = [
        lambda: gradient_penalty(net, real, fake, seeds=0),
        lambda: r1_penalty(net, real),
        lambda: r2_penalty(net, fake),
    ]
    for penalty in penalties:
        gradient, of_fake = torch.autograd.grad(penalty(), [weight, fake], allow_unused=True)
        assert of_fake is None
        step = 1e-6
        with torch.no_grad():
            weight[2, 3] += step
        ahead = float(penalty())
        with torch.no_grad():
            weight[2, 3] -= 2.0 * step
        behind = float(penalty())
        with torch.no_grad():
            weight[2, 3] += step
        assert float(gradient[2, 3]) == pytest.approx((ahead - behind) / (2.0 * step), rel=1e-5, abs=1e-9)


def test_the_points_are_those_of_each_sample_whatever_the_batch() -> None:
    net, real, fake = network(), random((6, 3, 4), 1, 1.0), random((6, 3, 4), 2, 1.0)
    seeds = ops.seeds(9, 6)
    whole = gradient_penalty(net, real, fake, seeds=seeds, reduction="none")
    part = gradient_penalty(net, real[2:5], fake[2:5], seeds=seeds[2:5], reduction="none")
    torch.testing.assert_close(part, whole[2:5], rtol=1e-12, atol=0)
    assert not torch.equal(whole, gradient_penalty(net, real, fake, seeds=8, reduction="none"))


def test_a_flat_discriminator_has_a_penalty_and_a_finite_gradient() -> None:
    """The norm has no slope at 0: torch takes 0 for it, not NaN."""
    net = network()
    with torch.no_grad():
        net[3].weight.zero_()  # type: ignore[index]
    penalty = gradient_penalty(net, random((3, 3, 4), 1), random((3, 3, 4), 2), seeds=0)
    assert float(penalty) == 1.0
    penalty.backward()
    assert torch.isfinite(net[3].weight.grad).all()  # type: ignore[index]


def test_without_a_graph_penalties_are_measured_alone() -> None:
    net, real = network(), random((3, 3, 4), 1, 1.0)
    with torch.no_grad():
        found = r1_penalty(net, real)
    assert not found.requires_grad
    assert float(found) == pytest.approx(float(r1_penalty(net, real)), rel=1e-12)


# ------------------------------------------------------------------------------------------------ the adaptive weight


def test_the_weight_is_the_ratio_of_the_gradients_at_the_last_layer() -> None:
    """The decoder's last layer W of W h: the gradients of |W h - y|^2 and of a sum of logits are known."""
    W, h, y = random((2, 3), 1).requires_grad_(), random((3, 5), 2), random((2, 5), 3)
    reconstruction, adversarial = (W @ h - y).square().sum(), -(0.37 * W @ h).sum()
    first = 2.0 * (W.detach() @ h - y) @ h.T
    second = -0.37 * torch.ones(2, 5, dtype=torch.float64) @ h.T
    found = adaptive_weight(reconstruction, adversarial, W)
    assert not found.requires_grad
    assert float(found) == pytest.approx(float(first.norm() / (second.norm() + 1e-4)), rel=1e-5)
    assert float(adaptive_weight(reconstruction, adversarial, W, most=0.5)) == 0.5
    assert float(adaptive_weight(reconstruction, 1e-12 * adversarial, W)) == 1e4
    doubled = adaptive_weight(reconstruction, adversarial, W, pooled=lambda g: 2.0 * g)
    assert float(doubled) == pytest.approx(float(2.0 * first.norm() / (2.0 * second.norm() + 1e-4)), rel=1e-5)
    (reconstruction + found * adversarial).backward()  # both graphs are still there
    assert W.grad is not None
    torch.testing.assert_close(W.grad, first + found * second, rtol=1e-5, atol=1e-8)


def test_the_term_begins_at_its_step() -> None:
    assert [started(step, 3, 0.5) for step in range(5)] == [0.0, 0.0, 0.0, 0.5, 0.5]


# --------------------------------------------------------------------------------------------------------- the watch


def said(watch: CollapseWatch, *steps: tuple[float, float | None]) -> list[str | None]:
    return [watch.see(*step) for step in steps]


def test_a_sure_discriminator_is_said_once_after_its_steps() -> None:
    watch = CollapseWatch(3)
    heard = said(watch, *[(0.0, 9.0)] * 2, (0.5, 9.0), *[(1e-4, 9.0)] * 5)
    assert [k for k, sentence in enumerate(heard) if sentence] == [5]
    assert heard[5] is not None
    assert heard[5].startswith("the discriminator's loss has been 0 (at most 0.001) for 3 steps, got 0.0001")
    assert said(watch, (0.5, 9.0), *[(0.0, 9.0)] * 3)[-1]  # a second time after it had recovered


def test_flat_logits_and_numbers_that_are_none() -> None:
    heard = said(CollapseWatch(2), (1.4, 0.0), (1.4, 0.0), (1.4, 0.0))
    assert heard[0] is heard[2] is None
    assert heard[1] is not None
    assert heard[1].startswith("the discriminator's logits have had no spread (at most 0.001) for 2 steps, got 0")
    heard = said(CollapseWatch(2), (math.nan, 1.0), (math.nan, 1.0), (1.0, 1.0), (1.0, math.inf))
    assert heard[1] is heard[2] is None
    assert heard[0] is not None
    assert heard[0].startswith("the discriminator's loss must be finite, got nan: training has diverged")
    assert heard[3] is not None
    assert heard[3].startswith("the discriminator's logits must be finite, got a spread of inf")


def test_a_loss_below_zero_is_well_for_wasserstein() -> None:
    assert said(CollapseWatch(1, kind="wasserstein"), *[(-3.0, 1.0)] * 4) == [None] * 4
    assert said(CollapseWatch(1), (-3.0, 1.0))[0]


def test_a_resumed_watch_says_what_the_uninterrupted_one_says() -> None:
    steps = [(0.0, 1.0)] * 3 + [(1.0, 0.0)] * 4 + [(math.nan, None)] * 2
    whole = said(CollapseWatch(3), *steps)
    for cut in range(len(steps)):
        first = CollapseWatch(3)
        heard = said(first, *steps[:cut])
        second = CollapseWatch(3)
        second.load_state(first.state())
        assert heard + said(second, *steps[cut:]) == whole
