"""The sentence about a function of the user's that returned something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffkern import guidance, samplers, sampling, schedules, simulate
from diffkern.checks import got, must_return, returned
from diffkern.objectives import flow_matching, losses, score_matching, variational
from diffkern.simulate import likelihood


def test_what_is_returned_is_checked() -> None:
    x = torch.zeros(2, 3)
    assert returned(x, x.shape) is x
    with pytest.raises(ValueError, match=r"^model must return a tensor of shape \[2, 3\], got shape \[3, 2\]$"):
        returned(x.T, x.shape)
    with pytest.raises(
        ValueError,
        match=r"^shift must return a tensor of shape \[2, 3\], got list of 2: choose one, as in .* at row 0$",
    ):
        returned([x, x], x.shape, "shift", 0)
    assert must_return(None, "one number", "weight") == "weight must return one number, got NoneType"
    assert got(x) == "shape [2, 3]"


T = torch.tensor([3, 7])
X = torch.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)
TABLE = schedules.linear(10)


class Output:
    """What diffusers' networks return."""

    def __init__(self, sample: torch.Tensor) -> None:
        self.sample = self.logits = sample


# Every way of calling a network, with what it gives.
CALLERS: dict[str, Callable[[Any], Any]] = {
    "sample": lambda f: sampling.sample(f, X, samplers.ddim(TABLE, 3)),
    "predictor_corrector": lambda f: sampling.predictor_corrector(f, X, TABLE, 2, snr=0.1, seeds=0),
    "rk45": lambda f: sampling.rk45(f, X, TABLE, rtol=1e-2).x,
    "transition_logprob": lambda f: sampling.transition_logprob(f, X, X, samplers.ddpm(TABLE, 3), 0),
    "simple_loss": lambda f: losses.simple_loss(f, X, T, TABLE, seeds=0),
    "edm_loss": lambda f: losses.edm_loss(f, X, seeds=0),
    "flow_matching_loss": lambda f: flow_matching.flow_matching_loss(f, X, seeds=0),
    "bits": lambda f: variational.bits_per_dim(f, X, TABLE, seeds=0).total,
    "implicit score matching": lambda f: score_matching.implicit_score_matching_loss(f, X, T),
    "log_likelihood": lambda f: likelihood.log_likelihood(f, X, TABLE, solver="euler", steps=2, seeds=0).nats,
    "vector field": lambda f: simulate.VectorField(f).drift_coefficient(X, T),
    "classifier_free": lambda f: guidance.classifier_free(lambda x, t, c: f(x, t), X, X, 2.0)(X, T),
    "autoguidance": lambda f: guidance.autoguidance(f, f, 2.0)(X, T),
    "classifier_guided": lambda f: guidance.classifier_guided(f, lambda x, t: x, TABLE)(X, T),
    "classifier": lambda f: guidance.classifier_gradient(lambda x, t: _apply(lambda x: x[:, 0], f(x, t)), 1)(X, T),
}


def _apply(function: Callable[[Any], Any], wrapped: Any) -> Any:
    """The function of what is inside, wrapped alike."""
    if isinstance(wrapped, torch.Tensor):
        return function(wrapped)
    if isinstance(wrapped, Output):
        return Output(function(wrapped.sample))
    if isinstance(wrapped, dict):
        return {key: function(value) for key, value in wrapped.items()}
    return tuple(function(value) for value in wrapped)


@pytest.mark.parametrize("name", CALLERS)
def test_what_a_network_wraps_is_unwrapped(name: str) -> None:
    """diffusers' output objects, dicts and tuples of one: the same bits as the tensor itself."""

    def network(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.5 * x

    expected = CALLERS[name](network)
    for wrap in (Output, lambda m: {"sample": m, "logits": m}, lambda m: (m,)):
        assert torch.equal(CALLERS[name](lambda x, t, wrap=wrap: wrap(network(x, t))), expected)


@pytest.mark.parametrize("name", CALLERS)
def test_what_has_no_certain_meaning_is_refused_with_the_remedy(name: str) -> None:
    with pytest.raises(ValueError, match=r"must return .*, got tuple of 2: choose one, as in lambda \*args: "):
        CALLERS[name](lambda x, t: (0.5 * x, 0.1 * x))
    with pytest.raises(ValueError, match=r"must return .*, got dict of eps: choose one"):
        CALLERS[name](lambda x, t: {"eps": 0.5 * x})
