"""Many images from a `diffkern.Diffusion`: cut into micro-batches and shards, the same for any number of processes.

| | |
|---|---|
| `generate` | images one micro-batch after the other, each by its number: `Part` |
| `write_shards`, `read_shards` | a large number of images in files, of which only the missing are made |
| `recommended`, `DEFAULT_STEPS` | the plan of a sampler as it is good for images; `described`: in words |
| `fingerprint`, `known_classes` | what a model is, as a hash of its weights; how many classes it has |

    for part in generate(diffusion, 64, "dpmpp_2m", classes="even", guidance=2.0):
        part.first, part.images, part.classes
    write_shards("shards", diffusion, 50_000, "heun", 18)          # under torchrun too

docs/generate.md.
"""

from __future__ import annotations

from diffkern.generate.images import Part, generate, known_classes
from diffkern.generate.recommended import DEFAULT_STEPS, described, recommended
from diffkern.generate.shards import fingerprint, read_shards, write_shards

__all__ = [
    "DEFAULT_STEPS",
    "Part",
    "described",
    "fingerprint",
    "generate",
    "known_classes",
    "read_shards",
    "recommended",
    "write_shards",
]
