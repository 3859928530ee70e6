"""A job of many images cut into micro-batches, with its seconds.

Image j of a job with seed s starts from the noise of ``diffkern.seeds(s, 1, first=j)``. Noise and updates are the
same bits however the job is cut; the network's own convolutions are not, so the bits of an image belong to its
micro-batch: with a micro-batch of 1 an image depends on its number, class and seed alone.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

from diffkern import ops
from diffkern.demo import need
from diffkern.nn import UNet
from diffkern.plan import Plan
from diffkern.sampling.runner import initial, sample


@dataclasses.dataclass(frozen=True)
class Generated:
    """Images [N, C, H, W] of a job, and where its seconds went.

    model_calls counts the network evaluations of one image (a guided one, two passes in one batch, counts once);
    model_seconds is the time inside the network, update_seconds all the rest of sampling: initial noise, the fused
    updates, the loop.
    """

    images: Tensor
    model_calls: int
    model_seconds: float
    update_seconds: float


class _Timed:
    """The network with a stopwatch and a progress bar: a device is waited for, so that each second is booked where it
    was spent."""

    def __init__(self, model: UNet, bar: Any) -> None:
        self.model, self.bar, self.seconds = model, bar, 0.0

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        _wait(x.device)
        start = time.perf_counter()
        out: Tensor = self.model(x, t, cond)
        _wait(x.device)
        self.seconds += time.perf_counter() - start
        self.bar.update()
        return out


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def generate(
    model: UNet,
    plan: Plan,
    classes: Tensor,
    *,
    seed: int = 0,
    first: int = 0,
    guidance: float = 1.5,
    micro_batch: int = 80,
    progress: bool | str = True,
) -> Generated:
    """One image for each entry of `classes` (int64 [N]), images first .. first + N - 1 of the job with this seed, on
    the CPU.

    `guidance` is the weight w of m = u + w (c - u): 1 is the conditional network alone. Every class must be one the
    network has.
    """
    tqdm = need("tqdm.auto", "tqdm").tqdm
    if micro_batch < 1:
        raise ValueError(f"micro_batch must be at least 1, got {micro_batch}")
    if len(classes) == 0:
        raise ValueError("classes must name at least one image, got none")
    wrong = classes[(classes < 0) | (classes >= model.config.classes)]
    if len(wrong):
        raise ValueError(f"classes must lie in 0..{model.config.classes - 1}, got {wrong[0].item()}")
    config = model.config
    device = next(model.parameters()).device
    seeds = ops.seeds(seed, len(classes), first)
    chunks = list(zip(classes.split(micro_batch), seeds.split(micro_batch), strict=True))
    label = progress if isinstance(progress, str) else plan.name
    images = []
    start = time.perf_counter()
    with tqdm(total=len(chunks) * plan.model_calls, desc=label, unit="call", disable=progress is False) as bar:
        timed = _Timed(model, bar)
        for chunk, own in chunks:
            cond, own = chunk.to(device), own.to(device)
            shape = (len(chunk), *config.shape)
            x = initial(plan, shape, own, device=device)
            none = torch.full_like(cond, model.null_class)
            out = sample(timed, x, plan, seeds=own, cond=cond, uncond=none, guidance=guidance)
            images.append(out.cpu())
    total = time.perf_counter() - start
    return Generated(torch.cat(images), plan.model_calls, timed.seconds, total - timed.seconds)


def class_rows(classes: int, rows: int) -> Tensor:
    """0, 1, ..., classes - 1, that sequence `rows` times: int64 [rows classes], a grid with one column a class."""
    return torch.arange(classes).repeat(rows)
