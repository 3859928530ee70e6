"""Schedules and Gaussian data that the tests of the first samplers share."""

from __future__ import annotations

import torch

from diffkern import schedules
from diffkern.plan import Plan
from helpers.oracles import Gaussian, run_plan

LINEAR, COSINE, FLOW, EDM = schedules.linear(), schedules.cosine(), schedules.flow(), schedules.edm()
DATA = Gaussian(0.4, 0.6)
X = torch.tensor([-1.7, -0.2, 0.0, 0.9, 2.5], dtype=torch.float64)
TABLE_PREDICTIONS = ["eps", "x0", "v", "score", "velocity", "mu"]


def run(plan: Plan, schedule: schedules.Schedule, x: torch.Tensor = X, data: Gaussian = DATA) -> torch.Tensor:
    return run_plan(plan, data.model(schedule, plan.prediction), x)
