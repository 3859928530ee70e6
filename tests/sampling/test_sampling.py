"""`sample`: the loop around the fused step, against plans run slowly in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.oracles import Gaussian, run_plan
from helpers.sampling_cases import EDM, FLOW, LINEAR, PLANS, SEEDS, SHAPE, network, start_of
from torch import Tensor

from diffkern import ops, samplers, sampling, streams
from diffkern.plan import Plan, Row
from diffkern.sampling import initial, sample

# Everything the loop must handle at once: every kind of history, a row without a model call, noise after the model.
ODD = Plan(
    "odd",
    (
        Row(p=1.0, q=-0.5, a=0.7, d=0.2, A=0.3, D=0.4, saves=((0, "s"), (2, "x0")), time=3.0, k=0.9),
        Row(p=0.5, q=0.1, r=0.3, b=0.8, e0=0.5, g=0.1, saves=((1, "x"),), time=2.0, k=0.5, stream=5),
        Row(a=0.9, e1=0.2, g=0.4, calls_model=False, ends_step=False, stream=6, k=1.1),
        Row(p=0.2, q=0.4, a=0.5, b=0.3, d=0.1, B=0.6, e0=-0.3, e2=0.7, saves=((0, "s"), (3, "x0")), time=1.0),
        Row(q=1.0, b=0.2, e0=0.4, e1=0.1, e2=0.2, e3=0.3, time=0.0),
    ),
    first_k=0.8,
)


def draws(plan: Plan, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [ops.randn(SHAPE, SEEDS, row.stream, dtype=dtype) for row in plan.rows if row.draws]


def near(got: Tensor, want: Tensor, tol: float = 1e-6) -> None:
    """float32 times (tables of float64 are exact) are the only difference from the oracle."""
    torch.testing.assert_close(got, want, rtol=tol, atol=tol)


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


# --- guidance --------------------------------------------------------------------------------------------------------


def conditional(x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
    return network(x, t) + 0.2 * cond.reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


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


# --- callback, trajectory, progress ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddpm", "heun", "euler_flow", "odd"])
def test_callback_and_trajectory(name):
    plan = ODD if name == "odd" else PLANS[name]
    x = start_of(plan)
    seen: list[dict[str, Any]] = []

    def callback(info: sampling.StepInfo) -> None:
        seen.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in info.items()})

    final, states, _ = sample(network, x, plan, seeds=SEEDS, callback=callback, trajectory=True)
    assert torch.equal(final, sample(network, x, plan, seeds=SEEDS))
    assert states.shape == (len(plan.steps) + 1, *SHAPE)
    assert torch.equal(states[0], x)
    assert torch.equal(states[-1], final)
    assert [info["i"] for info in seen] == list(range(len(plan.steps)))
    assert [info["t"] for info in seen] == [plan.rows[rows.start].time for rows in plan.steps]
    for info, state in zip(seen, states[1:], strict=True):
        assert set(info) == {"i", "t", "x", "x0"}
        assert torch.equal(info["x"], state)
        assert info["x0"].shape == SHAPE
    if name != "odd":
        near(seen[-1]["x0"], final, 1e-12)


def test_callback_counts_from_the_start():
    seen: list[int] = []
    plan = PLANS["ddim"]
    sample(network, start_of(plan), plan, start=7, callback=lambda info: seen.append(info["i"]))
    assert seen == [7, 8, 9]


def test_progress_bar(capsys):
    plan = PLANS["heun"]
    x = start_of(plan)
    assert torch.equal(sample(network, x, plan, progress=True), sample(network, x, plan))
    err = capsys.readouterr().err
    assert "heun" in err
    assert "8/8" in err
    sample(network, x, plan, progress="digits", start=3)
    assert "digits" in (err := capsys.readouterr().err)
    assert "5/5" in err


# --- buffers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs", "states", "inputs"),
    [
        ("ddim", {}, 2, 0),
        ("ddpm", {}, 2, 0),
        ("euler", {}, 2, 1),
        ("euler_flow", {}, 2, 0),
        ("heun_flow", {}, 3, 0),
        ("heun_edm", {}, 3, 1),
        ("ddim", {"cond": torch.ones(3), "uncond": torch.zeros(3), "guidance": 2.0}, 2, 1),
        ("ddim", {"model_dtype": torch.bfloat16}, 2, 1),
        ("ddim", {"callback": lambda info: None}, 3, 0),
    ],
)
def test_the_loop_reuses_its_buffers(monkeypatch, name, kwargs, states, inputs):
    used: dict[str, set[int]] = {"state": set(), "input": set()}
    original = ops.bound_step_out

    def bound(table: torch.Tensor) -> ops.BoundStepOut:
        step = original(table)

        def spy(*args: Any, **operands: Any) -> None:
            outputs = [operands[name] for name in ("out", "x0", "s") if operands[name] is not None]
            used["state"] |= {tensor.data_ptr() for tensor in outputs}
            used["input"] |= {operands["next"].data_ptr()} if operands["next"] is not None else set()
            step(*args, **operands)

        return spy

    monkeypatch.setattr(ops, "bound_step_out", bound)
    model = conditional if "cond" in kwargs else network
    sample(model, start_of(PLANS[name], torch.float32), PLANS[name], seeds=SEEDS, **kwargs)
    assert (len(used["state"]), len(used["input"])) == (states, inputs)


@pytest.mark.parametrize("name", ["ddim", "euler", "heun_edm", "heun_flow"])
def test_a_model_may_return_its_own_input(name):
    plan = PLANS[name]
    x = start_of(plan)
    near(sample(lambda x, t: x, x, plan), run_plan(plan, lambda x, t: x, x), 1e-9)
    cond = torch.zeros(3)
    got = sample(lambda x, t, c: x, x, plan, cond=cond, uncond=cond, guidance=2.0)
    near(got, run_plan(plan, lambda x, t: x, x), 1e-9)


def test_noise_tensors_with_a_mask_leave_the_known_part_to_the_seeds():
    plan = PLANS["ddpm"]
    x, known = start_of(plan), torch.randn(SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    mask = (torch.arange(known.numel()).reshape(SHAPE) % 2).bool()
    want = sample(network, x, plan, seeds=SEEDS, mask=mask, known=known)
    drawn = [ops.randn(SHAPE, SEEDS, row.stream, dtype=torch.float64) for row in plan.rows if row.draws]
    assert torch.equal(sample(network, x, plan, seeds=SEEDS, noise=drawn, mask=mask, known=known), want)


# --- errors ----------------------------------------------------------------------------------------------------------

X = torch.zeros(SHAPE)
C = torch.zeros(3)
DDPM, DDIM = PLANS["ddpm"], PLANS["ddim"]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"guidance": 2.0}, r"guidance needs cond and uncond as tensors, got cond = NoneType"),
        ({"guidance": 2.0, "cond": C}, r"guidance needs cond and uncond as tensors, got uncond = NoneType"),
        ({"guidance": 2.0, "cond": [1, 2, 3], "uncond": C}, r"as tensors, got cond = list"),
        ({"guidance": 2.0, "cond": C[:2], "uncond": C}, r"cond must have one entry a sample \(3\), got shape \[2\]"),
        (
            {"guidance": 2.0, "cond": C, "uncond": C.double()},
            r"cond and uncond must have one shape and dtype, got \[3\] torch\.float32 and \[3\] torch\.float64",
        ),
        ({"guidance": [2.0, 3.0], "cond": C, "uncond": C}, r"guidance must be a number, one weight a step \(10\)"),
        ({"uncond": C}, r"uncond is used with guidance only"),
        ({"start": 10}, r"start must lie in 0\.\.9 \(ddim has 10 steps\), got 10"),
        ({"start": -1}, r"start must lie in 0\.\.9 \(ddim has 10 steps\), got -1"),
        ({"seeds": SEEDS[:2]}, r"seeds must be an integer or int64 \[3\], got torch\.int64 of shape \[2\]"),
        ({"seeds": SEEDS.int()}, r"seeds must be an integer or int64 \[3\], got torch\.int32 of shape \[3\]"),
        ({"seeds": 1.5}, r"seeds must be an integer or int64 \[3\], got float"),
        ({"seeds": True}, r"seeds must be an integer or int64 \[3\], got bool"),
        ({"mask": X}, r"mask and known must be given together, got only mask"),
        ({"known": X}, r"mask and known must be given together, got only known"),
        ({"noise": [], "seeds": 3}, r"give seeds or noise, not both, got both"),
    ],
)
def test_bad_input_says_what_is_wrong(kwargs, message):
    with pytest.raises(ValueError, match=message):
        sample(lambda x, t, *c: x, X, DDIM, **kwargs)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        ([], r"noise must hold one tensor for each row that draws \(11\), got 0"),
        ([X] * 12, r"noise must hold one tensor for each row that draws \(11\), got 12"),
        (iter([X, X]), r"noise must hold one tensor for each row that draws, got no more at row 2"),
        (
            [X[:2]] * 11,
            r"noise must be tensors like x, torch\.float32 of .*, got torch\.float32 of shape \[2, 2, 5, 4\] for row 0",
        ),
        ([X.double()] * 11, r"got torch\.float64 of shape \[3, 2, 5, 4\] for row 0"),
        (["z"] * 11, r"got str for row 0"),
    ],
)
def test_bad_noise_says_what_is_wrong(noise, message):
    with pytest.raises(ValueError, match=message):
        sample(network, X, DDPM, noise=noise)


def test_bad_models_and_states():
    with pytest.raises(
        ValueError, match=r"model must return a tensor of shape \[3, 2, 5, 4\], got shape \[3, 4, 5, 4\] at row 0"
    ):
        sample(lambda x, t: torch.cat([x, x], 1), X, DDIM)
    with pytest.raises(
        ValueError, match=r"model must return a tensor of shape \[6, 2, 5, 4\], got shape \[3, 2, 5, 4\] at row 0"
    ):
        sample(lambda x, t, c: x[:3], X, DDIM, cond=C, uncond=C, guidance=2.0)
    with pytest.raises(ValueError, match=r"model must return a tensor of shape \[3, 2, 5, 4\], got tuple at row 0"):
        sample(lambda x, t: (x,), X, DDIM)
    with pytest.raises(
        ValueError, match=r"x must be a floating point tensor \[B, \.\.\.\], got torch\.int64 of shape \[3, 2, 5, 4\]"
    ):
        sample(network, X.long(), DDIM)
    for argument, value, got in (
        ("mask", X[:, :1], r"torch\.float32 of shape \[3, 1, 5, 4\]"),
        ("mask", X.long(), r"torch\.int64 of shape"),
        ("mask", 1.0, "float"),
        ("known", X.double(), r"torch\.float64 of shape"),
    ):
        with pytest.raises(ValueError, match=rf"{argument} must be .* of the shape of x \[3, 2, 5, 4\], got {got}"):
            sample(network, X, DDIM, seeds=3, **{"mask": X, "known": X, argument: value})
    with pytest.raises(ValueError, match=r"start must be an integer or int64 \[3\], got 1\.0"):
        sample(network, X, DDIM, start=1.0)
    with pytest.raises(ValueError, match=r"guidance must be a number or one a step, got 'a'"):
        DDIM.with_guidance("a")
    assert DDIM.with_guidance(torch.tensor(2.0)) == DDIM.with_guidance(2.0)
    with pytest.raises(ValueError, match=r"x0 must be given to start in the middle of a plan, got start=2 without x0"):
        initial(DDIM, SHAPE, 3, start=2)
    with pytest.raises(ValueError, match=r"x0 must have the shape \[3, 2, 5, 4\], got \[3, 2\]"):
        initial(DDIM, SHAPE, 3, start=2, x0=X[:, :, 0, 0])
    with pytest.raises(ValueError, match=r"start must lie in 0\.\.9 \(ddim has 10 steps\), got 10"):
        initial(DDIM, SHAPE, 3, start=10, x0=X)


def test_every_plan_with_every_option_at_once():
    """Options must not disturb each other: the same bits as without callback, trajectory and progress."""
    known, mask = torch.full(SHAPE, 0.3), (torch.arange(4) < 2).expand(SHAPE)
    for name, guidance in itertools.product(PLANS, (None, 2.0)):
        plan = PLANS[name]
        x = start_of(plan, torch.float32)
        kwargs: dict[str, Any] = {"seeds": SEEDS, "mask": mask, "known": known, "cond": C + 1}
        if guidance is not None:
            kwargs |= {"uncond": C, "guidance": guidance}
        plain = sample(conditional, x, plan, **kwargs)
        loud = sample(conditional, x, plan, **kwargs, callback=lambda info: None, trajectory=True, progress=True)
        assert torch.equal(plain, loud.x)


def test_a_step_that_needs_earlier_histories_is_no_start():
    x = start_of(ODD)
    with pytest.raises(
        ValueError, match="start must be a step that reads no history of the steps before it, got 1 of odd"
    ):
        sample(network, x, ODD, seeds=SEEDS, start=1)
