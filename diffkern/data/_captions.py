"""Captions that lie beside pictures in a folder: NAME.txt beside NAME.png, or metadata.jsonl."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from diffkern import records

__all__ = ["Captions", "as_text"]

METADATA = "metadata.jsonl"


class Captions:
    """The captions of the pictures ``names`` in a folder.

    Where the folder has a metadata.jsonl (the convention of imagefolder: a line {"file_name": ..., "text": ...} a
    picture), those; else the text of NAME.txt beside each NAME.png, spaces and ends of lines as one space.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / METADATA
        self._told = _metadata(path) if path.is_file() else None

    def of(self, name: str) -> str | None:
        """The caption of a picture; None: it has none."""
        if self._told is not None:
            return self._told.get(name)
        path = self._beside(name)
        return as_text(path.read_bytes(), str(path)) if path.is_file() else None

    def identity(self, name: str) -> Any:
        """What tells it from others, without reading it."""
        if self._told is not None:
            return self._told.get(name)
        try:
            state = os.stat(self._beside(name))
        except FileNotFoundError:
            return None
        return [state.st_size, state.st_mtime_ns]

    def _beside(self, name: str) -> Path:
        return (self.folder / name).with_suffix(".txt")


def as_text(data: bytes | str, name: str) -> str:
    """On one line; ValueError for bytes that are no UTF-8."""
    try:
        return " ".join((data if isinstance(data, str) else data.decode("utf-8-sig")).split())
    except UnicodeDecodeError:
        raise ValueError(f"captions must be text in UTF-8, got other bytes in {name}") from None


def _metadata(path: Path) -> dict[str, str]:
    found = {}
    for number, line in enumerate(as_lines(path), start=1):
        if not line.strip():
            continue
        entry = records.parse(line, "a line of JSON", f"{path}: line {number}")
        name, text = (entry.get("file_name"), entry.get("text")) if isinstance(entry, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f"{path}: line {number} must have a file_name and a text, got {records.shown(entry)}")
        found[os.path.normpath(name).replace(os.sep, "/")] = as_text(text, str(path))
    return found


def as_lines(path: Path) -> list[str]:
    """Of a file in UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError:
        raise ValueError(f"captions must be text in UTF-8, got other bytes in {path}") from None
