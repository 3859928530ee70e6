"""Mixed precision: every loss gives a 16-bit network the gradient of the scaled loss, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffkern
from diffkern.compat import guided_diffusion as gd
from diffkern.compat import k_diffusion as kd
from diffkern.compat.edm import EDMLoss
from diffkern.compat.score_sde import losses as score_sde
from diffkern.compat.score_sde import sde_lib
from diffkern.objectives import flow_matching, score_matching, variational

SHAPE = (4, 3, 64, 64)
SEEDS, SCALE = diffkern.seeds(0, 4), 2.0**12
T, TIMES = torch.tensor([3, 400, 700, 900]), torch.tensor([0.1, 0.3, 0.6, 0.9])
X0 = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1)).clamp(-1, 1)
LINEAR, VP = diffkern.linear(), diffkern.vp()


class Fixed(nn.Module):
    """A network that answers with the same numbers whatever it is asked."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.out


def training_losses(out: Tensor, loss: str, variance: str) -> Tensor:
    diffusion = gd.GaussianDiffusion(
        betas=gd.get_named_beta_schedule("linear", 1000),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType[variance],
        loss_type=gd.LossType[loss],
    )
    return diffusion.training_losses(Fixed(out), X0, T, noise=noise(2))["loss"].mean()


def noise(seed: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def sde_loss(out: Tensor, **options: bool) -> Tensor:
    return score_sde.get_sde_loss_fn(sde_lib.VPSDE(), train=True, **options)(Fixed(out), X0)


SINGLE: dict[str, Callable[[Tensor], Tensor]] = {
    "prediction_loss": lambda m: diffkern.prediction_loss(m, X0, T, LINEAR, seeds=SEEDS),
    "weighted": lambda m: diffkern.prediction_loss(m, X0, TIMES, VP, "v", weight="min_snr", seeds=SEEDS),
    "with times that require grad": lambda m: diffkern.prediction_loss(
        m, X0, TIMES.clone().requires_grad_(), VP, "v", seeds=SEEDS
    ),
    "simple_loss": lambda m: diffkern.simple_loss(Fixed(m), X0, T, LINEAR, seeds=SEEDS),
    "edm_loss": lambda m: diffkern.edm_loss(Fixed(m), X0, 3 * TIMES, seeds=SEEDS),
    "flow_matching_loss": lambda m: flow_matching.flow_matching_loss(Fixed(m), X0, TIMES, seeds=SEEDS),
    "denoising score matching": lambda m: score_matching.denoising_score_matching_loss(
        Fixed(m), X0, TIMES, VP, seeds=SEEDS
    ),
    "ncsn_loss": lambda m: score_matching.ncsn_loss(Fixed(m), X0, torch.tensor([0.3, 2.0]), seeds=SEEDS),
    "vlb_loss": lambda m: variational.vlb_loss(m, X0, T, LINEAR, variance="beta", seeds=SEEDS),
    "guided_diffusion": lambda m: training_losses(m, "MSE", "FIXED_LARGE"),
    "score_sde": sde_loss,
    "score_sde, likelihood": lambda m: sde_loss(m, likelihood_weighting=False, reduce_mean=False),
    "score_sde, ddpm": lambda m: score_sde.get_ddpm_loss_fn(sde_lib.VPSDE(), train=True)(Fixed(m), X0),
    "score_sde, smld": lambda m: score_sde.get_smld_loss_fn(sde_lib.VESDE(), train=True)(Fixed(m), X0),
    "k_diffusion": lambda m: kd.layers.Denoiser(Fixed(m), 0.5).loss(X0, noise(2), 3 * TIMES).mean(),
    "EDMLoss": lambda m: EDMLoss()(Fixed(m), X0).mean(),
}
DOUBLE: dict[str, Callable[[Tensor], Tensor]] = {
    "hybrid_loss": lambda m: variational.hybrid_loss(m, X0, T, LINEAR, seeds=SEEDS),
    "vlb_loss, learned": lambda m: variational.vlb_loss(m, X0, T, LINEAR, seeds=SEEDS),
    "guided_diffusion, hybrid": lambda m: training_losses(m, "RESCALED_MSE", "LEARNED_RANGE"),
    "guided_diffusion, bound": lambda m: training_losses(m, "KL", "LEARNED_RANGE"),
}
CALLS = SINGLE | DOUBLE


@pytest.mark.parametrize("large", [False, True], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_scaled_gradient(name: str, dtype: torch.dtype, large: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of the same numbers in float32, rounded to the dtype: half a unit, and no zeros that the scale lifts."""
    if large:
        monkeypatch.setattr("diffkern.ops._common._SMALL", 0)
    shape = (SHAPE[0], 2 * SHAPE[1], *SHAPE[2:]) if name in DOUBLE else SHAPE
    values = (0.3 * torch.randn(shape, generator=torch.Generator().manual_seed(3))).to(dtype)
    grads = []
    for m in (values.clone().requires_grad_(), values.float().requires_grad_()):
        torch.manual_seed(4)
        grads.append(torch.autograd.grad(CALLS[name](m) * SCALE, m)[0])
    found, right = grads
    assert found.dtype == dtype
    unit = torch.finfo(dtype)
    half_a_unit = 0.501 * (unit.eps * right.abs() + unit.smallest_normal * unit.eps)
    assert bool(((found.float() - right).abs() <= half_a_unit + 2e-6 * right.abs().max()).all())
    assert bool((right != 0).float().mean() > 0.4)  # half of them are those of a mean that the hybrid loss holds


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_training_with_a_scaler(dtype: torch.dtype) -> None:
    """GradScaler's loop finds what float32 finds: unscaled gradients of 1e-8 are 0 in float16, and the loss stays."""
    target = 0.5 * torch.tanh(X0)
    finals = SimpleNamespace()
    for kind in (dtype, torch.float32):
        net = nn.Conv2d(3, 3, 1)
        with torch.no_grad():
            net.weight.zero_()
            net.bias.zero_()
        optimiser = torch.optim.Adam(net.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", enabled=kind == torch.float16)
        for _ in range(40):
            optimiser.zero_grad()
            with torch.autocast("cpu", dtype=dtype, enabled=kind != torch.float32):
                pred = net(X0)
            assert pred.dtype == kind
            loss = 1e-4 * diffkern.prediction_loss(pred, target, T, LINEAR, "x0", seeds=SEEDS)
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
        setattr(finals, "wide" if kind == torch.float32 else "narrow", float(loss.detach()) / 1e-4)
    start = float(target.square().mean())
    assert finals.wide < 0.1 * start
    assert abs(finals.narrow - finals.wide) < 0.02 * start
