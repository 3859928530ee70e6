"""The tensors of an adaptive Dormand-Prince integration: a step is seven fused ops, each stage one.

From x with slope k_1: X_2 = x + h a_21 k_1 and the base x + h b_1 k_1; the op at stage i, after its model call, makes
k_i and X_{i+1}; that at stage 7 k_7 and the error without k_1's part, which the fused sum of its squares adds. The rows
hold the step sizes: one row for all samples, or one for each.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from diffkern import ops, tableaus
from diffkern.checks import returned
from diffkern.modes import neutral
from diffkern.plan import COLUMNS
from diffkern.samplers.nodes import Coordinates
from diffkern.samplers.points import Points, points
from diffkern.sampling import _states
from diffkern.sampling.options import Model

_PAIR = tableaus.DORMAND_PRINCE
C = (*_PAIR.nodes[1:], 1.0)
"""Where stages 2..7 stand."""
A = (*_PAIR.coupling[1:], _PAIR.weights)
"""Weights of the slopes in stages 2..7; the last row is b."""
E = _PAIR.error
"""b minus the weights of order 4."""

_STAGES = len(C)
with neutral():
    _POINT_OF = torch.tensor([0, 1, 2, 3, 4, 4])
    _ONES = torch.zeros((_STAGES, 4), dtype=torch.float64)
    _ONES[[0, 1, 2, 4], 0] = 1.0
_COL = {name: COLUMNS.index(name) for name in COLUMNS}


def in_tolerances(size: float, tolerance: float) -> float:
    """Their ratio; with atol = 0 the tolerance of a zero state is 0, which a size of 0 meets."""
    if tolerance == 0.0:
        return size if math.isnan(size) or size == 0.0 else math.inf
    return size / tolerance


def _host(values: Any) -> Tensor:
    """On the CPU also where torch has another default device."""
    return torch.tensor(values, dtype=torch.float64, device="cpu")


class Solver:
    """The tensors: states, slopes, tables; one fused op a stage."""

    def __init__(
        self, model: Model, x: Tensor, space: Coordinates, cond: Any, model_dtype: torch.dtype, batch_norm: bool
    ) -> None:
        self.model, self.space, self.cond, self.batch_norm = model, space, cond, batch_norm
        self.batch, self.count, self.calls = x.shape[0], 1 if batch_norm else x.shape[0], 0
        self._error = tableaus.SHAMPINE_ERROR if batch_norm else E
        # Weights of the slope made by a row at stages 2..7, and of its histories: x or the base (_ONES), and slopes.
        self._own = _host([*(A[j + 1][j + 1] for j in range(5)), self._error[6]])
        six = [new - old for new, old in zip(A[4][:4], A[3], strict=True)]
        reads = [(0.0, *A[1][:1]), (0.0, *A[2][:2]), (0.0, *A[3][:3]), six, (0.0, *A[5][2:5]), self._error[2:6]]
        self._slopes = _host([[*row, *[0.0] * (4 - len(row))] for row in reads])
        self.x = _states.buffer(x).copy_(x)
        # Two stages by turns, the base of the last one (then the error), and slopes; k[1] becomes k_7.
        self._turn = [_states.buffer(x), _states.buffer(x)]
        self._base = torch.empty_like(x)
        self._k = [torch.empty_like(x) for _ in range(6)]
        # Not the states, which a model may write into; two of them, as it may return the one it was given.
        self._inputs = [_states.buffer(x, model_dtype) for _ in range(2)]
        self._index = torch.arange(self.batch, device=x.device) if not batch_norm else None
        self._unit = _host([[0.0, 0.0, 1.0]]).to(x.device)

    def _table(self, **columns: Tensor | float) -> Tensor:
        """[n, 21] on the device, of one row or one a sample."""
        table = torch.zeros((self.count, len(COLUMNS)), dtype=torch.float64, device="cpu")
        for name, value in {"clip": math.inf, "k": 1.0, **columns}.items():
            table[:, _COL[name]] = value
        return self._upload(table)

    def _upload(self, host: Tensor) -> Tensor:
        """One copy; tables of one row stay on the host, from where they go by value."""
        return host if self.batch_norm else host.to(self.x.device)

    def _step(self, table: Tensor, x: Tensor, m: Tensor | None, *h: Tensor, out: Tensor, s: Tensor | None = None,
              into: Tensor | None = None) -> None:  # fmt: skip
        ops.step_out(x, m, None, *h, table=table, index=self._index, out=out, s=s, next=into)

    def _call(self, x: Tensor, t: Tensor) -> Tensor:
        self.calls += 1
        m = self.model(x, t) if self.cond is None else self.model(x, t, self.cond)
        return returned(m, self.x.shape)

    def _times(self, at: Tensor) -> Tensor:
        """[..., B] float32 on the device, from one time or one a sample."""
        return at.to(self.x.device, torch.float32).expand(*at.shape[:-1], self.batch).contiguous()

    @property
    def slope(self) -> Tensor:
        """k_1."""
        return self._k[0]

    def start(self, u: list[float]) -> None:
        """k_1 at the start."""
        self._slope(u, self.x, self._k[0])

    def _slope(self, u: list[float], x: Tensor, out: Tensor) -> None:
        """The slope at one point a sample, into ``out``; the input is scaled by an op of its own."""
        at = points(self.space, _host(u))
        m = self._call(self._scaled(x, at.k), self._times(at.time))
        table = self._table(p=at.p, q=at.q, clip=self.space.clip, a=at.sx, b=at.s0, d=at.sm)
        self._step(table, x, m, out=out)

    def attempt(
        self, u: list[float], tried: list[float], reached: list[float], rtol: float, atol: float
    ) -> list[float]:
        """One step of ``tried`` from ``u``; the new states are in ``_turn[1]``. Returns errors over tolerances."""
        h = _host(tried)
        here, there = _host(u), _host(reached)
        low, high = torch.minimum(here, there), torch.maximum(here, there)
        where = [torch.minimum(torch.maximum(here + c * h, low), high) for c in C[:4]]
        flat = points(self.space, torch.cat([*where, there]))
        # Rows of all 7 ops, the times, and the rows of the error's norm, in one upload.
        table = self._tables(h, Points(*(column.reshape(5, -1)[_POINT_OF] for column in flat)))
        times = flat.time.reshape(5, -1)[_POINT_OF]
        norms = torch.stack([-h * self._error[0], torch.zeros_like(h), torch.ones_like(h)], 1)
        packed = self._upload(torch.cat([table.flatten(), times.flatten(), norms.flatten()]))
        first, second = table.numel(), table.numel() + times.numel()
        tables = packed[:first].view(_STAGES + 1, -1, len(COLUMNS)).unbind()
        stamps = (
            packed[first:second]
            .view(_STAGES, -1)
            .to(self.x.device, torch.float32)
            .expand(_STAGES, self.batch)
            .contiguous()
        )
        squares = packed[second:].view(-1, 3)
        x, k, base = self.x, self._k, self._base
        one, two = self._turn
        self._step(tables[0], x, k[0], out=one, s=base, into=self._inputs[0])
        m = self._call(self._inputs[0], stamps[0])
        reads = ((x, k[0]), (x, k[0], k[1]), (x, *k[:3]), tuple(k[:4]), (base, *k[2:5]))
        for j, histories in enumerate(reads):
            given = self._inputs[(j + 1) % 2]
            self._step(tables[j + 1], one, m, *histories, out=two, s=k[j + 1], into=given)
            m = self._call(given, stamps[j + 1])
            one, two = two, one
        # k_7 takes the place of k_2, the error that of the base.
        self._step(tables[6], one, m, *k[2:6], out=base, s=k[1])
        self._turn = [two, one]
        if self.batch_norm:
            error = base + (h * self._error[0]).to(base.device, base.dtype) * k[0]
            scaled = error / (atol + rtol * torch.maximum(x.abs(), one.abs()))
            return [float(scaled.square().mean().sqrt())]
        found = torch.stack([
            ops.loss(base, k[0], squares, noise=self.x, reduction="none"),
            *self.squares(x, one),
        ]).double().cpu().sqrt()  # fmt: skip
        return [in_tolerances(e, atol + rtol * max(a, b)) for e, a, b in zip(*found.tolist(), strict=True)]

    def _scaled(self, x: Tensor, k: Tensor | float) -> Tensor:
        """The model's input k x, by an op of its own; a copy where k is 1."""
        if self.space.in_time:
            return self._inputs[0].copy_(x)
        self._step(self._table(a=1.0, k=k), x, None, out=self._turn[0], into=self._inputs[0])
        return self._inputs[0]

    def squares(self, *states: Tensor) -> list[Tensor]:
        """Mean squares [B]."""
        return [ops.loss(state, state, self._unit, noise=self.x, reduction="none") for state in states]

    def _tables(self, h: Tensor, at: Points) -> Tensor:
        """[7, n, 21]: x + h a_21 k_1 with the base x + h b_1 k_1 beside it, then the rows at stages 2..7.

        Row 0 takes k_1 in the place of the model's output. A row at a stage makes its slope as s, and of it and the
        histories the next stage's state, at last the error without k_1's part. Stage 6 is stage 5 plus differences,
        stage 7 the base plus slopes, so no row reads more than four histories.
        """
        table = torch.zeros((_STAGES + 1, h.numel(), len(COLUMNS)), dtype=torch.float64, device="cpu")
        table[0, :, _COL["a"]] = table[0, :, _COL["A"]] = 1.0
        table[0, :, _COL["d"]], table[0, :, _COL["D"]] = h * A[0][0], h * A[5][0]
        rows = table[1:]
        own = h * self._own[:, None]
        a, b, d = own * at.sx, own * at.s0, own * at.sm
        a[3] += 1.0
        for name, values in {"a": a, "b": b, "d": d, "A": at.sx, "B": at.s0, "D": at.sm, "p": at.p, "q": at.q}.items():
            rows[:, :, _COL[name]] = values
        rows[:, :, _COL["e0"] : _COL["e3"] + 1] = _ONES[:, None] + h[:, None] * self._slopes[:, None]
        table[:, :, _COL["clip"]] = self.space.clip
        table[:_STAGES, :, _COL["k"]] = at.k
        table[_STAGES, :, _COL["k"]] = 1.0
        return table

    def settle(self, moved: list[bool]) -> None:
        """The new states and their slopes where a step was accepted."""
        k, new = self._k, self._turn[1]
        if all(moved):
            self.x, self._turn[1] = new, self.x
            k[0], k[1] = k[1], k[0]
        elif any(moved):
            yes = _host(moved)
            table = self._table(A=1.0 - yes, e0=1.0 - yes, D=yes, e1=yes)
            self._step(table, k[0], k[1], self.x, new, out=self._turn[0], s=k[2])
            self.x, self._turn[0] = self._turn[0], self.x
            k[0], k[2] = k[2], k[0]

    def first_guess(self, u: list[float], h: list[float]) -> Tensor:
        """The slope after an Euler step of h, for the rule of the first step; in k_2's place."""
        table = self._table(a=1.0, e0=_host(h))
        self._step(table, self.x, None, self._k[0], out=self._turn[1])
        self._slope(u, self._turn[1], self._k[1])
        return self._k[1]

    def denoise(self, u: float) -> None:
        """The model's x0 at u."""
        node = self.space.node(u if self.space.in_time else math.exp(u))
        given = self._scaled(self.x, node.k)
        m = self._call(given, self._times(torch.full((self.count,), node.time, dtype=torch.float64, device="cpu")))
        self._step(self._table(p=node.p, q=node.q, clip=node.clip, b=1.0), self.x, m, out=self._turn[0])
        self.x = self._turn[0]
