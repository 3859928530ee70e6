"""What the parts of GaussianDiffusion share: tables made once for each option and device, dtypes, checks, ops."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern import ops
from diffkern.checks import must_return
from diffkern.compat.guided_diffusion._tables import (
    FIXED,
    LEARNED,
    MEANS,
    NAMES,
    Coefficients,
    column_of,
    guided_x0_rows,
    linear_rows,
    mean_rows,
    noising_rows,
    x0_rows,
)
from diffkern.compat.kit.rows import as_dtype, in_format, wide
from diffkern.compat.kit.tables import Tables
from diffkern.modes import kept

PARTS = frozenset({"q_posterior_mean_variance", "_predict_xstart_from_eps", "_predict_xstart_from_xprev"})
CONVERSIONS = frozenset({"_predict_xstart_from_eps", "_predict_eps_from_xstart"})
CORE = PARTS | CONVERSIONS | {"p_mean_variance", "condition_mean", "condition_score"}
"""Methods that the fused steps stand for: a class that overrides one has it called. PARTS: those of
`p_mean_variance`, CONVERSIONS: of `condition_score`."""
FIRST = ("EPSILON", "eps")
"""Outputs of a model that the original adds to x; to others it adds x."""


class Rows(NamedTuple):
    """Which row of a table a step takes: a number known on the host, or an index on the device."""

    row: int
    each: Tensor | None = None


def same_shape(**pair: Tensor) -> None:
    (name, x), (other, y) = pair.items()
    if x.shape != y.shape:
        raise AssertionError(f"{name} must have the shape of {other}, {list(y.shape)}, got {list(x.shape)}")


@kept(256)
def _foreign(*methods: Any) -> bool:
    """Whether one of these methods comes from elsewhere."""
    return any(not getattr(method, "__module__", "").startswith("diffkern.") for method in methods)


class GaussianOps:
    """Mixin: rows and ops. Rows are kept until a table that they are made of is set."""

    betas: Any
    alphas_cumprod: Any
    num_timesteps: int
    model_mean_type: Any
    model_var_type: Any
    loss_type: Any

    _dk_exact = False

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in NAMES:
            self._dk_forget()

    def __getstate__(self) -> dict[str, Any]:
        # Not the rows: a copy's own tables may be set.
        return {name: value for name, value in self.__dict__.items() if name != "_dk_known"}

    def _dk_forget(self) -> None:
        """Tables are made anew."""
        self.__dict__["_dk_known"] = Tables()

    def _dk_table(self, device: torch.device | None, *key: Any) -> Tensor:
        """The rows ``key[0](coefficients, *key[1:])`` on a device (None: on the host)."""
        known: Tables | None = self.__dict__.get("_dk_known")
        if known is None:
            known = self.__dict__["_dk_known"] = Tables()
        return known.get((device, key), lambda: self._dk_build(*key).to(device or "cpu"))

    def _dk_build(self, rows: Callable[..., Tensor], *options: Any) -> Tensor:
        return rows(Coefficients(self.__dict__, self._dk_exact), *options)

    # ------------------------------------------------------------------------------------------ names and checks
    def _dk_mean_name(self) -> str:
        name: str = getattr(self.model_mean_type, "name", "")
        if name not in MEANS:
            raise NotImplementedError(
                f"model_mean_type must be one of {', '.join(MEANS)} of ModelMeanType, got {self.model_mean_type!r}"
            )
        return name

    def _dk_variance_name(self) -> str:
        name: str = getattr(self.model_var_type, "name", "")
        if name not in (*LEARNED, *FIXED):
            raise NotImplementedError(
                f"model_var_type must be one of {', '.join((*LEARNED, *FIXED))} of ModelVarType, "
                f"got {self.model_var_type!r}"
            )
        return name

    def _dk_check(self, x: Tensor, t: Tensor) -> None:
        if t.shape != x.shape[:1]:
            raise AssertionError(f"t must have shape [{x.shape[0]}] (one timestep a sample), got {list(t.shape)}")

    def _dk_output(self, m: Any, x: Tensor) -> Tensor:
        """The model's output, its shape checked; AssertionError, as the original's own check of it raises."""
        shape = list(x.shape)
        if self._dk_variance_name() in LEARNED:
            shape[1] *= 2
        if not isinstance(m, Tensor) or list(m.shape) != shape:
            raise AssertionError(must_return(m, f"a tensor of shape {shape} for {self.model_var_type}"))
        return m

    def _dk_own(self, needed: frozenset[str] = CORE) -> bool:
        """Whether neither a subclass nor the object itself replaces what the fused steps stand for."""
        cls = type(self)
        return not _foreign(*[getattr(cls, name) for name in needed]) and self.__dict__.keys().isdisjoint(needed)

    def _dk_model(self, model: Callable[..., Any]) -> Callable[..., Any]:
        """The function that is called with this diffusion's t."""
        return model

    def _dk_times(self, model: Callable[..., Any], t: Tensor) -> tuple[Callable[..., Any], Tensor]:
        """The same function and the times that it is to be called with: (model, time) for all t of a loop at once."""
        return model, self._scale_timesteps(t)  # type: ignore[attr-defined]

    # ------------------------------------------------------------------------------------------ ops
    def _dk_rows_of(self, t: Tensor) -> Rows:
        if t.dtype is not torch.int64 and t.dtype is not torch.int32:
            raise IndexError(f"t must be int64 or int32 timesteps, got {t.dtype}")
        return Rows(0, t.reshape(()) if t.dim() == 1 and t.shape[0] == 1 else t)

    def _dk_run(
        self,
        x: Tensor,
        m: Tensor,
        rows: Rows,
        *key: Any,
        h0: Tensor | None = None,
        noise: Tensor | None = None,
        want_x0: bool = False,
    ) -> tuple[Tensor, Any]:
        """(x', x0) of one `ops.step`; x' has the memory format of x, or that of m where the original adds x to m."""
        if key[0] is not guided_x0_rows and key[1] not in FIRST:
            x = in_format(x, m)
        table = self._dk_table(None if rows.each is None else x.device, *key)
        try:
            found = ops.step(x, m, None, h0, table=table, row=rows.row, index=rows.each, noise=noise, want_x0=want_x0)
        except RuntimeError as error:
            raise self._dk_outside(rows.each, error) from None
        return in_format(found[0], x), found[1]

    def _dk_outside(self, t: Tensor | None, error: RuntimeError) -> Exception:
        """The original's exception for a timestep that is not in the tables, else the one given."""
        if t is not None and t.device.type == "cpu" and bool(((t < 0) | (t >= self.num_timesteps)).any()):
            return IndexError(f"t must lie in 0..{self.num_timesteps - 1}, got {t.tolist()}")
        return error

    def _dk_linear(self, what: str, x: Tensor, m: Tensor, t: Tensor) -> Tensor:
        state = wide(x.dtype, m.dtype)
        return self._dk_run(as_dtype(x, state), m, self._dk_rows_of(t), linear_rows, what)[0]

    def _dk_noised(self, x: Tensor, noise: Tensor, t: Tensor | int) -> Tensor:
        """x and noise of one dtype, float32 or wider."""
        table = self._dk_table(x.device, noising_rows)
        if isinstance(t, int):
            return ops.noising(x, table[t : t + 1], noise=noise)[0]
        each = self._dk_rows_of(t).each
        try:
            return ops.noising(x, table, each, noise=noise)[0]
        except RuntimeError as error:
            raise self._dk_outside(each, error) from None

    def _dk_take(self, name: str, t: Tensor, shape: Iterable[int], dtype: torch.dtype | None = None) -> Tensor:
        """A column at these timesteps, expanded to a shape; no upload."""
        shape = tuple(shape)
        values = self._dk_table(t.device, column_of, name, dtype)[t]
        return values.reshape(*values.shape, *(1,) * (len(shape) - values.dim())).expand(shape)

    def _dk_split(self, m: Tensor, channels: int) -> Tensor:
        """The half of the output that is the mean."""
        return m.narrow(1, 0, channels) if m.shape[1] != channels else m

    def _dk_x0(self, x: Tensor, m: Tensor, rows: Rows, denoised_fn: Callable[[Tensor], Tensor]) -> Tensor:
        """What ``denoised_fn`` makes of the predicted x_0; m: the mean's half."""
        mean = self._dk_mean_name()
        if mean == "START_X":
            return denoised_fn(m)
        state = wide(x.dtype, m.dtype)
        return denoised_fn(self._dk_run(as_dtype(x, state), m, rows, x0_rows, mean, False)[0])

    def _dk_mean(
        self, x: Tensor, m: Tensor, rows: Rows, clip: bool, denoised_fn: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """(mean, x0) in one op, in two where a function stands between."""
        mean, clip = self._dk_mean_name(), bool(clip)
        m = self._dk_split(m, x.shape[1])
        given = None if denoised_fn is None else self._dk_x0(x, m, rows, denoised_fn)
        if mean == "PREVIOUS_X":  # the mean is the output; a function acts on x0 alone
            if given is None:
                state = wide(x.dtype, m.dtype)
                given = self._dk_run(as_dtype(x, state), m, rows, x0_rows, mean, clip)[0]
            elif clip:
                given = given.clamp(-1, 1)
            return m, given
        source = m if given is None else given
        state = wide(x.dtype, source.dtype)
        kind = mean if given is None else "START_X"
        found, x0 = self._dk_run(as_dtype(x, state), source, rows, mean_rows, kind, clip, want_x0=True)
        return found, as_dtype(x0, source.dtype) if kind == "START_X" else x0

    def _dk_guided_x0(self, x0: Tensor, gradient: Any, rows: Rows, clip: bool = False) -> Tensor:
        """x0 moved by a classifier's gradient, one op."""
        state = wide(x0.dtype, gradient.dtype) if isinstance(gradient, Tensor) else wide(x0.dtype)
        moved = broadcast(gradient, x0, state)
        x0 = as_dtype(x0, state)
        return self._dk_run(x0, x0, rows, guided_x0_rows, "START_X", clip, h0=moved)[0]


def broadcast(gradient: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
    """What a ``cond_fn`` returned (a tensor that broadcasts, a number) with x's shape."""
    if not isinstance(gradient, Tensor | float | int):
        raise TypeError(f"cond_fn must return a tensor, got {type(gradient).__name__}")
    found = gradient if isinstance(gradient, Tensor) else torch.as_tensor(gradient, device=x.device)
    found = as_dtype(found, dtype)
    return found if found.shape == x.shape else found.expand(x.shape)
