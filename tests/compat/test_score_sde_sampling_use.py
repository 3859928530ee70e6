"""compat.score_sde's sampling in use: one op a step, devices, classes of your own, configurations, bad input."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.op_counter import EveryOp
from helpers.score_sde_algorithms import pc_sample, predict
from helpers.score_sde_nets import CORRECTORS, KINDS, PREDICTORS, SHAPE, Net, both, difference, limit, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkern.compat.score_sde import _rows, sampling, sde_lib


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
