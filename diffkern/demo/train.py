"""The training loop: fused noising and loss, dropout of conditions for guidance, an exponential moving average.

One iteration is Algorithm 1 of Ho et al. 2020 (lectures 000, 001, 002): draw images, times and one int64 seed a
sample; x_t and, later, the target are made from the seeds inside the fused operations, so the noise is never stored.
With probability `drop` a sample loses its class (Ho and Salimans 2022), so one network learns eps(x_t, t, class) and
eps(x_t, t).
"""

from __future__ import annotations

import copy
import dataclasses
import math

import torch
from torch import Tensor, nn

from diffkern import records
from diffkern.demo import need
from diffkern.demo.data import Digits
from diffkern.names import Prediction
from diffkern.nn import UNet, UNetConfig, preset
from diffkern.objectives import losses
from diffkern.schedules.discrete import DiscreteSchedule


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How long and how to train; plain data, kept in the checkpoint.

    iterations     optimiser steps
    batch          images in each
    learning_rate  at its peak: `warmup` linear steps up, then half a cosine down to 2 % of it
    ema            decay of the moving average of the weights, which is what samples; less in the first iterations
    drop           probability that a sample is trained without its class
    clip           largest norm of the gradient
    seed           of the initial weights and of every draw
    """

    iterations: int = 1500
    batch: int = 128
    learning_rate: float = 2e-3
    warmup: int = 100
    ema: float = 0.995
    drop: float = 0.1
    clip: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, most in (("iterations", 10**8), ("batch", 2**16), ("warmup", 10**8)):
            if getattr(self, name) < 1:
                raise ValueError(f"TrainConfig.{name} must be at least 1, got {getattr(self, name)}")
            if getattr(self, name) > most:
                raise ValueError(f"TrainConfig.{name} must be at most {most}, got {records.shown(getattr(self, name))}")
        for name in ("learning_rate", "clip"):
            if not 0.0 < getattr(self, name) < math.inf:
                raise ValueError(f"TrainConfig.{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("ema", "drop"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"TrainConfig.{name} must lie in [0, 1), got {getattr(self, name)}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"TrainConfig.seed must be an integer of 64 bits, got {records.shown(self.seed)}")

    def rate(self, iteration: int) -> float:
        """The share of the peak learning rate in this iteration."""
        rise = min(1.0, (iteration + 1) / self.warmup)
        return rise * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * iteration / self.iterations)))

    def decay(self, iteration: int) -> float:
        """The decay of the moving average in this iteration: short at first, so that the initial weights are
        forgotten."""
        return min(self.ema, (1 + iteration) / (10 + iteration))


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training leaves: the averaged network in evaluation mode, and the loss of each iteration [iterations]."""

    model: UNet
    losses: list[float]


def train(
    digits: Digits,
    schedule: DiscreteSchedule,
    unet: UNetConfig | None = None,
    config: TrainConfig | None = None,
    *,
    prediction: Prediction = "eps",
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Trained:
    """A UNet trained on the digits; the same machine and number of threads give the same weights for the same seed."""
    from diffkern.diffusion import Diffusion  # only here: it stands on most of the package

    tqdm = need("tqdm.auto", "tqdm").tqdm
    unet, config = unet or preset("digits"), config or TrainConfig()
    device = torch.device(device)
    generator = torch.Generator().manual_seed(config.seed)
    with torch.random.fork_rng(devices=[]):  # the initial weights come from torch's own generator
        torch.manual_seed(config.seed)
        model = UNet(unet).to(device)
    if device.type == "cpu":
        model = model.to(memory_format=torch.channels_last)  # convolutions run up to 2.5 times faster
    diffusion = Diffusion(model, schedule, prediction, drop=config.drop)
    averaged = copy.deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    images, labels = digits.images.to(device), digits.labels.to(device)

    history: list[Tensor] = []
    bar = tqdm(range(config.iterations), desc="training", unit="step", disable=not progress)
    for i in bar:
        chosen = torch.randint(0, len(images), (config.batch,), generator=generator).to(device)
        seeds = losses.draw_seeds(config.batch, generator).to(device)
        t = losses.uniform_times(config.batch, schedule, generator).to(device)
        loss = diffusion.loss(images[chosen], t, cond=labels[chosen], seeds=seeds)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * config.rate(i)
        optimizer.step()
        _average(averaged, model, config.decay(i))
        history.append(loss.detach())
        if i % 20 == 0:  # seldom: reading the value waits for the device
            bar.set_postfix(loss=f"{torch.stack(history[-20:]).mean().item():.4f}", refresh=False)
    return Trained(averaged, torch.stack(history).tolist())


@torch.no_grad()
def _average(averaged: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1.0 - decay)
