"""The whole demo by the package's own parts: train, sample with several samplers, measure, draw, and write a table.
`run_demo` is ``python -m diffkern demo``."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkern import pictures, storage
from diffkern.data import Images, open_images, split
from diffkern.demo.pictures import forward_strip, trajectory_strip
from diffkern.extras import need
from diffkern.generate import described, generate, recommended
from diffkern.metrics import Classifier, Scores, evaluate, train_classifier
from diffkern.train import PRESETS, TrainConfig, fit

__all__ = ["RUNS", "DemoConfig", "Line", "markdown", "run_demo"]

RUNS = (("ddpm", 100), ("ddim", 50), ("ddim", 10), ("dpmpp_2m", 15), ("heun", 10))
"""Samplers of the demo with their steps."""
GRID_ROWS = 8
EXTRAS = (
    ("sklearn", "scikit-learn"),
    ("matplotlib", "matplotlib"),
    ("PIL", "Pillow"),
    ("safetensors", "safetensors"),
    ("yaml", "PyYAML"),
)


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """What the demo does. `per_class`: images of each class, for each sampler, that the measures are taken from."""

    out: Path = Path("out/demo")
    train: TrainConfig = PRESETS["digits"]
    per_class: int = 40
    guidance: float = 1.5
    micro_batch: int = 80
    runs: tuple[tuple[str, int], ...] = RUNS
    progress: bool = True


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table."""

    images: str
    steps: int | None
    model_calls: int | None
    seconds: float | None
    agreement: float
    frechet: float
    precision: float
    recall: float


def markdown(lines: list[Line]) -> str:
    """The table, in Markdown that also reads well in a terminal."""
    cells = [("sampler", "steps", "model calls", "seconds", "agreement", "Frechet", "precision", "recall")]
    for line in lines:
        whole = ("" if value is None else str(value) for value in (line.steps, line.model_calls))
        seconds = "" if line.seconds is None else f"{line.seconds:.1f}"
        scores = (f"{line.agreement:.3f}", f"{line.frechet:.2f}", f"{line.precision:.3f}", f"{line.recall:.3f}")
        cells.append((line.images, *whole, seconds, *scores))  # type: ignore[arg-type]
    widths = [max(len(row[c]) for row in cells) for c in range(len(cells[0]))]
    rows = [
        "| "
        + " | ".join(v.rjust(w) if c else v.ljust(w) for c, (v, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 1) + ":" if c else "-" * (w + 2) for c, w in enumerate(widths)) + "|"
    return "\n".join([rows[0], rule, *rows[1:]])


def run_demo(config: DemoConfig | None = None) -> list[Line]:
    """Everything, into the folder ``config.out``, which is a run's folder; returns the lines of the table.

    A run that is there goes on. Written beside it: forward.png, real.png, trajectory.png, a grid for each sampler
    (``ddim_50.png`` ...), table.md and results.json.
    """
    config = config or DemoConfig()
    for module, package in EXTRAS:  # before the minutes of training, not after
        need(module, package, "demo")
    start, out = time.perf_counter(), Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    images, held_out = split(open_images("digits"), int(config.train.validation))
    assert images.classes is not None
    _say(f"{len(images)} digits to train on, {len(held_out)} kept apart; writing to {out}")
    judge = train_classifier(images, progress=config.progress)
    lines = [_real(images, held_out, judge, out)]

    began = time.perf_counter()
    fitted = fit(None, "digits", config.train, out=out, progress=config.progress)
    if fitted.stopped:
        _say(
            f"stopped after {fitted.step} of {config.train.iterations} iterations; the same command goes on from there"
        )
        return lines
    training = time.perf_counter() - began
    diffusion, classes = fitted.diffusion, len(images.classes)
    loss = f", loss {sum(fitted.losses[-50:]) / len(fitted.losses[-50:]):.4f}" if fitted.losses else ""
    _say(f"trained in {training:.0f} s{loss}")
    with fitted.averages.used(fitted.averages.names[0]):
        one_of_each = torch.stack([_of_class(images, c, 1)[0] for c in range(classes)])
        pictures.write(forward_strip(one_of_each, diffusion), out / "forward.png")
        pictures.write(trajectory_strip(diffusion, classes, config.guidance), out / "trajectory.png")
        lines += [_sampler(diffusion, sampler, steps, images, judge, config) for sampler, steps in config.runs]

    total, table = time.perf_counter() - start, markdown(lines)
    storage.write(out / "table.md", table + "\n")
    results = {
        "samplers": [dataclasses.asdict(line) for line in lines],
        "images_per_sampler": config.per_class * classes,
        "guidance": config.guidance,
        "training_seconds": training,
        "total_seconds": total,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "device": config.train.device,
    }
    storage.write(out / "results.json", json.dumps(results, indent=2) + "\n")
    _say(f"\n{table}\n")
    _say(
        f"{config.per_class * classes} images a sampler, guidance {config.guidance:g}; agreement: share that a "
        "classifier of real digits reads as asked for; Frechet: distance of its features to the training images; "
        "precision, recall: shares of them among each other."
    )
    _say(f"{total:.0f} s in total; pictures, run and table are in {out}. Again, or differently:")
    _say(f"  python -m diffkern sample --run {out} --sampler ddim --steps 50 --ink --out grid.png")
    _say(f"  python -m diffkern evaluate --run {out} --data digits --n 1000")
    return lines


def _say(text: str) -> None:
    print(text, flush=True)


def _of_class(images: Images, which: int, n: int) -> Tensor:
    assert images.labels is not None
    return images.batch(torch.nonzero(images.labels == which)[:n, 0])[0]


def _real(images: Images, held_out: Images, judge: Classifier, out: Path) -> Line:
    """The line of the digits kept apart, what the generated ones are to be compared with; and a picture of some."""
    x0, labels = held_out.batch(torch.arange(len(held_out)))
    rows = torch.stack([_of_class(held_out, c, GRID_ROWS) for c in range(10)], dim=1).flatten(0, 1)
    drawn = pictures.class_grid(
        rows, torch.arange(10).repeat(GRID_ROWS), "real digits, kept apart from the training", ink=True
    )
    pictures.write(drawn, out / "real.png")
    return _line("real digits", None, None, None, evaluate(x0, images, judge, labels=labels))


def _sampler(diffusion: Any, sampler: Any, steps: int, images: Images, judge: Classifier, config: DemoConfig) -> Line:
    """Sample with one sampler, measure, and draw the first rows."""
    plan = recommended(diffusion, sampler, steps)
    start = time.perf_counter()
    parts = list(
        generate(
            diffusion,
            10 * config.per_class,
            plan,
            seed=config.train.seed,
            classes="even",
            guidance=config.guidance,
            micro_batch=config.micro_batch,
            progress=config.progress,
        )
    )
    seconds = time.perf_counter() - start
    made = torch.cat([part.images.cpu() for part in parts])
    labels = torch.cat([part.classes for part in parts if part.classes is not None])
    shown = GRID_ROWS * 10
    title = described(plan, config.guidance)
    drawn = pictures.class_grid(made[:shown], labels[:shown], title, ink=True)
    pictures.write(drawn, config.out / f"{plan.name}_{steps}.png")
    scores = evaluate(made, images, judge, labels=labels)
    return _line(plan.name, steps, plan.model_calls, seconds, scores)


def _line(name: str, steps: int | None, calls: int | None, seconds: float | None, scores: Scores) -> Line:
    assert scores.agreement is not None
    return Line(name, steps, calls, seconds, scores.agreement, scores.fid, scores.precision, scores.recall)
