"""compat.guided_diffusion on a GPU: the CPU's numbers, and nothing read back between steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.guided_diffusion_runs import VARIANCES, classifier, images, state
from torch import Tensor

from diffkern.compat import guided_diffusion as gd

pytestmark = pytest.mark.gpu


def make(variance: str, loss: str = "MSE") -> Any:
    return gd.SpacedDiffusion(
        use_timesteps=gd.space_timesteps(1000, "10"),
        betas=gd.get_named_beta_schedule("linear", 1000),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType[variance],
        loss_type=gd.LossType[loss],
    )


def model_of(variance: str, strict: bool = True) -> Any:
    """From its first call on, anything that waits for the GPU is an error (``strict``)."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        torch.cuda.set_sync_debug_mode("error" if strict else "default")
        out = 0.8 * x + 1e-4 * t.reshape(-1, 1, 1, 1)
        return torch.cat([out, torch.tanh(x)], 1) if variance.startswith("LEARNED") else out

    return model


@pytest.fixture(autouse=True)
def _waiting_is_allowed_again() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("cond_fn", [None, classifier])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("kind", ["p_sample_loop", "ddim_sample_loop"])
def test_loops(kind: str, variance: str, cond_fn: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    start, results = state(torch.float32), []
    for device in ("cpu", "cuda"):
        loop = getattr(make(variance), kind)
        results.append(loop(model_of(variance), start.shape, start.to(device), cond_fn=cond_fn, device=device))
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(results[1].cpu(), results[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("loss", ["RESCALED_MSE", "KL"])
def test_calls(loss: str, variance: str) -> None:
    """Steps and losses at timesteps of a tensor; the tables are on the device after the first call."""
    x, t, eps = images(torch.float32), torch.tensor([9, 0, 4, 1]), state(torch.float32, seed=7)
    results: list[list[Tensor]] = []
    for device in ("cpu", "cuda"):
        d = make(variance, loss)
        on, time, noise = x.to(device), t.to(device), eps.to(device)
        for strict in (False, True):
            model = model_of(variance, strict)
            found = [
                d.training_losses(model, on, time, noise=noise)["loss"],
                d.ddim_sample(model, noise, time)["sample"],
                d.p_sample(model, noise, time)["pred_xstart"],
                *d.p_mean_variance(model, noise, time).values(),
            ]
        torch.cuda.set_sync_debug_mode("default")
        results.append([value.cpu() for value in found])
    for found, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5)
