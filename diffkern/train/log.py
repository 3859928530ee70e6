"""What a run tells: one JSON object a line in ``log.jsonl``, TensorBoard and wandb where asked, curves as PNG."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from diffkern import pictures, records, storage
from diffkern.extras import need
from diffkern.train.config import TrainConfig

__all__ = ["CRITIC", "Log", "draw_curves", "matrix_rate", "read_log"]

LOG, WANDB = "log.jsonl", "wandb_id"
CRITIC = "discriminator_loss"


class Log:
    """The log of a run, for its main process: ``write(step, loss=..., ...)`` adds a line.

    A resumed run is cut back to the step that it resumes from, so that every step stands once.
    """

    def __init__(self, folder: Path, config: TrainConfig, step: int = 0) -> None:
        self.path = folder / LOG
        kept = [json.dumps(entry) + "\n" for entry in read_log(folder) if entry["step"] <= step] if step else []
        storage.write(self.path, "".join(kept))
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  (closed by `close`)
        self._board: Any = None
        self._run: Any = None
        board = config.tensorboard
        if board is None:
            board = importlib.util.find_spec("tensorboard") is not None
        if board:
            writer = need("torch.utils.tensorboard", "tensorboard", "train").SummaryWriter
            self._board = writer(str(folder / "tensorboard"), purge_step=step + 1)
        if config.wandb is not None:
            wandb = need("wandb", "wandb", "wandb")
            run = folder / WANDB  # a run that is resumed goes on in it
            if step == 0 or not run.exists():
                storage.write(run, uuid.uuid4().hex)
            self._run = wandb.init(
                project=config.wandb, dir=str(folder), config=config.to_dict(), id=run.read_text(), resume="allow"
            )

    def write(self, step: int, **values: float | int | str | None) -> None:
        """One line: the step and the values that are there; null for one that is not finite, which JSON does not have.
        It is in the file when this returns. OSError naming the file for a full disk."""
        found = {name: value for name, value in values.items() if value is not None}
        numbers = {name: value for name, value in found.items() if not isinstance(value, str)}
        written = {**found, **{name: None for name, value in numbers.items() if not math.isfinite(value)}}
        with self._named():
            self._file.write(json.dumps({"step": step, **written}, allow_nan=False) + "\n")
            self._file.flush()
        for name, value in numbers.items():
            if self._board is not None:
                self._board.add_scalar(name, value, step)
        if self._run is not None:
            self._run.log(numbers, step=step)

    def flush(self) -> None:
        """Has the system write the lines to the disk."""
        with self._named():
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Ends the files."""
        with contextlib.ExitStack() as every:  # each, whatever becomes of the others
            if self._run is not None:
                every.callback(self._run.finish)
            if self._board is not None:
                every.callback(self._board.close)
            with contextlib.suppress(OSError):  # of a line that could not be written, which `write` has said
                self._file.close()

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Errors of the disk name the file."""
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error


def read_log(folder: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's ``log.jsonl``, in order; [] without one. A last line that was cut short is left out.

    ValueError naming the line for any other that is none of ours.
    """
    path = Path(folder) / LOG
    if not path.exists():
        return []
    found = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            entry = records.parse(line, "JSON", f"{path} line {number}")
            if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
                raise ValueError(f"{path} line {number} must be an object with a step, got {records.shown(line)}")
        except ValueError:
            if number == len(lines):  # without its newline: the writer was killed
                break
            raise
        found.append(entry)
    return found


def draw_curves(folder: Path) -> None:
    """``loss.png`` of the run: its training loss by the step, and the discriminator's where there is one."""
    entries = [entry for entry in read_log(folder) if entry.get("loss") is not None]
    if len(entries) > 1:
        values, steps = [entry["loss"] for entry in entries], [entry["step"] for entry in entries]
        other = [(entry["step"], entry[CRITIC]) for entry in entries if entry.get(CRITIC) is not None]
        beside = {"discriminator": ([step for step, _ in other], [value for _, value in other])} if other else None
        pictures.loss_curve(values, folder / "loss.png", iterations=steps, what="training objective", beside=beside)


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int = 1024) -> float:
    """Floating-point operations a second of a product of square matrices here, the best of a few: some 0.1 s."""
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
