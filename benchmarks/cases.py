"""The cases: what is timed, against what, how it is checked, and how many bytes it has to move.

A case is built by `CASES[name](setting)`. Its baselines do the same job the way it is done today: plain torch, or
diffusers' schedulers. Targets are for the CPU; on a GPU there are none.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import (
    attention_cases,
    brownian_case,
    compat_cases,
    conv3x3_case,
    drop_in_cases,
    flow_matching_cases,
    group_norm_case,
    guided_diffusion_cases,
    linear_rows_case,
    sampler_cases,
    score_sde_cases,
    statistics_cases,
    torchcfm_cases,
)
from benchmarks.case import Baseline, Case, Check, Setting, cpu_target
from benchmarks.learned_case import learned
from benchmarks.logprob_case import logprob
from benchmarks.step_cases import SMALL, guided, heun, loop, step
from benchmarks.training_cases import loss, noising, randn
from benchmarks.variational_case import hybrid

__all__ = [
    "CASES",
    "CPU_ALONE",
    "LARGE",
    "SMALL",
    "Baseline",
    "Case",
    "Check",
    "Setting",
    "cpu_target",
    "guided",
    "heun",
    "hybrid",
    "learned",
    "logprob",
    "loop",
    "loss",
    "noising",
    "randn",
    "step",
]

LARGE = (16, 3, 256, 256)


def _cases() -> dict[str, Callable[[Setting], Case]]:
    half = torch.bfloat16
    table: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {
        "randn": (randn, {"shape": LARGE, "targets": True}),
        "noising": (noising, {"shape": LARGE, "targets": True}),
        "noising-v": (noising, {"shape": LARGE, "target": True, "targets": True}),
        "ddim": (step, {"shape": LARGE, "kind": "ddim", "goal": 10.0, "add": 1.3}),
        "ddim-x0": (step, {"shape": LARGE, "kind": "ddim", "want_x0": True, "goal": 8.0}),
        "ddpm": (step, {"shape": LARGE, "kind": "ddpm", "goal": 6.0}),
        "learned-step": (learned, {"shape": LARGE, "goal": 4.0}),
        "logprob": (logprob, {"shape": LARGE, "goal": 4.0}),
        "logprob-grad": (logprob, {"shape": LARGE, "gradient": True, "goal": 4.0}),
        "loss-v": (loss, {"shape": LARGE, "prediction": "v", "goal": 4.0}),
        "loss-v-stored": (loss, {"shape": LARGE, "prediction": "v", "stored": True}),
        "loss-eps": (loss, {"shape": LARGE, "prediction": "eps", "goal": 4.0}),
        "loss-eps-stored": (loss, {"shape": LARGE, "prediction": "eps", "stored": True}),
        "hybrid": (hybrid, {"shape": LARGE, "goal": 4.0}),
        "noise-sum": (brownian_case.noise_sum, {"shape": LARGE, "goal": 4.0}),
        "brownian": (brownian_case.increments, {"shape": SMALL, "goal": 4.0}),
        "guided": (guided, {"shape": LARGE}),
        "heun": (heun, {"shape": LARGE}),
        "ddim-channels-last": (step, {"shape": LARGE, "kind": "ddim", "channels_last": True}),
        "ddpm-channels-last": (step, {"shape": LARGE, "kind": "ddpm", "channels_last": True}),
        "randn-bf16": (randn, {"shape": LARGE, "dtype": half}),
        "noising-bf16": (noising, {"shape": LARGE, "dtype": half}),
        "ddim-bf16": (step, {"shape": LARGE, "kind": "ddim", "dtype": half}),
        "ddpm-bf16": (step, {"shape": LARGE, "kind": "ddpm", "dtype": half}),
        "randn-small": (randn, {"shape": SMALL}),
        "ddim-small": (step, {"shape": SMALL, "kind": "ddim", "goal": 6.0, "goal_us": 8.0}),
        "ddpm-small": (step, {"shape": SMALL, "kind": "ddpm", "goal": 8.0, "goal_us": 16.0}),
        "guided-small": (guided, {"shape": SMALL}),
        "ddim-loop": (loop, {"shape": SMALL, "kind": "ddim"}),
        "ddpm-loop": (loop, {"shape": SMALL, "kind": "ddpm"}),
        **sampler_cases.TABLE,
        **statistics_cases.TABLE,
        **group_norm_case.TABLE,
        **linear_rows_case.TABLE,
        **conv3x3_case.TABLE,
        **drop_in_cases.TABLE,
        **compat_cases.TABLE,
        **score_sde_cases.TABLE,
        **flow_matching_cases.TABLE,
        **guided_diffusion_cases.TABLE,
        **torchcfm_cases.TABLE,
        **attention_cases.TABLE,
    }
    return {name: functools.partial(build, name, **options) for name, (build, options) in table.items()}


CASES = _cases()
CPU_ALONE = frozenset(conv3x3_case.TABLE)
"""Of ops without a CUDA kernel."""
