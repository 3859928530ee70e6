"""DEIS beside diffusers' own: every option that changes numbers, and how it is used."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers.diffusers_runs import PER_STEP, SHAPE, Dispatched, check_runs, outputs, pair, run, same_error
from torch import Tensor

import diffkern
from diffkern import samplers

pytest.importorskip("diffusers")

DEIS = "DEISMultistepScheduler"
PREDICTIONS = ("epsilon", "sample", "v_prediction", "flow_prediction")


def start(seed: int = 3, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def both(config: dict[str, Any], steps: int | None, mu: float | None = None) -> None:
    """The same run through both; allowed is what the original itself is off on float32 data (it subtracts eps times
    1e4 from x times 1e4 at the first levels of a cosine table, for models that give no eps)."""
    original, ours = pair(DEIS, **config)
    runs = []
    for scheduler, x in ((original, start()), (ours, start()), (original, start().double())):
        scheduler.set_timesteps(steps, mu=mu)
        runs.append(run(scheduler, None, x))
    theirs, found, wide = runs
    for i, (a, b, c) in enumerate(zip(theirs, found, wide, strict=True)):
        assert type(a) is type(b)
        a, b, c = a.prev_sample, b.prev_sample, c.prev_sample
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert bool(b.isfinite().all())
        scale = c.abs().max()
        own, off = ((x - c).abs().max() / scale for x in (a, b))
        assert float(off) <= PER_STEP * (i + 1), f"{config}: step {i}"
        assert float((a - b).abs().max() / scale) <= PER_STEP * (i + 1) + float(own), f"{config}: step {i}"


# --------------------------------------------------------------------------------------------------------- the numbers
@pytest.mark.parametrize("lower", [True, False])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("order", [1, 2, 3])
def test_orders_and_predictions(order: int, prediction: str, lower: bool) -> None:
    """Few steps, where the last ones are of lower order, and 15 and more, where they are not."""
    config = {"solver_order": order, "prediction_type": prediction, "lower_order_final": lower}
    for steps in (1, 2, 3, 7, 14, 15, 20):
        both(config, steps)


OPTIONS: list[dict[str, Any]] = [
    {"use_karras_sigmas": True},
    {"use_exponential_sigmas": True},
    {"use_beta_sigmas": True},
    {"use_flow_sigmas": True},
    {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True},
    {"trained_betas": [0.001 * (i + 1) for i in range(100)], "num_train_timesteps": 100},
    {"algorithm_type": "dpmsolver++"},
    {"solver_type": "midpoint"},
    {"solver_type": "bh2"},
]


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("options", OPTIONS, ids=range(len(OPTIONS)))
def test_options(options: dict[str, Any], order: int) -> None:
    for steps in (9, 16):
        if options.get("beta_schedule") == "squaredcos_cap_v2" and "use_karras_sigmas" in options:
            continue  # its first timesteps are equal: below
        both({"solver_order": order, **options}, steps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    "threshold",
    [
        {"sample_max_value": 1.5},
        {"dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0},
        {"sample_max_value": 0.5},  # diffusers' own threshold, between two ops
    ],
    ids=range(3),
)
def test_thresholding(threshold: dict[str, Any], prediction: str) -> None:
    for order in (1, 2, 3):
        both({"solver_order": order, "prediction_type": prediction, "thresholding": True, **threshold}, 9)


def test_dynamic_shifting() -> None:
    config = {"use_flow_sigmas": True, "use_dynamic_shifting": True, "prediction_type": "flow_prediction"}
    both(config, 8, mu=0.7)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("at", [1, 4, 7])
def test_image_to_image(at: int, order: int) -> None:
    """A loop that starts late, by its timestep and by `set_begin_index`, from noised data."""
    for told in (True, False):
        runs = []
        for scheduler in pair(DEIS, solver_order=order):
            scheduler.set_timesteps(9)
            if told:
                scheduler.set_begin_index(at)
            times = scheduler.timesteps[at:]
            x, found = scheduler.add_noise(start(), start(1), times[:1].expand(2)), []
            for t, m in zip(times, outputs(len(times)), strict=True):
                found.append(copy.copy(scheduler.step(m, t, x)))
                x = found[-1].prev_sample
            runs.append(found)
            assert scheduler.step_index == 9
        check_runs(*runs)


def test_exact_coefficients_are_those_of_our_deis() -> None:
    """exact=True: float64 on the same levels; a row of `samplers.deis` steps in x/alpha."""
    for order in (1, 2, 3):
        _, ours = pair(DEIS, solver_order=order, lower_order_final=False)
        ours.set_timesteps(8)
        table = ours.diffkern(exact=True).plan().table
        sigmas = ours.sigmas.double()
        alpha = 1 / (1 + sigmas**2) ** 0.5
        plan = samplers.deis(diffkern.edm(), sigmas=sigmas.tolist(), order=order, prediction="eps")
        moves = (sigmas[1:] - sigmas[:-1]) * alpha[1:]
        names = list(diffkern.plan.COLUMNS)
        total = sum(table[:, names.index(name)] for name in ("d", "e0", "e1"))
        torch.testing.assert_close(total, moves, rtol=1e-9, atol=1e-12)  # the weights of eps add up to the way
        newest = plan.table[:, names.index("d")] * alpha[1:]
        torch.testing.assert_close(table[:, names.index("d")], newest, rtol=1e-9, atol=1e-12)


def test_equal_levels_are_of_lower_order() -> None:
    """In 1000 steps timesteps stand twice: the original divides 0 by 0."""
    original, ours = pair(DEIS, solver_order=3)
    broken, found = run(original, 1000, start(shape=(1, 1, 2, 2))), run(ours, 1000, start(shape=(1, 1, 2, 2)))
    assert bool(broken[-1].prev_sample.isnan().any())
    check_runs(broken, found)
    assert bool(found[-1].prev_sample.isfinite().all())


# ------------------------------------------------------------------------------------------------------------ its use
def test_equal_first_timesteps() -> None:
    """Choice 18: the original skips a level where the first timestep stands twice, and runs past the end."""
    original, ours = pair(DEIS, beta_schedule="squaredcos_cap_v2", use_karras_sigmas=True)
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


@pytest.mark.parametrize("how", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_in_the_middle_of_a_loop(how: Any) -> None:
    _, ours = pair(DEIS, solver_order=3)
    whole = run(ours, 9, start())[-1].prev_sample
    ours.set_timesteps(9)
    x = start()
    for i, (t, m) in enumerate(zip(ours.timesteps.clone(), outputs(9), strict=True)):
        if i == 4:
            ours = how(ours)
        x = ours.step(m, t, x).prev_sample
    assert torch.equal(x, whole)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_step_is_one_op(prediction: str) -> None:
    _, ours = pair(DEIS, solver_order=3, prediction_type=prediction)
    run(ours, 6, start())
    ours.set_timesteps(6)
    x, ms, times = start(), outputs(6), list(ours.timesteps)
    with torch.no_grad(), Dispatched() as seen:
        for t, m in zip(times, ms, strict=True):
            x = ours.step(m, t, x).prev_sample
    assert seen.ops == {"diffkern.step": 6}


def test_thresholding_is_three_ops() -> None:
    _, ours = pair(DEIS, thresholding=True)
    run(ours, 6, start())
    ours.set_timesteps(6)
    x, ms, times = start(), outputs(6), list(ours.timesteps)
    with torch.no_grad(), Dispatched() as seen:
        for t, m in zip(times, ms, strict=True):
            x = ours.step(m, t, x).prev_sample
    assert seen.ops["diffkern.step"] == 12
    assert seen.ops["diffkern.dynamic_threshold"] == 6
    assert sum(seen.ops.values()) == 18


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_plan_runs_the_same_steps(order: int) -> None:
    for prediction in PREDICTIONS:
        _, ours = pair(DEIS, solver_order=order, prediction_type=prediction)
        want = run(ours, 9, start())[-1].prev_sample
        plan, calls = ours.plan(), iter(outputs(9))
        assert diffkern.Plan.from_json(plan.to_json()) == plan
        assert torch.equal(diffkern.sample(lambda x, t, calls=calls: next(calls), start(), plan), want)
    _, ours = pair(DEIS, thresholding=True)
    ours.set_timesteps(4)
    with pytest.raises(ValueError, match="steps in x0, and DEIS steps in eps: use step"):
        ours.plan()


def test_gradients_flow_as_in_the_original() -> None:
    grads = []
    for scheduler in pair(DEIS, solver_order=3):
        scheduler.set_timesteps(5)
        x = y = start().requires_grad_()
        for t, m in zip(scheduler.timesteps, outputs(5), strict=True):
            y = scheduler.step(torch.tanh(y) + m, t, y).prev_sample
        grads.append(torch.autograd.grad(y.square().sum(), x)[0])
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("state", "output"),
    [
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.float64,) * 2,
    ],
)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_dtypes(prediction: str, state: torch.dtype, output: torch.dtype) -> None:
    for order in (1, 2):
        original, ours = pair(DEIS, prediction_type=prediction, solver_order=order)
        theirs, found = (run(s, 6, start().to(state), dtype=output) for s in (original, ours))
        for a, b in zip(theirs, found, strict=True):
            assert a.prev_sample.dtype == b.prev_sample.dtype
            # The original rounds half of what it adds up in the narrower dtype.
            narrow = 16 in (torch.finfo(state).bits, torch.finfo(output).bits)
            close = (0.05 if narrow else 1e-5) * float(a.prev_sample.abs().max())
            torch.testing.assert_close(b.prev_sample, a.prev_sample, rtol=0, atol=close)
        for a, b in zip(original.model_outputs, ours.model_outputs, strict=True):
            assert a.dtype == b.dtype or prediction == "epsilon"


def test_errors_are_the_original_s() -> None:
    x = start()
    original, ours = pair(DEIS)
    assert "run 'set_timesteps'" in same_error(lambda s: s.step(x, 5, x), original, ours)
    for scheduler in (original, ours):
        run(scheduler, 5, x)
    assert "out of bounds" in same_error(lambda s: s.step(x, 5, x), original, ours)
    original, ours = pair(DEIS, prediction_type="nonsense")
    for scheduler in (original, ours):
        scheduler.set_timesteps(10)
    assert "prediction_type given as nonsense" in same_error(lambda s: s.step(x, 100, x), original, ours)
