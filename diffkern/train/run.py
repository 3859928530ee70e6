"""The folder of a run: where it stands, its log, its checkpoints and pictures."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from diffkern import parallel, pictures, storage
from diffkern.data import Batch, Images
from diffkern.extras import need
from diffkern.ops.flops import FLOP_FORMULAS
from diffkern.train import _format, checkpoint
from diffkern.train.config import TrainConfig
from diffkern.train.ema import Averages
from diffkern.train.learning_rate import learning_rate
from diffkern.train.log import CRITIC, Log, draw_curves, matrix_rate
from diffkern.train.stepper import Iteration, Stepper, in_mode

__all__ = ["Run", "first_used"]

CONFIG, LOCK = "config.yaml", ".lock"
PATIENCE = 15.0
"""Seconds until the reading processes of a job that was killed have ended too, which hold its lock as long."""
FREE = {  # what a run may be resumed with another value of: no step's numbers come from it, but for their rounding
    *(
        "data",
        "cache",
        "latents",
        "encode",
        "skip_bad",
        "workers",
        "micro_batch",
        "checkpointing",
        "channels_last",
        "compile",
        "shard",
    ),
    *("log_every", "save_every", "keep", "snapshot_every", "validate_every", "sample_every", "sampler", "sample_steps"),
    *("sample_n", "guidance", "tensorboard", "wandb", "device", "threads", "bad_steps", "iterations", "init"),
}


def first_used(averages: Averages) -> contextlib.AbstractContextManager[None]:
    """The averaged weights for a while, the first ones; the module's own where nothing is averaged."""
    return averages.used(averages.names[0]) if averages.names else contextlib.nullcontext()


class Run:
    """What `fit` keeps of a run in its folder; without a folder, what it shows alone.

    Every process has one: those beside the main one read, take part in what all must do, and write nothing.
    """

    def __init__(
        self,
        folder: Path | None,
        config: TrainConfig,
        images: Images,
        stepper: Stepper,
        averages: Averages,
        held_out: Images | None = None,
    ) -> None:
        self.folder, self.config, self.images, self.held_out = folder, config, images, held_out
        self.stepper, self.averages, self.trained = stepper, averages, stepper.trained
        self.shown: dict[str, str] = {}
        """What the progress bar says."""
        self._log: Log | None = None
        self._held = contextlib.ExitStack()
        self._window = _Window()
        self._saved: int | None = None
        self._flops, self._rate = 0.0, 1.0

    def resume(self) -> int:
        """Loads the newest checkpoint into everything, if there is one; the number of iterations done."""
        step = 0
        if self.folder is not None:
            parallel.by_main(self._enter)
            found = checkpoint.newest(self.folder)
            if found is not None:
                step = self._load(found)
                if step > self.config.iterations:
                    raise ValueError(
                        f"TrainConfig.iterations must be at least the {step} that the run in {self.folder} has done, "
                        f"got {self.config.iterations}"
                    )
            if self.config.sample_every is not None:
                self.stepper.check_pictures()
            parallel.barrier()  # all have read before the main process writes
            parallel.by_main(lambda: self._begin(step))
        self._measure()
        self._window.begin()
        return step

    def _enter(self) -> None:
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._held.enter_context(storage.locked(self.folder / LOCK, PATIENCE))
        except TimeoutError:
            raise ValueError(
                f"the run in {self.folder} must be trained by one job at a time, and another is at it: stop it, or "
                "give this one a folder of its own"
            ) from None

    def _begin(self, step: int) -> None:
        assert self.folder is not None
        self.config.save(self.folder / CONFIG)
        self._log = Log(self.folder, self.config, step)

    def _load(self, path: Path) -> int:
        found = checkpoint.load(
            path,
            diffusion=self.trained,
            averages=self.averages,
            optimizer=self.stepper.optimizer,
            expect=self._expected(path),
        )
        self.stepper.load_state(found.extra["stepper"])
        self._window = _Window(**found.extra["window"])
        self._saved = found.step
        return found.step

    def _same(self) -> dict[str, Any]:
        """What a run that is resumed has in common with itself, as JSON has it."""
        config = {name: value for name, value in self.config.to_dict().items() if name not in FREE}
        found: dict[str, Any] = json.loads(json.dumps({"config": config, "data": self.images.fingerprint}))
        return found

    def _expected(self, path: Path) -> dict[str, Any]:
        """What the checkpoint has to have; of a configuration from before a field was added it is the default."""
        found, stored = self._same(), _format.read(path).extra.get("config")
        plain = TrainConfig().to_dict()
        for name in [*found["config"]]:
            if isinstance(stored, dict) and name not in stored and found["config"][name] == plain[name]:
                del found["config"][name]
        return found

    def _measure(self) -> None:
        """How many operations an example costs (three times those of its forward pass), and a matrix product's rate."""
        if self.folder is None:
            return
        counter: Any = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
        eager = torch.compiler.set_stance("force_eager")  # no graph is compiled for a batch of one
        still = in_mode(self.trained, training=False)  # a network's statistics stay as they are
        with eager, counter, torch.no_grad(), still:
            self.stepper.once(self.images)
        self._flops = 3.0 * counter.get_total_flops()
        self._rate = matrix_rate(self.stepper.device, self.stepper.dtype)

    def note(self, step: int, done: Iteration, waited: float) -> None:
        """Takes in a step, and the seconds that its data took; logs when it is time."""
        window, config = self._window, self.config
        window.add(float(done.losses.mean()), done.norm, done.terms, waited)
        if done.warning is not None:
            self._warn(step, done.warning)
        if step % config.log_every and step != config.iterations:
            return
        seconds = window.seconds()
        speed = window.steps_here * config.batch / seconds
        values = {
            "loss": window.loss / window.steps if window.steps else math.nan,
            "gradient_norm": window.norm / window.steps if window.steps else math.nan,
            "learning_rate": learning_rate(config, step - 1),
            "images_per_second": speed,
            "data_share": window.waited / seconds,
            "matrix_share": self._flops * speed / (parallel.world() * self._rate) if self._flops else None,
            "skipped": self.stepper.skipped,
            **window.means(),
        }
        self.write(step, **values)
        self.shown = {"loss": f"{values['loss']:.4f}", "images/s": f"{speed:.3g}"}
        if CRITIC in values:
            self.shown["discriminator"] = f"{values[CRITIC]:.4f}"
        self._window = _Window()
        self._window.begin()

    def _warn(self, step: int, sentence: str) -> None:
        """Into the log, and to whoever watches."""
        self.write(step, warning=sentence)
        if parallel.is_main():
            print(f"warning: step {step}: {sentence}", file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """What is no training (files, pictures, validation) counts as no time of it."""
        start = time.perf_counter()
        yield
        self._window.paused += time.perf_counter() - start

    def write(self, step: int, **values: float | int | str | None) -> None:
        """A line of the log."""
        if self._log is not None:
            self._log.write(step, **values)
        if values.get("validation_loss") is not None:
            self.shown["validation"] = f"{values['validation_loss']:.4f}"

    def save(self, step: int) -> None:
        """A checkpoint, unless this step has one."""
        if self.folder is None or self._saved == step:
            return
        if self._log is not None:
            self._log.flush()  # so that no power cut leaves a checkpoint without the lines before it
        extra = {**self._same(), "stepper": self.stepper.state(), "window": self._window.state()}
        checkpoint.save(
            self.folder,
            step,
            diffusion=self.trained,
            averages=self.averages,
            optimizer=self.stepper.optimizer,
            extra=extra,
            keep=self.config.keep,
            keep_every=self.config.snapshot_every,
            sharded=self.config.shard == "fsdp",
        )
        self._saved = step

    def draw(self, step: int) -> None:
        """``samples/STEP.png`` by the averaged weights, and ``loss.png``."""
        if self.folder is None or not (parallel.is_main() or self.config.shard == "fsdp"):
            return
        with first_used(self.averages):
            rows, words, names = self.stepper.picture(self.images, self.held_out)
        if parallel.is_main():
            scale, title = pictures.default_scale(rows[0].shape[-1]), f"step {step}: {words}"
            grid = pictures.grid(rows, names=names, title=title, scale=scale)
            pictures.write(grid, self.folder / "samples" / f"{step:08d}.png")
            draw_curves(self.folder)

    def bad_batch(self, step: int, micro_batches: list[Batch]) -> str:
        """Writes the batch that gave no finite gradient; the sentence of the error."""
        text = (
            f"{self.stepper.bad} steps in a row had a gradient that is not finite, the last of them iteration {step}: "
            "lower the learning rate, or clip"
        )
        if self.folder is None:
            return text
        path = self.folder / f"bad_batch_{step}_{parallel.rank()}.safetensors"
        tensors = {f"{name}.{i}": value for i, b in enumerate(micro_batches) for name, value in b._asdict().items()}
        found = {name: v.contiguous() for name, v in tensors.items() if isinstance(v, torch.Tensor)}
        storage.write(path, need("safetensors.torch", "safetensors", "train").save(found))
        return f"{text}; its examples are in {path}"

    def finish(self, step: int) -> None:
        """``loss.png``, and where the last iteration is done what the objective leaves."""
        if self.folder is None:
            return
        if step == self.config.iterations:
            self.stepper.finish(self.images, self.folder, self.averages)
        if parallel.is_main():
            draw_curves(self.folder)

    def close(self) -> None:
        """Ends the log's files, and lets others write into the folder."""
        with self._held:
            if self._log is not None:
                self._log.close()


@dataclasses.dataclass
class _Window:
    """Means of the finite values since the last line of the log; what a checkpoint between two lines keeps of them."""

    loss: float = 0.0
    norm: float = 0.0
    steps: int = 0
    waited: float = 0.0
    paused: float = 0.0
    terms: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Of what an objective says beside its loss the sum, and of how many iterations it is."""
    steps_here: int = 0
    """Of this process: a resumed run's speed is that since it was resumed."""
    _started: float = 0.0

    def begin(self) -> None:
        self._started, self.waited, self.paused, self.steps_here = time.perf_counter(), 0.0, 0.0, 0

    def add(self, loss: float, norm: float, terms: Mapping[str, float], waited: float) -> None:
        if all(map(math.isfinite, (loss, norm, *terms.values()))):
            self.loss += loss
            self.norm += norm
            self.steps += 1
            for name, value in terms.items():
                before = self.terms.get(name, [0.0, 0])
                self.terms[name] = [before[0] + value, before[1] + 1]
        self.waited += waited
        self.steps_here += 1

    def seconds(self) -> float:
        return max(1e-9, time.perf_counter() - self._started - self.paused)

    def means(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.terms.items()}

    def state(self) -> dict[str, Any]:
        found = {"loss": self.loss, "norm": self.norm, "steps": self.steps}
        return {**found, "terms": self.terms} if self.terms else found
