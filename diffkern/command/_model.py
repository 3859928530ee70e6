"""What the commands `sample` and `evaluate` have in common: a model from its folder, a sampler, how many of what."""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from diffkern import parallel, records, storage
from diffkern.command._arguments import MOST_IMAGES, check_count, parse_classes
from diffkern.command.plan import apply, sampler_call
from diffkern.generate.images import MICRO_BATCH, classes_of, known_classes, reads
from diffkern.generate.recommended import DEFAULT_STEPS, recommended
from diffkern.plan import Plan
from diffkern.samplers import get_sampler

if TYPE_CHECKING:
    from diffkern.diffusion import Diffusion
    from diffkern.gan import GAN

GRID_ROWS, FEW_CLASSES, IMAGES = 8, 16, 64
"""Images where nothing is said: so many rows of few classes, else so many."""


def add_model(parser: argparse.ArgumentParser) -> None:
    """The arguments that say which model samples how."""
    steps = ", ".join(f"{name} {n}" for name, n in DEFAULT_STEPS.items())
    parser.add_argument(
        "--run", dest="folder", help="folder of a run, of a checkpoint, or of Diffusion.save_pretrained"
    )
    parser.add_argument("--average", help="which average of the weights (the run's first)")
    parser.add_argument("--sampler", help="a name, or a call such as 'ddim(eta=0.5)' (the model's own choice)")
    parser.add_argument("--steps", type=int, help=f"steps of the sampler ({steps})")
    parser.add_argument("--eta", type=float, help="noise of a sampler that has it: of ddim 0 is none, 1 is DDPM's")
    parser.add_argument("--guidance", type=float, help="weight of classifier-free guidance (none)")
    parser.add_argument("--seed", type=int, default=0, help="of the job (%(default)s)")
    parser.add_argument(
        "--micro-batch",
        type=int,
        default=MICRO_BATCH,
        help="images sampled together (%(default)s); 1: an image has the same bits in every job",
    )


def open_model(arguments: argparse.Namespace, device: str) -> Diffusion | GAN:
    """The model of --run, on this process's device; as training ran it, channels last."""
    from diffkern.diffusion import Diffusion
    from diffkern.gan import GAN

    path = model_folder(arguments)
    kind: Any = GAN if "diffkern_gan" in model_data(path) else Diffusion
    if is_autoencoder(path):
        raise ValueError(
            f"--run must be a model that makes images, got the autoencoder in {path}: diffkern reconstruct"
        )
    which: dict[str, Any] = {} if arguments.average is None else {"average": arguments.average}
    found = kind.from_pretrained(path, device=parallel.device_of(device), **which)
    made: Diffusion | GAN = found.to(memory_format=torch.channels_last).requires_grad_(False)
    return made


def open_diffusion(arguments: argparse.Namespace, device: str, flag: str) -> Diffusion:
    """`open_model` where a GAN's will not do; ``flag``: what asks for it."""
    from diffkern.diffusion import Diffusion

    found = open_model(arguments, device)
    if not isinstance(found, Diffusion):
        raise ValueError(f"{flag} must be of diffusion models, got the {type(found).__name__} in {arguments.folder}")
    return found


def model_folder(arguments: argparse.Namespace) -> Path:
    """The folder of --run; ValueError where there is none."""
    if arguments.folder is None:
        raise ValueError("--run must be given, the folder of a run or of Diffusion.save_pretrained, got none")
    path = Path(arguments.folder)
    if path.is_file():
        raise ValueError(
            f"--run must be a folder, got the file {path}: files of earlier versions' demo are not read any more, "
            "`diffkern demo` writes a folder"
        )
    if not path.is_dir():
        raise ValueError(f"--run must be a folder, got {arguments.folder!r}, where there is none")
    return path


def model_data(path: Path) -> dict[str, Any]:
    """What config.json of the folder, or of the newest checkpoint in it, says; {} for none that can be read."""
    checkpoints = storage.numbered(path / "checkpoints")
    for place in (path, *checkpoints[-1:]):
        if (place / "config.json").is_file():
            with contextlib.suppress(ValueError):
                found = records.parse((place / "config.json").read_bytes())
                return found if isinstance(found, dict) else {}
    return {}


def is_autoencoder(path: Path) -> bool:
    """Whether the folder has an autoencoder, or a run that trains one."""
    return bool({"diffkern_autoencoder", "diffkern_autoencoder_training"} & model_data(path).keys())


def make_plan(diffusion: Diffusion | GAN, arguments: argparse.Namespace) -> Plan | None:
    """The plan of --sampler, --steps and --eta; None of a GAN, which has none of these."""
    from diffkern.diffusion import Diffusion

    if not isinstance(diffusion, Diffusion):
        for flag in ("sampler", "steps", "eta", "guidance"):
            if getattr(arguments, flag) is not None:
                raise ValueError(f"--{flag} must be left out for a GAN, got {getattr(arguments, flag)!r}")
        return None
    return diffusion_plan(diffusion, arguments)


def diffusion_plan(diffusion: Diffusion, arguments: argparse.Namespace) -> Plan:
    """The plan of --sampler, --steps and --eta."""
    name, options = None, {}
    if arguments.sampler is not None:
        name, options = sampler_call(arguments.sampler) if "(" in arguments.sampler else (arguments.sampler, {})
        for given in ("schedule", "prediction"):
            if given in options:
                raise ValueError(f"--sampler must leave the {given} to the model, got {arguments.sampler!r}")
    if name is None and arguments.guidance is not None and diffusion.learned_variance:
        name = "ddim"  # as `generate` chooses
    make: Any = None if name is None else get_sampler(name)
    if arguments.steps is not None:
        options["steps"] = arguments.steps
    if arguments.eta is not None:
        options["eta"] = arguments.eta
    plan = apply(recommended, name or "the sampler", (diffusion, make), options)
    assert isinstance(plan, Plan)
    return plan


class Wanted(NamedTuple):
    """How many images, of which classes or texts, and in how many columns they are drawn."""

    n: int
    classes: Tensor | None
    """int64 [n], or tokens of texts, int64 [n, L]."""
    columns: int
    texts: list[str] | None = None
    """The texts, in turn from the first image on; a row of the picture each."""


def wanted(diffusion: Diffusion | GAN, arguments: argparse.Namespace) -> Wanted:
    """What --n, --classes, --per-class and --text ask for: int64 [n] classes, one after the other and again from the
    first, or texts in the same way."""
    known = known_classes(diffusion)
    if arguments.text:
        return _told(diffusion, arguments)
    for flag, value in (("--classes", arguments.classes), ("--per-class", arguments.per_class)):
        if known is None and value is not None:
            raise ValueError(f"{flag} must be left out for a model without classes, got {value!r}")
    if arguments.per_class is not None and arguments.n is not None:
        raise ValueError(f"give --n or --per-class, not both, got {arguments.n} and {arguments.per_class}")
    chosen = [] if known is None else list(range(known))
    if arguments.classes is not None:
        chosen = parse_classes(arguments.classes, len(chosen))
    if arguments.guidance is not None and reads(diffusion):
        raise ValueError(f"--guidance must go with --text for a model that reads texts, got {arguments.guidance} alone")
    few = 1 < len(chosen) <= FEW_CLASSES
    if arguments.per_class is not None:
        count = check_count("--per-class", arguments.per_class, MOST_IMAGES // max(1, len(chosen))) * len(chosen)
    elif arguments.n is not None:
        count = check_count("--n", arguments.n)
    elif arguments.classes is not None:
        count = check_count("--classes", len(chosen))
    else:
        count = GRID_ROWS * len(chosen) if few else IMAGES
    columns = len(chosen) if few and count > len(chosen) else int((count - 1) ** 0.5) + 1
    return Wanted(count, torch.tensor(chosen).repeat(-(-count // len(chosen)))[:count] if chosen else None, columns)


def _told(diffusion: Diffusion | GAN, arguments: argparse.Namespace) -> Wanted:
    """Of texts: eight images each, or --n in all."""
    texts = list(arguments.text)
    for flag, value in (("--classes", arguments.classes), ("--per-class", arguments.per_class)):
        if value is not None:
            raise ValueError(f"--text must stand without {flag}, got both")
    if not reads(diffusion):
        raise ValueError(f"--text must be left out for a model that reads no texts, got {texts[0]!r}")
    count = check_count("--n", GRID_ROWS * len(texts) if arguments.n is None else arguments.n)
    chosen = classes_of(diffusion, None, count, arguments.first, texts)
    begin = arguments.first % len(texts)
    return Wanted(count, chosen, -(-count // len(texts)), texts[begin:] + texts[:begin])
