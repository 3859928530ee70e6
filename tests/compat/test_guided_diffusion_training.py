"""compat.guided_diffusion's losses and bits per dimension beside our transcription of the papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.guided_diffusion_algorithms import Chain
from helpers.guided_diffusion_runs import MEANS, VARIANCES, error, images, network, seeded, state
from helpers.op_counter import EveryOp
from torch import Tensor

from diffkern import schedules
from diffkern.compat import guided_diffusion as gd
from diffkern.compat.guided_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from diffkern.objectives import variational

LOSSES = ("MSE", "RESCALED_MSE", "KL", "RESCALED_KL")
EXACT, ROUNDED = 1e-12, 1e-5


def make(mean: str, variance: str, loss: str = "MSE", T: int = 50, cls: Any = gd.GaussianDiffusion) -> Any:
    return cls(
        betas=gd.get_named_beta_schedule("linear", T),
        model_mean_type=gd.ModelMeanType[mean],
        model_var_type=gd.ModelVarType[variance],
        loss_type=gd.LossType[loss],
    )


def unrounded(d: Any) -> Any:
    """The diffusion with float64 tables and the original's decoder, which `exact` replaces."""
    d.diffkern(exact=True)

    class Coarse(type(d)):  # type: ignore[misc]
        def _dk_bound(self, m: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, **options: Any) -> Tensor:
            found = super()._dk_bound(m, x_start, x_t, t, **options)
            decoder = self._dk_decoder(m, x_start, x_t, options["clip"], options["frozen"])
            return torch.where(t == 0, decoder, found)

    d.__class__ = Coarse
    return d


class Trained:
    """A network with two weights."""

    def __init__(self, variance: str, dtype: torch.dtype = torch.float64) -> None:
        self.weight = torch.tensor([0.8, 0.1], dtype=dtype, requires_grad=True)
        self.inner = network(variance)

    def __call__(self, x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        out = self.inner(x, t, **kwargs)
        return self.weight[0] * out + self.weight[1] * torch.cos(out)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_losses(mean: str, variance: str, loss: str, rounded: bool) -> None:
    """Every entry and the gradient of every entry, at t = 0 and above."""
    d = make(mean, variance, loss)
    d = d if rounded else unrounded(d)
    x, t, eps = images(), torch.tensor([9, 0, 4, 49]), state(seed=7)
    ours, plain = Trained(variance), Trained(variance)
    found = d.training_losses(ours, x, t, noise=eps)
    want = Chain(d.betas, mean, variance).losses(plain, x, t, eps, loss)
    assert set(found) == set(want)
    for key, value in want.items():
        assert found[key].shape == (4,)
        assert found[key].dtype == torch.float64
        limit = ROUNDED if rounded else EXACT
        assert error(found[key], value) <= limit, key
        a, b = (
            torch.stack([torch.autograd.grad(terms[key][i], [model.weight], retain_graph=True)[0] for i in range(4)])
            for terms, model in ((found, ours), (want, plain))
        )
        assert error(a, b) <= limit, key


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_losses_where_t_is_not_read(mean: str, variance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: every sample goes through the decoder, and those at t = 0 take what it gives."""
    x, eps = images(), state(seed=7)
    for loss in ("RESCALED_MSE", "KL"):
        d = make(mean, variance, loss)
        for t in (torch.tensor([9, 0, 4, 49]), torch.tensor([9, 3, 4, 49])):
            results = []
            for reads in (True, False):
                monkeypatch.setattr(gd.GaussianDiffusion, "_dk_may_read", lambda self, t, reads=reads: reads)
                model = Trained(variance)
                value = d.training_losses(model, x, t, noise=eps)["loss"]
                results.append((value.detach(), torch.autograd.grad(value.sum(), [model.weight])[0]))
            for found, want in zip(*results, strict=True):
                torch.testing.assert_close(found, want, rtol=1e-13, atol=0)


@pytest.mark.parametrize("variance", VARIANCES)
def test_float32_losses(variance: str) -> None:
    """As close to float64 as plain torch in float32."""
    x, t, eps = images(torch.float32), torch.tensor([9, 0, 4, 49]), state(torch.float32, seed=7)
    for loss in ("RESCALED_MSE", "KL"):
        d = make("EPSILON", variance, loss)
        chain = Chain(d.betas, "EPSILON", variance)
        found = d.training_losses(Trained(variance, torch.float32), x, t, noise=eps)
        rough = chain.losses(Trained(variance, torch.float32), x, t, eps, loss)
        want = chain.losses(Trained(variance), x.double(), t, eps.double(), loss)
        for key, value in want.items():
            assert found[key].dtype == torch.float32
            assert error(found[key], value) <= 2 * error(rough[key], value) + ROUNDED


def test_noise_is_drawn_like_the_data() -> None:
    d = make("EPSILON", "FIXED_SMALL")
    x, t = images(torch.float32), torch.tensor([9, 0, 4, 49])
    found, after = seeded(lambda: d.training_losses(network(), x, t)["loss"])
    torch.manual_seed(5)
    eps = torch.randn_like(x)
    assert torch.equal(after, torch.rand(3))
    assert torch.equal(found, d.training_losses(network(), x, t, noise=eps)["loss"])


@pytest.mark.parametrize("variance", ["FIXED_LARGE", "LEARNED_RANGE"])
def test_exact_decoder(variance: str) -> None:
    """`exact=True` has the normal distribution itself in the decoder, in one op: the numbers of `variational`."""
    d = make("EPSILON", variance, "RESCALED_KL").diffkern(exact=True)
    x, t, eps = images(), torch.zeros(4, dtype=torch.int64), state(seed=7)
    model = network(variance)
    found = d.training_losses(model, x, t, noise=eps)["loss"]
    schedule = schedules.from_betas(torch.from_numpy(d.betas))
    pred = model(schedule_noised(schedule, x, eps), t)
    kind = "learned" if variance == "LEARNED_RANGE" else "beta"
    want = variational.vlb_loss(pred, x, t, schedule, variance=kind, noise=eps, reduction="none")
    assert error(found, want) <= 1e-11
    coarse = make("EPSILON", variance, "RESCALED_KL").training_losses(model, x, t, noise=eps)["loss"]
    assert 1e-9 < error(coarse, want) < 0.05


def schedule_noised(schedule: Any, x: Tensor, eps: Tensor) -> Tensor:
    abar = schedule.alphas_cumprod[0]
    return abar.sqrt() * x + (1 - abar).sqrt() * eps


@pytest.mark.parametrize("loss", ["MSE", "KL"])
@pytest.mark.parametrize("variance", ["FIXED_SMALL", "LEARNED_RANGE"])
def test_gradient_of_the_data(variance: str, loss: str) -> None:
    """A data tensor or noise that asks for a gradient goes by formulas."""
    d = make("EPSILON", variance, loss)
    t, grads = torch.tensor([9, 0, 4, 49]), []
    for call in (
        d.training_losses,
        lambda m, x, t, noise: Chain(d.betas, "EPSILON", variance).losses(m, x, t, noise, loss),
    ):
        x, eps = images().requires_grad_(), state(seed=7).requires_grad_()
        total = call(network(variance), x, t, noise=eps)["loss"].sum()
        grads.append(torch.autograd.grad(total, [x, eps]))
    for a, b in zip(*grads, strict=True):
        assert error(a, b) <= 2e-4  # of a decoder whose std is 1/100, float32's rounding of the tables


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_bits_per_dimension(mean: str, variance: str, clip: bool) -> None:
    d, model, x = unrounded(make(mean, variance, T=30)), network(variance), images()
    chain = Chain(d.betas, mean, variance)
    found, after = seeded(lambda: d.calc_bpd_loop(model, x, clip_denoised=clip))
    torch.manual_seed(5)
    want: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
    for i in range(30)[::-1]:
        t, eps = torch.full((4,), i), torch.randn_like(x)
        x_t = chain.noised(x, t, eps)
        x0 = chain.call(model, x_t, t, clip, None)[0]
        want["vb"].append(chain.bound(model, x, x_t, t, clip))
        want["xstart_mse"].append((x0 - x).square().flatten(1).mean(1))
        want["mse"].append((chain.eps(x0, x_t, t) - eps).square().flatten(1).mean(1))
    assert torch.equal(after, torch.rand(3))
    assert set(found) == {"total_bpd", "prior_bpd", *want}
    for key, values in want.items():
        assert found[key].shape == (4, 30)
        assert error(found[key], torch.stack(values, 1)) <= 1e-11, key
    torch.testing.assert_close(found["prior_bpd"], chain.prior(x), rtol=1e-6, atol=1e-9)
    assert torch.equal(found["total_bpd"], found["vb"].sum(1) + found["prior_bpd"])
    assert torch.equal(found["prior_bpd"], d._prior_bpd(x))


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_terms(mean: str, variance: str, clip: bool) -> None:
    """Of any x_t, not just of one that was noised."""
    d, model = unrounded(make(mean, variance)), network(variance)
    chain, x, x_t, t = Chain(d.betas, mean, variance), images(), state(), torch.tensor([9, 0, 4, 49])
    found = d._vb_terms_bpd(model, x, x_t, t, clip)
    assert set(found) == {"output", "pred_xstart"}
    assert error(found["output"], chain.bound(model, x, x_t, t, clip)) <= 1e-11
    assert error(found["pred_xstart"], chain.call(model, x_t, t, clip, None)[0]) <= EXACT


def test_a_subclass_of_its_own_distribution() -> None:
    """One that overrides p_mean_variance is trained by what it returns."""

    class Halved(gd.GaussianDiffusion):
        def p_mean_variance(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            out = super().p_mean_variance(*args, **kwargs)
            return {**out, "pred_xstart": out["pred_xstart"] / 2, "mean": out["mean"] / 2}

    x, t, eps = images(), torch.tensor([9, 0, 4, 49]), state(seed=7)
    for variance, loss in (("FIXED_SMALL", "KL"), ("LEARNED_RANGE", "KL"), ("LEARNED_RANGE", "MSE")):
        d, model = make("EPSILON", variance, loss, cls=Halved), network(variance)
        chain = Chain(d.betas, "EPSILON", variance)
        full = chain.call
        chain.call = lambda *args, full=full: tuple(  # type: ignore[method-assign]
            part if i == 1 else part / 2 for i, part in enumerate(full(*args))
        )
        results = []
        for call in (
            lambda m, d=d: d.training_losses(m, x, t, noise=eps),
            lambda m, chain=chain, loss=loss: chain.losses(m, x, t, eps, loss),
        ):
            m = model(chain.noised(x, t, eps), t).requires_grad_()
            value = call(lambda *args, m=m: m)["loss"]
            results.append((value, torch.autograd.grad(value.sum(), [m])[0]))
        for found, want in zip(*results, strict=True):
            assert error(found, want) <= 3 * ROUNDED
        bits = seeded(lambda d=d, model=model: d.calc_bpd_loop(model, x))[0]
        assert bits["vb"].shape == (4, 50)
        torch.manual_seed(5)
        last = torch.full((4,), 49)
        x_t = chain.noised(x, last, torch.randn_like(x))
        assert error(bits["vb"][:, 0], chain.bound(model, x, x_t, last, True)) <= ROUNDED


def test_a_subclass_of_its_own_terms() -> None:
    class Constant(gd.GaussianDiffusion):
        def _vb_terms_bpd(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
            return {**super()._vb_terms_bpd(*args, **kwargs), "output": torch.full((4,), 2.0)}

    bits = make("EPSILON", "FIXED_SMALL", "KL", cls=Constant).calc_bpd_loop(network(), images())
    plain = seeded(lambda: make("EPSILON", "FIXED_SMALL").calc_bpd_loop(network(), images()))[0]
    again = seeded(lambda: make("EPSILON", "FIXED_SMALL", cls=Constant).calc_bpd_loop(network(), images()))[0]
    assert bool((bits["vb"] == 2.0).all())
    for key in ("mse", "xstart_mse"):
        assert error(again[key], plain[key]) <= 1e-11


@pytest.mark.parametrize("of_model", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("own", [torch.float16, torch.float32])
def test_dtypes(own: torch.dtype, of_model: torch.dtype) -> None:
    """A squared error has the dtype that torch promotes target and output to; a bound float32 or wider."""
    t = torch.tensor([9, 0, 4, 49])
    for mean, variance in (("EPSILON", "FIXED_SMALL"), ("START_X", "LEARNED_RANGE"), ("PREVIOUS_X", "LEARNED")):
        d, x = make(mean, variance), images(own)
        m = network(variance)(state(), t).to(of_model)
        eps = state(own, seed=7)
        found = d.training_losses(lambda *args, m=m: m, x, t, noise=eps)
        target = torch.float32 if mean == "PREVIOUS_X" else own
        assert found["mse"].dtype == torch.promote_types(target, of_model)
        chain = Chain(d.betas, mean, variance)
        want = chain.losses(lambda *args, m=m: m.double(), x.double(), t, eps.double(), "MSE")
        if "vb" in found:
            assert found["vb"].dtype == torch.promote_types(torch.float32, of_model)
        for key, value in want.items():
            # The decoder's difference of two probabilities is good to 6e-8 in float32, as the original's.
            exact = of_model == torch.float64 and own == torch.float32
            assert error(found[key], value) <= (1e-5 if exact else 2e-3), key
        if of_model == torch.float64 and mean != "PREVIOUS_X":  # whose target has rounded factors
            assert error(found["mse"], want["mse"]) <= EXACT


def test_dtypes_of_the_whole_bound() -> None:
    """As the original's: the error of an x_0 and data in half precision is in half precision, all else float32."""
    d = make("START_X", "FIXED_SMALL", "KL")
    x = images(torch.float16)
    found = d.calc_bpd_loop(lambda x, t: x.half(), x)
    assert {key: value.dtype for key, value in found.items()} == {
        **dict.fromkeys(("total_bpd", "prior_bpd", "vb", "mse"), torch.float32),
        "xstart_mse": torch.float16,
    }


def test_prior_of_a_long_chain() -> None:
    """1e-5 bits in float32: numbers near 1 that cancel."""
    d = gd.GaussianDiffusion(
        betas=gd.get_named_beta_schedule("linear", 1000),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.FIXED_SMALL,
        loss_type=gd.LossType.KL,
    )
    x = images(torch.float32)
    torch.testing.assert_close(d._prior_bpd(x).double(), Chain(d.betas).prior(x.double()), rtol=1e-5, atol=0)


def test_respaced_training() -> None:
    """The model sees the times of the long chain, once mapped, and is asked once."""
    seen: list[Tensor] = []
    for loss in LOSSES:
        betas = gd.get_named_beta_schedule("linear", 100)
        d = gd.SpacedDiffusion(
            use_timesteps=gd.space_timesteps(100, "10"),
            betas=betas,
            model_mean_type=gd.ModelMeanType.EPSILON,
            model_var_type=gd.ModelVarType.LEARNED_RANGE,
            loss_type=gd.LossType[loss],
            rescale_timesteps=True,
        )

        def model(x: Tensor, t: Tensor, y: int) -> Tensor:
            seen.append(t)
            return network("LEARNED_RANGE")(x, t)

        d.training_losses(model, images(), torch.tensor([9, 0, 4, 1]), model_kwargs={"y": 1})
    d.calc_bpd_loop(model, images(), model_kwargs={"y": 1})
    first, last = seen[:4], seen[4:]
    want = [10.0 * d.timestep_map[i] for i in (9, 0, 4, 1)]
    assert [t.tolist() for t in first] == [want] * 4
    assert [t.tolist() for t in last] == [[10.0 * i] * 4 for i in d.timestep_map[::-1]]


# ------------------------------------------------------------------------------------------------------- op counts
def counts(call: Callable[[], Any]) -> dict[str, int]:
    call()
    with EveryOp() as ops:
        call()
    return {name.removeprefix("diffkern."): n for name, n in ops.counts.items() if name.startswith("diffkern.")}


@pytest.mark.parametrize(
    ("variance", "loss", "want"),
    [
        ("FIXED_SMALL", "MSE", {"noising": 1, "loss": 1}),
        ("LEARNED_RANGE", "RESCALED_MSE", {"noising": 1, "variational": 1, "loss": 1}),
        ("FIXED_LARGE", "KL", {"noising": 1, "variational": 1}),
        ("LEARNED", "RESCALED_KL", {"noising": 1, "variational": 1}),
    ],
)
def test_ops(variance: str, loss: str, want: dict[str, int]) -> None:
    d, x, t = make("EPSILON", variance, loss), images(torch.float32), torch.tensor([9, 3, 4, 49])
    m = network(variance)(x, t)
    assert counts(lambda: d.training_losses(lambda x, t: m, x, t)) == want
    bits = counts(lambda: d.calc_bpd_loop(lambda x, t: m, x))
    assert bits == {"noising": 50, "step": 50 + 1, "variational": 50, "loss": 100}  # one more for the decoder


# ------------------------------------------------------------------------------------------------------- formulas
def test_divergence() -> None:
    a, b = state(), state(seed=2)
    p = torch.distributions.Normal(a, torch.exp(0.5 * b))
    q = torch.distributions.Normal(b, torch.exp(0.5 * a))
    torch.testing.assert_close(normal_kl(a, b, b, a), torch.distributions.kl_divergence(p, q), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(normal_kl(a, 0.0, 0.0, 0.0), a**2 / 2, rtol=1e-12, atol=1e-15)
    assert normal_kl(0.0, 0.0, a, b).shape == a.shape
    with pytest.raises(AssertionError, match="must be a tensor, got four numbers"):
        normal_kl(0.0, 0.0, 0.0, 0.0)


def test_bins() -> None:
    """The 256 bins hold the whole, and each what the normal distribution has, but for the approximation."""
    x = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    mean, log_std = torch.full_like(x, 0.3), torch.full_like(x, math.log(0.05))
    found = discretized_gaussian_log_likelihood(x, means=mean, log_scales=log_std).exp()
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-9)
    normal = torch.distributions.Normal(0.3, 0.05)
    want = normal.cdf(x + 1 / 255) - normal.cdf(x - 1 / 255)
    assert float((found - want).abs()[1:-1].max()) < 5e-4
    far = discretized_gaussian_log_likelihood(x, means=mean + 5, log_scales=log_std)
    assert float(far[0]) == pytest.approx(math.log(1e-12))
    with pytest.raises(AssertionError, match=r"one shape, got \[256\], \[255\] and \[256\]"):
        discretized_gaussian_log_likelihood(x, means=mean[1:], log_scales=log_std)


def test_bad_input() -> None:
    d, x, t = make("EPSILON", "FIXED_SMALL"), images(), torch.tensor([9, 0, 4, 1])
    with pytest.raises(AssertionError, match=r"t must have shape \[4\]"):
        d.training_losses(network(), x, t[0])
    with pytest.raises(AssertionError, match=r"model must return a tensor of shape \[4, 2, 3, 5\]"):
        d.training_losses(network("LEARNED"), x, t)
    with pytest.raises(AssertionError, match="noise must have the shape of x_start"):
        d.training_losses(network(), x, t, noise=x[:, :1])
    with pytest.raises(AssertionError, match="x_start must have the shape of x_t"):
        d._vb_terms_bpd(network(), x[:, :1], x, t)
    with pytest.raises(IndexError, match=r"t must lie in 0\.\.49"):
        d.training_losses(network(), x, torch.tensor([9, 0, 4, 50]))
    d.loss_type = "mse"
    with pytest.raises(NotImplementedError, match="loss_type must be one of MSE, RESCALED_MSE, KL, RESCALED_KL"):
        d.training_losses(network(), x, t)
