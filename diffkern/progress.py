"""The one form of ``progress``: False, True, or the label of the bar."""

from __future__ import annotations

from typing import Any


def progress_bar(progress: bool | str, name: str, total: float, **style: Any) -> Any:
    """tqdm's bar, labelled with a string given or else the name; None for False. ValueError for anything else."""
    if not isinstance(progress, bool | str):
        raise ValueError(
            f"progress must be True, False or the label of a bar, got {type(progress).__name__}: the bar is tqdm's own"
        )
    if progress is False:
        return None
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=progress if isinstance(progress, str) else name, **({"unit": "step"} | style))
