"""Drop-ins that remember their last estimates: steps counted over ``sigmas`` [S + 1] on the CPU, one row a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from diffkern.compat.diffusers._carried import unrounded
from diffkern.compat.diffusers._engine import DropIn, Engine, Hot, Rows
from diffkern.compat.diffusers._host import check_numbers, host
from diffkern.compat.kit.rows import SIXTEEN, as_dtype, with_columns
from diffkern.compat.kit.tables import version

Value = TypeVar("Value")


class Past(NamedTuple):
    """The steps before each step. One of no length leaves the state and what is remembered as they are: what its level
    says comes again with the next step, and no line goes through two estimates at one level."""

    idle: list[bool]
    """Whether a step has no length."""
    earlier: list[int]
    """How many steps with a length come before it."""
    last: Tensor
    """[S]: the last of these (0 where there is none)."""

    def nearest(self, most: int) -> list[Tensor]:
        """The ``most`` last steps with a length before each step, the latest first, [S] each."""
        found = [self.last]
        while len(found) < most:
            found.append(self.last[found[-1]])
        return found[:most]


class MultistepEngine(Engine):
    """Finds the first step's index, keeps the rows, adds noise of the levels of the current timesteps."""

    own = ("hot", "carried", "unrounded")
    unrounded: tuple[tuple[Tensor, int, Tensor], ...] = ()
    """Estimates of 16 bits, their counts of writes, and what was rounded to them; as `Carried` for the state."""

    def start(self, scheduler: DropIn, timestep: Any) -> None:
        """The first step's index, from the host copy of the timesteps."""
        scheduler._step_index, self.carried = scheduler._begin_index, None
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
            value = None if known else clock.value(timestep)
            if self.exact and value == clock.times[0]:
                at, known = 0, True
            scheduler._step_index = at if known else self.index(scheduler, value)

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

    def earlier(self, scheduler: DropIn, count: int) -> list[Any]:
        """m1 and m2 as the histories of a step: a ring, in which the estimate of the n-th step lies in slot n % 2."""
        past, order = scheduler.model_outputs, scheduler.config.solver_order
        m1, m2 = past[-1] if order > 1 else None, past[-2] if order > 2 else None
        return [m2, m1] if count % 2 == 0 else [m1, m2]

    def wide(self, m: Tensor | None) -> Tensor | None:
        """An earlier estimate beside a float32 state: as it was before it was rounded, where it is that one."""
        if m is None or m.dtype not in SIXTEEN:
            return m
        for rounded, writes, before in self.unrounded:
            if rounded is m and writes == version(m):
                return unrounded(m, before) if m.requires_grad or m.is_inference() else before
        return as_dtype(m, torch.float32)

    def rounded(self, m0: Tensor | None, dtype: torch.dtype, given: Tensor | None = None) -> Tensor | None:
        """An estimate as the scheduler keeps it (``given``: the model output that it is), noted for `wide`."""
        if m0 is None or m0.dtype is dtype:
            return m0
        out = as_dtype(m0, dtype) if given is None else given
        self.unrounded = ((out, version(out), m0.detach()), *self.unrounded[:2])
        return out

    def remember(self, scheduler: DropIn, m0: Tensor | None, idle: bool) -> None:
        """Ends a step: its estimate goes behind the earlier ones, but that of a step of no length (`Past`)."""
        if idle:
            scheduler._step_index += 1
            return
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


def past_of(idle: Tensor) -> Past:
    """Of S steps, of which bool [S] have no length."""
    last = torch.where(idle, 0, torch.arange(len(idle))).cummax(0).values.roll(1)
    last[0] = 0
    return Past(idle.tolist(), ((~idle).cumsum(0) - (~idle).long()).tolist(), last)


def past_between(scheduler: DropIn, levels: Tensor, h: Tensor) -> Past:
    """Of the S steps between the levels [S + 1], of lengths h [S] in log-SNR; refuses a single level and NaN."""
    check_numbers(scheduler, levels.tolist())
    past = past_of((h == 0) | (levels[1:] == levels[:-1]))
    check_levels(scheduler, past)
    return past


def check_levels(scheduler: DropIn, past: Past) -> None:
    """Raise ValueError where there are more steps than one and a single level: no sample comes of that."""
    steps, config = len(past.idle), scheduler.config
    if steps > 1 and all(past.idle[:-1]):
        raise ValueError(
            f"sigmas must fall from noise to data, got {float(scheduler.sigmas[0]):g} at each of {steps} steps: take "
            f"fewer, or another timestep_spacing than {config.timestep_spacing!r} (num_train_timesteps is "
            f"{config.num_train_timesteps})"
        )


def check_repeats(scheduler: DropIn, past: Past, i: int) -> None:
    """Raise ValueError where the original divides by the length of the step before step i, which has none: its samples
    are NaN from there on. With ``exact`` such a step counts as none (`Past`); the last step is of first order."""
    config = scheduler.config
    if scheduler._engine.exact or config.solver_order < 2 or not 0 < i < len(past.idle) - 1 or not past.idle[i - 1]:
        return
    raise ValueError(
        f"sigmas must fall from noise to data, got {float(scheduler.sigmas[i]):g} for steps {i - 1} and {i}, from "
        f"where on {type(scheduler).__name__} of order {config.solver_order} gives NaN in diffusers: "
        "scheduler.diffkern(exact=True) takes no step between equal levels, or take fewer steps"
    )


def ring(past: Past, m1: Tensor, m2: Tensor) -> dict[str, Tensor]:
    """The columns of the weights of m1 and m2, [S] each, for `MultistepEngine.earlier`."""
    even = torch.tensor(past.earlier) % 2 == 0
    return {"e0": torch.where(even, m2, m1), "e1": torch.where(even, m1, m2)}


def alphas_and_sigmas(scheduler: DropIn) -> Tensor:
    """(alpha, sigma) at each of the S + 1 levels, float64."""
    return torch.stack(scheduler._sigma_to_alpha_sigma_t(host(scheduler.sigmas, exact=True)), 1)
