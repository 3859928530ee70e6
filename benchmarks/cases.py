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
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import (
    attention_cases,
    brownian_case,
    compat_cases,
    drop_in_cases,
    flow_matching_cases,
    group_norm_case,
    guided_diffusion_cases,
    sampler_cases,
    score_sde_cases,
    statistics_cases,
    torchcfm_cases,
)
from benchmarks.case import (
    Baseline,
    Case,
    Check,
    Setting,
    bytes_of,
    compare,
    cpu_target,
    job_seeds,
    loose,
    random_tensor,
    reference_noise,
    tight,
    try_compile,
)
from benchmarks.learned_case import learned
from benchmarks.logprob_case import logprob
from benchmarks.variational_case import hybrid
from diffkern import _load, ops, reference, samplers, sampling, schedules, streams
from diffkern.plan import Plan

__all__ = ["CASES", "LARGE", "SMALL", "Baseline", "Case", "Check", "Setting"]

LARGE = (16, 3, 256, 256)
SMALL = (1, 4, 64, 64)
STEPS = 50
ROW = 20
"""The row that the single-step cases run: any row in the middle does the same work."""


# ----------------------------------------------------------------------------------------------------- helpers
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
    seeds = job_seeds(shape[0], setting)
    level = str(_load.build_info().get("isa", "")).removesuffix("_bf16")
    target = {"avx512": 8.0, "avx2": 2.5}.get(level) if targets else None

    def ours() -> Tensor:
        return ops.randn(shape, seeds, dtype=dtype)

    def check() -> list[Check]:
        return [compare("ours", ours(), reference_noise(shape, 0), tight(dtype))]

    baseline = Baseline(
        "torch.randn",
        functools.partial(torch.randn, shape, dtype=dtype, device=setting.device),
        cpu_target(target, setting),
    )
    return Case(name, "randn", shape, dtype, ours, (baseline,), check, bytes_of(ours()))


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
    x0 = random_tensor(0, shape, setting, dtype)
    t = torch.randint(0, schedule.T, (batch,), generator=torch.Generator().manual_seed(1)).to(device)
    table = schedule.table("v", device)
    signal, sigma = (table[:, column].to(dtype) for column in (0, 1))
    fixed = job_seeds(batch, setting)

    def ours() -> object:
        seeds = torch.randint(-(2**63), 2**63 - 1, (batch,), device=device)
        return ops.noising(x0, table, t, seeds=seeds, stream=streams.TRAINING, want_target=target)

    def formula(x0: Tensor, eps: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        a, b = signal[t].view(-1, 1, 1, 1), sigma[t].view(-1, 1, 1, 1)
        x_t = a * x0 + b * eps
        return (x_t, a * eps - b * x0) if target else (x_t,)

    def eager(x0: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return formula(x0, torch.randn_like(x0), t)

    fused, why = try_compile(eager, setting, x0, t)

    def check() -> list[Check]:
        eps = reference_noise(shape, streams.TRAINING)
        want = reference.noising(x0.cpu(), table.cpu(), t.cpu(), noise=eps)
        got = ops.noising(x0, table, t, seeds=fixed, stream=streams.TRAINING, want_target=target)
        plain = formula(x0, eps.to(device, dtype), t)
        checks = []
        for what, i in (("x_t", 0), ("target", 1))[: 2 if target else 1]:
            ours_out = got[i]
            assert ours_out is not None
            checks.append(compare(f"ours {what}", ours_out, want[i], tight(dtype)))
            checks.append(compare(f"eager {what}", plain[i], want[i], loose(dtype)))
        if fused is not None:  # its noise is its own: what it must share is the distribution
            z = (fused(x0, t)[0].cpu().double() - want[0] + want[2] * _column(table, t, 1)) / _column(table, t, 1)
            checks.append(Check("torch.compile noise variance", abs(float(z.var()) - 1), 0.05))
        return checks

    goals = (8.0, 4.0) if targets else (None, None)
    baselines = (
        Baseline("eager", functools.partial(eager, x0, t), cpu_target(goals[0], setting)),
        Baseline("torch.compile", fused and functools.partial(fused, x0, t), cpu_target(goals[1], setting), why),
    )
    title = "noising + v target" if target else "noising"
    return Case(name, title, shape, dtype, ours, baselines, check, bytes_of(x0) * (3 if target else 2))


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
    x0, pred = random_tensor(0, shape, setting, dtype), random_tensor(3, shape, setting, dtype).requires_grad_()
    eps = ops.randn(shape, job_seeds(shape[0], setting), streams.TRAINING, dtype=dtype)
    t = torch.randint(0, schedule.T, (shape[0],), generator=torch.Generator().manual_seed(1)).to(device)
    coefficients = schedule.table(prediction, device)
    table = torch.cat([coefficients[:, 2:], torch.ones_like(coefficients[:, :1])], 1)
    u, v = (table[:, column].to(dtype) for column in (0, 1))
    seeds = job_seeds(shape[0], setting)
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

    fused, why = try_compile(value_of, setting, pred, x0, eps, t)

    def compiled() -> tuple[Tensor, Tensor]:
        assert fused is not None
        value = fused(pred, x0, eps, t)
        return value, torch.autograd.grad(value, pred)[0]

    def check() -> list[Check]:
        leaf = pred.detach().cpu().double().requires_grad_()
        exact = eps.cpu() if stored else reference_noise(shape, streams.TRAINING)
        value = reference.loss(leaf, x0.cpu(), table.cpu(), t.cpu(), noise=exact)
        (grad,) = torch.autograd.grad(value, leaf)
        checks = []
        known = [("ours", ours(), tight(dtype)), ("eager", eager(), loose(dtype))]
        if fused is not None:
            known.append(("torch.compile", compiled(), loose(dtype)))
        for who, (got, got_grad), tolerance in known:
            checks.append(compare(f"{who} value", got, value, tolerance))
            scale = 1 / float(grad.abs().max())  # gradients are tiny: compare them at the size of 1
            checks.append(compare(f"{who} gradient", got_grad.double() * scale, grad * scale, tolerance))
        return checks

    baselines = (
        Baseline("eager", eager, cpu_target(goal, setting), "eps is stored, its drawing not counted"),
        Baseline("torch.compile", fused and compiled, None, why),
    )
    moved = bytes_of(pred, pred) + (bytes_of(x0) if prediction != "eps" else 0) + (bytes_of(eps) if stored else 0)
    title = f"loss + gradient, {prediction}" + (", eps stored" if stored else "")
    return Case(name, title, shape, dtype, ours, baselines, check, moved, grad=True)


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
    x, m = (random_tensor(k, shape, setting, dtype).contiguous(memory_format=layout) for k in (0, 1))
    out = torch.empty_like(x)
    x0 = torch.empty_like(x) if want_x0 else None
    table, t = plan.table, scheduler.timesteps[ROW]
    draws = plan.rows[ROW].draws
    seeds = job_seeds(shape[0], setting) if draws else None

    def ours() -> Tensor:
        return ops.step_out(x, m, table=table, row=ROW, seeds=seeds, out=out, x0=x0)

    def theirs() -> Any:
        return scheduler.step(m, t, x)

    def check() -> list[Check]:
        noise = reference_noise(shape, plan.rows[ROW].stream) if draws else None
        want, clean, _, _ = reference.step(x.cpu(), m.cpu(), table=table, row=ROW, noise=noise)
        ours()
        checks = [compare("ours", out, want, tight(dtype))]
        if x0 is not None:
            checks.append(compare("ours x0", x0, clean, tight(dtype)))
        if not draws:
            found = theirs()
            checks.append(compare("diffusers", found.prev_sample, want, loose(dtype)))
            checks.append(compare("diffusers x0", found.pred_original_sample, clean, 2 * loose(dtype)))
        else:  # the scheduler draws its own: make the same draw, and give it to ours
            device = torch.device(setting.device)
            drawn = torch.randn(
                shape, generator=torch.Generator(device).manual_seed(5), device=device, dtype=dtype
            ).contiguous(memory_format=layout)
            found = scheduler.step(m, t, x, generator=torch.Generator(device).manual_seed(5))
            same = ops.step(x, m, table=table, row=ROW, noise=drawn)[0]
            checks.append(compare("diffusers, same noise", found.prev_sample, same, loose(dtype)))
        return checks

    baselines = [Baseline("diffusers", theirs, cpu_target(goal, setting))]
    if add is not None:
        note = f"ours may take {add:g}x its time"
        baselines.append(
            Baseline("torch.add", functools.partial(torch.add, x, m, out=out), cpu_target(1 / add, setting), note)
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
        bytes_of(x, m, out) + (bytes_of(x) if want_x0 else 0),
        goal_us=goal_us if setting.cpu else None,
        overhead=math.prod(shape) <= math.prod(SMALL),
    )


def guided(name: str, setting: Setting, shape: tuple[int, ...]) -> Case:
    """A guided DDIM step as pipelines do it: split [2B], combine, step, and the next [2B] input."""
    scheduler, plan = _vp("DDIMScheduler", setting)
    weight = 7.5
    table, t = plan.with_guidance(weight).table, scheduler.timesteps[ROW]
    x = random_tensor(0, shape, setting)
    m = random_tensor(1, (2 * shape[0], *shape[1:]), setting)
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
            compare("ours", out, want, 10 * tight(x.dtype)),
            compare("ours next", following, torch.cat([out, out]), 0.0),
            compare("diffusers", theirs()[0], want, loose(x.dtype)),
        ]

    return Case(
        name,
        "guided DDIM step",
        shape,
        x.dtype,
        ours,
        (Baseline("diffusers", theirs),),
        check,
        bytes_of(x, m, out, following),
        overhead=math.prod(shape) <= math.prod(SMALL),
    )


def heun(name: str, setting: Setting, shape: tuple[int, ...]) -> Case:
    """Both rows of one Heun step in sigma: the first saves a history, the second reads it."""
    scheduler = _scheduler("HeunDiscreteScheduler")
    scheduler.set_timesteps(STEPS, device=setting.device)
    levels = [*scheduler.sigmas[::2].tolist()]  # [s0, s1, s1, ..., 0]: every level once
    plan = samplers.heun(schedules.from_alphas_cumprod(scheduler.alphas_cumprod), sigmas=levels)
    first = 2 * (ROW // 2)
    x, m1, m2 = (random_tensor(k, shape, setting) for k in (0, 1, 2))
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
            compare("ours", out, want, 2 * tight(x.dtype)),
            compare("diffusers", theirs(), want, loose(x.dtype)),
        ]

    moved = bytes_of(x, m1, middle, history) + bytes_of(m2, history, out)  # x~ enters the second row through h0 and m
    return Case(name, "Heun step, two rows", shape, x.dtype, ours, (Baseline("diffusers", theirs),), check, moved)


def loop(name: str, setting: Setting, shape: tuple[int, ...], kind: str) -> Case:
    """A whole run of 50 steps with a model that costs nothing: what a sampler adds to a model, per step."""
    scheduler, plan = _vp(f"{kind.upper()}Scheduler", setting)
    x, m = (random_tensor(k, shape, setting) for k in (0, 1))
    seeds = job_seeds(shape[0], setting)

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
        checks = [compare("ours", found, want, 20 * tight(x.dtype))]
        if plan.deterministic:
            checks.append(compare("diffusers", theirs(), want, 10 * loose(x.dtype)))
        return checks

    return Case(
        name,
        f"{kind.upper()} loop, per step",
        shape,
        x.dtype,
        ours,
        (Baseline("diffusers", theirs),),
        check,
        bytes_of(x, m, x),
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
        "learned-step": (learned, {"shape": LARGE, "goal": 4.0}),
        "logprob": (logprob, {"shape": LARGE, "goal": 4.0}),
        "logprob-grad": (logprob, {"shape": LARGE, "gradient": True, "goal": 4.0}),
        "loss-v": (loss, {"shape": LARGE, "prediction": "v", "goal": 4.0}),
        "loss-v-stored": (loss, {"shape": LARGE, "prediction": "v", "stored": True}),
        "loss-eps": (loss, {"shape": LARGE, "prediction": "eps", "goal": 4.0}),
        "loss-eps-stored": (loss, {"shape": LARGE, "prediction": "eps", "stored": True}),
        "hybrid": (hybrid, {"shape": LARGE, "goal": 4.0}),
        "noise-sum": (brownian_case.noise_sum, {"shape": LARGE, "goal": 4.0}),
        "brownian": (brownian_case.increments, {"shape": SMALL, "goal": 4.0}),
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
        **sampler_cases.TABLE,
        **statistics_cases.TABLE,
        **group_norm_case.TABLE,
        **drop_in_cases.TABLE,
        **compat_cases.TABLE,
        **score_sde_cases.TABLE,
        **flow_matching_cases.TABLE,
        **guided_diffusion_cases.TABLE,
        **torchcfm_cases.TABLE,
        **attention_cases.TABLE,
    }
    return {name: functools.partial(build, name, **options) for name, (build, options) in table.items()}


CASES = _cases()
