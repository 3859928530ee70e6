"""compat.flow_matching's paths beside the installed flow_matching: samples, conversions, gradients, layouts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.flow_matching_cases import LIMITS, OURS, SCHEDULERS
from helpers.flow_matching_oracle import apart, peer, start
from helpers.op_counter import CountOps, EveryOp
from torch import Tensor

CONVERSIONS = (
    *("target_to_velocity", "epsilon_to_velocity", "velocity_to_target"),
    *("epsilon_to_target", "velocity_to_epsilon", "target_to_epsilon"),
)


class Duck:
    """A scheduler of no class, with numbers among its rates."""

    def __call__(self, t: Tensor) -> Any:
        class Found:
            alpha_t, sigma_t, d_alpha_t, d_sigma_t = 3 * t, 2 - t, 3.0, torch.tensor(-1.0)

        return Found


def both(name: str) -> tuple[Any, Any]:
    """(our path, theirs); our path on their scheduler for "theirs"."""
    theirs = peer()
    if name == "theirs":
        return OURS.AffineProbPath(theirs.VPScheduler()), theirs.AffineProbPath(theirs.VPScheduler())
    if name == "duck":
        return OURS.AffineProbPath(Duck()), None
    args = SCHEDULERS[name]
    return (
        OURS.AffineProbPath(getattr(OURS, name)(*args)),
        theirs.AffineProbPath(getattr(theirs, name)(*args)),
    )


@pytest.mark.parametrize("shape", [(5,), (5, 3), (5, 2, 3, 4)])
@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("name", [*SCHEDULERS, "theirs"])
def test_sample(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    ours, theirs = both(name)
    x_0, x_1 = start(dtype, shape), start(dtype, shape).flip(0)
    t = torch.tensor([0.0, 0.1, 0.5, 0.9, 0.99], dtype=dtype)
    found, want = ours.sample(x_0=x_0, x_1=x_1, t=t), theirs.sample(x_0=x_0, x_1=x_1, t=t)
    assert found.x_0 is x_0
    assert found.x_1 is x_1
    assert found.t is t
    for name in ("x_t", "dx_t"):
        assert apart(getattr(found, name), getattr(want, name)) <= LIMITS[dtype]
        assert getattr(found, name).dtype == getattr(want, name).dtype


@pytest.mark.parametrize("name", SCHEDULERS)
def test_round_trips(name: str) -> None:
    """The conversions of a sample's velocity, ends and state into each other."""
    scheduler = getattr(OURS, name)(*SCHEDULERS[name])
    path = OURS.AffineProbPath(scheduler)
    x_0, x_1, t = start(), start().flip(0) + 1, torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    drawn, rates = path.sample(x_0=x_0, x_1=x_1, t=t), scheduler(t[:, None])
    assert apart(drawn.x_t, rates.alpha_t * x_1 + rates.sigma_t * x_0) <= 1e-14
    assert apart(drawn.dx_t, rates.d_alpha_t * x_1 + rates.d_sigma_t * x_0) <= 1e-14
    parts = {"target": x_1, "epsilon": x_0, "velocity": drawn.dx_t}
    for conversion in CONVERSIONS:
        given, wanted = conversion.split("_to_")
        assert apart(getattr(path, conversion)(parts[given], drawn.x_t, t), parts[wanted]) <= 1e-12, conversion


def test_sample_on_a_scheduler_of_no_class() -> None:
    x_0, x_1, t = start(shape=(2, 3)), start(shape=(2, 3)) + 1, torch.tensor([0.25, 0.75], dtype=torch.float64)
    found = OURS.AffineProbPath(Duck()).sample(x_0, x_1, t)
    torch.testing.assert_close(found.x_t, 3 * t[:, None] * x_1 + (2 - t[:, None]) * x_0, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found.dx_t, 3 * x_1 - x_0, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.float16, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.float64, torch.float32),
        (torch.float32, torch.float32, torch.float64),
    ],
)
def test_sample_dtypes(dtypes: tuple[torch.dtype, ...]) -> None:
    """The result has the dtype that flow_matching's has, and is at least as close to float64."""
    ours, theirs = both("CosineScheduler")
    x_0, x_1 = start(dtypes[0]), start(dtypes[1]) + 0.5
    t = torch.tensor([0.1, 0.5, 0.9]).to(dtypes[2])
    exact = ours.sample(x_0.double(), x_1.double(), t.double())
    found, want = ours.sample(x_0, x_1, t), theirs.sample(x_0=x_0, x_1=x_1, t=t)
    for name in ("x_t", "dx_t"):
        a, b, c = (getattr(sample, name) for sample in (found, want, exact))
        assert a.dtype == b.dtype
        assert apart(a.double(), c) <= 1.01 * apart(b.double(), c) + 2e-7


def test_sample_broadcasts() -> None:
    ours, theirs = both("CondOTScheduler")
    x_0, x_1, t = start(), start()[:, :1], torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    assert apart(ours.sample(x_0, x_1, t).x_t, theirs.sample(x_0, x_1, t).x_t) <= 1e-14


@pytest.mark.parametrize("inputs", ["ends", "times"])
def test_sample_gradients(inputs: str) -> None:
    gradients = []
    for path in both("VPScheduler"):
        x_0, x_1 = (x.requires_grad_(inputs == "ends") for x in (start(), start() + 1))
        t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64, requires_grad=inputs == "times")
        sample = path.sample(x_0=x_0, x_1=x_1, t=t)
        loss = (sample.x_t.sin() * sample.dx_t).sum()
        gradients.append(torch.autograd.grad(loss, [x_0, x_1] if inputs == "ends" else [t]))
    for found, want in zip(*gradients, strict=True):
        assert apart(found, want) <= 1e-12


TIMES: list[Tensor] = [
    torch.tensor(0.3),
    torch.tensor(0.7, dtype=torch.float64),
    torch.tensor([0.4]),
    torch.tensor([[0.1], [0.5], [0.9]]),
    torch.tensor([0.1, 0.3, 0.7, 0.9]),  # broadcast along the last dimension
    torch.full((3, 4), 0.3),
]


@pytest.mark.parametrize("t", TIMES, ids=lambda t: f"{str(t.dtype)[6:]}{list(t.shape)}")
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_conversions(conversion: str, dtype: torch.dtype, t: Tensor) -> None:
    for name in (*SCHEDULERS, "theirs"):
        ours, theirs = both(name)
        t = t if dtype != torch.float64 else t.double()
        x, other = start(dtype), start(dtype).flip(0)
        found, want = (getattr(path, conversion)(other, x, t) for path in (ours, theirs))
        exact = getattr(theirs, conversion)(other.double(), x.double(), t.double())
        assert found.dtype == want.dtype
        assert found.shape == want.shape
        if dtype == torch.float64:
            assert apart(found, want) <= 1e-12
        else:  # the rates themselves are rounded by the scheduler
            assert apart(found.double(), exact) <= 1.05 * apart(want.double(), exact) + 4e-6


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_conversions_at_the_ends(conversion: str, end: float) -> None:
    """The same limits, infinities and NaN."""
    for name in SCHEDULERS:
        ours, theirs = both(name)
        for t in (torch.tensor(end, dtype=torch.float64), torch.full((3, 1), end, dtype=torch.float64)):
            found, want = (getattr(path, conversion)(start() + 3, start(), t) for path in (ours, theirs))
            torch.testing.assert_close(found, want, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_sample_at_the_ends(name: str) -> None:
    ours, theirs = both(name)
    t = torch.tensor([0.0, 1.0, 1.0], dtype=torch.float64)
    found, want = (path.sample(x_0=start(), x_1=start() + 3, t=t) for path in (ours, theirs))
    torch.testing.assert_close(found.x_t, want.x_t, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.dx_t, want.dx_t, rtol=1e-12, atol=1e-12)


def test_compiles() -> None:
    path, t = OURS.CondOTProbPath(), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)

    def batch(x_0: Tensor, x_1: Tensor) -> Tensor:
        drawn = path.sample(x_0=x_0, x_1=x_1, t=t)
        out: Tensor = path.velocity_to_target(drawn.dx_t, drawn.x_t, t[:, None])
        return out

    compiled = torch.compile(batch, backend="eager", fullgraph=True)
    assert apart(compiled(start(), start() + 1), start() + 1) <= 1e-12


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_one_time_a_sample(conversion: str) -> None:
    """t [B] is one time a sample, also where B is the size of the last dimension."""
    ours, theirs = both("CosineScheduler")
    x, t = start(shape=(3, 3)), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    found = getattr(ours, conversion)(x.flip(0), x, t)
    assert apart(found, getattr(theirs, conversion)(x.flip(0), x, t[:, None])) <= 1e-12


def test_what_sample_gives_is_laid_out_as_there() -> None:
    """Memory format, and a velocity that does not depend on t (straight lines) asks for no gradient by it."""
    noise, data = start(shape=(2, 3, 4, 4)), start(shape=(2, 3, 4, 4)).contiguous(memory_format=torch.channels_last)
    t = torch.rand(2, dtype=torch.float64)
    for x_0, x_1 in ((noise, data), (data, noise), (data, data)):
        found, want = (module.CondOTProbPath().sample(x_0=x_0, x_1=x_1, t=t) for module in (OURS, peer()))
        assert found.x_t.stride() == want.x_t.stride()
        assert found.dx_t.stride() == want.dx_t.stride()
    t.requires_grad_()
    found, want = (module.CondOTProbPath().sample(x_0=noise, x_1=data, t=t) for module in (OURS, peer()))
    assert (found.x_t.requires_grad, found.dx_t.requires_grad) == (True, False)
    assert (want.x_t.requires_grad, want.dx_t.requires_grad) == (True, False)


def test_conversion_gradients() -> None:
    for conversion in CONVERSIONS:
        gradients = []
        for path in both("CosineScheduler"):
            leaves = [start().requires_grad_(), (start() + 1).requires_grad_()]
            t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
            still = torch.autograd.grad(getattr(path, conversion)(*leaves, t.detach()).sin().sum(), leaves)
            gradients.append([*still, *torch.autograd.grad(getattr(path, conversion)(*leaves, t).sin().sum(), t)])
        for found, want in zip(*gradients, strict=True):
            assert apart(found, want) <= 1e-12, conversion


@pytest.mark.parametrize(
    ("t", "x_1"),
    [
        (torch.tensor(0.5), start()),
        (torch.rand(3, 1), start()),
        (torch.rand(2), start()),
        (torch.rand(3), start()[:2]),
    ],
)
def test_sample_bad_shapes(t: Tensor, x_1: Tensor) -> None:
    for path in both("CondOTScheduler"):
        with pytest.raises(AssertionError, match=r"must (have|match)"):
            path.sample(x_0=start(), x_1=x_1, t=t)


@pytest.mark.parametrize(
    ("scheduler", "t"), [("VPScheduler", 1.0), ("LinearVPScheduler", 1.5), ("CondOTScheduler", "nan")]
)
def test_times_without_rates(scheduler: str, t: float | str) -> None:
    """flow_matching goes on with NaN. Conversions give NaN there too: at the ends of a path they may be 0/0."""
    options = (0.0, 20.0) if scheduler == "VPScheduler" else ()  # 0 times infinity at t = 1
    path, x = OURS.AffineProbPath(getattr(OURS, scheduler)(*options)), start(shape=(2, 3))
    for x_0 in (x, x.clone().requires_grad_()):
        with pytest.raises(
            ValueError, match=rf"t must be where the scheduler's rates are numbers, got NaN at t = \[{t}\]"
        ):
            path.sample(x_0=x_0, x_1=x, t=torch.tensor([float(t), 0.5]))
    assert path.target_to_velocity(x, x, torch.tensor([[float(t)], [0.5]])).isnan().any(1).tolist() == [True, False]


def test_ops_of_the_path() -> None:
    """A sample is one op on the data, a conversion is one; nothing is read from the device."""
    x, t = start(torch.float32, (16, 3, 32)), torch.rand(16)
    for path in (OURS.CondOTProbPath(), OURS.AffineProbPath(OURS.VPScheduler())):
        with CountOps(x.shape) as counted:
            path.sample(x_0=x, x_1=x, t=t)
        assert counted.fused.total() == 1
        assert set(counted.large) <= {"empty_like"}
        for conversion in CONVERSIONS:
            for time in (t, torch.tensor(0.4)):
                with CountOps(x.shape) as counted:
                    getattr(path, conversion)(x, x, time)
                assert counted.fused.total() == 1, conversion
                assert set(counted.large) <= {"empty_like"}, conversion
        with EveryOp() as every:
            path.sample(x_0=x, x_1=x, t=t)
            path.target_to_velocity(x, x, t)
        assert not [op for op in every.counts if "item" in op or "local_scalar" in op]
