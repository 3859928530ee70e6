"""Arguments that several commands take, checked: each in one sentence that names it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from diffkern import _load, records

MOST_IMAGES = 10_000_000
MOST_THREADS = 1024


def add_machine(parser: argparse.ArgumentParser) -> None:
    """--device, --threads and --quiet."""
    parser.add_argument("--device", default="cpu", help="cpu or cuda (%(default)s)")
    parser.add_argument(
        "--threads",
        type=int,
        help="CPU threads (torch's choice); fewer are faster on a busy machine. Images repeat bit for bit "
        "at the same number only",
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def use_threads(threads: int | None) -> None:
    """Of torch, for the whole process; None leaves them as they are."""
    if threads is not None:
        if threads < 1:
            raise ValueError(f"--threads must be at least 1, got {threads}")
        if threads > MOST_THREADS:
            raise ValueError(f"--threads must be at most {MOST_THREADS}, got {records.shown(threads)}")
        torch.set_num_threads(threads)


def check_device(name: str) -> str:
    """The device's name: "cpu", or "cuda" where the ops run on it; else a ValueError that says why."""
    if name not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if name == "cuda":
        status = _load.cuda_status()
        if not status.ready:
            raise ValueError(f"--device cuda cannot be used: {status.text}")
    return name


def check_count(name: str, count: int, most: int = MOST_IMAGES) -> int:
    """The number of images or of repetitions; ValueError unless it lies in 1..most."""
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {count}")
    if count > most:
        raise ValueError(f"{name} must be at most {most} (a job has {MOST_IMAGES} images), got {records.shown(count)}")
    return count


def parse_classes(text: str, classes: int) -> list[int]:
    """A list from "3", "0,1,7", "0-9" and mixtures of them; a class that the model does not have is a ValueError."""
    found: list[int] = []
    for part in text.split(","):
        ends = part.strip().split("-")
        if len(ends) > 2 or not all(end.isdecimal() and len(end) < 20 for end in ends):
            raise ValueError(f"--classes must be like 3 or 0,1,7 or 0-9, got {records.shown(text)}")
        low, high = int(ends[0]), int(ends[-1])
        if low > high or high >= classes:
            raise ValueError(f"--classes must lie in 0..{classes - 1} and rise within a range, got {part.strip()!r}")
        found.extend(range(low, high + 1))
    return found


def output_file(path: str | os.PathLike[str]) -> Path:
    """The path of a file that can be written, its folder made if it is not there; else a ValueError."""
    file = Path(path)
    if file.is_dir():
        raise ValueError(f"{file} must be a file, and is a folder")
    folder = output_folder(file.parent)
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise ValueError(f"{file} must be a file that can be written")
    return file


def output_folder(path: str | os.PathLike[str]) -> Path:
    """The folder, made if it is not there; a file in its place is a ValueError."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} must be a folder, and is a file")
    folder.mkdir(parents=True, exist_ok=True)
    return folder
