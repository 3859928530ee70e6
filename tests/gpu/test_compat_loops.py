"""The loops of compat.k_diffusion and compat.edm on a GPU: the CPU's numbers, and nothing read back between steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from diffkern.compat import edm, k_diffusion

pytestmark = pytest.mark.gpu

NAMES = [name for name in k_diffusion.__all__ if name.startswith("sample_")]


class Model:
    """A denoiser; from its first call on, anything that waits for the GPU is an error."""

    sigma_min, sigma_max = 0.0, float("inf")

    def round_sigma(self, sigma: Tensor) -> Tensor:
        return sigma

    def __call__(self, x: Tensor, sigma: Tensor, labels: Any = None) -> Tensor:
        torch.cuda.set_sync_debug_mode("error")
        return x / (1 + sigma.reshape(-1, *(1,) * (x.ndim - 1)) ** 2)


@pytest.fixture(autouse=True)
def _waiting_is_allowed_again() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("name", NAMES)
def test_k_diffusion(name: str) -> None:
    x = 20.0 * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sigmas = k_diffusion.get_sigmas_karras(9, 0.03, 20.0)
    function = getattr(k_diffusion, name)
    results = []
    for device in ("cpu", "cuda"):
        options: dict[str, Any] = {}
        if "sde" in name:
            own = k_diffusion.BrownianTreeNoiseSampler(x.to(device), 0.03, 20.0, seed=[1, 2])
            options = {"noise_sampler": own}
        elif "ancestral" in name:
            options = {"eta": 0.0}
        results.append(function(Model(), x.to(device), sigmas.to(device), disable=True, **options))
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(results[1].cpu(), results[0], rtol=2e-5, atol=2e-5)


def test_edm() -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for device in ("cpu", "cuda"):
        results.append(edm.edm_sampler(Model(), x.to(device), randn_like=torch.ones_like, S_churn=10.0))
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(results[1].cpu(), results[0], rtol=1e-12, atol=1e-12)
