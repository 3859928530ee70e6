"""A model that calls others and puts their predictions together: u + sum_j w_j (a_j - b_j), one fused op."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from diffkern import ops
from diffkern.checks import must_return, unwrapped
from diffkern.guidance._conditions import batch_times, check_alike, check_batch, expanded, learned, repeated, stacked
from diffkern.guidance._spans import Locator, TimeSpan, number
from diffkern.modes import neutral, readable
from diffkern.plan import COLUMNS, SLOTS
from diffkern.plan.prepared import Prepared

Model = Callable[..., Tensor]
Weight = float | Tensor | Callable[[Tensor], Tensor]
"""A number, one number a sample [B], or a function of the model times t giving either."""

_W, _D, _E0, _CLIP, _K, _KNOWN_S = (COLUMNS.index(name) for name in ("w", "d", "e0", "clip", "k", "known_s"))


@dataclass(frozen=True)
class Branch:
    """One prediction: a model and the condition it is given."""

    name: str
    model: Model
    cond: Any = None
    has_cond: bool = True


class Guided:
    """A guided model: ``guided(x, t)`` is what ``model(x, t)`` is to `sample`, a loop of your own, a likelihood.

        m = u + sum_j w_j (a_j - b_j)              u, a_j, b_j: predictions of the branches, u that of the first
        m = (1 + phi (std(c)/std(m) - 1)) m        with a rescale phi: std unbiased, over each sample's elements
        m = c                                      outside the interval (all w_j = 1)

    x [B, ...]; t [B], [] or a number. Further arguments go to every call, tensors among them with one entry a sample.
    The result has the shape and dtype of the models' predictions. Models that return [B, 2C, ...] for x [B, C, ...]
    (learned variance): the first C channels are guided, the others are those of c.

    A sample's result does not depend on its batch, bit for bit, as far as the models' do not. Differentiable. Made by
    the functions of `diffkern.guidance`.
    """

    def __init__(
        self,
        branches: Sequence[Branch],
        differences: Sequence[tuple[int, int]],
        weights: Sequence[tuple[str, Weight]],
        *,
        kept: int,
        rescale: float = 0.0,
        span: TimeSpan | None = None,
        batched: bool = True,
        keywords: bool = False,
    ) -> None:
        self.branches, self.differences = tuple(branches), tuple(differences)
        self.kept, self.keywords = kept, keywords
        if not (isinstance(rescale, int | float) and 0.0 <= rescale <= 1.0):
            raise ValueError(f"rescale must be a number in [0, 1], got {rescale!r}")
        self.rescale = float(rescale)
        self._locate = Locator(span)
        self._weights = [_checked(name, weight) for name, weight in weights]
        self._names = [name for name, _ in weights]
        self._batchable = batched and len({id(branch.model) for branch in branches}) == 1
        self._check_branches()
        # Histories of the op: what a row may need beside u and a_0, in branch order.
        later = {branch for pair in self.differences[1:] for branch in pair}
        self._slots = [b for b in range(len(self.branches)) if b > 0 or b in later]
        self._tables: dict[str, list[Tensor]] = {}
        self._stacked: dict[tuple[tuple[int, ...], int], Any] = {}
        sizes = {w.shape[0] for w in self._weights if isinstance(w, Tensor) and w.ndim}
        if len(sizes) > 1:
            raise ValueError(f"weights must have one entry a sample, all of one length, got {sorted(sizes)}")
        self._batch = sizes.pop() if sizes else None
        self._by_time = any(callable(w) for w in self._weights)
        constant = [w for w in self._weights if isinstance(w, float)]
        rows = [[1.0] * len(self._weights)] + ([constant] if len(constant) == len(self._weights) else [])
        # The branches that are called outside the interval and, if every weight is a number, inside.
        with neutral():
            self._needs = [self._needed(torch.tensor(row, dtype=torch.float64)) for row in rows]
        if rescale:
            self._needs[1:] = [tuple(sorted({*needed, kept})) for needed in self._needs[1:]]

    def __call__(self, x: Tensor, t: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The guided prediction at x and time t."""
        return self._predicted(x, t, args, kwargs, None)

    def sampling_rows(self, times: Tensor, cond: Any, batch: int) -> Callable[..., Tensor] | None:
        """For `diffkern.sample`: this model at ``times[i]``, whose models may know them beforehand."""
        if type(self).__call__ is not Guided.__call__:
            return None
        prepared = Prepared(times, True)

        def predicted(i: int, x: Tensor, t: Tensor, cond: Any) -> Tensor:
            given = () if cond is None else (cond,)
            return self._predicted(x, t, given, {}, lambda model, *inputs: prepared.call(model, i, *inputs))

        return predicted

    def _predicted(self, x: Tensor, t: Any, args: tuple[Any, ...], kwargs: dict[str, Any], using: Any) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 1:
            got = f"{x.dtype} of shape {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a floating point tensor [B, ...], got {got}")
        batch = x.shape[0]
        if self._batch not in (None, batch):
            raise ValueError(f"weight must have one entry a sample ({batch}), got shape [{self._batch}]")
        times = batch_times(t, batch)
        inside = self._locate(t)
        t = times
        known = isinstance(inside, bool) and (not inside or len(self._needs) == 2)
        needed = self._needs[int(inside)] if known else tuple(range(len(self.branches)))
        found = self._call(needed, x, t, args, kwargs, using)
        if len(needed) == 1:
            m = found[needed[0]]
            if needed[0] == self.kept or m.shape == x.shape:
                return m
            found |= self._call((self.kept,), x, t, args, kwargs, using)
            _check_same(found)
            return torch.cat([m[:, : x.shape[1]], found[self.kept][:, x.shape[1] :]], 1)
        if known:
            m = self._combine(found, x, self._on("cpu"), row=int(inside))
            if not self.rescale or not inside:
                return m
            rows = self._on(str(x.device))[0][1:].expand(batch, -1)
        else:
            tables, index = self._rows(inside, t, x)
            m = self._combine(found, x, tables, index=index)
            if not self.rescale:
                return m
            rows = tables[0][index]
        return self._rescaled(m, found, x, rows)

    def __repr__(self) -> str:
        names = [branch.name for branch in self.branches]
        terms = [names[0]]
        for (a, b), weight, name in zip(self.differences, self._weights, self._names, strict=True):
            terms.append(f"{weight if isinstance(weight, float) else name} ({names[a]} - {names[b]})")
        rescale = f", rescale={self.rescale}" if self.rescale else ""
        span = self._locate.span
        return f"Guided({' + '.join(terms)}{rescale}{'' if span is None else f', {span.low:g} <= t <= {span.high:g}'})"

    # ------------------------------------------------------------------------------------------------ the rows

    def _table(self, weights: Tensor) -> list[Tensor]:
        """[n, J] float64 weights as rows of the step op, one table for each op.

        Where the sum is one branch alone, such as w = 1, the row takes it as it is and no other is read.
        """
        n, branches = weights.shape[0], len(self.branches)
        total, rest = (torch.zeros(n, branches, dtype=torch.float64, device=weights.device) for _ in range(2))
        total[:, 0] = 1.0
        for j, (a, b) in enumerate(self.differences):
            for sums in (total, rest) if j else (total,):
                sums[:, a] += weights[:, j]
                sums[:, b] -= weights[:, j]
        lone = ((total == 1).sum(1) == 1) & ((total == 0).sum(1) == branches - 1)
        rest = torch.where(lone[:, None], total, rest)
        tables = []
        for first in range(0, max(len(self._slots), 1), SLOTS):
            table = torch.zeros(n, len(COLUMNS), dtype=torch.float64, device=weights.device)
            table[:, _CLIP], table[:, _K] = math.inf, 1.0
            if first == 0:
                table[:, _W] = torch.where(lone, 0.0, weights[:, 0])
                table[:, _D] = torch.where(lone, total[:, 0], 1.0)
            else:
                table[:, _D] = 1.0  # m is what the op before made
            for k, branch in enumerate(self._slots[first : first + SLOTS]):
                table[:, _E0 + k] = torch.where(lone, 0.0, rest[:, 0]) if branch == 0 else rest[:, branch]
            tables.append(table)
        tables[-1][:, _KNOWN_S] = 1.0  # learned variance: the other half is `known`
        return tables

    def _needed(self, weights: Tensor) -> tuple[int, ...]:
        """The branches that the row of these weights reads."""
        tables = self._table(weights[None])
        used = {0} if tables[0][0, _D] != 0 else set()
        used |= {self.differences[0][0]} if tables[0][0, _W] != 0 else set()
        for op, table in enumerate(tables):
            slots = self._slots[op * SLOTS : (op + 1) * SLOTS]
            used |= {branch for k, branch in enumerate(slots) if table[0, _E0 + k] != 0}
        return tuple(sorted(used | ({self.kept} if len(used) > 1 else set())))

    def _on(self, device: str) -> list[Tensor]:
        """The tables: row 0 outside the interval, then the weights' (if constant), one row or one a sample."""
        if device not in self._tables:
            batch = 1 if self._batch is None else self._batch
            with neutral():
                rows = torch.ones(1, len(self._weights), dtype=torch.float64, device=device)
                if not self._by_time:
                    columns = [torch.as_tensor(w, dtype=torch.float64, device=device) for w in self._weights]
                    inside = torch.stack([column.expand(batch) for column in columns], dim=1)
                    rows = torch.cat([rows, inside])
                self._tables[device] = self._table(rows)
        return self._tables[device]

    def _rows(self, inside: bool | Tensor, t: Any, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """(tables, index [B]) on the device of x."""
        batch, device = x.shape[0], x.device
        if self._by_time:
            columns = [self._at(j, t, batch, device) for j in range(len(self._weights))]
            weights = torch.stack(columns, dim=1)
            if isinstance(inside, Tensor):
                weights = torch.where(inside.to(device).reshape(-1, 1), weights, 1.0)
            return self._table(weights), torch.arange(batch, device=device)
        rows = torch.ones(batch, dtype=torch.int64, device=device)
        if self._batch is not None:
            rows += torch.arange(batch, device=device)
        if isinstance(inside, Tensor):
            rows = rows * inside.to(device)
        elif not inside:
            rows.zero_()
        return self._on(str(device)), rows

    def _at(self, j: int, t: Any, batch: int, device: torch.device) -> Tensor:
        """The j-th weight of each sample at the times t, [B] float64."""
        weight = self._weights[j]
        if callable(weight):
            weight = weight(t if isinstance(t, Tensor) else number(t, device))
        value = torch.as_tensor(weight, dtype=torch.float64, device=device)
        if value.ndim > 1 or (value.ndim == 1 and value.shape[0] != batch):
            raise ValueError(f"{self._names[j]} must give a number or one a sample [{batch}], got {list(value.shape)}")
        return value.expand(batch)

    # --------------------------------------------------------------------------------------------- the models

    def _check_branches(self) -> None:
        if self._batchable:
            first = self.branches[0]
            for branch in self.branches[1:]:
                check_alike(branch.name, branch.cond, first.name, first.cond)
        for branch in self.branches:
            if self.keywords and branch.has_cond and not isinstance(branch.cond, dict):
                got = type(branch.cond).__name__
                raise ValueError(f"{branch.name} must be a dict of keyword arguments with keywords=True, got {got}")

    def _call(
        self, needed: tuple[int, ...], x: Tensor, t: Any, args: tuple[Any, ...], kwargs: dict[str, Any], using: Any
    ) -> dict[int, Tensor]:
        """The predictions of these branches, from one call where they share a model."""
        batch, copies = x.shape[0], len(needed)
        if copies == 1 or not self._batchable:
            # A model may write into what it is given, which the next one is given, too.
            own = [(x.clone(), t.clone() if isinstance(t, Tensor) else t) for _ in needed[1:]]
            found = {
                b: self._given(b, self._condition((b,), batch), *given, args, kwargs, using)
                for b, given in zip(needed, [*own, (x, t)], strict=True)
            }
            for m in found.values():
                _check_prediction(m, x, 1)
            _check_same(found)
            return found
        if args or kwargs:
            args, kwargs = repeated((args, kwargs), batch, copies)
        t = torch.cat([t] * copies) if isinstance(t, Tensor) and t.ndim > 0 else t
        m = self._given(needed[0], self._condition(needed, batch), torch.cat([x] * copies), t, args, kwargs, using)
        _check_prediction(m, x, copies)
        return dict(zip(needed, m.split(batch) if batch else [m] * copies, strict=True))

    def _given(
        self, b: int, cond: Any, x: Tensor, t: Any, args: tuple[Any, ...], kwargs: dict[str, Any], using: Any
    ) -> Tensor:
        branch = self.branches[b]
        if using is not None and not (args or kwargs or self.keywords) and (cond is not None or not branch.has_cond):
            return unwrapped(using(branch.model, x, t, cond))
        if not branch.has_cond:
            return unwrapped(branch.model(x, t, *args, **kwargs))
        if self.keywords:
            return unwrapped(branch.model(x, t, *args, **cond, **kwargs))
        return unwrapped(branch.model(x, t, cond, *args, **kwargs))

    def _condition(self, needed: tuple[int, ...], batch: int) -> Any:
        """The condition of one call of these branches, put together once; at every call if it is being learned."""
        key = needed, batch
        conds = [self.branches[b].cond for b in needed]
        fresh = learned(conds)  # each graph needs its own, and an optimizer changes the values in place
        if fresh or key not in self._stacked:
            for b in needed:
                check_batch(self.branches[b].name, self.branches[b].cond, batch)
            if fresh:
                return _together(conds, batch)
            with neutral():
                made = _together(conds, batch)
            self._stacked = {k: v for k, v in self._stacked.items() if k[1] == batch}  # of one batch size at a time
            self._stacked[key] = made
        return self._stacked[key]

    # ----------------------------------------------------------------------------------------- the arithmetic

    def _combine(
        self, found: dict[int, Tensor], x: Tensor, tables: list[Tensor], row: int = 0, index: Tensor | None = None
    ) -> Tensor:
        """The rows of `_table` on the predictions."""
        kept = found[self.kept]
        m: Tensor | None
        m, m2 = found.get(0, kept), found.get(self.differences[0][0], kept)  # kept: one that this row does not read
        h = [found.get(b) for b in self._slots]
        if len(tables) == 1 and kept.shape == x.shape:
            return ops.step(None, m, m2, *h, table=tables[0], row=row, index=index)[0]
        mask = known = None
        wide = torch.promote_types(kept.dtype, torch.float32)
        for i, table in enumerate(tables):
            last = i == len(tables) - 1
            if last and kept.shape != x.shape:  # learned variance
                first = torch.arange(kept.shape[1], device=x.device) < x.shape[1]
                mask, known = first.reshape(-1, *[1] * (x.ndim - 2)).expand(kept.shape), kept
            made = ops.step(
                None,
                m,
                m2 if i == 0 else None,
                *h[i * SLOTS : (i + 1) * SLOTS],
                table=table,
                row=row,
                index=index,
                mask=mask,
                known=known,
                next_copies=0 if last else 1,
                next_dtype=wide,
            )
            m = made[0] if last else made[3]  # between two ops in float32: one rounding in all
        assert m is not None
        return m

    def _rescaled(self, m: Tensor, found: dict[int, Tensor], x: Tensor, rows: Tensor) -> Tensor:
        """m times 1 + phi (std(c)/std(m) - 1), m made again with the factor in its rows [B, 21]: one rounding."""
        channels = slice(None) if m.shape == x.shape else (slice(None), slice(x.shape[1]))
        if x[0:1].numel() == 1:
            raise ValueError(f"rescale needs samples of more than one element, got x of shape {list(x.shape)}")
        wanted, got = sample_std(found[self.kept][channels]), sample_std(m[channels])
        factor = 1.0 + self.rescale * (torch.where(got == 0, 1.0, wanted / got) - 1.0)
        if m.requires_grad:  # in plain torch the factor has a gradient, and any number of times
            scaled = m[channels] * factor.to(torch.promote_types(m.dtype, torch.float32)).reshape(
                -1, *[1] * (x.ndim - 1)
            )
            return scaled.to(m.dtype) if m.shape == x.shape else torch.cat([scaled.to(m.dtype), m[:, x.shape[1] :]], 1)
        rows = rows.clone()
        rows[:, _D : _E0 + SLOTS] *= factor.to(torch.float64)[:, None]
        return self._combine(found, x, [rows], index=torch.arange(len(rows), device=x.device))


def sample_std(x: Tensor) -> Tensor:
    """The unbiased standard deviation of each sample's elements, [B] float64: `ops.moments`; torch's for gradients."""
    if x.requires_grad:
        return x.flatten(1).to(torch.float64).std(1)
    return ops.moments(x)[:, 1].to(torch.float64)


def _checked(name: str, weight: Weight) -> Weight:
    if isinstance(weight, Tensor):
        if weight.ndim > 1 or weight.is_complex() or weight.dtype == torch.bool:
            raise ValueError(
                f"{name} must be a number, one number a sample [B] or a function of t, got {weight.dtype} "
                f"{list(weight.shape)}"
            )
        if weight.requires_grad:
            raise ValueError(f"{name} must not require a gradient, got requires_grad=True")
        if readable(weight) and not bool(torch.isfinite(weight).all()):
            raise ValueError(f"{name} must be finite, got {weight.tolist()}")
        return weight
    if callable(weight):
        return weight
    if isinstance(weight, bool) or not isinstance(weight, Real):
        got = type(weight).__name__
        raise ValueError(f"{name} must be a number, one number a sample [B] or a function of t, got {got}")
    if not math.isfinite(weight):
        raise ValueError(f"{name} must be finite, got {weight}")
    return float(weight)


def _together(conds: list[Any], batch: int) -> Any:
    return stacked(conds, batch) if len(conds) > 1 else expanded(conds[0], batch)


def _check_same(found: dict[int, Tensor]) -> None:
    first, *others = found.values()
    if any(m.shape != first.shape or m.dtype != first.dtype for m in others):
        kinds = " and ".join(f"{list(m.shape)} {m.dtype}" for m in found.values())
        raise ValueError(f"models must return predictions of one shape and dtype, got {kinds}")


def _check_prediction(m: Any, x: Tensor, copies: int) -> None:
    if isinstance(m, Tensor) and m.shape[1:] == x.shape[1:] and m.shape[0] == copies * x.shape[0]:
        return
    plain = [copies * x.shape[0], *x.shape[1:]]
    learned = [plain[0], 2 * x.shape[1], *x.shape[2:]] if x.ndim > 1 else plain
    if not isinstance(m, Tensor) or list(m.shape) != learned:
        raise ValueError(must_return(m, f"a tensor of shape {plain} (or {learned}: learned variance)"))
