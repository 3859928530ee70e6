"""The variational bound of tables with equal levels, such as the default `cosine_arc`: those steps cost nothing."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import diffkern
from diffkern import schedules
from diffkern.objectives import variational

ABAR = torch.tensor([0.97, 0.97, 0.9, 0.7, 0.7, 0.4, 0.15, 0.04, 0.04], dtype=torch.float64)
TABLE = schedules.from_alphas_cumprod(ABAR)
ONCE = [0, 2, 3, 5, 6, 7]
DISTINCT = schedules.from_alphas_cumprod(ABAR[ONCE])
SEEDS = torch.tensor([5, 6, 7])
ARC = schedules.cosine_arc()
PREDICTIONS = ("eps", "x0", "v", "score", "velocity", "mu")


def images() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (3, 2, 4, 4), generator=generator) / 127.5 - 1


@pytest.mark.parametrize("variance", ["beta", "beta_tilde", 0.4])
def test_the_bound_is_that_of_the_table_without_repeats(variance):
    """Column by column in expectation: with the same noise, here none of it matters, as the model returns x0 itself."""
    x0 = images()
    exact = lambda x, t: x0  # noqa: E731
    many, few = (
        variational.bits_per_dim(exact, x0, table, "x0", seeds=SEEDS, variance=variance) for table in (TABLE, DISTINCT)
    )
    kept = torch.tensor(ONCE)
    torch.testing.assert_close(many.terms[:, kept], few.terms, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(many.total, few.total, rtol=1e-6, atol=1e-6)
    assert torch.equal(many.terms[:, [1, 4, 8]], torch.zeros(3, 3, dtype=torch.float64))
    assert float(few.total.min()) > 0


def test_the_bounds_of_the_variance():
    """ln 0 where no noise is added; entry 0 of the lower one is that of the first step that adds some."""
    lower, upper = variational.log_variances(TABLE)
    still = [1, 4, 8]
    assert all(lower[i] == upper[i] == -math.inf for i in still)
    want, above = variational.log_variances(DISTINCT)
    torch.testing.assert_close(lower[ONCE], want)
    torch.testing.assert_close(upper[ONCE], above)
    assert float(lower[0]) == pytest.approx(math.log(0.03 / 0.1 * (1 - 0.9 / 0.97)))
    w = torch.tensor([[-1.0], [0.3], [1.0]])
    got = variational.learned_log_variance(w, torch.tensor([4, 4, 4]), TABLE)
    assert torch.equal(got, torch.full_like(w, -math.inf))
    two = schedules.from_alphas_cumprod([0.9, 0.9])
    assert [float(v) for v in variational.log_variances(two)[0].exp()] == pytest.approx([0.1, 0.0])


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("loss", [variational.vlb_loss, variational.hybrid_loss])
def test_the_losses_and_their_gradients_on_cosine_arc(loss, prediction):
    """At t = 1 and 999 nothing is lost and nothing pulls; at t = 0 and 500 both are as on any table."""
    x0, t = torch.zeros(4, 1, 2, 2), torch.tensor([0, 1, 500, 999])
    pred = torch.linspace(-1, 1, 32).reshape(4, 2, 2, 2).requires_grad_()
    bound = loss(pred, x0, t, ARC, prediction, seeds=torch.arange(4), reduction="none")
    if loss is variational.hybrid_loss:
        bound = bound - diffkern.prediction_loss(
            pred[:, :1], x0, t, ARC, prediction, seeds=torch.arange(4), reduction="none"
        )
    (gradient,) = torch.autograd.grad(bound.sum(), pred)
    assert bound.isfinite().all()
    assert gradient.isfinite().all()
    assert bound[[1, 3]].abs().max() < 1e-6
    assert gradient[[1, 3], 1:].abs().max() == 0.0  # of the variance
    assert float(bound[2].detach().abs()) > 1e-4
    assert float(gradient[2, 1:].abs().max()) > 0


def test_a_gaussian_model_of_learned_variance_trains_and_is_measured():
    """The whole bound, for the model that knows its data are 0: that of the decoder and the prior alone."""
    x0 = torch.zeros(3, 1, 2, 2)
    short = schedules.cosine_arc(50, 1e-3)

    def model(x: Tensor, t: Tensor) -> Tensor:
        sigma = short.sigma(t).to(x.dtype).reshape(-1, 1, 1, 1)
        return torch.cat([x / sigma, -torch.ones_like(x)], 1)

    bits = variational.bits_per_dim(model, x0, short, variance="learned", seeds=SEEDS)
    assert bits.total.isfinite().all()
    torch.testing.assert_close(bits.total, bits.prior + bits.terms[:, 0], rtol=0, atol=1e-5)
