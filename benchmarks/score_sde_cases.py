"""score_sde's predictor-corrector loops: a transcription of the paper's algorithms (the original is not on PyPI)
against `diffkern.compat.score_sde`. Network and noise are given, so that what is timed is the update, per step."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.case import Baseline, Case, Check, Setting, bytes_of, compare, cpu_target, random_tensor, tight
from diffkern.compat.score_sde import sampling, sde_lib

__all__ = ["TABLE", "pc_loop"]

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))

SMALL, LARGE = (1, 4, 64, 64), (16, 3, 256, 256)
GOAL = 2.0
"""Least time of the transcription over ours."""
BOUNDS = {"vp": (0.1, 20.0), "subvp": (0.1, 20.0), "ve": (0.01, 50.0)}
SDES: dict[str, Any] = {"vp": sde_lib.VPSDE, "subvp": sde_lib.subVPSDE, "ve": sde_lib.VESDE}


def pc_loop(
    name: str, setting: Setting, shape: tuple[int, ...], kind: str, predictor: str, corrector: str, steps: int = 50
) -> Case:
    """A loop of ``steps`` steps, corrector and predictor."""
    from helpers.score_sde_algorithms import Process, pc_sample

    x, m, z = (random_tensor(k, shape, setting) for k in range(3))
    process, sde = Process(kind, *BOUNDS[kind], steps), SDES[kind](*BOUNDS[kind], steps)
    sampler = sampling.get_pc_sampler(
        sde,
        shape,
        sampling.get_predictor(predictor),
        sampling.get_corrector(corrector),
        lambda x: x,
        0.16,
        continuous=True,
        device=setting.device,
    )

    def network(x: Tensor, labels: Tensor) -> Tensor:
        return m

    def noise(x: Tensor) -> Tensor:  # not return_value, which keeps every x
        return z

    def start(*shape: int) -> Tensor:
        return x

    def given(run: Callable[[], Tensor]) -> Tensor:
        with mock.patch("torch.randn_like", noise), mock.patch("torch.randn", start):
            return run()

    def ours() -> Tensor:
        return given(lambda: sampler(network)[0])

    def theirs() -> Tensor:
        with torch.device(setting.device):
            return given(lambda: pc_sample(process, network, shape, predictor, corrector, 0.16))

    def check() -> list[Check]:
        want = theirs()
        scale = 1 + float(want.abs().max())
        return [compare("ours", ours() / scale, want / scale, 40 * tight(x.dtype))]

    ours()
    return Case(
        name,
        f"score_sde {kind} {predictor} {corrector} loop, per step",
        shape,
        x.dtype,
        ours,
        (Baseline("transcription", theirs, cpu_target(GOAL, setting)),),
        check,
        bytes_of(x, m, z, x),
        steps=steps,
        overhead=True,
        counted=True,
    )


_RUNS = {
    "vp-euler-maruyama": ("vp", "euler_maruyama", "none"),
    "vp-ancestral": ("vp", "ancestral_sampling", "none"),
    "subvp-reverse-langevin": ("subvp", "reverse_diffusion", "langevin"),
    "ve-reverse-langevin": ("ve", "reverse_diffusion", "langevin"),
    "ve-reverse-ald": ("ve", "reverse_diffusion", "ald"),
}


def _table() -> dict[str, tuple[Callable[..., Case], dict[str, Any]]]:
    table: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {}
    for end, shape, steps in (("", SMALL, 50), ("-large", LARGE, 25)):
        for short, (kind, predictor, corrector) in _RUNS.items():
            options = {"shape": shape, "kind": kind, "predictor": predictor, "corrector": corrector, "steps": steps}
            table[f"score-sde-{short}{end}"] = (pc_loop, options)
    return table


TABLE = _table()
