"""The cases: what is timed, against what, how it is checked, and how many bytes it has to move.

A case is built by `CASES[name](setting)`. Its baselines do the same job the way it is done today: plain torch, or
diffusers' schedulers called as pipelines call them (`step(model_output, t, sample)` under no_grad, timesteps set once,
`clip_sample=False`, which is their leanest path). Targets are for the CPU; on a GPU there are none.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffkern import _load, ops, reference, samplers, sampling, schedules, streams, variational
from diffkern.plan import Plan

__all__ = ["CASES", "LARGE", "SMALL", "Baseline", "Case", "Check", "Setting"]

LARGE = (16, 3, 256, 256)
SMALL = (1, 4, 64, 64)
STEPS = 50
ROW = 20
"""The row that the single-step cases run: any row in the middle does the same work."""

Fn = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """Where cases run. `compiled`: also time torch.compile of the eager baselines."""

    device: str = "cpu"
    compiled: bool = True

    @property
    def cpu(self) -> bool:
        return self.device == "cpu"


@dataclass(frozen=True)
class Baseline:
    """`target`: time(baseline) / time(ours) must reach it. `fn` None: not available, `note` says why."""

    name: str
    fn: Fn | None
    target: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Check:
    """The largest error of `what`, in units of 1 + |value|, and the most it may be."""

    what: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


@dataclass(frozen=True)
class Case:
    """One comparison: `bytes` is what an update has to read and write, `steps` the updates in a call of `ours`."""

    name: str
    title: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    ours: Fn
    baselines: tuple[Baseline, ...]
    check: Callable[[], list[Check]]
    bytes: int
    goal_us: float | None = None
    steps: int = 1
    grad: bool = False
    overhead: bool = False
    """Whether the call overhead is the point: on a GPU the host's time then counts too."""


# ----------------------------------------------------------------------------------------------------- helpers
def _bytes(*tensors: Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _tensor(seed: int, shape: tuple[int, ...], setting: Setting, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(setting.device, dtype)


def _seeds(batch: int, setting: Setting) -> Tensor:
    return ops.seeds(1, batch, device=setting.device)


@functools.lru_cache(maxsize=4)
def _reference_noise(shape: tuple[int, ...], stream: int) -> Tensor:
    """The normals of `_seeds` on a stream, float64, computed once for all the cases that check against them."""
    return reference.randn(shape, ops.seeds(1, shape[0]), stream)


def _compare(what: str, got: Tensor, want: Tensor, tolerance: float) -> Check:
    got, want = got.detach().cpu().double(), want.detach().cpu().double()
    error = float(((got - want).abs() / (1 + want.abs())).max()) if got.shape == want.shape else math.inf
    return Check(what, error, tolerance)


def _tolerance(dtype: torch.dtype) -> float:
    """Ours rounds once, from float32 arithmetic with a handful of operations."""
    return 4e-6 if dtype == torch.float32 else float(torch.finfo(dtype).eps)


def _loose(dtype: torch.dtype) -> float:
    """What a baseline may be off: float32 coefficients and a rounding after every operation."""
    return 1e-4 if dtype == torch.float32 else 8 * float(torch.finfo(dtype).eps)


def _compiled(fn: Callable[..., Any], setting: Setting, *args: Any) -> tuple[Callable[..., Any] | None, str]:
    """torch.compile of fn, warmed up; None and the reason where it cannot be had."""
    if not setting.compiled:
        return None, "not asked for"
    try:
        built = torch.compile(fn, dynamic=False)
        built(*args)
    except Exception as error:  # no C++ compiler, an unsupported platform: the other baselines stand
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return None, f"torch.compile failed: {lines[0][:120]}"
    return built, ""


def _target(value: float | None, setting: Setting) -> float | None:
    return value if setting.cpu else None


def _scheduler(kind: str, **config: Any) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import diffusers

    return getattr(diffusers, kind)(**config)


def _vp(kind: str, setting: Setting) -> tuple[Any, Plan]:
    """A diffusers scheduler of the DDPM family with its timesteps set, and our plan on the same table."""
    scheduler = _scheduler(kind, clip_sample=False)
    scheduler.set_timesteps(STEPS, device=setting.device)
    make = samplers.ddpm if kind == "DDPMScheduler" else samplers.ddim
    plan = make(schedules.from_alphas_cumprod(scheduler.alphas_cumprod), timesteps=scheduler.timesteps.tolist())
    return scheduler, plan


# ------------------------------------------------------------------------------------------------------- noise
def randn(
    name: str, setting: Setting, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, targets: bool = False
) -> Case:
    """Standard normals into a new tensor."""
    seeds = _seeds(shape[0], setting)
    target = {"avx512": 8.0, "avx2": 2.5}.get(_load.build_info().get("isa", "")) if targets else None

    def ours() -> Tensor:
        return ops.randn(shape, seeds, dtype=dtype)

    def check() -> list[Check]:
        return [_compare("ours", ours(), _reference_noise(shape, 0), _tolerance(dtype))]

    baseline = Baseline(
        "torch.randn",
        functools.partial(torch.randn, shape, dtype=dtype, device=setting.device),
        _target(target, setting),
    )
    return Case(name, "randn", shape, dtype, ours, (baseline,), check, _bytes(ours()))


def noising(
    name: str,
    setting: Setting,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    target: bool = False,
    targets: bool = False,
) -> Case:
    """x_t (and with `target` the v target) of fresh noise; ours also draws its seeds in each call."""
    schedule = schedules.linear()
    batch, device = shape[0], setting.device
    x0 = _tensor(0, shape, setting, dtype)
    t = torch.randint(0, schedule.T, (batch,), generator=torch.Generator().manual_seed(1)).to(device)
    table = schedule.table("v", device)
    signal, sigma = (table[:, column].to(dtype) for column in (0, 1))
    fixed = _seeds(batch, setting)

    def ours() -> object:
        seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), device=device)
        return ops.noising(x0, table, t, seeds=seeds, stream=streams.TRAINING, want_target=target)

    def formula(x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        a, b = signal[t].view(-1, 1, 1, 1), sigma[t].view(-1, 1, 1, 1)
        x_t = a * x0 + b * eps
        return (x_t, a * eps - b * x0) if target else (x_t,)

    def eager(x0: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return formula(x0, torch.randn_like(x0), t)

    fused, why = _compiled(eager, setting, x0, t)

    def check() -> list[Check]:
        eps = _reference_noise(shape, streams.TRAINING)
        want = reference.noising(x0.cpu(), table.cpu(), t.cpu(), noise=eps)
        got = ops.noising(x0, table, t, seeds=fixed, stream=streams.TRAINING, want_target=target)
        plain = formula(x0, eps.to(device, dtype), t)
        checks = []
        for what, i in (("x_t", 0), ("target", 1))[: 2 if target else 1]:
            ours_out = got[i]
            assert ours_out is not None
            checks.append(_compare(f"ours {what}", ours_out, want[i], _tolerance(dtype)))
            checks.append(_compare(f"eager {what}", plain[i], want[i], _loose(dtype)))
        if fused is not None:  # its noise is its own: what it must share is the distribution
            z = (fused(x0, t)[0].cpu().double() - want[0] + want[2] * _column(table, t, 1)) / _column(table, t, 1)
            checks.append(Check("torch.compile noise variance", abs(float(z.var()) - 1), 0.05))
        return checks

    goals = (8.0, 4.0) if targets else (None, None)
    baselines = (
        Baseline("eager", functools.partial(eager, x0, t), _target(goals[0], setting)),
        Baseline("torch.compile", fused and functools.partial(fused, x0, t), _target(goals[1], setting), why),
    )
    title = "noising + v target" if target else "noising"
    return Case(name, title, shape, dtype, ours, baselines, check, _bytes(x0) * (3 if target else 2))


def _column(table: Tensor, t: Tensor, column: int) -> Tensor:
    return table.cpu()[t.cpu(), column].view(-1, 1, 1, 1)


# -------------------------------------------------------------------------------------------------------- loss
def loss(
    name: str,
    setting: Setting,
    shape: tuple[int, ...],
    prediction: str,
    stored: bool = False,
    goal: float | None = None,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Loss and the gradient of the prediction. Eager has eps stored from the noising; ours makes it again or,
    with `stored`, reads the same tensor."""
    schedule = schedules.linear()
    device = setting.device
    x0, eps = _tensor(0, shape, setting, dtype), _reference_noise(shape, streams.TRAINING).to(device, dtype)
    pred = _tensor(3, shape, setting, dtype).requires_grad_()
    t = torch.randint(0, schedule.T, (shape[0],), generator=torch.Generator().manual_seed(1)).to(device)
    coefficients = schedule.table(prediction, device)
    table = torch.cat([coefficients[:, 2:], torch.ones_like(coefficients[:, :1])], 1)
    u, v = (table[:, column].to(dtype) for column in (0, 1))
    seeds = _seeds(shape[0], setting)
    noise: dict[str, Any] = {"noise": eps} if stored else {"seeds": seeds, "stream": streams.TRAINING}

    def ours() -> tuple[Tensor, Tensor]:
        value = ops.loss(pred, x0, table, t, **noise)
        return value, torch.autograd.grad(value, pred)[0]

    def value_of(pred: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        target = eps if prediction == "eps" else u[t].view(-1, 1, 1, 1) * x0 + v[t].view(-1, 1, 1, 1) * eps
        return F.mse_loss(pred, target)

    def eager() -> tuple[Tensor, Tensor]:
        value = value_of(pred, x0, eps, t)
        return value, torch.autograd.grad(value, pred)[0]

    fused, why = _compiled(value_of, setting, pred, x0, eps, t)

    def compiled() -> tuple[Tensor, Tensor]:
        assert fused is not None
        value = fused(pred, x0, eps, t)
        return value, torch.autograd.grad(value, pred)[0]

    def check() -> list[Check]:
        leaf = pred.detach().cpu().double().requires_grad_()
        exact = eps.cpu() if stored else _reference_noise(shape, streams.TRAINING)
        value = reference.loss(leaf, x0.cpu(), table.cpu(), t.cpu(), noise=exact)
        (grad,) = torch.autograd.grad(value, leaf)
        checks = []
        known = [("ours", ours(), _tolerance(dtype)), ("eager", eager(), _loose(dtype))]
        if fused is not None:
            known.append(("torch.compile", compiled(), _loose(dtype)))
        for who, (got, got_grad), tolerance in known:
            checks.append(_compare(f"{who} value", got, value, tolerance))
            scale = 1 / float(grad.abs().max())  # gradients are tiny: compare them at the size of 1
            checks.append(_compare(f"{who} gradient", got_grad.double() * scale, grad * scale, tolerance))
        return checks

    baselines = (
        Baseline("eager", eager, _target(goal, setting), "eps is stored, its drawing not counted"),
        Baseline("torch.compile", fused and compiled, None, why),
    )
    moved = _bytes(pred, pred) + (_bytes(x0) if prediction != "eps" else 0) + (_bytes(eps) if stored else 0)
    title = f"loss + gradient, {prediction}" + (", eps stored" if stored else "")
    return Case(name, title, shape, dtype, ours, baselines, check, moved, grad=True)


def hybrid(name: str, setting: Setting, shape: tuple[int, ...], goal: float | None = None) -> Case:
    """The hybrid loss of a learned variance and its gradient. Eager is the form of guided-diffusion's training losses:
    posterior means, KL and decoder for every sample, one chosen by t; eps and x_t are stored from the noising."""
    schedule, device = schedules.linear(), setting.device
    x0 = (_tensor(0, shape, setting) / 3).clamp(-1, 1)
    eps = _reference_noise(shape, streams.TRAINING).to(device, torch.float32)
    noise_of_model = _tensor(3, shape, setting)
    pred = torch.cat([eps + noise_of_model / 10, noise_of_model.flip(0).tanh()], dim=1).requires_grad_()
    t = torch.randint(0, schedule.T, (shape[0],), generator=torch.Generator().manual_seed(1)).to(device)
    t[0] = 0  # one sample meets the decoder
    seeds = _seeds(shape[0], setting)
    steps = torch.arange(schedule.T)
    alpha, sigma = schedule.alpha(steps), schedule.sigma(steps)
    lower, upper = variational.log_variances(schedule)
    c0, ct, _ = schedule.posterior(steps)
    columns = [column.to(device, torch.float32) for column in (alpha, sigma / alpha, lower, upper, c0, ct)]
    x_t = ops.noising(x0, schedule.table("eps", device), t, noise=eps)[0]
    vlb_weight = 1e-3 * schedule.T

    def ours() -> tuple[Tensor, Tensor]:
        value = variational.hybrid_loss(pred, x0, t, schedule, seeds=seeds)
        return value, torch.autograd.grad(value, pred)[0]

    def value_of(pred: Tensor, x0: Tensor, x_t: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        a, ratio, low, high, coef_x0, coef_xt = (column[t].view(-1, 1, 1, 1) for column in columns)
        m, w = pred.chunk(2, dim=1)
        true_mean = coef_x0 * x0 + coef_xt * x_t
        fraction = (w + 1) / 2
        log_variance = fraction * high + (1 - fraction) * low
        mean = coef_x0 * (x_t / a - ratio * m.detach()) + coef_xt * x_t
        apart = (true_mean - mean) ** 2 * torch.exp(-log_variance)
        kl = 0.5 * (-1 + log_variance - low + torch.exp(low - log_variance) + apart)
        inv_std, centered = torch.exp(-0.5 * log_variance), x0 - mean

        def below(x: Tensor) -> Tensor:
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

        plus, minus = below(inv_std * (centered + 1 / 255)), below(inv_std * (centered - 1 / 255))
        mass = torch.where(x0 < -0.999, plus, torch.where(x0 > 0.999, 1 - minus, plus - minus))
        nll = -torch.log(mass.clamp(min=1e-12))
        bits = torch.where((t == 0).view(-1, 1, 1, 1), nll, kl).flatten(1).mean(1) / math.log(2)
        return (((m - eps) ** 2).flatten(1).mean(1) + vlb_weight * bits).mean()

    def eager() -> tuple[Tensor, Tensor]:
        value = value_of(pred, x0, x_t, eps, t)
        return value, torch.autograd.grad(value, pred)[0]

    fused, why = _compiled(value_of, setting, pred, x0, x_t, eps, t)

    def compiled() -> tuple[Tensor, Tensor]:
        assert fused is not None
        value = fused(pred, x0, x_t, eps, t)
        return value, torch.autograd.grad(value, pred)[0]

    def check() -> list[Check]:
        leaf = pred.detach().cpu().double().requires_grad_()
        exact_table = variational.variational_table(
            schedule, simple_weight=1.0, vlb_weight=vlb_weight, mean_gradient=False
        )
        noise = _reference_noise(shape, streams.TRAINING)
        exact, _ = reference.variational(leaf, x0.cpu(), exact_table, t.cpu(), noise=noise)
        (grad,) = torch.autograd.grad(exact, leaf)
        (got, got_grad), scale, tolerance = ours(), 1 / float(grad.abs().max()), _tolerance(torch.float32)
        return [
            _compare("ours value", got, exact, tolerance),
            _compare("ours gradient", got_grad.double() * scale, grad * scale, tolerance),
            # Its normal distribution is an approximation, and cut off far out, so its decoder's gradient is far off.
            _compare("eager value", eager()[0], exact, 0.01),
        ]

    baselines = (
        Baseline("eager", eager, _target(goal, setting), "guided-diffusion's form; eps and x_t stored"),
        Baseline("torch.compile", fused and compiled, None, why),
    )
    title = "hybrid loss + gradient, learned variance"
    return Case(name, title, shape, torch.float32, ours, baselines, check, _bytes(pred, pred, x0), grad=True)


# ------------------------------------------------------------------------------------------------------- steps
def step(
    name: str,
    setting: Setting,
    shape: tuple[int, ...],
    kind: str,
    dtype: torch.dtype = torch.float32,
    want_x0: bool = False,
    channels_last: bool = False,
    goal: float | None = None,
    goal_us: float | None = None,
    add: float | None = None,
) -> Case:
    """One step of DDIM or DDPM into `out`, noise by address. `add`: also against torch.add(x, m, out=out)."""
    scheduler, plan = _vp(f"{kind.upper()}Scheduler", setting)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x, m = (_tensor(k, shape, setting, dtype).contiguous(memory_format=layout) for k in (0, 1))
    out = torch.empty_like(x)
    x0 = torch.empty_like(x) if want_x0 else None
    table, t = plan.table, scheduler.timesteps[ROW]
    draws = plan.rows[ROW].draws
    seeds = _seeds(shape[0], setting) if draws else None

    def ours() -> Tensor:
        return ops.step_out(x, m, table=table, row=ROW, seeds=seeds, out=out, x0=x0)

    def theirs() -> Any:
        return scheduler.step(m, t, x)

    def check() -> list[Check]:
        noise = _reference_noise(shape, plan.rows[ROW].stream) if draws else None
        want, clean, _, _ = reference.step(x.cpu(), m.cpu(), table=table, row=ROW, noise=noise)
        ours()
        checks = [_compare("ours", out, want, _tolerance(dtype))]
        if x0 is not None:
            checks.append(_compare("ours x0", x0, clean, _tolerance(dtype)))
        if not draws:
            found = theirs()
            checks.append(_compare("diffusers", found.prev_sample, want, _loose(dtype)))
            checks.append(_compare("diffusers x0", found.pred_original_sample, clean, 2 * _loose(dtype)))
        else:  # the scheduler draws its own: make the same draw, and give it to ours
            device = torch.device(setting.device)
            drawn = torch.randn(
                shape, generator=torch.Generator(device).manual_seed(5), device=device, dtype=dtype
            ).contiguous(memory_format=layout)
            found = scheduler.step(m, t, x, generator=torch.Generator(device).manual_seed(5))
            same = ops.step(x, m, table=table, row=ROW, noise=drawn)[0]
            checks.append(_compare("diffusers, same noise", found.prev_sample, same, _loose(dtype)))
        return checks

    baselines = [Baseline("diffusers", theirs, _target(goal, setting))]
    if add is not None:
        note = f"ours may take {add:g}x its time"
        baselines.append(
            Baseline("torch.add", functools.partial(torch.add, x, m, out=out), _target(1 / add, setting), note)
        )
    extras = [", x0 too"] * want_x0 + [", channels_last"] * channels_last
    return Case(
        name,
        f"{kind.upper()} step" + "".join(extras),
        shape,
        dtype,
        ours,
        tuple(baselines),
        check,
        _bytes(x, m, out) + (_bytes(x) if want_x0 else 0),
        goal_us=goal_us if setting.cpu else None,
        overhead=math.prod(shape) <= math.prod(SMALL),
    )


def guided(name: str, setting: Setting, shape: tuple[int, ...]) -> Case:
    """A guided DDIM step as pipelines do it: split [2B], combine, step, and the next [2B] input."""
    scheduler, plan = _vp("DDIMScheduler", setting)
    weight = 7.5
    table, t = plan.with_guidance(weight).table, scheduler.timesteps[ROW]
    x = _tensor(0, shape, setting)
    m = _tensor(1, (2 * shape[0], *shape[1:]), setting)
    out, following = torch.empty_like(x), torch.empty_like(m)

    def ours() -> Tensor:
        return ops.step_out(x, m, table=table, row=ROW, out=out, next=following)

    def theirs() -> tuple[Tensor, Tensor]:
        uncond, cond = m.chunk(2)
        latents = scheduler.step(uncond + weight * (cond - uncond), t, x).prev_sample
        return latents, torch.cat([latents] * 2)

    def check() -> list[Check]:
        want = reference.step(x.cpu(), m.cpu(), table=table, row=ROW)[0]
        ours()
        return [
            _compare("ours", out, want, 10 * _tolerance(x.dtype)),
            _compare("ours next", following, torch.cat([out, out]), 0.0),
            _compare("diffusers", theirs()[0], want, _loose(x.dtype)),
        ]

    return Case(
        name,
        "guided DDIM step",
        shape,
        x.dtype,
        ours,
        (Baseline("diffusers", theirs),),
        check,
        _bytes(x, m, out, following),
        overhead=math.prod(shape) <= math.prod(SMALL),
    )


def heun(name: str, setting: Setting, shape: tuple[int, ...]) -> Case:
    """Both rows of one Heun step in sigma: the first saves a history, the second reads it."""
    scheduler = _scheduler("HeunDiscreteScheduler")
    scheduler.set_timesteps(STEPS, device=setting.device)
    levels = [*scheduler.sigmas[::2].tolist()]  # [s0, s1, s1, ..., 0]: every level once
    plan = samplers.heun(schedules.from_alphas_cumprod(scheduler.alphas_cumprod), sigmas=levels)
    first = 2 * (ROW // 2)
    x, m1, m2 = (_tensor(k, shape, setting) for k in (0, 1, 2))
    x = x * levels[ROW // 2]
    middle, history, out = (torch.empty_like(x) for _ in range(3))
    table, times = plan.table, scheduler.timesteps

    def ours() -> Tensor:
        ops.step_out(x, m1, table=table, row=first, out=middle, s=history)
        return ops.step_out(middle, m2, h0=history, table=table, row=first + 1, out=out)

    def theirs() -> Tensor:
        scheduler._step_index = first
        half = scheduler.step(m1, times[first], x).prev_sample
        return scheduler.step(m2, times[first + 1], half).prev_sample

    def check() -> list[Check]:
        half, _, saved, _ = reference.step(x.cpu(), m1.cpu(), table=table, row=first)
        want = reference.step(half, m2.cpu(), h0=saved, table=table, row=first + 1)[0]
        ours()
        return [
            _compare("ours", out, want, 2 * _tolerance(x.dtype)),
            _compare("diffusers", theirs(), want, _loose(x.dtype)),
        ]

    moved = _bytes(x, m1, middle, history) + _bytes(m2, history, out)  # x~ enters the second row through h0 and m
    return Case(name, "Heun step, two rows", shape, x.dtype, ours, (Baseline("diffusers", theirs),), check, moved)


def loop(name: str, setting: Setting, shape: tuple[int, ...], kind: str) -> Case:
    """A whole run of 50 steps with a model that costs nothing: what a sampler adds to a model, per step."""
    scheduler, plan = _vp(f"{kind.upper()}Scheduler", setting)
    x, m = (_tensor(k, shape, setting) for k in (0, 1))
    seeds = _seeds(shape[0], setting)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return m

    def ours() -> object:
        return sampling.sample(model, x, plan, seeds=None if plan.deterministic else seeds)

    def theirs() -> Tensor:
        state = x
        for t in scheduler.timesteps:
            state = scheduler.step(model(state, t), t, state).prev_sample
        return state

    def check() -> list[Check]:
        want = x.cpu().double()
        for i, row in enumerate(plan.rows):
            noise = reference.randn(shape, seeds.cpu(), row.stream) if row.draws else None
            want = reference.step(want, m.cpu(), table=plan.table, row=i, noise=noise)[0]
        found = ours()
        assert isinstance(found, Tensor)
        checks = [_compare("ours", found, want, 20 * _tolerance(x.dtype))]
        if plan.deterministic:
            checks.append(_compare("diffusers", theirs(), want, 10 * _loose(x.dtype)))
        return checks

    return Case(
        name,
        f"{kind.upper()} loop, per step",
        shape,
        x.dtype,
        ours,
        (Baseline("diffusers", theirs),),
        check,
        _bytes(x, m, x),
        steps=STEPS,
        overhead=True,
    )


# ---------------------------------------------------------------------------------------------------- the list
def _cases() -> dict[str, Callable[[Setting], Case]]:
    half = torch.bfloat16
    table: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {
        "randn": (randn, {"shape": LARGE, "targets": True}),
        "noising": (noising, {"shape": LARGE, "targets": True}),
        "noising-v": (noising, {"shape": LARGE, "target": True, "targets": True}),
        "ddim": (step, {"shape": LARGE, "kind": "ddim", "goal": 10.0, "add": 1.3}),
        "ddim-x0": (step, {"shape": LARGE, "kind": "ddim", "want_x0": True, "goal": 8.0}),
        "ddpm": (step, {"shape": LARGE, "kind": "ddpm", "goal": 6.0}),
        "loss-v": (loss, {"shape": LARGE, "prediction": "v", "goal": 4.0}),
        "loss-v-stored": (loss, {"shape": LARGE, "prediction": "v", "stored": True}),
        "loss-eps": (loss, {"shape": LARGE, "prediction": "eps", "goal": 4.0}),
        "loss-eps-stored": (loss, {"shape": LARGE, "prediction": "eps", "stored": True}),
        "hybrid": (hybrid, {"shape": LARGE, "goal": 4.0}),
        "guided": (guided, {"shape": LARGE}),
        "heun": (heun, {"shape": LARGE}),
        "ddim-channels-last": (step, {"shape": LARGE, "kind": "ddim", "channels_last": True}),
        "ddpm-channels-last": (step, {"shape": LARGE, "kind": "ddpm", "channels_last": True}),
        "randn-bf16": (randn, {"shape": LARGE, "dtype": half}),
        "noising-bf16": (noising, {"shape": LARGE, "dtype": half}),
        "ddim-bf16": (step, {"shape": LARGE, "kind": "ddim", "dtype": half}),
        "ddpm-bf16": (step, {"shape": LARGE, "kind": "ddpm", "dtype": half}),
        "randn-small": (randn, {"shape": SMALL}),
        "ddim-small": (step, {"shape": SMALL, "kind": "ddim", "goal": 6.0, "goal_us": 8.0}),
        "ddpm-small": (step, {"shape": SMALL, "kind": "ddpm", "goal": 8.0, "goal_us": 16.0}),
        "guided-small": (guided, {"shape": SMALL}),
        "ddim-loop": (loop, {"shape": SMALL, "kind": "ddim"}),
        "ddpm-loop": (loop, {"shape": SMALL, "kind": "ddpm"}),
    }
    return {name: functools.partial(build, name, **options) for name, (build, options) in table.items()}


CASES = _cases()
