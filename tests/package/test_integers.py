"""Integers of NumPy, and tensors of one, wherever an integer is taken: as Python's are; no bool, no float."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffkern
from diffkern import ops
from diffkern.integers import as_integer, integer
from diffkern.objectives.time_sampling import TIME_SAMPLERS
from diffkern.sampling.runner import transition_logprob
from diffkern.schedules import grids
from diffkern.simulate import likelihood

S, FLOW = diffkern.linear(100), diffkern.flow()
X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
SEEDS = ops.seeds(0, 2)
DDPM = diffkern.ddpm(S, 4)
TABLE = torch.tensor([[0.9, 0.4, 0.4, -0.9]], dtype=torch.float64)


def model(x: Tensor, t: Tensor) -> Tensor:
    return 0.1 * x


@pytest.mark.parametrize("value", [5, np.int64(5), np.uint8(5), np.array(5), torch.tensor(5), torch.tensor(5).short()])
def test_what_is_an_integer(value: Any) -> None:
    found = as_integer(value)
    assert found == 5
    assert type(found) is int


@pytest.mark.parametrize(
    "value",
    [True, np.True_, torch.tensor(True), 5.0, np.float64(5), torch.tensor(5.0), "5", None, [5], np.array([5, 6])],
)
def test_what_is_none(value: Any) -> None:
    assert as_integer(value) is None
    with pytest.raises(ValueError, match=r"^n must be an integer of at least 1, got "):
        integer("n", value)


def test_the_sentence() -> None:
    assert integer("n", np.int64(3), 1, 3) == 3
    for value, text in (
        (np.int64(4), "got 4"),
        (0, "got 0"),
        ("4", "got '4'"),
        (np.float32(2), r"got np\.float32\(2\.0\)"),
    ):
        with pytest.raises(ValueError, match=rf"^n must be an integer in 1\.\.3, {text}$"):
            integer("n", value, 1, 3)


SAMPLERS: dict[str, Callable[[Any], diffkern.Plan]] = {
    name: (lambda n, sampler=sampler, schedule=FLOW if name == "flow_sde" else S: sampler(schedule, n))
    for name, sampler in diffkern.samplers.SAMPLERS.items()
    if name not in ("langevin", "annealed_langevin")
}
CALLS: dict[str, Callable[[Any], Any]] = {
    **SAMPLERS,
    "langevin": lambda n: diffkern.langevin(S, n, t=50, step_size=0.1),
    "annealed_langevin": lambda n: diffkern.annealed_langevin(S, n, each=n),
    "order": lambda n: (diffkern.lms(S, 9, order=n), diffkern.deis(S, 9, order=n), diffkern.unipc(S, 9, order=n)),
    "repaint": lambda n: diffkern.repaint(S, 9, jump_length=n, jump_n_sample=n),
    "timesteps": lambda n: diffkern.ddim(S, timesteps=[90, 40, n]),
    "tables": lambda n: [
        make(n) for make in (diffkern.linear, diffkern.cosine, diffkern.sigmoid, diffkern.exponential)
    ],
    "grids": lambda n: (grids.karras_sigmas(n, 0.1, 9.0), grids.vp_sigmas(n), grids.flow_sigmas(n), grids.times(S, n)),
    "level": lambda n: (S.alpha(n), S.subsequence([n, 50]), DDPM.level(n)),
    "randn": lambda n: ops.randn((2, n, n), SEEDS, n),
    "noise_sum": lambda n: ops.noise_sum((2, n), SEEDS, torch.tensor([1]), torch.ones(1, dtype=torch.float64)),
    "stream": lambda n: ops.noising(X, TABLE, seeds=SEEDS, stream=n)[0],
    "row": lambda n: ops.step(X, None, table=torch.eye(21, dtype=torch.float64)[[20, 20, 20, 6]] + _clip(), row=n)[0],
    "heads": lambda n: diffkern.spatial_attention(torch.ones(2, 24 * n, 4), n),
    "start": lambda n: diffkern.sample(model, X, DDPM, seeds=SEEDS, start=n),
    "initial": lambda n: diffkern.initial(DDPM, (2, n, n), SEEDS, start=n, x0=torch.ones(2, n, n)),
    "guidance": lambda n: DDPM.with_guidance(n),
    "corrector": lambda n: diffkern.predictor_corrector(model, X, diffkern.vp(), n, corrector_steps=n, seeds=SEEDS),
    "times of training": lambda n: TIME_SAMPLERS["uniform"]().sample(n, S, seeds=ops.seeds(0, 3)),
    "likelihood": lambda n: (
        likelihood.log_likelihood(model, X, FLOW, "velocity", solver="heun", steps=n, probes=n, seeds=SEEDS).nats
    ),
    "bits": lambda n: likelihood.nats_to_bits_per_dim(torch.ones(2), n, levels=n),
    "class": lambda n: diffkern.guidance.classifier_gradient(lambda x, t: x.flatten(1), n)(X, torch.zeros(2)),
}


def _clip() -> Tensor:
    columns = torch.zeros(21, dtype=torch.float64)
    columns[diffkern.plan.COLUMNS.index("clip")] = torch.inf
    return columns


@pytest.mark.parametrize("name", CALLS)
def test_numpy_integers_are_taken(name: str) -> None:
    """The same as with Python's 3, and a plan holds Python's numbers: it is printed and stored as ever."""
    want, found = CALLS[name](3), CALLS[name](np.int64(3))
    for a, b in zip(*(r if isinstance(r, tuple | list) else [r] for r in (want, found)), strict=True):
        if isinstance(a, Tensor):
            assert torch.equal(a, b)
        else:
            assert repr(a) == repr(b)
            assert a == b
        if isinstance(b, diffkern.Plan):
            assert b.to_json() == a.to_json()


def test_the_step_of_a_plan() -> None:
    plan = diffkern.ddpm(S, 4)
    after = diffkern.sample(model, X, plan, seeds=SEEDS, start=3)
    want, found = (transition_logprob(model, X, after, plan, n) for n in (1, np.int64(1)))
    assert torch.equal(want, found)


def test_integers_of_drop_ins() -> None:
    k_diffusion = pytest.importorskip("diffkern.compat.k_diffusion")
    want, found = (k_diffusion.BrownianTreeNoiseSampler(X, 0.1, 9.0, seed=n)(5.0, 1.0) for n in (5, np.int64(5)))
    assert torch.equal(want, found)
