"""`diffkern sample` of a model that is given images: inputs from files, and cascades of models."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from diffkern import ops, parallel, pictures
from diffkern.command._arguments import MOST_IMAGES, check_count, output_file, output_folder, parse_classes
from diffkern.command._model import diffusion_plan, open_diffusion, wanted
from diffkern.degradations import Degradation, Inpainting
from diffkern.generate import Part, cascade, described, known_classes, restore
from diffkern.generate.images import classes_of, reads

if TYPE_CHECKING:
    from diffkern.diffusion import Diffusion

__all__ = ["add_restoring", "check_alone", "run_cascade", "run_inputs"]


def add_restoring(parser: argparse.ArgumentParser) -> None:
    """The arguments of models with a degradation."""
    group = parser.add_argument_group("models that are given an image (super-resolution, inpainting ...)")
    group.add_argument("--input", help="image, folder or file of images: what the model is given; --n samples of each")
    group.add_argument("--mask", help="of inpainting: image or folder, white where the image is to be filled")
    group.add_argument("--degrade", action="store_true", help="the inputs are whole images, which are degraded first")
    group.add_argument(
        "--then",
        action="append",
        metavar="RUN",
        help="model that enlarges the images of the one before, by the same sampler and steps; repeat",
    )
    group.add_argument(
        "--augmentation", type=float, default=0.0, help="level of noise on what a model is given (%(default)s)"
    )
    group.add_argument(
        "--without", choices=("class", "image", "both"), help="what guidance goes away from (class, else image)"
    )
    group.add_argument("--no-project", action="store_true", help="leave samples as they are where they contradict it")


def check_alone(arguments: argparse.Namespace) -> None:
    """ValueError for flags of models that are given an image, where there is neither --input nor --then."""
    for name in ("mask", "degrade", "augmentation", "without", "no_project"):
        if getattr(arguments, name):
            flag = f"--{name.replace('_', '-')}"
            where = "--input" if name in ("mask", "degrade", "without") else "--input or --then"
            raise ValueError(f"{flag} must go with {where}, got neither")


def run_inputs(diffusion: Diffusion, arguments: argparse.Namespace) -> int:
    """Samples of every input, a row each in the picture; the number of images."""
    degradation = diffusion.degradation
    if degradation is None:
        raise ValueError(f"--input must go with a model that is given images, got one without: {arguments.folder}")
    _leave_out(arguments, "--input", "shards", "per_class", "first")
    if arguments.text and arguments.classes is not None:
        raise ValueError("--text must stand without --classes, got both")
    inputs, truth = _inputs(diffusion, degradation, arguments)
    each = 1 if arguments.n is None else check_count("--n", arguments.n, MOST_IMAGES // len(inputs))
    classes = None
    if arguments.classes is not None:
        known = known_classes(diffusion)
        if known is None:
            raise ValueError(f"--classes must be left out for a model without classes, got {arguments.classes!r}")
        chosen = parse_classes(arguments.classes, known)
        classes = torch.tensor(chosen).repeat(-(-len(inputs) // len(chosen)))[: len(inputs)]
    elif arguments.text:
        if not reads(diffusion):
            raise ValueError(f"--text must be left out for a model that reads no texts, got {arguments.text[0]!r}")
        classes = classes_of(diffusion, None, len(inputs), 0, arguments.text)
    plan = diffusion_plan(diffusion, arguments)
    parts = restore(
        diffusion,
        inputs,
        each,
        plan,
        seed=arguments.seed,
        classes=classes,
        guidance=arguments.guidance,
        without=arguments.without,
        augmentation=arguments.augmentation,
        project=not arguments.no_project,
        micro_batch=arguments.micro_batch,
        progress=not arguments.quiet and parallel.is_main(),
    )
    images = _collected(parts, len(inputs) * each, arguments)
    if images is not None:
        beside = [degradation.shown(inputs).unsqueeze(1), images.unflatten(0, (len(inputs), each))]
        beside += [] if truth is None else [truth.unsqueeze(1)]
        words = ["input", "samples", *[""] * (each - 1), *([] if truth is None else ["truth"])]
        title = described(plan, arguments.guidance)
        _draw(list(torch.cat(beside, 1)), words, title, arguments)
    return len(inputs) * each


def run_cascade(base: Diffusion, arguments: argparse.Namespace) -> int:
    """Images by the base model, enlarged by those of --then; the number of images."""
    _leave_out(arguments, "--then", "shards", "input", "mask", "without", "degrade")
    models = [base]
    for folder in arguments.then:
        models.append(open_diffusion(argparse.Namespace(folder=folder, average=None), arguments.device, "--then"))
    want = wanted(base, arguments)
    plans = [diffusion_plan(model, arguments) for model in models]
    parts = cascade(
        models,
        want.n,
        plans,
        seed=arguments.seed,
        first=arguments.first,
        classes=None if arguments.text else want.classes,
        texts=arguments.text,
        guidance=arguments.guidance,
        augmentation=arguments.augmentation,
        project=not arguments.no_project,
        micro_batch=arguments.micro_batch,
        progress=not arguments.quiet and parallel.is_main(),
    )
    images = _collected(parts, want.n, arguments, arguments.first)
    if images is not None:
        title = " -> ".join(described(plan, arguments.guidance) for plan in plans)
        told = want.texts or []
        rows = [images[r :: len(told)] for r in range(min(len(told), len(images)))] or list(images.split(want.columns))
        _draw(rows, told, title, arguments)
    return want.n


def _inputs(
    diffusion: Diffusion, degradation: Degradation, arguments: argparse.Namespace
) -> tuple[Tensor, Tensor | None]:
    """What the model is given, and the whole images where they are known."""
    whole = diffusion.image_shape
    if whole is None or len(whole) != 3:
        raise ValueError(f"--input must go with a model that knows its images [C, H, W], got {whole}")
    masks = isinstance(degradation, Inpainting)
    if arguments.mask is not None and (not masks or arguments.degrade):
        raise ValueError(f"--mask must go with inpainting and without --degrade, got {arguments.mask!r}")
    if arguments.degrade:
        truth = _open(arguments.input, "--input", whole[0])
        return degradation.degrade(truth, ops.seeds(arguments.seed, len(truth))), truth
    if masks:
        if arguments.mask is None:
            raise ValueError("--mask must be given for inpainting, white where the image is to be filled, or --degrade")
        images, mask = _open(arguments.input, "--input", whole[0]), _open(arguments.mask, "--mask", 1)
        if mask.shape[2:] != images.shape[2:] or len(mask) not in (1, len(images)):
            raise ValueError(
                f"--mask must be one for all of the {len(images)} images of {list(images.shape[2:])}, or one each, got "
                f"{len(mask)} of {list(mask.shape[2:])}"
            )
        assert isinstance(degradation, Inpainting)
        return degradation.masked(images, (mask > 0.0).expand(len(images), -1, -1, -1)), None
    return _open(arguments.input, "--input", degradation.channels(whole[0])), None


def _open(source: str, flag: str, channels: int) -> Tensor:
    from diffkern.data import open_images

    if channels not in (1, 3):
        raise ValueError(f"{flag} must be of a model whose images have 1 or 3 channels, got {channels}")
    images = open_images(source, channels=channels, labels=False, cache=False)
    found: Tensor = images.batch(torch.arange(len(images)))[0]
    return found


def _leave_out(arguments: argparse.Namespace, flag: str, *names: str) -> None:
    for name in names:
        if getattr(arguments, name):
            raise ValueError(f"{flag} must stand without --{name.replace('_', '-')}, got both")


def _collected(parts: Iterable[Part], n: int, arguments: argparse.Namespace, first: int = 0) -> Tensor | None:
    """Writes one file an image where they are asked for; all images, on the main process, where a picture is."""
    folder = None if arguments.out_dir is None else output_folder(arguments.out_dir)
    keep = arguments.out is not None or folder is None
    every: Tensor | None = None
    for part in parts:
        if folder is not None:
            for j, image in enumerate(part.images, start=part.first):
                pictures.write(pictures.plain(image), Path(folder) / f"{j:05d}.png")
        if keep:
            every = part.images.new_zeros(n, *part.images.shape[1:]) if every is None else every
            every[part.first - first : part.first - first + len(part.images)] = part.images
    if folder is not None and parallel.is_main():
        print(f"{n} images in {folder}", flush=True)
    if not keep:
        return None
    shapes = parallel.gathered(None if every is None else list(every.shape))
    if every is None:  # more processes than micro-batches
        every = torch.zeros(next(shape for shape in shapes if shape is not None), device=parallel.device())
    images = parallel.summed(every)[0].cpu()
    return images if parallel.is_main() else None


def _draw(rows: list[Tensor], words: list[str], title: str, arguments: argparse.Namespace) -> None:
    path, size = output_file(arguments.out or "grid.png"), max(rows[0].shape[-2:])
    scale = pictures.default_scale(size) if arguments.scale is None else arguments.scale
    pictures.check_scale(scale, size, sum(map(len, rows)))
    ink = arguments.ink and rows[0].shape[1] == 1
    pictures.write(pictures.grid(rows, words, title=title, scale=scale, ink=ink), path)
    print(f"{sum(map(len, rows))} images in {path}", flush=True)
