"""The commands `demo` and `sample` of ``python -m diffkern``: arguments, and one clear sentence where they are
wrong."""

from __future__ import annotations

import argparse
import dataclasses
import sys

import torch

from diffkern import _load, pictures, records
from diffkern.command._machine import crowding
from diffkern.demo import checkpoint
from diffkern.demo.checkpoint import Recipe
from diffkern.demo.data import CLASSES
from diffkern.demo.generate import DEFAULT_STEPS, generate, make_plan
from diffkern.demo.run import GRID_ROWS, DemoConfig, grid_title, output_file, output_folder, run_demo
from diffkern.demo.train import TrainConfig

MOST_IMAGES = 1_000_000
MOST_THREADS = 1024


def add_demo(parser: argparse.ArgumentParser) -> None:
    """The arguments of `demo`."""
    training, recipe, demo = TrainConfig(), Recipe(), DemoConfig()
    parser.add_argument("--out", default=str(demo.out), help="folder for pictures, checkpoint, table (%(default)s)")
    parser.add_argument("--iterations", type=int, default=training.iterations, help="of training (%(default)s)")
    parser.add_argument("--batch", type=int, default=training.batch, help="images in each (%(default)s)")
    parser.add_argument(
        "--per-class", type=int, default=demo.per_class, help="images of each class for each sampler (%(default)s)"
    )
    parser.add_argument("--guidance", type=float, default=recipe.guidance, help="guidance weight (%(default)s)")
    parser.add_argument("--seed", type=int, default=training.seed, help="of training and of sampling (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    _add_threads(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.set_defaults(run=_demo)


def add_sample(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sample`."""
    steps = ", ".join(f"{name} {n}" for name, n in DEFAULT_STEPS.items())
    parser.add_argument("--checkpoint", required=True, help="model.safetensors, as `diffkern demo` writes it")
    parser.add_argument("--sampler", default="ddim", help=f"one of {', '.join(DEFAULT_STEPS)} (%(default)s)")
    parser.add_argument("--steps", type=int, help=f"steps of the sampler ({steps})")
    parser.add_argument("--eta", type=float, help="ddim only: 0 is deterministic, 1 is DDPM's noise (0)")
    parser.add_argument("--seed", type=int, help="of the job (the checkpoint's)")
    parser.add_argument("--classes", help=f"classes, one image each: 3 or 0,1,7 or 0-9 (all, {GRID_ROWS} times)")
    parser.add_argument("--per-class", type=int, help="repeat the classes so many times (1 with --classes)")
    parser.add_argument("--first", type=int, default=0, help="number of the first image in the job (%(default)s)")
    parser.add_argument("--guidance", type=float, help="guidance weight, 1 for none (the checkpoint's)")
    parser.add_argument(
        "--micro-batch", type=int, help="images sampled together; 1: an image has the same bits in every job"
    )
    parser.add_argument("--out", help="PNG with all images (grid.png unless --out-dir is given)")
    parser.add_argument("--out-dir", help="folder for one PNG an image")
    parser.add_argument("--scale", type=int, default=pictures.SCALE, help="enlargement (%(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    _add_threads(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=_sample)


def _add_threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--threads",
        type=int,
        help="CPU threads (torch's choice); fewer are faster on a busy machine. Images repeat bit for bit "
        "at the same number only",
    )


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads must be at least 1, got {threads}")
        if threads > MOST_THREADS:
            raise ValueError(f"--threads must be at most {MOST_THREADS}, got {records.shown(threads)}")
        torch.set_num_threads(threads)


def _demo(arguments: argparse.Namespace) -> int:
    _use_threads(arguments.threads)
    _check_count("--per-class", arguments.per_class, MOST_IMAGES // CLASSES)
    training = TrainConfig(iterations=arguments.iterations, batch=arguments.batch, seed=arguments.seed)
    recipe = dataclasses.replace(Recipe(), guidance=arguments.guidance, seed=arguments.seed)
    config = DemoConfig(
        train=training,
        recipe=recipe,
        per_class=arguments.per_class,
        device=check_device(arguments.device),
        progress=not arguments.quiet,
    )
    found = crowding() if config.device == "cpu" else None
    if found is not None:
        print(f"warning: {found}", file=sys.stderr, flush=True)
    run_demo(dataclasses.replace(config, out=output_folder(arguments.out)))  # made last, when all else is right
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    _use_threads(arguments.threads)
    model, recipe = checkpoint.load(arguments.checkpoint, check_device(arguments.device))
    plan = make_plan(
        arguments.sampler, recipe.make_schedule(), arguments.steps, prediction=recipe.prediction, eta=arguments.eta
    )
    every = list(range(recipe.unet.classes))
    chosen = every if arguments.classes is None else parse_classes(arguments.classes, recipe.unet.classes)
    repeats = arguments.per_class
    if repeats is None:
        repeats = GRID_ROWS if arguments.classes is None else 1
    _check_count("--per-class", repeats, MOST_IMAGES // max(1, len(chosen)))
    count = len(chosen) * repeats
    if arguments.first < 0:
        raise ValueError(f"--first must not be negative, got {arguments.first}")
    if arguments.first > 2**63 - count:
        raise ValueError(f"--first must be at most 2**63 - {count}, got {records.shown(arguments.first)}")
    asked = {"guidance": arguments.guidance, "seed": arguments.seed, "micro_batch": arguments.micro_batch}
    recipe = dataclasses.replace(recipe, **{name: value for name, value in asked.items() if value is not None})
    grid = arguments.out is not None or arguments.out_dir is None
    size = recipe.unet.shape[1]
    if recipe.unet.in_channels != 1:
        raise ValueError(f"images must have 1 channel to be drawn, got {recipe.unet.in_channels} in this checkpoint")
    pictures.check_scale(arguments.scale, size, count if grid else 1)
    classes = torch.tensor(chosen).repeat(repeats)
    folder = None if arguments.out_dir is None else output_folder(arguments.out_dir)
    path = output_file(arguments.out or "grid.png") if grid else None
    made = generate(
        model,
        plan,
        classes,
        seed=recipe.seed,
        first=arguments.first,
        guidance=recipe.guidance,
        micro_batch=recipe.micro_batch,
        progress=not arguments.quiet,
    )
    if folder is not None:
        for j, (image, digit) in enumerate(zip(made.images, classes.tolist(), strict=True), start=arguments.first):
            pictures.write(pictures.tile(image, arguments.scale, ink=True), folder / f"{j:05d}_class{digit}.png")
        print(f"{len(classes)} images in {folder}")
    if path is not None:
        columns = len(chosen) if repeats > 1 else min(10, len(chosen))
        title = grid_title(plan, recipe.guidance)
        drawn = pictures.class_grid(made.images, classes, title, columns=columns, scale=arguments.scale, ink=True)
        pictures.write(drawn, path)
        print(f"{len(classes)} images in {path}")
    print(f"{made.model_seconds:.2f} s in the model, {made.update_seconds:.3f} s in the sampler")
    return 0


def _check_count(name: str, count: int, most: int) -> None:
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    if count > most:
        raise ValueError(f"{name} must be at most {most} (a job has {MOST_IMAGES} images), got {records.shown(count)}")


def parse_classes(text: str, classes: int) -> list[int]:
    """A list from "3", "0,1,7", "0-9" and mixtures of them; a class that the model does not have is a ValueError."""
    found: list[int] = []
    for part in text.split(","):
        ends = part.strip().split("-")
        if len(ends) > 2 or not all(end.isdecimal() and len(end) < 20 for end in ends):
            raise ValueError(f"--classes must be like 3 or 0,1,7 or 0-9, got {records.shown(text)}")
        low, high = int(ends[0]), int(ends[-1])
        if low > high or high >= classes:
            raise ValueError(f"--classes must lie in 0..{classes - 1} and rise within a range, got {part.strip()!r}")
        found.extend(range(low, high + 1))
    return found


def check_device(name: str) -> str:
    """The device's name: "cpu", or "cuda" where the ops run on it; else a ValueError that says why."""
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda":
        status = _load.cuda_status()
        if not status.ready:
            raise ValueError(f"--device cuda cannot be used: {status.text}")
    return name
