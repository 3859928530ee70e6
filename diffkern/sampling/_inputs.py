"""What every loop is given in the same way: seeds or noise tensors, and a progress bar."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from diffkern import ops
from diffkern.draws import draw_seeds

Seeds = int | Tensor


def seeds_of(seeds: Seeds | None, batch: int, device: torch.device) -> Tensor:
    """int64 [B] on ``device`` from an integer, a tensor, or (None) torch's default generator."""
    if seeds is None:
        return draw_seeds(batch).to(device)
    if isinstance(seeds, Tensor):
        if seeds.dtype != torch.int64 or seeds.ndim != 1 or seeds.shape[0] != batch:
            raise ValueError(
                f"seeds must be an integer or int64 [{batch}], got {seeds.dtype} of shape {list(seeds.shape)}"
            )
        return seeds.to(device)
    if isinstance(seeds, bool) or not isinstance(seeds, int):
        raise ValueError(f"seeds must be an integer or int64 [{batch}], got {type(seeds).__name__}")
    return ops.seeds(seeds, batch, device=device)


def next_noise(noises: Iterator[Tensor], row: int, x: Tensor) -> Tensor:
    """The next tensor of noise, checked."""
    z = next(noises, None)
    if z is None:
        raise ValueError(f"noise must hold one tensor for each row that draws, got no more at row {row}")
    if not isinstance(z, Tensor) or z.shape != x.shape or z.dtype != x.dtype:
        got = f"{z.dtype} of shape {list(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"noise must be tensors like x, {x.dtype} of shape {list(x.shape)}, got {got} for row {row}")
    return z


def progress_bar(progress: bool | str, name: str, steps: int) -> Any:
    """tqdm's bar over the steps, labelled with a string given or else the sampler's name; None for False."""
    if progress is False:
        return None
    from tqdm.auto import tqdm

    return tqdm(total=steps, desc=progress if isinstance(progress, str) else name, unit="step")
