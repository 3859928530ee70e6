"""What is taken from an image and given back by a model: super-resolution, inpainting, colourisation, deblurring.

A degradation is data, a frozen dataclass: `Degradation.degrade` makes the input of a clean image, which a network is
given concatenated to its own (`diffkern.Diffusion(..., degradation=)`).

| name | class | what is left | its projection |
|---|---|---|---|
| ``super_resolution`` | `SuperResolution` | means of squares, or a bicubic reduction | the nearest image that has it |
| ``inpainting`` | `Inpainting` | all but a box, a stroke, a side or pixels, and the mask | known pixels put back |
| ``colourisation`` | `Colourisation` | the luma | the nearest image that has it |
| ``deblurring`` | `Deblurring` | what a Gaussian leaves | none |

Source: concatenation is lecture 000 (conditioning a UNet on images) and arXiv 2104.07636; ``augmentation`` is arXiv
2106.15282. docs/super-resolution.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffkern.checks import unknown, word
from diffkern.degradations.base import Degradation
from diffkern.degradations.colourisation import Colourisation
from diffkern.degradations.deblurring import Deblurring
from diffkern.degradations.inpainting import Inpainting
from diffkern.degradations.super_resolution import SuperResolution
from diffkern.names import DegradationName
from diffkern.records import of_kind

__all__ = [
    "DEGRADATIONS",
    "Colourisation",
    "Deblurring",
    "Degradation",
    "Inpainting",
    "SuperResolution",
    "from_dict",
    "get_degradation",
]

DEGRADATIONS: dict[DegradationName, type[Degradation]] = {
    "super_resolution": SuperResolution,
    "inpainting": Inpainting,
    "colourisation": Colourisation,
    "deblurring": Deblurring,
}
"""By the name that ``degradation=`` takes."""
_ELSEWHERE = {"colorization": "colourisation", "sr": "super_resolution", "upscaling": "super_resolution"}
_KINDS: dict[str, type] = {kind.__name__: kind for kind in DEGRADATIONS.values()}


def get_degradation(degradation: DegradationName | Degradation, **options: Any) -> Degradation:
    """The degradation of a name with these fields, or one as it is. ValueError, with the known names or fields."""
    if isinstance(degradation, Degradation):
        if options:
            raise ValueError(f"options must go with a name, got {', '.join(options)} with {degradation!r}")
        return degradation
    name = word(degradation, DEGRADATIONS, _ELSEWHERE)
    if name is None:
        raise ValueError(unknown("degradation", degradation, list(DEGRADATIONS)))
    kinds: dict[str, type] = {str(known): kind for known, kind in DEGRADATIONS.items()}
    made: Degradation = of_kind({**options, "kind": name}, kinds, name)
    return made


def from_dict(data: Mapping[str, Any]) -> Degradation:
    """What `Degradation.to_dict` wrote; ValueError naming the field for anything else."""
    found: Degradation = of_kind(data, _KINDS, "degradation")
    return found
