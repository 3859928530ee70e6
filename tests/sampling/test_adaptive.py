"""`rk45`: exact solutions, error against tolerance, torchdiffeq's dopri5, each sample as if it were alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.adaptive_cases import EDM, FLOW, LINEAR, SUB_VP, VE, VP, network, start
from helpers.oracles import Gaussian, Mixture
from helpers.suites import few
from torch import Tensor

from diffkern import samplers, schedules
from diffkern.samplers.nodes import coordinates
from diffkern.samplers.points import points
from diffkern.sampling import adaptive, sample
from diffkern.sampling._dormand_prince import Solver
from diffkern.sampling.adaptive import rk45

PATH = schedules.path(lambda t: (0.5 * math.pi * t).sin(), lambda t: (0.5 * math.pi * t).cos())
SCHEDULES = [LINEAR, VP, SUB_VP, VE, EDM, FLOW, PATH]
DATA = Gaussian(0.4, 0.6)


def exact(schedule: schedules.Schedule, prediction: str | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The perfect network of Gaussian data, each sample at its own time."""
    model = DATA.model(schedule, prediction or schedule.default_prediction)
    return lambda x, t: torch.stack([model(row.double(), float(s)).to(x.dtype) for row, s in zip(x, t, strict=True)])


def ends(schedule: schedules.Schedule, **given: object) -> tuple[tuple[float, float], tuple[float, float]]:
    """(alpha, sigma) of the state at both ends of the default span."""
    space = coordinates(schedule, given.get("prediction"), None)
    begin, end, _ = adaptive._span(space, given.get("span"))
    if space.in_time:
        return tuple((float(schedule.alpha(t)), float(schedule.sigma(t))) for t in (begin, end))
    return (1.0, math.exp(begin)), (1.0, math.exp(end))


# --- exact solutions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["sample", "batch"])
@pytest.mark.parametrize("schedule", few(SCHEDULES, "vp", "flow", name=lambda s: s.name))
def test_gaussian_data(schedule, norm):
    """The end is the exact transport of the start, on every schedule, with a handful of rejected steps."""
    x = start(schedule)
    got = rk45(exact(schedule), x, schedule, denoise=False, rtol=1e-6, atol=1e-6, norm=norm)
    torch.testing.assert_close(got.x, DATA.ode(x, *ends(schedule)), rtol=0, atol=3e-5)
    assert len(got.steps) == len(got.rejected) == 3
    assert max(got.steps) < 40
    assert max(got.rejected) < 6
    with_x0 = rk45(exact(schedule), x, schedule, rtol=1e-6, atol=1e-6, norm=norm)
    assert with_x0.model_calls == got.model_calls + (schedule not in (FLOW, PATH))
    torch.testing.assert_close(with_x0.x, DATA.ode(x, ends(schedule)[0], (1.0, 0.0)), rtol=0, atol=0.02)


PREDICTIONS = [
    *((LINEAR, p) for p in ("eps", "x0", "v", "score", "velocity")),
    *((VP, p) for p in ("x0", "v", "score")),
    *((EDM, "x0"), (EDM, "eps"), (FLOW, "x0"), (FLOW, "v")),
]


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    few(PREDICTIONS, "linear velocity", "vp score", "edm eps", "flow v", name=lambda case: f"{case[0].name} {case[1]}"),
)
def test_every_prediction_is_the_same_flow(schedule, prediction):
    x = start(schedule)
    got = rk45(exact(schedule, prediction), x, schedule, prediction=prediction, denoise=False, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got.x, DATA.ode(x, *ends(schedule, prediction=prediction)), rtol=0, atol=3e-5)


@pytest.mark.parametrize("schedule", few([VP, EDM, FLOW], "flow", name=lambda s: s.name))
def test_error_follows_the_tolerance(schedule):
    """On a mixture, against itself at 1e-12: the error falls with the tolerance, about in proportion."""
    mixture = Mixture()
    x = start(schedule, shape=(4, 6))
    prediction = {VP: "eps", EDM: "x0", FLOW: "velocity"}[schedule]
    span = {VP: (20.0, 0.05), EDM: (20.0, 0.05), FLOW: (0.0, 0.95)}[schedule]

    def model(x: Tensor, t: Tensor) -> Tensor:
        return mixture.predict(schedule, prediction, x, t.double())

    solve = lambda tol: rk45(  # noqa: E731
        model, x, schedule, prediction=prediction, span=span, denoise=False, rtol=tol, atol=tol, max_steps=5000
    )
    # Times are float32, so a model that depends on them is known to 1e-7 only.
    want = sample_at(model, x, schedule, prediction, span)
    tolerances = [1e-3, 1e-4, 1e-5]
    found = [solve(tol) for tol in tolerances]
    errors = [float((one.x - want).abs().max()) for one in found]
    slope = np.polyfit(np.log10(tolerances), np.log10(errors), 1)[0]
    assert 0.6 < slope < 1.4, errors
    assert errors[-1] < 300 * tolerances[-1]
    assert [one.model_calls for one in found] == sorted(one.model_calls for one in found)


def sample_at(model, x: Tensor, schedule, prediction: str, span: tuple[float, float]) -> Tensor:
    """A fixed grid of 150 steps of the classic Runge-Kutta method."""
    n = 150
    part = torch.arange(n + 1, dtype=torch.float64) / n
    if schedule is FLOW:
        plan = samplers.rk4(schedule, timesteps=span[0] + (span[1] - span[0]) * part, prediction=prediction)
    else:
        plan = samplers.rk4(schedule, sigmas=span[0] * (span[1] / span[0]) ** part, prediction=prediction)
    return sample(model, x, plan)


def test_orders():
    """One step of h and of h/2: the solution's error falls with h^6, the estimate with h^5."""
    space = coordinates(EDM, "x0", None)
    x = 3 * torch.linspace(-1, 1, 8, dtype=torch.float64)[None]
    steps, errors, estimates = (0.2, 0.1, 0.05), [], []
    model = lambda x, t: torch.tanh(x)  # no times: they are float32  # noqa: E731
    for h in steps:
        fine = Solver(model, x, space, None, x.dtype, False)
        fine.start([0.0])
        for k in range(64):
            fine.attempt([-h * k / 64], [-h / 64], [-h * (k + 1) / 64], 0.0, 1.0)
            fine.settle([True])
        one = Solver(model, x, space, None, x.dtype, False)
        one.start([0.0])
        estimates.append(one.attempt([0.0], [-h], [-h], 0.0, 1.0)[0])
        one.settle([True])
        errors.append(float((one.x - fine.x).abs().max()))
    for values, order in ((errors, 6), (estimates, 5)):
        slope = np.polyfit(np.log(steps), np.log(values), 1)[0]
        assert slope == pytest.approx(order, abs=0.25), values


@pytest.mark.parametrize("schedule", [EDM, VP, FLOW], ids=lambda s: s.name)
def test_there_and_back(schedule):
    """A reversed span encodes; sampling from the code returns the start."""
    span = (0.0, 0.9) if schedule is FLOW else (15.0, 0.05)
    x = start(schedule) / (80.0 if schedule is EDM else 1.0)
    model = exact(schedule)
    code = rk45(model, x, schedule, span=span[::-1], rtol=1e-7, atol=1e-7)
    back = rk45(model, code.x, schedule, span=span, rtol=1e-7, atol=1e-7, denoise=False)
    torch.testing.assert_close(back.x, x, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(code.x, x, rtol=1e-2)


# --- torchdiffeq -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tol", [1e-3, 1e-5, 1e-7])
@pytest.mark.parametrize("schedule", few([LINEAR, VP, EDM, FLOW], "flow", name=lambda s: s.name))
def test_torchdiffeq(schedule, tol):
    """norm="batch" is its dopri5 made to step on the end: as many calls, one solution, in float64."""
    torchdiffeq = pytest.importorskip("torchdiffeq")
    prediction = {EDM: "x0", FLOW: "velocity"}.get(schedule, "eps")
    model = lambda x: torch.tanh(2 * x) + 0.3  # no times: ours are float32  # noqa: E731
    x = start(schedule)
    got = rk45(
        lambda x, t: model(x), x, schedule, prediction=prediction, denoise=False, rtol=tol, atol=tol, norm="batch"
    )
    space = coordinates(schedule, prediction, None)
    begin, end, _ = adaptive._span(space, None)
    calls = 0

    def slope(u: Tensor, y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        v = float(u) if space.in_time else math.exp(float(u))
        node = space.node(v)
        return (node.sx * y + node.s0 * y + node.sm * model(node.k * y)) * (1.0 if space.in_time else v)

    span = torch.tensor([begin, end], dtype=torch.float64)
    want = torchdiffeq.odeint(slope, x, span, rtol=tol, atol=tol, method="dopri5", options={"step_t": span[1:]})[-1]
    assert got.model_calls == calls
    torch.testing.assert_close(got.x, want, rtol=1e-9, atol=1e-9)
    # The default, a step size for each sample, is within the tolerance of it, of states up to 157 in size.
    alone = rk45(lambda x, t: model(x), x, schedule, prediction=prediction, denoise=False, rtol=tol, atol=tol)
    torch.testing.assert_close(alone.x, want, rtol=0, atol=300 * tol)


# --- the points ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [None, 0.8])
@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [(s, p) for s in SCHEDULES for p in ("eps", "x0", "v", "score", "velocity")] + [(EDM, "edm")],
)
def test_points_are_nodes(schedule, prediction, clip):
    space = coordinates(schedule, prediction, clip)
    values = [0.15, 0.5, 0.73] if space.in_time else [0.02, 0.7, 11.3]
    made = points(space, torch.tensor(values if space.in_time else [math.log(v) for v in values], dtype=torch.float64))
    for i, v in enumerate(values):
        node = space.node(v)
        scale = 1.0 if space.in_time else v
        got = {name: float(column[i]) for name, column in made._asdict().items()}
        want = {"time": node.time, "k": node.k, "sx": scale * node.sx, "s0": scale * node.s0, "sm": scale * node.sm}
        if clip is not None:
            want |= {"p": node.p, "q": node.q}
        assert {name: got[name] for name in want} == pytest.approx(want, rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_points_do_not_see_their_neighbours(schedule):
    space = coordinates(schedule, None, None)
    ends = (0.01, 0.99) if space.in_time else (math.log(0.011), math.log(40.0))
    values = torch.linspace(*ends, 53, dtype=torch.float64)
    whole = points(space, values)
    for i in range(53):
        alone = points(space, values[i : i + 1])
        assert all(float(a[0]) == float(b[i]) for a, b in zip(alone, whole, strict=True))


# --- each sample as if it were alone ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("schedule", few(SCHEDULES, "vp", "edm", "flow", name=lambda s: s.name))
def test_a_sample_is_solved_as_if_alone(schedule, dtype):
    """Bit for bit, with as many steps; the samples differ in what they need, and accept at different rounds."""
    sizes = torch.tensor([1.0, 0.01, 30.0, 1.0, 3.0], dtype=dtype).reshape(-1, 1, 1)
    x = start(schedule, dtype, (5, 2, 7)) * sizes
    whole = rk45(network, x, schedule, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(whole.x).all()
    assert len(set(zip(whole.steps, whole.rejected, strict=True))) > 1
    for b in range(5):
        alone = rk45(network, x[b : b + 1], schedule, rtol=1e-4, atol=1e-4)
        assert torch.equal(alone.x[0], whole.x[b])
        assert (alone.steps[0], alone.rejected[0]) == (whole.steps[b], whole.rejected[b])
    turned = rk45(network, x.flip(0), schedule, rtol=1e-4, atol=1e-4)
    assert torch.equal(turned.x.flip(0), whole.x)
    many = rk45(network, x.repeat(7, 1, 1), schedule, rtol=1e-4, atol=1e-4)
    assert torch.equal(many.x, whole.x.repeat(7, 1, 1))


def test_samples_that_have_arrived_wait():
    x = start(EDM, torch.float32, (3, 5)) * torch.tensor([[1.0], [1e-3], [30.0]])
    got = rk45(network, x, EDM, trajectory=True, denoise=False, rtol=1e-4, atol=1e-4)
    assert got.times.shape == got.trajectory.shape[:2]
    lowest = float(got.times[-1].min())
    for b in range(3):
        there = (got.times[:, b] == lowest).nonzero()[0, 0]
        assert torch.equal(got.trajectory[there:, b], got.x[b].expand(len(got.times) - int(there), 5))
    assert lowest == pytest.approx(0.002)
    assert (got.times.diff(dim=0) <= 0).all()
    rounds = len(got.times) - 1
    assert rounds == max(a + b for a, b in zip(got.steps, got.rejected, strict=True))
    assert got.model_calls == 2 + 6 * rounds


def test_the_batch_norm_sees_the_batch():
    x = start(EDM, shape=(2, 5)) * torch.tensor([[1.0], [30.0]], dtype=torch.float64)
    both = rk45(network, x, EDM, norm="batch", rtol=1e-4, atol=1e-4)
    assert both.steps[0] == both.steps[1]
    assert not torch.equal(both.x[:1], rk45(network, x[:1], EDM, norm="batch", rtol=1e-4, atol=1e-4).x)
