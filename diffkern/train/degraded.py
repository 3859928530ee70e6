"""Training what gives back lost parts of images: the degradation of a configuration, its network, its pictures.

The loop knows nothing of it: `Diffusion.loss` degrades the images itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffkern import ops
from diffkern.degradations import Degradation, get_degradation
from diffkern.train.config import TrainConfig

if TYPE_CHECKING:
    from diffkern.data import Images
    from diffkern.diffusion import Diffusion
    from diffkern.plan import Plan

__all__ = ["degradation_of", "network_fields", "picture"]

SAMPLES = 3
"""Of each input, in a picture."""
PICTURE_SEED = 0


def degradation_of(config: TrainConfig) -> Degradation | None:
    """What ``config.degradation`` and its options say; None for none."""
    if config.degradation is None:
        if config.degradation_options:
            raise ValueError(
                "TrainConfig.degradation must be a name where degradation_options are given, got "
                f"{config.degradation_options}"
            )
        return None
    try:
        return get_degradation(config.degradation, **config.degradation_options)
    except ValueError as error:
        raise ValueError(f"TrainConfig.degradation_options must fit {config.degradation}: {error}") from error


def network_fields(
    degradation: Degradation | None, shape: tuple[int, int, int], latents: tuple[int, int, int] | None = None
) -> dict[str, Any]:
    """Fields of a `UNetConfig` for images [C, H, W], or for their latents [c, h, w]: what is concatenated, and the
    second time."""
    if degradation is None:
        return {}
    return {
        "concat_channels": degradation.concatenated(shape, latents),
        "concat_upsample": "bilinear" if degradation.resizes and not degradation.encoded(shape, latents) else None,
        "ids": 1 if degradation.augmentation > 0.0 else 0,
    }


def picture(diffusion: Diffusion, plan: Plan, images: Images, n: int, guidance: float | None = None) -> list[Tensor]:
    """Rows of a picture, [2 + SAMPLES, C, H, W] each: input, samples, truth; of n images, spread over all.

    The same images, inputs and noise every time. ``guidance`` where the images have classes.
    """
    degradation = diffusion.degradation
    assert degradation is not None
    rows = max(1, min(len(images), n // (2 + SAMPLES)))
    device = next(diffusion.parameters()).device
    x0, labels = images.batch(torch.arange(rows) * len(images) // rows)
    x0, seeds = x0.to(device), ops.seeds(PICTURE_SEED, rows * SAMPLES).to(device)
    inputs = degradation.degrade(x0, seeds[::SAMPLES])
    cond = None if labels is None or diffusion.null is None else labels.to(device).repeat_interleave(SAMPLES, 0)
    made = diffusion.sample(
        rows * SAMPLES,
        plan,
        seeds=seeds,
        image=inputs.repeat_interleave(SAMPLES, 0),
        cond=cond,
        guidance=None if cond is None else guidance,
    )
    parts = (degradation.shown(inputs).unsqueeze(1), made.unflatten(0, (rows, SAMPLES)), x0.unsqueeze(1))
    return list(torch.cat([part.to(x0.dtype) for part in parts], 1).cpu())
