"""RePaint: its jumps, known regions bit for bit, marginals, and what it is for."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.op_counter import CountOps
from helpers.oracles import Gaussian, moments, run_plan
from helpers.suites import few
from torch import Tensor

from diffkern import ops, samplers, schedules
from diffkern.plan import Plan
from diffkern.sampling import initial, sample

LINEAR, VP, EDM, FLOW = schedules.linear(), schedules.vp(), schedules.edm(), schedules.flow()
SCHEDULES = [LINEAR, VP, schedules.sub_vp(), schedules.ve(), EDM, FLOW]
DATA = Gaussian(0.4, 0.6)
SHAPE = (3, 2, 4, 5)
SEEDS = torch.tensor([11, -5, 2**62], dtype=torch.int64)


def network(x: Tensor, t: Tensor | float) -> Tensor:
    time = torch.as_tensor(t).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return 0.6 * torch.tanh(x) - 0.05 * torch.sin(0.01 * time) * x + 0.1


def authors_times(t_T: int, jump_length: int, jump_n_sample: int) -> list[int]:
    """The paper's appendix B, as printed."""
    jumps = {}
    for j in range(0, t_T - jump_length, jump_length):
        jumps[j] = jump_n_sample - 1
    t = t_T
    ts = []
    while t >= 1:
        t = t - 1
        ts.append(t)
        if jumps.get(t, 0) > 0:
            jumps[t] = jumps[t] - 1
            for _ in range(jump_length):
                t = t + 1
                ts.append(t)
    ts.append(-1)
    return ts


@pytest.mark.parametrize(("steps", "length", "samples"), [
    (20, 4, 3), (21, 4, 3), (10, 3, 1), (7, 1, 2), (5, 5, 4), (5, 9, 4), (1, 1, 1), (2, 1, 5),
    pytest.param(250, 10, 10, marks=pytest.mark.full),
])  # fmt: skip
def test_the_authors_schedule(steps, length, samples):
    plan = samplers.repaint(LINEAR, steps, length, samples)
    times = [row.time for row in samplers.ddim(LINEAR, steps).rows]
    want: list[tuple[str, float, float]] = []
    for before, after in zip(
        authors_times(steps, length, samples), authors_times(steps, length, samples)[1:], strict=False
    ):
        level = 0.0 if after < 0 else times[steps - 1 - after]
        if after < before:
            want.append(("down", times[steps - 1 - before], level))
        elif want[-1][0] == "up" and want[-1][2] == times[steps - 1 - before]:
            want[-1] = ("up", want[-1][1], level)
        else:
            want.append(("up", times[steps - 1 - before], level))
    got = ["down" if row.calls_model else "up" for row in plan.rows]
    # Up once more straight after up is two of our rows only if there are downs between.
    assert got == [kind for kind, _, _ in want]
    for row, (kind, at, to) in zip(plan.rows, want, strict=True):
        if kind == "down":
            assert row.time == at
        reached = (1.0, 0.0) if row is plan.rows[-1] else (float(LINEAR.alpha(int(to))), float(LINEAR.sigma(int(to))))
        assert (row.known_s, row.known_n) == pytest.approx(reached, rel=1e-12)
    jumps = (samples - 1) * max(0, math.ceil((steps - length) / length))
    assert plan.model_calls == steps + jumps * length
    assert len(plan.rows) == plan.model_calls + jumps
    assert len(plan.steps) == plan.model_calls


def test_without_jumps_it_is_the_ancestral_sampler():
    x = torch.linspace(-2, 2, 7, dtype=torch.float64)
    noises = [torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(20)]
    one = samplers.repaint(LINEAR, 20, 10, 1)
    for eta, other in (
        (1.0, samplers.ddpm(LINEAR, 20)),
        (0.0, samplers.ddim(LINEAR, 20)),
        (0.5, samplers.ddim(LINEAR, 20, eta=0.5)),
    ):
        one = samplers.repaint(LINEAR, 20, 10, 1, eta=eta)
        torch.testing.assert_close(
            run_plan(one, network, x, noises), run_plan(other, network, x, noises), rtol=1e-9, atol=1e-9
        )
    assert (one.init_scale, one.time_dtype) == (1.0, "int64")


@pytest.mark.parametrize("clip", [None, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "x0", "v"])
def test_a_jump_is_forward_noising(prediction, clip):
    plan = samplers.repaint(LINEAR, 30, 5, 3, prediction=prediction, clip=clip)
    for before, row in zip(plan.rows, plan.rows[1:], strict=False):
        if not row.calls_model:
            variance = (row.a * before.known_n) ** 2 + row.g**2
            assert row.a * before.known_s == pytest.approx(row.known_s, rel=1e-12)
            assert math.sqrt(variance) == pytest.approx(row.known_n, rel=1e-12)
            assert (row.p, row.q, row.b, row.d) == (0, 0, 0, 0)


@pytest.mark.parametrize("schedule", few(SCHEDULES, "linear", "flow", name=lambda s: s.name))
def test_gaussian_data(schedule):
    """Without a mask the jumps leave the marginals: the output has the data's mean and variance, computed exactly."""
    plan = samplers.repaint(schedule, 100, 5, 4)
    mean, variance = moments(plan, DATA.model(schedule, plan.prediction), 0.0, plan.init_scale**2)
    assert mean == pytest.approx(DATA.mean, abs=0.06)
    assert math.sqrt(variance) == pytest.approx(DATA.std, abs=0.06)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("schedule", [LINEAR, VP, EDM, FLOW], ids=lambda s: s.name)
def test_known_regions_are_the_noised_image_bit_for_bit(schedule, dtype):
    """After every step; at the end it is the image itself."""
    plan = samplers.repaint(schedule, 8, 2, 3)
    known = torch.linspace(-1, 1, 120).reshape(SHAPE).to(dtype)
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[:, :, 1:3] = True
    x = initial(plan, SHAPE, SEEDS, dtype)
    model = lambda x, t: network(x.float(), t)  # noqa: E731
    got, states, _ = sample(model, x, plan, seeds=SEEDS, mask=mask, known=known, trajectory=True)
    assert torch.equal(got[~mask], known[~mask])
    assert not torch.equal(got[mask], known[mask])
    assert torch.isfinite(got).all()
    for i, step in enumerate(plan.steps):
        row = plan.rows[step[-1]]
        table = torch.tensor([[row.known_s, row.known_n, 0.0, 0.0]], dtype=torch.float64)
        noised = ops.noising(known, table, seeds=SEEDS, stream=row.known_stream)[0]
        assert torch.equal(states[i + 1][~mask], noised[~mask])


def test_a_sample_depends_on_its_own_seed_alone():
    plan = samplers.repaint(LINEAR, 8, 2, 3)
    known, mask = torch.linspace(-1, 1, 120).reshape(SHAPE), (torch.arange(120).reshape(SHAPE) % 3 == 0)
    x = initial(plan, SHAPE, SEEDS)
    whole = sample(network, x, plan, seeds=SEEDS, mask=mask, known=known)
    for b in range(3):
        one = slice(b, b + 1)
        alone = sample(network, x[one], plan, seeds=SEEDS[one], mask=mask[one], known=known[one])
        assert torch.equal(alone[0], whole[b])


@pytest.mark.parametrize(("samples", "low", "high"), [(1, 0.35, 0.70), (10, 0.75, 0.95)])
def test_what_it_is_for(samples, low, high):
    """Two pixels with correlation 0.9, one known: the other's regression on it is far too flat without jumps."""
    rho, n = 0.9, 4000
    covariance = torch.tensor([[1.0, rho], [rho, 1.0]], dtype=torch.float64)

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = float(LINEAR.alpha(int(t[0]))), float(LINEAR.sigma(int(t[0])))
        total = alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64)
        return sigma * x @ torch.linalg.inv(total)

    generator = torch.Generator().manual_seed(4)
    known = torch.randn(n, 1, generator=generator, dtype=torch.float64).repeat(1, 2)
    mask = torch.tensor([False, True]).expand(n, 2)
    plan = samplers.repaint(LINEAR, 20, 3, samples)
    got = sample(model, initial(plan, (n, 2), 3, torch.float64), plan, seeds=5, mask=mask, known=known)
    assert torch.equal(got[:, 0], known[:, 0])
    slope = float((got[:, 0] * got[:, 1]).mean() / got[:, 0].square().mean())
    assert low < slope < high


def test_op_counts_and_json():
    """One op a row, jumps too; two states and the first model's own input."""
    plan = samplers.repaint(LINEAR, 9, 2, 3)
    x = initial(plan, (2, 3, 8, 8), 1)
    buffer = torch.empty_like(x)
    with CountOps(x.shape) as count:
        sample(lambda x, t: torch.tanh(x, out=buffer), x, plan, seeds=1)
    assert count.fused["step_out"] == len(plan.rows) > plan.model_calls
    assert {k: v for k, v in count.large.items() if k != "tanh"} == {"empty_like": 3}
    assert Plan.from_json(plan.to_json()) == plan
    assert "step+8" in str(plan)


@pytest.mark.parametrize(("given", "words"), [
    ({"jump_length": 0}, "jump_length must be an integer of at least 1, got 0"),
    ({"jump_length": 2.5}, r"jump_length must be an integer of at least 1, got 2\.5"),
    ({"jump_n_sample": 0}, "jump_n_sample must be an integer of at least 1, got 0"),
    ({"jump_length": 2, "jump_n_sample": 2**63}, "jump_n_sample must make a plan of at most 10000000 rows, got 922"),
    ({"eta": -1.0}, r"eta must be a finite number >= 0, got -1\.0"),
    ({"steps": 0}, "steps must be"),
    ({"steps": 1001}, "steps must .* got 1001"),
    ({"steps": None}, "repaint needs exactly one of steps, sigmas and timesteps, got none"),
    ({"spacing": "even"}, "spacing must be"),
])  # fmt: skip
def test_bad_input(given, words):
    with pytest.raises(ValueError, match=words):
        samplers.repaint(LINEAR, **({"steps": 10} | given))
    with pytest.raises(ValueError, match="schedule must be a diffkern Schedule, got int"):
        samplers.repaint(3, 10)
