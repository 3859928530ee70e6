"""What the commands `sample` and `evaluate` have in common: a model from its folder, a sampler, how many of what."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from diffkern import parallel
from diffkern.command._arguments import MOST_IMAGES, check_count, parse_classes
from diffkern.command.plan import apply, sampler_call
from diffkern.generate.images import MICRO_BATCH, known_classes
from diffkern.generate.recommended import DEFAULT_STEPS, recommended
from diffkern.plan import Plan
from diffkern.samplers import get_sampler

if TYPE_CHECKING:
    from diffkern.diffusion import Diffusion

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


def open_model(arguments: argparse.Namespace, device: str) -> Diffusion:
    """The model of --run, on this process's device; as training ran it, channels last."""
    from diffkern.diffusion import Diffusion

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
    which: dict[str, Any] = {} if arguments.average is None else {"average": arguments.average}
    found = Diffusion.from_pretrained(path, device=parallel.device_of(device), **which)
    return found.to(memory_format=torch.channels_last).requires_grad_(False)


def make_plan(diffusion: Diffusion, arguments: argparse.Namespace) -> Plan:
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
    """How many images, of which classes, and in how many columns they are drawn."""

    n: int
    classes: Tensor | None
    columns: int


def wanted(diffusion: Diffusion, arguments: argparse.Namespace) -> Wanted:
    """What --n, --classes and --per-class ask for: int64 [n] classes, one after the other and again from the first."""
    known = known_classes(diffusion)
    for flag, value in (("--classes", arguments.classes), ("--per-class", arguments.per_class)):
        if known is None and value is not None:
            raise ValueError(f"{flag} must be left out for a model without classes, got {value!r}")
    if arguments.per_class is not None and arguments.n is not None:
        raise ValueError(f"give --n or --per-class, not both, got {arguments.n} and {arguments.per_class}")
    chosen = [] if known is None else list(range(known))
    if arguments.classes is not None:
        chosen = parse_classes(arguments.classes, len(chosen))
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
