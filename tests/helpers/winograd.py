"""Weights of Winograd's convolutions by their matrices, in float64 (Lavin and Gray 2016, arXiv 1509.09308)."""

from __future__ import annotations

import torch
from torch import Tensor

# Along one axis; of upsampled images F(2, 3) without its third point and with its second doubled.
G = {
    "exact": [[1, 0, 0], [1 / 2, 1 / 2, 1 / 2], [1 / 2, -1 / 2, 1 / 2], [0, 0, 1]],
    "fast": [
        *([1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6]),
        *([1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1]),
    ],
    "upsampled": [[1, 0, 0], [1, 1, 1], [0, 0, 1]],
}


def packed_weight(weight: Tensor, form: str) -> Tensor:
    """G g G^T as `ops.pack_conv3x3` orders it: [points, points, panels of 64 outputs, inputs, 64], zeros at the end."""
    g = torch.tensor(G[form], dtype=torch.float64)
    outputs, inputs = weight.shape[:2]
    points = torch.einsum("ip,kcpq,jq->ijck", g, weight.double(), g)
    panels = torch.nn.functional.pad(points, (0, -outputs % 64)).reshape(len(g), len(g), inputs, -1, 64)
    return panels.transpose(2, 3).flatten()
