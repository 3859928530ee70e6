"""Pairs of noise and data by minibatch optimal transport."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern import ops, streams
from diffkern.ops import Seeds


def ot_permutation(noise: Tensor, x1: Tensor) -> Tensor:
    """perm [B] int64 with the least sum_b |noise[perm[b]] - x1[b]|^2: exact optimal transport between two batches.

    The coupling of Tong et al. and Pooladian et al. (2023, arXiv 2302.00482, 2304.14772), solved on the CPU in float64
    by POT, the package behind the extra ``ot``. Between two batches of B samples a plan of least cost is a permutation,
    so that nothing has to be drawn from it. A loss calls it once a batch: O(B^2) memory, about O(B^3) time.
    """
    if noise.shape != x1.shape or noise.ndim == 0:
        raise ValueError(f"noise and x1 must have one shape [B, ...], got {list(noise.shape)} and {list(x1.shape)}")
    ot = import_pot()
    left, right = (x.detach().flatten(1).to(torch.float64) for x in (x1, noise))
    if len(left) == 0:
        return torch.zeros(0, dtype=torch.int64, device=x1.device)
    cost = torch.cdist(left, right, compute_mode="donot_use_mm_for_euclid_dist") ** 2
    if not bool(torch.isfinite(cost).all()):
        raise ValueError("noise and x1 must be finite for an optimal-transport coupling, got a distance that is not")
    plan = torch.from_numpy(ot.emd([], [], cost.cpu().numpy(), numItermax=10_000_000))
    perm = plan.argmax(1)
    if len(perm.unique()) != len(perm):  # a vertex of the polytope is a permutation; anything else is no optimum
        raise RuntimeError(f"optimal transport of {len(perm)} samples did not converge")
    return perm.to(x1.device)


def ot_seeds(x1: Tensor, seeds: Seeds, stream: int = streams.TRAINING) -> Tensor:
    """The batch's seeds [B], permuted so that their noise is paired with x1 by optimal transport (`ot_permutation`).

    Noise is an address, so this is all that a coupling has to change: `noised` and `prediction_loss` with these seeds
    see the coupled noise, and none is stored. The noise itself is drawn here once, to compare it with the data.
    """
    seeds = ops.as_seeds(seeds, x1.shape[0], x1.device)
    return seeds[ot_permutation(ops.randn(x1.shape, seeds, stream, dtype=x1.dtype), x1).to(seeds.device)]


def import_pot() -> Any:
    """The package POT, or an ImportError that says how to install it."""
    try:
        import ot
    except ImportError:
        raise ImportError(
            "an optimal-transport coupling needs the package POT, which is not installed: pip install 'diffkern[ot]'"
        ) from None
    return ot
