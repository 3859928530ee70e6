"""`python -m diffkern COMMAND`, also installed as `diffkern`.

A command is one line in `_commands`: its name, what it does, and "module:function". The function is given the command's
`argparse.ArgumentParser`, adds the arguments, and sets the default `run`, a function from the parsed arguments to the
exit status. The module is imported only when its command is chosen.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

__all__ = ["main"]


class Command(NamedTuple):
    help: str
    target: str
    own_parser: bool = False
    """The function parses its arguments itself, and returns the exit status."""

    def function(self) -> Callable[..., Any]:
        """What ``target`` names, imported now."""
        module, _, function = self.target.partition(":")
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
        return found


_commands: dict[str, Command] = {
    "info": Command(
        "versions, instruction set, CUDA, what is missing and what to do about it", "diffkern.command.info:add_command"
    ),
    "train": Command("train a model on a folder of images", "diffkern.command.train:run", own_parser=True),
    "demo": Command("train a small model on handwritten digits and sample from it", "diffkern.command.demo:add_demo"),
    "sample": Command("images from a trained model", "diffkern.command.sample:add_command"),
    "reconstruct": Command(
        "images through a trained autoencoder and back, beside what they were",
        "diffkern.command.reconstruct:add_command",
    ),
    "evaluate": Command("how good a model's images are, against real ones", "diffkern.command.evaluate:add_command"),
    "plan": Command("print a sampler's plan, compare two, write one as JSON", "diffkern.command.plan:add_command"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns 0, or 2 after one sentence on stderr when its input or surroundings are wrong."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="diffkern", description="Fused kernels for diffusion models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in _commands.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help)
        if argv[:1] == [name] and not command.own_parser:
            command.function()(subparser)
    for argument in argv:
        if argument.startswith("--") and argument.endswith("=--"):  # argparse makes a list of it
            parser.error(f"argument {argument[:-3]}: expected a value, got '--'")
    name = argv[0] if argv else ""
    if name in _commands and _commands[name].own_parser:
        return _status(name, lambda: _commands[name].function()(argv[1:]))
    arguments = parser.parse_args(argv)
    return _status(arguments.command, lambda: arguments.run(arguments))


def _status(name: str, run: Callable[[], int]) -> int:
    try:
        return int(run())
    except (ValueError, RuntimeError, OSError, ImportError, MemoryError) as error:
        text = " ".join(f"{error}".split()) or "not enough memory"
        print(f"diffkern {name}: {text}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
