"""k-diffusion's loops: which plan a sampler is, what its model, callback and noise sampler are given."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffkern.checks import check_level, got
from diffkern.compat.k_diffusion._noise import BrownianTreeNoiseSampler, NoiseSampler
from diffkern.compat.kit import loop
from diffkern.modes import kept
from diffkern.plan import Plan, Row
from diffkern.samplers.dpm_2 import ancestral_levels, dpm_2_ancestral
from diffkern.samplers.nodes import Node, chain, grid, row
from diffkern.samplers.runge_kutta import heun, tableau_plan
from diffkern.schedules.makers import edm
from diffkern.tableaus import HEUN

Model = Callable[..., Tensor]
Callback = Callable[[dict[str, Any]], Any]
Levels = tuple[float, ...]
Asks = dict[int, tuple[int, float]]
"""For each row that asks a noise sampler: its step, whose level it gives, and the level that it asks up to."""
SLOPES = ("euler", "heun", "dpm_2", "euler_ancestral", "dpm_2_ancestral", "lms")
"""The samplers whose every update goes through k-diffusion's to_d."""
SLOPES_SEEN = ("euler", "heun", "dpm_2", "lms")
"""Those of them that have their slope before the callback is called."""


def levels_of(sigmas: Tensor) -> Levels:
    if not isinstance(sigmas, Tensor) or sigmas.ndim != 1:
        raise ValueError(f"sigmas must be a tensor [steps + 1], got {got(sigmas)}")
    return tuple(sigmas.tolist())


def plan_of(sampler: Callable[..., Plan], levels: Levels, **options: Any) -> Plan | None:
    """The sampler's plan whose model returns the denoised estimate; None for no steps."""
    return _made(sampler, levels, tuple(options.items())) if len(levels) > 1 else None


@kept(64)
def _made(sampler: Callable[..., Plan], levels: Levels, options: tuple[tuple[str, Any], ...]) -> Plan:
    if sampler is heun and levels[-1] > 0.0:  # `samplers.heun` ends on an Euler step there too
        space, nodes, end = grid("heun", edm(), None, "x0", levels, None, "linspace", None)
        churn = dict(options)
        return tableau_plan(
            "heun", HEUN, space, nodes, end, (churn["churn"], churn["churn_range"], churn["churn_noise"])
        )
    plan = sampler(edm(), sigmas=levels, prediction="x0", **dict(options))
    if sampler is not dpm_2_ancestral:
        return plan
    alone = {rows.start for rows in plan.steps if len(rows) == 1}
    return replace(plan, rows=tuple(replace(made, g=0.0) if i in alone else made for i, made in enumerate(plan.rows)))


@kept(64)
def sde_plan(levels: Levels, eta: float, noise: float, r: float) -> Plan | None:
    """DPM-Solver++(2S) with the noise of ancestral steps: to sigma_m = sigma^(1-r) sigma'^r, then the whole step.

    x_m = q_m x + (1 - q_m) x0 + noise up_m z,    q = down/sigma of `samplers.dpm_2_ancestral`'s (down, up)
    x'  = q x + (1 - q) ((1 - 1/(2r)) x0 + x0_m/(2r)) + noise up z'
    """
    if len(levels) < 2:
        return None
    for argument, value, least in (("eta", eta, 0.0), ("s_noise", noise, 0.0), ("r", r, 1e-6)):
        if not least <= value < math.inf:
            raise ValueError(f"{argument} must be a finite number of at least {least:g}, got {value}")
    space, nodes, end = grid("dpmpp_sde", edm(), None, "x0", levels, None, "linspace", None)
    rows: list[Row] = []
    at: list[Node] = []
    for node, to in itertools.pairwise([*nodes, end]):
        if to.sigma == 0.0:
            rows.append(row(len(rows), node, to, b=1.0))
            at.append(node)
            continue
        middle = space.node(node.sigma ** (1.0 - r) * to.sigma**r)
        half, up = ancestral_levels(node.sigma, middle.sigma, eta)
        half /= node.sigma
        whole, whole_up = ancestral_levels(node.sigma, to.sigma, eta)
        whole /= node.sigma
        share = 0.5 / r
        first = row(len(rows), node, middle, a=half, b=1.0 - half, g=noise * up)
        first = replace(first, A=whole, B=(1.0 - whole) * (1.0 - share), ends_step=False)
        keeps = first.A != 0.0 or first.B != 0.0
        rows.append(replace(first, saves=((0, "s"),)) if keeps else first)
        e = (1.0,) if keeps else ()
        rows.append(row(len(rows), middle, to, b=(1.0 - whole) * share, e=e, g=noise * whole_up))
        at += [node, middle]
    return chain("dpmpp_sde", space, rows, at)


class _Run:
    """What a run gives to the model and the callback: the levels of its rows, and the loop over its steps."""

    def __init__(
        self,
        plan: Plan,
        model: Model,
        x: Tensor,
        sigmas: Tensor,
        extra_args: Mapping[str, Any] | None,
        callback: Callback | None,
        disable: bool | None,
    ) -> None:
        self.plan, self.model, self.callback, self.disable = plan, model, callback, disable
        self.extra = {} if extra_args is None else extra_args
        check_level(plan.init_scale, x.dtype, "sigmas")
        self.sigmas = sigmas.clone().unbind()  # a callback is given them
        # Slopes are divided by sigma with a dimension, which widens a state of half precision to the dtype of sigmas.
        slopes: Sequence[int] = range(len(plan.rows)) if plan.name in SLOPES else ()
        if plan.name in ("dpmpp_2s_ancestral", "dpmpp_sde"):
            slopes = [rows.start for rows in plan.steps if len(rows) == 1]
        self.widening = dict.fromkeys(slopes, sigmas.dtype)
        times = torch.tensor([made.time for made in plan.rows], dtype=torch.float64, device="cpu").to(sigmas.dtype)
        self.hats = times.to(sigmas.device).unbind()
        self.times = times.to(x.device, x.dtype)[:, None].repeat(1, x.shape[0]).unbind()

    def call(self, x: Tensor, i: int) -> Tensor:
        return self.model(x, self.times[i], **self.extra)

    def seen(self, x: Tensor, j: int, m: Tensor) -> None:
        assert self.callback is not None
        hat = self.hats[self.plan.steps[j].start]
        self.callback({"x": x, "i": j, "sigma": self.sigmas[j], "sigma_hat": hat, "denoised": m})

    def __call__(self, x: Tensor, noise: loop.Noise) -> Tensor:
        prepared = loop.of_plan(self.plan)
        seen = None if self.callback is None else self.seen
        return loop.run(
            *(prepared, x, self.call, noise),
            seen=seen,
            seen_after=self.plan.name in SLOPES_SEEN,
            steps=self._steps(),
            widening=self.widening,
        )

    def _steps(self) -> Iterable[int]:
        from tqdm.auto import trange

        steps: Iterable[int] = trange(len(self.plan.steps), disable=self.disable)
        return steps


def churned(
    sampler: Callable[..., Plan],
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None,
    callback: Callback | None,
    disable: bool | None,
    s_churn: float,
    s_tmin: float,
    s_tmax: float,
    s_noise: float,
) -> Tensor:
    """Draws torch noise before every step, used or not, as k-diffusion does; the op of the row before adds it."""
    levels = levels_of(sigmas)
    # Compared in the dtype of sigmas.
    low, high = torch.tensor([s_tmin, s_tmax], dtype=sigmas.dtype, device="cpu").tolist()
    churn, limits = loop.churn_within(float(s_churn), low, high)
    plan = plan_of(sampler, levels, churn=churn, churn_range=limits, churn_noise=float(s_noise))
    if plan is None:
        return x
    run = _Run(plan, model, x, sigmas, extra_args, callback, disable)

    def noise(dtype: torch.dtype, i: int) -> Tensor | None:
        # In the layout of the first state, which plain torch would have kept: it decides which element gets which draw.
        return torch.randn_like(first, dtype=dtype) if plan.rows[i].ends_step and i + 1 < len(plan.rows) else None

    first = x
    return run(loop.added(x, torch.randn_like(x), loop.churn_before_start(plan, levels[0])), noise)


def noised(
    plan: Plan | None,
    model: Model,
    x: Tensor,
    sigmas: Tensor,
    extra_args: Mapping[str, Any] | None,
    callback: Callback | None,
    disable: bool | None,
    noise_sampler: NoiseSampler | None = None,
    default: Callable[[Tensor], NoiseSampler] | None = None,
) -> Tensor:
    """Asks ``noise_sampler``, by default ``default(x)``, where k-diffusion does: also where eta is 0."""
    if plan is None:
        return x
    run = _Run(plan, model, x, sigmas, extra_args, callback, disable)
    sampler = noise_sampler if noise_sampler is not None or default is None else default(x)
    if sampler is None:
        return run(x, lambda dtype, i: None)
    asks = _asks(plan)
    own = isinstance(sampler, BrownianTreeNoiseSampler)  # takes levels from the host: no device read

    def noise(dtype: torch.dtype, i: int) -> Tensor | None:
        if i not in asks or (own and not plan.rows[i].draws):
            return None
        j, to = asks[i]
        if own:
            return sampler(plan.rows[plan.steps[j].start].time, to)
        second = run.sigmas[j + 1] if plan.rows[i].ends_step else run.hats[i + 1]  # the middle, where the next row is
        return sampler(run.sigmas[j], second)

    return run(x, noise)


def _asks(plan: Plan) -> Asks:
    """Every step's last row that does not end on clean data; of dpmpp_sde the first row too, up to its middle."""
    found: Asks = {}
    for j, rows in enumerate(plan.steps):
        to = plan.rows[rows[-1]].known_n
        if to == 0.0 or (plan.name == "dpm_2_ancestral" and len(rows) == 1):
            continue
        if plan.name == "dpmpp_sde":
            found[rows.start] = (j, plan.rows[rows.start].known_n)
        found[rows[-1]] = (j, to)
    return found


def brownian_over(levels: Levels) -> Callable[[Tensor], NoiseSampler] | None:
    """One path over all levels but a last 0, which is stepped to without noise; None where no other level is left."""
    lowest = min((level for level in levels if level > 0.0), default=0.0)
    if not lowest < levels[0]:
        return None
    return lambda x: BrownianTreeNoiseSampler(x, lowest, levels[0])
