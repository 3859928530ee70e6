"""Guidance in a limited interval, of steps and of noise levels: which calls are guided, and with what bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffkern import ops, samplers, schedules
from diffkern.guidance import classifier_free, compose, interval_weights
from diffkern.guidance._spans import Locator, TimeSpan, sigma_span, steps_span
from diffkern.plan import Plan
from diffkern.sampling import initial, sample
from diffkern.schedules import grids

LINEAR, FLOW, EDM = schedules.linear(), schedules.flow(), schedules.edm()
SHAPE = (3, 2, 4, 4)
SEEDS = torch.tensor([11, -5, 2**62], dtype=torch.int64)
C, U = torch.tensor([0.3, -0.8, 0.5]), torch.zeros(3)


def net(x: Tensor, t: Any, c: Tensor) -> Tensor:
    return 0.6 * torch.tanh(x + c.reshape(-1, *[1] * (x.ndim - 1)))


def guided_calls(plan: Plan, /, **options: Any) -> list[bool]:
    """Whether each model call of a run is guided: on [2B] inputs."""
    sizes: list[int] = []

    def model(x: Tensor, t: Any, c: Tensor) -> Tensor:
        sizes.append(x.shape[0])
        return net(x, t, c)

    x = initial(plan, SHAPE, SEEDS)
    got = sample(classifier_free(model, C, U, 4.0, **options), x, plan, seeds=SEEDS)
    options.pop("plan", None)
    weights = interval_weights(plan, 4.0, **options)
    assert [weight == 4.0 for weight, row in zip(weights, plan.rows, strict=True) if row.calls_model] == [
        size == 6 for size in sizes
    ]
    assert torch.equal(got, sample(net, x, plan, seeds=SEEDS, cond=C, uncond=U, guidance=weights))
    return [size == 6 for size in sizes]


@pytest.mark.parametrize("interval", [(0.2, 0.8), (0.0, 0.5), (0.55, 1.0), (0.0, 1.0), (0.29, 0.57)])
@pytest.mark.parametrize(
    ("kind", "steps"),
    [(kind, steps) for kind in ("ddim", "flow", "edm", "karras") for steps in (10, 13)] + [("ddim", 100)],
)
def test_steps(kind: str, steps: int, interval: tuple[float, float]) -> None:
    plan = {
        "ddim": lambda: samplers.ddim(LINEAR, steps),
        "flow": lambda: samplers.euler(FLOW, steps),
        "edm": lambda: samplers.euler(EDM, steps),
        "karras": lambda: samplers.dpmpp_2m(LINEAR, steps, spacing="karras"),
    }[kind]()
    first, last = (math.floor(round(end * steps, 6)) for end in interval)
    assert guided_calls(plan, interval=interval, plan=plan) == [first <= i < last for i in range(steps)]


def test_steps_of_several_calls() -> None:
    """The second call of Heun's step is at the time of the next step, and counts as it."""
    plan = samplers.heun(EDM, 5)
    assert guided_calls(plan, interval=(0.2, 0.6), plan=plan) == [
        False,
        True,
        True,
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    plan = samplers.midpoint(FLOW, 4)
    assert guided_calls(plan, interval=(0.25, 0.75), plan=plan) == [False, False, True, True, True, True, False, False]


SCHEDULES = {
    "linear": (LINEAR, lambda: samplers.ddim(LINEAR, 40)),
    "linear_karras": (LINEAR, lambda: samplers.dpmpp_2m(LINEAR, 25, spacing="karras")),
    "cosine_v": (schedules.cosine(), lambda: samplers.ddim(schedules.cosine(), 40, prediction="v")),
    "zero_snr": (
        schedules.zero_terminal_snr(LINEAR),
        lambda: samplers.ddim(schedules.zero_terminal_snr(LINEAR), 40, prediction="v"),
    ),
    "subsequence": (
        LINEAR.subsequence(range(3, 1000, 7)),
        lambda: samplers.ddim(LINEAR.subsequence(range(3, 1000, 7)), 30),
    ),
    "flow": (FLOW, lambda: samplers.euler(FLOW, 40)),
    "vp": (schedules.vp(), lambda: samplers.euler_maruyama(schedules.vp(), 40)),
    "ve": (schedules.ve(), lambda: samplers.euler(schedules.ve(), 40)),
    "edm": (EDM, lambda: samplers.heun(EDM, 25)),
    "edm_x0": (EDM, lambda: samplers.euler(EDM, 25, prediction="x0")),
}


@pytest.mark.parametrize("interval", [(0.28, 5.42), (0.0, 1.0), (1.0, math.inf), (0.0, math.inf)])
@pytest.mark.parametrize("name", SCHEDULES)
def test_noise_levels(name: str, interval: tuple[float, float]) -> None:
    """low < sigma/alpha <= high, computed at each call's own time (no level of these grids falls on an end)."""
    schedule, make = SCHEDULES[name]
    plan: Plan = make()
    want = []
    for row in plan.rows:
        time = torch.tensor(row.time, dtype=torch.float64)
        if plan.prediction == "edm":
            sigma = (4 * time).exp()
        elif name == "subsequence":
            sigma = LINEAR.sigma_ve(time)
        else:
            sigma = schedule.sigma_ve(time)
        want.append(interval[0] < float(sigma) <= interval[1])
    assert guided_calls(plan, sigma_interval=interval, schedule=schedule, plan=plan) == want
    if interval == (0.28, 5.42):
        assert len(set(want)) == 2


def test_the_ends_of_an_interval_of_noise_levels() -> None:
    """The lower end is outside, the upper one inside, also where they are levels of the grid."""
    levels = [float(LINEAR.sigma_ve(t)) for t in (200, 700)]
    span = sigma_span(LINEAR, (levels[0], levels[1]), "eps")
    assert [span.holds(t) for t in (199, 200, 201, 700, 701)] == [False, False, True, True, False]
    assert [span.holds(t) for t in (199.5, 200.0, 200.5, 700.0, 700.5)] == [False, False, True, True, False]
    kept = LINEAR.subsequence(range(3, 1000, 7))
    first = float(kept.sigma_ve(0))
    assert [sigma_span(kept, (low * first, 1.0), "eps").holds(3) for low in (0.5, 0.99, 1.0)] == [True, True, False]
    assert not sigma_span(LINEAR, (float(LINEAR.sigma_ve(0)), 1.0), "eps").holds(0)
    sigmas = grids.karras_sigmas(8, 0.002, 80.0)
    for prediction in ("edm", "x0"):
        span = sigma_span(EDM, (float(sigmas[5]), float(sigmas[2])), prediction)
        times = EDM.model_time(prediction, sigmas[:-1])
        for dtype in (torch.float32, torch.float64):
            got = span.contains(times.to(dtype)).tolist()
            assert got == [i in (2, 3, 4) for i in range(8)]
    flow = sigma_span(FLOW, (0.25, 3.0), "velocity")  # t = 0.8 and 0.25
    assert flow.contains(torch.tensor([0.2, 0.25, 0.5, 0.79999, 0.8, 0.9])).tolist() == [
        False,
        True,
        True,
        True,
        False,
        False,
    ]


def test_all_the_time_is_no_interval() -> None:
    plan = samplers.langevin(LINEAR, 8, t=500, step_size=0.01)
    assert steps_span(plan, (0.0, 1.0)) == TimeSpan(-math.inf, math.inf)
    assert all(guided_calls(plan, interval=(0.0, 1.0), plan=plan))


def test_outside_the_bits_are_the_conditional_models() -> None:
    x = ops.randn((3, *SHAPE[1:]), SEEDS)
    options: dict[str, Any] = {"sigma_interval": (0.28, 5.42), "schedule": LINEAR}
    t = torch.tensor([900, 400, 10])  # outside, inside, outside
    for rescale in (0.0, 0.7):
        for weight in (4.0, torch.tensor([2.0, 4.0, 3.0]), lambda t: 4.0 + 0 * t):
            got = classifier_free(net, C, U, weight, rescale=rescale, **options)(x, t)
            want = classifier_free(net, C, U, 4.0, rescale=rescale)(x, t)
            assert torch.equal(got[[0, 2]], net(x, t, C)[[0, 2]])
            assert torch.equal(got[1], want[1])
    both = compose(net, [C, 2 * C], U, [4.0, 3.0], **options)
    for time in (900, t):
        got = both(x, time)
        u, c, d = net(x, t, U), net(x, t, C), net(x, t, 2 * C)
        torch.testing.assert_close(got[0], (u + (c - u) + (d - u))[0])
    torch.testing.assert_close(got[1], (u + 4 * (c - u) + 3 * (d - u))[1])


def test_times_of_every_form() -> None:
    guided = classifier_free(net, C, U, 4.0, sigma_interval=(0.28, 5.42), schedule=LINEAR)
    x = ops.randn((3, *SHAPE[1:]), SEEDS)
    for time, inside in ((900, False), (400, True), (10, False)):
        want = classifier_free(net, C, U, 4.0 if inside else 1.0)(x, time)
        for t in (time, float(time), torch.tensor(time), torch.full((3,), time), torch.full((3,), float(time))):
            assert torch.equal(guided(x, t), want)


# --- where the times are on a device ----------------------------------------------------------------------------------


def on_a_device(monkeypatch: pytest.MonkeyPatch, find_rows: bool) -> None:
    """Locators do here what they do with times on a device."""

    def call(self: Locator, t: Any) -> bool | Tensor:
        if self.span is None:
            return True
        found = self.in_rows(t) if find_rows else None
        return self.span.contains(t) if found is None else found

    monkeypatch.setattr(Locator, "__call__", call)


@pytest.mark.parametrize("find_rows", [True, False])
@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("weight", [4.0, torch.tensor([2.0, 4.0, 3.0]), lambda t: 4.0 + 0 * t])
def test_unread_times_give_the_same_bits(
    monkeypatch: pytest.MonkeyPatch, find_rows: bool, rescale: float, weight: Any
) -> None:
    for plan in (samplers.ddim(LINEAR, 10), samplers.heun(EDM, 6)):
        x = initial(plan, SHAPE, SEEDS)
        guided = classifier_free(net, C, U, weight, rescale=rescale, interval=(0.2, 0.8), plan=plan)
        want = sample(guided, x, plan)
        with monkeypatch.context() as patch:
            on_a_device(patch, find_rows)
            assert torch.equal(sample(guided, x, plan), want)


def test_rows_of_times_are_read_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    locator = Locator(TimeSpan(100, 500))
    reads = []
    contains = TimeSpan.contains
    monkeypatch.setattr(TimeSpan, "contains", lambda self, t: reads.append(t.shape) or contains(self, t))
    times = torch.tensor([900, 500, 100, 50])[:, None].repeat(1, 6)
    assert [locator.in_rows(row) for row in times.unbind(0)] == [False, True, True, False]
    assert [locator.in_rows(times[i, :3]) for i in range(4)] == [False, True, True, False]
    assert reads == [(4, 6)]
    times[0] = 300  # written to: read again
    assert locator.in_rows(times[0])
    assert reads == [(4, 6)] * 2
    times[1, 0] = 3  # samples of one row that differ
    assert locator.in_rows(times[1]) is None
    other = times.clone().t()  # not rows
    for t in (other[0], times.reshape(-1)[5:9], times[:, 0], times.clone()[0].clone(), times[0][::2], times[0, 0]):
        assert locator.in_rows(t) is None


# --- bad input --------------------------------------------------------------------------------------------------------

PLAN = samplers.ddim(LINEAR, 10)
LEVELS = samplers.annealed_langevin(EDM, each=4, timesteps=[5.0, 1.0, 0.2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": (0.2, 0.8)}, r"interval counts the steps of a plan: give plan=, got interval=\(0.2, 0.8\)"),
        ({"interval": (0.2, 0.8), "sigma_interval": (1, 2)}, r"give interval or sigma_interval, not both"),
        ({"interval": 0.2, "plan": PLAN}, r"interval must be two numbers, got 0.2"),
        ({"interval": (0.8, 0.2), "plan": PLAN}, r"interval must be fractions .* got \(0.8, 0.2\)"),
        ({"interval": (2, 8), "plan": PLAN}, r"interval must be fractions of the steps, .* got \(2, 8\)"),
        ({"interval": (0.01, 0.05), "plan": PLAN}, r"interval must hold at least one of the 10 steps of ddim"),
        ({"interval": (0.0, 0.2), "plan": LEVELS}, r"interval must not end .* step 0 is at t=0.402"),
        ({"sigma_interval": (0.3, 5.0)}, r"sigma_interval needs the schedule .* give schedule=, got \(0.3, 5.0\)"),
        ({"sigma_interval": (5.0, 0.3), "schedule": EDM}, r"sigma_interval must be noise levels, 0 <= low < high"),
        ({"sigma_interval": (-1.0, 0.3), "schedule": EDM}, r"sigma_interval must be noise levels, .* \(-1.0, 0.3\)"),
        ({"sigma_interval": (math.nan, 1), "schedule": EDM}, r"sigma_interval must be noise levels"),
        ({"sigma_interval": ("a", 1), "schedule": EDM}, r"sigma_interval must be two numbers, got \('a', 1\)"),
        ({"sigma_interval": (100, 200), "schedule": EDM}, r"sigma_interval must hold levels of .*, 0..80, got"),
        ({"sigma_interval": (0.0, 0.001), "schedule": schedules.ve()}, r"sigma_interval must hold levels .* 0.01..50"),
    ],
)  # fmt: skip
def test_bad_intervals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        classifier_free(net, C, U, 3.0, **options)


def test_weights_without_an_interval() -> None:
    with pytest.raises(ValueError, match="interval or sigma_interval must be given, got neither"):
        interval_weights(PLAN, 3.0)
