"""Dynamic thresholding in the drop-ins' plans, and in DDPM's step with a learned variance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.diffusers_runs import SHAPE, Dispatched, check_runs, outputs, pair, run
from helpers.lazy import needs
from torch import Tensor

import diffkern

pytestmark = needs("diffusers")


DPM, CLIPPED = "DPMSolverMultistepScheduler", {"use_clipped_model_output": True}
# Name, options of the constructor and of step.
RUNS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("DDPMScheduler", {}, {}),
    ("DDPMScheduler", {"prediction_type": "v_prediction", "variance_type": "fixed_large"}, {}),
    ("DDPMScheduler", {"variance_type": "learned_range"}, {}),
    ("DDIMScheduler", {}, CLIPPED),
    ("DDIMScheduler", {"prediction_type": "sample"}, {**CLIPPED, "eta": 0.7}),
    (DPM, {}, {}),
    (DPM, {"solver_order": 3, "prediction_type": "sample"}, {}),
    (DPM, {"solver_order": 3, "algorithm_type": "sde-dpmsolver++", "solver_type": "heun"}, {}),
    ("UniPCMultistepScheduler", {}, {}),
    ("UniPCMultistepScheduler", {"solver_order": 3, "prediction_type": "v_prediction"}, {}),
    ("UniPCMultistepScheduler", {"prediction_type": "sample", "disable_corrector": [2]}, {}),
    ("UniPCMultistepScheduler", {"predict_x0": False}, {}),  # in eps the original thresholds nothing
]
IDS = [f"{name[:-9]}-{i}" for i, (name, _, _) in enumerate(RUNS)]
SEEDS = torch.tensor([5, 6])
every_run = pytest.mark.parametrize(("name", "config", "options"), RUNS, ids=IDS)


def start() -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(3))


def channels_of(config: dict[str, Any]) -> int:
    return 6 if "variance_type" in config and config["variance_type"].startswith("learned") else 3


def planned(ours: Any, x: Tensor, channels: int, **options: Any) -> Tensor:
    plan = ours.plan(**options)
    assert diffkern.Plan.from_json(plan.to_json()) == plan
    calls = iter(outputs(9, (2, channels, 8, 8), x.dtype))
    return diffkern.sample(lambda x, t: next(calls), x, plan, seeds=None if plan.deterministic else SEEDS)


@every_run
@pytest.mark.parametrize("maximum", [1.0, 1.5, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_plan_and_loop_give_the_same_bits(
    name: str, config: dict[str, Any], options: dict[str, Any], maximum: float, dtype: torch.dtype
) -> None:
    threshold = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": maximum}
    channels, x = channels_of(config), start().to(dtype)
    _, ours = pair(name, **threshold, **config)
    ours.diffkern(rng="counter", seeds=SEEDS)
    found = run(ours, 9, x, seed=None, channels=channels, **options)[-1].prev_sample
    assert torch.equal(planned(ours, x, channels, **options), found)
    if config.get("predict_x0", True):
        assert ours.plan(**options).threshold == (0.9, None if maximum == float("inf") else maximum)
    if config.get("predict_x0", True) and maximum > 1.0:  # a maximum of 1 is a clip; else the threshold changes much
        _, plain = pair(name, **config)
        plain.diffkern(rng="counter", seeds=SEEDS)
        other = run(plain, 9, x, seed=None, channels=channels, **options)[-1].prev_sample
        assert not torch.allclose(found, other, rtol=1e-2, atol=1e-2)


def test_what_a_plan_can_not_say_is_refused() -> None:
    refused: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
        ("DDIMScheduler", {}, {}, "takes eps from the thresholded x0, got use_clipped_model_output=False: use step"),
        (DPM, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {}, "got algorithm_type='dpmsolver'"),
        ("DDPMScheduler", {"sample_max_value": 0.5}, {}, "threshold is at least 1, got sample_max_value=0.5: use step"),
        ("UniPCMultistepScheduler", {"sample_max_value": 0.5}, {}, "at least 1, got sample_max_value=0.5: use step"),
    ]
    for name, config, options, text in refused:
        _, ours = pair(name, thresholding=True, **config)
        ours.set_timesteps(5)
        with pytest.raises(ValueError, match=text):
            ours.plan(**options)


@pytest.mark.parametrize("maximum", [1.0, 1.5, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_learned_variance_with_a_threshold_is_the_originals(maximum: float, dtype: torch.dtype) -> None:
    threshold = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": maximum}
    both = pair("DDPMScheduler", variance_type="learned_range", **threshold)
    theirs, ours = (run(s, 9, start().to(dtype), channels=6, dtype=dtype) for s in both)
    check_runs(theirs, ours, per_step=2e-6 if dtype == torch.float32 else 1e-12)
    for a, b in zip(theirs, ours, strict=True):
        bound = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(b.pred_original_sample, a.pred_original_sample, rtol=bound, atol=bound)


def test_a_learned_variance_with_a_threshold_is_three_ops_and_a_copy() -> None:
    _, ours = pair("DDPMScheduler", variance_type="learned_range", thresholding=True)
    ours.diffkern(rng="counter", seeds=SEEDS).set_timesteps(9)
    x, m, times = start(), outputs(1, (2, 6, 8, 8))[0], list(ours.timesteps)
    ours.step(m, times[0], x)
    with torch.no_grad(), Dispatched() as seen:
        ours.step(m, times[1], x)
    three = {"diffkern.step": 1, "diffkern.dynamic_threshold": 1, "diffkern.learned_step": 1}
    assert seen.ops == {**three, "aten.cat": 1, "aten.split": 2}  # the splits are views
    grown = start().requires_grad_()
    ours.step(m, times[1], grown).prev_sample.sum().backward()
    assert grown.grad is not None
    assert bool(grown.grad.any())
