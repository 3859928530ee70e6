"""compat.edm beside our own transcription of algorithm 2 of arXiv 2206.00364 (EDM's code is not on PyPI)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.edm_algorithm import algorithm_2
from helpers.op_counter import EveryOp
from torch import Tensor

from diffkern.compat.edm import EDMLoss, edm_sampler

CASES: list[dict[str, Any]] = [
    {},
    {"num_steps": 1},
    {"num_steps": 2, "rho": 5.0},
    {"sigma_min": 0.01, "sigma_max": 20.0, "rho": 3},
    {"S_churn": 10.0},
    {"S_churn": 80.0, "S_min": 2.0, "S_max": 1.0},
    {"S_churn": 80.0, "S_min": 0.05, "S_max": 50.0, "S_noise": 1.003, "num_steps": 32},
    {"S_churn": 1000.0, "S_noise": 0.0},
]


class Net:
    """A preconditioned network: float32 inside, any level."""

    sigma_min, sigma_max = 0.0, math.inf

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.levels: list[Tensor] = []

    def round_sigma(self, sigma: Any) -> Tensor:
        return torch.as_tensor(sigma)

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Any = None, **kwargs: Any) -> Tensor:
        self.levels.append(sigma)
        scale = 0.25 / (0.25 + sigma**2)
        labels = 0.0 if class_labels is None else class_labels.reshape(-1, 1, 1, 1)
        return (x * scale + 0.1 * torch.tanh(x / (1 + sigma)) + labels).to(self.dtype)


class TableNet(Net):
    """A network that knows some levels alone, as those of iDDPM."""

    sigma_min, sigma_max = 0.01, 60.0

    def __init__(self) -> None:
        super().__init__()
        self.u = torch.logspace(-2, math.log10(60.0), 300, dtype=torch.float64)

    def round_sigma(self, sigma: Any) -> Tensor:
        wide = torch.as_tensor(sigma)
        nearest = (wide.reshape(-1, 1) - self.u).abs().argmin(1)
        return self.u[nearest].reshape(wide.shape).to(wide.dtype)


def latents(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, 2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("net", [Net, TableNet])
@pytest.mark.parametrize("options", CASES, ids=lambda o: "-".join(f"{k}{v}" for k, v in o.items()) or "default")
def test_sampler(net: type[Net], options: dict[str, Any]) -> None:
    labels = torch.tensor([0.1, 0.2, 0.3])
    nets = net(), net()
    torch.manual_seed(8)
    want = algorithm_2(nets[0], latents(), labels, torch.randn_like, **options)
    want_next = torch.rand(2)
    torch.manual_seed(8)
    found = edm_sampler(nets[1], latents(), labels, **options)
    assert torch.equal(torch.rand(2), want_next), "the generator is not where the algorithm leaves it"
    assert found.dtype == torch.float64
    assert float((found - want).abs().max() / want.abs().max()) <= 1e-12
    assert len(nets[1].levels) == len(nets[0].levels)
    for a, b in zip(nets[1].levels, nets[0].levels, strict=True):
        assert a.shape == b.shape == ()
        assert a.dtype == torch.float64
        assert float(a) == pytest.approx(float(b), rel=1e-14)


def test_transposed_latents() -> None:
    torch.manual_seed(8)
    want = algorithm_2(Net(), latents().transpose(2, 3), None, torch.randn_like, S_churn=20.0)
    torch.manual_seed(8)
    found = edm_sampler(Net(), latents().transpose(2, 3), S_churn=20.0)
    assert float((found - want).abs().max() / want.abs().max()) <= 1e-12


def test_float32_network() -> None:
    """A network that returns float32 leaves the state in float64."""
    want = algorithm_2(Net(torch.float32), latents(), None, torch.zeros_like)
    found = edm_sampler(Net(torch.float32), latents(), None, torch.zeros_like)
    # Twice float32's rounding of the network's output.
    assert float((found - want).abs().max()) <= 1e-6


def test_hook_is_asked_before_every_step() -> None:
    shapes = []

    def randn_like(x: Tensor) -> Tensor:
        shapes.append((x.shape, x.dtype))
        return torch.zeros_like(x)

    edm_sampler(Net(), latents(), randn_like=randn_like, num_steps=5)
    assert shapes == [((3, 2, 5, 4), torch.float64)] * 5


def test_one_op_a_call() -> None:
    m = torch.randn(3, 2, 5, 4, dtype=torch.float64)

    class Given(Net):
        def __call__(self, x: Tensor, sigma: Tensor, class_labels: Any = None, **kwargs: Any) -> Tensor:
            return m

    z = torch.zeros_like(m)
    run = lambda: edm_sampler(Given(), m, randn_like=lambda x: z, S_churn=5.0, num_steps=10)  # noqa: E731
    run()
    with EveryOp() as counted:
        run()
    assert counted.counts["diffkern.step"] == 2 * 10 - 1 + 1  # one more for the first step's churn
    assert not [op for op in counted.counts if "item" in op or "local_scalar" in op]
    assert counted.counts.total() < 20 + 40  # the grid of levels, before the loop


def test_differentiable() -> None:
    x = latents(torch.float64).requires_grad_()
    edm_sampler(Net(), x, num_steps=4, randn_like=torch.zeros_like).sum().backward()
    found = x.grad
    other = latents(torch.float64).requires_grad_()
    algorithm_2(Net(), other, None, torch.zeros_like, num_steps=4).sum().backward()
    torch.testing.assert_close(found, other.grad, rtol=1e-11, atol=1e-12)


def test_sampler_bad_input() -> None:
    with pytest.raises(ValueError, match="churn must be a finite number >= 0, got -1"):
        edm_sampler(Net(), latents(), S_churn=-1)
    with pytest.raises(ValueError, match="sigma_min and sigma_max must be"):
        edm_sampler(Net(), latents(), sigma_min=3.0, sigma_max=2.0)

    coarse = TableNet()
    coarse.u = torch.tensor([0.01, 1.0, 2.0, 60.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="sigmas must fall strictly"):
        edm_sampler(coarse, latents())

    class Nothing(Net):
        def __call__(self, x: Tensor, sigma: Tensor, class_labels: Any = None, **kwargs: Any) -> Any:
            return None

    with pytest.raises(ValueError, match=r"model must return a tensor of shape \[3, 2, 5, 4\], got NoneType"):
        edm_sampler(Nothing(), latents())


def weighted_error(
    net: Any, images: Tensor, labels: Any, augment: Any, constants: tuple[float, float, float]
) -> Tensor:
    """lambda(sigma) (D(y + n) - y)^2 with ln sigma ~ N(P_mean, P_std^2), arXiv 2206.00364, section 5, unreduced."""
    mean, std, data = constants
    sigma = (torch.randn(len(images), 1, 1, 1) * std + mean).exp()
    y, extra = (images, None) if augment is None else augment(images)
    n = torch.randn_like(y) * sigma
    error: Tensor = net(y + n, sigma, labels, augment_labels=extra) - y
    return (sigma**2 + data**2) / (sigma * data) ** 2 * error**2


@pytest.mark.parametrize("constants", [(-1.2, 1.2, 0.5), (0.3, 0.7, 1.0)])
@pytest.mark.parametrize("augmented", [False, True])
def test_loss(constants: tuple[float, float, float], augmented: bool) -> None:
    images = latents()
    labels = torch.tensor([0.1, 0.2, 0.3])
    seen: list[Any] = []

    class Trained(Net):
        weight = torch.tensor(0.7, requires_grad=True)

        def __call__(self, x: Tensor, sigma: Tensor, class_labels: Any = None, **kwargs: Any) -> Tensor:
            seen.append((sigma.shape, kwargs["augment_labels"]))
            return self.weight * super().__call__(x, sigma, class_labels)

    def augment(x: Tensor) -> tuple[Tensor, str]:
        return x.flip(-1), "flipped"

    results = []
    for loss in (
        lambda *args: weighted_error(*args, constants),
        lambda *args: EDMLoss(*constants)(*args),
    ):
        torch.manual_seed(6)
        net = Trained(torch.float32)
        value = loss(net, images, labels, augment if augmented else None)
        (gradient,) = torch.autograd.grad(value.mean(), [net.weight])
        results.append((value.detach(), gradient, torch.rand(2)))
    (want, want_gradient, want_next), (found, gradient, after) = results
    assert found.shape == images.shape
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, want_gradient, rtol=1e-5, atol=0)
    assert torch.equal(after, want_next)
    assert seen[1] == ((3, 1, 1, 1), "flipped" if augmented else None)


def test_loss_defaults() -> None:
    loss = EDMLoss()
    assert (loss.P_mean, loss.P_std, loss.sigma_data) == (-1.2, 1.2, 0.5)
