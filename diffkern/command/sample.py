"""`diffkern sample`: images from a trained model, as a grid, one by one, or many in shards; of inputs, by cascades.

Under torchrun the processes share the images; they are the same for every number of processes.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffkern import parallel, pictures, records, storage
from diffkern.command._arguments import add_machine, check_device, output_file, output_folder, use_threads
from diffkern.command._model import Wanted, add_model, make_plan, open_diffusion, open_model, wanted
from diffkern.command._restored import add_restoring, check_alone, run_cascade, run_inputs
from diffkern.generate import Part, described, generate, write_shards
from diffkern.plan import Plan

if TYPE_CHECKING:
    from diffkern.diffusion import Diffusion
    from diffkern.gan import GAN

__all__ = ["add_command"]


def add_command(parser: argparse.ArgumentParser) -> None:
    """The arguments of `sample`."""
    add_model(parser)
    parser.add_argument("--checkpoint", help=argparse.SUPPRESS)
    parser.add_argument("--n", type=int, help="how many images (8 of each class, 64 where there are none or many)")
    parser.add_argument("--classes", help="classes in turn: 3 or 0,1,7 or 0-9 (all); one image each without --n")
    parser.add_argument(
        "--text",
        action="append",
        metavar="TEXT",
        help="a text such as 'seven, thick', of a model that reads them; again for more, in turn (8 images each "
        "without --n)",
    )
    parser.add_argument("--per-class", type=int, help="so many images of each class, in place of --n")
    parser.add_argument("--first", type=int, default=0, help="number of the first image in the job (%(default)s)")
    parser.add_argument("--out", help="PNG with all images (grid.png unless --out-dir or --shards is given)")
    parser.add_argument("--out-dir", help="folder for one PNG an image, pixel by pixel")
    parser.add_argument(
        "--shards", help="folder for .npz files of about 1024 images: for many; run again, it makes what is missing"
    )
    parser.add_argument("--scale", type=int, help="enlargement in the grid (to about 64 pixels)")
    parser.add_argument("--ink", action="store_true", help="draw grey images in the grid as dark ink on white")
    add_restoring(parser)
    add_machine(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.checkpoint is not None:
        raise ValueError(
            f"--checkpoint {arguments.checkpoint} was a file of the demo of earlier versions, which is not read any "
            "more: --run takes the folder of a run, of `diffkern demo` too"
        )
    use_threads(arguments.threads)
    device = check_device(arguments.device)
    with parallel.job(parallel.device_of(device)):
        if arguments.input is not None or arguments.then is not None:
            made, flag = (run_inputs, "--input") if arguments.then is None else (run_cascade, "--then")
            diffusion = open_diffusion(arguments, device, flag)
            start = time.perf_counter()
            n, seconds = made(diffusion, arguments), time.perf_counter() - start
            _say(f"{n} images in {seconds:.1f} s, {n / seconds:.3g} a second")
            return 0
        check_alone(arguments)
        model = open_model(arguments, device)
        if getattr(model, "degradation", None) is not None:
            raise ValueError("--input must be given for a model that is given images, or --run a base and --then this")
        plan = make_plan(model, arguments)
        want = wanted(model, arguments)
        if not 0 <= arguments.first <= 2**63 - 1 - want.n:
            raise ValueError(f"--first must lie in 0..2**63 - 1 - {want.n}, got {records.shown(arguments.first)}")
        start = time.perf_counter()
        if arguments.shards is not None:
            _shards(model, plan, want, arguments)
        else:
            _pictures(model, plan, want, arguments)
        seconds = time.perf_counter() - start
        _say(f"{want.n} images in {seconds:.1f} s, {want.n / seconds:.3g} a second, by {described(plan)}")
    return 0


def _say(text: str) -> None:
    if parallel.is_main():
        print(text, flush=True)


def _job(want: Wanted, arguments: argparse.Namespace) -> dict[str, Any]:
    """Which images are made, beside the model, their number and the plan."""
    return {
        "seed": arguments.seed,
        "first": arguments.first,
        "classes": want.classes,
        "guidance": arguments.guidance,
        "micro_batch": arguments.micro_batch,
    }


def _shards(diffusion: Diffusion | GAN, plan: Plan | None, want: Wanted, arguments: argparse.Namespace) -> None:
    for flag, value in (("--out", arguments.out), ("--out-dir", arguments.out_dir)):
        if value is not None:
            raise ValueError(f"--shards must stand without {flag}, got both")
    files = write_shards(
        arguments.shards, diffusion, want.n, plan, **_job(want, arguments), progress=not arguments.quiet
    )
    _say(f"{len(files)} shards in {arguments.shards}")


def _pictures(diffusion: Diffusion | GAN, plan: Plan | None, want: Wanted, arguments: argparse.Namespace) -> None:
    """A grid of all, which is kept in memory, and one file each, which are not."""
    shape = diffusion.image_shape
    if shape is None or len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(f"images must have shape (1, H, W) or (3, H, W) to be drawn, got {shape}")
    size = max(shape[1:])
    scale = pictures.default_scale(size) if arguments.scale is None else arguments.scale
    grid = arguments.out is not None or arguments.out_dir is None
    if grid:
        pictures.check_scale(scale, size, want.n)
    bars = not arguments.quiet and parallel.is_main()
    parts = generate(diffusion, want.n, plan, **_job(want, arguments), progress=bars)
    folder = None if arguments.out_dir is None else output_folder(arguments.out_dir)
    path = output_file(arguments.out or "grid.png") if grid else None
    every: Tensor | None = None
    for part in parts:
        if folder is not None:
            _write_each(part, folder, want.texts, arguments.first)
        if path is not None:
            every = part.images.new_zeros(want.n, *shape) if every is None else every
            at = part.first - arguments.first
            every[at : at + len(part.images)] = part.images
    if folder is not None:
        _say(f"{want.n} images in {folder}")
    if path is not None:
        if every is None:  # more processes than micro-batches
            every = torch.zeros(want.n, *shape, device=next(diffusion.parameters()).device)
        images = parallel.summed(every)[0].cpu()
        if parallel.is_main():
            title, ink = described(plan, arguments.guidance), arguments.ink and shape[0] == 1
            if want.texts is not None:
                rows = [images[r :: len(want.texts)] for r in range(min(len(want.texts), len(images)))]
                picture = pictures.grid(rows, names=want.texts, title=title, scale=scale, ink=ink)
            elif want.classes is None:
                rows = list(images.split(want.columns))
                picture = pictures.grid(rows, title=title, scale=scale, ink=ink)
            else:
                columns = want.columns
                picture = pictures.class_grid(images, want.classes, title, columns=columns, scale=scale, ink=ink)
            pictures.write(picture, path)
        _say(f"{want.n} images in {path}")


def _write_each(part: Part, folder: Path, texts: list[str] | None, first: int) -> None:
    """A PNG an image, its class in the name or its text beside it, as `diffkern train --text` reads them; ``texts`` in
    turn from the image ``first`` of the job on."""
    alone = part.classes is None or texts is not None
    classes = [None] * len(part.images) if part.classes is None or alone else part.classes.tolist()
    for j, (image, which) in enumerate(zip(part.images, classes, strict=True), start=part.first):
        name = f"{j:05d}.png" if which is None else f"{j:05d}_class{which}.png"
        pictures.write(pictures.plain(image), folder / name)
        if texts is not None:
            storage.write(folder / f"{j:05d}.txt", texts[(j - first) % len(texts)] + "\n")
