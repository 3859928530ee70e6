"""compat.guided_diffusion's steps and loops beside our transcription of the papers."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np
import pytest
import torch
from helpers.guided_diffusion_algorithms import Chain
from helpers.guided_diffusion_runs import (
    EXACT,
    MEANS,
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
from helpers.suites import few
from torch import Tensor

from diffkern.compat import guided_diffusion as gd


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
@pytest.mark.parametrize("mean", few(MEANS, "EPSILON"))
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
