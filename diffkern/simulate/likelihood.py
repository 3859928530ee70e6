"""Exact log-likelihoods through the probability-flow ODE of any schedule, or the ODE of any velocity.

    found = log_likelihood(network, x, diffkern.vp(), "eps", seeds=seeds)       # x [B, ...], found.nats [B]
    bits = bits_per_dim(found.nats, x[0].numel())                               # x = dequantise(images, seeds=seeds)

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

from diffkern import ops, streams, tableaus
from diffkern.draws import PROJECTIONS, draw_seeds, projections
from diffkern.plan import Plan
from diffkern.schedules.base import Schedule
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.simulate import ODE, SDE, VectorField, from_model
from diffkern.simulate._process import column, shaped

__all__ = ["LogLikelihood", "bits_per_dim", "dequantise", "log_likelihood", "ode_log_likelihood"]

FIXED = {
    "euler": tableaus.EULER,
    "midpoint": tableaus.MIDPOINT,
    "heun": tableaus.HEUN,
    "rk4": tableaus.RK4,
    "rk4_38": tableaus.RK4_38,
}
SOLVERS = (*FIXED, "rk45")
DIVERGENCES = ("exact", "hutchinson")
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
    prediction: str | None = None,
    *,
    solver: str = "rk45",
    steps: int | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    divergence: str = "hutchinson",
    probes: int = 1,
    probe: str = "rademacher",
    seeds: Tensor | None = None,
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
    prediction = schedule.default_prediction if prediction is None else prediction
    _check_x(x)
    low, high = schedule.time_range
    ends = (low, high) if schedule.direction > 0 else (high, low)
    t0 = ends[0] if t_data is None else float(t_data)
    t1 = ends[1] if t_noise is None else float(t_noise)
    if not (t1 - t0) * schedule.direction > 0:
        raise ValueError(f"t_noise must lie on the noise side of t_data, got t_data = {t0:g} and t_noise = {t1:g}")
    rates = torch.tensor([t0, t1], dtype=torch.float64)
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
    solver: str = "rk45",
    steps: int | None = None,
    rtol: float = 1e-6,
    atol: float = 1e-6,
    divergence: str = "hutchinson",
    probes: int = 1,
    probe: str = "rademacher",
    seeds: Tensor | None = None,
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
        directions = _directions(x, divergence, probes, probe, seeds)
    else:
        directions = _given(x, divergence, seeds, directions)
    evaluations = 0

    def slope(state: Tensor, t: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        at = state[:, :-1].reshape(x.shape)
        u, trace = _with_divergence(ode, at, t, directions)
        return torch.cat([u.flatten(1), trace[:, None]], dim=1)

    with torch.no_grad():
        state = torch.cat(
            [x.to(torch.float64).flatten(1), torch.zeros_like(x.flatten(1)[:, :1], dtype=torch.float64)], 1
        )
        if solver == "rk45":
            state = _adaptive(slope, state, t_data, t_noise, rtol, atol)
        else:
            assert steps is not None
            h = torch.full(x.shape[:1], (t_noise - t_data) / steps, dtype=torch.float64, device=x.device)
            for k in range(steps):
                t = torch.full_like(h, t_data + (t_noise - t_data) * k / steps)
                state = tableaus.step(slope, state, t, h, h[:, None], FIXED[solver])
        latent = state[:, :-1].reshape(x.shape)
        return LogLikelihood(prior(latent) + state[:, -1], latent, evaluations)


def dequantise(
    images: Tensor, *, seeds: Tensor | None = None, levels: int = 256, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Integers 0..levels-1 with uniform noise, scaled to [-1, 1]: 2 (images + u)/levels - 1, u in (0, 1), [B, ...].

    E[-ln p(images + u)] bounds -ln P(images) from above (arXiv 1511.01844). u by address: Phi of the normal of the
    element on stream DEQUANTISATION; of torch's generator without `seeds`. `bits_per_dim` has the offset that belongs
    to it.
    """
    if images.dtype not in (torch.uint8, torch.int16, torch.int32, torch.int64) or images.ndim == 0:
        raise ValueError(f"images must be integers [B, ...], got {images.dtype} of shape {list(images.shape)}")
    _check_levels(levels)
    if images.device.type == "cpu" and images.numel() and not 0 <= int(images.min()) <= int(images.max()) < levels:
        raise ValueError(f"images must lie in 0..{levels - 1}, got {int(images.min())}..{int(images.max())}")
    if seeds is None:
        u = torch.rand(images.shape, dtype=torch.float64, device=images.device)
    else:
        z = ops.randn(images.shape, seeds, streams.DEQUANTISATION).to(torch.float64)
        u = 0.5 * torch.erfc(-z / math.sqrt(2.0))
    return (2.0 * (images + u) / levels - 1.0).to(dtype)


def bits_per_dim(nats: Tensor, dims: int, *, levels: int = 256, low: float = -1.0, high: float = 1.0) -> Tensor:
    """-nats/(dims ln 2) + log2(levels/(high - low)): bits a dimension of integers 0..levels-1 scaled to [low, high].

    `dims` is the number of elements a sample. The offset is ln of the bins' width: 7 bits for 256 levels on [-1, 1], 8
    on [0, 1]. Without it the number would be that of the scaled, continuous data.
    """
    _check_levels(levels)
    if isinstance(dims, bool) or not isinstance(dims, int) or dims < 1:
        raise ValueError(f"dims must be an integer of at least 1, got {dims!r}")
    if not -math.inf < low < high < math.inf:
        raise ValueError(f"low and high must be finite, low < high, got {low} and {high}")
    return -nats / (dims * math.log(2.0)) + math.log2(levels / (high - low))


def _with_divergence(ode: ODE, x: Tensor, t: Tensor, directions: Sequence[Tensor] | None) -> tuple[Tensor, Tensor]:
    """(u, its divergence [B]); exact without directions."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        u = shaped("drift_coefficient", ode.drift_coefficient(x, t), x)
        if not u.requires_grad:
            raise ValueError("the drift must be differentiable in x, got one without a gradient (no_grad or detach?)")
        flat, parts = u.flatten(1), []
        if directions is None:
            for d in range(flat.shape[1]):
                parts.append(_derivative(flat[:, d], x)[:, d])
            return u.detach(), _sum(torch.stack(parts, 1))
        for v in directions:
            parts.append(_sum(_derivative((flat * v).sum(), x) * v))
    return u.detach(), _sum(torch.stack(parts, 1)) / len(parts)


def _derivative(value: Tensor, x: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(value.sum(), x, retain_graph=True, allow_unused=True)
    return torch.zeros_like(x).flatten(1) if gradient is None else gradient.flatten(1)


def _directions(x: Tensor, divergence: str, probes: int, probe: str, seeds: Tensor | None) -> list[Tensor] | None:
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, got {divergence!r}")
    if isinstance(probes, bool) or not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes must be an integer of at least 1, got {probes!r}")
    if probe not in PROJECTIONS:
        raise ValueError(f"probe must be one of {', '.join(PROJECTIONS)}, got {probe!r}")
    if seeds is not None and seeds.shape != x.shape[:1]:
        raise ValueError(f"seeds must have shape [{len(x)}] (one a sample), got {list(seeds.shape)}")
    if divergence == "exact":
        return None
    seeds = draw_seeds(len(x), device=x.device) if seeds is None else seeds
    return [projections(x.shape, seeds, k, probe, torch.float64).flatten(1) for k in range(probes)]


def _given(x: Tensor, divergence: str, seeds: Tensor | None, directions: Sequence[Tensor]) -> list[Tensor]:
    if divergence != "hutchinson":
        raise ValueError(f"directions belong to the divergence 'hutchinson', got them for {divergence!r}")
    if seeds is not None:
        raise ValueError("give seeds or directions, not both, got both")
    if not directions or any(v.shape != x.shape for v in directions):
        shapes = [list(v.shape) for v in directions]
        raise ValueError(f"directions must be one or more tensors of shape {list(x.shape)}, got {shapes}")
    return [v.to(torch.float64).flatten(1) for v in directions]


def _adaptive(
    slope: Callable[[Tensor, Tensor], Tensor], y: Tensor, start: float, end: float, rtol: float, atol: float
) -> Tensor:
    """Dormand-Prince from start to end with a step size for each row of y [B, D + 1]; a row that is there waits."""
    pair = tableaus.DORMAND_PRINCE
    span = end - start
    t = torch.full(y.shape[:1], start, dtype=torch.float64, device=y.device)
    first = slope(y, t)
    scale = atol + rtol * y.abs()
    # Hairer, Norsett and Wanner, section II.4: a step in which the state moves by 1% of its size.
    size, speed = _norm(y / scale), _norm(first / scale)
    h = torch.where((size > 1e-5) & (speed > 1e-5), 0.01 * size / speed, 1e-6 * abs(span)).clamp(max=abs(span))
    h = math.copysign(1.0, span) * h
    for _ in range(MAX_ROUNDS):
        left = end - t
        last = h.abs() >= left.abs()
        h = torch.where(last, left, h)
        wide = h[:, None]
        ks = tableaus.stages(slope, y, t, h, wide, pair, first)
        new = y + wide * tableaus.combine(pair.weights, ks)
        ks.append(slope(new, torch.where(last, end, t + h)))
        error = wide * tableaus.combine(pair.error, ks) / (atol + rtol * torch.maximum(y.abs(), new.abs()))
        norm = _norm(error)
        accepted = norm <= 1.0  # False for NaN: the step is made smaller, until it is too small
        y = torch.where(accepted[:, None], new, y)
        first = torch.where(accepted[:, None], ks[-1], first)
        t = torch.where(accepted, torch.where(last, end, t + h), t)
        if bool((t == end).all()):
            return y
        factor = (0.9 * norm.clamp(min=1e-10) ** -0.2).clamp(0.2, 10.0)
        h = h * torch.where(accepted, factor, torch.where(norm.isfinite(), factor.clamp(max=1.0), 0.2))
        if bool(((h.abs() < 1e-12 * abs(span)) & (t != end)).any()):
            break
    raise RuntimeError(f"rk45 did not reach t = {end:g} with rtol = {rtol:g}: the drift is too steep or not finite")


MAX_ROUNDS = 10_000


def _norm(scaled: Tensor) -> Tensor:
    """The larger of the root mean square over a sample's elements and the size of its integral, [B]."""
    elements = scaled[:, :-1]
    return torch.maximum((_sum(elements.square()) / max(elements.shape[1], 1)).sqrt(), scaled[:, -1].abs())


def _sum(values: Tensor) -> Tensor:
    """The sum over the columns of [B, D] in an order that does not depend on B: pairs, then pairs of pairs."""
    while values.shape[1] > 1:
        half = values.shape[1] // 2
        pairs = values[:, :half] + values[:, half : 2 * half]
        values = torch.cat([pairs, values[:, 2 * half :]], 1) if values.shape[1] % 2 else pairs
    return values.sum(1)


def _gaussian_prior(schedule: Schedule) -> Prior:
    """The schedule's prior, summed over the elements in `_sum`'s order."""

    def prior(x: Tensor) -> Tensor:
        return _sum(schedule.prior_log_density(x.reshape(-1, 1)).reshape(len(x), -1))

    return prior


def _in_dtype(model: Callable[..., Tensor], dtype: torch.dtype) -> Callable[..., Tensor]:
    """The network in its own dtype, in the midst of float64."""
    if not callable(model):
        raise ValueError(f"model must be a function of (x, t), got {model!r}")

    def called(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return model(x.to(dtype), t.to(dtype), **kwargs)

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
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if solver == "rk45":
        if steps is not None:
            raise ValueError(f"steps must not be given to rk45, which chooses its own, got {steps!r}")
        for name, value in (("rtol", rtol), ("atol", atol)):
            if not 0.0 < value < math.inf:
                raise ValueError(f"{name} must be positive, got {value}")
    elif isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be an integer of at least 1 for {solver}, got {steps!r}")


def _check_levels(levels: int) -> None:
    if isinstance(levels, bool) or not isinstance(levels, int) or levels < 2:
        raise ValueError(f"levels must be an integer of at least 2, got {levels!r}")
