"""Simulate ODEs and SDEs: the processes behind diffusion and flow models, for study and for checks (lecture 003).

    schedule = diffkern.vp()
    forward = EulerMaruyamaSimulator(ForwardSDE(schedule), seeds=seeds)
    paths = forward.simulate_trajectory(x0, torch.linspace(0, 1, 501))                    # [501, B, ...]
    score = from_model(network, schedule, "eps")
    back = EulerMaruyamaSimulator(ReverseSDE(schedule, score), seeds=seeds)
    images = back.simulate(noise, torch.linspace(1, 1e-3, 501))

| | |
|---|---|
| `ODE`, `SDE` | lecture 003's interfaces: `drift_coefficient`, `diffusion_coefficient` |
| `EulerSimulator`, `HeunSimulator`, `EulerMaruyamaSimulator` | `step`, `simulate`, `simulate_trajectory` |
| `BrownianMotion`, `OrnsteinUhlenbeck`, `LangevinSDE` | processes in their own right |
| `ForwardSDE`, `ReverseSDE`, `ProbabilityFlowODE` | those of any schedule: VP, sub-VP, VE, flows, tables |
| `VectorField`, `ExtendedSDE` | the ODE of a velocity, and SDEs of any strength with its marginals |
| `GaussianPath`, `DataMarginal` | conditional and marginal paths: samples, vector fields, scores, densities |
| `conditional_path` | paths of any mean and width, functions of the data point: samples, fields, densities, a loss |
| `from_model` | a score or a velocity from a network of any prediction |

Times are the schedule's own. To sample a trained network fast, use a plan (`diffkern.samplers`): these are plain torch,
one term at a time. docs/simulate.md has more.
"""

from diffkern.simulate._conditional_paths import ConditionalPath, conditional_path
from diffkern.simulate._gaussian_paths import DataMarginal, GaussianPath
from diffkern.simulate._process import ODE, SDE, VectorField, from_model
from diffkern.simulate._processes import (
    BrownianMotion,
    ExtendedSDE,
    ForwardSDE,
    LangevinSDE,
    OrnsteinUhlenbeck,
    ProbabilityFlowODE,
    ReverseSDE,
)
from diffkern.simulate._simulators import EulerMaruyamaSimulator, EulerSimulator, HeunSimulator, Simulator

__all__ = [
    "ODE",
    "SDE",
    "BrownianMotion",
    "ConditionalPath",
    "DataMarginal",
    "EulerMaruyamaSimulator",
    "EulerSimulator",
    "ExtendedSDE",
    "ForwardSDE",
    "GaussianPath",
    "HeunSimulator",
    "LangevinSDE",
    "OrnsteinUhlenbeck",
    "ProbabilityFlowODE",
    "ReverseSDE",
    "Simulator",
    "VectorField",
    "conditional_path",
    "from_model",
]
