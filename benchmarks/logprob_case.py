"""The case of the log-density of a step: what a policy gradient on samplers asks for, once a step and image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from benchmarks.case import (
    Baseline,
    Case,
    Check,
    Setting,
    bytes_of,
    compare,
    cpu_target,
    loose,
    random_tensor,
    tight,
    try_compile,
)
from diffkern import ops, reference, samplers, schedules
from diffkern.plan import COLUMNS

__all__ = ["logprob"]

ROW = 20
"""A step in the middle of 50."""


def logprob(
    name: str, setting: Setting, shape: tuple[int, ...], gradient: bool = False, goal: float | None = None
) -> Case:
    """ln p(x' | x) of a DDPM step for given x' and model output, float32, and its gradient times an advantage a sample.

    Eager is the formula of DDPO's step (arXiv 2305.13301) on Python floats: the mean of the step, then
    -(x' - mean)^2 / (2 std^2) - ln std - ln(2 pi) / 2, summed over each sample.
    """
    table = samplers.ddpm(schedules.linear(), 50).table[ROW : ROW + 1].contiguous()
    c = dict(zip(COLUMNS, table[0].tolist(), strict=True))
    x, m = random_tensor(0, shape, setting), random_tensor(1, shape, setting).requires_grad_(gradient)
    z, advantage = random_tensor(2, shape, setting), random_tensor(3, shape[:1], setting)

    def mean_of(x: Tensor, m: Tensor) -> Tensor:
        return c["a"] * x + c["b"] * (c["p"] * x + c["q"] * m) + c["d"] * m

    after = (mean_of(x, m.detach()) + c["g"] * z).contiguous()

    def value_of(after: Tensor, x: Tensor, m: Tensor) -> Tensor:
        log_prob = -((after - mean_of(x, m)) ** 2) / (2 * c["g"] ** 2) - math.log(c["g"]) - math.log(2 * math.pi) / 2
        return log_prob.flatten(1).sum(1)

    def with_gradient(value: Tensor) -> tuple[Tensor, ...]:
        return (value, *torch.autograd.grad(value, m, advantage)) if gradient else (value,)

    def ours() -> tuple[Tensor, ...]:
        return with_gradient(ops.step_logprob(after, x, m, table=table))

    def eager() -> tuple[Tensor, ...]:
        return with_gradient(value_of(after, x, m))

    fused, why = try_compile(value_of, setting, after, x, m)

    def compiled() -> tuple[Tensor, ...]:
        assert fused is not None
        return with_gradient(fused(after, x, m))

    def check() -> list[Check]:
        leaf = m.detach().cpu().double().requires_grad_()
        exact = reference.step_logprob(after.cpu(), x.cpu(), leaf, table=table)
        got, theirs = ours(), eager()
        checks = [compare("ours", got[0], exact, tight(torch.float32))]
        checks.append(compare("eager", theirs[0], exact, loose(torch.float32)))
        if gradient:
            (grad,) = torch.autograd.grad(exact, leaf, advantage.cpu().double())
            scale = 1 / float(grad.abs().max())
            checks.append(compare("ours gradient", got[1].cpu().double() * scale, grad * scale, tight(torch.float32)))
            found = theirs[1].cpu().double() * scale
            checks.append(compare("eager gradient", found, grad * scale, loose(torch.float32)))
        return checks

    baselines = (
        Baseline("eager", eager, cpu_target(goal, setting)),
        Baseline("torch.compile", fused and compiled, None, why),
    )
    title = "log-density of a DDPM step" + (" + gradient" if gradient else "")
    moved = bytes_of(after, x, m) + (bytes_of(m) if gradient else 0)
    return Case(name, title, shape, torch.float32, ours, baselines, check, moved, grad=gradient)
