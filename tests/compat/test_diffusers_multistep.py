"""DPM-Solver and UniPC beside diffusers' own, and what DEIS has in common with them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.diffusers_runs import SHAPE, Dispatched, check_runs, outputs, pair, run, same_error
from helpers.lazy import needs
from torch import Tensor

import diffkern

pytestmark = needs("diffusers")


DPM, UNIPC, DEIS = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")


def start(seed: int = 3, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(name: str, config: dict[str, Any], steps: int = 12, **options: Any) -> float:
    original, ours = pair(name, **config)
    return check_runs(run(original, steps, start(), **options), run(ours, steps, start(), **options), str(config))


# -------------------------------------------------------------------------------------------------- DPM-Solver(++)
@pytest.mark.parametrize("solver", ["midpoint", "heun"])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++", "dpmsolver", "sde-dpmsolver"])
def test_dpm_algorithms(algorithm: str, order: int, solver: str) -> None:
    if (algorithm, order) == ("sde-dpmsolver", 3):
        original, ours = pair(DPM, algorithm_type=algorithm, solver_order=3, final_sigmas_type="sigma_min")
        run(original, 20, start(), limit=2)
        with pytest.raises(UnboundLocalError):
            original.step(start(), original.timesteps[2], start())
        with pytest.raises(NotImplementedError, match=r"solver_order=3 is not implemented for .*'sde-dpmsolver'"):
            run(ours, 20, start(), limit=3)
        return
    for prediction in PREDICTIONS[: 4 if "++" in algorithm else 3]:
        for final in ("zero", "sigma_min") if "++" in algorithm else ("sigma_min",):
            for steps in (6, 17):
                config = {"algorithm_type": algorithm, "solver_order": order, "solver_type": solver}
                both(DPM, {**config, "prediction_type": prediction, "final_sigmas_type": final}, steps)


DPM_OPTIONS: list[dict[str, Any]] = [
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_lu_lambdas": True},
    {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"lower_order_final": False, "euler_at_final": True, "final_sigmas_type": "sigma_min"},
    {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    {"beta_schedule": "squaredcos_cap_v2", "lambda_min_clipped": -5.1},
    {"thresholding": True, "sample_max_value": 1.5},
    {"thresholding": True, "sample_max_value": 1.5, "algorithm_type": "sde-dpmsolver++"},
    {"thresholding": True, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
    {"algorithm_type": "deis", "final_sigmas_type": "sigma_min"},
    {"solver_type": "bh2"},
    {"trained_betas": [0.001 * (i + 1) for i in range(100)], "num_train_timesteps": 100},
]


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("options", DPM_OPTIONS, ids=range(len(DPM_OPTIONS)))
def test_dpm_options(options: dict[str, Any], order: int) -> None:
    both(DPM, {"solver_order": order, **options}, 9)
    both(DPM, {"solver_order": order, **options}, 16)


def test_dpm_learned_variance() -> None:
    """Questionable choice 16: three channels whatever the sample has; ours takes the sample's."""
    config = {"variance_type": "learned_range"}
    both(DPM, config, 6, channels=6)
    both(DPM, {**config, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, 6, channels=6)
    original, ours = pair(DPM, **config)
    _, plain = pair(DPM)
    x = start(shape=(2, 4, 8, 8))
    with pytest.raises(RuntimeError):
        run(original, 6, x, channels=8)
    found, states = run(ours, 6, x, channels=8), x
    plain.set_timesteps(6)
    for t, m, r in zip(plain.timesteps, outputs(6, (2, 8, 8, 8)), found, strict=True):
        states = plain.step(m[:, :4], t, states).prev_sample
        assert torch.equal(states, r.prev_sample)


def test_dpm_equal_last_levels_are_finite() -> None:
    """Questionable choice 17: sigma_min twice at the end divides 0 by 0."""
    config = {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "solver_type": "heun"}
    original, ours = pair(DPM, **config)
    broken, found = run(original, 20, start()), run(ours, 20, start())
    assert bool(broken[-1].prev_sample.isnan().any())
    check_runs(broken, found)
    torch.testing.assert_close(found[-1].prev_sample, found[-2].prev_sample)


def test_dpm_exact_curvature() -> None:
    """Questionable choice 2: exact=True is our dpmpp_3m, whose curvature has its whole weight; SDE form as well."""
    for kind, eta in (("dpmsolver++", 0.0), ("sde-dpmsolver++", 1.0)):
        original, ours = pair(DPM, algorithm_type=kind, solver_order=3, solver_type="heun", lower_order_final=False)
        ours.set_timesteps(16)
        rows = ours.diffkern(exact=True).plan().table
        schedule = diffkern.from_alphas_cumprod(ours.alphas_cumprod.double())
        plan = diffkern.samplers.dpmpp_3m(schedule, eta=eta, sigmas=ours.sigmas.tolist(), prediction="eps")
        columns = [diffkern.plan.COLUMNS.index(c) for c in ("p", "q", "a", "b", "g")]
        torch.testing.assert_close(rows[:, columns], plan.table[:, columns], rtol=2e-5, atol=1e-9)
        run(original, 16, start())


def test_dpm_variance_noise_and_start_in_the_middle() -> None:
    config = {"algorithm_type": "sde-dpmsolver++"}
    both(DPM, config, 6, variance_noise=start(9), seed=None)
    for name in (DPM, UNIPC):
        runs = []
        for scheduler in pair(name):
            scheduler.set_timesteps(20)
            scheduler.set_begin_index(8)
            x = scheduler.add_noise(start(), start(1), scheduler.timesteps[8:9])
            found = []
            for t, m in zip(scheduler.timesteps[8:], outputs(12), strict=True):
                found.append(scheduler.step(m, t, x))
                x = found[-1].prev_sample
            runs.append(found)
        check_runs(*runs)
        for begin in (True, False):
            noised = []
            for scheduler in pair(name):
                scheduler.set_timesteps(20)
                if begin:
                    scheduler.set_begin_index(8)
                t = scheduler.timesteps[8].reshape(1)
                noised.append(scheduler.add_noise(start(), start(1), t))
                scheduler.step(start(1), t if not begin else t[0], start())
                noised.append(scheduler.add_noise(start(), start(1), scheduler.timesteps[[8, 9]]))
                noised.append(scheduler.add_noise(start(), start(1), torch.tensor([5])))
            for a, b in zip(noised[:3], noised[3:], strict=True):
                torch.testing.assert_close(b, a, rtol=2e-6, atol=2e-6)


# ----------------------------------------------------------------------------------------------------------- UniPC
@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("solver", ["bh1", "bh2"])
@pytest.mark.parametrize("predict_x0", [True, False])
def test_unipc_solvers(predict_x0: bool, solver: str, order: int) -> None:
    for prediction in PREDICTIONS[: 4 if predict_x0 else 3]:
        for final in ("zero", "sigma_min"):
            config = {"predict_x0": predict_x0, "solver_type": solver, "solver_order": order}
            both(UNIPC, {**config, "prediction_type": prediction, "final_sigmas_type": final}, 9)


UNIPC_OPTIONS: list[dict[str, Any]] = [
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    {"use_flow_sigmas": True, "shift_terminal": 0.1, "prediction_type": "flow_prediction"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
    {"thresholding": True, "sample_max_value": 1.5},
    {"disable_corrector": [0, 1, 5]},
    {"solver_type": "midpoint"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
]


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("options", UNIPC_OPTIONS, ids=range(len(UNIPC_OPTIONS)))
def test_unipc_options(options: dict[str, Any], order: int) -> None:
    both(UNIPC, {"solver_order": order, **options}, 8)
    both(UNIPC, {"solver_order": order, **options}, 18)


def test_unipc_ends_at_clean_data_are_finite() -> None:
    """Questionable choice 20: older estimates across an infinite step, or 0 times infinity: NaN."""
    for config in (
        {"solver_type": "bh1"},
        {"lower_order_final": False},
        {"predict_x0": False},
        {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min", "solver_order": 3, "lower_order_final": False},
    ):
        original, ours = pair(UNIPC, **config)
        found = run(ours, 10, start())
        try:
            broken = run(original, 10, start())
            assert not bool(broken[-1].prev_sample.isfinite().all()), config
            check_runs(broken, found)
        except torch.linalg.LinAlgError:
            pass
        assert bool(found[-1].prev_sample.isfinite().all())


KEPT: list[tuple[str, Any]] = [
    ("blend", lambda i, x: 0.5 * x + 0.1 * i),
    ("sometimes", lambda i, x: x if i % 3 else 0.5 * x),
    ("in place", lambda i, x: x.mul_(0.9)),
    ("copies", lambda i, x: x.clone()),
]


@pytest.mark.parametrize("kind", range(len(KEPT)), ids=[k for k, _ in KEPT])
@pytest.mark.parametrize("order", [2, 3])
def test_unipc_with_a_state_changed_between_steps(kind: int, order: int) -> None:
    """The original's corrector starts from its own last sample whatever comes in; so does ours, by one op more."""
    both(UNIPC, {"solver_order": order}, 12, change=KEPT[kind][1])
    _, ours = pair(UNIPC, solver_order=order)
    for _ in range(2):
        with torch.no_grad(), Dispatched() as seen:
            run(ours, 12, start(), change=lambda i, x: x.clone())
    assert seen.ops["diffkern.step"] == 12 + 11 - 1  # none to find the first sample again, which is as it was
    assert seen.ops["aten.zeros"] == 0  # nor a table made


def test_unipc_in_a_static_buffer() -> None:
    """What went in is overwritten by what came out: the corrected sample is found from the latter."""
    runs = []
    for scheduler in pair(UNIPC, solver_order=3):
        scheduler.set_timesteps(12)
        x, found = start(), []
        for t, m in zip(scheduler.timesteps, outputs(12), strict=True):
            result = scheduler.step(m, t, x.clone() if scheduler.__module__.startswith("diffusers") else x)
            found.append(copy.copy(result))
            x.copy_(result.prev_sample)
        runs.append(found)
    check_runs(*runs, per_step=4e-6)


def test_unipc_says_when_both_are_overwritten() -> None:
    _, ours = pair(UNIPC)
    ours.set_timesteps(10)
    x = start()
    out = ours.step(start(1), ours.timesteps[0], x).prev_sample
    x.mul_(2)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="were overwritten in place: clone one of them"):
        ours.step(start(1), ours.timesteps[1], out)


def test_unipc_last_sample() -> None:
    original, ours = pair(UNIPC)
    for i in range(1, 6):
        for scheduler in (original, ours):
            run(scheduler, 10, start(), limit=i)
        torch.testing.assert_close(ours.last_sample, original.last_sample, rtol=1e-5, atol=1e-5)
        assert ours.this_order == original.this_order
        for a, b in zip(ours.model_outputs, original.model_outputs, strict=True):
            assert (a is None) == (b is None)
    ours.set_timesteps(5)
    assert ours.last_sample is None


def test_unipc_solver_p() -> None:
    import diffusers

    runs = []
    for scheduler in pair(UNIPC):
        scheduler.solver_p = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
        runs.append(run(scheduler, 8, start()))
    check_runs(*runs)


# ------------------------------------------------------------------------------------------------------ all of them
@pytest.mark.parametrize("name", [DPM, UNIPC, DEIS])
def test_add_noise(name: str) -> None:
    for config in ({}, {"use_flow_sigmas": True}, {"use_karras_sigmas": True}):
        original, ours = pair(name, **config)
        for scheduler in (original, ours):
            scheduler.set_timesteps(10)
        x, noise = start(), start(1)
        for t in (original.timesteps[[0, 9]], ours.timesteps[3:4], torch.tensor([5, 1000]), torch.tensor([-3, 999])):
            a, b = (s.add_noise(x, noise, t) for s in (original, ours))
            torch.testing.assert_close(b, a, rtol=2e-6, atol=2e-6)
        t = original.timesteps[[9, 9]]
        alpha, sigma = original._sigma_to_alpha_sigma_t(original.sigmas[9].double())
        exact = alpha * x.bfloat16().double() + sigma * noise.bfloat16().double()
        found = ours.add_noise(x.bfloat16(), noise.bfloat16(), t).double()
        theirs = original.add_noise(x.bfloat16(), noise.bfloat16(), t).double()
        assert float((found - exact).abs().max()) <= float((theirs - exact).abs().max())


@pytest.mark.parametrize("name", [DPM, UNIPC, DEIS])
def test_add_noise_before_set_timesteps(name: str) -> None:
    """Questionable choice 3: in training the levels rise and the timesteps fall: t gets the level of T - 1 - t."""
    original, ours = pair(name)
    x, noise, t = start(), start(1), torch.tensor([10, 700])
    a, b = (s.add_noise(x, noise, t) for s in (original, ours))
    torch.testing.assert_close(b, a, rtol=2e-6, atol=2e-6)
    vp = pair("DDPMScheduler")[0].add_noise(x, noise, t)
    assert float((a - vp).abs().max()) > 0.5
    torch.testing.assert_close(ours.diffkern(exact=True).add_noise(x, noise, t), vp, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", [DPM, UNIPC, DEIS])
def test_repeated_timesteps(name: str) -> None:
    """The original starts at the second of two equal timesteps; exact=True at the one it is given."""
    original, ours = pair(name)
    for scheduler in (original, ours):
        scheduler.set_timesteps(6)
        scheduler.timesteps = scheduler.timesteps[[0, 2, 2, 3, 4, 5]]
    a, b = (s.step(start(1), s.timesteps[1], start()) for s in (original, ours))
    check_runs([a], [b])
    assert ours.step_index == original.step_index == 3
    ours._step_index = None
    ours.diffkern(exact=True).step(start(1), ours.timesteps[1], start())
    assert ours.step_index == 2


@pytest.mark.parametrize("name", [DPM, UNIPC, DEIS])
@pytest.mark.parametrize("order", [2, 3])
def test_timesteps_cut_by_a_pipeline(name: str, order: int) -> None:
    """Some pipelines assign scheduler.timesteps; levels are then counted from the first one."""
    for lower in (True, False):
        runs = []
        for scheduler in pair(name, solver_order=order, lower_order_final=lower):
            scheduler.set_timesteps(12)
            scheduler.timesteps = scheduler.timesteps[4:]
            x, found = start(), []
            for t, m in zip(scheduler.timesteps, outputs(8), strict=True):
                found.append(scheduler.step(m, t, x))
                x = found[-1].prev_sample
            runs.append(found)
        check_runs(*runs)


def test_repeated_first_timestep() -> None:
    """Questionable choice 18: a run from the first of two equal timesteps ends in an error in the original."""
    config = {"use_karras_sigmas": True, "beta_schedule": "squaredcos_cap_v2", "solver_order": 2}
    original, ours = pair(DPM, **config)
    found = run(ours, 9, start())
    assert ours.timesteps[0] == ours.timesteps[1]
    with pytest.raises(IndexError, match="out of bounds"):
        run(original, 9, start())
    original.set_timesteps(9)
    original.set_begin_index(0)
    x, told = start(), []
    for t, m in zip(original.timesteps, outputs(9), strict=True):
        told.append(original.step(m, t, x))
        x = told[-1].prev_sample
    check_runs(told, found)


@pytest.mark.parametrize("name", [DPM, UNIPC, DEIS])
def test_refuses_what_the_original_refuses(name: str) -> None:
    x = start()
    original, ours = pair(name)
    assert "run 'set_timesteps'" in same_error(lambda s: s.step(x, 5, x), original, ours)
    for scheduler in (original, ours):
        run(scheduler, 5, x)
    text = same_error(lambda s: s.step(x, 5, x), original, ours)
    assert ("out of bounds" in text) == (name != UNIPC)  # UniPC's is an assertion without words
    original, ours = pair(name, prediction_type="nonsense")
    for scheduler in (original, ours):
        scheduler.set_timesteps(10)
    assert "prediction_type given as nonsense" in same_error(lambda s: s.step(x, 100, x), original, ours)


@pytest.mark.parametrize("name", [DPM, UNIPC, DEIS])
def test_forms_of_a_timestep(name: str) -> None:
    found = []
    for form in (lambda t: t, int, lambda t: t.clone(), lambda t: t.expand(2), lambda t: t.reshape(1), float):
        _, ours = pair(name)
        ours.set_timesteps(10)
        found.append(ours.step(start(1), form(ours.timesteps[3]), start()).prev_sample)
        assert ours.step_index == 4
        assert torch.equal(found[0], found[-1])
    _, ours = pair(name)
    ours.set_timesteps(10)
    with pytest.raises(ValueError, match=r"timestep must be one for all samples, .* got shape \[2\]"):
        ours.step(start(1), ours.timesteps[[1, 3]], start())


@pytest.mark.parametrize("name", [DPM, UNIPC, DEIS])
def test_timesteps_are_never_read_after_set_begin_index(name: str) -> None:
    """As on a device, where a read waits for all that was launched."""
    original, ours = pair(name)
    for scheduler in (original, ours):
        scheduler.set_timesteps(8)
        scheduler.set_begin_index(2)
    ours.timesteps = torch.empty(8, dtype=torch.int64, device="meta")  # has no values to read
    x = start()
    for t, m in zip(original.timesteps[2:], outputs(6), strict=True):
        a = original.step(m, t, x).prev_sample
        b = ours.step(m, torch.empty((), dtype=torch.int64, device="meta"), x).prev_sample
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
        x = b


@pytest.mark.parametrize("name", [DPM, UNIPC, DEIS])
def test_a_schedule_that_comes_back_builds_nothing(name: str) -> None:
    _, ours = pair(name, solver_order=3)
    first = run(ours, 9, start())
    built = len(ours._engine.tables)
    again = run(ours, 9, start())
    assert len(ours._engine.tables) == built
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.prev_sample, b.prev_sample)
    with Dispatched() as seen:
        ours.set_timesteps(9)
        ours.step(start(), ours.timesteps[0], start())
    assert seen.ops["aten.linalg_solve_ex"] == seen.ops["aten._linalg_solve_ex"] == 0
