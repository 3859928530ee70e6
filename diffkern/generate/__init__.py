"""Many images from a `diffkern.Diffusion` or `diffkern.GAN`: in micro-batches and shards, for any number of processes.

| | |
|---|---|
| `generate` | images one micro-batch after the other, each by its number: `Part` |
| `write_shards`, `read_shards` | a large number of images in files, of which only the missing are made |
| `restore`, `cascade` | of models with a degradation: samples of given inputs, and models that enlarge in turn |
| `recommended`, `DEFAULT_STEPS` | the plan of a sampler as it is good for images; `described`: in words |
| `planned` | the same, and None of a GAN, which needs no plan |
| `fingerprint`, `known_classes`, `reads` | a model's hash; how many classes it has; whether it is given texts |

    for part in generate(diffusion, 64, "dpmpp_2m", classes="even", guidance=2.0):
        part.first, part.images, part.classes
    write_shards("shards", diffusion, 50_000, "heun", 18)          # under torchrun too

docs/generate.md.
"""

from __future__ import annotations

from diffkern.generate.images import Part, generate, known_classes, reads
from diffkern.generate.recommended import DEFAULT_STEPS, described, planned, recommended
from diffkern.generate.restored import cascade, restore, stage_seed
from diffkern.generate.shards import fingerprint, read_shards, write_shards

__all__ = [
    "DEFAULT_STEPS",
    "Part",
    "cascade",
    "described",
    "fingerprint",
    "generate",
    "known_classes",
    "planned",
    "read_shards",
    "reads",
    "recommended",
    "restore",
    "stage_seed",
    "write_shards",
]
