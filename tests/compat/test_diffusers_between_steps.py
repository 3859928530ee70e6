"""What a loop may do between two steps, with the originals beside: gradients cut and asked for in place, copies,
tensors as options, tables of inference mode written to, noise and dtypes that broadcast."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from helpers.diffusers_peers import (
    EDM,
    EULER,
    FLOW,
    FLOW_HEUN,
    HEUN,
    LMS,
    SIGMA_NAMES,
    distance,
    network,
    options,
    pair,
    scaled,
)
from helpers.diffusers_peers import start as started
from helpers.lazy import needs
from torch import Tensor

pytestmark = needs("diffusers")

KARRAS = [name for name in SIGMA_NAMES if name not in (FLOW, FLOW_HEUN)]
UNIPC, DPM, DDIM = "UniPCMultistepScheduler", "DPMSolverMultistepScheduler", "DDIMScheduler"
DEIS = "DEISMultistepScheduler"
STEPS = 6

Between = Callable[[Any, Tensor, int], tuple[Any, Tensor]]


def walk(scheduler: Any, between: Between | None = None, grad: bool = False, **call: Any) -> list[Tensor]:
    """The states of a loop, and the gradient of every x' with respect to x where ``grad``; ``between(scheduler, x, i)``
    runs before step i."""
    x, generator = started(scheduler), torch.Generator().manual_seed(4)
    found: list[Tensor] = []
    for i in range(STEPS):
        if between is not None:
            scheduler, x = between(scheduler, x, i)
        t = scheduler.timesteps[i]
        m = network(scaled(scheduler, x, t), t)
        after = scheduler.step(m, t, x, return_dict=False, **options(scheduler, call, generator))[0]
        if grad:
            found.append(torch.autograd.grad(after.sum(), x)[0])
        x = after
        found.append(x.detach().clone())
    return found


def same(name: str, between: Between | None = None, config: Any = None, bound: float = 2e-6, **call: Any) -> None:
    theirs, mine = (walk(s, between, **call) for s in pair(name, config or {}, STEPS))
    for i, (a, b) in enumerate(zip(theirs, mine, strict=True)):
        assert distance(b, a, theirs[max(i - 1, 0)]) < bound * (i + 1), f"step {i}"


# --------------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("name", [*SIGMA_NAMES, UNIPC, DPM, DEIS, DDIM])
def test_a_state_that_is_cut_from_its_graph_in_place(name: str) -> None:
    """x.detach_().requires_grad_(): the gradient is that of one step, not of what was made beside x before."""
    if name in (HEUN, FLOW_HEUN, LMS):
        pytest.skip("the earlier slopes keep the graph of a step that was differentiated, as in the original")

    def cut(scheduler: Any, x: Tensor, i: int) -> tuple[Any, Tensor]:
        if name in (UNIPC, DPM, DEIS):
            scheduler.model_outputs = [None if m is None else m.detach() for m in scheduler.model_outputs]
        if name == UNIPC and scheduler.last_sample is not None:
            scheduler.last_sample = scheduler.last_sample.detach()
        return scheduler, x.detach_().requires_grad_()

    same(name, cut, bound=1e-5, grad=True)


@pytest.mark.parametrize("name", [*KARRAS, UNIPC, DPM, DEIS])
def test_a_gradient_asked_for_in_place(name: str) -> None:
    """x.requires_grad_() on what a step without gradients returned."""
    found = []
    for scheduler in pair(name, {}, STEPS):
        x, generator = started(scheduler), torch.Generator().manual_seed(4)
        for i in range(4):
            t = scheduler.timesteps[i]
            x.requires_grad_()
            shown = scaled(scheduler, x, t)
            m = network(shown, t)
            found.append(torch.autograd.grad(m.sum(), x, retain_graph=True)[0])
            call = options(scheduler, {}, generator)
            if i == 3:
                after = scheduler.step(m, t, x, return_dict=False, **call)[0]
                found.append(torch.autograd.grad(after.sum(), x)[0])
            else:
                with torch.no_grad():
                    x = scheduler.step(m, t, x, return_dict=False, **call)[0]
    for a, b in zip(found[: len(found) // 2], found[len(found) // 2 :], strict=True):
        assert distance(b, a, a) < 1e-5


@pytest.mark.parametrize("name", [EULER, EDM])
def test_a_loop_with_gradients_can_be_copied(name: str) -> None:
    """diffusers' scheduler holds no state here, so its copies do not depend on whether a gradient flows."""

    def copied(scheduler: Any, x: Tensor, i: int) -> tuple[Any, Tensor]:
        return (copy.deepcopy(scheduler), x) if i == 3 else (scheduler, x if i else x.requires_grad_())

    same(name, copied)


def test_what_unipc_makes_later_has_the_steps_gradient_mode() -> None:
    """The corrected sample of a step under no_grad, asked for with gradients on, has none."""
    for scheduler in pair(UNIPC, {"solver_order": 1}, STEPS):
        x = started(scheduler).requires_grad_()
        for i in range(2):
            with torch.set_grad_enabled(i == 0):
                x = scheduler.step(network(x, 1), scheduler.timesteps[i], x, return_dict=False)[0]
        assert not scheduler.last_sample.requires_grad


# ------------------------------------------------------------------------------------------------------------ copies
HOW: list[Any] = [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", SIGMA_NAMES)
def test_copies_notice_writes_to_their_own_tensors(name: str, how: Any) -> None:
    """A copy's tensors count their writes from 0: no count of the original's may stand for one of theirs."""
    for what, writes in product(("sigmas", "state"), (1, 2, 3)):

        def copied(scheduler: Any, x: Tensor, i: int, what: str = what, writes: int = writes) -> tuple[Any, Tensor]:
            if i == 0:
                for _ in range(writes):
                    scheduler.sigmas.mul_(1.125)
            if i == 2:
                scheduler, x = how((scheduler, x))
                (scheduler.sigmas if what == "sigmas" else x).mul_(0.75)
            return scheduler, x

        same(name, copied)


def test_a_pickle_in_the_middle_of_a_loop_holds_no_tables() -> None:
    sizes = []
    for scheduler in pair(EULER, {}, STEPS):
        walk(scheduler, lambda s, x, i: (sizes.append(len(pickle.dumps(s))) or s, x))
    assert sizes[-1] < sizes[STEPS - 1] + 500


# ---------------------------------------------------------------------------------------------------- inference mode
@pytest.mark.parametrize("name", [*SIGMA_NAMES, UNIPC, DPM, DEIS, DDIM])
def test_tables_made_in_inference_mode_and_written_to(name: str) -> None:
    """Torch does not count these writes."""

    def changed(scheduler: Any, x: Tensor, i: int) -> tuple[Any, Tensor]:
        if i == 0:
            scheduler.set_timesteps(STEPS)
        if i == 4 and name == DDIM:
            scheduler.timesteps[5:] += 7
        elif i == 4:
            scheduler.sigmas.mul_(0.75)
        return scheduler, x

    with torch.inference_mode():
        same(name, changed)


@pytest.mark.parametrize("how", ["before", "after"])
def test_unipc_in_inference_mode_with_a_state_written_to(how: str) -> None:
    """Inpainting in place: the corrector goes on from its own sample, although torch does not count the write."""
    kept: list[Tensor] = []

    def changed(scheduler: Any, x: Tensor, i: int) -> tuple[Any, Tensor]:
        if i == 3:
            (x if how == "after" else kept[-1]).mul_(0.5)
        kept.append(x)
        return scheduler, x

    with torch.inference_mode():
        same(UNIPC, changed)


# ----------------------------------------------------------------------------------------------------------- options
@pytest.mark.parametrize(
    ("name", "option"), [(DDIM, "eta"), (EULER, "s_churn"), (EDM, "s_churn"), (FLOW_HEUN, "s_churn")]
)
def test_options_given_as_a_tensor_that_changes(name: str, option: str) -> None:
    runs = []
    for scheduler in pair(name, {}, STEPS):
        value = torch.tensor(0.0)

        def change(scheduler: Any, x: Tensor, i: int, value: Tensor = value) -> tuple[Any, Tensor]:
            return value.fill_(0.75 if i == 4 else float(value)) is None or scheduler, x

        runs.append(walk(scheduler, change, **{option: value}))
    assert distance(runs[1][-1], runs[0][-1], runs[0][-2]) < 2e-6 * STEPS


def test_another_config_between_step_and_scale_model_input() -> None:
    def change(scheduler: Any, x: Tensor, i: int) -> tuple[Any, Tensor]:
        if i == 3:
            scheduler.register_to_config(sigma_data=1.0)
        return scheduler, x

    same(EDM, change)


@pytest.mark.parametrize(
    ("name", "config", "call"), [(DDIM, {}, {"eta": 0.5}), (DPM, {"algorithm_type": "sde-dpmsolver++"}, {})]
)
def test_variance_noise_broadcasts(name: str, config: Any, call: Any) -> None:
    one = torch.randn(1, 3, 7, 5, generator=torch.Generator().manual_seed(5))
    runs = []
    for scheduler in pair(name, config, STEPS):
        x, states = started(scheduler), []
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, variance_noise=one, return_dict=False, **call)[0]
            states.append(x)
        runs.append(states)
    for i, (a, b) in enumerate(zip(*runs, strict=True)):
        assert distance(b, a, a) < 2e-6 * (i + 1)


@pytest.mark.parametrize("name", [EULER, EDM, FLOW, DDIM, "DDIMInverseScheduler", "DDPMScheduler", DPM, UNIPC, DEIS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 7, 5), (2, 3, 7, 5), (1, 3, 5, 7), (1, 3, 35)], ids=str)
def test_a_model_output_of_another_shape_after_steps_of_one(name: str, dtype: torch.dtype, shape: Any) -> None:
    """It broadcasts, or raises, as in the original, also where it has as many elements as the state."""
    if name in (DPM, UNIPC, DEIS) and shape[0] == 2:
        pytest.skip("the estimates before it have one sample, which ours refuses beside a state of two")
    results: list[Any] = []
    for scheduler in pair(name, {}, STEPS):
        generator = torch.Generator().manual_seed(4)
        x = started(scheduler)[:1].to(dtype)
        for t in scheduler.timesteps[:3]:
            x = scheduler.step(network(x, t), t, x, return_dict=False, **options(scheduler, {}, generator))[0]
        m, t = torch.linspace(-1, 1, 210).to(dtype)[: math.prod(shape)].reshape(shape), scheduler.timesteps[3]
        try:
            results.append(scheduler.step(m, t, x, return_dict=False, **options(scheduler, {}, generator))[0])
        except RuntimeError:
            results.append(None)
    theirs, mine = results
    assert (theirs is None) == (mine is None)
    if theirs is not None:
        assert mine.shape == theirs.shape
        assert distance(mine, theirs, theirs) < (1e-5 if dtype is torch.float32 else 0.02)


@pytest.mark.parametrize("name", [DPM, UNIPC, DEIS])
@pytest.mark.parametrize("kind", ["sample", "epsilon"])
def test_a_model_output_for_all_samples(name: str, kind: str) -> None:
    """[1, ...] where the state is [B, ...]: the estimates that are kept and the noise broadcast as in the original."""
    config: dict[str, Any] = {"prediction_type": kind}
    if name == DPM:
        config["algorithm_type"] = "sde-dpmsolver++"
    runs, generators = [], [torch.Generator().manual_seed(4) for _ in range(2)]
    for scheduler, generator in zip(pair(name, config, STEPS), generators, strict=True):
        x, states = started(scheduler), []
        for i, t in enumerate(scheduler.timesteps):
            m = network(x, t)[: 1 if i in (1, 3) else 2]
            x = scheduler.step(m, t, x, return_dict=False, **options(scheduler, {}, generator))[0]
            states.append(x)
        runs.append(states)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
    for i, (a, b) in enumerate(zip(*runs, strict=True)):
        assert distance(b, a, a) < 2e-6 * (i + 1)


@pytest.mark.parametrize("name", [LMS, HEUN])
def test_a_dtype_that_changes_in_the_loop(name: str) -> None:
    """Earlier slopes in float64, the state in float32: the result is float64, as torch promotes."""

    def change(scheduler: Any, x: Tensor, i: int) -> tuple[Any, Tensor]:
        return scheduler, x.double() if i == 0 else x.float() if i == 3 else x

    same(name, change)


@pytest.mark.parametrize("name", [DPM, UNIPC, DEIS])
def test_noising_to_a_step_sees_another_config(name: str) -> None:
    found = []
    for scheduler in pair(name, {}, STEPS):
        scheduler.set_begin_index(2)
        scheduler.sigmas.div_(200.0)
        x, at = started(scheduler), scheduler.timesteps[2:3].expand(2)
        found.append(scheduler.add_noise(x, x + 1, at))
        scheduler.register_to_config(use_flow_sigmas=True)
        found.append(scheduler.add_noise(x, x + 1, at))
    assert distance(found[2], found[0], found[0]) < 1e-6
    assert distance(found[3], found[1], found[1]) < 1e-6
    assert not torch.allclose(found[0], found[1])


@pytest.mark.parametrize("name", [*SIGMA_NAMES, UNIPC, DPM, DEIS, DDIM])
def test_forward_mode_is_refused(name: str) -> None:
    """A tangent that the op does not carry on would be lost without a word."""
    _, mine = pair(name, {}, STEPS)
    x, generator = started(mine), torch.Generator().manual_seed(4)
    for t in mine.timesteps[:3]:
        x = mine.step(network(scaled(mine, x, t), t), t, x, return_dict=False, **options(mine, {}, generator))[0]
    t = mine.timesteps[3]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=r"has no forward-mode derivative .* use reverse mode"):
            mine.step(x, t, dual, return_dict=False, **options(mine, {}, generator))
    assert mine.step(x, t, x, return_dict=False, **options(mine, {}, generator))[0].isfinite().all()
