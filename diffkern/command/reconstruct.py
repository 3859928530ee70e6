"""`diffkern reconstruct`: images through a trained autoencoder and back, each beside what it was."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffkern import parallel, pictures
from diffkern.command._arguments import (
    add_machine,
    check_count,
    check_device,
    output_file,
    output_folder,
    use_threads,
)
from diffkern.command._model import is_autoencoder, model_data, model_folder

if TYPE_CHECKING:
    from diffkern.data import Images
    from diffkern.nn import Autoencoder

__all__ = ["add_command"]

COLUMNS = 8
BATCH = 64


def add_command(parser: argparse.ArgumentParser) -> None:
    """The arguments of `reconstruct`."""
    parser.add_argument("--run", dest="folder", help="folder of a run, of a checkpoint, or of an Autoencoder")
    parser.add_argument("--average", help="which average of the weights (the run's first)")
    parser.add_argument("--data", help="images: folder, file or name, see docs/data.md (those that the run kept apart)")
    parser.add_argument("--n", type=int, default=32, help="how many of them, at even distances (%(default)s)")
    parser.add_argument("--out", default="reconstructions.png", help="PNG of rows, the reconstructions below each")
    parser.add_argument("--out-dir", help="folder for one PNG a reconstruction, pixel by pixel")
    parser.add_argument("--scale", type=int, help="enlargement (to about 64 pixels)")
    parser.add_argument("--ink", action="store_true", help="draw grey images as dark ink on white")
    add_machine(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from diffkern.metrics import psnr

    use_threads(arguments.threads)
    device = parallel.device_of(check_device(arguments.device))
    autoencoder = _opened(arguments, device)
    most, path = check_count("--n", arguments.n), output_file(arguments.out)
    folder = None if arguments.out_dir is None else output_folder(arguments.out_dir)
    images = _images(arguments, autoencoder)
    n = min(most, len(images))
    chosen = torch.arange(n) * len(images) // n
    made: list[Tensor] = []
    every: list[Tensor] = []
    for part in chosen.split(BATCH):
        x = images.batch(part)[0]
        with torch.no_grad():
            found = autoencoder(x.to(device, autoencoder.last_layer.dtype))[0]
        every.append(x)
        made.append(found.float().cpu())
    x0, r = torch.cat(every), torch.cat(made)
    if folder is not None:
        for number, image in zip(chosen.tolist(), r, strict=True):
            pictures.write(pictures.plain(image), folder / f"{number:05d}.png")
    scale = pictures.default_scale(max(x0.shape[2:])) if arguments.scale is None else arguments.scale
    pictures.check_scale(scale, max(x0.shape[2:]), 2 * n)
    pairs = zip(x0.split(COLUMNS), r.split(COLUMNS), strict=True)
    gap, ratio = float((r - x0).double().abs().mean()), float(psnr(r, x0).mean())
    words = f"mean |x - r| {gap:.4f}, PSNR {ratio:.2f} dB"
    ink = arguments.ink and x0.shape[1] == 1
    rows = [row for pair in pairs for row in pair]
    pictures.write(pictures.grid(rows, title=f"images and reconstructions, {words}", scale=scale, ink=ink), path)
    print(f"{n} images and their reconstructions in {path}: {words}", flush=True)
    return 0


def _opened(arguments: argparse.Namespace, device: torch.device) -> Autoencoder:
    """The autoencoder of --run: the one that the folder itself has, or of the newest checkpoint in it."""
    from diffkern.nn import Autoencoder
    from diffkern.train import newest
    from diffkern.train.reconstruction import AutoencoderTraining

    path = model_folder(arguments)
    if not is_autoencoder(path):
        raise ValueError(f"--run must be the folder of an autoencoder, got {path}: diffkern sample is for other models")
    which: dict[str, Any] = {} if arguments.average is None else {"average": arguments.average}
    checkpoint = newest(path)
    if "diffkern_autoencoder" in model_data(path) and (checkpoint is None or not which):
        found = Autoencoder.from_pretrained(path, device=device, **which)
    else:
        found = AutoencoderTraining.from_pretrained(checkpoint or path, device=device, **which).autoencoder
    return found.requires_grad_(False)


def _images(arguments: argparse.Namespace, autoencoder: Autoencoder) -> Images:
    """--data, or of the run's own those that it kept apart."""
    from diffkern.data import open_images, split
    from diffkern.train import TrainConfig, read_yaml

    channels, size = autoencoder.config.in_channels, autoencoder.config.size
    side = size[0] if size is not None and size[0] == size[1] else None
    common: dict[str, Any] = {"size": side, "channels": channels if channels in (1, 3) else None}
    bars = not arguments.quiet
    if arguments.data is not None:
        return open_images(arguments.data, **common, progress=bars)
    path = Path(arguments.folder) / "config.yaml"
    if not path.is_file():
        raise ValueError("--data must be given, the images, where no run's config.yaml says them, got none")
    config = TrainConfig.from_dict(read_yaml(path))
    common |= {"crop": config.crop, "cache": config.cache, "skip_bad": config.skip_bad, "limit": config.limit}
    images = open_images(config.data, **common, progress=bars)
    if not config.validation:
        return images
    return split(images, config.validation if config.validation < 1.0 else int(config.validation))[1]
