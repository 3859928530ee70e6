"""Exact log-likelihoods through the probability-flow ODE of any schedule, or the ODE of any velocity.

    found = log_likelihood(network, x, diffkern.vp(), "eps", seeds=seeds)       # x [B, ...], found.nats [B]
    bits = nats_to_bits_per_dim(found.nats, x[0].numel())                      # x = dequantise(images, seeds=seeds)

Along dx/dt = u_t(x) a density changes by its divergence (arXiv 1806.07366, 2011.13456 appendix D; lecture 001):

    ln p(x) at the data = ln prior(x at the noise) + int_data^noise div u_t(x_t) dt

"exact" differentiates each element (D backward passes a model call: small D); "hutchinson" takes v.(du/dx) v for a
random v with E[v v^T] = I, the same one all the way, so that the estimate is unbiased: E[nats] is the exact value.
State and integral are float64 whatever the network's dtype.

What is integrated, over which variable. Where both ends have a finite log-SNR, the state of the variance-exploding form
y = x/alpha over l = ln(sigma/alpha), whose equation dy/dl = (sigma/alpha) eps(x, t) has no schedule in it but that of
the network's time; otherwise (flows) x over the schedule's own time with the velocity. Both are the same ODE.

Solvers: `euler`, `midpoint`, `heun`, `rk4`, `rk4_38` (the 3/8 rule, which other code calls rk4) in `steps` steps, even
in the variable; `rk45`, Dormand and Prince's pair with a step size for each sample, so that a likelihood does not
depend on the rest of the batch (scipy's solver, which other code uses, takes the batch for one vector). Steps are
accepted where the root mean square of error/(atol + rtol |x|) over a sample's elements, and the error of its integral
on the same scale, are below 1. The default 1e-6 leaves less than 1e-4 nats on Gaussian data in two
dimensions on every schedule; 1e-5, usual elsewhere, some 1.5e-4.

What a number means. The data end is `t_data`, by default the end of the schedule's `time_range`: where the noise level
is 0 at the data end a score has no value there, and the likelihood is that of the data with noise of sigma(t_data), as
in other code. The prior is N(0, prior_std^2) unless given, which is not quite the end of the path of the data (VP:
0.0066 of the signal is left); the value is exact for the model that starts from that prior. Clipping, thresholding and
stochastic steps have no inverse and no likelihood: a network is evaluated as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern import tableaus
from diffkern.checks import unknown, unwrapped
from diffkern.integers import integer
from diffkern.names import Divergence, Prediction, Projection, Solver
from diffkern.ops import Seeds
from diffkern.plan import Plan
from diffkern.schedules.base import Schedule
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.predictions import prediction_of
from diffkern.simulate._adaptive import dormand_prince
from diffkern.simulate._dequantise import dequantise, nats_to_bits_per_dim
from diffkern.simulate._divergence import drawn_directions, given_directions, pairwise_sum, with_divergence
from diffkern.simulate._process import ODE, SDE, VectorField, column, from_model

__all__ = ["LogLikelihood", "dequantise", "log_likelihood", "nats_to_bits_per_dim", "ode_log_likelihood"]

FIXED = {
    "euler": tableaus.EULER,
    "midpoint": tableaus.MIDPOINT,
    "heun": tableaus.HEUN,
    "rk4": tableaus.RK4,
    "rk4_38": tableaus.RK4_38,
}
SOLVERS = (*FIXED, "rk45")
Prior = Callable[[Tensor], Tensor]
"""ln of a density in nats, [B], of the state at the noise end [B, ...]."""


class LogLikelihood(NamedTuple):
    """What `log_likelihood` returns."""

    nats: Tensor
    """ln p(x), [B] float64."""
    latent: Tensor
    """The state at the noise end that the sample came from, [B, ...] float64."""
    evaluations: int
    """Calls of the model (each with its divergence)."""


def log_likelihood(
    model: Callable[..., Tensor],
    x: Tensor,
    schedule: Schedule,
    prediction: Prediction | None = None,
    *,
    solver: Solver = "rk45",
    steps: int | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    divergence: Divergence = "hutchinson",
    probes: int = 1,
    probe: Projection = "rademacher",
    seeds: Seeds | None = None,
    directions: Sequence[Tensor] | None = None,
    t_data: float | None = None,
    t_noise: float | None = None,
    prior: Prior | None = None,
    **model_kwargs: Any,
) -> LogLikelihood:
    """ln p(x) in nats of the samples x [B, ...] under a network of any prediction, on any schedule.

    `model(x_t, t, **model_kwargs)` is called as the samplers call it, in the dtype of x (of a table at fractional
    times); it must treat each sample alone and be differentiable in its input. `prediction` is the schedule's default
    if not given. `steps` belongs to the fixed solvers, `rtol` and `atol` to `rk45`; `probes` Hutchinson probes,
    "rademacher" or "gaussian", come from `seeds` [B] (stream HUTCHINSON), from torch's generator if not given, or are
    the `directions` given, each of x's shape. `t_data` and `t_noise` replace the ends, `prior` the density of the state
    at `t_noise`. Everything else: the module's docstring.
    """
    _check_schedule(schedule)
    prediction = prediction_of(schedule, prediction)
    _check_x(x)
    low, high = schedule.time_range
    ends = (low, high) if schedule.direction > 0 else (high, low)
    t0 = ends[0] if t_data is None else float(t_data)
    t1 = ends[1] if t_noise is None else float(t_noise)
    if not (t1 - t0) * schedule.direction > 0:
        raise ValueError(f"t_noise must lie on the noise side of t_data, got t_data = {t0:g} and t_noise = {t1:g}")
    rates = torch.tensor([t0, t1], dtype=torch.float64, device="cpu")
    logs = -0.5 * schedule.log_snr(rates)
    prior = _gaussian_prior(schedule) if prior is None else prior
    options: dict[str, Any] = {
        "solver": solver,
        "steps": steps,
        "rtol": rtol,
        "atol": atol,
        "divergence": divergence,
        "probes": probes,
        "probe": probe,
        "seeds": seeds,
        "directions": directions,
    }
    narrow = _in_dtype(model, x.dtype)
    if not bool(logs.isfinite().all()):
        if isinstance(schedule, DiscreteSchedule):
            raise ValueError(
                f"t_noise must be a time before the last of a table that ends on zero SNR, got t_noise = {t1:g}"
            )
        field = VectorField(from_model(narrow, schedule, prediction, "velocity", **model_kwargs))
        return ode_log_likelihood(field, x, t0, t1, prior, **options)
    alphas = schedule.alpha(rates).tolist()
    eps = from_model(narrow, schedule, prediction, "eps", **model_kwargs)

    def slope(y: Tensor, level: Tensor) -> Tensor:
        t = schedule.time_of_log_snr(-2.0 * level.clamp(float(logs[0]), float(logs[1])))
        return column(level.exp(), y) * eps(column(schedule.alpha(t), y) * y, t)

    def scaled(y: Tensor) -> Tensor:
        # The density of y = x/alpha at the noise end, and of x at the data end: a factor of alpha an element each.
        return prior(alphas[1] * y) + y[0].numel() * (math.log(alphas[1]) - math.log(alphas[0]))

    start = x.to(torch.float64) / alphas[0]
    found = ode_log_likelihood(VectorField(slope), start, float(logs[0]), float(logs[1]), scaled, **options)
    return found._replace(latent=alphas[1] * found.latent)


def ode_log_likelihood(
    ode: ODE,
    x: Tensor,
    t_data: float,
    t_noise: float,
    prior: Prior,
    *,
    solver: Solver = "rk45",
    steps: int | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    divergence: Divergence = "hutchinson",
    probes: int = 1,
    probe: Projection = "rademacher",
    seeds: Seeds | None = None,
    directions: Sequence[Tensor] | None = None,
) -> LogLikelihood:
    """`log_likelihood` for any ODE, from x at `t_data` to the state at `t_noise`, whose log-density is `prior`.

    The drift is called with float64 states and times [B]; see the module's docstring. No gradient of the result.
    """
    if isinstance(ode, SDE):
        raise ValueError(f"ode must be deterministic to have a likelihood, got the SDE {type(ode).__name__}")
    if not isinstance(ode, ODE):
        raise ValueError(f"ode must be an ODE, got {type(ode).__name__}")
    _check_x(x)
    _check_solver(solver, steps, rtol, atol)
    if t_data == t_noise or not math.isfinite(t_data) or not math.isfinite(t_noise):
        raise ValueError(f"t_data and t_noise must be two finite times, got {t_data:g} and {t_noise:g}")
    if directions is None:
        directions = drawn_directions(x, divergence, probes, probe, seeds)
    else:
        directions = given_directions(x, divergence, seeds, directions)
    evaluations = 0

    def slope(state: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        at = state[:, :-1].reshape(x.shape)
        u, trace = with_divergence(ode, at, t, directions)
        return torch.cat([u.flatten(1), trace[:, None]], dim=1)

    with torch.no_grad():
        state = torch.cat(
            [x.to(torch.float64).flatten(1), torch.zeros_like(x.flatten(1)[:, :1], dtype=torch.float64)], 1
        )
        if solver == "rk45":
            state = dormand_prince(slope, state, t_data, t_noise, rtol, atol)
        else:
            assert steps is not None
            h = torch.full(x.shape[:1], (t_noise - t_data) / steps, dtype=torch.float64, device=x.device)
            for k in range(steps):
                t = torch.full_like(h, t_data + (t_noise - t_data) * k / steps)
                state = tableaus.step(slope, state, t, h, h[:, None], FIXED[solver])
        latent = state[:, :-1].reshape(x.shape)
        return LogLikelihood(prior(latent) + state[:, -1], latent, evaluations)


def _gaussian_prior(schedule: Schedule) -> Prior:
    """The schedule's prior, summed over the elements in `pairwise_sum`'s order."""

    def prior(x: Tensor) -> Tensor:
        return pairwise_sum(schedule.prior_log_density(x.reshape(-1, 1)).reshape(len(x), -1))

    return prior


def _in_dtype(model: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    """The network in its own dtype, in the midst of float64."""
    if not callable(model):
        raise ValueError(f"model must be a function of (x, t), got {model!r}")

    def called(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return unwrapped(model(x.to(dtype), t.to(dtype), **kwargs))

    return called


def _check_x(x: Tensor) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must be floating-point samples [B, ...], got {x.dtype}: integers go through dequantise")
    if x.ndim < 2:
        raise ValueError(f"x must be floating-point samples [B, ...], got shape {list(x.shape)}")


def _check_schedule(schedule: object) -> None:
    if isinstance(schedule, Plan):
        if any(row.draws for row in schedule.rows):
            why = "its steps are stochastic"
        elif any(math.isfinite(row.clip) for row in schedule.rows):
            why = "it clips x0, which has no inverse"
        else:
            why = "a plan runs from noise to data only"
        raise ValueError(f"log_likelihood needs a schedule, got the plan {schedule.name}: {why}")
    if not isinstance(schedule, Schedule):
        raise ValueError(f"schedule must be a Schedule, got {type(schedule).__name__}")


def _check_solver(solver: str, steps: int | None, rtol: float, atol: float) -> None:
    if solver not in SOLVERS:
        raise ValueError(unknown("solver", solver, SOLVERS))
    if solver == "rk45":
        if steps is not None:
            raise ValueError(f"steps must not be given to rk45, which chooses its own, got {steps!r}")
        for name, value in (("rtol", rtol), ("atol", atol)):
            if not 0.0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
    else:
        integer("steps", steps, rule=f"of at least 1 for {solver}")
