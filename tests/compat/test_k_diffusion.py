"""The samplers of compat.k_diffusion beside k-diffusion's own: same model, noise, options."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from helpers.k_diffusion_cases import (
    ALL,
    ANCESTRAL,
    CHURN,
    SDE,
    STEP,
    Network,
    error,
    levels,
    needs_k_diffusion,
    run,
    start,
    theirs,
)
from torch import Tensor

from diffkern.compat import k_diffusion as ours

pytestmark = needs_k_diffusion

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ALL),
    *((name, {"s_churn": 4.0, "s_noise": 1.1}) for name in CHURN),
    *((name, {"s_churn": 100.0, "s_tmin": 0.5, "s_tmax": 30.0, "s_noise": 0.9}) for name in CHURN),
    *((name, {"s_churn": 3.0, "s_noise": 0.0}) for name in CHURN),
    *((name, {"eta": 0.0}) for name in (*ANCESTRAL, *SDE)),
    *((name, {"eta": 0.6, "s_noise": 1.2}) for name in (*ANCESTRAL, *SDE)),
    *((name, {"eta": 1.5}) for name in (*ANCESTRAL, *SDE)),
    *((name, {"eta": 40.0}) for name in ANCESTRAL),
    *(("lms", {"order": order}) for order in (1, 2, 3)),
    ("dpmpp_2m_sde", {"solver_type": "heun"}),
    *(("dpmpp_sde", {"r": r, "eta": eta}) for r in (0.3, 1.0, 1.5) for eta in (0.7, 1.0)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in CASES])
def test_trajectory(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    x, sigmas = start(dtype), levels(dtype=dtype)
    want, want_seen, want_next = run(theirs, name, x, sigmas, **options)
    found, found_seen, found_next = run(ours, name, x, sigmas, **options)
    assert found.dtype == want.dtype
    assert torch.equal(found_next, want_next), "the generator is not where k-diffusion leaves it"
    assert [d["i"] for d in found_seen] == [d["i"] for d in want_seen] == list(range(len(sigmas) - 1))
    for k, (one, other) in enumerate(zip(found_seen, want_seen, strict=True), 1):
        assert one.keys() == other.keys()
        assert torch.equal(one["sigma"], other["sigma"])
        for key in ("x", "sigma_hat", "denoised"):
            assert one[key].shape == other[key].shape
            assert one[key].dtype == other[key].dtype
            assert error(one[key], other[key]) <= k * STEP[dtype], (key, k)
    assert error(found, want) <= len(sigmas) * STEP[dtype]


@pytest.mark.parametrize("name", ALL)
def test_signature(name: str) -> None:
    want = inspect.signature(getattr(theirs.sampling, f"sample_{name}")).parameters.values()
    found = inspect.signature(getattr(ours, f"sample_{name}")).parameters.values()
    assert [(p.name, p.default) for p in found] == [(p.name, p.default) for p in want]


@pytest.mark.parametrize("name", ALL)
def test_ends_above_zero_and_takes_extra_args(name: str) -> None:
    x, sigmas = start(torch.float64), levels(dtype=torch.float64)[2:-3]
    options = {"extra_args": {"shift": 0.5}}
    want, found = (run(module, name, x, sigmas, **options)[0] for module in (theirs, ours))
    assert error(found, want) <= 1e-12
    plain = run(ours, name, x, sigmas)[0]
    assert error(plain, want) > 1e-3


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded"])
def test_layouts(name: str, layout: str) -> None:
    """Which element gets which draw of torch's generator depends on the strides."""
    x = {
        "channels_last": start().contiguous(memory_format=torch.channels_last),
        "transposed": start().transpose(2, 3),
        "sliced": start(shape=(2, 3, 5, 14))[..., ::2],
        "expanded": start()[:1].expand(2, 3, 5, 7),
    }[layout].double()
    options = {"s_churn": 5.0} if name in CHURN else {}
    want, found = (run(module, name, x, levels(dtype=torch.float64), **options)[0] for module in (theirs, ours))
    assert error(found, want) <= 1e-11


@pytest.mark.parametrize("name", ALL)
def test_one_level_is_no_step(name: str) -> None:
    x = start()
    assert run(ours, name, x, levels()[:1])[0] is x


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_one_step_where_the_original_fails(name: str) -> None:
    x, sigmas = start(), torch.tensor([60.0, 0.0])
    with pytest.raises(UnboundLocalError):
        run(theirs, name, x, sigmas)
    assert torch.equal(run(ours, name, x, sigmas)[0], Network()(x, sigmas[:1].repeat(2)))


@pytest.mark.parametrize("name", [*ANCESTRAL, *SDE])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_noise_sampler_is_asked_alike(name: str, eta: float) -> None:
    x, sigmas = start(), levels()
    asked: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for key, module in (("theirs", theirs), ("ours", ours)):
        calls = asked.setdefault(key, [])

        def sampler(sigma: Tensor, sigma_next: Tensor, calls: list[tuple[Tensor, Tensor]] = calls) -> Tensor:
            calls.append((sigma, sigma_next))
            return torch.randn_like(x)

        run(module, name, x, sigmas, eta=eta, noise_sampler=sampler)
    assert len(asked["ours"]) == len(asked["theirs"])
    for one, other in zip(asked["ours"], asked["theirs"], strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.shape == b.shape == ()
            assert a.dtype == b.dtype
            assert float(a) == pytest.approx(float(b), rel=2e-6)


@pytest.mark.parametrize("name", ALL)
def test_model_is_given_the_same_levels(name: str) -> None:
    x, sigmas = start(torch.float16), levels()
    networks = Network(), Network()
    for module, network in zip((theirs, ours), networks, strict=True):
        run(module, name, x, sigmas, model=network)
    want, found = (network.levels for network in networks)
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype == torch.float16
        assert a.shape == b.shape == (2,)
        assert error(a.double(), b.double()) <= 1e-3  # a unit in the last place of float16


# ------------------------------------------------------------------------------------------------------ noise levels
@pytest.mark.parametrize("n", [1, 2, 10, 100])
def test_noise_levels(n: int) -> None:
    for name, args in (
        ("karras", (0.02, 80.0)),
        ("karras", (0.1, 10.0, 3.0)),
        ("exponential", (0.02, 80.0)),
        ("polyexponential", (0.02, 80.0, 1.7)),
        ("vp", ()),
        ("vp", (15.0, 0.2, 1e-2)),
    ):
        want = getattr(theirs.sampling, f"get_sigmas_{name}")(n, *args)
        found = getattr(ours, f"get_sigmas_{name}")(n, *args)
        assert found.dtype == want.dtype
        assert found.shape == want.shape
        assert found[-1] == 0
        # The original computes in float32, in which e^t - 1 of a small t is off by 2e-4.
        torch.testing.assert_close(found, want, rtol=3e-4 if name == "vp" else 3e-6, atol=0)
        try:
            torch.set_default_dtype(torch.float64)
            want = getattr(theirs.sampling, f"get_sigmas_{name}")(n, *args)
            found = getattr(ours, f"get_sigmas_{name}")(n, *args)
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=0)


def test_ancestral_step_and_slope() -> None:
    a, b = torch.tensor(3.0), torch.tensor(1.5)
    for eta in (0.0, 0.5, 1.0, 9.0):
        assert ours.get_ancestral_step(a, b, eta) == theirs.sampling.get_ancestral_step(a, b, eta)
    x, sigma = start(), torch.tensor([2.0, 3.0])
    torch.testing.assert_close(ours.to_d(x, sigma, x / 2), theirs.sampling.to_d(x, sigma, x / 2))
    torch.testing.assert_close(ours.to_d(x, a, x / 2), theirs.sampling.to_d(x, a, x / 2))
    assert ours.append_zero(sigma).tolist() == [2.0, 3.0, 0.0]


# -------------------------------------------------------------------------------------------------------- likelihood
def gaussian(x: Tensor, sigma: Tensor, data: float = 0.5) -> Tensor:
    """The denoiser of N(0, data^2 I)."""
    return x * (data**2 / (data**2 + sigma.reshape(-1, *(1,) * (x.ndim - 1)) ** 2))


def mixing(x: Tensor, sigma: Tensor) -> Tensor:
    """`gaussian` of neighbours: its Jacobian has elements off the diagonal."""
    made: Tensor = 0.7 * gaussian(x, sigma) + 0.3 * gaussian(x.roll(1, -1), sigma)
    return made


def test_log_likelihood() -> None:
    x = 0.5 * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = 0.02, 50.0
    found, info = ours.log_likelihood(gaussian, x, low, high, atol=1e-7, rtol=1e-7)
    # The state at sigma_min has variance data^2 + low^2; the prior is high^2 where that of the path has data^2 too.
    scale = math.sqrt((0.25 + high**2) / (0.25 + low**2))
    latent = torch.distributions.Normal(0.0, high).log_prob(x * scale).flatten(1).sum(1)
    want = latent + x[0].numel() * math.log(scale)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-3)
    other, other_info = theirs.sampling.log_likelihood(gaussian, x, low, high, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(found, other, rtol=0, atol=1e-3)
    assert info.keys() == other_info.keys() == {"fevals"}
    assert info["fevals"] > 10
    # Off the diagonal the probe counts: it is k-diffusion's, and so is what is left in torch's generator.
    values = []
    for module in (theirs.sampling, ours):
        torch.manual_seed(5)
        nats, _ = module.log_likelihood(mixing, x, low, high, atol=1e-7, rtol=1e-7)
        values.append((nats, torch.rand(1).item()))
    torch.testing.assert_close(values[1][0], values[0][0], rtol=0, atol=1e-3)
    assert values[1][1] == values[0][1]
    torch.manual_seed(7)
    assert (ours.log_likelihood(mixing, x, low, high, atol=1e-7, rtol=1e-7)[0] - values[1][0]).abs().max() > 0.01
    alone = ours.log_likelihood(gaussian, x[1:2], low, high, atol=1e-7, rtol=1e-7)[0]
    assert torch.equal(alone, found[1:2])
    for ends in ((0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="sigma_min and sigma_max must be 0 < sigma_min < sigma_max, got"):
            ours.log_likelihood(gaussian, x, *ends)
