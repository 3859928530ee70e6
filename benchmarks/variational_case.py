"""The case of the variational bound: the hybrid loss of a learned variance."""

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
    job_seeds,
    random_tensor,
    reference_noise,
    tight,
    try_compile,
)
from diffkern import ops, reference, schedules, streams
from diffkern.objectives import variational

__all__ = ["hybrid"]


def hybrid(name: str, setting: Setting, shape: tuple[int, ...], goal: float | None = None) -> Case:
    """The hybrid loss of a learned variance and its gradient. Eager is the form of guided-diffusion's training losses:
    posterior means, KL and decoder for every sample, one chosen by t; eps and x_t are stored from the noising."""
    schedule, device = schedules.linear(), setting.device
    x0 = (random_tensor(0, shape, setting) / 3).clamp(-1, 1)
    eps = reference_noise(shape, streams.TRAINING).to(device, torch.float32)
    noise_of_model = random_tensor(3, shape, setting)
    pred = torch.cat([eps + noise_of_model / 10, noise_of_model.flip(0).tanh()], dim=1).requires_grad_()
    t = torch.randint(0, schedule.T, (shape[0],), generator=torch.Generator().manual_seed(1)).to(device)
    t[0] = 0  # one sample meets the decoder
    seeds = job_seeds(shape[0], setting)
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

    fused, why = try_compile(value_of, setting, pred, x0, x_t, eps, t)

    def compiled() -> tuple[Tensor, Tensor]:
        assert fused is not None
        value = fused(pred, x0, x_t, eps, t)
        return value, torch.autograd.grad(value, pred)[0]

    def check() -> list[Check]:
        leaf = pred.detach().cpu().double().requires_grad_()
        exact_table = variational.variational_table(
            schedule, simple_weight=1.0, vlb_weight=vlb_weight, mean_gradient=False
        )
        noise = reference_noise(shape, streams.TRAINING)
        exact, _ = reference.variational(leaf, x0.cpu(), exact_table, t.cpu(), noise=noise)
        (grad,) = torch.autograd.grad(exact, leaf)
        (got, got_grad), scale, tolerance = ours(), 1 / float(grad.abs().max()), tight(torch.float32)
        return [
            compare("ours value", got, exact, tolerance),
            compare("ours gradient", got_grad.double() * scale, grad * scale, tolerance),
            # Its normal distribution is an approximation, and cut off far out, so its decoder's gradient is far off.
            compare("eager value", eager()[0], exact, 0.01),
        ]

    baselines = (
        Baseline("eager", eager, cpu_target(goal, setting), "guided-diffusion's form; eps and x_t stored"),
        Baseline("torch.compile", fused and compiled, None, why),
    )
    title = "hybrid loss + gradient, learned variance"
    return Case(name, title, shape, torch.float32, ours, baselines, check, bytes_of(pred, pred, x0), grad=True)
