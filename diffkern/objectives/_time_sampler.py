"""What every sampler of training times has in common; reached through `diffkern.objectives.time_sampling`."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffkern import streams
from diffkern.integers import integer
from diffkern.modes import readable
from diffkern.records import parse
from diffkern.schedules.base import Schedule
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.exploding import EDMSchedule

if TYPE_CHECKING:
    from diffkern.ops import Seeds


class TimeSampler(ABC):
    """A density of training times, given by its quantile function; `diffkern.objectives.time_sampling` lists them."""

    name: str
    stratified: bool
    """Evenly spread over the batch: u_i = (i + offset)/B."""
    permute: bool
    """Where stratified: in random order instead of rising."""

    def to_dict(self) -> dict[str, Any]:
        """Kind and constants as plain data for JSON; ValueError with the remedy for one with a state."""
        from diffkern.objectives.stored import times_to_dict  # which knows every kind

        return times_to_dict(self)

    @staticmethod
    def from_dict(data: object) -> TimeSampler:
        """What `to_dict` wrote, equal to it; ValueError naming the field for anything else."""
        from diffkern.objectives.stored import times_from_dict

        return times_from_dict(data)

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @staticmethod
    def from_json(text: str) -> TimeSampler:
        """What `to_json` wrote."""
        return TimeSampler.from_dict(parse(text, "JSON", "times"))

    @abstractmethod
    def quantile(self, u: Tensor) -> Tensor:
        """The value below which the share u of the draws lies, on the sampler's own axis."""

    @abstractmethod
    def cdf(self, x: Tensor) -> Tensor:
        """The share of draws below x: the inverse of `quantile`."""

    @abstractmethod
    def pdf(self, x: Tensor) -> Tensor:
        """The density at x, on the sampler's own axis; the derivative of `cdf`."""

    @abstractmethod
    def times(self, u: Tensor, schedule: Schedule | None = None) -> Tensor:
        """The times of the uniform numbers u: int64 for a discrete schedule, else float64; no schedule: own axis."""

    @abstractmethod
    def density(self, t: Tensor, schedule: Schedule | None = None) -> Tensor:
        """Probability of each t (discrete schedule) or density in t, float64; without a schedule on the own axis."""

    def sample(
        self,
        n: int,
        schedule: Schedule | None = None,
        *,
        seeds: Seeds | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """n times [n] on the schedule's axis, int64 for a discrete schedule, else float64.

        With `seeds`, [n] or an integer, by address: t_i is a function of seeds[i] (stratified: of the batch's seeds, as
        it has to be). Otherwise from torch's generator.
        """
        return self.times(self.uniforms(n, seeds=seeds, generator=generator, device=device), schedule)

    def uniforms(
        self,
        n: int,
        *,
        seeds: Seeds | None = None,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """The uniform numbers in (0, 1) behind `sample`, [n] float64."""
        from diffkern.draws import uniform_by_address  # with the ops, which densities do without
        from diffkern.ops import as_seeds

        n = integer("n", n, 0)
        if seeds is not None and generator is not None:
            raise ValueError("seeds or generator must be given, not both")
        if seeds is not None:
            seeds = as_seeds(seeds, n, seeds.device if isinstance(seeds, Tensor) else device)
            u = uniform_by_address(seeds, streams.TIME)
        else:
            device = generator.device if device is None and generator is not None else device
            u = torch.rand(n, dtype=torch.float64, generator=generator, device=device)
        if self.stratified and n > 0:
            rank = torch.argsort(torch.argsort(u)) if self.permute else torch.arange(n, device=u.device)
            offset = (
                torch.rand(1, dtype=torch.float64, generator=generator, device=u.device)
                if seeds is None
                else uniform_by_address(seeds[:1], streams.TIME + 1)
            )
            u = (rank + offset) / n
        return u.clamp(2.0**-54, 1.0 - 2.0**-53)  # rand can be 0, where a log-normal has no finite value

    def weights(self, t: Tensor, schedule: Schedule | None = None) -> Tensor:
        """1/p relative to uniform times: E[w(t) L(t)] under this density is E[L(t)] under uniform times.

        For noise levels without an upper bound (``log_normal`` on sigma itself) it is 1/density.
        """
        p = self.density(t, schedule)
        if isinstance(schedule, DiscreteSchedule):
            return 1.0 / (p * schedule.T)
        if schedule is None or isinstance(schedule, EDMSchedule):
            return 1.0 / p
        low, high = schedule.time_range
        return 1.0 / (p * (high - low))


def require(ok: Tensor, t: Tensor, rule: str) -> None:
    """On the CPU, where looking costs nothing, raise the rule with the first value that breaks it."""
    if readable(t) and not bool(ok.all()):
        raise ValueError(f"t must {rule}, got {t[~ok].flatten()[0].item()}")


def level_index(schedule: DiscreteSchedule, t: Tensor) -> Tensor:
    """The index t as float64, checked."""
    if t.is_floating_point():
        raise ValueError(f"t must be an integer index for the schedule {schedule.name}, got dtype {t.dtype}")
    require((t >= 0) & (t < schedule.T), t, f"be an integer in 0..{schedule.T - 1} (T = {schedule.T})")
    return t.to(torch.float64)
