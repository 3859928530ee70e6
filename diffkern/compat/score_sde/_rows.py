"""What every update of score_sde is: coefficients of one fused op.

    mean = keep x + pull score,    x' = mean + std z,    score = scale m, m the network's output

keep, pull, std and scale are [B] (or [1]) tensors of the times alone, in the dtype of the times, combined in float64.
The SDEs' own methods give them, evaluated at x = 1: their drifts and means are linear in x.
"""

from __future__ import annotations

import abc
from typing import Any

import torch
from torch import Tensor

from diffkern import ops
from diffkern.checks import returned
from diffkern.compat.kit.rows import AT, as_dtype, check_room, in_format, promote, table_of
from diffkern.compat.kit.tables import Tables
from diffkern.modes import neutral

KNOWN: set[Any] = set()
"""The methods of `sde_lib`: an SDE that overrides one may be of any form, and runs in plain torch."""

# Of (keep, pull, std), [n, 3], to the columns of the step's table; the rest of a row is `_BASE`.
with neutral():
    _BASE = table_of(1)
    _SPREAD = torch.zeros(3, _BASE.shape[1], dtype=torch.float64)
    for _i, _names in enumerate((("a", "A"), ("d", "D"), ("g",))):
        for _name in _names:
            _SPREAD[_i, AT[_name]] = 1.0
COPIES = Tables()
"""Of the constants, on devices; they outlive the runs that record gradients."""


def column(values: Tensor, x: Tensor) -> Tensor:
    """[B] as [B, 1, ...], to multiply x by."""
    return values.reshape(-1, *(1,) * (x.ndim - 1))


def index(sde: Any, t: Tensor) -> Tensor:
    """score_sde's number of the level at t: floor(t (N - 1)/T), in the arithmetic of t."""
    return (t * (sde.N - 1) / sde.T).long()


def on_device(sde: Any, name: str, device: torch.device) -> Tensor:
    """A table of the SDE there, copied once (until another tensor is put in its place)."""
    table: Tensor = getattr(sde, name)
    if table.device == device:
        return table
    copies: Tables | None = sde.__dict__.get("_dk_copies")
    if copies is None:
        copies = sde.__dict__["_dk_copies"] = Tables()
    return copies.on(table, device)


def linear(sde: Any, method: str) -> bool:
    """Whether the method and what it stands on are `sde_lib`'s, in the class and in this SDE; so is its `reverse`."""
    kind = type(sde)
    helpers = [name for name in ("_beta", "_log_mean", "_sigma") if hasattr(kind, name)]
    return all(
        getattr(kind, name, None) in KNOWN and name not in vars(sde) for name in (method, "sde", "reverse", *helpers)
    )


def std(sde: Any, t: Tensor, x: Tensor | None = None) -> Tensor:
    """The standard deviation at t, [n]; a `marginal_prob` of the user's own is given x, whose shape it may need."""
    at = t.new_zeros(len(t), 1) if x is None or linear(sde, "marginal_prob") else x
    found: Tensor = sde.marginal_prob(at, t)[1]
    return found


def check_state(sde: Any, x: Tensor, t: Tensor) -> None:
    """Raise ValueError for a float16 state at times [B] (not looked at on a device) whose noise it has no room for."""
    if x.dtype is torch.float16:
        check_room(x.dtype, sde, std(sde, t, x))


def check_start(sde: Any, x: Tensor) -> None:
    """`check_state` at T."""
    if x.dtype is torch.float16:
        start = x.detach().cpu()
        check_state(sde, start, torch.full([len(x)], float(sde.T), dtype=torch.float32, device="cpu"))


def rate(sde: Any, method: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """(f, g) [B] with f x the first output of `sde`, `discretize` or `marginal_prob` and g the second."""
    first, second = getattr(sde, method)(t.new_ones(len(t), 1), t)
    return first.flatten(), second


class NetworkScore(abc.ABC):
    """A score function that is a network's output times a number of the times alone: `models.get_score_fn`'s."""

    fits: bool
    """Whether it is: not for an SDE whose `marginal_prob` is the user's own."""

    @abc.abstractmethod
    def network(self, x: Tensor, t: Tensor) -> Tensor:
        """m, [B, ...]."""

    @abc.abstractmethod
    def scale(self, t: Tensor) -> Tensor | None:
        """[B] float64; None for 1."""


def evaluate(score_fn: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
    """(m, scale): of `models.get_score_fn`'s functions the network's output, of any other the score itself; they are
    given copies, as they may write into them."""
    if isinstance(score_fn, NetworkScore) and score_fn.fits:
        return score_fn.network(x.clone(), t), score_fn.scale(t)
    score: Tensor = score_fn(x.clone(), t.clone())
    return score, None


def triple(found: tuple[Tensor, Tensor, Tensor], scale: Tensor | None) -> Tensor:
    """(keep, pull scale, std), [n, 3] float64."""
    keep, pull, std = found
    wide = pull.double()
    return torch.stack([keep.double(), wide if scale is None else wide * scale.double(), std.double()], 1)


def placed(device: torch.device) -> tuple[Tensor, Tensor]:
    """(the rest of a row, the spread of its coefficients) there, copied once."""
    return COPIES.on(_BASE, device), COPIES.on(_SPREAD, device)


def table(triples: Tensor) -> Tensor:
    """[n, 21]: the step's rows of [n, 3] coefficients, on their device."""
    rest, spread = placed(triples.device)
    return torch.addmm(rest, triples, spread)


def moved(
    x: Tensor, m: Tensor, triples: Tensor, z: Tensor | None, dtype: torch.dtype, want_mean: bool = True
) -> tuple[Tensor, Tensor]:
    """(x', mean) by one op of [B, 3] or [1, 3] coefficients; the state is widened to ``dtype`` and m's."""
    state = promote(x.dtype, m.dtype, dtype)
    x, z = as_dtype(x, state), None if z is None else as_dtype(z, state)
    m = returned(m, x.shape)
    if triples.requires_grad:  # a step size made of the score: in plain torch its gradient is cheaper
        keep, pull, std = (column(values, x).to(state) for values in triples.unbind(1))
        mean = keep * x + pull * m
        return mean if z is None else mean + std * z, mean
    at = torch.arange(len(triples), device=x.device) if len(triples) > 1 else None
    new, _, made, _ = ops.step(x, m, table=table(triples), index=at, noise=z, want_s=want_mean)
    new = in_format(new, x)
    return new, new if made is None else in_format(made, x)


def combined(x: Tensor, t: Tensor, score_fn: Any, keep: Tensor, pull: Tensor) -> Tensor:
    """keep x + pull score, one op; differentiable in x."""
    m, scale = evaluate(score_fn, x, t)
    return moved(x, m, triple((keep, pull, torch.zeros_like(pull)), scale), None, t.dtype, want_mean=False)[0]
