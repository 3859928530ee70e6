"""compat.score_sde's loops and losses on a GPU: the CPU's numbers, and nothing in the loop that waits for the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from helpers.score_sde_runs import KINDS, both
from torch import Tensor

from diffkern.compat.score_sde import losses, sampling

pytestmark = pytest.mark.gpu

SHAPE = (4, 2, 5, 4)


@pytest.fixture(autouse=True)
def _waiting_is_allowed_again() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("corrector", ["langevin", "ald"])
@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion", "ancestral_sampling"])
@pytest.mark.parametrize("kind", KINDS)
def test_loops(kind: str, predictor: str, corrector: str) -> None:
    if kind == "subvp" and predictor == "ancestral_sampling":
        pytest.skip("the ancestral predictor has no sub-VP")
    draws = torch.randn(80, *SHAPE, generator=torch.Generator().manual_seed(0))
    found = []
    for device in ("cpu", "cuda"):
        given = iter(draws.to(device).unbind())

        def network(x: Tensor, labels: Tensor, device: str = device) -> Tensor:
            if device == "cuda":  # the times are read before the first call
                torch.cuda.set_sync_debug_mode("error")
            return -x / (1.0 + x.square())

        def finish(x: Tensor) -> Tensor:
            torch.cuda.set_sync_debug_mode("default")
            return x

        def noise(x: Tensor, given: Iterator[Tensor] = given) -> Tensor:
            return next(given)

        sampler = sampling.get_pc_sampler(
            both(kind)[0],
            SHAPE,
            sampling.get_predictor(predictor),
            sampling.get_corrector(corrector),
            finish,
            0.16,
            continuous=True,
            device=device,
        )
        torch.manual_seed(1)
        with mock.patch("torch.randn_like", noise):
            found.append(sampler(network)[0].cpu())
    assert float((found[1] - found[0]).abs().max() / found[0].abs().max()) <= 1e-3  # exp differs, near t = eps it shows


@pytest.mark.parametrize("kind", KINDS)
def test_losses_wait_for_nothing(kind: str) -> None:
    sde, _ = both(kind)
    batch, m = torch.rand(SHAPE, device="cuda"), torch.randn(SHAPE, device="cuda", requires_grad=True)
    made = [losses.get_sde_loss_fn(sde, True, reduce_mean, True, True) for reduce_mean in (True, False)]
    if kind != "subvp":
        made.append((losses.get_smld_loss_fn if kind == "ve" else losses.get_ddpm_loss_fn)(sde, True))
    for loss_fn in made:
        loss_fn(lambda x, labels: m, batch)  # tables are uploaded once
        torch.cuda.set_sync_debug_mode("error")
        value = loss_fn(lambda x, labels: m, batch)
        (gradient,) = torch.autograd.grad(value, m)
        torch.cuda.set_sync_debug_mode("default")
        assert value.isfinite()
        assert gradient.isfinite().all()
