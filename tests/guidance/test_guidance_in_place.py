"""Guided models whose parts write into what they are given: every part sees the state and the time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.guidance_cases import LINEAR, SHAPE, C, U, column, net, noise
from torch import Tensor

from diffkern import guidance


def scribbling(x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
    m = net(x, t, *cond) if cond else torch.tanh(x) - 0.01 * column(t, x)
    x.fill_(math.nan)
    t.fill_(-1)
    return m


def plain(x: Tensor, t: Tensor, *cond: Tensor) -> Tensor:
    return scribbling(x.clone(), t.clone(), *cond)


@pytest.mark.parametrize("kind", ["two calls", "autoguidance", "classifier"])
def test_a_part_that_writes(kind: str) -> None:
    def made(model: Any) -> Any:
        if kind == "two calls":
            return guidance.classifier_free(model, C, U, 2.0, batched=False)
        if kind == "autoguidance":
            return guidance.autoguidance(model, model, 2.0)
        return guidance.classifier_guided(model, model, LINEAR)

    x, t = noise(*SHAPE), torch.tensor([3, 500, 900])
    want = made(plain)(x.clone(), t.clone())
    assert torch.equal(made(scribbling)(x.clone(), t.clone()), want)
