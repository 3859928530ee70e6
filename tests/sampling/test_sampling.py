"""`sample`: the loop around the fused step, against plans run slowly in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.oracles import Gaussian, run_plan
from helpers.sampling_cases import EDM, FLOW, LINEAR, PLANS, SEEDS, SHAPE, network, start_of
from helpers.sampling_plans import ODD, conditional, near
from torch import Tensor

from diffkern import ops, samplers, streams
from diffkern.plan import Plan
from diffkern.sampling import initial, sample


def draws(plan: Plan, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [ops.randn(SHAPE, SEEDS, row.stream, dtype=dtype) for row in plan.rows if row.draws]


# --- the loop against the oracle -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*PLANS, "odd"])
def test_sampling_is_the_plan(name):
    plan = ODD if name == "odd" else PLANS[name]
    x = start_of(plan)
    kept = x.clone()
    want = run_plan(plan, network, x, draws(plan))
    got = sample(network, x, plan, seeds=SEEDS)
    near(got, want)
    assert torch.equal(x, kept)
    assert torch.isfinite(got).all()
    assert torch.equal(sample(network, x, plan, noise=draws(plan)), got)


@pytest.mark.parametrize("name", ["ddim", "euler_flow", "heun_edm"])
def test_samples_of_gaussian_data_are_gaussian(name):
    """With the exact network, the end of the run is the exact transport of its start, up to the solver's error."""
    data = Gaussian(0.3, 0.5)
    schedule = {"ddim": LINEAR, "heun_edm": EDM}.get(name, FLOW)
    plan = {"ddim": samplers.ddim(LINEAR, 500), "heun_edm": samplers.heun(EDM, 60)}.get(name, samplers.euler(FLOW, 90))
    model = data.model(schedule, plan.prediction)
    x = start_of(plan, torch.float64)
    got = sample(lambda x, t: model(x, float(t[0])), x, plan)
    begin = (1.0, plan.init_scale) if name == "heun_edm" else (0.0, 1.0)
    torch.testing.assert_close(got, data.ode(x, begin, (1.0, 0.0)), rtol=0, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["ddpm_clip", "ddim", "heun_edm", "heun_flow"])
def test_other_dtypes(name, dtype):
    plan = PLANS[name]
    x = start_of(plan, torch.float32).to(dtype)
    seen = set()

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.add(x.dtype)
        return network(x.float(), t)

    got = sample(model, x, plan, seeds=SEEDS)
    assert got.dtype == dtype
    assert seen == {dtype}
    want = sample(network, x.double(), plan, noise=draws(plan))
    scale = float(want.abs().max())
    worst = float((got.double() - want).abs().max())
    assert worst < {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.15}[dtype] * max(1.0, scale)


def test_model_and_result_dtypes_of_their_own():
    seen = set()

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.add(x.dtype)
        return network(x, t)

    plan = PLANS["ddim"]
    x = start_of(plan, torch.float32)
    got = sample(model, x, plan, model_dtype=torch.bfloat16, out_dtype=torch.float16)
    assert seen == {torch.bfloat16}
    assert got.dtype == torch.float16
    near(got.float(), sample(network, x, plan), 0.05)


def test_what_the_model_is_given():
    calls: list[tuple[Tensor, Tensor]] = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        calls.append((x.clone(), t.clone()))
        return network(x, t)

    plan = PLANS["heun_edm"]
    x = start_of(plan, torch.float32)
    states = sample(model, x, plan, trajectory=True).trajectory
    assert len(calls) == plan.model_calls
    for (_, t), row in zip(calls, plan.rows, strict=True):
        assert (t.shape, t.dtype) == ((3,), torch.float32)
        assert t.tolist() == pytest.approx([row.time] * 3)
    near(calls[0][0], plan.first_k * x)
    near(calls[2][0], plan.rows[1].k * states[1])
    calls.clear()
    sample(model, x, PLANS["ddim"])
    assert [int(t[0]) for _, t in calls] == [900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    assert calls[0][1].dtype == torch.int64


def test_memory_format_is_kept():
    x = start_of(PLANS["ddim"], torch.float32).to(memory_format=torch.channels_last)
    seen = set()

    def model(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        seen.add(x.is_contiguous(memory_format=torch.channels_last))
        return network(x, t)

    cond = torch.zeros(3)
    got = sample(model, x, PLANS["euler"], cond=cond, uncond=cond, guidance=2.0)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert seen == {True}
    near(got, sample(network, x.contiguous(), PLANS["euler"]), 1e-5)


def test_no_gradients_and_no_batch():
    x = start_of(PLANS["ddim"], torch.float32).requires_grad_()
    assert not sample(network, x, PLANS["ddim"]).requires_grad
    empty = torch.zeros(0, 2, 3)
    assert sample(network, empty, PLANS["ddpm"], seeds=3).shape == (0, 2, 3)
    model = lambda x, t, c: network(x, t)  # noqa: E731
    assert sample(model, empty, PLANS["euler"], cond=empty, uncond=empty, guidance=2.0).shape == (0, 2, 3)


# --- seeds and noise -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddpm", "ddim_eta_clip"])
def test_a_sample_depends_on_its_own_seed_alone(name):
    plan = PLANS[name]
    x = start_of(plan, torch.float32)
    whole = sample(network, x, plan, seeds=SEEDS)
    for b in range(3):
        assert torch.equal(sample(network, x[b : b + 1], plan, seeds=SEEDS[b : b + 1])[0], whole[b])
    turned = sample(network, x.flip(0), plan, seeds=SEEDS.flip(0))
    assert torch.equal(turned.flip(0), whole)


def test_integer_seeds_and_torchs_generator():
    plan = PLANS["ddpm"]
    x = start_of(plan, torch.float32)
    assert torch.equal(sample(network, x, plan, seeds=7), sample(network, x, plan, seeds=ops.seeds(7, 3)))
    assert torch.equal(initial(plan, SHAPE, 7), ops.randn(SHAPE, ops.seeds(7, 3), streams.INITIAL))
    torch.manual_seed(1)
    one, other = sample(network, x, plan), sample(network, x, plan)
    torch.manual_seed(1)
    assert torch.equal(sample(network, x, plan), one)
    assert not torch.equal(one, other)
    state = torch.get_rng_state()
    sample(network, x, PLANS["ddim"])
    assert torch.equal(torch.get_rng_state(), state)


def test_initial_states():
    assert torch.equal(initial(PLANS["euler_edm"], SHAPE, SEEDS), 80 * ops.randn(SHAPE, SEEDS, streams.INITIAL))
    assert initial(PLANS["ddim"], SHAPE, SEEDS, torch.bfloat16).dtype == torch.bfloat16
    x0 = torch.full(SHAPE, 0.5, dtype=torch.float64)
    got = initial(PLANS["ddim"], SHAPE, SEEDS, torch.float64, start=4, x0=x0)
    z = ops.randn(SHAPE, SEEDS, streams.INITIAL, dtype=torch.float64)
    near(got, LINEAR.alpha(500) * x0 + LINEAR.sigma(500) * z, 1e-12)
    assert torch.equal(initial(PLANS["ddim"], SHAPE, SEEDS, start=0, x0=x0), initial(PLANS["ddim"], SHAPE, SEEDS))


def test_start_in_the_middle():
    for plan in (PLANS["ddpm"], PLANS["heun_edm"], PLANS["ddim"]):
        x = start_of(plan, torch.float32)
        final, states, _ = sample(network, x, plan, seeds=SEEDS, trajectory=True)
        assert torch.equal(sample(network, states[5], plan, seeds=SEEDS, start=5), final)


@pytest.mark.parametrize("name", ["ddpm_clip", "euler", "heun_flow"])
def test_guidance_combines_both_halves(name):
    plan = PLANS[name]
    x = start_of(plan)
    cond, uncond = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
    shapes = []

    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        shapes.append((x.shape[0], t.shape[0], c.tolist()))
        return conditional(x, t, c)

    def combined(x: Tensor, t: Tensor | float) -> Tensor:
        u, c = network(x, t), network(x, t) + 0.2 * cond.double().reshape(-1, 1, 1, 1)
        return u + 3.5 * (c - u)

    got = sample(model, x, plan, seeds=SEEDS, cond=cond, uncond=uncond, guidance=3.5)
    near(got, run_plan(plan, combined, x, draws(plan)))
    assert shapes == [(6, 6, [0, 0, 0, 1, 2, 3])] * plan.model_calls
    assert torch.equal(got, sample(model, x, plan.with_guidance(3.5), seeds=SEEDS, cond=cond, uncond=uncond))


def test_guidance_of_weight_1_and_0_calls_one_half():
    plan = PLANS["heun"]
    x = start_of(plan)
    cond, uncond = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(3)
    sizes = []

    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        sizes.append(x.shape[0])
        return conditional(x, t, c)

    alone = sample(conditional, x, plan, cond=cond)
    assert torch.equal(sample(model, x, plan, cond=cond, uncond=uncond, guidance=1.0), alone)
    assert set(sizes) == {3}
    sizes.clear()
    none = sample(model, x, plan, cond=cond, uncond=uncond, guidance=0.0)
    assert torch.equal(none, sample(conditional, x, plan, cond=uncond))
    assert set(sizes) == {3}
    sizes.clear()
    weights = [1.0, 1.0, 4.0, 4.0, 0.0, 1.0, 2.0, 1.0]
    got = sample(model, x, plan, cond=cond, uncond=uncond, guidance=weights)
    assert sizes == [6 if w in (2.0, 4.0) else 3 for w in weights for _ in range(2)][:-1]
    at = iter([w for w in weights for _ in range(2)])

    def combined(x: Tensor, t: float) -> Tensor:
        return network(x, t) + next(at) * 0.2 * cond.double().reshape(-1, 1, 1, 1)

    near(got, run_plan(plan, combined, x))


def test_conditions_of_any_kind_without_guidance():
    x = start_of(PLANS["ddim"])
    seen: list[Any] = []

    def model(x: Tensor, t: Tensor, c: Any) -> Tensor:
        seen.append(c)
        return network(x, t)

    label = {"text": "seven"}
    near(sample(model, x, PLANS["ddim"], cond=label), sample(network, x, PLANS["ddim"]), 0)
    assert all(c is label for c in seen)


# --- inpainting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddpm", "ddim", "heun_edm", "euler_flow"])
def test_inpainting_keeps_the_known_and_paints_the_rest(name):
    plan = PLANS[name]
    x = start_of(plan)
    known = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(SHAPE)
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[:, :, :2] = True
    got, states, _ = sample(network, x, plan, seeds=SEEDS, mask=mask, known=known, trajectory=True)
    assert torch.equal(got[~mask], known[~mask])
    assert not torch.equal(got[mask], known[mask])
    # On the way, the known part stands at the level of each step, with noise of its own stream.
    last = plan.steps[2][-1]
    row = plan.rows[last]
    z = ops.randn(SHAPE, SEEDS, streams.KNOWN + last, dtype=torch.float64)
    near(states[3][~mask], (row.known_s * known + row.known_n * z)[~mask], 1e-12)
    ones = torch.ones(SHAPE, dtype=torch.float64)
    assert torch.equal(
        sample(network, x, plan, seeds=SEEDS, mask=ones, known=known), sample(network, x, plan, seeds=SEEDS)
    )
