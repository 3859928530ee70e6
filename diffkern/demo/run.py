"""The whole demo: train, sample with every sampler, judge, draw, and write a table. `run_demo` is ``python -m diffkern
demo``."""

from __future__ import annotations

import dataclasses
import json
import platform
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffkern import pictures, storage
from diffkern.demo import need
from diffkern.demo.data import CLASSES, Digits, load_digits
from diffkern.demo.evaluate import Judge, train_judge
from diffkern.demo.generate import class_rows, generate
from diffkern.demo.pictures import forward_strip, trajectory_strip
from diffkern.demo.recipe import Recipe
from diffkern.demo.train import TrainConfig, train
from diffkern.generate import described, recommended

if TYPE_CHECKING:
    from diffkern.diffusion import Diffusion

RUNS = (("ddpm", 250), ("ddim", 50), ("ddim", 10), ("euler", 30), ("heun", 15))
"""Samplers of the demo with their steps."""
GRID_ROWS = 8
EXTRAS = (
    ("sklearn", "scikit-learn"),
    ("matplotlib", "matplotlib"),
    ("PIL", "Pillow"),
    ("safetensors", "safetensors"),
    ("tqdm", "tqdm"),
)


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """What the demo does. `per_class`: images of each class, for each sampler, that the measures are taken from."""

    out: Path = Path("out/demo")
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    recipe: Recipe = dataclasses.field(default_factory=Recipe)
    per_class: int = 40
    judge_epochs: int = 30
    runs: tuple[tuple[str, int], ...] = RUNS
    device: str = "cpu"
    progress: bool = True


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the table."""

    sampler: str
    steps: int | None
    model_calls: int | None
    model_seconds: float | None
    update_seconds: float | None
    agreement: float
    frechet: float


def markdown(lines: list[Line]) -> str:
    """The table, in Markdown that also reads well in a terminal."""
    heads = ("sampler", "steps", "model calls", "model s", "update s", "agreement", "Frechet")
    cells = [heads]
    for line in lines:
        numbers = [
            line.sampler,
            "" if line.steps is None else str(line.steps),
            "" if line.model_calls is None else str(line.model_calls),
            "" if line.model_seconds is None else f"{line.model_seconds:.2f}",
            "" if line.update_seconds is None else f"{line.update_seconds:.3f}",
            f"{line.agreement:.3f}",
            f"{line.frechet:.2f}",
        ]
        cells.append(tuple(numbers))  # type: ignore[arg-type]
    widths = [max(len(row[c]) for row in cells) for c in range(len(heads))]
    rows = [
        "| "
        + " | ".join(v.ljust(w) if c == 0 else v.rjust(w) for c, (v, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in cells
    ]
    rule = "|" + "|".join("-" * (w + 2) if c == 0 else "-" * (w + 1) + ":" for c, w in enumerate(widths)) + "|"
    return "\n".join([rows[0], rule, *rows[1:]])


def run_demo(config: DemoConfig | None = None) -> list[Line]:
    """Everything, into the folder ``config.out``; returns the lines of the table.

    Written: forward.png, loss.png, real.png, trajectory.png, a class-conditional grid for each sampler
    (``ddim_50.png`` ...), config.json and model.safetensors (`Diffusion.save_pretrained`), table.md and results.json.
    """
    config = config or DemoConfig()
    for module, package in EXTRAS:  # before the minutes of training, not after
        need(module, package)
    start = time.perf_counter()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    recipe = dataclasses.replace(config.recipe, training=dataclasses.asdict(config.train))
    schedule = recipe.make_schedule()
    digits = load_digits()
    _say(f"{len(digits.images)} digits to train on, {len(digits.held_out_images)} kept apart; writing to {out}")
    one_of_each = torch.stack([digits.images[digits.labels == c][0] for c in range(CLASSES)])
    pictures.write(forward_strip(one_of_each, schedule, recipe.prediction), out / "forward.png")
    judge = train_judge(digits, epochs=config.judge_epochs, progress=config.progress)
    lines = [_real(digits, judge, out)]

    trained = train(
        digits,
        schedule,
        recipe.unet,
        config.train,
        prediction=recipe.prediction,
        device=config.device,
        progress=config.progress,
    )
    pictures.loss_curve(trained.losses, out / "loss.png")
    from diffkern.diffusion import Diffusion

    diffusion = Diffusion(trained.model, schedule, recipe.prediction)
    diffusion.save_pretrained(out)
    training_seconds = time.perf_counter() - start
    _say(f"trained in {training_seconds:.0f} s, loss {sum(trained.losses[-50:]) / len(trained.losses[-50:]):.4f}")

    for sampler, steps in config.runs:
        lines.append(_sampler(sampler, steps, diffusion, recipe, judge, config))
    plan = recommended(diffusion, "ddim")
    strip = trajectory_strip(trained.model, plan, class_rows(CLASSES, 1), guidance=recipe.guidance, seed=recipe.seed)
    pictures.write(strip, out / "trajectory.png")

    total = time.perf_counter() - start
    table = markdown(lines)
    storage.write(out / "table.md", table + "\n")
    results = {
        "samplers": [dataclasses.asdict(line) for line in lines],
        "images_per_sampler": config.per_class * CLASSES,
        "guidance": recipe.guidance,
        "training_seconds": training_seconds,
        "total_seconds": total,
        "final_loss": sum(trained.losses[-50:]) / len(trained.losses[-50:]),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.machine(),
        "device": config.device,
    }
    storage.write(out / "results.json", json.dumps(results, indent=2) + "\n")
    _say("")
    _say(table)
    _say("")
    _say(
        f"{config.per_class * CLASSES} images a sampler, guidance {recipe.guidance:g}; agreement: share that a "
        "classifier of real digits reads as asked for; Frechet: distance of its features to the training images."
    )
    _say(f"{total:.0f} s in total; pictures, checkpoint and table are in {out}. Again, or differently:")
    _say(f"  python -m diffkern sample --run {out} --sampler ddim --steps 50 --guidance 1.5 --ink --out grid.png")
    return lines


def _say(text: str) -> None:
    print(text, flush=True)


def _real(digits: Digits, judge: Judge, out: Path) -> Line:
    """The line of the digits kept apart, what the generated ones are to be compared with; and a picture of some."""
    images, labels = digits.held_out_images, digits.held_out_labels
    quality = judge.measure(images, labels)
    order = [images[labels == c][:GRID_ROWS] for c in range(CLASSES)]
    rows = torch.stack(order, dim=1).flatten(0, 1)
    shown = class_rows(CLASSES, GRID_ROWS)
    pictures.write(
        pictures.class_grid(rows, shown, "real digits, kept apart from the training", ink=True), out / "real.png"
    )
    return Line("real digits", None, None, None, None, quality.agreement, quality.frechet)


def _sampler(sampler: str, steps: int, diffusion: Diffusion, recipe: Recipe, judge: Judge, config: DemoConfig) -> Line:
    """Sample with one sampler, measure, and draw the first rows."""
    from diffkern.samplers import get_sampler

    plan = recommended(diffusion, get_sampler(sampler), steps)
    classes = class_rows(CLASSES, config.per_class)
    made = generate(
        diffusion.model,  # type: ignore[arg-type]
        plan,
        classes,
        seed=recipe.seed,
        guidance=recipe.guidance,
        micro_batch=recipe.micro_batch,
        progress=f"{plan.name} {steps}" if config.progress else False,
    )
    shown = GRID_ROWS * CLASSES
    picture = pictures.class_grid(made.images[:shown], classes[:shown], described(plan, recipe.guidance), ink=True)
    pictures.write(picture, config.out / f"{plan.name}_{steps}.png")
    quality = judge.measure(made.images, classes)
    return Line(
        plan.name, steps, made.model_calls, made.model_seconds, made.update_seconds, quality.agreement, quality.frechet
    )
