"""The handwritten digits of scikit-learn: 1797 grey images of 8 x 8, shipped inside that package, so nothing is
downloaded."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from torch import Tensor

from diffkern.demo import need

CLASSES = 10
SIZE = 8
LEVELS = 16  # grey values 0..16


@dataclasses.dataclass(frozen=True)
class Digits:
    """The data, split once and for all: images float32 [N, 1, 8, 8] in [-1, 1], -1 is background; labels int64 [N] in
    0..9."""

    images: Tensor
    labels: Tensor
    held_out_images: Tensor
    held_out_labels: Tensor


def load_digits(held_out: float = 0.2, seed: int = 0) -> Digits:
    """The digits, the share `held_out` of each class kept apart; the same split for the same seed everywhere.

    Neither the diffusion model nor the classifier sees the images kept apart: they tell how good the classifier is,
    and which Frechet distance real digits have.
    """
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out must lie in (0, 1), got {held_out}")
    raw = need("sklearn.datasets", "scikit-learn").load_digits()
    images = torch.from_numpy(np.ascontiguousarray(raw.images, dtype=np.float32)).reshape(-1, 1, SIZE, SIZE)
    images = images * (2.0 / LEVELS) - 1.0
    labels = torch.from_numpy(np.ascontiguousarray(raw.target, dtype=np.int64))
    random = np.random.default_rng(seed)
    apart = np.zeros(len(labels), dtype=bool)
    for digit in range(CLASSES):
        members = np.flatnonzero(raw.target == digit)
        apart[random.permutation(members)[: round(held_out * len(members))]] = True
    mask = torch.from_numpy(apart)
    return Digits(images[~mask], labels[~mask], images[mask], labels[mask])
