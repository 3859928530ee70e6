"""The simulators of lecture 003: `Simulator.step / simulate / simulate_trajectory`, for ODEs and SDEs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from diffkern import ops, streams, tableaus
from diffkern.integers import integer
from diffkern.ops import Seeds
from diffkern.simulate._process import ODE, SDE, as_rate, column, shaped, spread

Times = Tensor | Sequence[float]


class Simulator(ABC):
    """Moves a state x [B, ...], float32 or float64, along times.

    A sample depends on its own row alone: alone or in any batch, it comes out bit for bit the same, as far as the
    process is computed sample by sample. The state's dtype is that of the arithmetic; times are float64 from step to
    step, and given to the process in the dtype of the state.
    """

    @abstractmethod
    def step(self, x: Tensor, t: Tensor | float, h: Tensor | float, k: int = 0) -> Tensor:
        """The state at t + h given x at t, the k-th step of a run; t and h are numbers, [] or [B]. Keeps gradients."""

    @torch.no_grad()
    def simulate(self, x: Tensor, ts: Times) -> Tensor:
        """The state at the last of the times, from x at the first; ts is [N+1], or [B, N+1] with a row a sample."""
        times = self._times(x, ts)
        for k in range(times.shape[-1] - 1):
            x = self.step(x, times[..., k], times[..., k + 1] - times[..., k], k)
        return x

    @torch.no_grad()
    def simulate_trajectory(self, x: Tensor, ts: Times, every: int = 1) -> Tensor:
        """The states [M, B, ...] at the first time, after each `every`-th step and at the last time."""
        times = self._times(x, ts)
        every = integer("every", every)
        states, last = [x], times.shape[-1] - 2
        for k in range(last + 1):
            x = self.step(x, times[..., k], times[..., k + 1] - times[..., k], k)
            if (k + 1) % every == 0 or k == last:
                states.append(x)
        return torch.stack(states)

    def _times(self, x: Tensor, ts: Times) -> Tensor:
        check_state(x)
        times = torch.as_tensor(ts, dtype=torch.float64, device=x.device)
        if times.ndim not in (1, 2) or times.shape[-1] < 1 or (times.ndim == 2 and len(times) != len(x)):
            raise ValueError(
                f"ts must hold at least one time, shape [N+1] or [{len(x)}, N+1], got shape {list(times.shape)}"
            )
        if times.device.type == "cpu" and not bool(times.isfinite().all()):
            raise ValueError(f"ts must be finite, got {times[~times.isfinite()][0].item()}")
        return times


def check_state(x: Tensor) -> None:
    """Raise ValueError unless x is a float32 or float64 state [B, ...]."""
    if x.ndim == 0 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"x must be a float32 or float64 state [B, ...], got {x.dtype} of shape {list(x.shape)}")


def _arguments(x: Tensor, t: Tensor | float, h: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    """(t, h, h shaped to multiply x)."""
    check_state(x)
    t, h = (torch.as_tensor(value, dtype=torch.float64, device=x.device) for value in (t, h))
    for name, value in (("t", t), ("h", h)):
        if value.shape not in (torch.Size(()), x.shape[:1]):
            raise ValueError(f"{name} must have shape [] or [{len(x)}] (one a sample), got {list(value.shape)}")
    return t, h, column(h, x)


class _RungeKuttaSimulator(Simulator):
    tableau: tableaus.Tableau

    def __init__(self, ode: ODE) -> None:
        if not isinstance(ode, ODE):
            raise ValueError(f"{type(self).__name__} needs an ODE, got {type(ode).__name__}{_hint(ode)}")
        self.ode = ode

    def step(self, x: Tensor, t: Tensor | float, h: Tensor | float, k: int = 0) -> Tensor:
        """One step of the method; `k` plays no part in an ODE."""
        t, h, wide = _arguments(x, t, h)

        def slope(y: Tensor, at: Tensor) -> Tensor:
            return shaped("drift_coefficient", self.ode.drift_coefficient(y, at.to(x.dtype)), x)

        return tableaus.step(slope, x, t, h, wide, self.tableau)


def _hint(process: object) -> str:
    return ": an SDE is simulated by EulerMaruyamaSimulator" if isinstance(process, SDE) else ""


class EulerSimulator(_RungeKuttaSimulator):
    """x + h u_t(x), order 1 (lectures 001, 003). h < 0 runs back in time."""

    tableau = tableaus.EULER


class HeunSimulator(_RungeKuttaSimulator):
    """x + h/2 (u_t(x) + u_{t+h}(x + h u_t(x))), order 2 (lecture 001)."""

    tableau = tableaus.HEUN


class EulerMaruyamaSimulator(Simulator):
    """x + h u_t(x) + g_t sqrt(|h|) z, z ~ N(0, I): strong order 1/2, 1 where g does not depend on x (lecture 003).

    Where z comes from, one of the following:

    - ``seeds``, an integer or int64 [B]: by address, stream ``streams.STEP + k`` in step k (float64 states hold
      float32 normals, see `ops.randn`); sample b then depends on its own seed alone, and steps that share a number
      share their noise;
    - ``noise``: the z themselves, [N, B, ...] or a sequence of N tensors like x: parity with other code;
    - ``generator``, or none of the three (torch's default generator): one torch.randn like x a step.

    h must have the sign of the process's `time_direction`: an SDE simulated against its arrow of time is another one.
    """

    def __init__(
        self,
        sde: SDE,
        *,
        seeds: Seeds | None = None,
        noise: Tensor | Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(sde, SDE):
            hint = ": an ODE is simulated by EulerSimulator or HeunSimulator" if isinstance(sde, ODE) else ""
            raise ValueError(f"EulerMaruyamaSimulator needs an SDE, got {type(sde).__name__}{hint}")
        given = [name for name, v in (("seeds", seeds), ("noise", noise), ("generator", generator)) if v is not None]
        if len(given) > 1:
            raise ValueError(f"give one of seeds, noise and generator, got {' and '.join(given)}")
        self.sde, self.seeds, self.noise, self.generator = sde, seeds, noise, generator

    def step(self, x: Tensor, t: Tensor | float, h: Tensor | float, k: int = 0) -> Tensor:
        """One step with the k-th noise."""
        t, h, wide = _arguments(x, t, h)
        sign = self.sde.time_direction
        if h.device.type == "cpu" and bool((h * sign < 0).any()):
            way, sense = ("rises", ">=") if sign > 0 else ("falls", "<=")
            bad = h.reshape(-1)[(h * sign < 0).reshape(-1)][0].item()
            raise ValueError(f"h must be {sense} 0: time {way} in {type(self.sde).__name__}, got h = {bad:g}")
        at = t.to(x.dtype)
        drift = shaped("drift_coefficient", self.sde.drift_coefficient(x, at), x)
        g = spread(as_rate(self.sde.diffusion_coefficient(x, at)), x)
        return x + wide * drift + (wide.abs().sqrt() * g) * self._noise(x, k)

    def _noise(self, x: Tensor, k: int) -> Tensor:
        if self.seeds is not None:
            seeds = ops.as_seeds(self.seeds, len(x), x.device)
            return ops.randn(x.shape, seeds, streams.STEP + k, dtype=x.dtype)
        if self.noise is not None:
            if k >= len(self.noise):
                raise ValueError(f"noise must hold one tensor a step, got {len(self.noise)} for step {k}")
            return shaped("noise", self.noise[k], x).to(x)
        device = x.device if self.generator is None else self.generator.device
        return torch.randn(x.shape, dtype=x.dtype, device=device, generator=self.generator).to(x.device)
