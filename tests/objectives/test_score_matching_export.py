"""torch.export of the losses that take a gradient themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffkern import implicit_score_matching_loss, ops, sliced_score_matching_loss


class Loss(nn.Module):
    """A loss of a score that has times and a condition."""

    def __init__(self, **sliced: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, self.sliced = nn.Sequential(nn.Linear(2, 8), nn.SiLU(), nn.Linear(8, 2)), sliced

    def forward(self, x: Tensor, t: Tensor, seeds: Tensor) -> Tensor:
        def score(x: Tensor, t: Tensor, scale: Tensor) -> Tensor:
            found: Tensor = self.net(x) * t[:, None] * scale
            return found

        if not self.sliced:
            return implicit_score_matching_loss(score, x, t, scale=t[:, None])
        return sliced_score_matching_loss(score, x, t, seeds=seeds, scale=t[:, None], **self.sliced)


def inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    x = ops.randn((batch, 2), ops.seeds(1, batch), 3)
    return x, torch.linspace(0.1, 0.9, batch), ops.seeds(5, batch)


@pytest.mark.full
@pytest.mark.parametrize("sliced", [{}, {"n_projections": 2}, {"variance_reduced": False, "projection": "gaussian"}])
def test_value_and_gradient_for_every_batch(sliced: dict[str, Any]) -> None:
    module, batch = Loss(**sliced), torch.export.Dim("batch", min=2)
    program = torch.export.export(module, inputs(3), dynamic_shapes=({0: batch},) * 3).module()
    for size in (3, 5):
        found, want = program(*inputs(size)), module(*inputs(size))
        torch.testing.assert_close(found, want)
        right = dict(
            zip(dict(module.named_parameters()), torch.autograd.grad(want, [*module.parameters()]), strict=True)
        )
        named = dict(program.named_parameters())
        for name, gradient in zip(named, torch.autograd.grad(found, [*named.values()]), strict=True):
            torch.testing.assert_close(gradient, right[name])


@pytest.mark.full
@pytest.mark.parametrize("sliced", [{}, {"n_projections": 1}])
def test_strict_export_says_what_to_do(sliced: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=r"torch\.export follows with strict=False \(its default\), got strict=True"):
        torch.export.export(Loss(**sliced), inputs(3), strict=True)
