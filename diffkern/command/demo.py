"""`diffkern demo`: its arguments, and one clear sentence where they are wrong."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from typing import Any

from diffkern.command._arguments import MOST_IMAGES, add_machine, check_count, check_device, output_folder, use_threads
from diffkern.command._machine import crowding
from diffkern.demo.run import DemoConfig, run_demo


def add_demo(parser: argparse.ArgumentParser) -> None:
    """The arguments of `demo`."""
    demo = DemoConfig()
    training = demo.train
    parser.add_argument("--out", default=str(demo.out), help="folder of the run, pictures, table (%(default)s)")
    parser.add_argument("--iterations", type=int, default=training.iterations, help="of training (%(default)s)")
    parser.add_argument("--batch", type=int, default=training.batch, help="images in each (%(default)s)")
    parser.add_argument(
        "--per-class", type=int, default=demo.per_class, help="images of each class for each sampler (%(default)s)"
    )
    parser.add_argument("--guidance", type=float, default=demo.guidance, help="guidance weight (%(default)s)")
    parser.add_argument("--seed", type=int, default=training.seed, help="of training and of sampling (%(default)s)")
    add_machine(parser)
    parser.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> int:
    use_threads(arguments.threads)
    check_count("--per-class", arguments.per_class, MOST_IMAGES // 10)
    if not math.isfinite(arguments.guidance):
        raise ValueError(f"--guidance must be finite, got {arguments.guidance}")
    device: Any = check_device(arguments.device)
    config = DemoConfig(
        train=dataclasses.replace(
            DemoConfig().train,
            iterations=arguments.iterations,
            batch=arguments.batch,
            seed=arguments.seed,
            device=device,
        ),
        guidance=arguments.guidance,
        per_class=arguments.per_class,
        progress=not arguments.quiet,
    )
    found = crowding() if device == "cpu" else None
    if found is not None:
        print(f"warning: {found}", file=sys.stderr, flush=True)
    run_demo(dataclasses.replace(config, out=output_folder(arguments.out)))  # made last, when all else is right
    return 0
