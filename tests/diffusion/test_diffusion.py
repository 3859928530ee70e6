"""The model object: it is the loose functions with nothing forgotten, on every schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.diffusion_cases import STD, Exact, small_unet

import diffkern
from diffkern import Diffusion, ops, schedules, streams
from diffkern.nn.embeddings import sinusoidal_embedding
from diffkern.objectives import time_sampling
from diffkern.schedules.makers import SCHEDULES

X0 = torch.linspace(-1.0, 1.0, 4 * 64).reshape(4, 1, 8, 8)
LABELS = torch.tensor([0, 1, 2, 0])
SEEDS = ops.seeds(5, 4)


def test_the_loss_is_simple_loss_with_times_and_drops_by_address() -> None:
    schedule, net = schedules.cosine(), small_unet()
    diffusion = Diffusion(net, schedule, "v", weight="min_snr", target="x0", times="logit_normal", drop=0.5)
    t = time_sampling.LogitNormal().sample(4, schedule, seeds=SEEDS)
    cond = diffkern.drop_condition(LABELS, 3, 0.5, SEEDS)
    assert not torch.equal(cond, LABELS)
    options: dict[str, Any] = {"target": "x0", "weight": "min_snr", "seeds": SEEDS}
    expected = diffkern.simple_loss(net, X0, t, schedule, "v", cond=cond, **options)
    assert torch.equal(diffusion.loss(X0, cond=LABELS, seeds=SEEDS), expected)
    assert torch.equal(diffusion(X0, cond=LABELS, seeds=5), expected), "forward is the loss, for what wraps a module"
    each = diffusion.loss(X0, cond=LABELS, seeds=5, reduction="none")
    alone = diffusion.loss(X0[1:2], cond=LABELS[1:2], seeds=SEEDS[1:2], reduction="none")
    torch.testing.assert_close(alone, each[1:2])
    undropped = diffkern.simple_loss(net, X0, t, schedule, "v", cond=LABELS, **options)
    assert torch.equal(diffusion.eval().loss(X0, cond=LABELS, seeds=5), undropped), "no drops outside of training"


def test_seeds_that_are_not_given_come_from_torchs_generator() -> None:
    diffusion = Diffusion(small_unet(), schedules.linear(), "eps")
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append((float(diffusion.loss(X0).detach()), diffusion.sample(1, steps=2)))
    assert losses[0][0] == losses[1][0] != losses[2][0]
    assert torch.equal(losses[0][1], losses[1][1])
    assert not torch.equal(losses[0][1], losses[2][1])


def test_noise_given_is_the_noise() -> None:
    schedule, net = schedules.linear(), small_unet()
    t, noise = torch.tensor([0, 10, 500, 999]), X0.flip(0)
    expected = diffkern.simple_loss(net, X0, t, schedule, "eps", noise=noise)
    assert torch.equal(Diffusion(net, schedule, "eps").loss(X0, t, noise=noise), expected)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_exact_network_has_the_known_loss_and_samples_on_every_schedule(
    name: str,
) -> None:
    """E|error|^2 of the network's prediction is det^2 Var[x0 given x]/sigma^2, and its samples have the data's std."""
    schedule = SCHEDULES[name]()
    prediction = schedule.default_prediction
    diffusion = Diffusion(Exact(schedule, prediction), schedule)
    high = max(schedule.time_range)
    t = (
        torch.full((2048,), high / 2)
        if not isinstance(schedule, schedules.DiscreteSchedule)
        else torch.full((2048,), 400)
    )
    x0 = STD * ops.randn((2048, 8), 1, streams.USER)
    alpha, sigma = float(schedule.alpha(t[0])), float(schedule.sigma(t[0]))
    u, v = (float(c) for c in diffkern.schedules.predictions.target_coefficients(schedule, prediction, t[0]))
    expected = (alpha * v - sigma * u) ** 2 * STD**2 / (alpha**2 * STD**2 + sigma**2)
    assert float(diffusion.loss(x0, t, seeds=0).detach()) == pytest.approx(expected, rel=0.05)
    clean = alpha * STD**2 / (alpha**2 * STD**2 + sigma**2)
    x = torch.ones(3, 8)
    torch.testing.assert_close(diffusion.denoise(x, t[0]), x * clean, rtol=1e-4, atol=1e-6)
    if name not in ("ve_exponential", "sub_vp", "cosine_vp"):  # these start short of the noise, or cannot be sampled
        samples = diffusion.sample((64, 64), steps=250, seeds=0)
        assert float(samples.std()) == pytest.approx(STD, rel=0.15)


def test_sampling_is_the_samplers_plan_run_on_the_network() -> None:
    schedule, net = schedules.cosine(), small_unet().eval()
    diffusion = Diffusion(net, schedule, "v")
    plan = diffkern.ddim(schedule, 5, prediction="v", eta=0.5)
    start = diffkern.initial(plan, (4, 1, 8, 8), SEEDS)
    expected = diffkern.sample(net, start, plan, seeds=SEEDS, cond=LABELS, uncond=torch.full((4,), 3), guidance=2.0)
    given: dict[str, Any] = {"cond": LABELS, "guidance": 2.0}
    assert torch.equal(diffusion.sample(4, "ddim", steps=5, eta=0.5, seeds=5, **given), expected)
    assert torch.equal(diffusion.sample(4, plan, seeds=SEEDS, **given), expected)
    assert torch.equal(diffusion.sample((4, 1, 8, 8), diffkern.ddim, 5, eta=0.5, seeds=5, **given), expected)
    assert torch.equal(diffusion.sample(4, plan, x=start, seeds=5, **given), expected)
    assert diffusion.plan("ddim", 5, eta=0.5) == plan
    assert len(diffusion.plan().steps) == 50
    whole = diffusion.sample(4, plan, seeds=5, trajectory=True, **given)
    assert torch.equal(whole.x, expected)


def test_images_masks_and_noise_pass_through() -> None:
    schedule, net = schedules.linear(), small_unet().eval()
    diffusion = Diffusion(net, schedule, "eps")
    plan = diffkern.ddpm(schedule, 5)
    mask = torch.zeros_like(X0)
    mask[..., 4:] = 1.0
    start = diffkern.initial(plan, X0.shape, SEEDS, start=2, x0=X0)
    expected = diffkern.sample(net, start, plan, seeds=SEEDS, start=2, mask=mask, known=X0)
    found = diffusion.sample(4, "ddpm", 5, seeds=5, start=2, x0=X0, mask=mask, known=X0)
    assert torch.equal(found, expected)
    noise = [X0.flip(0)] * 4
    start = diffkern.initial(plan, X0.shape, SEEDS)
    assert torch.equal(diffusion.sample(4, plan, seeds=5, noise=noise), diffkern.sample(net, start, plan, noise=noise))
    louder = diffkern.euler_ancestral(schedule, 5, prediction="eps", noise=1.1)
    assert diffusion.plan("euler_ancestral", 5, noise=1.1) == louder
    assert torch.equal(
        diffusion.sample(4, "euler_ancestral", 5, seeds=5, noise=1.1),
        diffkern.sample(net, diffkern.initial(louder, X0.shape, SEEDS), louder, seeds=SEEDS),
    )


def test_the_network_samples_in_evaluation_mode_and_is_put_back_module_by_module() -> None:
    net = Exact(schedules.linear(), "eps")
    net.frozen = torch.nn.Dropout().eval()
    diffusion = Diffusion(net, schedules.linear(), "eps")
    diffusion.sample((2, 3), steps=2, seeds=0)
    assert not any(training for _, _, training in net.seen)
    assert diffusion.training
    assert net.training
    assert not net.frozen.training


def test_likelihood_is_that_of_the_schedule_and_prediction() -> None:
    """ln N(x; 0, STD^2) of the exact network, at the noise level of the data's end."""
    schedule = schedules.vp()
    diffusion = Diffusion(Exact(schedule, "v").double(), schedule, "v")
    x = torch.tensor([[0.1, -0.3, 0.6]], dtype=torch.float64)
    found = diffusion.log_likelihood(x, divergence="exact").nats
    t0 = schedule.time_range[0]
    variance = float(schedule.alpha(t0)) ** 2 * STD**2 + float(schedule.sigma(t0)) ** 2
    expected = float((-0.5 * x.square() / variance).sum()) - 1.5 * math.log(2 * math.pi * variance)
    assert float(found) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("schedule", "factor"), [(schedules.vp(), 1000.0), (schedules.flow(), 1000.0)])
def test_a_network_of_ours_sees_the_time(schedule: schedules.Schedule, factor: float) -> None:
    """Sinusoids that move by more than 0.1 over [0, 1]: sin(f s t) where f s > 0.1, cos where 1 - cos(f s) > 0.1.

    f = 10000^(-i/64): i < 16 and i < 5.5 for s = 1, all 64 and i < 53.5 for s = 1000.
    """
    moved = []
    for scale in (1.0, Diffusion(small_unet(), schedule).time_scale):
        rows = sinusoidal_embedding(torch.linspace(0.0, 1.0, 1001) * scale, 128)
        moved.append(int(((rows.max(0).values - rows.min(0).values) > 0.1).sum()))
    assert moved == [16 + 6, 64 + 54]
    assert Diffusion(small_unet(), schedule).time_scale == factor
    assert Diffusion(small_unet(time_scale=1000.0), schedule).time_scale == 1.0
    assert Diffusion(Exact(schedule, "eps"), schedule, "eps").time_scale == 1.0


def test_the_network_is_given_the_scaled_time_by_all_that_calls_it() -> None:
    schedule = schedules.vp()
    net = Exact(schedule, "eps", times=0.01)
    diffusion = Diffusion(net, schedule, "eps", time_scale=100.0)
    x0 = STD * ops.randn((512, 8), 1, streams.USER)
    expected = (
        float(schedule.alpha(0.3)) ** 2
        * STD**2
        / (float(schedule.alpha(0.3)) ** 2 * STD**2 + float(schedule.sigma(0.3)) ** 2)
    )
    assert float(diffusion.loss(x0, torch.full((512,), 0.3), seeds=0).detach()) == pytest.approx(expected, rel=0.05)
    assert float(net.seen[0][0][0]) == pytest.approx(30.0)
    diffusion.denoise(x0, 0.3)
    assert float(net.seen[1][0][0]) == pytest.approx(30.0)
    diffusion.sample((1, 2), "euler", steps=2, seeds=0)
    times = [100 * row.time for row in diffusion.plan("euler", 2).rows]
    assert [float(t) for t, _, _ in net.seen[2:]] == pytest.approx(times)
    count = len(net.seen)
    diffusion.log_likelihood(x0[:1], solver="euler", steps=1, seeds=0)
    assert float(net.seen[count][0][0]) == pytest.approx(100 * schedule.time_range[0])


def test_integer_times_of_a_table_are_given_as_they_are() -> None:
    net = Exact(schedules.linear(10), "eps")
    Diffusion(net, schedules.linear(10), "eps").loss(torch.zeros(3, 2), torch.tensor([0, 4, 9]), seeds=0)
    assert net.seen[0][0].dtype == torch.int64
    assert net.seen[0][0].tolist() == [0, 4, 9]


def test_the_null_condition_is_a_tensor_too() -> None:
    net = Exact(schedules.linear(10), "eps")
    null = torch.tensor([9.0, 8.0])
    diffusion = Diffusion(net, schedules.linear(10), "eps", drop=0.5, null=null)
    cond = torch.zeros(64, 2)
    diffusion.loss(torch.zeros(64, 3), cond=cond, seeds=0)
    given = net.seen[0][1]
    dropped = (given == null).all(1)
    assert 16 < int(dropped.sum()) < 48
    assert bool((given[~dropped] == 0.0).all())
    diffusion.sample((2, 3), steps=1, seeds=0, cond=cond[:2], guidance=3.0)
    assert torch.equal(net.seen[1][1], torch.stack([null, null, cond[0], cond[0]]))


def test_a_network_in_sixteen_bits_keeps_a_state_in_float32() -> None:
    net = small_unet().to(torch.bfloat16)
    found = Diffusion(net, schedules.cosine(), "v").sample(2, steps=2, seeds=0)
    assert found.dtype == torch.float32


def test_a_learned_variance_is_trained_and_sampled() -> None:
    schedule = schedules.cosine(20)
    net = small_unet(out_channels=2).eval()
    diffusion = Diffusion(net, schedule, "eps", learned_variance=True)
    t = torch.tensor([0, 5, 10, 19])
    x_t = diffkern.noised(X0, t, schedule, seeds=SEEDS)
    expected = diffkern.hybrid_loss(net(x_t, t), X0, t, schedule, seeds=SEEDS)
    assert torch.equal(diffusion.loss(X0, t, seeds=5), expected)
    plan = diffkern.ddpm(schedule, 5, variance="learned")
    start = diffkern.initial(plan, X0.shape, SEEDS)
    assert torch.equal(diffusion.sample(4, steps=5, seeds=5), diffkern.sample(net, start, plan, seeds=SEEDS))
    plan = diffkern.ddim(schedule, 5)
    half = diffkern.sample(lambda x, t: net(x, t)[:, :1], start, plan)
    assert torch.equal(diffusion.sample(4, "ddim", 5, seeds=5), half)
    assert diffusion.denoise(X0, 5).shape == X0.shape
