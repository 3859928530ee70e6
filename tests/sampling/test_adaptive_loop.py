"""The loop of adaptive steps: outputs, layouts, devices, costs, bad input, what does not arrive."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from helpers.adaptive_cases import EDM, FLOW, LINEAR, SHAPE, VP, network, start
from helpers.op_counter import CountOps
from torch import Tensor

from diffkern import schedules
from diffkern.sampling import adaptive
from diffkern.sampling.adaptive import rk45

# --- the loop --------------------------------------------------------------------------------------------------------


def test_trajectory_callback_and_dtypes():
    x = start(VP, torch.float32)
    kept, seen, given = x.clone(), [], set()

    def model(x: Tensor, t: Tensor, c: str) -> Tensor:
        given.add((x.dtype, tuple(t.shape), t.dtype, c))
        return network(x, t)

    got = rk45(
        model, x, VP, cond="seven", trajectory=True, model_dtype=torch.bfloat16, out_dtype=torch.float16, rtol=1e-2,
        atol=1e-2, callback=lambda info: seen.append({**info, "x": info["x"].clone()}),
    )  # fmt: skip
    assert torch.equal(x, kept)
    assert got.x.dtype == torch.float16
    assert given == {(torch.bfloat16, (3,), torch.float32, "seven")}
    assert len(seen) == len(got.times) - 2  # the start, and x0 at the end
    for i, info in enumerate(seen):
        assert info["i"] == i
        assert info["at"] == got.times[i + 1].tolist()
        assert len(info["h"]) == len(info["accepted"]) == 3
        assert torch.equal(info["x"], got.trajectory[i + 1])
    assert torch.equal(got.trajectory[0], x)
    assert torch.equal(got.trajectory[-1].half(), got.x)
    assert got.times[-1].tolist() == [0.0] * 3


def test_clip_keeps_x0_inside():
    got = rk45(lambda x, t: torch.full_like(x, 3.0), start(EDM), EDM, prediction="x0", clip=0.5)
    torch.testing.assert_close(got.x, torch.full(SHAPE, 0.5, dtype=torch.float64), rtol=0, atol=0)
    flow = rk45(lambda x, t: torch.full_like(x, 3.0), start(FLOW), FLOW, prediction="x0", clip=0.5)
    torch.testing.assert_close(flow.x, torch.full(SHAPE, 0.5, dtype=torch.float64), rtol=0, atol=0)


def test_a_model_that_returns_its_input():
    for schedule in (FLOW, EDM):
        one = rk45(lambda x, t: x, start(schedule), schedule)
        two = rk45(lambda x, t: x.clone(), start(schedule), schedule)
        assert torch.equal(one.x, two.x)


def test_memory_format_progress_and_empty_batch(capsys):
    x = start(EDM, torch.float32, (2, 3, 4, 4)).to(memory_format=torch.channels_last)
    got = rk45(network, x, EDM, progress="solving")
    assert got.x.is_contiguous(memory_format=torch.channels_last)
    assert "solving" in capsys.readouterr().err
    torch.testing.assert_close(got.x, rk45(network, x.contiguous(), EDM).x, rtol=1e-3, atol=1e-3)
    empty = rk45(network, torch.zeros(0, 3), EDM)
    assert empty.x.shape == (0, 3)
    assert empty.model_calls == 0
    assert rk45(network, torch.zeros(3, 0), EDM).steps == [0, 0, 0]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_an_empty_batch_is_returned_as_any_other(shape):
    x = torch.zeros(shape)
    got = rk45(network, x, EDM, trajectory=True)
    assert got.x is not x
    assert got.trajectory.shape == (1, *shape)
    assert (got.times.shape, got.times.dtype) == ((1, shape[0]), torch.float64)
    assert got.times.tolist() == [pytest.approx([80.0] * shape[0])]
    assert got.steps is not got.rejected
    assert rk45(network, x, EDM).trajectory is None
    assert rk45(network, x, EDM, out_dtype=torch.float32).x is not x
    assert rk45(network, x, FLOW, out_dtype=torch.float16).x.dtype == torch.float16


@pytest.mark.parametrize("norm", ["sample", "batch"])
def test_a_default_device_holds_none_of_the_tables(norm):
    sizes = torch.tensor([1.0, 0.01, 30.0], dtype=torch.float64).reshape(-1, 1, 1)
    x = start(FLOW) * sizes
    model = lambda x, t: torch.tanh(3 * x)  # noqa: E731
    run = lambda x: rk45(model, x, FLOW, norm=norm, trajectory=True, rtol=1e-4, atol=1e-4)  # noqa: E731
    want = run(x)
    with torch.device("meta"):
        got = run(x)
        empty = run(x[:0])
    assert torch.equal(got.x, want.x)
    assert torch.equal(got.times, want.times)
    assert empty.times.device.type == "cpu"


@pytest.mark.full
def test_the_module_may_be_imported_with_a_default_device():
    """Its constants stay on the CPU, whatever the default device is then."""
    code = (
        "import importlib, torch, diffkern.sampling._dormand_prince as module\n"
        "with torch.device('meta'):\n"
        "    importlib.reload(module)\n"
        "assert module._POINT_OF.device.type == module._ONES.device.type == 'cpu'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_first_step_saves_a_call():
    x = start(FLOW)
    given = rk45(network, x, FLOW, first_step=0.05)
    assert (given.model_calls - 1) % 6 == 0
    assert (rk45(network, x, FLOW).model_calls - 2) % 6 == 0


@pytest.mark.parametrize(("schedule", "scaling"), [(FLOW, 0), (EDM, 1)])
def test_op_counts(schedule, scaling):
    """7 steps and 3 sums a round, one step more where samples disagree; 10 buffers, and two model inputs."""
    x = start(schedule, torch.float32, (4, 3, 8, 8))
    buffer = torch.empty_like(x)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x, out=buffer)

    mixed = 0

    def callback(info: adaptive.AdaptiveInfo) -> None:
        nonlocal mixed
        mixed += any(info["accepted"]) and not all(info["accepted"])

    with CountOps(x.shape) as count:
        got = rk45(model, x, schedule, denoise=False, first_step=0.3, callback=callback, rtol=1e-3, atol=1e-3)
    rounds = (got.model_calls - 1) // 6
    assert count.fused["step_out"] == 7 * rounds + 1 + scaling + mixed
    assert count.fused["loss"] == 3 * rounds
    assert {k: v for k, v in count.large.items() if k != "tanh"} == {"empty_like": 12}


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "words"), [
    ({"rtol": -1.0}, r"rtol must be a finite number >= 0, got -1\.0"),
    ({"atol": math.nan}, "atol must be a finite number >= 0, got nan"),
    ({"rtol": 0.0, "atol": 0.0}, "rtol and atol must not both be 0"),
    ({"first_step": 0.0}, r"first_step must be positive, got 0\.0"),
    ({"max_steps": 0}, "max_steps must be an integer of at least 1, got 0"),
    ({"max_steps": 2.0}, r"max_steps must be an integer of at least 1, got 2\.0"),
    ({"norm": "max"}, "norm must be 'sample' or 'batch', got 'max'"),
    ({"span": (1.0, 1.0)}, r"span must be two different finite values \(from, to\), got \(1\.0, 1\.0\)"),
    ({"span": (1.0, math.inf)}, "span must be two different finite values"),
    ({"span": (1.0, 0.0)}, "the span needs finite noise levels sigma > 0, got 1 to 0"),
    ({"span": (1000.0, 1.0)}, "must lie in the schedule's range"),
    ({"span": 1.0}, r"span must be two different finite values \(from, to\), got 1\.0"),
    ({"span": ("a", 1.0)}, "span must be two different finite values .* got \\('a', 1.0\\)"),
    ({"span": (1.0, 0.5, 0.1)}, "span must be two different finite values"),
    ({"prediction": "noise"}, "prediction must be one of"),
    ({"clip": 0.0}, "clip must be positive"),
])  # fmt: skip
def test_bad_input(given, words):
    with pytest.raises(ValueError, match=words):
        rk45(network, start(VP), VP, **given)


def test_bad_states_models_and_schedules():
    x = start(VP)
    with pytest.raises(ValueError, match=r"x must be float32 or float64 .* got torch.bfloat16 of shape \[3, 2, 4\]"):
        rk45(network, x.bfloat16(), VP)
    with pytest.raises(ValueError, match="x must be float32 or float64"):
        rk45(network, torch.zeros(3, dtype=torch.int64), VP)
    with pytest.raises(ValueError, match=r"model must return a tensor of shape \[3, 2, 4\], got shape \[3\]"):
        rk45(lambda x, t: t, x, VP)
    with pytest.raises(ValueError, match="schedule must be a diffkern Schedule, got str"):
        rk45(network, x, "vp")
    with pytest.raises(ValueError, match="needs finite noise levels sigma > 0, got inf to"):
        rk45(network, x, schedules.zero_terminal_snr(LINEAR))


@pytest.mark.parametrize("norm", ["sample", "batch"])
def test_what_does_not_arrive(norm):
    who = {"sample": "sample 0", "batch": "the batch"}[norm]
    with pytest.raises(RuntimeError, match=rf"{who} stands at sigma = .* after max_steps = 3 steps"):
        rk45(network, start(EDM), EDM, max_steps=3, norm=norm, first_step=1e-3)
    with pytest.raises(RuntimeError, match=rf"{who} stands at t = 0 after 0 steps, where they shrink to nothing"):
        rk45(lambda x, t: x * math.nan, start(FLOW), FLOW, norm=norm, first_step=0.1)


@pytest.mark.parametrize("norm", ["sample", "batch"])
@pytest.mark.parametrize("schedule", [FLOW, EDM], ids=lambda s: s.name)
def test_slopes_that_are_not_finite_from_the_start(schedule, norm):
    """One sentence, not the op's about its table; the sample that is wrong is named."""
    who = {"sample": "sample 1", "batch": "the batch"}[norm]
    words = rf"rk45 did not arrive .*: {who} stands at .* after 0 steps.*the slope is too steep or not finite"
    x = torch.ones(3, 4)
    for factor in (math.nan, math.inf, 1e30):
        scale = torch.tensor([[1.0], [factor], [1.0]])
        with pytest.raises(RuntimeError, match=words):
            rk45(lambda x, t, scale=scale: x * scale, x, schedule, norm=norm)
    for value in (math.nan, math.inf):
        bad = x.clone()
        bad[1, 2] = value
        with pytest.raises(RuntimeError, match=words):
            rk45(lambda x, t: x, bad, schedule, norm=norm)
    calls = 0

    def later(x: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x * torch.tensor([[1.0], [1.0 if calls == 1 else math.nan], [1.0]])

    with pytest.raises(RuntimeError, match=words):
        rk45(later, x, schedule, norm=norm)
    assert calls == 2


@pytest.mark.parametrize("norm", ["sample", "batch"])
def test_a_span_too_short_for_its_logarithm(norm):
    x = start(EDM)
    got = rk45(network, x, EDM, span=(15.0, math.nextafter(15.0, 0.0)), norm=norm, denoise=False)
    torch.testing.assert_close(got.x, x, rtol=1e-12, atol=1e-12)


def test_a_zero_state_without_an_absolute_tolerance():
    """A tolerance of 0 is met by an error of 0, and by no other."""
    x = torch.zeros(2, 3)
    assert torch.equal(rk45(lambda x, t: x, x, FLOW, atol=0.0).x, x)
    assert torch.equal(rk45(lambda x, t: x, x, FLOW, atol=0.0, first_step=0.1).x, x)
    with pytest.raises(RuntimeError, match=r"sample 0 stands at .* the slope is too steep or not finite"):
        rk45(lambda x, t: torch.ones_like(x), x, FLOW, atol=0.0)
