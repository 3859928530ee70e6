"""compat.guided_diffusion's steps and loops beside our transcription of the papers."""

from __future__ import annotations

import copy
import math
import pickle
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from guided_diffusion_algorithms import Chain
from guided_diffusion_runs import MEANS, VARIANCES, change, classifier, error, network, seeded, state
from op_counter import EveryOp
from torch import Tensor

from diffkern.compat import guided_diffusion as gd
from diffkern.compat.guided_diffusion.respace import _WrappedModel

EXACT = 1e-12
ROUNDED = 1e-5
"""What float32's rounding of the tables comes to, relative to the largest element."""


def make(
    mean: str = "EPSILON",
    variance: str = "FIXED_SMALL",
    betas: Any = None,
    cls: type[gd.GaussianDiffusion] = gd.GaussianDiffusion,
    rescale: bool = False,
    **options: Any,
) -> Any:
    return cls(
        betas=gd.get_named_beta_schedule("linear", 100) if betas is None else betas,
        model_mean_type=gd.ModelMeanType[mean],
        model_var_type=gd.ModelVarType[variance],
        loss_type=gd.LossType.MSE,
        rescale_timesteps=rescale,
        **options,
    )


def spaced(keep: Any = "10", T: int = 1000, **options: Any) -> Any:
    betas = gd.get_named_beta_schedule("linear", T)
    return make(betas=betas, cls=gd.SpacedDiffusion, use_timesteps=gd.space_timesteps(T, keep), **options)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------- numbers
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_steps(mean: str, variance: str, exact: bool) -> None:
    d, model = make(mean, variance).diffkern(exact=exact), network(variance)
    chain = Chain(d.betas, mean, variance)
    x, t, z = state(), torch.tensor([0, 1, 50, 99]), state(seed=7)
    limit = EXACT if exact else ROUNDED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: z)
        for clip, fn, cond in product((True, False), (None, change), (None, classifier)):
            pairs = [(d.p_sample(model, x, t, clip, fn, cond), chain.ddpm(model, x, t, z, clip, fn, cond))]
            for eta in (0.0, 0.6, 1.0):
                found = d.ddim_sample(model, x, t, clip, fn, cond, eta=eta)
                pairs.append((found, chain.ddim(model, x, t, z, clip, fn, cond, eta)))
            if cond is None:
                found = d.ddim_reverse_sample(model, x, t, clip, fn)
                pairs.append((found, chain.ddim_reverse(model, x, t, clip, fn)))
            for found, (sample, x0) in pairs:
                assert error(found["sample"], sample) <= limit
                assert error(found["pred_xstart"], x0) <= limit


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_moments(mean: str, variance: str) -> None:
    """p_mean_variance, and what guidance makes of it."""
    d, model = make(mean, variance).diffkern(exact=True), network(variance)
    chain, x, t = Chain(d.betas, mean, variance), state(), torch.tensor([0, 1, 50, 99])
    for clip, fn in product((True, False), (None, change)):
        found = d.p_mean_variance(model, x, t, clip, fn)
        x0, v, mu = chain.call(model, x, t, clip, fn)
        want = {
            "mean": mu,
            "variance": chain.variance(v, t, x),
            "log_variance": chain.log_variance(v, t, x),
            "pred_xstart": x0,
        }
        assert list(found) == list(want)
        for key, value in want.items():
            assert found[key].shape == x.shape
            assert error(found[key], value) <= EXACT, key
        moved = d.condition_mean(classifier, found, x, t)
        assert error(moved, mu + want["variance"] * classifier(x, t)) <= EXACT
        scored = d.condition_score(classifier, found, x, t)
        sigma = (1 - chain.at(chain.abar, t, x)).sqrt()
        x0 = Chain(d.betas).x0(x, chain.eps(x0, x, t) - sigma * classifier(x, t), t)
        assert error(scored["pred_xstart"], x0) <= EXACT
        assert error(scored["mean"], chain.posterior_mean(x0, x, t)) <= EXACT
        assert scored["variance"] is found["variance"]


def test_conversions() -> None:
    d = make().diffkern(exact=True)
    x, y, t = state(), state(seed=2), torch.tensor([0, 1, 50, 99])
    chain, abar = Chain(d.betas), torch.from_numpy(d.alphas_cumprod)[t].reshape(-1, 1, 1, 1)
    mean, variance, log_variance = d.q_mean_variance(x, t)
    assert error(mean, abar.sqrt() * x) <= EXACT
    assert error(variance, (1 - abar).expand(x.shape)) <= EXACT
    assert error(log_variance, (1 - abar).log().expand(x.shape)) <= EXACT
    assert error(d.q_sample(x, t, y), chain.noised(x, t, y)) <= EXACT
    mean, variance, log_variance = d.q_posterior_mean_variance(x, y, t)
    assert error(mean, chain.posterior_mean(x, y, t)) <= EXACT
    assert error(variance, chain.variance(None, t, x)) <= EXACT
    assert error(log_variance, chain.log_variance(None, t, x)) <= EXACT
    assert error(d._predict_xstart_from_eps(x, t, y), chain.x0(x, y, t)) <= EXACT
    assert error(d._predict_eps_from_xstart(x, t, y), chain.eps(y, x, t)) <= EXACT
    assert error(d._predict_xstart_from_xprev(x, t, y), Chain(d.betas, "PREVIOUS_X").x0(x, y, t)) <= EXACT


@pytest.mark.parametrize("kind", ["p_sample", "ddim_sample"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_loops(variance: str, kind: str) -> None:
    """Whole trajectories of a respaced chain, whose model sees the times of the long one."""
    d, model = spaced(variance=variance, rescale=True).diffkern(exact=True), network(variance)
    chain = Chain(d.betas, "EPSILON", variance)
    start = state(shape=(2, 3, 4, 5))
    options = {"eta": 0.5} if kind == "ddim_sample" else {}
    for cond in (None, classifier):
        loop = getattr(d, f"{kind}_loop_progressive")
        torch.manual_seed(5)
        found = [out["sample"] for out in loop(model, start.shape, start, cond_fn=cond, device="cpu", **options)]
        torch.manual_seed(5)
        x = start
        for i in range(10)[::-1]:
            t, z = torch.full((2,), i), torch.randn_like(x)
            time = torch.full((2,), float(d.timestep_map[i]))  # rescaled by 1000/1000
            moved = None if cond is None else lambda x, t, time=time: classifier(x, time)
            step = chain.ddpm if kind == "p_sample" else chain.ddim
            x = step(lambda x, t, time=time: model(x, time), x, t, z, True, None, moved, **options)[0]
            assert error(found[9 - i], x) <= (10 - i) * EXACT
        torch.manual_seed(5)
        last = getattr(d, f"{kind}_loop")(model, [2, 3, 4, 5], start, cond_fn=cond, device="cpu", **options)
        assert torch.equal(last, found[-1])


def test_loop_draws_as_the_original() -> None:
    """x_T of the shape, then one draw a step, also at t = 0 and eta = 0; reverse steps draw nothing."""
    d = spaced()
    model = torch.nn.Conv2d(3, 3, 1)
    for kind in ("p_sample", "ddim_sample"):
        _, found = seeded(
            lambda kind=kind: getattr(d, f"{kind}_loop")(lambda x, t: model(x), (2, 3, 4, 5), device="cpu")
        )
        _, want = seeded(lambda: [torch.randn(2, 3, 4, 5) for _ in range(11)])
        assert torch.equal(found, want)
    order: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: order.append("noise") or torch.zeros_like(x))

        def note(what: str) -> Callable[..., Tensor]:
            return lambda x, *args: order.append(what) or x

        for kind, variance in product(("p_sample", "ddim_sample"), ("FIXED_SMALL", "LEARNED")):
            order.clear()
            doubled = lambda x, t, variance=variance: torch.cat([x, x], 1) if variance == "LEARNED" else x  # noqa: E731
            step = getattr(make(variance=variance), kind)
            step(doubled, state(), torch.tensor([9, 0, 4, 1]), True, note("change"), note("gradient"))
            between = ["noise", "gradient"] if kind == "p_sample" else ["gradient", "noise"]
            assert order == ["change", *between]
    t = torch.tensor([0, 4])
    _, found = seeded(lambda: d.ddim_reverse_sample(lambda x, t: x, state(shape=(2, 3, 4, 5)), t))
    _, want = seeded(lambda: None)
    assert torch.equal(found, want)


@pytest.mark.parametrize("variance", ["FIXED_SMALL", "LEARNED_RANGE"])
@pytest.mark.parametrize("mean", MEANS)
@pytest.mark.parametrize("kind", ["p_sample", "ddim_sample"])
def test_noise_in_the_order_of_the_model(kind: str, mean: str, variance: str) -> None:
    """A sum has its first term's memory format, and the next noise is drawn in that order: same seed, same image."""
    d = make(mean, variance, betas=np.linspace(0.05, 0.4, 4)).diffkern(exact=True)
    chain = Chain(d.betas, mean, variance)
    step = chain.ddpm if kind == "p_sample" else chain.ddim
    orders = ([0, 1, 2, 3], [0, 2, 3, 1], [1, 0, 2, 3], [0, 3, 1, 2])  # contiguous, channels_last, and two others
    for of_x, of_model, fn, cond in product(orders, orders, (None, change), (None, classifier)):
        start = state().permute(of_x).contiguous().permute([of_x.index(d) for d in range(4)])

        def model(x: Tensor, t: Tensor, of_model: list[int] = of_model) -> Tensor:
            return network(variance)(x, t).permute(of_model).contiguous().permute([of_model.index(d) for d in range(4)])

        torch.manual_seed(5)
        want = start
        for i in range(4)[::-1]:
            want = step(model, want, torch.full((4,), i), torch.randn_like(want), True, fn, cond)[0]
        after = torch.get_rng_state()
        torch.manual_seed(5)
        loop = getattr(d, f"{kind}_loop")
        found = loop(model, start.shape, noise=start, denoised_fn=fn, cond_fn=cond, device="cpu")
        assert torch.equal(torch.get_rng_state(), after)
        assert error(found, want) <= EXACT
        assert found.stride() == want.stride()


def test_device_of_the_model() -> None:
    """Without device: that of the model's parameters."""

    class Net(torch.nn.Conv2d):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x)

    out = spaced().ddim_sample_loop(Net(3, 3, 1), (1, 3, 4, 4))
    assert out.shape == (1, 3, 4, 4)
    assert not out.requires_grad


@pytest.mark.parametrize("shape", [(4, 6), (4, 2, 7), (4, 2, 3, 2, 3), (1, 3, 1, 1)])
def test_shapes(shape: tuple[int, ...]) -> None:
    x, z, t = state(shape=shape), state(shape=shape, seed=7), torch.tensor([5, 0, 99, 1])[: shape[0]]
    for variance in VARIANCES:
        d, model = make(variance=variance).diffkern(exact=True), network(variance)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda x: z)
            found = d.p_sample(model, x, t)["sample"]
        assert error(found, Chain(d.betas, variance=variance).ddpm(model, x, t, z)[0]) <= EXACT


def test_layouts() -> None:
    """Strided states, whose order decides which element gets which draw."""
    d, model = make(variance="LEARNED_RANGE"), network("LEARNED_RANGE")
    t = torch.tensor([5, 0, 99, 1])
    for x in (
        state().to(memory_format=torch.channels_last),
        state(shape=(4, 3, 2, 5)).transpose(1, 2),
        state()[:, :, ::2],
    ):
        torch.manual_seed(3)
        z = torch.randn_like(x)
        torch.manual_seed(3)
        found = d.p_sample(model, x, t)["sample"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda x, z=z: z.contiguous())
            want = d.p_sample(model, x.contiguous(), t)["sample"]
        assert error(found, want) <= 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variance", VARIANCES)
def test_dtypes(variance: str, dtype: torch.dtype) -> None:
    """The arithmetic is float32 or wider, and as close to float64 as plain torch in that dtype."""
    x, t, z = state(dtype), torch.tensor([0, 1, 50, 99]), state(dtype, seed=7)
    m = network(variance)(state(), t)
    d = make(variance=variance)
    chain = Chain(d.betas, variance=variance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda x: z.to(x.dtype))
        for kind, plain in (("p_sample", chain.ddpm), ("ddim_sample", chain.ddim)):
            found = getattr(d, kind)(lambda *args: m.to(dtype), x, t)
            assert {value.dtype for value in found.values()} == {torch.float32}
            clean = getattr(make("START_X", variance), kind)(lambda *args: m.to(dtype), x, t)
            assert (clean["sample"].dtype, clean["pred_xstart"].dtype) == (torch.float32, dtype)
            changed = getattr(make("START_X", variance), kind)(lambda *args: m.to(dtype), x, t, denoised_fn=change)
            assert (changed["sample"].dtype, changed["pred_xstart"].dtype) == (torch.float32, dtype)
            exact = plain(lambda *args: m.to(dtype).double(), x.double(), t, z.double())
            rough = plain(lambda *args: m.to(dtype), x, t, z)
            for key, a, b in zip(("sample", "pred_xstart"), exact, rough, strict=True):
                assert error(found[key], a) <= error(b, a) + 1e-5
        moments = make("START_X", variance).p_mean_variance(lambda *args: m.to(dtype), x, t)
        assert moments["pred_xstart"].dtype == dtype
        assert moments["mean"].dtype == torch.float32
        assert moments["variance"].dtype == (dtype if variance == "LEARNED" else torch.float32)
        given = {"mean": x, "variance": x}
        assert d.condition_mean(lambda x, t: x, given, x, t).dtype == torch.float32


def test_timesteps_of_other_integers() -> None:
    x, t, model = state(), torch.tensor([5, 0, 99, 1]), network()
    d = make()
    for call in (lambda t: d.ddim_sample(model, x, t)["sample"], lambda t: d.q_sample(x, t, x)):
        assert torch.equal(call(t.int()), call(t))
    assert torch.equal(d.q_sample(x, t[2], x), d.q_sample(x, t[2].expand(4), x))
    assert torch.equal(d.q_sample(x, t[2:3], x), d.q_sample(x, t[2].expand(4), x))


# ------------------------------------------------------------------------------------------------------- op counts
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
    """No device read, no upload and no small arithmetic in the loop: one op a step, the draw, and views."""
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
    before = {"aten.randn", "aten.arange", "aten.clone", "aten.index", "aten._to_copy", "aten.mul"}
    rest = {name: n for name, n in ops.items() if not name.startswith("diffkern.") and name != "aten.randn_like"}
    assert set(rest) <= views | before
    assert all(n <= 2 for name, n in rest.items() if name in before)  # the times, before the loop


def test_ops_of_a_call() -> None:
    """A step at timesteps of a tensor: the map of the times, the draw, one op."""
    d = spaced(variance="LEARNED_RANGE")
    x, m, t = state(torch.float32), state(torch.float32, (4, 4, 3, 5)), torch.tensor([9, 0, 4, 1])
    ops = counted(lambda: d.p_sample(lambda x, t: m, x, t)).counts
    assert ops == {"aten.index": 1, "aten.randn_like": 1, "diffkern.learned_step": 1}
    ops = counted(lambda: d.ddim_reverse_sample(lambda x, t: m, x, t)).counts
    assert ops == {"aten.index": 1, "aten.slice": 1, "diffkern.step": 1}
    assert counted(lambda: d.q_sample(x, t, x)).counts == {"diffkern.noising": 1}


# ------------------------------------------------------------------------------------------------------- behaviour
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


# ------------------------------------------------------------------------------------------------------- edges
def test_one_timestep() -> None:
    """The original fails for want of a second variance."""
    for variance in VARIANCES:
        for d in (make(variance=variance, betas=[0.02]), spaced("1", variance=variance)):
            out = d.p_sample_loop(network(variance), (2, 2, 3, 4), device="cpu")
            assert out.isfinite().all()
            loss = d.training_losses(network(variance), out.clamp(-1, 1), torch.zeros(2, dtype=torch.int64))["loss"]
            assert loss.isfinite().all()


def test_pure_noise_at_the_end() -> None:
    """abar = 0 at t = T - 1: the original has 0 times infinity."""
    betas = gd.get_named_beta_schedule("linear", 20)[:10].copy()
    betas[-1] = 1.0
    for mean, eta in product(MEANS, (0.0, 1.0)):
        d = make(mean, betas=betas)
        assert d.ddim_sample_loop(network(), (2, 2, 3, 4), device="cpu", eta=eta).isfinite().all()
        assert d.p_sample_loop(network(), (2, 2, 3, 4), device="cpu").isfinite().all()
        assert d.ddim_reverse_sample(network(), state(), torch.full((4,), 9))["sample"].isfinite().all()


def test_eta_above_one() -> None:
    """Where nothing is left for eps the original has the root of a negative number."""
    out = spaced().ddim_sample(network(), state(), torch.tensor([9, 0, 4, 1]), eta=1.5)
    assert out["sample"].isfinite().all()


def test_tiny_betas() -> None:
    """1 - abar is 0 in float32: the original divides 0 by 0."""
    for eta in (0.0, 1.0):
        d = make(betas=np.full(5, 1e-9))
        found = d.ddim_sample(network(), state(), torch.tensor([4, 0, 2, 1]), eta=eta)["sample"]
        assert found.isfinite().all()


def test_gradients_of_other_shapes() -> None:
    d, x, t = make(), state(), torch.tensor([9, 0, 4, 1])
    for kind in ("p_sample", "ddim_sample"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", torch.zeros_like)
            want = getattr(d, kind)(network(), x, t, cond_fn=lambda x, t: torch.full_like(x, 0.5))
            for gradient in (torch.full((4, 1, 1, 1), 0.5), torch.tensor(0.5)):
                found = getattr(d, kind)(network(), x, t, cond_fn=lambda x, t, g=gradient: g)
                assert error(found["sample"], want["sample"]) <= 1e-14


# ------------------------------------------------------------------------------------------------------- bad input
def test_bad_input() -> None:
    x, t, model = state(), torch.tensor([9, 0, 4, 1]), network()
    d = make()
    for betas, message in (
        ([[0.1]], r"betas must be 1-D and not empty, got shape \[1, 1\]"),
        ([], "betas must be 1-D and not empty"),
        ([0.1, 0.0], r"betas must lie in \(0, 1\], got 0.0 at 1"),
        ([0.1, math.nan], r"betas must lie in \(0, 1\], got nan at 1"),
        ([1.1], r"betas must lie in \(0, 1\], got 1.1 at 0"),
    ):
        with pytest.raises(AssertionError, match=message):
            make(betas=betas)
    with pytest.raises(AssertionError, match=r"t must have shape \[4\] \(one timestep a sample\), got \[2\]"):
        d.p_sample(model, x, t[:2])
    with pytest.raises(AssertionError, match=r"t must have shape \[4\]"):
        d.p_mean_variance(model, x, t[0])
    with pytest.raises(AssertionError, match=r"model must return a tensor of shape \[4, 2, 3, 5\].*got shape \[4, 4"):
        d.ddim_sample(network("LEARNED"), x, t)
    with pytest.raises(AssertionError, match=r"model must return a tensor of shape \[4, 4, 3, 5\].*got shape \[4, 2"):
        make(variance="LEARNED").p_sample(model, x, t)
    with pytest.raises(AssertionError, match="got NoneType"):
        d.p_sample(lambda x, t: None, x, t)
    with pytest.raises(AssertionError, match="eta must be 0"):
        d.ddim_reverse_sample(model, x, t, eta=0.5)
    with pytest.raises(AssertionError, match="shape must be a tuple or a list, got str"):
        d.p_sample_loop(model, "4", device="cpu")
    for bad in (torch.tensor([9, 0, 100, 1]), torch.tensor([9, 0, -1, 1])):
        for call in (
            lambda bad: d.p_sample(model, x, bad),
            lambda bad: d.ddim_sample(model, x, bad),
            lambda bad: make(variance="LEARNED").p_sample(network("LEARNED"), x, bad),
            lambda bad: d.q_sample(x, bad),
            lambda bad: d._vb_terms_bpd(model, x, x, bad),
        ):
            with pytest.raises(IndexError, match=r"t must lie in 0\.\.99, got"):
                call(bad)
    for kind in ("p_sample", "ddim_sample"):
        with pytest.raises(TypeError, match="cond_fn must return a tensor, got NoneType"):
            getattr(d, kind)(model, x, t, cond_fn=lambda x, t: None)
    with pytest.raises(IndexError, match=r"t must be int64 or int32 timesteps, got torch\.float32"):
        d.q_sample(x, t.float())
    for name, call in (
        ("noise", lambda: d.q_sample(x, t, x[:, :1])),
        ("x_start", lambda: d.q_posterior_mean_variance(x[:, :1], x, t)),
        ("x_t", lambda: d._predict_xstart_from_eps(x, t, x[:, :1])),
        ("x_t", lambda: d._predict_xstart_from_xprev(x, t, x[:, :1])),
    ):
        with pytest.raises(AssertionError, match=f"{name} must have the shape of"):
            call()
    for mean, variance, message in (
        ("v", "FIXED_SMALL", "model_mean_type must be"),
        ("EPSILON", "v", "model_var_type must be"),
    ):
        wrong = make()
        wrong.model_mean_type = getattr(gd.ModelMeanType, mean, mean)
        wrong.model_var_type = getattr(gd.ModelVarType, variance, variance)
        with pytest.raises(NotImplementedError, match=message):
            wrong.p_sample(model, x, t)


def test_bad_spacing() -> None:
    with pytest.raises(ValueError, match="cannot keep exactly 8 of 20 steps"):
        gd.space_timesteps(20, "ddim8")
    with pytest.raises(ValueError, match="cannot divide section of 5 steps into 6"):
        gd.space_timesteps(10, [1, 6])
    for counts in ([], [3, -1]):
        with pytest.raises(ValueError, match="section_counts must be numbers >= 0"):
            gd.space_timesteps(10, counts)
    for keep in ({0, 100}, {-1}, set()):
        with pytest.raises(ValueError, match=r"use_timesteps must be some of 0\.\.99, got"):
            make(cls=gd.SpacedDiffusion, use_timesteps=keep)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="schedule_name must be 'linear' or 'cosine', got 'sigmoid'"):
        gd.get_named_beta_schedule("sigmoid", 10)


def test_spacing() -> None:
    assert gd.space_timesteps(300, [10, 15, 20]) >= {0, 99, 100, 199, 200, 299}
    assert len(gd.space_timesteps(300, "10,15,20")) == 45
    assert gd.space_timesteps(300, np.array([10, 15, 20])) == gd.space_timesteps(300, "10,15,20")  # type: ignore[arg-type]
    assert gd.space_timesteps(1000, "ddim50") == set(range(0, 1000, 20))
    assert gd.space_timesteps(7, "7") == set(range(7))
    assert gd.space_timesteps(10, [0, 1]) == {5}
    d, whole = spaced("25", rescale=False), make(betas=gd.get_named_beta_schedule("linear", 1000))
    np.testing.assert_allclose(d.alphas_cumprod, whole.alphas_cumprod[d.timestep_map], rtol=1e-12)
    assert (d.num_timesteps, d.original_num_steps) == (25, 1000)
    assert d.use_timesteps == set(d.timestep_map)


def test_schedules() -> None:
    """Linear: 0.0001 to 0.02 for 1000 steps; cosine: abar of arXiv 2102.09672, eq. 17, betas below 0.999."""
    linear = gd.get_named_beta_schedule("linear", 1000)
    assert (linear.dtype, linear.shape) == (np.float64, (1000,))
    np.testing.assert_allclose(linear[[0, -1]], [1e-4, 0.02], rtol=1e-12)
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    cosine = gd.get_named_beta_schedule("cosine", 1000)
    np.testing.assert_allclose(cosine, np.minimum(1 - f[1:] / f[:-1], 0.999), rtol=1e-9)
    np.testing.assert_allclose(gd.betas_for_alpha_bar(4, lambda t: 1 - t, 0.5), [0.25, 1 / 3, 0.5, 0.5], rtol=1e-12)
