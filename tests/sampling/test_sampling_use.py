"""The loop in use: callbacks, trajectories, progress, buffers, bad input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from helpers.oracles import run_plan
from helpers.sampling_cases import PLANS, SEEDS, SHAPE, network, start_of
from helpers.sampling_plans import ODD, conditional, near
from torch import Tensor

from diffkern import ops, sampling
from diffkern.sampling import initial, sample

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
        ({"seeds": 1.5}, r"seeds must be an integer or int64 \[3\], got 1.5"),
        ({"seeds": True}, r"seeds must be an integer or int64 \[3\], got True"),
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
    with pytest.raises(
        ValueError, match=r"model must return a tensor of shape \[3, 2, 5, 4\], got tuple of 2.* at row 0"
    ):
        sample(lambda x, t: (x, x), X, DDIM)
    with pytest.raises(
        ValueError, match=r"x must be a floating point tensor \[B, \.\.\.\], got torch\.int64 of shape \[3, 2, 5, 4\]"
    ):
        sample(network, X.long(), DDIM)
    for argument, value, got in (
        ("mask", X[:1, :1], r"torch\.float32 of shape \[1, 1, 5, 4\]"),
        ("mask", X.long(), r"torch\.int64 of shape"),
        ("mask", 1.0, "float"),
        ("known", X.double(), r"torch\.float64 of shape"),
    ):
        with pytest.raises(ValueError, match=rf"{argument} must be .* of the shape of x \[3, 2, 5, 4\].*, got {got}"):
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
