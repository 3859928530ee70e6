"""How compat.guided_diffusion is used: ops dispatched, gradients, overridden methods, copies, replaced tables."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.guided_diffusion_algorithms import Chain
from helpers.guided_diffusion_runs import (
    EXACT,
    ROUNDED,
    VARIANCES,
    change,
    classifier,
    error,
    make,
    network,
    seeded,
    spaced,
    state,
)
from helpers.op_counter import EveryOp
from torch import Tensor

from diffkern.compat import guided_diffusion as gd
from diffkern.compat.guided_diffusion.respace import _WrappedModel


def counted(call: Callable[[], Any]) -> EveryOp:
    call()  # tables are made once
    with EveryOp() as ops:
        call()
    return ops


@pytest.mark.parametrize(
    ("variance", "options", "fused"),
    [
        ("FIXED_SMALL", {}, 1),
        ("LEARNED_RANGE", {}, 1),
        ("LEARNED", {}, 1),
        ("FIXED_LARGE", {"denoised_fn": change}, 2),
        ("LEARNED_RANGE", {"denoised_fn": change}, 3),
        ("FIXED_SMALL", {"cond_fn": "given"}, 1),
        ("LEARNED_RANGE", {"cond_fn": "given"}, 2),
    ],
)
@pytest.mark.parametrize("kind", ["p_sample", "ddim_sample"])
def test_ops_of_a_loop(kind: str, variance: str, options: dict[str, Any], fused: int) -> None:
    """No device read, no upload and no small arithmetic in the loop: one op a step, the draw, views, and copies of the
    state for those who may write into it."""
    if kind == "ddim_sample":  # a variance is not part of it; a function or a gradient takes a second op
        fused = 2 if options else 1
    d = spaced(variance=variance, rescale=True)
    m = state(torch.float32, (2, 6 if variance.startswith("LEARNED") else 3, 4, 5))
    g = state(torch.float32, (2, 3, 4, 5))
    if options.get("cond_fn"):
        options = {"cond_fn": lambda x, t: g}
    if options.get("denoised_fn"):
        options = {"denoised_fn": lambda x: x}
    loop = getattr(d, f"{kind}_loop")
    ops = counted(lambda: loop(lambda x, t: m, (2, 3, 4, 5), device="cpu", **options)).counts
    steps = d.num_timesteps
    assert sum(n for name, n in ops.items() if name.startswith("diffkern.")) == fused * steps
    assert ops["aten.randn_like"] == steps
    views = {"aten.slice", "aten.alias", "aten.unbind", "aten.expand", "aten.unsqueeze", "aten.detach"}
    before = {"aten.randn", "aten.arange", "aten.index", "aten._to_copy", "aten.mul"}
    rest = {name: n for name, n in ops.items() if not name.startswith("diffkern.") and name != "aten.randn_like"}
    assert rest.pop("aten.clone") <= (2 if "cond_fn" in options else 1) * steps + 4
    assert set(rest) <= views | before
    assert all(n <= 2 for name, n in rest.items() if name in before)  # the times, before the loop


def test_ops_of_a_call() -> None:
    """A step at timesteps of a tensor: the map of the times, the draw, one op; state and times are copied."""
    d = spaced(variance="LEARNED_RANGE")
    x, m, t = state(torch.float32), state(torch.float32, (4, 4, 3, 5)), torch.tensor([9, 0, 4, 1])
    ops = counted(lambda: d.p_sample(lambda x, t: m, x, t)).counts
    assert ops == {"aten.clone": 2, "aten.index": 1, "aten.randn_like": 1, "diffkern.learned_step": 1}
    ops = counted(lambda: d.ddim_reverse_sample(lambda x, t: m, x, t)).counts
    assert ops == {"aten.clone": 2, "aten.index": 1, "aten.slice": 1, "diffkern.step": 1}
    assert counted(lambda: d.q_sample(x, t, x)).counts == {"diffkern.noising": 1}


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("kind", ["p_sample", "ddim_sample", "ddim_reverse_sample"])
def test_differentiable(kind: str, variance: str) -> None:
    d = make(variance=variance).diffkern(exact=True)
    chain, t, z = Chain(d.betas, variance=variance), torch.tensor([0, 1, 50, 99]), state(seed=7)
    grads = []
    for which in range(2):
        x = state().requires_grad_()
        model = network(variance)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda x: z)
            if which == 0:
                cond = None if "reverse" in kind else classifier
                options = {} if "reverse" in kind else {"cond_fn": cond}
                out = getattr(d, kind)(model, x, t, clip_denoised=False, **options)["sample"]
            elif kind == "p_sample":
                out = chain.ddpm(model, x, t, z, False, None, classifier)[0]
            elif kind == "ddim_sample":
                out = chain.ddim(model, x, t, z, False, None, classifier)[0]
            else:
                out = chain.ddim_reverse(model, x, t, False)[0]
        grads.append(torch.autograd.grad((out * state(seed=9)).sum(), [x])[0])
    assert error(grads[0], grads[1]) <= 1e-11


def test_gradients_are_on_between_steps() -> None:
    """The original leaves them off in the caller's code."""
    for out in spaced().p_sample_loop_progressive(lambda x, t: x, (1, 2, 3, 4), device="cpu"):
        assert torch.is_grad_enabled()
        assert not out["sample"].requires_grad


def test_a_step_continues_from_what_it_is_given() -> None:
    """Users write into the dictionary, for inpainting."""
    d, seen = spaced(), []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append(x)
        return x

    for i, out in enumerate(d.ddim_sample_loop_progressive(model, (1, 2, 3, 4), device="cpu")):
        out["sample"] = torch.full((1, 2, 3, 4), float(i))
    assert [float(x[0, 0, 0, 0]) for x in seen[1:]] == [float(i) for i in range(9)]


def test_functions_see_the_times_of_the_long_chain() -> None:
    for rescale in (False, True):
        d = spaced("5", 500, rescale=rescale)
        seen: dict[str, list[Tensor]] = {"model": [], "cond": []}

        def model(x: Tensor, t: Tensor, y: int, seen: dict[str, list[Tensor]] = seen) -> Tensor:
            assert y == 3
            seen["model"].append(t)
            return x

        def cond(x: Tensor, t: Tensor, y: int, seen: dict[str, list[Tensor]] = seen) -> Tensor:
            assert y == 3
            seen["cond"].append(t)
            return x

        d.p_sample_loop(model, (2, 2, 3, 4), cond_fn=cond, model_kwargs={"y": 3}, device="cpu")
        d.ddim_sample(model, state(), torch.tensor([4, 3, 2, 1]), cond_fn=cond, model_kwargs={"y": 3})
        want = [[float(d.timestep_map[i]) * (2.0 if rescale else 1.0)] * 2 for i in (4, 3, 2, 1, 0)]
        want.append([value[0] for value in want[:4]])
        for times in seen.values():
            assert [t.tolist() for t in times] == want
            assert all(t.dtype == (torch.float32 if rescale else torch.int64) for t in times)
    plain = make(rescale=True)
    assert plain._scale_timesteps(torch.tensor([3])).tolist() == [30.0]
    wrapped = d._wrap_model(model)
    assert isinstance(wrapped, _WrappedModel)
    assert d._wrap_model(wrapped) is wrapped
    own = _WrappedModel(lambda x, t: t, [0, 7, 9], False, 10)
    assert own(None, torch.tensor([2, 1])).tolist() == [9, 7]


def test_overridden_methods_are_called() -> None:
    """A subclass, or the object, that replaces a part of the step: p_mean_variance, condition_mean, p_sample."""
    x, t = state(), torch.tensor([9, 0, 4, 1])

    class Halved(gd.SpacedDiffusion):
        def p_mean_variance(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            out = super().p_mean_variance(*args, **kwargs)
            return {**out, "mean": out["mean"] / 2, "pred_xstart": out["pred_xstart"] / 2}

    class Unmoved(gd.SpacedDiffusion):
        def condition_mean(self, cond_fn: Any, p_mean_var: dict[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
            return p_mean_var["mean"]

        def condition_score(self, cond_fn: Any, p_mean_var: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
            return p_mean_var

    class Counted(gd.SpacedDiffusion):
        calls = 0

        def p_sample(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            type(self).calls += 1
            return super().p_sample(*args, **kwargs)

    def diffusion(cls: Any) -> Any:
        betas = gd.get_named_beta_schedule("linear", 1000)
        return make(variance="LEARNED_RANGE", betas=betas, cls=cls, use_timesteps=gd.space_timesteps(1000, "10"))

    model, plain = network("LEARNED_RANGE"), spaced(variance="LEARNED_RANGE")
    zero = lambda x: torch.zeros_like(x)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", zero)
        want, found = (d.p_sample(model, x, t)["sample"] for d in (plain, diffusion(Halved)))
        assert error(found, want / 2) <= 1e-12
        x0 = diffusion(Halved).ddim_sample(model, x, t)["pred_xstart"]
        assert error(x0, plain.ddim_sample(model, x, t)["pred_xstart"] / 2) <= 1e-12
        chain = Chain(plain.betas)
        half = chain.ddim_reverse(lambda *args: chain.eps(x0, x, t), x, t, False)[0]
        assert error(diffusion(Halved).ddim_reverse_sample(model, x, t)["sample"], half) <= ROUNDED
        for kind in ("p_sample", "ddim_sample"):
            want, found = (
                getattr(d, kind)(model, x, t, cond_fn=classifier)["sample"] for d in (plain, diffusion(Unmoved))
            )
            assert error(found, getattr(plain, kind)(model, x, t)["sample"]) <= 1e-12
            assert error(found, want) > 1e-4
        own = diffusion(gd.SpacedDiffusion)
        own.p_mean_variance = diffusion(Halved).p_mean_variance
        assert error(own.p_sample(model, x, t)["sample"], plain.p_sample(model, x, t)["sample"] / 2) <= 1e-12
    counting = diffusion(Counted)
    one, other = (seeded(lambda d=d: d.p_sample_loop(model, (2, 3, 4, 5), device="cpu"))[0] for d in (plain, counting))
    assert Counted.calls == 10
    assert error(other, one) <= 2e-5


USES: dict[str, tuple[str, ...]] = {
    "q_posterior_mean_variance": ("p_mean_variance", "p_sample", "p_sample_loop", "calc_bpd_loop"),
    "_predict_xstart_from_eps": ("p_mean_variance", "p_sample", "ddim_sample", "condition_score", "ddim_sample_loop"),
    "_predict_xstart_from_xprev": ("p_mean_variance", "p_sample", "ddim_sample", "calc_bpd_loop"),
    "_predict_eps_from_xstart": ("ddim_sample", "condition_score", "ddim_sample_loop", "calc_bpd_loop"),
    "_vb_terms_bpd": ("training_losses", "calc_bpd_loop"),
    "q_sample": ("training_losses", "calc_bpd_loop"),
}
"""Which methods go by which in the original (EPSILON, or PREVIOUS_X with the squared error and a learned variance)."""


@pytest.mark.parametrize("part", USES)
@pytest.mark.parametrize("cls", [gd.GaussianDiffusion, gd.SpacedDiffusion])
def test_parts_that_are_overridden(cls: Any, part: str) -> None:
    """They are called, and what they return is what counts."""

    def replaced(factor: float) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            called.append(part)
            found = getattr(cls, part)(self, *args, **kwargs)
            if isinstance(found, tuple):
                return (found[0] * factor, *found[1:])
            return found * factor if isinstance(found, Tensor) else {**found, "output": found["output"] * factor}

        keep = {"use_timesteps": range(6)} if cls is gd.SpacedDiffusion else {}
        previous = part in ("_predict_xstart_from_xprev", "_vb_terms_bpd", "q_sample")
        kind = ("PREVIOUS_X" if previous else "EPSILON", "LEARNED_RANGE" if previous else "FIXED_SMALL")
        made = type("Own", (cls,), {part: method} if factor else {})
        return make(*kind, betas=np.linspace(0.05, 0.4, 6), cls=made, **keep), network(kind[1])

    x, t, called = state(), torch.tensor([5, 0, 3, 1]), []
    moments = {"pred_xstart": 0.5 * x, "mean": x, "variance": torch.ones_like(x)}
    calls: dict[str, Callable[[Any, Any], Any]] = {
        "p_mean_variance": lambda d, model: d.p_mean_variance(model, x, t),
        "p_sample": lambda d, model: d.p_sample(model, x, t),
        "ddim_sample": lambda d, model: d.ddim_sample(model, x, t),
        "condition_score": lambda d, model: d.condition_score(classifier, moments, x, t),
        "p_sample_loop": lambda d, model: {"": d.p_sample_loop(model, x.shape, noise=x, device="cpu")},
        "ddim_sample_loop": lambda d, model: {"": d.ddim_sample_loop(model, x.shape, noise=x, device="cpu")},
        "training_losses": lambda d, model: d.training_losses(model, x.tanh(), t, noise=x.flip(0)),
        "calc_bpd_loop": lambda d, model: d.calc_bpd_loop(model, x.tanh()),
    }
    for use in USES[part]:
        want, same, other = (seeded(lambda f=f: calls[use](*replaced(f)))[0] for f in (0.0, 1.0, 0.9))  # noqa: B023
        assert called, use
        called.clear()
        gaps = {key: error(other[key], value) for key, value in want.items()}
        assert max(gaps.values()) > 1e-3, use
        assert all(error(same[key], value) <= 1e-4 for key, value in want.items()), use


def test_target_of_an_overridden_posterior() -> None:
    """PREVIOUS_X is trained towards the posterior mean that the class says, of the x_t that it says."""

    class Own(gd.GaussianDiffusion):
        def q_posterior_mean_variance(self, *args: Any, **kwargs: Any) -> Any:
            mean, *others = super().q_posterior_mean_variance(*args, **kwargs)
            return 0.5 * mean, *others

    d, x, z, t = make("PREVIOUS_X", cls=Own), state(), state(seed=7), torch.tensor([9, 0, 4, 1])
    target = d.q_posterior_mean_variance(x, d.q_sample(x, t, z), t)[0]
    found = d.training_losses(lambda x, t: torch.zeros_like(x), x, t, noise=z)["mse"]
    assert error(found, target.square().flatten(1).mean(1)) <= EXACT


def test_methods_replaced_later_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    x, t, model = state(), torch.tensor([9, 0, 4, 1]), network()
    d = make()
    d.ddim_sample(model, x, t)
    original = gd.GaussianDiffusion.p_mean_variance

    def halved(self: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        out = original(self, *args, **kwargs)
        return {**out, "pred_xstart": out["pred_xstart"] / 2}

    want = d.ddim_sample(model, x, t)["pred_xstart"] / 2
    monkeypatch.setattr(gd.GaussianDiffusion, "p_mean_variance", halved)
    assert error(d.ddim_sample(model, x, t)["pred_xstart"], want) <= 1e-14
    monkeypatch.undo()
    assert error(d.ddim_sample(model, x, t)["pred_xstart"], 2 * want) <= 1e-14


def test_tables_that_are_replaced_are_seen() -> None:
    x, t, model = state(), torch.tensor([9, 0, 4, 1]), network()
    d, other = make(), make(betas=gd.get_named_beta_schedule("cosine", 100))
    before = d.ddim_sample(model, x, t)["sample"]
    for name in [name for name, value in vars(other).items() if isinstance(value, np.ndarray)]:
        setattr(d, name, getattr(other, name))
    assert torch.equal(d.ddim_sample(model, x, t)["sample"], other.ddim_sample(model, x, t)["sample"])
    assert not torch.equal(d.ddim_sample(model, x, t)["sample"], before)
    d.model_mean_type = gd.ModelMeanType.START_X
    want = make("START_X", betas=other.betas).ddim_sample(model, x, t)["sample"]
    assert torch.equal(d.ddim_sample(model, x, t)["sample"], want)


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_copies(clone: Callable[[Any], Any]) -> None:
    d, x, t = spaced(), state(), torch.tensor([9, 0, 4, 1])
    want = d.ddim_sample(network(), x, t)["sample"]
    other = clone(d)
    assert "_dk_known" not in vars(other)
    assert torch.equal(other.ddim_sample(network(), x, t)["sample"], want)
    other.diffkern(exact=True)
    assert not torch.equal(other.ddim_sample(network(), x, t)["sample"], want)
    assert torch.equal(d.ddim_sample(network(), x, t)["sample"], want)


def test_inference_mode_and_training_take_turns() -> None:
    d, x, t = make(variance="LEARNED_RANGE"), state(torch.float32), torch.tensor([9, 0, 4, 1])
    with torch.inference_mode():
        d.p_sample(network("LEARNED_RANGE"), x, t)
        d.training_losses(network("LEARNED_RANGE"), x, t)
    m = network("LEARNED_RANGE")(x, t).requires_grad_()
    d.training_losses(lambda *args: m, x, t)["loss"].sum().backward()
    assert float(m.grad.abs().max()) > 0


def test_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tqdm")
    d = spaced()
    assert d.p_sample_loop(lambda x, t: x, (1, 2, 3, 4), device="cpu", progress=True).shape == (1, 2, 3, 4)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="progress=True needs tqdm: pip install tqdm"):
        d.ddim_sample_loop(lambda x, t: x, (1, 2, 3, 4), device="cpu", progress=True)
