"""The matchers of compat.torchcfm on a GPU: the CPU's numbers, and nothing that waits for the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from diffkern.compat import torchcfm

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _waiting_is_allowed_again() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    yield
    torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("kind", ["", "Target", "VariancePreserving"])
def test_matchers(kind: str, drawn: bool) -> None:
    cls: Any = getattr(torchcfm, f"{kind}ConditionalFlowMatcher")
    z = torch.randn(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    times = torch.tensor([0.0, 0.2, 0.7, 0.9])
    results = []
    for device in ("cpu", "cuda"):
        x0, x1, eps = z.to(device)
        matcher = cls(0.1)
        matcher.sample_noise_like = lambda x, eps=eps: eps
        t: Tensor | None = None if drawn else times.to(device)
        matcher.sample_location_and_conditional_flow(x0, x1, t)  # tables are uploaded once
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        torch.manual_seed(1)
        results.append(matcher.sample_location_and_conditional_flow(x0, x1, t))
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b.cpu(), a, rtol=2e-6, atol=2e-6)
