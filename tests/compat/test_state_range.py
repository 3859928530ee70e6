"""Drop-ins refuse float16 states above an eighth of 65504, with the dtypes that work, and take those below."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from diffkern.compat import edm
from diffkern.compat.score_sde import losses, sampling, sde_lib

dk = pytest.importorskip("diffkern.compat.diffusers")
HALF = torch.zeros(2, 1, 2, 2, dtype=torch.float16)
KARRAS = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "EDMEulerScheduler",
)


def sentence(owner: str, level: str = "100000") -> str:
    return (
        rf"the noise level of {owner} must be at most 8188 in float16, got {level}: use torch\.bfloat16 or "
        r"torch\.float32"
    )


def high(name: str, levels: Sequence[float] = (1e5, 1e3, 10.0, 1.0, 0.0)) -> Any:
    """A scheduler on these levels."""
    scheduler = getattr(dk, name)()
    scheduler.set_timesteps(len(levels) - 1)
    double = [levels[0], *(v for v in levels[1:-1] for _ in range(2)), levels[-1]]  # Heun's: each but the ends twice
    chosen = double if name.startswith("Heun") else levels
    scheduler.sigmas = torch.tensor(chosen, dtype=torch.float32)
    return scheduler


def loop(scheduler: Any, x: Tensor, start: int = 0) -> Tensor:
    """A run of a model whose eps is x / sqrt(sigma^2 + 1), of EDM's whose network gives 0."""
    gain = 0.0 if "EDM" in type(scheduler).__name__ else 1.0
    for t in scheduler.timesteps[start:]:
        m = gain * scheduler.scale_model_input(x, t)
        x = scheduler.step(m, t, x).prev_sample
    return x


@pytest.mark.parametrize("name", KARRAS)
def test_sigma_schedulers_refuse_what_float16_has_no_room_for(name: str) -> None:
    scheduler = high(name)
    first = scheduler.timesteps[0]
    with pytest.raises(ValueError, match=sentence(name)):
        scheduler.scale_model_input(HALF, first)
    with pytest.raises(ValueError, match=sentence(name)):
        high(name).step(HALF, first, HALF)
    with pytest.raises(ValueError, match=sentence(name)):
        high(name).add_noise(HALF, torch.ones_like(HALF), first.expand(2))
    started = high(name)
    started.set_begin_index(0)
    with pytest.raises(ValueError, match=sentence(name)):
        started.add_noise(HALF, torch.ones_like(HALF), first.expand(2))


@pytest.mark.parametrize("name", KARRAS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_sigma_schedulers_take_the_dtypes_that_they_name(name: str, dtype: str) -> None:
    scheduler, x = high(name), torch.ones(HALF.shape, dtype=getattr(torch, dtype)) * 1e5
    assert bool(torch.isfinite(loop(scheduler, x)).all())


@pytest.mark.parametrize("name", KARRAS)
def test_float16_is_taken_where_the_run_itself_has_room(name: str) -> None:
    """What starts below the highest level (image to image), and levels up to 8188."""
    scheduler = high(name)
    scheduler.set_begin_index(2)
    assert bool(torch.isfinite(loop(scheduler, HALF + 1, start=2)).all())
    assert bool(torch.isfinite(loop(high(name, (8188.0, 10.0, 1.0, 0.0)), HALF + 8000)).all())


def test_a_float32_sample_of_a_float16_model_is_refused_where_its_result_has_no_room() -> None:
    name, x = "EulerDiscreteScheduler", torch.ones(HALF.shape)
    scheduler = high(name, (1e6, 1e5, 1.0, 0.0))
    scheduler.is_scale_input_called = True
    with pytest.raises(ValueError, match=sentence(name)):
        scheduler.step(HALF, scheduler.timesteps[0], x)
    fits = high(name)  # to 1000
    fits.is_scale_input_called = True
    out = fits.step(HALF, fits.timesteps[0], x).prev_sample
    assert out.dtype == torch.float16
    assert bool(torch.isfinite(out).all())


def test_a_timestep_a_sample_counts_its_own_level() -> None:
    scheduler = high("EulerDiscreteScheduler")
    low = scheduler.timesteps[[1, 2]]
    assert bool(torch.isfinite(scheduler.scale_model_input(HALF, low)).all())
    with pytest.raises(ValueError, match=sentence("EulerDiscreteScheduler")):
        scheduler.scale_model_input(HALF, scheduler.timesteps[[2, 0]])


def test_score_sde_ve_scheduler() -> None:
    scheduler = dk.ScoreSdeVeScheduler(sigma_max=1e5)
    scheduler.set_timesteps(5)
    scheduler.set_sigmas(5)
    with pytest.raises(ValueError, match=sentence("ScoreSdeVeScheduler", "[0-9.e+]+")):
        scheduler.step_pred(HALF, scheduler.timesteps[0], HALF)
    assert scheduler.step_pred(HALF, scheduler.timesteps[-1], HALF).prev_sample.isfinite().all()


def test_edm_loss() -> None:
    loss = edm.EDMLoss(P_mean=11.6, P_std=0.0)  # sigma = 109098

    def net(x: Tensor, sigma: Tensor, labels: Any, augment_labels: Any) -> Tensor:
        return 0 * x

    with pytest.raises(ValueError, match=sentence("EDMLoss", "109098")):
        loss(net, HALF)
    assert bool(torch.isfinite(loss(net, HALF.bfloat16())).all())
    assert bool(torch.isfinite(edm.EDMLoss()(net, HALF)).all())


class HalfVESDE(sde_lib.VESDE):
    """A float16 prior."""

    def prior_sampling(self, shape: Sequence[int]) -> Tensor:
        return super().prior_sampling(shape).half()


def test_score_sde() -> None:
    sde, t = HalfVESDE(sigma_max=1e5, N=4), torch.ones(2)
    refused = sentence("HalfVESDE")
    pc = sampling.get_pc_sampler(
        *(sde, HALF.shape, sampling.ReverseDiffusionPredictor, sampling.NoneCorrector, lambda x: x, 0.1),
        device="cpu",
    )
    with pytest.raises(ValueError, match=refused):
        pc(torch.nn.Module())
    with pytest.raises(ValueError, match=refused):
        sampling.get_ode_sampler(sde, HALF.shape, lambda x: x, device="cpu")(torch.nn.Module(), HALF)
    for made in (
        sampling.ReverseDiffusionPredictor(sde, Network()),
        sampling.LangevinCorrector(sde, Network(), 0.1, 1),
    ):
        with pytest.raises(ValueError, match=refused):
            made.update_fn(HALF, t)
        x, _ = made.update_fn(HALF, 0.5 * t)  # sigma = 31.6
        assert bool(torch.isfinite(x).all())
        assert bool(torch.isfinite(made.update_fn(HALF.float(), t)[0]).all())


class Network(torch.nn.Module):
    """Gives 0."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return 0 * x


def test_score_sde_loss_of_a_float16_process() -> None:
    batch = HALF.clone()
    loss = losses.get_sde_loss_fn(sde_lib.VESDE(sigma_min=9e3, sigma_max=1e4), False, likelihood_weighting=False)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)  # in which score_sde draws its times
    try:
        with pytest.raises(ValueError, match=sentence("VESDE", "9[0-9.]+")):
            loss(Network(), batch)
    finally:
        torch.set_default_dtype(default)
    assert bool(torch.isfinite(loss(Network(), batch)))
