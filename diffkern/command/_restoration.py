"""`diffkern evaluate` of a model with a degradation: its samples beside the truth, as a table and as a picture."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffkern import ops, parallel, pictures, storage
from diffkern.generate import described, known_classes, reads, restore
from diffkern.plan import Plan

if TYPE_CHECKING:
    from diffkern.data import Images
    from diffkern.diffusion import Diffusion
    from diffkern.metrics import Extractor, PairedScores

__all__ = ["MOST", "evaluate_restored"]

MOST = 256
"""Images where --n is not given; and at most as many as the data have."""
SHOWN = 10
"""Images in the picture."""


def evaluate_restored(
    diffusion: Diffusion,
    plan: Plan,
    data: Images,
    count: int,
    extractor: Callable[[], Extractor] | None,
    out: Path,
    *,
    seed: int = 0,
    guidance: float | None = None,
    micro_batch: int,
    progress: bool = False,
    ink: bool = False,
    source: str = "",
) -> list[PairedScores]:
    """Degrades ``count`` of the images, spread over all, samples each once, and writes evaluation.json and .png.

    Rows: the input enlarged or as it is, samples, and samples made consistent. In a job the processes share sampling.
    """
    from diffkern.metrics import paired_scores, paired_table

    degradation = diffusion.degradation
    assert degradation is not None
    truth, labels = data.batch(torch.arange(count) * len(data) // count)
    inputs = degradation.degrade(truth, ops.seeds(seed, count))
    classes = labels if known_classes(diffusion) is not None or reads(diffusion) else None
    guidance = None if classes is None and degradation.drop == 0.0 else guidance
    features = None if extractor is None else extractor()  # trained by the main process, waited for by all
    samples = torch.zeros_like(truth, device=parallel.device())
    parts = restore(
        diffusion,
        inputs,
        1,
        plan,
        seed=seed,
        classes=classes,
        guidance=guidance,
        project=False,
        micro_batch=micro_batch,
        progress="sampling" if progress else False,
    )
    for part in parts:
        samples[part.first : part.first + len(part.images)] = part.images
    samples = parallel.summed(samples)[0].cpu()
    if not parallel.is_main():
        return []
    kinds = [("input", degradation.shown(inputs)), ("samples", samples)]
    if degradation.projects:
        kinds.append(("projected", degradation.project(samples, inputs)))
    rows = [paired_scores(name, images, truth, inputs, degradation, features) for name, images in kinds]
    found = {
        "source": source,
        "sampler": plan.name,
        "steps": len(plan.steps),
        "guidance": guidance,
        "seed": seed,
        "degradation": degradation.to_dict(),
        "features": None if features is None else features.name,
        "rows": [_plain(row) for row in rows],
    }
    storage.write(out / "evaluation.json", json.dumps(found, indent=1, allow_nan=False) + "\n")
    picture = restored_picture([*kinds, ("truth", truth)], described(plan, guidance), ink)
    pictures.write(picture, out / "evaluation.png")
    print(paired_table(rows))
    print(f"by {described(plan, guidance)}; evaluation.json and evaluation.png are in {out}", flush=True)
    return rows


def restored_picture(kinds: list[tuple[str, Tensor]], title: str, ink: bool = False) -> Any:
    """A Pillow image: a row a kind of images, of which some, spread over all, are columns."""
    count = len(kinds[0][1])
    which = torch.arange(min(SHOWN, count)) * count // min(SHOWN, count)
    scale = pictures.default_scale(max(kinds[0][1].shape[-2:]))
    shown, names = [images[which] for _, images in kinds], [name for name, _ in kinds]
    return pictures.grid(shown, names=names, title=title, scale=scale, ink=ink and shown[0].shape[1] == 1)


def _plain(row: PairedScores) -> dict[str, Any]:
    """As JSON, which has no infinity."""
    values = dataclasses.asdict(row)
    return {name: None if isinstance(v, float) and math.isinf(v) else v for name, v in values.items()}
