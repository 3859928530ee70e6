"""The one form of ``progress``: False, True, or the label of the bar."""

from __future__ import annotations

import sys
from typing import Any, TextIO

SECONDS = 5.0
"""Between the lines of a bar where the output is no terminal."""


class _Lines:
    """A file to which each state of a bar is written as a line of its own: what a log can hold."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> int:
        line = text.strip("\r\n ")
        return self._file.write(line + "\n") if line else 0

    def flush(self) -> None:
        self._file.flush()


def progress_bar(progress: bool | str, name: str, total: float, **style: Any) -> Any:
    """tqdm's bar, labelled with a string given or else the name; None for False. ValueError for anything else.

    Where stderr is no terminal (and no notebook draws the bar) it is a line every `SECONDS`.
    """
    if not isinstance(progress, bool | str):
        raise ValueError(
            f"progress must be True, False or the label of a bar, got {type(progress).__name__}: the bar is tqdm's own"
        )
    if progress is False:
        return None
    from tqdm.auto import tqdm

    if not sys.stderr.isatty() and "ipykernel" not in sys.modules:
        style = {"file": _Lines(sys.stderr), "mininterval": SECONDS, "miniters": 1, "ascii": True, **style}
    return tqdm(total=total, desc=progress if isinstance(progress, str) else name, **({"unit": "step"} | style))
