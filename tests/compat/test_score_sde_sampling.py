"""compat.score_sde's predictor-corrector samplers beside a transcription of the paper's algorithms (the original is not
on PyPI), over whole trajectories."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.op_counter import EveryOp
from helpers.score_sde_algorithms import Process, correct, pc_sample, predict
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkern.compat.score_sde import _rows, sampling, sde_lib

SHAPE = (3, 2, 5, 4)
PREDICTORS = ("euler_maruyama", "reverse_diffusion", "ancestral_sampling", "none")
CORRECTORS = ("langevin", "ald", "none")
KINDS = ("vp", "subvp", "ve")


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    """score_sde works in torch's default dtype."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def both(kind: str, N: int = 12) -> tuple[Any, Process]:
    """The SDE and its transcription."""
    if kind == "ve":
        return sde_lib.VESDE(0.02, 30.0, N), Process("ve", 0.02, 30.0, N)
    made = (sde_lib.VPSDE if kind == "vp" else sde_lib.subVPSDE)(0.2, 8.0, N)
    return made, Process(kind, 0.2, 8.0, N)


class Net(torch.nn.Module):
    """Like a trained network: close to the noise for VP, to its score for VE; its noise depends on the generator."""

    def __init__(self, kind: str, random: bool = False) -> None:
        super().__init__()
        self.kind, self.random = kind, random
        self.labels: list[Tensor] = []

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        self.labels.append(labels)
        at = labels.to(x.dtype)[:, None, None, None]
        out = (0.8 * x + 0.2 * torch.tanh(x)) * (1.0 + 1e-4 * at)
        if self.kind == "ve":
            out = -x / (1.0 + x.square()) - 0.1 * torch.tanh(at * 1e-3 + x)
        return out + 0.01 * torch.randn_like(x) if self.random else out


def difference(found: Tensor, want: Tensor) -> float:
    return float((found - want).abs().max() / want.abs().max())


def limit(dtype: torch.dtype, steps: int) -> float:
    """2e-6 a step in float32, 1e-12 in all in float64."""
    return 2e-6 * steps if dtype == torch.float32 else 1e-12


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


def run(sde: Any, predictor: Any, corrector: Any, net: Any, **options: Any) -> Tensor:
    if isinstance(predictor, str):
        predictor = sampling.get_predictor(predictor)
    if isinstance(corrector, str):
        corrector = sampling.get_corrector(corrector)
    options = {"continuous": True, "device": "cpu", **options}
    found: Tensor = sampling.get_pc_sampler(sde, SHAPE, predictor, corrector, lambda x: x, 0.16, **options)(net)[0]
    return found


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


class Sizes(EveryOp):
    """Also counts results without dimensions, and reads of them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if (isinstance(result, Tensor) and result.ndim == 0) or "local_scalar" in func._opname:
            self.counts["zero-dim"] += 1
        return result


LANGEVIN = {"linalg_vector_norm": 2, "sum": 2, "div": 1, "nan_to_num": 1, "pow": 1, "mul": 1, "addmm": 1}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("predictor", "corrector"), list(itertools.product(PREDICTORS, CORRECTORS)))
def test_ops_a_step(kind: str, predictor: str, corrector: str) -> None:
    """One op an update and its noise; langevin also makes its step size. Nothing zero-dim, nothing read."""
    if kind == "subvp" and predictor == "ancestral_sampling":
        pytest.skip("the ancestral predictor has no sub-VP")
    m = torch.randn(SHAPE)
    counts = []
    for N in (20, 24):
        with Sizes() as counted:
            run(both(kind, N)[0], predictor, corrector, lambda x, labels: m)
        counts.append(counted.counts)
    views = ("aten.view", "aten._unsafe_view", "aten.select", "aten.unbind")
    difference = {k: (counts[1][k] - counts[0][k]) / 4 for k in counts[1] if k not in views}
    updates = (predictor != "none") + (corrector != "none")
    want = {"diffkern.step": updates, "aten.randn_like": updates}
    if corrector == "langevin":
        want |= {f"aten.{name}": number for name, number in LANGEVIN.items()}
    assert {k: n for k, n in difference.items() if n} == {k: n for k, n in want.items() if n}
    assert difference.get("zero-dim", 0) == 0


@pytest.fixture
def fake_cuda() -> Iterator[None]:
    """Tensors without data on a CUDA device; what the modules have kept there is forgotten."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield
    _rows.COPIES.clear()


@pytest.mark.parametrize("continuous", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("fake_cuda")
def test_updates_on_a_device_read_nothing(kind: str, continuous: bool) -> None:
    """A read of a fake tensor raises, and so does a table of the CPU indexed there, as score_sde's VE ones are."""
    sde, _ = both(kind)
    x, t = torch.empty(SHAPE, device="cuda"), torch.empty(3, device="cuda")
    score_fn = sampling.get_score_fn(sde, lambda x, labels: 2 * x, continuous=continuous)
    made = [sampling.get_corrector(name)(sde, score_fn, 0.16, 2) for name in CORRECTORS]
    names = PREDICTORS if kind != "subvp" else [name for name in PREDICTORS if name != "ancestral_sampling"]
    made += [sampling.get_predictor(name)(sde, score_fn) for name in names]
    for one in made:
        assert [out.device.type for out in one.update_fn(x, t)] == ["cuda"] * 2


class Doubled(sampling.ReverseDiffusionPredictor):
    """A user's own."""

    def update_fn(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        x, _ = super().update_fn(x, t)
        return super().update_fn(x, t)


class Cosine(sde_lib.VPSDE):
    """A user's own SDE: other marginals, drift and chain, not linear in x."""

    def sde(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        drift, g = super().sde(x, t)
        return drift + 0.01 * x.square(), g

    def discretize(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        f, g = super().discretize(x, t)
        return f - 0.01 * x.square(), g


def test_own_predictors_correctors_and_sdes() -> None:
    """Classes of the user's own are called as score_sde calls them."""
    sde, process = both("vp")
    net = Net("vp")
    torch.manual_seed(2)
    x = process.prior(SHAPE)
    for t in torch.linspace(1, 1e-3, 12):
        for _ in range(2):
            x, mean = predict(process, net, x, torch.ones(3) * t, "reverse_diffusion")
    torch.manual_seed(2)
    assert difference(run(sde, Doubled, "none", net), mean) <= limit(torch.float32, 24)
    torch.manual_seed(2)
    assert difference(run(sde, Doubled, None, net), mean) <= limit(torch.float32, 24)

    own = Cosine(0.2, 8.0, 12)
    x, t = torch.randn(SHAPE), torch.tensor([0.9, 0.31, 0.01])
    score = process.score(net, x, t, True)
    beta = process.diffusion(t)[:, None, None, None] ** 2
    drift = -0.5 * beta * x + 0.01 * x.square() - beta * score
    made = sampling.EulerMaruyamaPredictor(own, sampling.get_score_fn(own, net, continuous=True))
    torch.manual_seed(3)
    z = torch.randn_like(x)
    torch.manual_seed(3)
    found, mean = made.update_fn(x, t)
    assert difference(mean, x - drift / 12) <= 1e-6
    assert difference(found, x - drift / 12 + (beta / 12).sqrt() * z) <= 1e-6
    f, g = process.chain(x, t)
    made_rd = sampling.ReverseDiffusionPredictor(own, sampling.get_score_fn(own, net, continuous=True), True)
    want = x - (f - 0.01 * x.square() - 0.5 * g[:, None, None, None] ** 2 * score)
    assert all(difference(v, want) <= 1e-6 for v in made_rd.update_fn(x, t))
    assert run(own, "euler_maruyama", "langevin", net).isfinite().all()
    assert run(sde, None, "ald", net).isfinite().all()


def config(**options: Any) -> SimpleNamespace:
    chosen: dict[str, Any] = {
        "method": "PC",
        "predictor": "Reverse_Diffusion",
        "corrector": "LANGEVIN",
        "snr": 0.17,
        "n_steps_each": 2,
        "probability_flow": False,
        "noise_removal": False,
        **options,
    }
    return SimpleNamespace(sampling=SimpleNamespace(**chosen), training=SimpleNamespace(continuous=False), device="cpu")


def test_sampling_fn_from_a_configuration() -> None:
    sde, process = both("ve")
    net = Net("ve")
    torch.manual_seed(4)
    want = pc_sample(process, net, SHAPE, "reverse_diffusion", "langevin", 0.17, 2, False, False, False, 1e-5)
    torch.manual_seed(4)
    found, calls = sampling.get_sampling_fn(config(), sde, SHAPE, lambda x: x, 1e-5)(net)
    assert calls == 36
    assert difference(found, want) <= limit(torch.float32, 36)
    with pytest.raises(ValueError, match="Sampler name other unknown"):
        sampling.get_sampling_fn(config(method="other"), sde, SHAPE, lambda x: x, 1e-5)
    with pytest.raises(KeyError):
        sampling.get_sampling_fn(config(predictor="other"), sde, SHAPE, lambda x: x, 1e-5)


def test_a_score_of_zero_makes_no_langevin_step() -> None:
    sde, _ = both("ve")
    x, t = torch.randn(SHAPE), torch.full([3], 0.5)
    corrector = sampling.LangevinCorrector(sde, lambda x, t: torch.zeros_like(x), 0.2, 1)
    assert torch.equal(corrector.update_fn(x, t)[0], x)
    score = torch.ones_like(x)
    score[0, 0, 0, 0] = torch.nan
    found = sampling.LangevinCorrector(sde, lambda x, t: score, 0.2, 1).update_fn(x, t)[0]
    assert int(found.isnan().sum()) == 1


def test_bad_input() -> None:
    sde, net = both("vp")[0], Net("vp")
    with pytest.raises(ValueError, match="Already registered model with name: langevin"):
        sampling.register_corrector(sampling.LangevinCorrector, name="langevin")
    named = sampling.register_predictor(type("Mine", (sampling.NonePredictor,), {}))
    assert sampling.get_predictor("Mine") is named
    sub = both("subvp")[0]
    with pytest.raises(NotImplementedError, match="SDE class subVPSDE not yet supported"):
        sampling.AncestralSamplingPredictor(sub, lambda x, t: x)
    with pytest.raises(AssertionError, match="Probability flow not supported by ancestral sampling"):
        sampling.AncestralSamplingPredictor(sde, lambda x, t: x, True)

    class Other(sde_lib.VPSDE):
        pass

    Other.__bases__ = (sde_lib.SDE,)
    with pytest.raises(NotImplementedError, match="SDE class Other not yet supported"):
        sampling.LangevinCorrector(object.__new__(Other), lambda x, t: x, 0.1, 1)
    with pytest.raises(NotImplementedError, match=r"not yet .*Other: VPSDE.*diffkern\.compat\.score_sde\.sde_lib"):
        sampling.get_score_fn(object.__new__(Other), net)
    with pytest.raises(ValueError, match="score_fn must be a function"):
        sde.reverse(None)
    with pytest.raises(ValueError, match=r"model must return a tensor of shape \[3, 2, 5, 4\], got shape \[3\]"):
        run(sde, "euler_maruyama", "none", lambda x, labels: labels)
    coarse = sde_lib.VPSDE(0.1, 20.0, 10)
    with pytest.raises(ValueError, match=r"coefficients of ReverseDiffusionPredictor must be finite .*, got N = 10"):
        run(coarse, "reverse_diffusion", "none", net)
    with pytest.raises(ValueError, match=r"EulerMaruyamaPredictor must be finite .*eps so large"):
        run(sde, "euler_maruyama", "none", net, eps=0.0)
    assert run(coarse, "euler_maruyama", "none", net).isfinite().all()
