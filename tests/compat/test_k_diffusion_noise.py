"""compat.k_diffusion.BrownianTreeNoiseSampler: the law of a Brownian path, the protocol, batches."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.op_counter import EveryOp
from torch import Tensor

from diffkern.compat import k_diffusion
from diffkern.compat.k_diffusion import BrownianTreeNoiseSampler

N = 200_000
WIDE = 5.0 / math.sqrt(N)
"""Five standard errors of a correlation."""


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    return x / (1 + sigma.reshape(-1, *(1,) * (x.ndim - 1)) ** 2)


def path(seed: int = 7, **options: object) -> BrownianTreeNoiseSampler:
    return BrownianTreeNoiseSampler(torch.empty(1, N), 0.02, 80.0, seed=seed, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("high", "low"), [(80.0, 0.02), (80.0, 40.0), (3.0, 2.999), (0.021, 0.02), (0.02003, 0.02), (0.5, 0.1)]
)
def test_noise_is_standard_normal(high: float, low: float) -> None:
    z = path()(high, low).double()
    assert abs(float(z.mean())) <= WIDE
    assert abs(float(z.square().mean()) - 1) <= 2 * WIDE
    assert abs(float(z.pow(4).mean()) - 3) <= 10 * WIDE


@pytest.mark.parametrize("scale", [1.0, 0.1, 0.003])
def test_increments_have_the_covariance_of_a_path(scale: float) -> None:
    """Nested intervals share their noise as their lengths say, disjoint ones nothing, joined ones add up."""
    sampler = path()
    a, b, c, d = (0.02 + scale * level for level in (60.0, 45.0, 30.0, 5.0))
    part, whole, other = (sampler(*ends).double() for ends in ((a, b), (a, c), (c, d)))
    assert abs(float((part * whole).mean()) - math.sqrt((a - b) / (a - c))) <= WIDE
    assert abs(float((part * other).mean())) <= WIDE
    total = sampler(a, d).double() * math.sqrt(a - d)
    parts = whole * math.sqrt(a - c) + other * math.sqrt(c - d)
    # Times are resolved to 1e-6 of the distance to sigma_min: the ends of the parts are the same ones.
    torch.testing.assert_close(total, parts, rtol=0, atol=3e-3 * math.sqrt(a - d))


def test_transform_is_the_clock() -> None:
    sampler = path(transform=torch.log)
    a, b, c = 10.0, 1.0, 0.1
    want = math.sqrt(math.log(a / b) / math.log(a / c))
    assert abs(float((sampler(a, b).double() * sampler(a, c).double()).mean()) - want) <= WIDE


def test_direction_is_the_sign() -> None:
    sampler = path()
    assert torch.equal(sampler(3.0, 1.0), -sampler(1.0, 3.0))
    falling = path(transform=torch.neg)  # k-diffusion turns the sign with the ends
    assert torch.equal(falling(3.0, 1.0), -falling(1.0, 3.0))


def test_same_interval_same_noise() -> None:
    sampler = path()
    first = sampler(torch.tensor(3.0), torch.tensor(1.0))
    sampler(50.0, 0.3)
    assert torch.equal(sampler(3.0, 1.0), first)
    assert torch.equal(path()(3.0, 1.0), first)
    assert not torch.equal(path(seed=8)(3.0, 1.0), first)


def test_levels_outside_count_as_the_ends() -> None:
    sampler = path()
    assert torch.equal(sampler(100.0, 1.0), sampler(80.0, 1.0))
    assert torch.equal(sampler(1.0, 0.0), sampler(1.0, 0.02))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_list_of_seeds_is_one_path_a_sample(dtype: torch.dtype) -> None:
    x = torch.empty(3, 2, 5, dtype=dtype)
    together = BrownianTreeNoiseSampler(x, 0.02, 80.0, seed=[5, 6, 2**63 - 1])(9.0, 4.0)
    assert together.dtype == dtype
    assert together.shape == x.shape
    alone = BrownianTreeNoiseSampler(x[:1], 0.02, 80.0, seed=[6])(9.0, 4.0)
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together[0], together[1])


def test_no_seed_takes_one_from_the_generator() -> None:
    x = torch.empty(2, 3)
    torch.manual_seed(4)
    first = BrownianTreeNoiseSampler(x, 0.02, 80.0)(9.0, 4.0)
    after = torch.rand(2)
    torch.manual_seed(4)
    torch.randint(0, 2**63 - 1, [])
    assert torch.equal(torch.rand(2), after)
    torch.manual_seed(4)
    assert torch.equal(BrownianTreeNoiseSampler(x, 0.02, 80.0)(9.0, 4.0), first)


def test_bad_input() -> None:
    x = torch.empty(2, 3)
    with pytest.raises(ValueError, match=r"seed must be an int or one int a sample \(2\), got shape \[3\]"):
        BrownianTreeNoiseSampler(x, 0.02, 80.0, seed=[1, 2, 3])
    with pytest.raises(ValueError, match="sigma_min and sigma_max must be two finite levels, got 1 and 1"):
        BrownianTreeNoiseSampler(x, 1.0, 1.0)
    with pytest.raises(ValueError, match="the two levels of an increment must differ, got"):
        BrownianTreeNoiseSampler(x, 0.02, 80.0, seed=1)(90.0, 80.0)


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_samplers_use_it_by_default(name: str) -> None:
    """One path: a seed gives one result, and an explicit sampler of that seed the same."""
    function = getattr(k_diffusion, f"sample_{name}")
    sigmas = k_diffusion.get_sigmas_karras(12, 0.03, 20.0)
    x = 20.0 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(9)
    first = function(denoiser, x, sigmas, disable=True)
    torch.manual_seed(9)
    own = BrownianTreeNoiseSampler(x, sigmas[-2], sigmas[0])
    assert torch.equal(function(denoiser, x, sigmas, disable=True, noise_sampler=own), first)
    seeds = BrownianTreeNoiseSampler(x, sigmas[-2], sigmas[0], seed=[3, 4])
    both = function(denoiser, x, sigmas, disable=True, noise_sampler=seeds)
    one = BrownianTreeNoiseSampler(x[1:], sigmas[-2], sigmas[0], seed=[4])
    assert torch.equal(function(denoiser, x[1:], sigmas, disable=True, noise_sampler=one), both[1:])


def test_noise_that_is_not_used_is_not_drawn() -> None:
    x = torch.ones(1, 2, 4, 4)
    sigmas = k_diffusion.get_sigmas_karras(5, 0.03, 20.0)
    for eta, draws in ((0.0, 0), (1.0, 8)):
        with EveryOp() as counted:
            k_diffusion.sample_dpmpp_sde(denoiser, x, sigmas, disable=True, eta=eta)
        assert counted.counts["diffkern.noise_sum"] == draws


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
@pytest.mark.full
def test_more_steps_converge_along_the_path(name: str) -> None:
    """The same path with twice the steps comes closer to that of many steps, element by element."""
    function = getattr(k_diffusion, f"sample_{name}")
    x = 5.0 * torch.randn(1, 4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = BrownianTreeNoiseSampler(x, 0.1, 5.0, seed=[3])

    def run(n: int) -> Tensor:
        sigmas = k_diffusion.get_sigmas_karras(n, 0.1, 5.0).double()[:-1]
        out: Tensor = function(denoiser, x, sigmas, disable=True, noise_sampler=noise)
        return out

    fine = run(513)
    errors = [float((run(n) - fine).square().mean().sqrt()) for n in (9, 17, 33)]
    assert errors[1] < 0.8 * errors[0]
    assert errors[2] < 0.8 * errors[1]


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_a_single_step_to_data_draws_nothing(name: str) -> None:
    """One level is left (image to image at a low strength): no path is needed, and what is denoised comes out."""
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    found = getattr(k_diffusion, f"sample_{name}")(denoiser, x, torch.tensor([5.0, 0.0]), disable=True)
    torch.testing.assert_close(found, x / 26)
