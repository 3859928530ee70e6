"""Drop-ins that remember their last estimates: steps counted over ``sigmas`` [S + 1] on the CPU, one row a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffkern.compat.diffusers._engine import DropIn, Engine, Hot, Rows
from diffkern.compat.diffusers._host import host
from diffkern.compat.kit.rows import with_columns

Value = TypeVar("Value")


class MultistepEngine(Engine):
    """Finds the first step's index, keeps the rows, adds noise of the levels of the current timesteps."""

    def start(self, scheduler: DropIn, timestep: Any) -> None:
        """The first step's index, from the host copy of the timesteps."""
        scheduler._step_index = scheduler._begin_index
        if scheduler._begin_index is None:
            clock = self.clock(scheduler.timesteps)
            at = clock.position(timestep)
            if at is None and isinstance(timestep, Tensor) and timestep.numel() != 1:
                raise ValueError(
                    "timestep must be one for all samples, as the scheduler remembers earlier steps, "
                    f"got shape {list(timestep.shape)}"
                )
            # A run from the first timestep starts there (the original skips a level where it stands twice, and runs
            # past the end); from another one, by the original's rule.
            known = at is not None and (at == 0 or self.exact)
            scheduler._step_index = at if known else self.index(scheduler, clock.value(timestep))

    def index(self, scheduler: DropIn, value: Any) -> int:
        """The original's rule: the second of equal timesteps, the last step for one that is none of them."""
        clock = self.clock(scheduler.timesteps)
        found = clock.positions.get(value, (len(clock.times) - 1,))
        return found[1] if len(found) > 1 else found[0]

    def kept(self, scheduler: DropIn, key: tuple[Any, ...], build: Callable[[], Value]) -> Value:
        """``build()`` for these sigmas, this config and the ``key``; the last step's is found first."""
        hot, sigmas, config = self.hot, scheduler.sigmas, scheduler._internal_dict
        if hot is not None and hot.key == key and hot.sources[0] is sigmas and hot.config is config:
            last: Value = hot.rows
            if sigmas._version == hot.version:
                return last
        found = self.tables.get(("rows", *key), build, sigmas, config)
        if not sigmas.is_inference():
            self.hot = Hot(key, found, config, (sigmas,))
        return found

    def earlier(self, scheduler: DropIn, i: int) -> list[Any]:
        """m1 and m2 as the histories of step i: a ring, in which the estimate of step j lies in slot j % 2."""
        past, order = scheduler.model_outputs, scheduler.config.solver_order
        m1, m2 = past[-1] if order > 1 else None, past[-2] if order > 2 else None
        return [m2, m1] if i % 2 == 0 else [m1, m2]

    def remember(self, scheduler: DropIn, m0: Tensor | None) -> None:
        """Ends a step: its estimate goes behind the earlier ones."""
        past = scheduler.model_outputs
        past[:-1] = past[1:]
        past[-1] = m0
        if scheduler.lower_order_nums < scheduler.config.solver_order:
            scheduler.lower_order_nums += 1
        scheduler._step_index += 1

    def taken(self, table: Tensor) -> Rows:
        """The rows for a model output that is m0 already."""
        return self.tables.get(("taken", id(table)), lambda: Rows(with_columns(table, p=0.0, q=1.0)), table)

    def add_noise(self, scheduler: DropIn, x: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x + sigma noise in one op."""
        sigmas = scheduler.sigmas
        if scheduler._begin_index is not None:  # before the first step the level it starts at, later the level reached
            at = scheduler._begin_index if scheduler._step_index is None else scheduler._step_index
            if x.shape[0] == 1 < timesteps.shape[0]:
                x = x.expand(timesteps.shape[0], *x.shape[1:])
            key = ("levels", scheduler.config.get("use_flow_sigmas"))
            return self.noised(x, noise, int(at), lambda: alphas_and_sigmas(scheduler), key, sigmas)
        scales = self.tables.get(
            ("by time", self.exact),
            lambda: self.by_time(scheduler),
            *(sigmas, self.clock(scheduler.timesteps), scheduler._internal_dict),
        )
        if timesteps.is_floating_point():
            timesteps = torch.tensor([int(t) if t == int(t) else -1 for t in timesteps.tolist()])
        # What is no timestep of a table reads row 0 or the last.
        index = timesteps.to(x.device).clamp(-1, len(scales) - 2) + 1
        return self.noised(x, noise, index, lambda: scales, ("times",), scales)

    def by_time(self, scheduler: DropIn) -> Tensor:
        """(alpha, sigma) by integer timestep + 1; row 0 and the last are those of values outside."""
        levels, times = alphas_and_sigmas(scheduler), self.clock(scheduler.timesteps).times
        most = max(int(max(times, default=0)) + 1, int(scheduler.config.num_train_timesteps))
        if self.exact and scheduler.num_inference_steps is None:
            order = list(range(most))  # before set_timesteps the sigmas rise and the timesteps fall
        else:
            order = [self.index(scheduler, t) for t in range(most)]
        none = len(times) - 1
        return levels[[none, *order, none]].contiguous()


def ring(m1: Tensor, m2: Tensor) -> dict[str, Tensor]:
    """The columns of the weights of m1 and m2, [S] each, for `MultistepEngine.earlier`."""
    even = torch.arange(len(m1)) % 2 == 0
    return {"e0": torch.where(even, m2, m1), "e1": torch.where(even, m1, m2)}


def alphas_and_sigmas(scheduler: DropIn) -> Tensor:
    """(alpha, sigma) at each of the S + 1 levels, float64."""
    return torch.stack(scheduler._sigma_to_alpha_sigma_t(host(scheduler.sigmas, exact=True)), 1)


def fits(m: Tensor, x: Tensor, *others: Tensor | None) -> bool:
    """Whether a bound op can take the operands as they are: one dtype and shape, no derivative asked for."""
    if m.shape != x.shape or forward_ad._current_level >= 0:
        return False
    dtype, grad, fit = x.dtype, torch.is_grad_enabled(), True
    for t in (m, x, *others):  # a loop: all() with a generator takes twice as long
        if t is not None and (t.dtype is not dtype or (grad and t.requires_grad)):
            fit = False
    return fit
