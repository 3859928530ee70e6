"""What every drop-in scheduler keeps: signatures, config, random numbers, dtypes, one op a step."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from helpers.diffusers_runs import SHAPE, Dispatched, check_runs, outputs, pair, run
from helpers.lazy import Lazy, needs
from torch import Tensor

import diffkern

pytestmark = needs("diffusers")
diffusers, drop_ins = Lazy("diffusers"), Lazy("diffkern.compat.diffusers")


# Name, options of the constructor and of step; how torch's generator is asked for each step.
RUNS: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("DDPMScheduler", {}, {}),
    ("DDIMScheduler", {}, {}),
    ("DDIMScheduler", {"prediction_type": "v_prediction"}, {"eta": 0.7}),
    ("DDIMInverseScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {}, {}),
    ("DPMSolverMultistepScheduler", {"solver_order": 3, "prediction_type": "sample"}, {}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}, {}),
    ("UniPCMultistepScheduler", {}, {}),
    ("UniPCMultistepScheduler", {"solver_order": 3, "disable_corrector": [2]}, {}),
    ("DEISMultistepScheduler", {}, {}),
    ("DEISMultistepScheduler", {"solver_order": 3, "prediction_type": "v_prediction"}, {}),
]
IDS = [f"{name[:-9]}-{i}" for i, (name, _, _) in enumerate(RUNS)]
NAMES = (
    *("DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler", "DPMSolverMultistepScheduler"),
    *("UniPCMultistepScheduler", "DEISMultistepScheduler", "RePaintScheduler", "ScoreSdeVeScheduler"),
)
every_run = pytest.mark.parametrize(("name", "config", "options"), RUNS, ids=IDS)
every_name = pytest.mark.parametrize("name", NAMES)


def start(shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def stochastic(config: dict[str, Any], options: dict[str, Any], name: str) -> bool:
    return name == "DDPMScheduler" or "eta" in options or str(config.get("algorithm_type")).startswith("sde")


def options_of(scheduler: Any) -> dict[str, Any]:
    """The config without the list of defaults, whose order changes from object to object."""
    return {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}


# ------------------------------------------------------------------------------------------------- the class itself
@every_name
def test_class_config_and_signatures(name: str) -> None:
    theirs, ours = getattr(diffusers, name), getattr(drop_ins, name)
    assert ours.__name__ == name
    assert issubclass(ours, theirs)
    assert "__init__" not in vars(ours)
    for method in ("__init__", "step", "add_noise", "get_velocity", "step_pred", "step_correct", "undo_step"):
        assert hasattr(theirs, method) == hasattr(ours, method)
        if hasattr(theirs, method):
            a, b = (inspect.signature(getattr(cls, method)).parameters for cls in (theirs, ours))
            assert [(p.name, p.default, p.kind) for p in a.values()] == [
                (p.name, p.default, p.kind) for p in b.values()
            ]
    original, made = pair(name)
    assert options_of(original) == options_of(made) == options_of(ours.from_config(original.config))
    assert options_of(theirs.from_config(made.diffkern(exact=True, rng="counter", seeds=1).config)) == options_of(made)
    assert set(original.compatibles) == set(made.compatibles)
    assert len(original) == len(made)
    assert original.order == made.order
    assert original.init_noise_sigma == made.init_noise_sigma


@every_name
def test_save_and_load(name: str, tmp_path: Any) -> None:
    _, ours = pair(name)
    ours.save_pretrained(tmp_path)
    assert options_of(getattr(diffusers, name).from_pretrained(tmp_path)) == options_of(ours)
    assert type(type(ours).from_pretrained(tmp_path)) is type(ours)


@every_run
def test_copies_continue_a_run(name: str, config: dict[str, Any], options: dict[str, Any]) -> None:
    _, ours = pair(name, **config)
    whole = run(ours.diffkern(rng="counter", seeds=4), 8, start(), **options)
    times, x, ms = ours.timesteps, start(), outputs(8)
    ours.set_timesteps(8)
    for i in range(8):
        if i == 3:
            ours = pickle.loads(pickle.dumps(ours))
        if i == 5:
            ours = copy.deepcopy(ours)
        x = ours.step(ms[i], times[i], x, **options).prev_sample
        torch.testing.assert_close(x, whole[i].prev_sample, rtol=1e-5, atol=1e-5)


def test_options() -> None:
    _, ours = pair("DDPMScheduler")
    with pytest.raises(ValueError, match="rng must be one of torch, counter, got 'philox'"):
        ours.diffkern(rng="philox")
    with pytest.raises(ValueError, match=r"seeds must be an integer or int64 \[B\], got torch.float32 of shape \[2\]"):
        ours.diffkern(seeds=torch.zeros(2))
    with pytest.raises(ValueError, match=r"seeds must be an integer or int64 \[B\], got str"):
        ours.diffkern(seeds="5")
    with pytest.raises(ValueError, match=r"seeds must be an integer or int64 \[B\], got bool"):
        ours.diffkern(seeds=True)
    x = start()
    ours.diffkern(rng="counter")
    with pytest.raises(ValueError, match=r"needs scheduler.diffkern\(seeds=...\) or a generator given to step"):
        ours.step(x, 500, x)
    with pytest.raises(ValueError, match=r"seeds must hold one seed a sample \(2\), got 3"):
        ours.diffkern(seeds=torch.arange(3)).step(x, 500, x)
    ours._engine.seeds = None
    with pytest.raises(ValueError, match=r"generator must hold one generator a sample \(2\), got 3"):
        ours.step(x, 500, x, generator=[torch.Generator() for _ in range(3)])


# ------------------------------------------------------------------------------------------------------ random numbers
@every_run
def test_torch_noise_is_drawn_as_the_original_draws_it(
    name: str, config: dict[str, Any], options: dict[str, Any]
) -> None:
    original, ours = pair(name, **config)
    states = []
    for scheduler in (original, ours):
        torch.manual_seed(8)
        run(scheduler, 7, start(), seed=None, **options)
        states.append(torch.random.get_rng_state())
    assert torch.equal(*states)
    check_runs(run(original, 7, start(), seed=[1, 2], **options), run(ours, 7, start(), seed=[1, 2], **options))


@every_run
def test_counter_noise_is_batch_invariant(name: str, config: dict[str, Any], options: dict[str, Any]) -> None:
    x, seeds = start((3, 3, 8, 8)), torch.tensor([7, 8, 9])
    _, ours = pair(name, **config)
    together = run(ours.diffkern(rng="counter", seeds=seeds), 6, x, seed=None, **options)
    for b in range(3):
        _, alone = pair(name, **config)
        alone.diffkern(rng="counter", seeds=seeds[b : b + 1])
        alone.set_timesteps(6)
        state = x[b : b + 1]
        for t, m, r in zip(alone.timesteps, outputs(6, (3, 3, 8, 8)), together, strict=True):
            state = alone.step(m[b : b + 1], t, state, **options).prev_sample
            assert torch.equal(state, r.prev_sample[b : b + 1])
    if stochastic(config, options, name):
        other = run(ours.diffkern(seeds=torch.tensor([7, 8, 10])), 6, x, seed=None, **options)[-1].prev_sample
        assert torch.equal(other[:2], together[-1].prev_sample[:2])
        assert not torch.equal(other[2], together[-1].prev_sample[2])


def test_counter_seeds_from_an_integer_and_from_generators() -> None:
    _, ours = pair("DDPMScheduler")
    ours.diffkern(rng="counter")
    x = start()

    def step(**options: Any) -> Tensor:
        return ours.step(x, 500, x, **options).prev_sample

    by_list = step(generator=[torch.Generator().manual_seed(s) for s in (4, 2**64 - 3)])
    by_one = step(generator=torch.Generator().manual_seed(4))
    ours.diffkern(seeds=torch.tensor([4, -3]))
    assert torch.equal(step(), by_list)
    ours.diffkern(seeds=4)
    assert torch.equal(step(), by_one)
    ours.diffkern(seeds=diffkern.seeds(4, 2))
    assert torch.equal(step(), by_one)


# -------------------------------------------------------------------------------------------------------------- plans
@every_run
@pytest.mark.parametrize("exact", [False, True])
def test_plan_runs_the_same_steps(name: str, config: dict[str, Any], options: dict[str, Any], exact: bool) -> None:
    """The scheduler's loop in counter mode and `diffkern.sample` of its plan: the same bits."""
    _, ours = pair(name, **config)
    ours.diffkern(rng="counter", seeds=torch.tensor([5, 6]), exact=exact)
    found = run(ours, 9, start(), seed=None, **options)
    plan = ours.plan(**options)
    assert diffkern.Plan.from_json(plan.to_json()) == plan
    calls = iter(outputs(9))
    seeds = torch.tensor([5, 6]) if not plan.deterministic else None
    asked = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        asked.append(int(t[0]))
        return next(calls)

    x = diffkern.sample(model, start(), plan, seeds=seeds)
    assert asked == ours.timesteps.tolist()
    assert torch.equal(x, found[-1].prev_sample)


def test_learned_variance_is_one_op_and_a_plan() -> None:
    _, ours = pair("DDPMScheduler", variance_type="learned_range")
    seeds = torch.tensor([5, 6])
    ours.diffkern(rng="counter", seeds=seeds).set_timesteps(9)
    x, ms, times = start(), outputs(9, (2, 6, 8, 8)), list(ours.timesteps)
    ours.step(ms[0], times[0], x)
    with torch.no_grad(), Dispatched() as seen:
        for t, m in zip(times, ms, strict=True):
            x = ours.step(m, t, x).prev_sample
    assert seen.ops == {"diffkern.learned_step": 9, "aten.split": 9}  # the split is a view
    plan, calls = ours.plan(), iter(ms)
    assert plan.learned_variance
    assert torch.equal(diffkern.sample(lambda x, t: next(calls), start(), plan, seeds=seeds), x)
    grown = start().requires_grad_()
    ours.step(ms[0], times[0], grown, generator=torch.Generator()).prev_sample.sum().backward()
    assert grown.grad is not None


def test_plan_refuses_what_a_row_can_not_say() -> None:
    _, ours = pair("DDPMScheduler", variance_type="learned")
    with pytest.raises(ValueError, match="a range of it, got variance_type='learned': use step"):
        ours.plan()
    _, ours = pair("UniPCMultistepScheduler", solver_order=4)
    ours.set_timesteps(5)
    with pytest.raises(ValueError, match="solver_order <= 3 and no solver_p, got 4, None"):
        ours.plan()


# -------------------------------------------------------------------------------------------------------- concurrency
@every_run
def test_one_scheduler_serves_several_loops(name: str, config: dict[str, Any], options: dict[str, Any]) -> None:
    """A shallow copy is a loop of its own: it shares the tables and no state."""
    _, ours = pair(name, **config)
    ours.diffkern(rng="counter", seeds=4)
    alone = {steps: run(copy.copy(ours), steps, start(), **options)[-1].prev_sample for steps in (5, 8)}
    loops = []
    for steps in (5, 8):
        loop = copy.copy(ours)
        loop.set_timesteps(steps)
        loops.append([loop, start(), outputs(steps), steps])
    for i in range(8):
        for entry in loops:
            loop, x, ms, steps = entry
            if i < steps:
                entry[1] = loop.step(ms[i], loop.timesteps[i], x, **options).prev_sample
    for _, x, _, steps in loops:
        assert torch.equal(x, alone[steps])
    assert ours.num_inference_steps is None


# ---------------------------------------------------------------------------------------------------- timesteps, shapes
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler"])
def test_forms_of_a_timestep(name: str) -> None:
    import numpy as np

    _, ours = pair(name)
    ours.set_timesteps(10)
    ours.diffkern(rng="counter", seeds=1)
    x, m = start(), start() * 0.5
    at = ours.timesteps[4]
    want = ours.step(m, at, x).prev_sample
    forms = [int(at), torch.tensor(int(at)), at.clone().int(), ours.timesteps[4:5], at.expand(2), np.int64(int(at))]
    forms += [torch.tensor([int(at)] * 2), list(ours.timesteps)[4]]
    for form in forms:
        assert torch.equal(ours.step(m, form, x).prev_sample, want), form


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler"])
@pytest.mark.parametrize("extra", [{}, {"thresholding": True}, {"variance_type": "learned_range"}])
def test_a_timestep_of_its_own_for_each_sample(name: str, extra: dict[str, Any]) -> None:
    if not set(extra) <= set(inspect.signature(getattr(diffusers, name)).parameters):
        pytest.skip(f"{name} has no such option")
    _, ours = pair(name, **extra)
    ours.set_timesteps(10)
    x, t = start((3, 3, 8, 8)), ours.timesteps[[2, 9, 5]]
    m = 0.3 * torch.cat([x, x], 1) if "variance_type" in extra else 0.5 * x
    ours.diffkern(rng="torch")
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    together = ours.step(m, t, x, **({"generator": torch.Generator().manual_seed(2)} if "DDPM" in name else {}))
    for b in range(3):
        if "DDPM" in name:
            ours._engine.noise = lambda *args, b=b: (noise[b : b + 1], None)
        alone = ours.step(m[b : b + 1], t[b], x[b : b + 1])
        assert torch.equal(together.prev_sample[b : b + 1], alone.prev_sample)
        assert torch.equal(together.pred_original_sample[b : b + 1], alone.pred_original_sample)


@every_run
def test_strides_and_ranks(name: str, config: dict[str, Any], options: dict[str, Any]) -> None:
    for shape in ((2, 6), (2, 3, 5), (1, 2, 3, 4, 5), (0, 3, 4, 4)):
        original, ours = pair(name, **config)
        check_shape = [run(s, 5, start(shape), **options)[-1].prev_sample for s in (original, ours)]
        torch.testing.assert_close(*check_shape, rtol=1e-5, atol=1e-5)
    original, ours = pair(name, **config)
    x = start((8, 8, 3, 2)).permute(3, 2, 0, 1)
    check_runs(run(original, 5, x, **options), run(ours, 5, x, **options))


# -------------------------------------------------------------------------------------------------------------- dtypes
@every_run
@pytest.mark.parametrize(
    ("state", "output"),
    [
        ("float16", "float16"),
        ("bfloat16", "bfloat16"),
        ("float32", "float16"),
        ("float16", "float32"),
        ("float64",) * 2,
    ],
)
def test_dtypes(name: str, config: dict[str, Any], options: dict[str, Any], state: str, output: str) -> None:
    original, ours = pair(name, **config)
    x, dtype = start().to(getattr(torch, state)), getattr(torch, output)
    found = run(ours, 5, x, dtype=dtype, **options)
    if name.startswith("UniPC") and len(config) and state == "float16" and output == "float32":
        with pytest.raises(RuntimeError, match="expected scalar type"):  # of order 3
            run(original, 5, x, dtype=dtype, **options)
        assert all(r.prev_sample.dtype == x.dtype and bool(r.prev_sample.isfinite().all()) for r in found)
        return
    theirs = run(original, 5, x, dtype=dtype, **options)
    for a, b in zip(theirs, found, strict=True):
        assert a.prev_sample.dtype == b.prev_sample.dtype
        close = 0.05 * float(a.prev_sample.abs().max())
        torch.testing.assert_close(b.prev_sample.double(), a.prev_sample.double(), rtol=0, atol=close)


@every_run
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_nearer_to_float64(
    name: str, config: dict[str, Any], options: dict[str, Any], dtype: torch.dtype
) -> None:
    """One step from the same half-precision inputs: ours is at least as close to float64 as the original."""
    if stochastic(config, options, name):
        options = {**options, "generator": torch.Generator()}
    errors = [0.0, 0.0]
    for i in range(1, 9):
        x, m = start((4, 3, 16, 16)).to(dtype), outputs(10, (4, 3, 16, 16))[i].to(dtype)
        found = []
        for scheduler, kind in zip(
            (*pair(name, **config), pair(name, **config)[1]), (dtype, dtype, torch.float64), strict=True
        ):
            scheduler.set_timesteps(10)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(i)
            if "generator" in options:
                noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(i)).to(dtype)
                module = inspect.getmodule(
                    type(scheduler).__mro__[2] if kind is dtype and not found else type(scheduler)
                )
                del module
                options["generator"].manual_seed(i)
            if "generator" in options and kind is torch.float64:
                scheduler._engine.noise = lambda *args, noise=noise: (noise.double(), None)
            found.append(scheduler.step(m.to(kind), scheduler.timesteps[i], x.to(kind), **options).prev_sample.double())
        for k in range(2):
            errors[k] += float(((found[k] - found[2]) ** 2).mean())
    assert errors[1] <= errors[0] * 1.0001


# ----------------------------------------------------------------------------------------------------------- work done
@every_run
@pytest.mark.parametrize("rng", ["counter", "torch"])
def test_a_step_is_one_op(name: str, config: dict[str, Any], options: dict[str, Any], rng: str) -> None:
    """All that is dispatched: no zero-dim op, no read of a timestep; with torch's noise, the draw of it as well."""
    _, ours = pair(name, **config)
    ours.diffkern(rng=rng, seeds=torch.tensor([1, 2]))
    run(ours, 6, start(), seed=None, **options)
    ours.set_timesteps(6)
    x, ms, times = start(), outputs(6), list(ours.timesteps)
    with torch.no_grad(), Dispatched() as seen:
        for t, m in zip(times, ms, strict=True):
            x = ours.step(m, t, x, **options).prev_sample
    draws = 0
    if rng == "torch" and stochastic(config, options, name):
        draws = 5 if name == "DDPMScheduler" else 6
    assert seen.ops.pop("aten.randn", 0) == draws
    assert seen.ops == {"diffkern.step": 6}


@pytest.mark.parametrize(
    "name", ["DDPMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]
)
def test_noising_is_one_op(name: str) -> None:
    _, ours = pair(name)
    ours.set_timesteps(10)
    x, t = start(), ours.timesteps[[1, 5]]
    ours.add_noise(x, x, t)
    with Dispatched() as seen:
        ours.add_noise(x, x, t)
    assert seen.ops["diffkern.noising"] == 1
    assert sum(seen.ops.values()) <= 4  # those on [B] timesteps


@every_run
def test_inference_mode_and_a_default_device(name: str, config: dict[str, Any], options: dict[str, Any]) -> None:
    """Tables made in a mode serve outside of it."""
    original, ours = pair(name, **config)
    outside = run(original, 6, start(), **options)
    with torch.inference_mode():
        check_runs(outside, run(ours, 6, start(), **options))
    ours.set_timesteps(6)
    x = start().requires_grad_()
    out = ours.step(start(), ours.timesteps[0], x, **options).prev_sample
    out.sum().backward()
    assert bool(x.grad.isfinite().all())
    _, other = pair(name, **config)
    other.set_timesteps(6)
    other.diffkern(rng="counter", seeds=torch.tensor([1, 2]))
    x, m = start(), start()
    with torch.device("meta"):
        found = other.step(m, other.timesteps[0], x, **options).prev_sample
    other.set_timesteps(6)
    assert torch.equal(found, other.step(m, other.timesteps[0], x, **options).prev_sample)


@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
def test_gradients_flow_as_in_the_original(name: str) -> None:
    found = []
    for scheduler in pair(name):
        scheduler.set_timesteps(10)
        x, m = start().requires_grad_(), (0.1 * start()).requires_grad_()
        out = scheduler.step(m, scheduler.timesteps[6], x, generator=torch.Generator().manual_seed(1))
        (out.prev_sample.square().sum() + out.pred_original_sample.sum()).backward()
        found.append((x.grad, m.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


def test_without_diffusers_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib
    import sys

    for module in [m for m in sys.modules if m.startswith("diffkern.compat.diffusers")]:
        monkeypatch.delitem(sys.modules, module)
    for module in ("diffusers", "diffusers.utils.torch_utils"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=r"needs diffusers: pip install 'diffkern\[diffusers\]'"):
        importlib.import_module("diffkern.compat.diffusers")
