"""The model wrappers of compat.k_diffusion beside k-diffusion's own."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import k_diffusion_oracle
from helpers.lazy import needs
from helpers.op_counter import EveryOp
from torch import Tensor, nn

from diffkern.compat import k_diffusion as ours

pytestmark = needs(*k_diffusion_oracle.NEEDED)
theirs = k_diffusion_oracle.Peer()


class Inner(nn.Module):
    """A network with a parameter, in the dtype of its input; ``channels`` times the channels."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))
        self.channels = channels

    def forward(self, x: Tensor, t: Tensor, shift: float = 0.0) -> Tensor:
        time = t.double().reshape(-1, *(1,) * (x.ndim - 1))
        out = torch.tanh(self.weight * x.double() + 0.1 * torch.cos(time)) + shift
        return torch.cat([out] * self.channels, 1).to(x.dtype)

    def apply_model(self, x: Tensor, t: Tensor, cond: float = 0.0) -> Tensor:
        out: Tensor = self(x, t, shift=cond)
        return out


def table(n: int = 50) -> Tensor:
    return (1 - torch.linspace(1e-3, 0.15, n)).cumprod(0)


Make = Callable[[Any], Any]


def compvis() -> Inner:
    inner = Inner()
    inner.register_buffer("alphas_cumprod", table())
    return inner


WRAPPERS: dict[str, tuple[Make, dict[str, Any]]] = {
    "Denoiser": (lambda k: k.layers.Denoiser(Inner(), 0.5), {}),
    "Denoiser-default": (lambda k: k.layers.Denoiser(Inner()), {}),
    "Denoiser-soft-min-snr": (lambda k: k.layers.Denoiser(Inner(), 0.7, "soft-min-snr"), {}),
    "Denoiser-snr": (lambda k: k.layers.Denoiser(Inner(), 0.7, weighting="snr"), {"shift": 0.3}),
    "SimpleLossDenoiser": (lambda k: k.layers.SimpleLossDenoiser(Inner(), 0.7), {}),
    "VDenoiser": (lambda k: k.external.VDenoiser(Inner()), {}),
    "DiscreteEps": (lambda k: k.external.DiscreteEpsDDPMDenoiser(Inner(), table(), False), {"shift": 0.2}),
    "DiscreteEps-quantize": (lambda k: k.external.DiscreteEpsDDPMDenoiser(Inner(), table(), True), {}),
    "DiscreteV": (lambda k: k.external.DiscreteVDDPMDenoiser(Inner(), table(), False), {}),
    "OpenAI": (
        lambda k: k.external.OpenAIDenoiser(Inner(2), SimpleNamespace(alphas_cumprod=table().double().numpy())),
        {},
    ),
    "OpenAI-fixed": (
        lambda k: k.external.OpenAIDenoiser(
            Inner(), SimpleNamespace(alphas_cumprod=table().numpy()), has_learned_sigmas=False, quantize=True
        ),
        {},
    ),
    "CompVis": (lambda k: k.external.CompVisDenoiser(compvis()), {"cond": 0.1}),
    "CompVisV": (lambda k: k.external.CompVisVDenoiser(compvis()), {"cond": 0.1}),
}


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    x, noise = (torch.randn(4, 3, 6, 5, generator=g, dtype=torch.float64) for _ in range(2))
    return x.to(dtype), noise.to(dtype), torch.tensor([0.04, 0.5, 3.0, 9.0], dtype=dtype)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_denoised_loss_and_gradients(name: str, dtype: torch.dtype) -> None:
    make, options = WRAPPERS[name]
    x, noise, sigma = inputs(dtype)
    results = []
    for k in (theirs, ours):
        wrapper = make(k).to(dtype)
        at = x.clone().requires_grad_()
        d = wrapper(at, sigma, **options)
        by_input, by_weight = torch.autograd.grad(d.square().sum(), [at, wrapper.inner_model.weight])
        loss = wrapper.loss(x, noise, sigma, **options)
        (of_loss,) = torch.autograd.grad(loss.sum(), [wrapper.inner_model.weight])
        results.append((d.detach(), by_input, by_weight, loss.detach(), of_loss))
        assert loss.shape == (4,)
    rtol = 1e-5 if dtype == torch.float32 else 1e-11
    for want, found in zip(*results, strict=True):
        assert found.dtype == want.dtype
        torch.testing.assert_close(found, want, rtol=rtol, atol=rtol * float(want.abs().max()))


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse(name: str, dtype: torch.dtype) -> None:
    make, options = WRAPPERS[name]
    x, _, sigma = inputs(dtype)
    if name.startswith(("Discrete", "OpenAI", "CompVis")):
        options = dict(options)
    exact = make(theirs).double()(x.double(), sigma.double(), **options)
    off = []
    for k in (ours, theirs):
        wrapper = make(k)
        d = wrapper(x, sigma, **options)
        off.append(float((d.double() - exact).square().mean().sqrt().detach()))
        if k is ours:
            assert d.dtype == dtype
    assert off[0] <= 1.05 * off[1]


def test_a_function_of_sigma_as_weighting() -> None:
    """k-diffusion raises 'Unknown weighting type' for one."""
    x, noise, sigma = inputs()
    with pytest.raises(ValueError, match="Unknown weighting type"):
        theirs.layers.Denoiser(Inner(), 0.5, weighting=torch.square)
    found = ours.Denoiser(Inner(), 0.5, weighting=torch.square).loss(x, noise, sigma)
    torch.testing.assert_close(found, theirs.layers.Denoiser(Inner(), 0.5).loss(x, noise, sigma) * sigma**2)


def test_scalings() -> None:
    _, _, sigma = inputs()
    for make, _ in WRAPPERS.values():
        for want, found in zip(make(theirs).get_scalings(sigma), make(ours).get_scalings(sigma), strict=True):
            torch.testing.assert_close(found, want)


def test_v_times() -> None:
    _, _, sigma = inputs()
    one, other = theirs.external.VDenoiser(Inner()), ours.VDenoiser(Inner())
    torch.testing.assert_close(other.sigma_to_t(sigma), one.sigma_to_t(sigma))
    torch.testing.assert_close(other.t_to_sigma(one.sigma_to_t(sigma)), sigma)


@pytest.mark.parametrize("quantize", [False, True])
def test_discrete_times(quantize: bool) -> None:
    sigmas = ((1 - table()) / table()) ** 0.5
    one, other = (k.external.DiscreteSchedule(sigmas, quantize) for k in (theirs, ours))
    assert torch.equal(other.sigma_min, one.sigma_min)
    assert torch.equal(other.sigma_max, one.sigma_max)
    for n in (None, 1, 2, 7):
        torch.testing.assert_close(other.get_sigmas(n), one.get_sigmas(n), rtol=1e-6, atol=0)
    asked = torch.cat([torch.tensor([1e-3, 1e3]), sigmas, sigmas * 1.01, sigmas * 0.997])
    for flag in (None, True, False):
        want, found = (schedule.sigma_to_t(asked, flag) for schedule in (one, other))
        assert found.dtype == want.dtype
        torch.testing.assert_close(found, want, rtol=0, atol=2e-5)
    assert other.sigma_to_t(asked[:6].reshape(2, 3)).shape == (2, 3)
    t = torch.tensor([0.0, 0.5, 3.25, 49.0])
    torch.testing.assert_close(other.t_to_sigma(t), one.t_to_sigma(t))
    assert {name for name, _ in other.named_buffers()} == {"sigmas", "log_sigmas"}
    other.load_state_dict(one.state_dict())


def test_half_way_between_two_levels() -> None:
    for k in (theirs, ours):
        assert int(k.external.DiscreteSchedule(torch.tensor([1.0, 4.0, 16.0]), True).sigma_to_t(torch.tensor(8.0))) == 1


def test_a_wider_network_widens_the_result() -> None:
    x, _, sigma = inputs()
    m = torch.randn_like(x)
    results = []
    for k in (theirs, ours):
        results.append(k.layers.Denoiser(lambda x, sigma: m, 0.5)(x.half(), sigma.half()))
        assert results[-1].dtype == torch.float32
    torch.testing.assert_close(results[1], results[0], rtol=2e-3, atol=2e-3)  # its factors are rounded to float16


def test_one_op_after_the_network() -> None:
    x, _, sigma = inputs()
    m = torch.randn_like(x)
    with torch.no_grad():
        for wrapper in (ours.Denoiser(lambda x, s: m, 0.5), ours.VDenoiser(lambda x, t: m)):
            with EveryOp() as counted:
                wrapper(x, sigma)
            assert counted.counts["diffkern.step"] == 1
            assert not [op for op in counted.counts if "item" in op or "local_scalar" in op]


def test_samples_do_not_depend_on_their_neighbours() -> None:
    x, noise, sigma = inputs()
    for make, options in WRAPPERS.values():
        wrapper = make(ours)
        assert torch.equal(wrapper(x, sigma, **options)[1:2], wrapper(x[1:2], sigma[1:2], **options))
        whole, alone = wrapper.loss(x, noise, sigma, **options), wrapper.loss(x[1:2], noise[1:2], sigma[1:2], **options)
        torch.testing.assert_close(whole[1:2], alone, rtol=1e-6, atol=0)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="Unknown weighting type edm"):
        ours.Denoiser(Inner(), 0.5, weighting="edm")
    with pytest.raises(ValueError, match=r"scales must be 1 \(no loss over frequencies\), got 2"):
        ours.Denoiser(Inner(), 0.5, scales=2)
    with pytest.raises(ValueError, match="input has 4 dims but target_dims is 2, which is less"):
        ours.utils.append_dims(torch.zeros(1, 1, 1, 1), 2)


def test_with_a_sampler() -> None:
    """The whole drop-in: a wrapped table network, its own levels, a sampler; within 2e-6 a step of the original."""
    x = 14.0 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    results = []
    for k in (theirs, ours):
        wrapper = k.external.DiscreteEpsDDPMDenoiser(Inner(), table(), False)
        with torch.no_grad():
            results.append(k.sampling.sample_dpmpp_2m(wrapper, x, wrapper.get_sigmas(8), disable=True))
    assert float((results[0] - results[1]).abs().max() / results[0].abs().max()) <= 8 * 2e-6
