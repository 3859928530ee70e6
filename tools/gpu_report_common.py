"""What the parts of the GPU report share: architectures, compiler flags, commands and Markdown tables."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT / "tests") not in sys.path:
    sys.path.insert(0, str(ROOT / "tests"))  # for ptx.harness and its like

ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
FLAGS = ("-O3", "-std=c++17", "--fmad=false")


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
