"""Pairs of two batches by minibatch optimal transport, as torchcfm draws them (arXiv 2302.00482, 2304.14772)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkern.compat.kit.rows import wide
from diffkern.objectives.transport import import_pot

__all__ = ["OTPlanSampler"]


class OTPlanSampler:
    """Draws pairs from a transport plan between two batches, cost |x0_i - x1_j|^2, by POT (extra ``ot``).

    ``method``: "exact", "sinkhorn" (entropy ``reg``), "unbalanced" (``reg``, ``reg_m``) or "partial" (``reg``). Plans
    are made on the CPU in float64; draws are from numpy's global generator, as the original's.
    ``normalize_cost`` divides the cost by its largest. ``num_threads`` is that of the exact solver. ``warn``: whether a
    plan without mass, which becomes the uniform one, is warned about.
    """

    def __init__(
        self,
        method: str,
        reg: float = 0.05,
        reg_m: float = 1.0,
        normalize_cost: bool = False,
        num_threads: int | str = 1,
        warn: bool = True,
    ) -> None:
        threads = {} if num_threads == 1 else {"numThreads": num_threads}  # POT 0.9.7 warns about it
        solvers: dict[str, Callable[[], Callable[..., Any]]] = {
            "exact": lambda: partial(import_pot().emd, numItermax=10_000_000, **threads),
            "sinkhorn": lambda: partial(import_pot().sinkhorn, reg=reg),
            "unbalanced": lambda: partial(import_pot().unbalanced.sinkhorn_knopp_unbalanced, reg=reg, reg_m=reg_m),
            "partial": lambda: partial(import_pot().partial.entropic_partial_wasserstein, reg=reg),
        }
        if method not in solvers:
            raise ValueError(f"Unknown method: {method}")
        self.ot_fn = solvers[method]()
        self.reg = reg
        self.reg_m = reg_m
        self.normalize_cost = normalize_cost
        self.warn = warn

    def get_map(self, x0: Tensor, x1: Tensor) -> Any:
        """The plan [B0, B1], a numpy array."""
        if not (x0.numel() and x1.numel()):
            raise AssertionError(f"x0 and x1 must hold at least one sample, got {list(x0.shape)} and {list(x1.shape)}")
        left, right = (x.detach().reshape(x.shape[0], -1) for x in (x0, x1))
        work = wide(left.dtype, right.dtype)
        cost = torch.cdist(left.to(work), right.to(work)) ** 2
        if self.normalize_cost:
            cost = cost / cost.max()
        host = cost.cpu().numpy()
        if not np.isfinite(host).all():
            raise ValueError("x0 and x1 must be finite for a transport plan, got a distance that is not")
        weights = (np.full(n, 1 / n) for n in host.shape)
        plan = self.ot_fn(*weights, host)
        if not np.isfinite(plan).all():
            largest = float(host.max())
            raise ValueError(f"reg must be larger for costs up to {largest:.3g}, got {self.reg}: no finite plan")
        if abs(plan.sum()) < 1e-8:
            if self.warn:
                warnings.warn("Numerical errors in OT plan, reverting to uniform plan.", stacklevel=2)
            plan = np.full_like(plan, 1 / plan.size)
        return plan

    def sample_map(self, pi: Any, batch_size: int, replace: bool = True) -> tuple[Any, Any]:
        """``batch_size`` pairs (i, j) of the plan [B0, B1], two integer arrays."""
        p = pi.flatten()
        choices = np.random.choice(p.size, p=p / p.sum(), size=batch_size, replace=replace)
        return np.divmod(choices, pi.shape[1])

    def sample_plan(self, x0: Tensor, x1: Tensor, replace: bool = True) -> tuple[Tensor, Tensor]:
        """``(x0[i], x1[j])`` for pairs (i, j) of the plan, as many as x0 has samples."""
        i, j = self.sample_map(self.get_map(x0, x1), x0.shape[0], replace=replace)
        return x0[i], x1[j]

    def sample_plan_with_labels(
        self, x0: Tensor, x1: Tensor, y0: Tensor | None = None, y1: Tensor | None = None, replace: bool = True
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """``(x0[i], x1[j], y0[i], y1[j])``; labels that are None stay so."""
        i, j = self.sample_map(self.get_map(x0, x1), x0.shape[0], replace=replace)
        return x0[i], x1[j], None if y0 is None else y0[i], None if y1 is None else y1[j]

    def sample_trajectory(self, X: Tensor) -> Any:
        """Populations X [B, times, ...], joined into trajectories by the plans between neighbours: a numpy array."""
        at = np.arange(X.shape[0])
        found = [X[:, 0][at].cpu().numpy()]
        plans = [self.get_map(X[:, k], X[:, k + 1]) for k in range(X.shape[1] - 1)]
        for k, plan in enumerate(plans):
            rows = plan[at] / plan[at].sum(1, keepdims=True)
            at = np.array([np.random.choice(plan.shape[1], p=row) for row in rows])
            found.append(X[:, k + 1][at].cpu().numpy())
        return np.stack(found, axis=1)
