"""Loops of the drop-in schedulers in 16 bits: what these do not hold of the state goes from one step to the next.

Gaussian data, whose best prediction is known: the original in float64 is what both are compared with.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.diffusers_runs import pair
from helpers.suites import few
from torch import Tensor

SIXTEEN = [torch.bfloat16, torch.float16]
UNIT = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
SQUARE = 0.16
"""The variance of the data, not EDM's: its best network would give 0."""
DDIM, DDPM, INVERSE = "DDIMScheduler", "DDPMScheduler", "DDIMInverseScheduler"
EULER, ANCESTRAL, HEUN = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"
EDM, LMS = "EDMEulerScheduler", "LMSDiscreteScheduler"
DPM, UNIPC, DEIS = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"
FLOW, FLOW_HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
VP = (DDIM, DDPM, INVERSE, DPM, UNIPC, DEIS)
ALL = (*VP, EULER, ANCESTRAL, HEUN, EDM, LMS, FLOW, FLOW_HEUN)
CONFIG: dict[str, dict[str, Any]] = {
    DDIM: {"clip_sample": False},
    DDPM: {"clip_sample": False},
    INVERSE: {"clip_sample": False},
}


def network(scheduler: Any, name: str, given: Tensor, t: Tensor, i: int) -> Tensor:
    """The best output for what the model is given, in its dtype."""
    x = given.double()
    if name in VP:
        abar = float(scheduler.alphas_cumprod[int(t)].double())
        return ((1 - abar) ** 0.5 / (SQUARE * abar + 1 - abar) * x).to(given.dtype)
    sigma = float(scheduler.sigmas[i].double())
    if name in (FLOW, FLOW_HEUN):
        along, total = sigma - (1 - sigma) * SQUARE, (1 - sigma) ** 2 * SQUARE + sigma**2
        return (along / total * x).to(given.dtype)
    if name == EDM:
        x = x * (sigma**2 + 0.25) ** 0.5
        skip, out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / (sigma**2 + 0.25) ** 0.5
        return ((SQUARE / (SQUARE + sigma**2) - skip) / out * x).to(given.dtype)
    return (sigma * (sigma**2 + 1) ** 0.5 / (SQUARE + sigma**2) * x).to(given.dtype)


def loop(
    scheduler: Any,
    name: str,
    x: Tensor,
    steps: int,
    between: Callable[[int, Tensor], Tensor] = lambda i, x: x,
    first: int = 0,
) -> Tensor:
    """A run; ``between`` gives what the next step is given."""
    scheduler.set_timesteps(steps)
    if first:
        scheduler.set_begin_index(first)
    for i, t in enumerate(scheduler.timesteps[first:], start=first):
        given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(network(scheduler, name, given, t, i), t, x).prev_sample
        x = between(i, x)
    return x


def start(scheduler: Any, name: str, dtype: torch.dtype, shape: tuple[int, ...] = (2, 4, 8, 8)) -> Tensor:
    z = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = SQUARE**0.5 if name == INVERSE else float(getattr(scheduler, "init_noise_sigma", 1.0))
    return (scale * z).to(dtype)


def distance(found: Tensor, want: Tensor) -> float:
    return float((found.double() - want).norm() / want.norm())


def draw_alike(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, count: int) -> Callable[[], None]:
    """All three runs draw the same numbers, of this dtype; called before each."""
    drawn = torch.randn((count, 2, 4, 8, 8), generator=torch.Generator().manual_seed(3)).to(dtype)
    state = {"next": 0}

    def draw(shape: Any, generator: Any = None, device: Any = None, dtype: Any = None, layout: Any = None) -> Tensor:
        state["next"] += 1
        return drawn[state["next"] - 1].to(dtype)

    import diffusers.schedulers.scheduling_ddpm as ddpm
    import diffusers.schedulers.scheduling_euler_ancestral_discrete as ancestral

    import diffkern.compat.diffusers._engine as engine

    for module in (ddpm, ancestral, engine):
        monkeypatch.setattr(module, "randn_tensor", draw)
    return lambda: state.update(next=0)


RUNS = few(
    [
        (name, dtype, steps)
        for name in ALL
        for dtype in SIXTEEN
        # LMS of the original integrates numerically; on as many steps as timesteps multistep solvers repeat levels
        for steps in ((10, 100) if name == LMS else (10, 100, 500) if name in (DPM, UNIPC, DEIS) else (10, 100, 1000))
    ],
    *(f"{name}-torch.bfloat16-100" for name in ALL),
    "DDIMScheduler-torch.bfloat16-1000",
    "FlowMatchEulerDiscreteScheduler-torch.bfloat16-1000",
)


@pytest.mark.parametrize(("name", "dtype", "steps"), RUNS)
def test_at_least_as_close_as_the_original(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, steps: int
) -> None:
    theirs, ours = pair(name, **CONFIG.get(name, {}))
    rewind = draw_alike(monkeypatch, dtype, steps)
    x = start(theirs, name, dtype)
    want = loop(copy.deepcopy(theirs), name, x.double(), steps)
    rewind()
    off = distance(loop(theirs, name, x, steps), want)
    rewind()
    found = loop(ours, name, x, steps)
    assert found.dtype == dtype
    assert distance(found, want) <= off + UNIT[dtype]


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
def test_a_thousand_steps_of_ddim(dtype: torch.dtype) -> None:
    """The noise that the original returns is not the data: a deviation of 0.4."""
    _, ours = pair(DDIM, clip_sample=False)
    x = start(ours, DDIM, dtype, (4, 4, 32, 32))
    assert abs(float(loop(ours, DDIM, x, 1000).double().std()) - 0.4) < 0.01


# --- the sample alone says what is kept ------------------------------------------------------------------------------


def as_a_view(i: int, x: Tensor) -> Tensor:
    room = torch.zeros(2, 4, 8, 12, dtype=x.dtype)
    room[..., 2:10] = x
    return room[..., 2:10]


@pytest.mark.parametrize("name", ALL)
def test_the_same_numbers_in_another_tensor(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _, ours = pair(name, **CONFIG.get(name, {}))
    rewind = draw_alike(monkeypatch, torch.bfloat16, 20)
    x = start(ours, name, torch.bfloat16)
    want = loop(ours, name, x, 20)
    for between in (lambda i, x: x.clone(), as_a_view):
        rewind()
        found = loop(ours, name, x, 20, between)
        # UniPC's corrector is summed in another order where the sample is not the very one.
        assert distance(found, want.double()) <= (UNIT[torch.bfloat16] if name == UNIPC else 0.0)
    rewind()
    with torch.inference_mode():
        found = loop(ours, name, x, 20)
    assert distance(found, want.double()) <= (UNIT[torch.bfloat16] if name == UNIPC else 0.0)


@pytest.mark.parametrize("name", [DDIM, EULER, DPM, FLOW])
def test_an_edit_counts_where_it_was_made_and_the_rest_keeps_its_bits(name: str) -> None:
    """Inpainting: half of the image is put in after every step."""
    _, ours = pair(name, **CONFIG.get(name, {}))
    x = start(ours, name, torch.bfloat16)
    known = torch.full_like(x, 0.75)

    def paste(i: int, x: Tensor) -> Tensor:
        return torch.cat([known[:, :2], x[:, 2:]], 1)

    def paste_in_place(i: int, x: Tensor) -> Tensor:
        x[:, :2] = known[:, :2]
        return x

    plain, painted = loop(ours, name, x, 50), loop(ours, name, x, 50, paste)
    assert torch.equal(painted[:, 2:], plain[:, 2:])
    assert torch.equal(painted[:, :2], known[:, :2])
    assert torch.equal(loop(ours, name, x, 50, paste_in_place), painted)


@pytest.mark.parametrize("name", [DDIM, EULER, DPM, UNIPC, FLOW])
def test_a_new_run_starts_clean(name: str) -> None:
    _, ours = pair(name, **CONFIG.get(name, {}))
    _, fresh = pair(name, **CONFIG.get(name, {}))
    x = start(ours, name, torch.bfloat16)
    loop(ours, name, x, 20)
    assert torch.equal(loop(ours, name, -0.5 * x, 20), loop(fresh, name, -0.5 * x, 20))
    if hasattr(ours, "set_begin_index"):
        want = loop(fresh, name, x, 20, first=5)
        assert torch.equal(loop(ours, name, x, 20, first=5), want)
        assert torch.equal(loop(copy.deepcopy(ours), name, x, 20, first=5), want)


def test_a_step_that_is_repeated_gives_what_it_gave() -> None:
    """Updates of one step of 1000 are below half a unit nearly everywhere: what it returned looks like its sample."""
    _, ours = pair(DDIM, clip_sample=False)
    ours.set_timesteps(1000)
    x = start(ours, DDIM, torch.bfloat16)
    m, t = network(ours, DDIM, x, ours.timesteps[300], 300), ours.timesteps[300]
    first = ours.step(m, t, x).prev_sample
    assert torch.equal(ours.step(m, t, x).prev_sample, first)
    assert float((first == x).double().mean()) > 0.5


# --- gradients, odd values, dtypes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [DDIM, EULER, HEUN, DPM, UNIPC, FLOW])
def test_gradients_are_those_of_the_sample(name: str) -> None:
    """Recorded or not, a loop has the same values; a leaf put between two steps gets its gradient."""
    _, ours = pair(name, **CONFIG.get(name, {}))
    x = start(ours, name, torch.bfloat16)
    want = loop(ours, name, x, 20)
    leaves: list[Tensor] = []

    def leaf(i: int, x: Tensor) -> Tensor:
        if i == 10:
            x = x.detach().requires_grad_()
            leaves.append(x)
        return x

    found = loop(ours, name, x, 20, leaf)
    assert distance(found.detach(), want.double()) <= (UNIT[torch.bfloat16] if name == UNIPC else 0.0)
    found.float().sum().backward()
    (made,) = leaves
    assert made.grad is not None
    assert made.grad.dtype == made.dtype
    slope = made.grad.double()  # every step is linear in the state, and alike for all elements
    assert float(slope.std()) <= 0.05 * float(slope.abs().mean())
    assert float(slope.abs().mean()) > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_values_that_are_not_finite_stay_where_they_are(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    _, ours = pair(name, **CONFIG.get(name, {}))
    rewind = draw_alike(monkeypatch, torch.float16, 10)
    x = start(ours, name, torch.float16)
    want = loop(ours, name, x, 10)
    rewind()

    def spoil(i: int, x: Tensor) -> Tensor:
        x = x.clone()
        x[0, 0, 0, 0] = math.nan
        return x

    found = loop(ours, name, x, 10, spoil)
    assert math.isnan(float(found[0, 0, 0, 0]))
    assert distance(found[1], want[1].double()) <= (UNIT[torch.float16] if name == UNIPC else 0.0)


@pytest.mark.parametrize("dtype", SIXTEEN, ids=str)
@pytest.mark.parametrize("name", ALL)
def test_results_have_the_originals_dtypes(name: str, dtype: torch.dtype) -> None:
    results = []
    for scheduler in pair(name, **CONFIG.get(name, {})):
        x = start(scheduler, name, dtype)
        scheduler.set_timesteps(6)
        for i, t in enumerate(scheduler.timesteps[:4]):
            given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            out = scheduler.step(network(scheduler, name, given, t, i), t, x)
            x = out.prev_sample
        made = [m.dtype for m in getattr(scheduler, "model_outputs", []) if m is not None]
        results.append(({key: value.dtype for key, value in out.items()}, given.dtype, made))
    assert results[0] == results[1]


@pytest.mark.full
def test_repaint(monkeypatch: pytest.MonkeyPatch) -> None:
    """To and fro over the levels, with a known half."""
    import diffusers.schedulers.scheduling_repaint as repaint

    import diffkern.compat.diffusers._engine as engine

    drawn = torch.randn((2000, 2, 4, 8, 8), generator=torch.Generator().manual_seed(3)).bfloat16()

    def loop_of(scheduler: Any, x: Tensor) -> Tensor:
        numbers = iter(drawn)
        for module in (repaint, engine):
            monkeypatch.setattr(module, "randn_tensor", lambda *args, dtype=None, **kwargs: next(numbers).to(dtype))
        scheduler.set_timesteps(50, jump_length=10, jump_n_sample=2)
        scheduler.eta = 0.0
        known, mask = torch.full_like(x, 0.3), torch.zeros_like(x)
        mask[..., :4] = 1
        last = scheduler.timesteps[0] + 1
        for t in scheduler.timesteps:
            if t < last:
                x = scheduler.step(network(scheduler, DDIM, x, t, 0), t, x, known, mask).prev_sample
            else:
                x = scheduler.undo_step(x, last)
            last = t
        return x

    theirs, ours = pair("RePaintScheduler", clip_sample=False)
    x = start(theirs, DDIM, torch.bfloat16)
    want = loop_of(copy.deepcopy(theirs), x.double())
    found = loop_of(ours, x)
    assert found.dtype == x.dtype
    assert distance(found, want) <= min(distance(loop_of(theirs, x), want), UNIT[x.dtype])
