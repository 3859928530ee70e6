"""Grids in which a noise level comes twice: a step of no length is none, or a sentence says so; never a silent NaN."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.diffusers_runs import check_runs, outputs, pair, run
from helpers.lazy import needs
from torch import Tensor

import diffkern

pytestmark = needs("diffusers")

DPM, UNIPC, DEIS = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"
LMS = "LMSDiscreteScheduler"
SPREAD = 0.5
"""The deviation of the data, which is Gaussian: then the best model is known, and so is what a sampler ends on."""


def start(seed: int = 3, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def best_model(scheduler: Any) -> Callable[[Tensor, Any], Tensor]:
    """E[eps | x] for x = sqrt(abar) x0 + sqrt(1 - abar) eps at the scheduler's own levels."""

    def model(x: Tensor, t: Any) -> Tensor:
        abar = float(scheduler.alphas_cumprod[int(t)].double())
        return x * (math.sqrt(1 - abar) / (SPREAD**2 * abar + 1 - abar))

    return model


def loop(scheduler: Any, model: Callable[[Tensor, Any], Tensor], x: Tensor) -> list[Tensor]:
    """The states of a run over the timesteps that are set, the first and the last included."""
    states = [x]
    for t in scheduler.timesteps:
        shown = scheduler.scale_model_input(x, t)
        x = scheduler.step(model(shown, t), t, x).prev_sample
        states.append(x)
    return states


def use(scheduler: Any, levels: list[int]) -> None:
    """The grid that is set, with these of its levels, some of them twice."""
    steps = len(scheduler.timesteps)
    scheduler.sigmas, scheduler.timesteps = scheduler.sigmas[[*levels, steps]], scheduler.timesteps[levels]
    scheduler.num_inference_steps = len(levels)


@pytest.mark.parametrize("name", [DPM, UNIPC])
@pytest.mark.parametrize("trained", [pytest.param(1000, marks=pytest.mark.full), 100])
def test_as_many_steps_as_timesteps(name: str, trained: int) -> None:
    """np.linspace(0, T - 1, T + 1) rounds two of its values to one timestep. The flow of a Gaussian is known: x0 = x
    SPREAD / sqrt(abar SPREAD^2 + 1 - abar), which a thousand steps (or a hundred) reach within a hundredth."""
    original, ours = pair(name, num_train_timesteps=trained)
    for scheduler in (original, ours):
        scheduler.set_timesteps(trained)
    assert len(set(ours.timesteps.tolist())) == trained - 1
    assert not bool(loop(original, best_model(original), start())[-1].isfinite().all())
    with pytest.raises(ValueError, match=r"sigmas must fall from noise to data, got .* for steps \d+ and .*exact=True"):
        loop(ours, best_model(ours), start())
    times = ours.timesteps.tolist()
    twice = next(i for i in range(trained) if times[i] == times[i + 1])
    assert ours.step_index == twice + 1
    for scheduler in (original, ours):  # up to there all is well
        scheduler.set_timesteps(trained)
        scheduler.timesteps = scheduler.timesteps[: twice + 1]
    torch.testing.assert_close(*(loop(s, best_model(s), start())[-1] for s in (original, ours)), rtol=1e-4, atol=1e-4)
    ours.diffkern(exact=True).set_timesteps(trained)
    abar = float(ours.alphas_cumprod[-1])
    want = start() * (SPREAD / math.sqrt(abar * SPREAD**2 + 1 - abar))
    found = loop(ours, best_model(ours), start())[-1]
    torch.testing.assert_close(found, want, rtol=0.01, atol=0.0)


CONFIGS: list[tuple[str, dict[str, Any]]] = [
    *((DPM, {"algorithm_type": "dpmsolver++", "solver_order": order}) for order in (1, 2, 3)),
    (DPM, {"solver_type": "heun", "solver_order": 2, "prediction_type": "v_prediction"}),
    (DPM, {"algorithm_type": "dpmsolver", "solver_order": 3, "final_sigmas_type": "sigma_min"}),
    *((UNIPC, {"solver_order": order, "solver_type": "bh1", "prediction_type": "sample"}) for order in (1, 2, 3, 4)),
    (UNIPC, {"solver_order": 3, "disable_corrector": [4], "prediction_type": "sample"}),
    (UNIPC, {"solver_order": 2, "predict_x0": False, "final_sigmas_type": "sigma_min"}),
    *((DEIS, {"solver_order": order}) for order in (1, 2, 3)),
    (LMS, {}),
]


@pytest.mark.parametrize(("name", "config"), CONFIGS, ids=[f"{n[:5]}-{i}" for i, (n, _) in enumerate(CONFIGS)])
def test_a_step_of_no_length_is_none(name: str, config: dict[str, Any]) -> None:
    """The state stays as it is, bit for bit, and the steps after it are those of the grid without the repetition."""

    def model(x: Tensor, t: Any) -> Tensor:
        # UniPC's second call at a level is given the corrected state: a model that looks at it would see another.
        return 0.5 * (start(int(t)) if name == UNIPC else x).sin()

    levels = [0, 0, 1, 2, 3, 3, 4, 5, 6, 7, 8, 8, 8, *range(9, 14), 13, *range(14, 18)]
    ends, grids = [], []
    for repeated in (False, True):
        own = {"disable_corrector": [6 if repeated else 4]} if "disable_corrector" in config else {}  # of level 4
        _, ours = pair(name, **{**config, **own})
        ours.diffkern(exact=True).set_timesteps(18)
        if repeated:
            use(ours, levels)
        ours.set_begin_index(0)  # the original starts at the second of two equal timesteps
        grids.append(loop(ours, model, start(scale=float(ours.init_noise_sigma))))
        if not (name == UNIPC and config["solver_order"] > 3):
            again = diffkern.sample(lambda x, t: model(x, t[0]), grids[-1][0], ours.plan())
            torch.testing.assert_close(again, grids[-1][-1], rtol=1e-5, atol=1e-6)  # and so it is in a plan
        ends.append(grids[-1][-1])
    if name == UNIPC:  # whose corrected state is what stays: rounded once more
        torch.testing.assert_close(ends[1], ends[0], rtol=1e-5, atol=1e-6)
        return
    none = [k for k in range(len(levels) - 1) if levels[k] == levels[k + 1]]
    for k in none:
        assert torch.equal(grids[1][k], grids[1][k + 1])
    for a, b in zip(grids[0], [x for k, x in enumerate(grids[1]) if k - 1 not in none], strict=True):
        assert torch.equal(a, b)


def test_a_step_of_no_length_adds_no_noise() -> None:
    _, ours = pair(DPM, algorithm_type="sde-dpmsolver++")
    ours.diffkern(exact=True).set_timesteps(6)
    use(ours, [0, 1, 1, 2, 3, 4, 5])
    x = start()
    for i, t in enumerate(ours.timesteps):
        before, x = x, ours.step(0.5 * x, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        assert torch.equal(before, x) == (i == 1)


def test_where_the_original_is_finite_it_is_followed() -> None:
    """Order 1 divides by no earlier step; two equal levels at the end come before a step of order 1."""
    for name, config, levels in (
        (DPM, {"solver_order": 1}, [0, 1, 1, 2, 3]),
        (DPM, {"solver_order": 1, "algorithm_type": "sde-dpmsolver++"}, [0, 1, 1, 2, 3]),
        (DPM, {}, [0, 1, 2, 3, 3]),
        (UNIPC, {"solver_order": 1}, [0, 1, 1, 2, 3]),
        (DEIS, {"solver_order": 1}, [0, 1, 1, 2, 3]),
    ):
        runs = []
        for scheduler in pair(name, **config):
            scheduler.set_timesteps(4)
            use(scheduler, levels)
            scheduler.set_begin_index(0)
            runs.append(run(scheduler, None, start()))
        assert bool(runs[0][-1].prev_sample.isfinite().all())
        check_runs(*runs)


def test_a_loop_that_starts_behind_the_equal_levels() -> None:
    """Image to image: the original never sees them, and no more does ours."""
    for name in (DPM, UNIPC):
        runs = []
        for scheduler in pair(name, solver_order=3):
            scheduler.set_timesteps(9)
            use(scheduler, [0, 1, 1, *range(2, 9)])
            scheduler.set_begin_index(2)
            x, found = start(), []
            for t, m in zip(scheduler.timesteps[2:], outputs(8, tuple(start().shape)), strict=True):
                found.append(scheduler.step(m, t, x))
                x = found[-1].prev_sample
            runs.append(found)
        check_runs(*runs)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", [DPM, UNIPC, DEIS, LMS])
def test_a_single_level_is_no_grid(name: str, exact: bool) -> None:
    """ "leading" with as many steps as timesteps has timestep 0 alone: what went in would come out for a sample."""
    _, ours = pair(name, num_train_timesteps=10, timestep_spacing="leading")
    ours.diffkern(exact=exact).set_timesteps(10 if name != LMS else 11)
    assert ours.timesteps.unique().tolist() == [0]
    for call in (lambda: loop(ours, lambda x, t: x, start()), lambda: ours.plan()):
        with pytest.raises(ValueError, match=r"sigmas must fall .* at each of 1\d steps: .* than 'leading'"):
            call()
    ours.set_timesteps(1)  # one step from the only level to data is a step
    loop(ours, lambda x, t: x, start())


def test_timesteps_given_twice() -> None:
    """The second of two equal timesteps adds nothing, whoever starts the loop, by tensors or by numbers."""
    ends = []
    for timesteps in ([999, 700, 300, 10], [999, 700, 700, 300, 10], [999, 999, 700, 300, 10]):
        for form in (lambda t: t, int):
            _, ours = pair(DPM)
            ours.diffkern(exact=True).set_timesteps(timesteps=timesteps)
            x = start()
            for t in ours.timesteps:
                x = ours.step(0.5 * x, form(t), x).prev_sample
            ends.append(x)
    for x in ends[1:]:
        assert torch.equal(x, ends[0])
    _, ours = pair(DPM)
    ours.set_timesteps(timesteps=[999, 700, 700, 300, 10])
    with pytest.raises(ValueError, match="for steps 1 and 2, from where on DPMSolverMultistepScheduler of order 2"):
        ours.plan()


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
        (UNIPC, {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ],
)
def test_one_level_has_no_terminal_to_shift(name: str, config: dict[str, Any]) -> None:
    """shift_terminal stretches the levels so that the last is there; the original divides 0 by 0 where there is one."""
    original, ours = pair(name, shift_terminal=0.1, **config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numpy, about that division
        for scheduler in (original, ours):
            scheduler.set_timesteps(1)
    assert math.isnan(float(original.sigmas[0]))
    for call in (lambda: ours.step(start(), ours.timesteps[0], start()), lambda: ours.plan()):
        with pytest.raises(
            ValueError, match=r"sigmas must be numbers, got \[nan, 0\.0\] \(shift_terminal=0\.1 moves the last"
        ):
            call()
    ours.set_timesteps(2)
    assert float(ours.sigmas[1]) == pytest.approx(0.1)
    assert bool(ours.step(start(), ours.timesteps[0], start()).prev_sample.isfinite().all())
