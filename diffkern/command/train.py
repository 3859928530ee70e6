"""The command `train` of ``python -m diffkern``: every field of `diffkern.train.TrainConfig` is a flag."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffkern import parallel
from diffkern.checks import meant, unknown
from diffkern.command._machine import crowding
from diffkern.extras import need
from diffkern.train import PRESETS, TrainConfig, fit, read_yaml

__all__ = ["run"]

USE = """diffkern train --data photos/ --out runs/a --preset ddpm-cifar10
       torchrun --nproc-per-node 8 -m diffkern train --data photos/ --out runs/a --device cuda"""


def run(argv: Sequence[str]) -> int:
    """Trains; 0, also where a signal ended it after a checkpoint."""
    arguments = parsed(argv)
    config, out = chosen(argv), Path(arguments.out)
    if not config.data:
        raise ValueError("--data must be given: a folder of images, a file or a name, got none")
    quiet = arguments.quiet
    found = crowding() if config.device == "cpu" and not quiet and parallel.rank() == 0 else None
    if found is not None:
        print(f"warning: {found}", file=sys.stderr, flush=True)
    fitted = fit(None, config.data, config, out=out, progress=not quiet)
    if main_process():
        state = "stopped after" if fitted.stopped else "trained"
        print(f"{state} {fitted.step} of {config.iterations} iterations; in {out}: checkpoints, log.jsonl, config.yaml")
        use = f"sample --run {out} --n 64 --out grid.png"
        if config.objective == "autoencoder":
            use = f"reconstruct --run {out} --n 32 --out pairs.png"
        elif getattr(fitted.trained, "degradation", None) is not None:
            use = f"evaluate --run {out}"  # a sample needs an input
        again = f"diffkern train --out {out}" if fitted.stopped else f"diffkern {use}"
        print(f"  {again}", flush=True)
    return 0


def chosen(argv: Sequence[str]) -> TrainConfig:
    """The configuration that the flags ask for: those of the preset, of the YAML file over it, the flags over both.

    Without preset and file, that of the run in ``--out`` where there is one.
    """
    found = parsed(argv)
    if found.preset is not None and found.preset not in PRESETS:
        raise ValueError(unknown("--preset", found.preset, list(PRESETS)))
    base = TrainConfig() if found.preset is None else PRESETS[found.preset]
    written = Path(found.out) / "config.yaml"
    path = found.config
    if path is None and found.preset is None and written.exists():
        path = written
    values = base.to_dict()
    if path is not None:
        given = read_yaml(path)
        TrainConfig.from_dict(given)  # names what is wrong in the file
        values.update(given)
    flags = parsed(argv, defaults=False)
    given = {field.name: flags[field.name] for field in dataclasses.fields(TrainConfig) if field.name in flags}
    for name in (
        *("network_options", "schedule_options", "times_options", "degradation_options", "text_options"),
        *("adversarial", "autoencoder"),
    ):
        if name in given:
            given[name] = {**values[name], **_plain(given[name])}
            if name == "adversarial":  # whose entry is a dictionary, of which a flag names one value
                within = {key: values[name].get(key) for key, part in given[name].items() if isinstance(part, dict)}
                given[name] |= {key: {**(old or {}), **given[name][key]} for key, old in within.items()}
    return TrainConfig.from_dict({**values, **given})


def parser() -> Any:
    """The parser, made by jsonargparse from the dataclass."""
    library = need("jsonargparse", "jsonargparse", "train")
    library.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    made = library.ArgumentParser(prog="diffkern train", usage=USE, exit_on_error=False, default_env=False)
    made.add_argument("--out", type=str, required=True, help="folder of the run; one that is there is resumed")
    made.add_argument("--preset", type=str, help=f"where the values come from: {', '.join(PRESETS)}")
    made.add_argument("--config", type=str, help="a YAML file of values, as config.yaml in a run's folder")
    made.add_argument("--quiet", action="store_true", help="no progress bar")
    made.add_class_arguments(TrainConfig, nested_key=None)
    return made


def parsed(argv: Sequence[str], defaults: bool = True) -> Any:
    """What the flags say, with the fields' defaults for the others or without; ValueError in one sentence."""
    made = parser()
    try:
        return made.parse_args(tidied(argv), defaults=defaults)
    except need("jsonargparse", "jsonargparse", "train").ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error


def tidied(argv: Sequence[str]) -> list[str]:
    """The flags as the parser knows them: dashes inside of names, and switches without their ``true``.

    ValueError with the nearest flag for one that there is not.
    """
    kinds = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    known = [*kinds, "out", "preset", "config", "quiet", "help"]
    found: list[str] = []
    for place, word in enumerate(argv):
        if not word.startswith("--"):
            found.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        head, dot, tail = name.partition(".")
        head = head.replace("-", "_")
        if head not in known:
            near = meant(head, known)
            hint = "" if near is None else f": did you mean --{near}?"
            raise ValueError(f"--{head} is no flag of diffkern train{hint}")
        found.append(f"--{head}{dot}{tail}{equals}{value}")
        following = argv[place + 1] if place + 1 < len(argv) else "--"
        if kinds.get(head) == "bool" and not equals and following.startswith("--"):
            found.append("true")
    return found


def _plain(value: Any) -> dict[str, Any]:
    """A flag's dictionary; of entries that are dictionaries themselves the parser leaves names with dots, and text."""
    found: dict[str, Any] = {}
    for name, entry in (value if isinstance(value, dict) else vars(value)).items():
        head, dot, tail = name.partition(".")
        if dot or isinstance(entry, dict):
            inside = found.setdefault(head, {})
            inside.update(_plain({tail: entry}) if dot else {key: _read(part) for key, part in entry.items()})
        else:
            found[name] = entry
    return found


def _read(value: Any) -> Any:
    return need("yaml", "PyYAML", "train").safe_load(value) if isinstance(value, str) else value


def main_process() -> bool:
    """Whether this is the process that prints, also after the job has ended."""
    return os.environ.get("RANK", "0") == "0"
