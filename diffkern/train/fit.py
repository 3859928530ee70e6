"""Training a `Diffusion`: one loop, each part of which can be used alone or replaced in a copy of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from diffkern import parallel
from diffkern.data import Images, Stream, loader, open_images, split
from diffkern.diffusion import Diffusion
from diffkern.progress import progress_bar
from diffkern.train.config import TrainConfig
from diffkern.train.ema import Averages
from diffkern.train.parts import part_of
from diffkern.train.run import Run, first_used
from diffkern.train.sharded import shard
from diffkern.train.signals import Stop
from diffkern.train.stepper import Trained, in_mode, prepare

__all__ = ["Fitted", "fit"]


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What training leaves: the model with its last weights, their averages, and how far it came."""

    trained: Any
    """What was trained: a `diffkern.Diffusion`, or what another objective trains."""
    averages: Averages
    step: int
    """Iterations done."""
    stopped: bool
    """Whether a signal ended it before its last iteration."""
    losses: list[float]
    """The mean loss of each iteration of this call."""

    @property
    def diffusion(self) -> Diffusion:
        """``trained``, where it is one."""
        if not isinstance(self.trained, Diffusion):
            raise AttributeError(f"what was trained is no Diffusion, but a {type(self.trained).__name__}: .trained")
        return self.trained


def fit(
    diffusion: Diffusion | Trained | None,
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
    Their labels are given to the network where the diffusion has a ``null``, the condition that means none.
    Of a diffusion in latents they are encoded (docs/latent.md).
    ``held_out`` images, or the share ``config.validation`` of the data, give the validation loss. Without a folder
    ``out`` nothing is written. ``callback(step, loss)`` is called after each step. Under torchrun every process calls
    this alike.

    Noise, times, dropped conditions, order and augmentations are functions of (seed, position of the example in the
    run): the same for any number of processes, workers and micro-batches, and after a resumption. Gradients are sums
    whose order is that of micro-batches and processes. A signal (SIGTERM, SIGINT) ends the step, saves and returns.

    torch's generators and number of threads, and the mode of every module, are afterwards as they were.

    ValueError in one sentence for a folder with another run, for images or labels that are not the diffusion's, and for
    fewer iterations than are done; RuntimeError where too many steps in a row had no finite
    gradient, after the batch was written to ``out``.
    """
    config = config or TrainConfig()
    device = parallel.device_of(config.device)
    with contextlib.ExitStack() as opened:
        opened.enter_context(_surroundings(config, device))
        opened.enter_context(parallel.job(device))
        folder = None if out is None else Path(out)
        progress = progress if parallel.is_main() else False
        images, held_out = _images(data, config, held_out, progress)
        part = part_of(config, diffusion)
        trained: Any = part.make(config, images, folder) if diffusion is None else diffusion
        part.check(trained, config, images)
        opened.enter_context(in_mode(trained, training=True))
        prepare(trained, config, device)
        if config.shard == "fsdp":
            shard(trained.model)
        stepper = part(trained, config, device)
        images = stepper.seen(images, folder, progress)
        held_out = None if held_out is None else stepper.seen(held_out, folder, progress)
        averages = Averages(stepper.averaged, config.averages, config.plain_average)
        run = opened.enter_context(contextlib.closing(Run(folder, config, images, stepper, averages, held_out)))
        step = run.resume()
        losses: list[float] = []
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
        opened.enter_context(contextlib.closing(batches))
        stop, stopped = opened.enter_context(Stop()), False
        bar = progress_bar(progress, "training", config.iterations, initial=step)
        if bar is not None:
            opened.enter_context(contextlib.closing(bar))
        while step < config.iterations and not stopped:
            waited = time.perf_counter()
            micro_batches = next(batches)
            waited = time.perf_counter() - waited
            done = stepper.iterate(micro_batches, step, stop.asked)
            loss, stopped = float(done.losses.mean()), done.stopped
            if stepper.too_many_bad:
                raise RuntimeError(run.bad_batch(step, micro_batches))
            step += 1
            averages.update(step)
            losses.append(loss)
            run.note(step, done, waited)
            with run.aside():
                if held_out is not None and _due(step, config.validate_every, config):
                    with first_used(averages):
                        found = stepper.validate(held_out)
                    run.write(step, **found)
                if config.sample_every is not None and _due(step, config.sample_every, config):
                    run.draw(step)
                if stopped or _due(step, config.save_every, config):
                    run.save(step)
            if callback is not None:
                callback(step, loss)
            if bar is not None:
                bar.set_postfix(run.shown, refresh=False)
                bar.update()
        run.finish(step)
        return Fitted(trained, averages, step, stopped and step < config.iterations, losses)


@contextlib.contextmanager
def _surroundings(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """torch's generators and number of threads are afterwards as they were."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            torch.set_num_threads(config.threads or threads)
            yield
        finally:
            torch.set_num_threads(threads)


def _due(step: int, every: int | None, config: TrainConfig) -> bool:
    """Whether it is time again; the last iteration always is."""
    return (every is not None and step % every == 0) or step == config.iterations


def _images(
    data: Any, config: TrainConfig, held_out: Images | None, progress: bool | str
) -> tuple[Images, Images | None]:
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
            labels="text" if config.text else None,
            progress=progress if isinstance(data, str | os.PathLike) else False,
        )
    if config.validation and held_out is None:
        share = config.validation
        return split(images, share if share < 1.0 else int(share))
    return images, held_out
