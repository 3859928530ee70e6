"""Samplers: functions that return a `Plan`. Everything here runs once, on the host, in float64.

| sampler | schedules | state | model calls a step | noise |
|---|---|---|---|---|
| `ddpm` | all | alpha x0 + sigma eps | 1 | every step but the last |
| `ddim` | all | alpha x0 + sigma eps | 1 | eta > 0: every step but the last |
| `ddim_inversion` | all | alpha x0 + sigma eps, from data to noise | 1 | none |
| `euler`, `heun` | all | x0 + sigma eps; flows: t x0 + sigma eps | 1; 2, in the last step 1 | none, or churn |
| `midpoint`, `rk4`, `rk4_38` | all | as `euler` | 2, 4, 4; to sigma = 0: 1 | none |
| `lms` (Adams-Bashforth), `deis` | all; not flows | as `euler` | 1 | none |
| `euler_ancestral` | all | as `euler` | 1 | eta > 0: every step but the last |
| `dpmpp_1s`, `dpmpp_2m`, `dpmpp_3m`, `unipc` | all | alpha x0 + sigma eps | 1 | none; dpmpp with eta > 0 |
| `dpmpp_2s` | all | alpha x0 + sigma eps | 2, to sigma = 0: 1 | with eta > 0 |
| `dpm_2` | all; not flows | as `euler` | 2, to sigma = 0: 1 | none, or churn |
| `dpm_2_ancestral`, `dpmpp_2s_ancestral` | all; not flows | as `euler` | 2, last 1 | eta > 0: every step but the last |
| `dpmpp_2m_sde`, `dpmpp_3m_sde`, `dpmpp_sde` | all | alpha x0 + sigma eps | 1, 1, 2 | every step but the last |
| `euler_maruyama` | all | alpha x0 + sigma eps | 1 | every step but the last |
| `flow_sde` | continuous | alpha x0 + sigma eps | 1 | every step but the last |
| `repaint` (inpainting) | all | alpha x0 + sigma eps | 1, and rows of noise alone | every step but the last |
| `langevin`, `annealed_langevin` | all | alpha x0 + sigma eps | 1 | every step |

A step of no length, between equal levels of a table, is the identity. Where a combination of schedule, prediction and
time is not possible, a ValueError says what is. docs/samplers.md has formulas and orders.

alpha and sigma are the schedule's own rates, so for EDM and VE the two states are one; the model always sees the
schedule's own input (x/sqrt(sigma^2+1) on a table, c_in x for EDM's network).
Each model call is one row, one fused op. Row k draws its noise on ``streams.STEP + k``,
or from one Brownian path a sample with ``noise_path="brownian"``: `euler_maruyama`, `euler_ancestral`, the `dpmpp_*`.
"""

from __future__ import annotations

from collections.abc import Callable

from diffkern.plan import Plan
from diffkern.samplers.ancestral import ddim, ddim_inversion, ddpm, euler_ancestral
from diffkern.samplers.arguments import sampler_name
from diffkern.samplers.dpm_2 import dpm_2, dpm_2_ancestral, dpmpp_2s_ancestral
from diffkern.samplers.dpm_solver import (
    dpmpp_1s,
    dpmpp_2m,
    dpmpp_2m_sde,
    dpmpp_2s,
    dpmpp_3m,
    dpmpp_3m_sde,
    dpmpp_sde,
)
from diffkern.samplers.multistep import deis, lms
from diffkern.samplers.repaint import repaint
from diffkern.samplers.runge_kutta import euler, heun, midpoint, rk4, rk4_38
from diffkern.samplers.sde import annealed_langevin, euler_maruyama, flow_sde, langevin
from diffkern.samplers.unipc import unipc
from diffkern.schedules.timesteps import spaced_timesteps

__all__ = [
    "SAMPLERS",
    "annealed_langevin",
    "ddim",
    "ddim_inversion",
    "ddpm",
    "deis",
    "dpm_2",
    "dpm_2_ancestral",
    "dpmpp_1s",
    "dpmpp_2m",
    "dpmpp_2m_sde",
    "dpmpp_2s",
    "dpmpp_2s_ancestral",
    "dpmpp_3m",
    "dpmpp_3m_sde",
    "dpmpp_sde",
    "euler",
    "euler_ancestral",
    "euler_maruyama",
    "flow_sde",
    "get_sampler",
    "heun",
    "langevin",
    "lms",
    "midpoint",
    "repaint",
    "rk4",
    "rk4_38",
    "spaced_timesteps",
    "unipc",
]

SAMPLERS: dict[str, Callable[..., Plan]] = {
    function.__name__: function
    for function in (
        ddpm,
        ddim,
        euler,
        heun,
        midpoint,
        rk4,
        rk4_38,
        lms,
        deis,
        euler_ancestral,
        dpmpp_1s,
        dpmpp_2s,
        dpmpp_2m,
        dpmpp_3m,
        dpmpp_2m_sde,
        dpmpp_3m_sde,
        dpmpp_sde,
        dpm_2,
        dpm_2_ancestral,
        dpmpp_2s_ancestral,
        unipc,
        euler_maruyama,
        flow_sde,
        langevin,
        annealed_langevin,
        ddim_inversion,
        repaint,
    )
}
"""Every sampler by name."""


def get_sampler(name: str) -> Callable[..., Plan]:
    """The sampler of that name, in any case and with - or spaces for _ too ("DDIM", "DPM++ 2M", "Euler a").

    Raises ValueError with the known names for any other.
    """
    return SAMPLERS[sampler_name(name, SAMPLERS)]
