"""EDM's sampler and loss (arXiv 2206.00364), signatures of its authors' code, on fused ops (docs/compat-edm.md).

from diffkern.compat.edm import edm_sampler, EDMLoss
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffkern import ops
from diffkern.compat.kit import loop
from diffkern.compat.kit.rows import check_room
from diffkern.modes import kept
from diffkern.plan import Plan
from diffkern.samplers.nodes import Coordinates, Node, grid
from diffkern.samplers.runge_kutta import heun, tableau_plan
from diffkern.schedules import grids
from diffkern.schedules.makers import edm
from diffkern.tableaus import HEUN

__all__ = ["EDMLoss", "edm_sampler"]

Levels = tuple[float, ...]
Churn = tuple[float, tuple[float, float], float]


def edm_sampler(
    net: Any,
    latents: Tensor,
    class_labels: Any = None,
    randn_like: Callable[[Tensor], Tensor] = torch.randn_like,
    num_steps: int = 18,
    sigma_min: float = 0.002,
    sigma_max: float = 80,
    rho: float = 7,
    S_churn: float = 0,
    S_min: float = 0,
    S_max: float = math.inf,
    S_noise: float = 1,
) -> Tensor:
    """Images [B, ...] float64 from standard normal ``latents``: `samplers.heun` on Karras levels, algorithm 2.

    ``net(x, sigma, class_labels)`` is called with the float64 state and a 0-dim float64 sigma, and returns the denoised
    estimate in any dtype. It has ``sigma_min``, ``sigma_max`` and ``round_sigma``, which rounds the levels to those it
    knows. ``randn_like`` gives float64 noise and is asked before every step, also where the churn adds none.
    2 num_steps - 1 calls, one op each; the levels are read to the host before the loop.
    """
    low, high = max(float(sigma_min), float(net.sigma_min)), min(float(sigma_max), float(net.sigma_max))
    sigmas = grids.karras_sigmas(num_steps, low, high, float(rho))[:-1]
    levels = (*_rounded(net, sigmas.tolist(), latents), 0.0)
    churn: Churn = (*loop.churn_within(float(S_churn), float(S_min), float(S_max)), float(S_noise))
    plan = _heun(levels, churn)
    hats = [plan.rows[rows.start].time for rows in plan.steps]
    known = _rounded(net, hats, latents)
    if known != hats:
        plan = _rounded_heun(levels, churn, tuple(zip(hats, known, strict=True)))
    rows = plan.rows
    times = torch.tensor([row.time for row in rows], dtype=torch.float64, device="cpu").to(latents.device).unbind()

    def call(x: Tensor, i: int) -> Tensor:
        m: Tensor = net(x, times[i], class_labels)
        return m

    def noise(dtype: torch.dtype, i: int) -> Tensor | None:
        # Asked with the first state, whose layout decides which element gets which draw.
        return randn_like(first) if rows[i].ends_step and i + 1 < len(rows) else None

    first = latents.to(torch.float64) * levels[0]
    x = loop.added(first, randn_like(first), loop.churn_before_start(plan, levels[0]))
    return loop.run(loop.of_plan(plan), x, call, noise)


def _rounded(net: Any, levels: list[float], like: Tensor) -> list[float]:
    """What the network makes of these levels."""
    rounded: list[float] = net.round_sigma(torch.tensor(levels, dtype=torch.float64, device=like.device)).tolist()
    return rounded


@kept(64)
def _heun(levels: Levels, churn: Churn) -> Plan:
    return heun(edm(), sigmas=levels, prediction="x0", churn=churn[0], churn_range=churn[1], churn_noise=churn[2])


@dataclass(frozen=True)
class _Rounding(Coordinates):
    """Coordinates whose churned levels are the network's own."""

    known: tuple[tuple[float, float], ...] = ()

    def nodes(
        self, values: Sequence[float], times: Sequence[float] | None = None, *, clamp: bool = False
    ) -> list[Node]:
        known = dict(self.known)
        return super().nodes([known.get(v, v) for v in values], times, clamp=clamp)


@kept(64)
def _rounded_heun(levels: Levels, churn: Churn, known: tuple[tuple[float, float], ...]) -> Plan:
    space, nodes, end = grid("heun", edm(), None, "x0", levels, None, "linspace", None)
    own = _Rounding(space.schedule, space.prediction, space.clip, space.in_time, known)
    return tableau_plan("heun", HEUN, own, nodes, end, churn, end_stage=False)


class EDMLoss:
    """``loss(net, images, labels, augment_pipe)``: the unreduced weighted error [B, C, H, W] of a denoiser.

        sigma = exp(P_mean + P_std z) for each sample, lambda = (sigma^2 + sigma_data^2)/(sigma sigma_data)^2,
        loss = lambda (net(y + sigma n, sigma) - y)^2

    z, then n are drawn from torch's generator as EDM's code does; y is the augmented image. Noise is added in one op.
    (`diffkern.edm_loss` is the fused loss of the raw network, with noise by address and the mean taken.)
    """

    def __init__(self, P_mean: float = -1.2, P_std: float = 1.2, sigma_data: float = 0.5) -> None:
        self.P_mean, self.P_std, self.sigma_data = P_mean, P_std, sigma_data

    def __call__(
        self, net: Callable[..., Tensor], images: Tensor, labels: Any = None, augment_pipe: Any = None
    ) -> Tensor:
        z = torch.randn([images.shape[0], 1, 1, 1], device=images.device)
        sigma = (z * self.P_std + self.P_mean).exp()
        weight = (sigma**2 + self.sigma_data**2) / (sigma * self.sigma_data) ** 2
        y, augment_labels = (images, None) if augment_pipe is None else augment_pipe(images)
        check_room(y.dtype, self, sigma)
        table = torch.zeros(y.shape[0], 4, dtype=torch.float64, device=y.device)
        table[:, 0] = 1.0
        table[:, 1] = sigma.flatten()
        noised = ops.noising(y, table, noise=torch.randn_like(y))[0]
        return weight * (net(noised, sigma, labels, augment_labels=augment_labels) - y) ** 2
