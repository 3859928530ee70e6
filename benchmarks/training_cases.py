"""Noise, noising, and the loss with its gradient: what training and sampling compute beside the network."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

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
from diffkern import _load, ops, reference, schedules, streams

__all__ = ["loss", "noising", "randn"]


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
