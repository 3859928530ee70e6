"""Adaptive integration of the probability flow: `rk45`, the pair of Dormand and Prince of orders 5 and 4.

A step of h from u evaluates k_i = slope(u + c_i h, x + h sum_j a_ij k_j), i = 1..7, and ends on x + h sum_i b_i k_i,
whose slope is k_7 and the next step's k_1; its error is estimated as e = h sum_i (b_i - bhat_i) k_i.

    accepted if |e| <= 1 in units of atol + rtol max(|x|, |x'|),        h <- h min(10, max(0.9 |e|^(-1/5), 0.2))

(the factor is at least 1 after an accepted step). Every sample has a step size and an acceptance of its own, so it is
solved as if it were alone. Its norms are root mean squares over its elements, of e and of x. The coordinate is u = ln
sigma, in which steps stay of one size (a third fewer model calls than in sigma), or the time of a flow. Dormand and
Prince 1980; Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section II.4, for the control and
the first step. No plan can say these steps before the run: the loop is one of its own beside `sample`'s.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from diffkern import ops
from diffkern.checks import need_model, need_tensor
from diffkern.integers import integer
from diffkern.names import Norm, Prediction
from diffkern.progress import progress_bar
from diffkern.samplers.arguments import choice
from diffkern.samplers.nodes import Coordinates, coordinates
from diffkern.sampling import _states
from diffkern.sampling._dormand_prince import Solver, in_tolerances
from diffkern.sampling.options import Model
from diffkern.schedules.base import Schedule
from diffkern.schedules.discrete import DiscreteSchedule

NORMS = ("sample", "batch")


class AdaptiveInfo(TypedDict):
    """What a callback is given after each round of attempts; ``x`` is reused, so clone what you keep.

    What it writes into x in place is the state that goes on, at the cost of one more model call for its slope.
    """

    i: int
    """Index of the round."""
    at: list[float]
    """Where each sample stands now: its sigma, or its time in a flow."""
    h: list[float]
    """The step each sample has tried, in ln sigma or time; 0 for one that was at the end."""
    accepted: list[bool]
    """Whether it was accepted; True for a sample that was at the end already."""
    x: Tensor
    """The states now."""


class Solved(NamedTuple):
    """What `rk45` returns."""

    x: Tensor
    """The states at the end, [B, ...]."""
    steps: list[int]
    """Accepted steps of each sample."""
    rejected: list[int]
    """Rejected steps of each sample."""
    model_calls: int
    """Calls of the model, each for the whole batch."""
    times: Tensor | None = None
    """With ``trajectory``: where each sample stood, float64 [rounds + 1, B]; one more row for a last denoising."""
    trajectory: Tensor | None = None
    """With ``trajectory``: the states there, [rounds + 1, B, ...]."""


@torch.no_grad()
def rk45(
    model: Model,
    x: Tensor,
    schedule: Schedule,
    *,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    prediction: Prediction | None = None,
    span: tuple[float, float] | None = None,
    denoise: bool = True,
    clip: float | None = None,
    norm: Norm = "sample",
    first_step: float | None = None,
    max_steps: int = 1000,
    cond: Any = None,
    callback: Callable[[AdaptiveInfo], object] | None = None,
    trajectory: bool = False,
    progress: bool | str = False,
    out_dtype: torch.dtype | None = None,
    model_dtype: torch.dtype | None = None,
) -> Solved:
    """Integrate the probability-flow ODE from the state ``x`` [B, ...], with error control for each sample.

    The state is that of `samplers.euler`: x0 + sigma eps for tables, EDM, VP, sub-VP and VE, integrated over ln sigma,
    so ``initial(euler(schedule, 1), shape, seeds)`` makes the start; that of a flow or path itself, over its time.

    - ``span``: (from, to) in sigma, in a flow in time, either way (from the data end it encodes data); by default from
      the noise end to the lowest level that has a slope: the table's first, EDM's sigma_min, `time_eps` before data for
      continuous schedules, the data end of a flow for the prediction velocity without a clip, else 1e-3 before it.
    - ``denoise``: if the span ends above sigma = 0 and runs towards data, one more model call ends on its x0.
    - ``rtol``, ``atol``: the error of a step, in root mean square over the elements, is at most atol + rtol times the
      root mean square of the state. ``norm`` "batch" takes one step size for the whole batch instead, and the root mean
      square over all elements of the error over atol + rtol max(|x|, |x'|), element by element: torchdiffeq's dopri5,
      step for step, with its weights of the error (in plain torch for that norm; a sample then depends on its
      neighbours).
    - ``first_step``: size of the first step in ln sigma or time, chosen by Hairer's rule (one more model call) if None.
      ``max_steps``: the most steps a sample may try.
    - ``clip`` clamps x0; ``cond``, ``callback`` (given an `AdaptiveInfo`), ``trajectory``, ``progress``, ``out_dtype``
      and ``model_dtype`` as for `sample`. The prediction is the schedule's by default; times are float32 [B].

    A round is 6 model calls, 7 fused steps (one a stage, the error among them), 3 fused sums, one more step where
    samples disagree, and one read of the device, for acceptance. Samples that are at the end wait for the others: they
    are still given to the model, and do not move. Buffers: 10 of the state's size. x must be float32 or float64: 16
    bits do not hold the error of a step. Raises ValueError, naming argument, rule and value, for input that does not
    fit, and RuntimeError for a sample that does not arrive.
    """
    space = coordinates(schedule, prediction, clip)
    need_model(model)
    need_tensor("x", x)
    _check(x, rtol, atol, first_step, max_steps)
    whole = choice("norm", norm, NORMS) == "batch"
    begin, end, noisy = _span(space, span)
    if x.numel() == 0:
        stands = torch.tensor([begin if space.in_time else math.exp(begin)], dtype=torch.float64, device="cpu")
        return Solved(
            x.to(out_dtype or x.dtype, copy=True),
            [0] * x.shape[0],
            [0] * x.shape[0],
            0,
            stands.repeat(1, x.shape[0]) if trajectory else None,
            x[None].clone() if trajectory else None,
        )
    solver = Solver(model, x, space, cond, model_dtype or x.dtype, whole)
    control = _Control(1 if whole else x.shape[0], begin, end, not space.in_time, rtol, atol, max_steps)
    wide = x.shape[0] // control.count
    solver.start(control.u)
    control.h = _first_steps(solver, control, first_step)
    states, times = [x], [control.at() * wide]
    bar = progress_bar(progress, "rk45", abs(end - begin), bar_format="{l_bar}{bar}|")
    rounds = 0
    try:
        while not all(control.done):
            tried = control.propose()
            ratios = solver.attempt(control.u, tried, control.reached, rtol, atol)
            moved = control.judge(tried, ratios)
            solver.settle(moved)
            if trajectory:
                states.append(solver.x.clone())
                times.append(control.at() * wide)
            if callback is not None:
                at = control.at() * wide
                info: dict[str, Any] = {"i": rounds, "at": at, "h": tried * wide, "accepted": moved * wide}
                if _states.shown(solver.x, x.dtype, callback, **info) and not all(control.done):
                    solver.start(control.u)
            rounds += 1
            if bar is not None:
                bar.update(min(abs(u - begin) for u in control.u) - bar.n)
    finally:
        if bar is not None:
            bar.close()
    if denoise and noisy:
        solver.denoise(end)
        if trajectory:
            states.append(solver.x.clone())
            times.append([schedule.data_end if space.in_time else 0.0] * x.shape[0])
    return Solved(
        solver.x if out_dtype is None else solver.x.to(out_dtype),
        control.steps * wide,
        control.rejected * wide,
        solver.calls,
        torch.tensor(times, dtype=torch.float64, device="cpu") if trajectory else None,
        torch.stack(states) if trajectory else None,
    )


class _Control:
    """Step sizes and acceptance on the host, one entry a sample (one for all with norm "batch")."""

    def __init__(
        self, count: int, begin: float, end: float, log: bool, rtol: float, atol: float, max_steps: int
    ) -> None:
        self.count, self.begin, self.end, self.log, self.max_steps = count, begin, end, log, max_steps
        self.rtol, self.atol = rtol, atol
        self.u, self.h = [begin] * count, [0.0] * count
        self.done, self.reached = [False] * count, [end] * count
        self.steps, self.rejected = [0] * count, [0] * count

    def at(self) -> list[float]:
        """Where each sample stands, as sigma or time."""
        return [math.exp(u) for u in self.u] if self.log else list(self.u)

    def propose(self) -> list[float]:
        """The steps to try, the last one cut to end exactly; 0 for samples that are there."""
        tried = []
        for b, (u, h) in enumerate(zip(self.u, self.h, strict=True)):
            left = self.end - u
            cut = self.done[b] or abs(h) >= abs(left)
            tried.append(left if cut else h)
            self.reached[b] = self.end if cut else u + h
        return tried

    def judge(self, tried: list[float], ratios: list[float]) -> list[bool]:
        """Which samples move, and the next steps, from the errors in units of the tolerance."""
        moved = []
        for b, (h, ratio) in enumerate(zip(tried, ratios, strict=True)):
            if self.done[b]:
                moved.append(True)  # it stays: a step of size 0 is the state itself
                continue
            accepted = ratio <= 1.0  # False for NaN
            if not math.isfinite(ratio):
                factor = 0.2
            elif ratio == 0.0:
                factor = 10.0
            else:
                factor = min(10.0, max(0.9 / ratio**0.2, 1.0 if ratio < 1.0 else 0.2))
            moved.append(accepted)
            self.steps[b] += accepted
            self.rejected[b] += not accepted
            self.h[b] = h * factor
            if accepted:
                self.u[b] = self.reached[b]
                self.done[b] = self.u[b] == self.end
            if not self.done[b]:
                self._check(b, ratio)
        return moved

    def _check(self, b: int, ratio: float) -> None:
        shrunk = abs(self.h[b]) < 1e-14 * max(1.0, abs(self.begin), abs(self.end))
        if not shrunk and self.steps[b] + self.rejected[b] < self.max_steps:
            return
        if not shrunk:
            raise RuntimeError(f"{self._where(b)} after max_steps = {self.max_steps} steps")
        raise self._steep(b, f"they shrink to nothing (last error {ratio:g} tolerances)")

    def check_first(self, sizes: list[float]) -> None:
        """Sizes of state or slope, in tolerances, from which a first step can be chosen."""
        for b, size in enumerate(sizes):
            if not math.isfinite(size):
                raise self._steep(b, f"there is no first step (state or slope of {size:g} tolerances)")

    def _where(self, b: int) -> str:
        who = f"sample {b}" if self.count > 1 else "the batch"
        text = f"rk45 did not arrive with rtol = {self.rtol:g} and atol = {self.atol:g}: {who} stands at "
        return f"{text}{'sigma' if self.log else 't'} = {self.at()[b]:.6g}"

    def _steep(self, b: int, what: str) -> RuntimeError:
        text = f"{self._where(b)} after {self.steps[b]} steps, where {what}"
        return RuntimeError(f"{text}: the slope is too steep or not finite")


def _first_steps(solver: Solver, control: _Control, given: float | None) -> list[float]:
    """Signed first steps: the one given, or by Hairer, Norsett and Wanner's rule from two slopes."""
    span = control.end - control.begin
    if given is not None:
        return [math.copysign(given, span)] * control.count
    if span == 0.0:  # two levels of one logarithm: the rule would divide by it
        return [0.0] * control.count
    x, first = solver.x, solver.slope
    rtol, atol = control.rtol, control.atol
    scale: Any
    if solver.batch_norm:
        scale = atol + rtol * x.abs()
        d0, d1 = ([float((t / scale).square().mean().sqrt())] for t in (x, first))
    else:
        sizes, slopes = torch.stack(solver.squares(x, first)).double().cpu().sqrt().tolist()
        scale = [atol + rtol * size for size in sizes]
        d0, d1 = ([in_tolerances(a, s) for a, s in zip(values, scale, strict=True)] for values in (sizes, slopes))
    control.check_first(d0)
    control.check_first(d1)
    h0 = [1e-6 if a < 1e-5 or b < 1e-5 else 0.01 * a / b for a, b in zip(d0, d1, strict=True)]
    h0 = [min(h, abs(span)) for h in h0]
    signed = [math.copysign(h, span) for h in h0]
    second = solver.first_guess([control.begin + h for h in signed], signed)
    if solver.batch_norm:
        d2 = [float(((second - first) / scale).square().mean().sqrt()) / h0[0]]
    else:
        unit = torch.tensor([[1.0, 0.0, 1.0]], dtype=torch.float64, device="cpu").to(x.device)
        gaps = ops.loss(second, first, unit, noise=solver.x, reduction="none").double().cpu().sqrt().tolist()
        d2 = [in_tolerances(gap, s) / h for gap, s, h in zip(gaps, scale, h0, strict=True)]
    control.check_first(d2)
    chosen = []
    for h, b, c in zip(h0, d1, d2, strict=True):
        most = max(b, c)
        h1 = max(1e-6, h * 1e-3) if b <= 1e-15 and c <= 1e-15 else (0.01 / most) ** 0.2
        chosen.append(math.copysign(min(100.0 * h, h1), span))
    return chosen


def _span(space: Coordinates, span: tuple[float, float] | None) -> tuple[float, float, bool]:
    """(from, to) in ln sigma or time, and whether it runs towards data and leaves noise."""
    schedule = space.schedule
    if span is not None and not _two_values(span):
        raise ValueError(f"span must be two different finite values (from, to), got {span!r}")
    if space.in_time:
        if span is None:
            direct = space.prediction == "velocity" and space.clip == math.inf
            near = 0.0 if direct else max(schedule.time_eps, 1e-3)
            return schedule.noise_end, schedule.data_end + schedule.direction * near, not direct
        begin, end = (float(t) for t in span)
        return begin, end, (end - begin) * schedule.direction < 0 and float(schedule.sigma(end)) > 0.0
    if span is not None:
        begin, end = (float(v) for v in span)
    else:
        low, high = (0.0, float(schedule.T - 1)) if isinstance(schedule, DiscreteSchedule) else schedule.time_range
        begin, end = sorted((float(schedule.sigma_ve(t)) for t in (low, high)), reverse=True)
    if not 0.0 < min(begin, end) <= max(begin, end) < math.inf:
        raise ValueError(f"the span needs finite noise levels sigma > 0, got {begin:g} to {end:g} ({schedule.name})")
    return math.log(begin), math.log(end), end < begin


def _two_values(span: Any) -> bool:
    try:
        values = list(span)
        return len(values) == 2 and all(math.isfinite(v) for v in values) and float(values[0]) != float(values[1])
    except (TypeError, ValueError):  # not a sequence, or not of numbers
        return False


def _check(x: Tensor, rtol: float, atol: float, first_step: float | None, max_steps: int) -> None:
    if x.dtype not in (torch.float32, torch.float64) or x.ndim < 1:
        raise ValueError(
            "x must be float32 or float64 [B, ...] (16 bits do not hold the error of a step; model_dtype is the "
            f"model's own), got {x.dtype} of shape {list(x.shape)}"
        )
    for argument, value in (("rtol", rtol), ("atol", atol)):
        if not 0.0 <= value < math.inf:
            raise ValueError(f"{argument} must be a finite number >= 0, got {value}")
    if rtol == atol == 0.0:
        raise ValueError("rtol and atol must not both be 0, got 0 and 0")
    if first_step is not None and not 0.0 < first_step < math.inf:
        raise ValueError(f"first_step must be positive, got {first_step}")
    integer("max_steps", max_steps)
