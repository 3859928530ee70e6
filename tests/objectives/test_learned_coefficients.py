"""What a user learns beside the network: an uncertainty of each level, a path, a weight function, times."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import diffkern
from diffkern import schedules

SHAPE = (4, 3, 8, 8)
SEEDS = diffkern.seeds(0, 4)
X0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
PRED = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
T, STEPS = torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.tensor([10, 300, 600, 900])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("by", ["tensor", "function"])
@pytest.mark.parametrize("schedule", [diffkern.vp(), diffkern.linear()], ids=["vp", "linear"])
def test_learned_uncertainty(schedule: schedules.Schedule, by: str, dtype: torch.dtype) -> None:
    """EDM2 (Karras et al. 2024, arXiv 2312.02696, eq. 21): the mean of exp(-u) L + u, whose slope in u is (1 - L) / B.

    It has its minimum at u = ln L: training finds the loss of every level.
    """
    t = STEPS if isinstance(schedule, schedules.DiscreteSchedule) else T
    pred = PRED.clone().to(dtype).requires_grad_()
    each = diffkern.prediction_loss(pred, X0, t, schedule, seeds=SEEDS, reduction="none").detach()
    u = torch.zeros(4, requires_grad=True)

    def objective() -> Tensor:
        if by == "tensor":
            weight = torch.exp(-u)
            if t is STEPS:
                weight = torch.zeros(1000).index_copy(0, t, weight)
            loss = diffkern.prediction_loss(pred, X0, t, schedule, weight=weight, seeds=SEEDS)
        else:
            loss = diffkern.prediction_loss(pred, X0, t, schedule, weight=function, seeds=SEEDS)
        return loss + u.mean()

    levels = schedule.log_snr(t)

    def function(log_snr: Tensor, prediction: str) -> Tensor:
        return torch.exp(-u.double()[(log_snr[:, None] - levels).abs().argmin(1)])

    value = objective()
    value.backward()
    torch.testing.assert_close(u.grad, ((1 - each) / 4).float(), rtol=1e-4, atol=1e-6)
    expected = torch.autograd.grad(diffkern.prediction_loss(pred, X0, t, schedule, seeds=SEEDS), pred)[0]
    torch.testing.assert_close(pred.grad, expected)
    for _ in range(30):
        u.grad = None
        objective().backward()  # a table that was kept with its graph would raise here
        with torch.no_grad():
            u -= 2 * u.grad
    torch.testing.assert_close(u.detach(), each.log().float(), rtol=0, atol=0.02)


PACE = torch.tensor(0.3, dtype=torch.float64)


def path_of(pace: Tensor) -> schedules.Schedule:
    """alpha = sin(angle), sigma = cos(angle), the angle rising with t at a learned pace."""

    def angle(t: Tensor) -> Tensor:
        return 0.5 * torch.pi * (t + pace * t * (1 - t))

    return diffkern.path(lambda t: angle(t).sin(), lambda t: angle(t).cos().abs())


@pytest.mark.parametrize("prediction", ["velocity", "v", "eps"])
def test_learned_path(prediction: str) -> None:
    """d/dpace of noised, and of the loss where the target holds it (for velocity by the slopes of both rates)."""
    x0, pred = X0.double(), PRED.double()

    def both(pace: Tensor, t: Tensor) -> Tensor:
        path = path_of(pace)
        x = diffkern.noised(x0, t, path, prediction, seeds=SEEDS)
        return (x * pred).mean() + diffkern.prediction_loss(pred, x0, t, path, prediction, seeds=SEEDS)

    assert torch.autograd.gradcheck(both, (PACE.clone().requires_grad_(), T.double().requires_grad_()))


def test_a_path_without_parameters_gives_constants() -> None:
    """The slopes are taken by automatic differentiation, which leaves no trace."""
    path = diffkern.path(lambda t: t, lambda t: 1 - t**2)
    assert not path.alpha_dot(T).requires_grad
    assert not path.coefficients("velocity", T).requires_grad
    assert not path_of(PACE.clone().requires_grad_()).alpha_dot(T).isnan().any()
    with torch.no_grad():
        assert not path_of(PACE.clone().requires_grad_()).alpha_dot(T).requires_grad


def test_parameters_that_are_numbers_are_refused() -> None:
    one = torch.tensor(0.5, requires_grad=True)
    for call in (
        lambda: schedules.VESchedule(one, 50.0),
        lambda: diffkern.vp(beta_min=one),
        lambda: diffkern.flow(one),
        lambda: diffkern.linear(10, 0.1, one),
        lambda: diffkern.sigmoid(10, 0.1, one),
        lambda: diffkern.laplace(10, b=one),
        lambda: diffkern.objectives.weightings.MinSNR(one),
        lambda: diffkern.objectives.weightings.P2(one),
        lambda: diffkern.objectives.time_sampling.LogitNormal(one),
    ):
        with pytest.raises(ValueError, match="must be a constant, got a tensor that requires grad: detach it"):
            call()
