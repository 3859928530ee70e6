"""compat.score_sde's predictor-corrector samplers beside a transcription of the paper's algorithms (the original is not
on PyPI), over whole trajectories."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.score_sde_algorithms import correct, pc_sample, predict
from helpers.score_sde_nets import CORRECTORS, KINDS, PREDICTORS, SHAPE, Net, both, difference, limit, run
from torch import Tensor

from diffkern.compat.score_sde import sampling


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """score_sde works in torch's default dtype."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("predictor", "corrector"), list(itertools.product(PREDICTORS, CORRECTORS)))
def test_trajectory(dtype: torch.dtype, kind: str, predictor: str, corrector: str, continuous: bool) -> None:
    if kind == "subvp" and predictor == "ancestral_sampling":
        pytest.skip("the ancestral predictor has no sub-VP")
    sde, process = both(kind)
    nets = Net(kind), Net(kind)
    torch.manual_seed(5)
    want = pc_sample(process, nets[0], SHAPE, predictor, corrector, 0.2, 2, False, continuous)
    next_want = torch.rand(2)
    torch.manual_seed(5)
    sampler = sampling.get_pc_sampler(
        sde,
        SHAPE,
        sampling.get_predictor(predictor),
        sampling.get_corrector(corrector),
        lambda x: x,
        0.2,
        n_steps=2,
        continuous=continuous,
        device="cpu",
    )
    found, calls = sampler(nets[1])
    assert torch.equal(torch.rand(2), next_want), "the generator is not where the algorithm leaves it"
    assert found.dtype == want.dtype == dtype
    assert calls == 36
    assert difference(found, want) <= limit(dtype, 36)
    assert len(nets[0].labels) == len(nets[1].labels)
    for a, b in zip(nets[0].labels, nets[1].labels, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("denoise", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("predictor", ["euler_maruyama", "reverse_diffusion"])
def test_probability_flow_and_denoise(dtype: torch.dtype, kind: str, predictor: str, denoise: bool) -> None:
    """Euler-Maruyama along the probability flow is a TypeError in score_sde; its formula is clear."""
    sde, process = both(kind)
    net = Net(kind, random=True)
    options: dict[str, Any] = {"flow": True, "denoise": denoise, "eps": 1e-2}
    torch.manual_seed(6)
    want = pc_sample(process, net, SHAPE, predictor, "ald", 0.1, 1, **options)
    torch.manual_seed(6)
    sampler = sampling.get_pc_sampler(
        sde,
        SHAPE,
        sampling.get_predictor(predictor),
        sampling.AnnealedLangevinDynamics,
        lambda x: 2 * x + 1,
        0.1,
        probability_flow=True,
        continuous=True,
        denoise=denoise,
        eps=1e-2,
        device="cpu",
    )
    assert difference((sampler(net)[0] - 1) / 2, want) <= limit(dtype, 24)


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_draws(kind: str) -> None:
    """Euler-Maruyama draws its noise before the network's call, the others after it."""
    sde, process = both(kind)
    net = Net(kind, random=True)
    for predictor, corrector in (("euler_maruyama", "langevin"), ("reverse_diffusion", "ald")):
        torch.manual_seed(7)
        want = pc_sample(process, net, SHAPE, predictor, corrector)
        torch.manual_seed(7)
        made = sampling.get_predictor(predictor), sampling.get_corrector(corrector)
        sampler = sampling.get_pc_sampler(sde, SHAPE, *made, lambda x: x, 0.16, continuous=True, device="cpu")
        assert difference(sampler(net)[0], want) <= limit(torch.float32, 24)


def updates(kind: str, dtype: torch.dtype, given: str) -> list[tuple[Any, Any, int]]:
    """(ours, the transcription's, updates) as functions of (x, t)."""
    sde, process = both(kind)
    net = Net(kind)
    score_fn: Any = sampling.get_score_fn(sde, net, continuous=True)
    if given == "any":  # a function of the user's own
        score_fn = lambda x, t: process.score(net, x, t, True)  # noqa: E731
    pairs: list[tuple[Any, Any, int]] = []
    for name in PREDICTORS:
        for flow in (False, True):
            if name == "ancestral_sampling" and (flow or kind == "subvp"):
                continue
            made = sampling.get_predictor(name)(sde, score_fn, flow)
            theirs = lambda x, t, name=name, flow=flow: predict(process, net, x, t, name, flow)  # noqa: E731
            pairs.append((made.update_fn, theirs, 1))
    for name in CORRECTORS:
        made = sampling.get_corrector(name)(sde, score_fn, 0.17, 2)
        pairs.append((made.update_fn, lambda x, t, name=name: correct(process, net, x, t, name, 0.17, 2), 2))
    return pairs


@pytest.mark.parametrize("given", ["get_score_fn", "any"])
@pytest.mark.parametrize("kind", KINDS)
def test_updates_by_themselves(dtype: torch.dtype, kind: str, given: str) -> None:
    """update_fn at times that differ between the samples: (x', mean), the same draws, differentiable."""
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.9, 0.31, 1e-3])
    for ours, theirs, count in updates(kind, dtype, given):
        torch.manual_seed(9)
        want = theirs(x, t)
        torch.manual_seed(9)
        found = ours(x, t)
        for a, b in zip(found, want, strict=True):
            assert a.dtype == b.dtype == dtype
            assert difference(a, b) <= limit(dtype, count)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        torch.manual_seed(9)
        theirs(leaves[0], t)[1].square().sum().backward()
        torch.manual_seed(9)
        ours(leaves[1], t)[1].square().sum().backward()
        assert difference(leaves[1].grad, leaves[0].grad) <= 20 * limit(dtype, count)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision(kind: str) -> None:
    """States of 16 bits become float32, as in score_sde, and a network may return them."""
    sde, process = both(kind)

    m = torch.randn(SHAPE).half()

    def net(x: Tensor, labels: Tensor) -> Tensor:
        return m

    x, t = torch.randn(SHAPE).half(), torch.tensor([0.9, 0.31, 0.01])
    for name in ("euler_maruyama", "reverse_diffusion"):
        torch.manual_seed(3)
        want = predict(process, net, x, t, name)
        torch.manual_seed(3)
        made = sampling.get_predictor(name)(sde, sampling.get_score_fn(sde, net, continuous=True))
        found = made.update_fn(x, t)
        for a, b in zip(found, want, strict=True):
            assert a.dtype == b.dtype == torch.float32
            assert difference(a, b) <= 1e-6
    torch.manual_seed(4)
    want_all = pc_sample(process, net, SHAPE, "reverse_diffusion", "langevin")
    torch.manual_seed(4)
    found_all = run(sde, "reverse_diffusion", "langevin", net)
    assert found_all.dtype == torch.float32
    assert difference(found_all, want_all) <= limit(torch.float32, 24)


def test_memory_formats() -> None:
    """A network in channels_last, and a state that is not contiguous."""
    sde, process = both("ve")
    net = Net("ve")

    def turned(x: Tensor, labels: Tensor) -> Tensor:
        return net(x, labels).contiguous(memory_format=torch.channels_last)

    torch.manual_seed(2)
    want = pc_sample(process, net, SHAPE, "reverse_diffusion", "langevin")
    torch.manual_seed(2)
    assert difference(run(sde, "reverse_diffusion", "langevin", turned), want) <= limit(torch.float32, 24)
    x, t = torch.randn(4, 5, 2, 3).permute(3, 2, 1, 0), torch.tensor([0.9, 0.5, 0.1])
    assert x.shape == SHAPE
    for ours, theirs, count in updates("ve", torch.float32, "get_score_fn"):
        torch.manual_seed(9)
        want_x, want_mean = theirs(x, t)
        torch.manual_seed(9)
        found, mean = ours(x, t)
        assert difference(found, want_x) <= limit(torch.float32, count)
        assert difference(mean, want_mean) <= limit(torch.float32, count)
