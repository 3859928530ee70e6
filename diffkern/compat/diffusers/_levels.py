"""Drop-ins whose rows belong to steps: row i takes the state from sigmas[i] to sigmas[i + 1].

Two states occur. Karras et al. (arXiv 2206.00364): x = x0 + sigma z, and the model is given x / sqrt(sigma^2 + 1).
Flows (arXiv 2209.03003): x = (1 - sigma) x0 + sigma z, and the model is given x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from diffkern import ops
from diffkern.compat.diffusers._engine import (
    Fused,
    Hot,
    Value,
    as_dtype,
    column,
    host,
    plan_of,
    promote,
    table_of,
    version,
    with_column,
    written,
)
from diffkern.plan import Plan

Levels = Tensor
"""The sigmas, float64 on the CPU."""


class FusedSigma(Fused):
    """The step that a loop is at, found without a device read, and what depends on a level alone."""

    sigmas: Tensor
    config: Any
    step_index: int | None
    begin_index: int | None
    index_for_timestep: Callable[..., int]
    _internal_dict: Any
    _step_index: int
    prev_derivative: Any
    sample: Any
    dt: Any
    state_in_first_order: bool

    # ---------------------------------------------------------------------------------------------- which row
    def _init_step_index(self, timestep: Any) -> None:
        self._step_index = self._dk_index(timestep) if self.begin_index is None else self.begin_index

    def _dk_index(self, timestep: Any) -> int:
        """The step of a timestep: the second of those that share it, as the original says, for image to image."""
        clock = self._dk_clock
        found = clock.positions.get(clock.value(timestep))
        if found is None:  # rounded otherwise than the timesteps, or the original's exception
            return self.index_for_timestep(timestep)
        return found[1] if len(found) > 1 else found[0]

    def _dk_indices(self, timesteps: Tensor, device: torch.device) -> Tensor:
        """The steps of a tensor of timesteps, int64 on ``device``; a device's own are searched there, without a read,
        and one that is no timestep gives -1 (NaN in the op)."""
        if timesteps.device.type == "cpu":
            return torch.tensor([self._dk_index(t) for t in timesteps.tolist()], dtype=torch.int64, device=device)
        return self._dk_search(timesteps, device)

    def _dk_search(self, timesteps: Tensor, device: torch.device) -> Tensor:
        clock = self._dk_clock
        chosen = self._dk_cached(
            ("chosen", str(device)),
            (self.timesteps,),
            lambda: torch.tensor([self._dk_index(t) for t in clock.times], dtype=torch.int64).to(device),
        )
        same = timesteps.to(device)[:, None] == self.timesteps.to(device)[None]
        return torch.where(same.any(1), chosen[same.int().argmax(1)], -1)

    def _dk_at(self, timestep: Any, device: torch.device) -> tuple[int, Tensor | None]:
        """(row, None) in the loop under way; (0, index) for one timestep a sample, while no loop is."""
        if self.step_index is None:
            own = isinstance(timestep, Tensor) and timestep.dim() == 1 and timestep.numel() > 1
            if own and self.begin_index is None and self._dk_clock.position(timestep) is None:
                return 0, self._dk_indices(timestep, device)
            self._init_step_index(timestep)
        assert self.step_index is not None
        return self.step_index, None

    def _dk_one(self, timestep: Any, sample: Tensor) -> int:
        """The row, for schedulers that remember the steps before: one timestep for all samples."""
        row, index = self._dk_at(timestep, sample.device)
        if index is not None:
            raise ValueError(
                f"timestep must be one for all samples, as {type(self).__name__} remembers earlier steps, "
                f"got shape {list(timestep.shape)}"
            )
        return row

    @property
    def _dk_levels(self) -> Levels:
        """The original's float32 sigmas as float64 on the CPU, copied once a `set_timesteps`."""
        return self._dk_cached(("levels",), (self.sigmas,), lambda: host(self.sigmas, exact=True))

    def _dk_table(self, key: tuple[Any, ...], build: Callable[[], Value]) -> Value:
        """``build()`` for these sigmas, this config and these options. What was made last for ``key[0]`` is found
        without a look into the cache, as every step asks for it."""
        sigmas, config = self.sigmas, self._internal_dict
        last = self.__dict__.setdefault("_dk_tables_now", {})
        found = last.get(key[0])
        if found is not None and found[0] is sigmas and found[1] is config:
            seen: Value = found[3]
            if found[2] == (key, self._dk_exact, written(sigmas)):
                return seen
        made = self._dk_cached((*key, self._dk_exact), (self._dk_levels, config), build)
        last[key[0]] = (sigmas, config, (key, self._dk_exact, written(sigmas)), made)
        return made

    # ---------------------------------------------------------------------------------------------- the op
    _dk_ahead: tuple[Tensor, int, int, Tensor | None, Tensor, Any] | None = None
    """(x', the row that starts from it, versions of x' and the sigmas, the model's input made of it or None, the
    sigmas, the config)."""
    _dk_scales: bool = False
    """Whether the loop asks for the model's input of what `step` returned: `FusedKarras.scale_model_input`."""

    def _dk_quick(self, m: Tensor, timestep: Any, x: Tensor, key: Any, want_x0: bool) -> tuple[Any, ...] | None:
        """(x', x0, ...) of a step without noise whose table is at hand, for float32 operands with nothing to convert;
        None where anything is new: then the long way runs."""
        hot, row = self._dk_hot, self._step_index
        if hot is None or row is None or row >= hot.rows or hot.key != key or hot.config is not self._internal_dict:
            return None
        sigmas = hot.sources[0]
        if (
            sigmas is not self.sigmas
            or sigmas._version != hot.version
            or type(timestep) is not Tensor
            or not timestep.is_floating_point()
            or x.dtype is not torch.float32
            or m.dtype is not torch.float32
            or x.shape != m.shape
            or (torch.is_grad_enabled() and (x.requires_grad or m.requires_grad))
            or forward_ad._current_level >= 0
        ):
            return None
        onward, none = self._dk_scales and row + 1 < hot.rows, None
        found: tuple[Any, ...] = ops.step_raw(
            x, m, none, none, none, none, none, hot.value, row, none, none, none, none, none, want_x0, False,
            int(onward), none,
        )  # fmt: skip
        self._dk_look_ahead(found, row, hot.rows)
        self._step_index = row + 1
        return found

    def _dk_warm(self, key: Any, table: Tensor) -> None:
        """Keeps the table of a step for `_dk_quick`."""
        if not self.sigmas.is_inference():
            self._dk_hot = Hot(key, table, self._internal_dict, (self.sigmas,))

    def _dk_look_ahead(self, found: tuple[Any, ...], row: int, rows: int) -> None:
        """Notes what `step` returned, where a model's input is made of it."""

    def _dk_upcast(
        self,
        x: Tensor,
        m: Tensor,
        *histories: Tensor | None,
        table: Tensor,
        row: int,
        dtype: torch.dtype | None = None,
        **wants: Any,
    ) -> tuple[Any, Any, Any]:
        """(x' in the model's dtype, x0, s in float32) of originals that upcast the sample; float64 for a float64 model.
        A narrower x' is the op's second output, so that it is rounded once."""
        same = x.dtype == m.dtype == torch.float32 and x.shape == m.shape
        if same and dtype in (None, m.dtype):  # nothing to convert
            return self._dk_plain(x, m, *histories, table=table, row=row, **wants)[:3]
        self._dk_in_range(row, table)
        dtype = m.dtype if dtype is None else dtype
        state = torch.float64 if torch.float64 in (m.dtype, dtype) else torch.float32
        narrow = dtype != state
        if narrow:
            table = self._dk_cached(("narrow", id(table)), (table,), lambda: with_column(table, "k", 1.0))
        x = as_dtype(x, torch.float32)
        found = self._dk_run(
            x, m, *histories, table=table, row=row, state=state, next_copies=int(narrow), next_dtype=dtype, **wants
        )
        last = found[3] if narrow else found[0]
        assert last is not None
        return last, found[1], found[2]

    def _dk_plain(
        self,
        x: Tensor,
        m: Tensor | None,
        *histories: Tensor | None,
        table: Tensor,
        row: int,
        index: Tensor | None = None,
        **wants: Any,
    ) -> tuple[Any, Any, Any, Any]:
        """`ops.step` on operands of one shape and dtype."""
        if index is not None:
            table = self._dk_on(table, x.device)
        try:
            return ops.step(x, m, None, *histories, table=table, row=row, index=index, **wants)
        except RuntimeError:
            self._dk_in_range(row, table)
            raise

    def _dk_promoted(
        self, x: Tensor, m: Tensor, *histories: Tensor | None, table: Tensor, row: int, **wants: Any
    ) -> tuple[Any, Any, Any, Any]:
        """`ops.step` in the dtype that the operands promote to, for originals that upcast nothing."""
        if x.dtype == m.dtype and x.shape == m.shape and all(h is None or h.dtype is x.dtype for h in histories):
            return self._dk_plain(x, m, *histories, table=table, row=row, **wants)
        self._dk_in_range(row, table)
        state = promote(x.dtype, m.dtype)
        for h in histories:  # earlier steps may have been of another dtype
            state = state if h is None else promote(state, h.dtype)
        return self._dk_run(x, m, *histories, table=table, row=row, state=state, **wants)

    def _dk_in_range(self, row: int, table: Tensor) -> None:
        if row >= len(table):
            self.sigmas[row + 1]  # the original's IndexError, after the last step

    def _dk_mixed(
        self, x: Tensor, noise: Tensor, timesteps: Tensor, key: str, scales: Callable[[], tuple[Tensor, Tensor]]
    ) -> Tensor:
        """s x + n noise with (s, n) = scales()[step of the timestep], [B]; at the loop's step where it has begun."""
        shape = torch.broadcast_shapes(x.shape, noise.shape, (timesteps.shape[0],) + (1,) * (x.dim() - 1))
        x, noise = x.expand(shape), noise.expand(shape)
        if self.begin_index is not None:
            row = self.begin_index if self.step_index is None else self.step_index
            return self._dk_mixed_at(x, noise, row, key, scales)
        index = self._dk_indices(timesteps, x.device)
        return self._dk_noised(x, noise, index, lambda: torch.stack(scales(), 1), (key,), self.sigmas)

    def _dk_mixed_at(
        self, x: Tensor, noise: Tensor, row: int, key: str, scales: Callable[[], tuple[Tensor, Tensor]]
    ) -> Tensor:
        def build() -> Tensor:
            s, n = scales()
            return table_of(len(s), a=s, g=n)

        table = self._dk_table(("mixed", key), build)
        state = torch.promote_types(x.dtype, noise.dtype)
        return ops.step(as_dtype(x, state), None, table=table, row=row, noise=as_dtype(noise, state))[0]


class FusedKarras(FusedSigma):
    """x = x0 + sigma z: `scale_model_input` and `add_noise`."""

    def scale_model_input(self, sample: Tensor, timestep: Any) -> Tensor:
        """x / sqrt(sigma^2 + 1): made by the step that returned ``sample`` where the last one was asked for in this
        way (`step` then writes it beside x'), else in one op."""
        ahead = self._dk_ahead
        if ahead is not None:
            self._dk_ahead = None
            after, row, writes, scaled, sigmas, config = ahead
            # A gradient that x' is asked for since goes through an op of its own.
            self._dk_scales = sample is after and row == self._step_index and not sample.requires_grad
            same = sigmas is self.sigmas and config is self._internal_dict
            if self._dk_scales and scaled is not None and same and writes == version(sample) + version(sigmas):
                return scaled
        row, index = self._dk_at(timestep, sample.device)
        table = self._dk_table(("input",), lambda: table_of(len(self._dk_levels), a=self._dk_input_scale()))
        out: Tensor = self._dk_plain(sample, None, table=table, row=row, index=index)[0]
        if hasattr(self, "is_scale_input_called"):
            self.is_scale_input_called = True
        return out

    def _dk_look_ahead(self, found: tuple[Any, ...], row: int, rows: int) -> None:
        after, sigmas = found[0], self.sigmas
        if row + 1 >= rows or after.is_inference() or sigmas.is_inference():  # whose writes are not counted
            self._dk_ahead = None
        elif after.requires_grad:  # x' may be cut from its graph in place
            self._dk_ahead, self._dk_scales = None, False
        else:
            writes = after._version + sigmas._version
            self._dk_ahead = (after, row + 1, writes, found[3], sigmas, self._internal_dict)

    def _dk_plain(
        self,
        x: Tensor,
        m: Tensor | None,
        *histories: Tensor | None,
        table: Tensor,
        row: int,
        index: Tensor | None = None,
        **wants: Any,
    ) -> tuple[Any, Any, Any, Any]:
        """A step's op also makes the next model's input, where the loop asks for it."""
        if m is None or index is not None or not x.dtype == m.dtype == torch.float32:
            return super()._dk_plain(x, m, *histories, table=table, row=row, index=index, **wants)
        onward = int(self._dk_scales and row + 1 < len(table))
        found = super()._dk_plain(x, m, *histories, table=table, row=row, next_copies=onward, **wants)
        self._dk_look_ahead(found, row, len(table))
        return found

    def _dk_onward(self, table: Tensor) -> Tensor:
        """The table, its rows also making the next model's input: k = the scale of the level that a row ends at."""
        scale = self._dk_input_scale()
        column(table, "k")[:] = torch.cat([scale[1:], torch.ones(1, dtype=torch.float64)])[: len(table)]
        return table

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x0 + sigma z in one op; sigma in float32 whatever the samples' dtype."""

        def scales() -> tuple[Tensor, Tensor]:
            return torch.ones_like(self._dk_levels), self._dk_levels

        return self._dk_mixed(original_samples, noise, timesteps, "add", scales)

    def _dk_input_scale(self) -> Tensor:
        return (self._dk_levels**2 + 1) ** -0.5

    def _dk_plan(self, name: str, table: Tensor, prediction: str | None = None, **options: Any) -> Plan:
        """The rows as a plan: every row also makes the next model input."""
        table = table.clone()
        column(table, "k")[-1] = 1.0  # no model call follows
        return plan_of(
            name,
            table,
            self._dk_clock.times,
            prediction or self.config.prediction_type,
            init_scale=float(self.init_noise_sigma),  # type: ignore[attr-defined]
            first_k=float(self._dk_input_scale()[0]),
            time_dtype="float32",
            **options,
        )


def churned(levels: Levels, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float) -> tuple[Tensor, Tensor]:
    """(sigma_hat, n), [steps]: x_hat = x + n z at sigma_hat = (1 + gamma) sigma (arXiv 2206.00364, algorithm 2)."""
    sigma = levels[:-1]
    gamma = min(s_churn / (len(levels) - 1), 2**0.5 - 1)
    inside = (sigma.float() >= s_tmin) & (sigma.float() <= s_tmax)  # in the original's float32
    hat = torch.where(inside & torch.tensor(gamma > 0), sigma * (1 + gamma), sigma)
    return hat, s_noise * (hat**2 - sigma**2) ** 0.5


def euler_rows(levels: Levels, prediction: str, hat: Tensor, n: Tensor, at: Tensor, to: Tensor) -> Tensor:
    """x' = x_hat + (x_hat - x0) (to - hat)/hat with x_hat = x + n z; x0 from x_hat and the model, which v takes at the
    level ``at``: [steps, 21]. A step from 0 to 0 is the identity."""
    known = {"known_s": 1.0, "known_n": levels[1:]}
    if prediction == "epsilon":
        return table_of(len(hat), p=1.0, q=-hat, r=n, a=1.0, d=to - hat, g=n, **known)
    p, q = to_x0(prediction, at)
    return table_of(len(hat), p=p, q=q, r=n * p, **along(hat, to, n), **known)


def to_x0(prediction: str, at: Tensor) -> tuple[Tensor, Tensor]:
    """(p, q) of x0 = p x + q m for x = x0 + sigma z at the levels ``at``, [steps]."""
    if prediction == "epsilon":
        return torch.ones_like(at), -at
    if prediction == "v_prediction":
        return 1 / (at**2 + 1), -at / (at**2 + 1) ** 0.5
    return torch.zeros_like(at), torch.ones_like(at)


def inverse(sigma: Tensor) -> Tensor:
    """1 / sigma, and 0 for 0: no slope where no step is."""
    return torch.where(sigma > 0, 1 / sigma, torch.zeros_like(sigma))


def along(hat: Tensor, to: Tensor, n: Tensor) -> dict[str, Tensor]:
    """x' = (to/hat) x_hat + (1 - to/hat) x0: the columns a, b, g."""
    a = torch.where(hat > 0, to / hat, torch.ones_like(hat))
    return {"a": a, "b": 1 - a, "g": n * a}
