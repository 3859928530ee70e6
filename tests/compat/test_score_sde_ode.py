"""compat.score_sde's ODE sampler, likelihood and samples of Gaussian data beside a transcription and closed forms."""

from __future__ import annotations

import builtins
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers.score_sde_algorithms import likelihood, ode_sample, predict
from helpers.score_sde_runs import KINDS, Net, Squared, both, difference
from torch import Tensor, nn

from diffkern.compat.score_sde import likelihood as likelihood_lib
from diffkern.compat.score_sde import sampling, sde_lib

SHAPE = (4, 2, 5, 4)
DTYPES = (torch.float32, torch.float64)
# Two runs of one method at rtol = atol = 1e-5. In float64 they take the same steps: their errors differ by 1e-11 of the
# tolerance, so none is accepted in one alone, and the ends differ by rounding. In float32 the estimates themselves are
# rounded by up to a percent of it, as the processor rounds, so steps differ: each of some 20 steps of either run is
# then off by the tolerance at most.
ALIKE = {torch.float32: 2e-4, torch.float64: 1e-9}


class Gaussian(nn.Module):
    """The exact network of data N(0.3, 0.5^2)."""

    mean, var = 0.3, 0.25

    def __init__(self, sde: Any) -> None:
        super().__init__()
        self.sde = sde

    def level(self, t: Any) -> tuple[Tensor, Tensor, Tensor]:
        """(alpha, std, marginal variance) in float64."""
        at = torch.as_tensor(t, dtype=torch.float64)
        alpha, std = self.sde.schedule.alpha(at), self.sde.schedule.sigma(at)
        return alpha, std, alpha**2 * self.var + std**2

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if isinstance(self.sde, sde_lib.VESDE):
            t = (labels.double() / self.sde.sigma_min).log() / math.log(self.sde.sigma_max / self.sde.sigma_min)
            t = t.clamp(0.0, 1.0)
        else:
            t = (labels.double() / 999).clamp(0.0, 1.0)
        alpha, std, var = (v[:, None, None, None] for v in self.level(t))
        score = -(x - alpha * self.mean) / var
        return (score if isinstance(self.sde, sde_lib.VESDE) else -std * score).to(x.dtype)


def full(kind: str, N: int = 1000) -> Any:
    return {"vp": sde_lib.VPSDE, "subvp": sde_lib.subVPSDE, "ve": sde_lib.VESDE}[kind](N=N)


@pytest.mark.parametrize("solver", ["device", "scipy"])
@pytest.mark.parametrize("kind", KINDS)
def test_ode_on_gaussian_data(kind: str, solver: str) -> None:
    """The flow of Gaussian data is known: x(eps) = alpha mu + sqrt(v/v_T) (x_T - alpha_T mu)."""
    if solver == "scipy":
        pytest.importorskip("scipy")
    sde = full(kind)
    net = Gaussian(sde)
    torch.manual_seed(0)
    start = sde.prior_sampling(SHAPE)
    torch.manual_seed(0)
    sampler = sampling.get_ode_sampler(sde, SHAPE, lambda x: x, eps=1e-3, device="cpu", solver=solver)
    found, calls = sampler(net)
    assert found.dtype == torch.float32
    assert torch.equal(sampler(net, start)[0], found)
    (a, _, v), (first, _, wide) = net.level(1e-3), net.level(1.0)
    want = a * net.mean + (v / wide).sqrt() * (start.double() - first * net.mean)
    assert float((found - want).abs().max()) <= (5e-5 if solver == "device" else 1e-4)
    assert 20 < calls < 400


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_ode_beside_scipy(kind: str, denoise: bool, dtype: torch.dtype) -> None:
    """solver="scipy" is the original's arithmetic; the device's solver is within the tolerances of both."""
    pytest.importorskip("scipy")
    sde, process = both(kind)
    net = Net(kind == "ve").to(dtype)
    x = process.prior(SHAPE).to(dtype)
    want, calls = ode_sample(process, net, x)
    rest = torch.randn(2)
    if denoise:
        with torch.no_grad():
            want = predict(process, net, want, torch.full([4], 1e-3, dtype=dtype), "reverse_diffusion")[1]
    scaled = {}
    for solver in ("scipy", "device"):
        sampler = sampling.get_ode_sampler(sde, SHAPE, lambda x: x, denoise, device="cpu", solver=solver)
        torch.manual_seed(5)
        scaled[solver], found_calls = sampler(net, x)
        if denoise:
            assert torch.equal(torch.randn(2), after(5, torch.randn_like, x, rest))
        if solver == "scipy" and dtype == torch.float64:
            assert found_calls == calls
    assert difference(scaled["scipy"], want) <= ALIKE[dtype]
    assert difference(scaled["device"], want) <= 2e-4


def after(seed: int, draw: Any, x: Tensor, like: Tensor) -> Tensor:
    """What the generator gives after one draw."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    draw(x)
    value = torch.randn_like(like)
    torch.set_rng_state(state)
    return value


def test_ode_of_other_methods_and_sdes() -> None:
    """A method that diffkern has not, and an SDE that is none of diffkern's schedules, go through scipy."""
    pytest.importorskip("scipy")
    sde, process = both("vp")
    net, x = Net().double(), torch.randn(SHAPE, dtype=torch.float64)
    want, calls = ode_sample(process, net, x, method="RK23", rtol=1e-4)
    found, found_calls = sampling.get_ode_sampler(sde, SHAPE, lambda x: x, rtol=1e-4, method="RK23", device="cpu")(
        net, x
    )
    assert found_calls == calls
    assert difference(found, want) <= ALIKE[torch.float64]
    net, x, want = net.float(), x.float(), want.float()
    own = Squared(0.2, 15.0, 40)
    found, _ = sampling.get_ode_sampler(own, SHAPE, lambda x: x, rtol=1e-4, method="RK45", device="cpu")(net, x)
    assert difference(found, want) <= 1e-2
    config = SimpleNamespace(sampling=SimpleNamespace(method="ODE", noise_removal=False), device="cpu")
    found, _ = sampling.get_sampling_fn(config, sde, SHAPE, lambda x: x, 1e-3)(net)
    assert found.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", ["device", "scipy"])
def test_half_precision_is_solved_in_float32(dtype: torch.dtype, solver: str) -> None:
    if solver == "scipy":
        pytest.importorskip("scipy")
    sde, _ = both("vp")
    z, seen = torch.randn(SHAPE).to(dtype), set()

    def net(x: Tensor, labels: Tensor) -> Tensor:
        seen.update((x.dtype, labels.dtype))
        return 0.8 * x

    sampler = sampling.get_ode_sampler(sde, SHAPE, lambda x: x, device="cpu", solver=solver)
    assert torch.equal(sampler(net, z)[0], sampler(net, z.float())[0])
    found, latent, _ = likelihood_lib.get_likelihood_fn(sde, lambda x: x, solver=solver)(net, z)
    assert found.dtype == latent.dtype == torch.float32
    assert seen == {torch.float32}


def test_without_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "scipy":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    sampler = sampling.get_ode_sampler(both("vp")[0], SHAPE, lambda x: x, method="RK23", device="cpu")
    with pytest.raises(ModuleNotFoundError, match="needs scipy \\(pip install scipy\\)"):
        sampler(Net())


@pytest.mark.parametrize("solver", ["device", "scipy"])
@pytest.mark.parametrize("kind", KINDS)
def test_likelihood_of_gaussian_data(kind: str, solver: str) -> None:
    """Exact value: the prior's density at the end of the known flow, plus the logarithm of the flow's slope."""
    if solver == "scipy":
        pytest.importorskip("scipy")
    sde = full(kind)
    net = Gaussian(sde)
    data = torch.randn(SHAPE) * 0.5 + 0.3
    bits, latent, calls = likelihood_lib.get_likelihood_fn(sde, lambda x: (x + 1.0) / 2.0, solver=solver)(net, data)
    (a, _, v), (last, _, wide) = net.level(1e-5), net.level(1.0)
    end = last * net.mean + (wide / v).sqrt() * (data.double() - a * net.mean)
    dims = data[0].numel()
    nats = sde.prior_logp(end) + 0.5 * dims * (wide / v).log()
    want = -nats / dims / math.log(2.0) + 7.0
    assert bits.shape == (4,)
    assert bits.dtype == torch.float32
    assert float((bits - want).abs().max()) <= (1e-4 if solver == "device" else 1e-3)
    assert difference(latent, end) <= 1e-4
    assert calls > 20


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hutchinson", ["Rademacher", "Gaussian"])
def test_likelihood_beside_scipy(kind: str, hutchinson: str, dtype: torch.dtype) -> None:
    pytest.importorskip("scipy")
    sde, process = both(kind)
    net, data = Net(kind == "ve").to(dtype), torch.rand(SHAPE, dtype=dtype)
    torch.manual_seed(3)
    probe = torch.randn_like(data)
    if hutchinson == "Rademacher":
        torch.manual_seed(3)
        probe = torch.randint_like(data, low=0, high=2).float() * 2 - 1.0
    want, want_latent, calls = likelihood(process, net, data, probe, 8.0, 1e-3)
    for solver in ("scipy", "device"):
        torch.manual_seed(3)
        likelihood_fn = likelihood_lib.get_likelihood_fn(sde, lambda x: x, hutchinson, eps=1e-3, solver=solver)
        bits, latent, found_calls = likelihood_fn(net, data)
        assert bits.dtype == latent.dtype == dtype
        assert latent.shape == SHAPE
        limit = ALIKE[dtype] if solver == "scipy" else 5e-4
        assert float((bits - want).abs().max()) <= limit
        assert difference(latent, want_latent) <= limit
        if solver == "scipy" and dtype == torch.float64:
            assert found_calls == calls


def test_divergence() -> None:
    x, probe, t = torch.randn(SHAPE), torch.randn(SHAPE), torch.rand(4)
    div = likelihood_lib.get_div_fn(lambda x, t: x**3 * t[:, None, None, None])
    want = (3 * x**2 * t[:, None, None, None] * probe**2).sum((1, 2, 3))
    assert torch.allclose(div(x, t, probe), want, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("predictor", "corrector"), [("euler_maruyama", "none"), ("reverse_diffusion", "langevin")])
def test_pc_on_gaussian_data(kind: str, predictor: str, corrector: str) -> None:
    """Mean and variance of the samples with the exact score; N(0.3, 0.5^2)."""
    sde = full(kind, 300)
    shape = (500, 1, 6, 6)
    sampler = sampling.get_pc_sampler(
        sde,
        shape,
        sampling.get_predictor(predictor),
        sampling.get_corrector(corrector),
        lambda x: x,
        0.16,
        continuous=True,
        eps=1e-3 if kind != "ve" else 1e-5,
        device="cpu",
    )
    torch.manual_seed(0)
    found = sampler(Gaussian(sde))[0].double().numpy()
    assert abs(np.mean(found) - 0.3) <= 0.02
    assert abs(np.var(found) / 0.25 - 1) <= 0.06
