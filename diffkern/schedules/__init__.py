"""Noise schedules: x_t = alpha(t) x0 + sigma(t) eps, in float64, discrete and continuous under one interface.

`Schedule` has alpha, sigma, their derivatives, snr, log_snr and its inverse time_of_log_snr, and the SDE
dx = f x dtau + g dw that generates the path (drift, diffusion), whose sign convention is stated there.
Time conventions differ between code bases as much as the formulas do:

| schedule | time t | noise at | data at | alpha (signal rate) | sigma (noise rate) |
|---|---|---|---|---|---|
| `DiscreteSchedule` | int 0..T-1; -1 is clean data | T-1 | -1 | sqrt(abar_t) | sqrt(1 - abar_t) |
| `VPSchedule` | float 0..1 | 1 | 0 | e^(-B/2), B = int beta | sqrt(1 - e^-B) |
| `SubVPSchedule` | float 0..1 | 1 | 0 | e^(-B/2) | 1 - e^-B |
| `CosineSchedule` | float 0..1 | 1 | 0 | cos(pi t/2) | sin(pi t/2) |
| `LaplaceSchedule`, `LinearLogSNRSchedule`, `LogSNRSchedule` | float 0..1 | 1 | 0 | from log_snr | from log_snr |
| `VESchedule` | float 0..1 | 1 | 0 | 1 | sigma_min (sigma_max/sigma_min)^t |
| `ExponentialVESchedule` | float 0..1 | 1 | 0 | 1 | sqrt((base^2t - 1)/(2 ln base)) |
| `EDMSchedule` | sigma >= 0 | sigma_max | 0 | 1 | t |
| `FlowSchedule` | float 0..1 | 0 | 1 | t | 1 - (1 - sigma_min) t |
| `PathSchedule` | float 0..1 | either | the other | any function | any function |

The velocity d alpha/dt x0 + d sigma/dt eps points along t: to noise, but to data for a flow (lectures 000 and 003
against lectures 000, 001 and 002 on diffusion). Other code: diffusers' flow has sigma = 1 - t and velocity noise -
data; score_sde counts t as VP and VE do here; flow_matching runs VP and cosine with t reversed.

The lectures count diffusion steps 1..T; index t here is their step t+1, so t = 0 already holds one step of noise.

Sources: DDPM (arXiv 2006.11239) and cosine (arXiv 2102.09672), lectures 000, 001, 002; SDEs (arXiv 2011.13456), 001 and
003; flow matching (arXiv 2210.02747), 000 and 003; EDM (arXiv 2206.00364). Lecture 000 prints a last linear
beta of 0.04; the paper and every other implementation use 0.02, as here.

A time may be a Python number or a tensor; results are float64 tensors of its shape on its device. On the CPU a time
outside the schedule raises ValueError; on a device, where looking would stall it, the value is NaN. Tables of other
libraries are float32: a relative 3.6e-7 (linear) to 1.3e-5 (cosine) from these in abar, 1.7e-4 to 5.3e-4 in 1 - abar at
t = 0; `from_alphas_cumprod` takes theirs as they are.
"""

from diffkern.schedules import continuous, discrete, exploding, grids, makers, paths, predictions
from diffkern.schedules.base import Schedule, Time, UnitTime, as_time
from diffkern.schedules.continuous import *
from diffkern.schedules.discrete import *
from diffkern.schedules.exploding import *
from diffkern.schedules.makers import *
from diffkern.schedules.paths import *
from diffkern.schedules.spacings import karras_sigmas

__all__ = ["Schedule", "Time", "UnitTime", "as_time", "grids", "karras_sigmas", "predictions"]
# What these modules list.
__all__ += continuous.__all__
__all__ += discrete.__all__
__all__ += exploding.__all__
__all__ += makers.__all__
__all__ += paths.__all__
