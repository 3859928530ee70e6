"""compat.score_sde's SDEs and losses beside a transcription of the paper."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.op_counter import CountOps
from helpers.score_sde_algorithms import (
    ddpm_loss,
    flow_drift,
    sde_loss,
    smld_loss,
)
from helpers.score_sde_runs import KINDS, Net, Squared, both, difference, tight
from torch import Tensor, nn

import diffkern.simulate.likelihood
from diffkern.compat.score_sde import likelihood as likelihood_lib
from diffkern.compat.score_sde import losses, models, sampling, sde_lib

SHAPE = (4, 2, 5, 4)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """score_sde works in torch's default dtype."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


# ---------------------------------------------------------------------------------------------------------------- SDEs
@pytest.mark.parametrize("kind", KINDS)
def test_sdes(dtype: torch.dtype, kind: str) -> None:
    sde, process = both(kind)
    x, t = torch.randn(SHAPE), torch.tensor([1.0, 0.7, 1e-2, 1e-4])
    assert sde.T == 1
    assert sde.N == 40
    for found, want in (
        (sde.sde(x, t), (process.drift(x, t), process.diffusion(t))),
        (sde.discretize(x, t), process.chain(x, t)),
        (sde.marginal_prob(x, t), (process.signal(t)[:, None, None, None] * x, process.std(t))),
    ):
        for a, b in zip(found, want, strict=True):
            assert a.dtype == b.dtype == dtype
            assert float((a - b).abs().max()) <= tight(dtype) * max(float(b.abs().max()), 1e-30)
    torch.manual_seed(1)
    want_prior = process.prior(SHAPE)
    torch.manual_seed(1)
    prior = sde.prior_sampling(SHAPE)
    assert torch.equal(prior, want_prior)
    normal = torch.distributions.Normal(0.0, 30.0 if kind == "ve" else 1.0)
    assert torch.allclose(sde.prior_logp(prior), normal.log_prob(prior).sum((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_schedule_is_the_same_process(kind: str) -> None:
    """In float64 the formulas are those of diffkern.schedules."""
    sde, _ = both(kind)
    t = torch.linspace(0.05, 1.0, 20, dtype=torch.float64)
    one = torch.ones(20, 1, dtype=torch.float64)
    mean, std = sde.marginal_prob(one, t)
    drift, g = sde.sde(one, t)
    for found, want in (
        (mean.flatten(), sde.schedule.alpha(t)),
        (std, sde.schedule.sigma(t)),
        (drift.flatten(), sde.schedule.drift(t)),
        (g, sde.schedule.diffusion(t)),
    ):
        assert torch.allclose(found, want, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("flow", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_reverse(dtype: torch.dtype, kind: str, flow: bool) -> None:
    sde, process = both(kind)
    net = Net(kind == "ve")
    x, t = torch.randn(SHAPE), torch.tensor([1.0, 0.7, 0.05, 1e-2])
    rsde = sde.reverse(models.get_score_fn(sde, net, continuous=True), probability_flow=flow)
    assert isinstance(rsde, type(sde))
    assert (rsde.T, rsde.N, rsde.probability_flow) == (1, 40, flow)
    drift, g = rsde.sde(x, t)
    score = process.score(net, x, t, True)
    half, wide = 0.5 if flow else 1.0, process.diffusion(t)
    want = process.drift(x, t) - half * wide[:, None, None, None] ** 2 * score
    assert difference(drift, want) <= tight(dtype)
    assert torch.equal(g, torch.zeros_like(wide) if flow else sde.sde(x, t)[1])
    f, G = process.chain(x, t)
    found_f, found_g = rsde.discretize(x, t)
    assert difference(found_f, f - half * G[:, None, None, None] ** 2 * score) <= tight(dtype)
    assert torch.allclose(found_g, torch.zeros_like(G) if flow else G, rtol=1e-5)
    if flow:
        assert difference(drift, flow_drift(process, net, x, t)) <= tight(dtype)


def test_models_helpers() -> None:
    x = torch.randn(2, 3)
    assert torch.equal(models.from_flattened_numpy(models.to_flattened_numpy(x), (2, 3)), x)
    config = SimpleNamespace(model=SimpleNamespace(sigma_min=0.01, sigma_max=50.0, num_scales=7))
    levels = torch.from_numpy(models.get_sigmas(config)).flip(0).float()
    assert torch.allclose(levels, sde_lib.VESDE(0.01, 50.0, 7).discrete_sigmas)
    net = Net()
    for train in (True, False):
        models.get_model_fn(net, train)(torch.randn(SHAPE), torch.ones(4))
        assert net.training is train


# -------------------------------------------------------------------------------------------------------------- losses
@pytest.mark.parametrize("reduce_mean", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_continuous_loss(dtype: torch.dtype, kind: str, continuous: bool, weighted: bool, reduce_mean: bool) -> None:
    sde, process = both(kind)
    batch = torch.rand(SHAPE)
    loss_fn = losses.get_sde_loss_fn(sde, True, reduce_mean, continuous, weighted, eps=1e-3)
    ours, theirs = Net(kind == "ve"), Net(kind == "ve")
    torch.manual_seed(3)
    want = sde_loss(process, theirs, batch, reduce_mean, continuous, weighted, 1e-3)
    torch.manual_seed(3)
    same(loss_fn(ours, batch), want, ours, theirs, dtype)


def same(found: Tensor, want: Tensor, ours: nn.Module, theirs: nn.Module, dtype: torch.dtype) -> None:
    """Value and gradients; near t = eps float32's std has few digits, for both."""
    assert found.shape == ()
    assert found.dtype == dtype
    assert difference(found, want) <= 5 * tight(dtype)
    found.backward()
    want.backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert difference(a.grad, b.grad) <= 20 * tight(dtype)


@pytest.mark.parametrize("reduce_mean", [True, False])
@pytest.mark.parametrize("kind", ["ve", "vp"])
def test_discrete_losses(dtype: torch.dtype, kind: str, reduce_mean: bool) -> None:
    sde, process = both(kind)
    batch = torch.rand(SHAPE)
    ours, theirs = Net(kind == "ve"), Net(kind == "ve")
    theirs_fn, make = (smld_loss, losses.get_smld_loss_fn) if kind == "ve" else (ddpm_loss, losses.get_ddpm_loss_fn)
    torch.manual_seed(3)
    want = theirs_fn(process, theirs, batch, reduce_mean)
    loss_fn = make(sde, True, reduce_mean)
    torch.manual_seed(3)
    found = loss_fn(ours, batch)
    assert ours.training
    same(found, want, ours, theirs, dtype)
    defaults = smld_loss(process, theirs, batch) if kind == "ve" else ddpm_loss(process, theirs, batch)
    assert defaults.isfinite()


def test_ops_of_the_losses() -> None:
    """Noising is one op, the loss with its gradient one."""
    batch, m = torch.rand(SHAPE), torch.randn(SHAPE, requires_grad=True)
    for sde in (both("vp")[0], both("ve")[0]):
        discrete = losses.get_ddpm_loss_fn if isinstance(sde, sde_lib.VPSDE) else losses.get_smld_loss_fn
        for loss_fn in (losses.get_sde_loss_fn(sde, True), discrete(sde, True)):
            with CountOps(SHAPE) as counted:
                torch.autograd.grad(loss_fn(lambda x, labels: m, batch), m)
            assert counted.fused == {"noising": 1, "loss": 1}
            assert set(counted.large) <= {"randn_like"}


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("reduce_mean", [True, False])
def test_loss_of_an_sde_of_ones_own(weighted: bool, reduce_mean: bool) -> None:
    sde, net, batch = Squared(0.2, 15.0, 40), Net(), torch.rand(SHAPE)
    torch.manual_seed(3)
    t = torch.rand(4) * (1 - 1e-5) + 1e-5
    z = torch.randn_like(batch)
    mean, std = sde.marginal_prob(batch, t)
    std = std[:, None, None, None]
    score = -net(mean + std * z, 999 * t) / std
    g2 = (0.2 + t * 14.8)[:, None, None, None] if weighted else std**2
    errors = ((score + z / std) ** 2 * g2).flatten(1)
    want = (errors.mean(1) if reduce_mean else 0.5 * errors.sum(1)).mean()
    torch.manual_seed(3)
    found = losses.get_sde_loss_fn(sde, True, reduce_mean, True, weighted)(net, batch)
    assert torch.allclose(found, want, rtol=1e-5)


class Average:
    """The part of an exponential moving average that step_fn asks for."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def update(self, parameters: Any) -> None:
        self.calls.append("update")

    def store(self, parameters: Any) -> None:
        self.calls.append("store")

    def copy_to(self, parameters: Any) -> None:
        self.calls.append("copy_to")

    def restore(self, parameters: Any) -> None:
        self.calls.append("restore")


@pytest.mark.parametrize(("kind", "continuous"), [("vp", True), ("subvp", True), ("vp", False), ("ve", False)])
def test_training_steps(kind: str, continuous: bool) -> None:
    """Three steps with warm-up and clipping end on the weights of a loop of our own."""
    sde, process = both(kind)
    config = SimpleNamespace(
        optim=SimpleNamespace(
            optimizer="Adam", lr=1e-2, beta1=0.9, eps=1e-8, weight_decay=0.01, warmup=4, grad_clip=0.5
        )
    )
    ours = Net(kind == "ve")
    theirs = copy.deepcopy(ours)
    state = {
        "model": ours,
        "optimizer": losses.get_optimizer(config, ours.parameters()),
        "ema": Average(),
        "step": 1,
    }
    step_fn = losses.get_step_fn(sde, True, losses.optimization_manager(config), continuous=continuous)
    adam = torch.optim.Adam(theirs.parameters(), lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    theirs_fn = smld_loss if kind == "ve" else ddpm_loss
    for k in (1, 2, 3):
        batch = torch.rand(SHAPE)
        torch.manual_seed(k)
        found = step_fn(state, batch)
        torch.manual_seed(k)
        adam.zero_grad()
        want = (
            sde_loss(process, theirs, batch, False, True, False)
            if continuous
            else theirs_fn(process, theirs, batch, False)
        )
        want.backward()
        nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        adam.param_groups[0]["lr"] = 1e-2 * k / 4
        adam.step()
        assert abs(float(found.detach()) / float(want.detach()) - 1) <= 1e-4
    assert state["step"] == 4
    assert state["ema"].calls == ["update"] * 3
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert difference(a, b) <= 1e-4
    torch.manual_seed(9)
    evaluated = losses.get_step_fn(sde, False, continuous=continuous)(state, batch)
    assert not evaluated.requires_grad
    assert not ours.training
    assert state["ema"].calls[3:] == ["store", "copy_to", "restore"]
    assert state["step"] == 4


def test_bad_input() -> None:
    vp, sub, ve = (both(kind)[0] for kind in KINDS)
    with pytest.raises(AssertionError, match="SMLD training only works for VESDEs"):
        losses.get_smld_loss_fn(vp, True)
    with pytest.raises(AssertionError, match="DDPM training only works for VPSDEs"):
        losses.get_ddpm_loss_fn(ve, True)
    with pytest.raises(AssertionError, match="Likelihood weighting is not supported"):
        losses.get_step_fn(vp, False, continuous=False, likelihood_weighting=True)
    with pytest.raises(ValueError, match="Discrete training for subVPSDE is not recommended"):
        losses.get_step_fn(sub, False, continuous=False)
    with pytest.raises(ValueError, match="optimize_fn must be given for training, got None"):
        losses.get_step_fn(vp, True)
    config = SimpleNamespace(optim=SimpleNamespace(optimizer="SGD"))
    with pytest.raises(NotImplementedError, match="Optimizer SGD not supported yet"):
        losses.get_optimizer(config, [])
    with pytest.raises(NotImplementedError, match="Hutchinson type Other unknown"):
        likelihood_lib.get_likelihood_fn(vp, lambda x: x, "Other")(Net(), torch.rand(SHAPE))
    for make in (
        lambda: likelihood_lib.get_likelihood_fn(vp, lambda x: x, solver="other"),
        lambda: sampling.get_ode_sampler(vp, SHAPE, lambda x: x, solver="other"),
    ):
        with pytest.raises(ValueError, match="solver must be 'device' or 'scipy', got 'other'"):
            make()
    x = torch.rand(2, 3)
    for directions, rule in (([], "one or more"), ([x[:1]], r"of shape \[2, 3\], got \[\[1, 3\]\]")):
        with pytest.raises(ValueError, match=rule):
            diffkern.log_likelihood(lambda x, t: x, x, diffkern.vp(), directions=directions)
    with pytest.raises(ValueError, match="give seeds or directions, not both, got both"):
        diffkern.log_likelihood(lambda x, t: x, x, diffkern.vp(), seeds=torch.arange(2), directions=[x])
    with pytest.raises(ValueError, match="directions belong to the divergence 'hutchinson'"):
        diffkern.log_likelihood(lambda x, t: x, x, diffkern.vp(), divergence="exact", directions=[x])
