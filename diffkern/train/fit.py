"""Training a `Diffusion`: one loop, each part of which can be used alone or replaced in a copy of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from diffkern import parallel
from diffkern.data import Images, Stream, loader, open_images, split
from diffkern.diffusion import Diffusion
from diffkern.progress import progress_bar
from diffkern.train.config import TrainConfig
from diffkern.train.ema import Averages
from diffkern.train.learning_rate import learning_rate
from diffkern.train.objectives import make_diffusion, resampling
from diffkern.train.run import Run, first_used
from diffkern.train.sharded import shard
from diffkern.train.signals import Stop
from diffkern.train.steps import Stepper, prepare
from diffkern.train.validation import validate

__all__ = ["Fitted", "fit"]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What training leaves: the diffusion with its last weights, their averages, and how far it came."""

    diffusion: Diffusion
    averages: Averages
    step: int
    """Iterations done."""
    stopped: bool
    """Whether a signal ended it before its last iteration."""
    losses: list[float]
    """The mean loss of each iteration of this call."""


def fit(
    diffusion: Diffusion | None,
    data: Any,
    config: TrainConfig | None = None,
    *,
    out: str | os.PathLike[str] | None = None,
    held_out: Images | None = None,
    progress: bool | str = True,
    callback: Callable[[int, float], None] | None = None,
) -> Fitted:
    """Trains the diffusion (one made of the configuration if None) on the images, from where the run folder stands.

    ``data`` is what `diffkern.data.open_images` takes, or `Images` that are open, with size and flips of their own.
    ``held_out`` images, or the share ``config.validation`` of the
    data, give the validation loss. Without a folder ``out`` nothing is written. ``callback(step, loss)`` is called
    after each step. Under torchrun every process calls this alike.

    Noise, times, dropped conditions, order and augmentations are functions of (seed, position of the example in the
    run): the same for any number of processes, workers and micro-batches, and after a resumption. Gradients are sums
    whose order is that of micro-batches and processes. A signal (SIGTERM, SIGINT) ends the step, saves and returns.

    ValueError in one sentence for a folder with another run; RuntimeError where too many steps in a row had no finite
    gradient, after the batch was written to ``out``.
    """
    config = config or TrainConfig()
    device = parallel.device_of(config.device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with parallel.job(device), Stop() as stop, torch.random.fork_rng(devices=[]):
        folder = None if out is None else Path(out)
        images, held_out = _images(data, config, held_out)
        if diffusion is None:
            classes = images.classes if config.labels and images.labels is not None else None
            diffusion = make_diffusion(config, images.shape, 0 if classes is None else len(classes))
        prepare(diffusion, config, device)
        if config.shard == "fsdp":
            shard(diffusion.model)
        times = resampling(config, diffusion)
        stepper = Stepper(diffusion, config, device, times)
        averages = Averages(diffusion, config.averages, config.plain_average)
        run = Run(folder, config, images, stepper, averages)
        step = run.resume()
        losses: list[float] = []
        bar = progress_bar(progress if parallel.is_main() else False, "training", config.iterations, initial=step)
        batches: Any = loader(
            images,
            Stream(len(images), config.seed),
            batch=config.batch,
            seed=config.seed,
            first=step * config.batch,
            micro_batch=config.micro_batch,
            workers=config.workers,
            end=config.iterations * config.batch,
            pin=device.type == "cuda",
        )
        stopped = False
        with contextlib.closing(batches), contextlib.closing(run):
            while step < config.iterations and not stopped:
                waited = time.perf_counter()
                micro_batches = next(batches)
                waited = time.perf_counter() - waited
                every, stopped = stepper.gradient(micro_batches, step, stop.asked)
                loss, norm = float(every.mean()), stepper.step(learning_rate(config, step))
                if stepper.too_many_bad:
                    raise RuntimeError(run.bad_batch(step, micro_batches))
                step += 1
                averages.update(step)
                losses.append(loss)
                run.note(step, loss, norm, waited)
                with run.aside():
                    if held_out is not None and _due(step, config.validate_every, config):
                        with first_used(averages):
                            found = validate(diffusion, held_out)
                        run.write(step, validation_loss=found.loss, bits_per_dim=found.bits_per_dim)
                    if config.sample_every is not None and _due(step, config.sample_every, config):
                        run.draw(step)
                    if stopped or _due(step, config.save_every, config):
                        run.save(step)
                if callback is not None:
                    callback(step, loss)
                if bar is not None:
                    bar.set_postfix(run.shown, refresh=False)
                    bar.update()
        if bar is not None:
            bar.close()
        run.finish()
        return Fitted(diffusion, averages, step, stopped and step < config.iterations, losses)


def _due(step: int, every: int | None, config: TrainConfig) -> bool:
    """Whether it is time again; the last iteration always is."""
    return (every is not None and step % every == 0) or step == config.iterations


def _images(data: Any, config: TrainConfig, held_out: Images | None) -> tuple[Images, Images | None]:
    """The images to train on and those kept apart."""
    images = data
    if not isinstance(data, Images):
        images = open_images(
            data,
            size=config.size,
            channels=config.channels,
            crop=config.crop,
            flip=config.flip,
            cache=config.cache,
            skip_bad=config.skip_bad,
            limit=config.limit,
        )
    if config.validation and held_out is None:
        share = config.validation
        return split(images, share if share < 1.0 else int(share))
    return images, held_out
