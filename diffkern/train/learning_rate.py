"""The learning rate over a run."""

from __future__ import annotations

import math

from diffkern.train.config import TrainConfig

__all__ = ["learning_rate"]


def learning_rate(config: TrainConfig, iteration: int) -> float:
    """The rate of the iteration, counted from 0: the peak times

    - a linear rise min(1, (i + 1)/warmup), times
    - 1 ("constant"), final_rate + (1 - final_rate) (1 + cos(pi i/iterations))/2 ("cosine"), or
      sqrt(warmup/max(i + 1, warmup)) ("inverse_sqrt").
    """
    rise = min(1.0, (iteration + 1) / max(1, config.warmup))
    share = 1.0
    if config.decay == "cosine":
        wave = 0.5 * (1.0 + math.cos(math.pi * min(1.0, iteration / config.iterations)))
        share = config.final_rate + (1.0 - config.final_rate) * wave
    elif config.decay == "inverse_sqrt":
        share = math.sqrt(max(1, config.warmup) / max(iteration + 1, config.warmup, 1))
    return config.learning_rate * rise * share
