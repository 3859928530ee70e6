"""What the parts of the GPU report share: what the build compiles and how, commands and Markdown tables."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests"))  # for ptx.harness and its like

from helpers import build_description  # noqa: E402


def architectures() -> list[int]:
    """Those of a release."""
    return [int(name.removesuffix("+PTX")) for name in build_description.architectures()]


def sources(attention: bool) -> list[Path]:
    """The CUDA files of attention, or those of the other ops."""
    return [u.source for u in build_description.cuda_units() if u.source.name.startswith("attention") == attention]


def nvcc(arch: int, *more: str | Path) -> list[str]:
    """The compiler with the flags of the build for one architecture."""
    flags = [*build_description.nvcc_flags(), f"-I{build_description.CSRC}"]
    return ["nvcc", f"-arch=sm_{arch}", *flags, *map(str, more)]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(str(c) for c in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout + done.stderr


def nvcc_version() -> str:
    version = re.search(r"V([\d.]+)", run(["nvcc", "--version"]))
    return version.group(1) if version else "?"
