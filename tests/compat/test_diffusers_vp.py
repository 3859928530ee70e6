"""DDPM, DDIM, its inversion, RePaint and ScoreSdeVe beside diffusers' own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.diffusers_runs import SHAPE, Dispatched, check_runs, outputs, pair, run, same_error
from helpers.lazy import needs

import diffkern

pytestmark = needs("diffusers")


PREDICTIONS = ("epsilon", "sample", "v_prediction")
TABLES: list[dict[str, Any]] = [
    {},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"},
    {"timestep_spacing": "leading", "steps_offset": 1, "clip_sample_range": 2.0},
    {"trained_betas": [0.001 * (i + 1) for i in range(100)], "num_train_timesteps": 100},
    {"thresholding": True, "sample_max_value": 1.5, "dynamic_thresholding_ratio": 0.9},
]


def start(seed: int = 3) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------- DDPM
@pytest.mark.parametrize("table", TABLES, ids=range(len(TABLES)))
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_tables(table: dict[str, Any], prediction: str) -> None:
    config = {"prediction_type": prediction, **table}
    original, ours = pair("DDPMScheduler", **config)
    check_runs(run(original, 12, start()), run(ours, 12, start()))


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize(
    "variance", ["fixed_small", "fixed_small_log", "fixed_large", "learned", "learned_range", "other"]
)
def test_ddpm_variances(variance: str, spacing: str) -> None:
    original, ours = pair("DDPMScheduler", variance_type=variance, timestep_spacing=spacing)
    channels = 6 if variance.startswith("learned") else 3
    runs = []
    for scheduler in (original, ours):
        scheduler.set_timesteps(9)
        torch.manual_seed(0)
        x, found = start(), []
        for t, m in zip(scheduler.timesteps, outputs(9, (2, channels, 8, 8)), strict=True):
            m = torch.cat([m[:, :3], m[:, 3:].abs()], 1)  # "learned" takes the root
            found.append(scheduler.step(m, t, x))
            x = found[-1].prev_sample
        runs.append(found)
    check_runs(*runs)


def test_ddpm_all_steps_and_custom_timesteps() -> None:
    original, ours = pair("DDPMScheduler")
    check_runs(run(original, None, start(), limit=12), run(ours, None, start(), limit=12))
    times = [900, 500, 499, 20, 1, 0]
    check_runs(run(original, None, start(), timesteps=times), run(ours, None, start(), timesteps=times))
    # The last steps of all 1000, where beta is a difference of nearby float32 numbers.
    original, ours = pair("DDPMScheduler")
    for t in (3, 2, 1, 0):
        a, b = (s.step(start(1), t, start(), generator=torch.Generator().manual_seed(t)) for s in (original, ours))
        check_runs([a], [b])


def test_ddpm_fixed_large_log_is_finite() -> None:
    """Questionable choice 12: the root of a negative logarithm; ours is the standard deviation that was meant."""
    original, ours = pair("DDPMScheduler", variance_type="fixed_large_log")
    _, large = pair("DDPMScheduler", variance_type="fixed_large")
    broken, found, meant = run(original, 9, start()), run(ours, 9, start()), run(large, 9, start())
    assert bool(broken[0].prev_sample.isnan().any())
    check_runs(meant, found)


def test_ddpm_learned_variance_needs_its_channels() -> None:
    _, ours = pair("DDPMScheduler", variance_type="learned_range")
    with pytest.raises(TypeError, match=r"model_output must have twice the channels .* got \[2, 3, 8, 8\]"):
        ours.step(start(), 500, start())


# ---------------------------------------------------------------------------------------------------------- DDIM
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("table", TABLES, ids=range(len(TABLES)))
def test_ddim(table: dict[str, Any], prediction: str, eta: float, clipped: bool) -> None:
    original, ours = pair("DDIMScheduler", **{"prediction_type": prediction, **table})
    options = {"eta": eta, "use_clipped_model_output": clipped}
    check_runs(run(original, 11, start(), **options), run(ours, 11, start(), **options))


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("to_one", [True, False])
def test_ddim_spacings(spacing: str, to_one: bool) -> None:
    original, ours = pair("DDIMScheduler", timestep_spacing=spacing, set_alpha_to_one=to_one, clip_sample=False)
    check_runs(run(original, 30, start()), run(ours, 30, start()))


def test_ddim_variance_noise() -> None:
    original, ours = pair("DDIMScheduler")
    options = {"eta": 0.5, "variance_noise": start(8), "seed": None}
    check_runs(run(original, 6, start(), **options), run(ours, 6, start(), **options))


def test_ddim_predicted_clean_sample() -> None:
    original, ours = pair("DDIMScheduler")
    for t, a, b in zip(original.timesteps, run(original, 10, start()), run(ours, 10, start()), strict=False):
        before_clip = 4.0 / float(original.alphas_cumprod[t]) ** 0.5
        assert float((a.pred_original_sample - b.pred_original_sample).abs().max()) <= 2e-6 * before_clip


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
def test_ddim_exact_takes_the_schedules_next_timestep(spacing: str) -> None:
    """Questionable choice 1: t - T // S is not the next timestep of these spacings."""
    original, ours = pair("DDIMScheduler", timestep_spacing=spacing, clip_sample=False)
    found = run(ours.diffkern(exact=True), 30, start())
    schedule = diffkern.from_alphas_cumprod(original.alphas_cumprod.double())
    plan = diffkern.ddim(schedule, timesteps=ours.timesteps.tolist())
    calls = iter(outputs(30))
    x = diffkern.sample(lambda x, t: next(calls), start(), plan)
    torch.testing.assert_close(found[-1].prev_sample, x, rtol=2e-6, atol=2e-6)
    followed = run(original, 30, start())[-1].prev_sample
    assert float((followed - x).abs().max() / x.abs().max()) > 1e-3


def test_ddim_eta_beyond_the_variance_is_finite() -> None:
    """Questionable choice 14: the root of what eta leaves, below 0."""
    original, ours = pair("DDIMScheduler")
    assert bool(run(original, 50, start(), eta=1.5)[-1].prev_sample.isnan().all())
    assert all(bool(r.prev_sample.isfinite().all()) for r in run(ours, 50, start(), eta=1.5))


def test_exact_ddpm_is_our_plan() -> None:
    """Questionable choice 7: beta as a difference of float32 numbers; exact=True is float64 on the same table."""
    _, ours = pair("DDPMScheduler", clip_sample=False)
    columns = [diffkern.plan.COLUMNS.index(c) for c in ("p", "q", "a", "b", "g")]
    plan = diffkern.ddpm(diffkern.from_alphas_cumprod(ours.alphas_cumprod.double()))
    followed = ours.plan().table[:, columns]
    exact = ours.diffkern(exact=True).plan().table[:, columns]
    torch.testing.assert_close(exact[:-1], plan.table[:-1, columns], rtol=1e-9, atol=1e-12)
    off = ((followed - exact) / exact)[:-1].abs().max()
    assert 1e-4 < float(off) < 3e-4


def test_zero_snr_with_eps_is_finite() -> None:
    """Questionable choice 13: abar = 0 with a model of eps is a division by 0."""
    for name in ("DDIMScheduler", "DDPMScheduler"):
        config = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}
        original, ours = pair(name, **config)
        assert not bool(run(original, 5, start())[0].prev_sample.isfinite().all())
        assert all(bool(r.prev_sample.isfinite().all()) for r in run(ours, 5, start()))


# ------------------------------------------------------------------------------------------------------- inversion
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "table",
    [{}, {"timestep_spacing": "trailing"}, {"set_alpha_to_one": False, "steps_offset": 1}, {"clip_sample": False}],
    ids=["leading", "trailing", "offset", "unclipped"],
)
def test_ddim_inverse(table: dict[str, Any], prediction: str) -> None:
    original, ours = pair("DDIMInverseScheduler", prediction_type=prediction, **table)
    if prediction == "sample" and table.get("set_alpha_to_one", True):
        ours.set_timesteps(10)  # at the clean level the original divides by 0
        assert bool(ours.step(start(1), ours.timesteps[0], start()).prev_sample.isfinite().all())
        return
    check_runs(run(original, 10, start()), run(ours, 10, start()))


def test_inversion_inverts() -> None:
    """With the true eps of one image at every level, inversion and DDIM come back to it."""
    _, forward = pair("DDIMInverseScheduler", clip_sample=False)
    _, back = pair("DDIMScheduler", clip_sample=False)
    x, eps = start(), start(9)
    forward.set_timesteps(50)
    back.set_timesteps(50)
    state = x
    for t in forward.timesteps:
        state = forward.step(eps, t, state).prev_sample
    for t in back.timesteps:
        state = back.step(eps, t, state).prev_sample
    torch.testing.assert_close(state, x, rtol=0, atol=2e-3)  # amplified by 1/sqrt(abar) = 150 on the way
    assert not hasattr(forward, "add_noise")


# --------------------------------------------------------------------------------------------------------- RePaint
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("soft", [False, True])
def test_repaint(eta: float, soft: bool) -> None:
    original, ours = pair("RePaintScheduler", eta=eta)
    known = start(4)
    mask = torch.rand((SHAPE[0], 1, *SHAPE[2:]), generator=torch.Generator().manual_seed(1))
    mask = mask if soft else (mask > 0.5).float()
    runs = []
    for scheduler in (original, ours):
        scheduler.set_timesteps(20, jump_length=4, jump_n_sample=2)
        generator = torch.Generator().manual_seed(2)
        x, found, last = start(), [], scheduler.timesteps[0] + 1
        for t, m in zip(scheduler.timesteps, outputs(len(scheduler.timesteps)), strict=True):
            if t < last:
                found.append(scheduler.step(m, t, x, known, mask, generator))
                x = found[-1].prev_sample
            else:
                x = scheduler.undo_step(x, last, generator)
            last = t
        runs.append(found)
    check_runs(*runs)


def test_repaint_counter_noise_is_new_at_every_visit() -> None:
    _, ours = pair("RePaintScheduler", eta=1.0)
    ours.set_timesteps(20, jump_length=4, jump_n_sample=2)
    ours.diffkern(rng="counter", seeds=1)
    mask = torch.zeros(SHAPE)
    zero = torch.zeros(SHAPE)
    first, second = (ours.step(zero, 500, zero, zero, mask).prev_sample for _ in range(2))
    undone = [ours.undo_step(zero, 500) for _ in range(2)]
    assert not torch.equal(first, second)
    assert not torch.equal(*undone)
    ours.set_timesteps(20, jump_length=4, jump_n_sample=2)
    assert torch.equal(ours.step(zero, 500, zero, zero, mask).prev_sample, first)
    known = torch.ones(SHAPE)
    both = ours.step(zero, 500, zero, zero, known).prev_sample / ours.step(zero, 500, zero, zero, mask).prev_sample
    assert float(both.std()) > 1  # other calls, other noise


def test_repaint_exact_gives_the_known_part_its_own_noise() -> None:
    zero, half = torch.zeros(SHAPE), torch.full(SHAPE, 0.5)
    ratios = []
    for exact in (False, True):
        _, ours = pair("RePaintScheduler", eta=1.0)
        ours.set_timesteps(20)
        ours.diffkern(rng="counter", seeds=1, exact=exact)
        inside = ours.step(zero, 500, zero, zero, zero).prev_sample
        ours.set_timesteps(20)
        ratios.append(ours.step(zero, 500, zero, zero, half).prev_sample / inside)
    assert float(ratios[0].std()) < 1e-4 * float(ratios[0].mean())
    assert float(ratios[1].std()) > 0.1


def test_repaint_a_timestep_of_its_own_for_each_sample() -> None:
    _, ours = pair("RePaintScheduler", eta=0.5)
    ours.set_timesteps(10)
    x, m, known, t = start(), start(1), start(2), torch.tensor([300, 700])
    mask = (start(4) > 0).float()
    seeds = torch.tensor([4, 9])
    together = ours.diffkern(rng="counter", seeds=seeds).step(m, t, x, known, mask).prev_sample
    for b in range(2):
        ours.set_timesteps(10)
        one = slice(b, b + 1)
        ours.diffkern(seeds=seeds[one])
        alone = ours.step(m[one], t[b], x[one], known[one], mask[one]).prev_sample
        assert torch.equal(together[one], alone)
    with pytest.raises(ValueError, match=r"timestep must be one for all samples in undo_step, got shape \[2\]"):
        ours.undo_step(x, t)


def test_repaint_refuses_add_noise() -> None:
    original, ours = pair("RePaintScheduler")
    assert "DDPMScheduler.add_noise" in same_error(lambda s: s.add_noise(start(), start(), 3), original, ours)


# ------------------------------------------------------------------------------------------------------- ScoreSdeVe
def test_score_sde_ve() -> None:
    original, ours = pair("ScoreSdeVeScheduler", num_train_timesteps=200, sigma_max=50.0)
    runs = []
    for scheduler in (original, ours):
        scheduler.set_timesteps(15)
        scheduler.set_sigmas(15)
        generator = torch.Generator().manual_seed(0)
        x, found = 50 * start(), []
        for t, m in zip(scheduler.timesteps, outputs(15), strict=True):
            found.append(scheduler.step_correct(0.1 * m, x, generator))
            found.append(scheduler.step_pred(0.1 * m, t, found[-1].prev_sample, generator))
            x = found[-1].prev_sample
        runs.append(found)
    check_runs(*runs)
    for a, b in zip(*runs, strict=True):
        if hasattr(a, "prev_sample_mean"):
            torch.testing.assert_close(a.prev_sample_mean, b.prev_sample_mean, rtol=2e-5, atol=2e-4)


def test_score_sde_ve_times_and_noise() -> None:
    original, ours = pair("ScoreSdeVeScheduler", num_train_timesteps=50)
    for scheduler in (original, ours):
        scheduler.set_timesteps(50)
        scheduler.set_sigmas(50)
    x, m = start(), start(1)
    for t in (1.0, 0.37, 1e-5, torch.tensor([0.9, 0.2]), original.timesteps[7], ours.timesteps[7].double()):
        a, b = (s.step_pred(m, t, x, torch.Generator().manual_seed(1)).prev_sample for s in (original, ours))
        torch.testing.assert_close(b, a, rtol=2e-6, atol=2e-6 * float(a.abs().max()))
    t = torch.tensor([3, 40])
    torch.testing.assert_close(ours.add_noise(x, m, t), original.add_noise(x, m, t), rtol=2e-6, atol=1e-4)
    half = ours.step_pred(m.half(), 0.5, x.half())
    assert half.prev_sample.dtype == original.step_pred(m.half(), 0.5, x.half()).prev_sample.dtype == torch.float32
    same_error(lambda s: s.step_pred(m, 1.5, x), original, ours)


def test_score_sde_ve_counts() -> None:
    _, ours = pair("ScoreSdeVeScheduler", num_train_timesteps=50)
    ours.set_timesteps(5)
    ours.set_sigmas(5)
    x, m, t = start(), start(1), list(ours.timesteps)[1]
    ours.step_correct(m, x)
    ours.step_pred(m, t, x)
    with torch.no_grad(), Dispatched() as corrector:
        ours.step_correct(m, x)
    norms = {"aten.randn": 1, "aten.view": 3, "aten.linalg_vector_norm": 2, "diffkern.step": 1}
    few = {"aten.mean": 2, "aten.div": 1, "aten._to_copy": 1, "aten.mul": 1, "aten.addcmul": 1, "aten.cat": 1}
    assert corrector.ops == {**norms, **few}
    with torch.no_grad(), Dispatched() as predictor:
        ours.step_pred(m, t, x)
    assert predictor.ops == {"aten.randn": 1, "diffkern.step": 1}


def test_score_sde_ve_exact_norms_do_not_know_the_neighbours() -> None:
    _, ours = pair("ScoreSdeVeScheduler", num_train_timesteps=50)
    ours.diffkern(rng="counter", exact=True, seeds=torch.tensor([5, 6]))
    x, m = start(), start(1) * torch.tensor([1.0, 30.0]).reshape(2, 1, 1, 1)
    both = ours.step_correct(m, x).prev_sample
    ours.set_timesteps(50)
    alone = ours.diffkern(seeds=torch.tensor([6])).step_correct(m[1:], x[1:]).prev_sample
    torch.testing.assert_close(both[1:], alone, rtol=1e-6, atol=1e-6)
    ours.set_timesteps(50)
    batch = ours.diffkern(exact=False, seeds=torch.tensor([5, 6])).step_correct(m, x).prev_sample
    assert float((batch - both).abs().max()) > 1e-2


# ----------------------------------------------------------------------------------------------- noising, velocity
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_add_noise_and_velocity(name: str, schedule: str) -> None:
    original, ours = pair(name, beta_schedule=schedule)
    x, noise = start(), start(1)
    for t in (torch.tensor([0, 999]), torch.tensor([37]), torch.tensor(500), torch.tensor([5, 7], dtype=torch.int32)):
        for call in ("add_noise", "get_velocity"):
            a, b = (getattr(s, call)(x, noise, t) for s in (original, ours))
            torch.testing.assert_close(b, a, rtol=2e-6, atol=2e-6)
    assert ours.add_noise(x[:1], noise[:1], torch.tensor([1, 2, 3])).shape[0] == 3
    assert ours.add_noise(x.half(), noise, torch.tensor([1, 2])).dtype == torch.float32


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_add_noise_in_bfloat16_keeps_the_noise(schedule: str) -> None:
    """Questionable choice 22: abar is rounded before 1 - abar, which is then 0."""
    original, ours = pair("DDPMScheduler", beta_schedule=schedule)
    zero, noise, t = torch.zeros(1000, 4), torch.ones(1000, 4), torch.arange(1000)
    sigma = (1 - original.alphas_cumprod.double()).sqrt()
    theirs = original.add_noise(zero.bfloat16(), noise.bfloat16(), t)[:, 0].double()
    found = ours.add_noise(zero.bfloat16(), noise.bfloat16(), t)[:, 0].double()
    assert int((theirs == 0).sum()) == {"linear": 10, "scaled_linear": 16, "squaredcos_cap_v2": 21}[schedule]
    assert float(((found - sigma) / sigma).abs().max()) <= 2**-8


def test_add_noise_refuses_what_the_original_refuses() -> None:
    original, ours = pair("DDPMScheduler")
    x = start()
    same_error(lambda s: s.add_noise(x, x, torch.tensor([1000, 3])), original, ours)
    same_error(lambda s: s.add_noise(x, x, torch.tensor([1.0, 3.0])), original, ours)
    with pytest.raises(RuntimeError, match=r"index must be in \[0, 1000\)"):
        ours.add_noise(x, x, torch.tensor([-1, 3]))


# ------------------------------------------------------------------------------------------------------- bad input
def test_step_refuses_what_the_original_refuses() -> None:
    x = start()
    original, ours = pair("DDIMScheduler")
    assert "run 'set_timesteps'" in same_error(lambda s: s.step(x, 5, x), original, ours)
    for scheduler in (original, ours):
        scheduler.set_timesteps(10)
    assert "out of bounds" in same_error(lambda s: s.step(x, 1000, x), original, ours)
    options = {"eta": 1.0, "generator": torch.Generator(), "variance_noise": x}
    assert "Cannot pass both" in same_error(lambda s: s.step(x, 5, x, **options), original, ours)
    same_error(lambda s: s.set_timesteps(1001), original, ours)
    for name in ("DDIMScheduler", "DDPMScheduler", "DDIMInverseScheduler"):
        original, ours = pair(name, prediction_type="nonsense")
        for scheduler in (original, ours):
            scheduler.set_timesteps(10)
        assert "prediction_type given as nonsense" in same_error(lambda s: s.step(x, 100, x), original, ours)
    original, ours = pair("DDPMScheduler")
    for scheduler in (original, ours):
        scheduler.set_timesteps(10)
    same_error(lambda s: s.step(x, 55, x), original, ours)
    with pytest.raises(IndexError, match=r"timestep must be an integer in 0\.\.999, got -1"):
        pair("DDIMInverseScheduler")[1].step(x, -1, x)
    assert ours.step(x, torch.tensor(100), x).prev_sample.shape == x.shape
