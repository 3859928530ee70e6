"""A diffusion over a few of the timesteps of another. arXiv 2102.09672, section 4; 2010.02502, section 4.2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkern.compat.guided_diffusion.gaussian_diffusion import GaussianDiffusion
from diffkern.compat.kit.tables import Tables

__all__ = ["SpacedDiffusion", "space_timesteps"]


def space_timesteps(num_timesteps: int, section_counts: str | Sequence[int]) -> set[int]:
    """The timesteps to keep: sections as even as they come, of which section i keeps ``section_counts[i]`` steps.

    Within a section steps are evenly spaced from its first to its last and rounded. "a,b,c" stands for the list of
    numbers, "ddimN" for the N steps of the least whole stride from 0. Raises ValueError where they do not fit.
    """
    if isinstance(section_counts, str):
        if section_counts.startswith("ddim"):
            count = int(section_counts.removeprefix("ddim"))
            for stride in range(1, num_timesteps):
                kept = range(0, num_timesteps, stride)
                if len(kept) == count:
                    return set(kept)
            raise ValueError(f"cannot keep exactly {count} of {num_timesteps} steps with an integer stride")
        section_counts = [int(number) for number in section_counts.split(",")]
    if not len(section_counts) or min(section_counts) < 0:
        raise ValueError(f"section_counts must be numbers >= 0, got {list(section_counts)}")
    least, longer = divmod(num_timesteps, len(section_counts))
    chosen: set[int] = set()
    start = 0
    for i, count in enumerate(section_counts):
        size = least + (i < longer)
        if count > size:
            raise ValueError(f"cannot divide section of {size} steps into {count}")
        if count:
            stride_ = (size - 1) / (count - 1) if count > 1 else 1.0
            # Added up, not multiplied: which way a half rounds is part of the choice.
            chosen.update(start + round(at) for at in accumulate(repeat(stride_, count - 1), initial=0.0))
        start += size
    return chosen


class SpacedDiffusion(GaussianDiffusion):
    """The diffusion whose step i is step ``timestep_map[i]`` of the one with the given betas.

    use_timesteps: which steps of the original to keep, in 0 .. T - 1. beta_i = 1 - abar_i/abar_(the kept one before).
    Models and ``cond_fn`` are called with the original's timesteps.
    """

    def __init__(self, use_timesteps: Iterable[int], **kwargs: Any) -> None:
        self.use_timesteps = set(use_timesteps)
        self.original_num_steps = len(kwargs["betas"])
        base = GaussianDiffusion(**kwargs)
        self.timestep_map = [t for t in range(self.original_num_steps) if t in self.use_timesteps]
        outside = self.use_timesteps.difference(self.timestep_map)
        if outside or not self.timestep_map:
            raise ValueError(
                f"use_timesteps must be some of 0..{self.original_num_steps - 1}, got "
                f"{sorted(outside)[:5] if outside else 'none'}"
            )
        kept = base.alphas_cumprod[self.timestep_map]
        kwargs["betas"] = 1 - kept / np.append(1.0, kept[:-1])
        super().__init__(**kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_dk_maps": Tables()}

    def _wrap_model(self, model: Any) -> Any:
        if type(model).__name__ == "_WrappedModel":  # ours, or that of a guided_diffusion since patched
            return model
        wrapped = _WrappedModel(model, self.timestep_map, self.rescale_timesteps, self.original_num_steps)
        wrapped._maps = self.__dict__.setdefault("_dk_maps", wrapped._maps)
        return wrapped

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t  # the wrapped model scales

    def _dk_model(self, model: Callable[..., Any]) -> Callable[..., Any]:
        wrapped: Callable[..., Any] = self._wrap_model(model)
        return wrapped

    def _dk_times(self, model: Callable[..., Any], t: Tensor) -> tuple[Callable[..., Any], Tensor]:
        wrapped = self._wrap_model(model)
        return (wrapped.model, wrapped.times(t)) if type(wrapped) is _WrappedModel else (wrapped, t)


class _WrappedModel:
    """A model called with this diffusion's timesteps, which it maps to those of the original."""

    def __init__(
        self, model: Any, timestep_map: Sequence[int], rescale_timesteps: bool, original_num_steps: int
    ) -> None:
        self.model = model
        self.timestep_map = timestep_map
        self.rescale_timesteps = rescale_timesteps
        self.original_num_steps = original_num_steps
        self._maps = Tables()

    def times(self, ts: Tensor) -> Tensor:
        """The times that the model is given; the map goes to a device once."""
        key = ts.device, ts.dtype, len(self.timestep_map)
        found = self._maps.get(key, lambda: torch.tensor(self.timestep_map, dtype=ts.dtype).to(ts.device))[ts]
        return found.float() * (1000.0 / self.original_num_steps) if self.rescale_timesteps else found

    def __call__(self, x: Tensor, ts: Tensor, **kwargs: Any) -> Any:
        return self.model(x, self.times(ts), **kwargs)
