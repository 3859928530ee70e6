"""Images with captions in training: in the network's own words, and which of them the pictures show."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern import parallel
from diffkern.data import Images, retold
from diffkern.diffusion import Diffusion
from diffkern.nn import TextConditioned

__all__ = ["Asked", "asked", "told"]

OF_EACH = 8
"""Images of a caption in a picture."""


def told(diffusion: Any, images: Images) -> Images:
    """The images as they are, or with captions as tokens of the words of the network that reads them.

    ValueError for a word that it does not know, for classes where it reads texts, and for captions where it does not.
    """
    network, labels = parallel.bare(diffusion.model), images.labels
    if not isinstance(network, TextConditioned):
        if labels is not None and labels.ndim > 1 and diffusion.null is not None and diffusion.null.ndim == 0:
            raise ValueError(
                f"data must have classes, which the network is given, got captions {list(labels.shape)}: open them "
                "with labels=None, or train a network that reads texts"
            )
        return images
    if labels is None or images.vocabulary is None:
        if labels is not None and labels.ndim == 1:
            raise ValueError(
                "data must have captions, which the network reads, got classes: open them with labels='text', or "
                "with labels=False"
            )
        return images
    return retold(images, getattr(network.text, "vocabulary", network))


class Asked(NamedTuple):
    """What the images of a picture are asked to be."""

    cond: Tensor | None
    columns: int
    names: list[str]
    """Of its rows."""


def asked(diffusion: Diffusion, images: Images, n: int, device: torch.device) -> Asked:
    """Classes in turn, or the captions that the data have most often, a row each; nothing where there are neither."""
    if diffusion.null is None:
        return Asked(None, OF_EACH, [])
    if images.classes is not None:
        count = len(images.classes)
        return Asked(torch.arange(n, device=device) % count, min(16, count), [])
    if images.labels is None or images.labels.ndim == 1:
        return Asked(None, OF_EACH, [])
    every, counts = torch.unique(images.labels, dim=0, return_counts=True)
    chosen = every[torch.argsort(counts, descending=True, stable=True)[: -(-n // OF_EACH)]]
    tokens = chosen.repeat_interleave(-(-n // len(chosen)), 0)[:n]
    rows = tokens[:: -(-n // len(chosen))]
    names = [] if images.vocabulary is None else images.vocabulary.texts(rows)
    return Asked(tokens.to(device), -(-n // len(chosen)), names)
