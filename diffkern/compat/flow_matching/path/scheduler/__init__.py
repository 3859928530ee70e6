"""Schedulers: the rates of a path x_t = alpha_t x_1 + sigma_t x_0 and their derivatives."""

from diffkern.compat.flow_matching.path.scheduler.schedule_transform import ScheduleTransformedModel
from diffkern.compat.flow_matching.path.scheduler.scheduler import (
    CondOTScheduler,
    ConvexScheduler,
    CosineScheduler,
    LinearVPScheduler,
    PolynomialConvexScheduler,
    Scheduler,
    SchedulerOutput,
    VPScheduler,
)

__all__ = [
    "CondOTScheduler",
    "ConvexScheduler",
    "CosineScheduler",
    "LinearVPScheduler",
    "PolynomialConvexScheduler",
    "ScheduleTransformedModel",
    "Scheduler",
    "SchedulerOutput",
    "VPScheduler",
]
