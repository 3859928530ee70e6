"""Averages of any width after training, from those that were kept on the way (post-hoc EMA).

    found = synthesize(snapshots("runs/a"), 0.13)         # of RUN/snapshots, at the last of their steps
    diffusion = Diffusion.from_pretrained("runs/a")
    diffusion.load_state_dict(found)

A profile of the power function is a density over the steps; the one that is wanted is the mix of the stored ones that
is nearest in L2. Karras, Aittala, Lehtinen, Hellsten, Aila, Laine 2024, arXiv 2312.02696, section 3.2 and appendix C.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffkern.train._tensors import opened
from diffkern.train.ema import gamma_of

__all__ = ["Mix", "Snapshot", "inner_product", "mix", "snapshots", "synthesize"]


class Snapshot(NamedTuple):
    """A power function's average after a step: its relative width, and its tensors or the safetensors file of them."""

    step: int
    width: float
    source: Mapping[str, Tensor] | str | os.PathLike[str]


class Mix(NamedTuple):
    """Weights of snapshots, and how far their profile is from the wanted one: the L2 distance over its L2 norm."""

    weights: tuple[float, ...]
    error: float


def snapshots(run: str | os.PathLike[str]) -> list[Snapshot]:
    """Those in RUN/snapshots, by step and width; FileNotFoundError where there are none."""
    folder = Path(run) / "snapshots"
    found = []
    for path in folder.glob("*-*.safetensors"):
        step, _, width = path.name.removesuffix(".safetensors").partition("-")
        with contextlib.suppress(ValueError):
            found.append(Snapshot(int(step), float(width), path))
    if not found:
        raise FileNotFoundError(f"there are no averages in {folder}: training keeps them where keep_every is given")
    return sorted(found, key=lambda snapshot: snapshot[:2])


def inner_product(step: float, gamma: float, other_step: float, other_gamma: float) -> float:
    """The integral of p q over the common steps, p(tau) = (gamma + 1) tau^gamma/step^(gamma + 1) on [0, step].

    (gamma + 1)(gamma' + 1)/(gamma + gamma' + 1) r^g/max(step, step') with r the smaller step over the larger one and
    g the gamma of the larger (arXiv 2312.02696, appendix C).
    """
    if step > other_step:
        step, gamma, other_step, other_gamma = other_step, other_gamma, step, gamma
    product = (gamma + 1.0) * (other_gamma + 1.0) / (gamma + other_gamma + 1.0)
    return product * (step / other_step) ** other_gamma / other_step


def mix(stored: Sequence[tuple[int, float]], width: float, step: int) -> Mix:
    """The weights of profiles, (step, relative width) each, whose mix is nearest to that of ``width`` at ``step``."""
    wanted, kept = (float(step), gamma_of(width)), [(float(at), gamma_of(relative)) for at, relative in stored]
    norms = np.array([math.sqrt(inner_product(*one, *one)) for one in kept])
    products = np.array([[inner_product(*one, *other) for other in kept] for one in kept]) / np.outer(norms, norms)
    norm = math.sqrt(inner_product(*wanted, *wanted))
    aims = np.array([inner_product(*one, *wanted) for one in kept]) / (norms * norm)
    found = np.linalg.lstsq(products, aims, rcond=1e-13)[0]
    error = math.sqrt(max(0.0, 1.0 - 2.0 * float(found @ aims) + float(found @ products @ found)))
    return Mix(tuple((found * norm / norms).tolist()), error)


def synthesize(
    kept: Sequence[Snapshot], width: float, step: int | None = None, *, largest_error: float = 0.1
) -> dict[str, Tensor]:
    """The average of relative width ``width`` after a ``step`` (the last one kept if None), as a dictionary of tensors.

    A mix of the snapshots up to the step; the snapshot itself where it is one of them. Tensor by tensor in float64, so
    that memory holds the result and one tensor more. What is the same in all of them, and integers, are taken as they
    are. ValueError where the snapshots do not reach: the `Mix.error` is above ``largest_error``.
    """
    if not kept:
        raise ValueError("kept must have a snapshot, got none")
    last = max(snapshot.step for snapshot in kept) if step is None else step
    used = sorted((snapshot for snapshot in kept if snapshot.step <= last), key=lambda snapshot: snapshot[:2])
    exact = [snapshot for snapshot in used if (snapshot.step, snapshot.width) == (last, width)][:1]
    used = exact or used
    weights, error = mix([snapshot[:2] for snapshot in used], width, last)
    if not error <= largest_error:
        raise ValueError(
            f"kept must have profiles that mix to width {width} at step {last} with an error of at most "
            f"{largest_error}, got {error:.2g} from {len(used)} snapshots: keep more (keep_every)"
        )
    with contextlib.ExitStack() as stack:
        sources = [
            source if isinstance(source, Mapping) else stack.enter_context(opened(source)) for _, _, source in used
        ]
        return {name: _mixed([source[name] for source in sources], weights) for name in sources[-1]}


def _mixed(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    newest = tensors[-1]
    if not newest.is_floating_point() or all(torch.equal(tensor, newest) for tensor in tensors):
        return newest.clone()
    total = torch.zeros_like(newest, dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total.add_(tensor, alpha=weight)
    return total.to(newest.dtype)
