"""Importance resampling of discrete times by the size of their loss; see `objectives.time_sampling`."""

from __future__ import annotations

import torch
from torch import Tensor

from diffkern.integers import integer
from diffkern.modes import neutral, readable
from diffkern.objectives._time_sampler import TimeSampler, require
from diffkern.schedules.base import Schedule, as_time
from diffkern.schedules.discrete import DiscreteSchedule


class LossSecondMoment(TimeSampler):
    """Importance resampling of discrete times: p_t ~ sqrt(mean of the last losses^2 at t) (arXiv 2102.09672, eq. 18).

        sampler = LossSecondMoment(schedule.T)
        t = sampler.sample(B, schedule)
        losses = simple_loss(..., reduction="none")
        (losses * sampler.weights(t)).mean().backward()
        sampler.update(t, losses)

    Uniform until every t has `history` losses (10 there); then mixed with a share `uniform_share` (0.001 there) of the
    uniform distribution, so that no weight exceeds 1/uniform_share. In distributed training give `update` the gathered
    losses of all processes. The state lives on `device`; `state_dict` and `load_state_dict` save and restore it.
    """

    name = "loss_second_moment"

    def __init__(
        self,
        T: int = 1000,
        history: int = 10,
        uniform_share: float = 0.001,
        stratified: bool = False,
        permute: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        T, history = integer("T", T), integer("history", history)
        if not 0.0 < uniform_share <= 1.0:
            raise ValueError(f"uniform_share must lie in (0, 1], got {uniform_share}")
        self.T, self.history, self.uniform_share = T, history, uniform_share
        self.stratified, self.permute = stratified, permute
        with neutral():
            self._losses = torch.zeros(T, history, dtype=torch.float64, device=device)
            self._counts = torch.zeros(T, dtype=torch.int64, device=device)

    @property
    def warm(self) -> bool:
        """Whether every t has its `history` losses, so that the density is no longer uniform."""
        return bool((self._counts >= self.history).all())

    def probabilities(self) -> Tensor:
        """p_t, [T] float64 on the state's device; made without reading anything back from it."""
        size = self._losses.square().mean(1).sqrt()
        total = size.sum()
        share = (1.0 - self.uniform_share) * size / total + self.uniform_share / self.T
        ready = (self._counts >= self.history).all() & (total > 0)
        return torch.where(ready, share, 1.0 / self.T)

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Take in the losses [B] that the times t [B] had; a t that comes more than once counts as often, in order."""
        if t.ndim != 1 or losses.shape != t.shape:
            raise ValueError(f"losses must have the shape of t, [B], got {list(losses.shape)} and {list(t.shape)}")
        self._check(t)
        losses = losses.detach()
        finite = torch.isfinite(losses)
        if readable(losses) and not bool(finite.all()):
            raise ValueError(f"losses must be finite, got {losses[~finite][0].item()}")
        order = torch.argsort(t, stable=True)
        t, losses = t[order].to(self._counts.device), losses[order].to(self._losses)
        # Each t's losses in their order: the rank within the run of equal t, counted from the end for "the last ones".
        new = torch.bincount(t, minlength=self.T)
        rank = torch.arange(len(t), device=t.device) - (new.cumsum(0) - new)[t]
        last = rank >= new[t] - self.history
        slot = (self._counts[t] + rank) % self.history
        self._losses[t[last], slot[last]] = losses[last]
        self._counts += new

    def quantile(self, u: Tensor) -> Tensor:
        """The index t with cdf(t) <= u < cdf(t + 1), as float64."""
        edges = self.probabilities().cumsum(0).to(u.device)
        return torch.searchsorted(edges, u, right=True).clamp(max=self.T - 1).to(torch.float64)

    def cdf(self, x: Tensor) -> Tensor:
        """The sum of p_t over t < x."""
        edges = torch.nn.functional.pad(self.probabilities().cumsum(0), (1, 0)).to(x.device)
        return edges[x.ceil().clamp(0, self.T).to(torch.int64)]

    def pdf(self, x: Tensor) -> Tensor:
        """p_t."""
        return self.probabilities().to(x.device)[x.to(torch.int64)]

    def times(self, u: Tensor, schedule: Schedule | None = None) -> Tensor:
        """The index of each u, int64."""
        self._check_schedule(schedule)
        return self.quantile(u).to(torch.int64)

    def density(self, t: Tensor, schedule: Schedule | None = None) -> Tensor:
        """p_t."""
        self._check_schedule(schedule)
        t = t if isinstance(t, Tensor) else as_time(t)
        self._check(t)
        return self.pdf(t)

    def weights(self, t: Tensor, schedule: Schedule | None = None) -> Tensor:
        """1/(T p_t): the weight that keeps the expected loss that of uniform times."""
        return 1.0 / (self.T * self.density(t, schedule))

    def state_dict(self) -> dict[str, Tensor]:
        """The last losses [T, history] and how many each t has had [T]."""
        return {"losses": self._losses.clone(), "counts": self._counts.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore `state_dict`; ValueError for one of another T or history."""
        for key, own in (("losses", self._losses), ("counts", self._counts)):
            if key not in state or state[key].shape != own.shape:
                found = f"shape {list(state[key].shape)}" if key in state else "nothing"
                raise ValueError(f"state[{key!r}] must have shape {list(own.shape)}, got {found}")
        self._losses.copy_(state["losses"])
        self._counts.copy_(state["counts"])

    def _check(self, t: Tensor) -> None:
        if t.is_floating_point():
            raise ValueError(f"t must be an integer index, got dtype {t.dtype}")
        require((t >= 0) & (t < self.T), t, f"be an integer in 0..{self.T - 1} (T = {self.T})")

    def _check_schedule(self, schedule: Schedule | None) -> None:
        if schedule is not None and (not isinstance(schedule, DiscreteSchedule) or schedule.T != self.T):
            raise ValueError(f"schedule must be discrete with T = {self.T} for loss_second_moment, got {schedule!r}")
