"""What the demo trains, and how it samples."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from diffkern import records, schedules
from diffkern.names import Prediction
from diffkern.nn import UNetConfig, preset
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.predictions import check_prediction

_SCHEDULES = {"cosine": schedules.cosine, "linear": schedules.linear}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The network, the schedule, the prediction, and how it is sampled.

    schedule      "cosine" or "linear", with `timesteps` noise levels
    prediction    what the network predicts
    guidance      weight of classifier-free guidance
    micro_batch   number of images sampled together
    seed          of a sampling job
    training      how the weights were made, for the reader
    """

    unet: UNetConfig = dataclasses.field(default_factory=lambda: preset("digits"))
    schedule: str = "cosine"
    timesteps: int = 1000
    prediction: Prediction = "eps"
    guidance: float = 1.5
    micro_batch: int = 80
    seed: int = 0
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(_SCHEDULES)}, got {records.shown(self.schedule)}")
        if not 2 <= self.timesteps <= 1_000_000:
            raise ValueError(f"timesteps must lie in 2..1000000, got {records.shown(self.timesteps)}")
        object.__setattr__(self, "prediction", check_prediction(self.prediction))
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be finite, got {self.guidance}")
        if not 1 <= self.micro_batch < 2**31:
            raise ValueError(f"micro_batch must lie in 1..2**31 - 1, got {records.shown(self.micro_batch)}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must be an integer of 64 bits, got {records.shown(self.seed)}")
        if not isinstance(self.unet.image_size, int) or self.unet.image_size > 1024:
            raise ValueError(f"unet.image_size must be one number, at most 1024, got {self.unet.image_size}")

    def make_schedule(self) -> DiscreteSchedule:
        """The noise schedule the network was trained with."""
        return _SCHEDULES[self.schedule](self.timesteps)
