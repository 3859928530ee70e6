"""Adaptive layer norm and GELU, each with the linear layer after it: formulas, gradients, and what is kept for them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from diffkern.nn.adaptive import adaptive_linear, adaptive_norm, gelu, gelu_linear

B, N, C = 2, 5, 8


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """x, scale and shift, the last two parts of one tensor as a chunked layer gives them."""
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(B, 2 * C, generator=generator, dtype=dtype)
    return torch.randn(B, N, C, generator=generator, dtype=dtype) * 2 + 1, *change.chunk(2, dim=1)


def linear(bias: bool = True) -> nn.Linear:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Linear(C, 3, bias=bias).double()


def norm_by_formula(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-6) -> Tensor:
    deviation = x - x.mean(-1, keepdim=True)
    normed = deviation / (deviation.square().mean(-1, keepdim=True) + eps).sqrt()
    return (1 + scale[:, None]) * normed + shift[:, None]


def gelu_by_formula(u: Tensor) -> Tensor:
    return 0.5 * u * (1 + torch.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)))


@pytest.mark.parametrize("eps", [1e-6, 0.5])
@pytest.mark.parametrize("grad", [False, True])
def test_adaptive_norm_by_its_formula(eps: float, grad: bool) -> None:
    x, scale, shift = tensors()
    expected = norm_by_formula(x, scale, shift, eps)
    before = x.clone()
    torch.testing.assert_close(adaptive_norm(x.requires_grad_(grad), scale, shift, eps), expected)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_gelu_by_its_formula_in_every_dtype(dtype: torch.dtype) -> None:
    u = torch.linspace(-9, 9, 2 * 1003).to(dtype).reshape(1003, 2).mT  # not contiguous
    expected, at_most = gelu_by_formula(u.double()), 4 * torch.finfo(dtype).eps
    for given in (u, u.clone().requires_grad_()):
        assert (gelu(given).double() - expected).abs().max() <= at_most * 9


def test_gelu_in_parts_is_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    u = torch.linspace(-5, 5, 301).to(torch.bfloat16)
    whole = gelu(u)
    monkeypatch.setattr("diffkern.nn.adaptive._CHUNK", 7)
    assert torch.equal(gelu(u), whole)
    assert gelu(u[:0]).shape == (0,)
    assert (whole == gelu_by_formula(u.double()).to(torch.bfloat16)).float().mean() > 0.99, "rounded once"


def test_gelu_keeps_the_digits_far_below_zero_and_the_ends() -> None:
    u = torch.tensor([-5.0, -4.0, 1e20, -1e20, math.nan])
    v = 2 * math.sqrt(2 / math.pi) * (u + 0.044715 * u**3).double()
    expected = u.double() / (1 + (-v).exp())  # the same function, without 1 + tanh
    torch.testing.assert_close(gelu(u)[:2].double(), expected[:2], rtol=2e-6, atol=0.0)
    assert gelu(u)[2:].tolist()[:2] == [u[2].item(), 0.0]
    assert gelu(u)[4].isnan()


def both(ours: Callable[..., Tensor], plain: Callable[..., Tensor], given: list[Tensor]) -> None:
    """Their results and gradients agree."""
    found = []
    for function in (ours, plain):
        leaves = [t.detach().clone().requires_grad_(t.requires_grad) for t in given]
        out = function(*leaves)
        asked = [t for t in leaves if t.requires_grad]
        found.append([out.detach(), *torch.autograd.grad(out.sin().sum(), asked)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("asked", [(1, 1, 1, 1, 1), (1, 0, 0, 0, 0), (0, 1, 0, 0, 1), (0, 0, 1, 1, 0)])
def test_gradients_of_the_norm_and_its_linear_layer(asked: tuple[int, ...]) -> None:
    layer = linear()
    given = [*tensors(), layer.weight.detach(), layer.bias.detach()]
    for tensor, grad in zip(given, asked, strict=True):
        tensor.requires_grad_(bool(grad))

    def ours(x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        layer._parameters.update(weight=weight, bias=bias)  # type: ignore[dict-item]
        return adaptive_linear(x, scale, shift, layer)

    both(ours, lambda x, a, b, w, c: nn.functional.linear(norm_by_formula(x, a, b), w, c), given)


@pytest.mark.parametrize("by_sigmoid", [True, False])
@pytest.mark.parametrize("asked", [(1, 1, 1), (1, 0, 0), (0, 1, 0)])
def test_gradients_of_gelu_and_its_linear_layer(
    asked: tuple[int, ...], by_sigmoid: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU's way, and on that of GPUs and of 16-bit types."""
    monkeypatch.setattr("diffkern.nn.adaptive._by_sigmoid", lambda u: by_sigmoid)
    monkeypatch.setattr("diffkern.nn.adaptive.gelu", gelu if by_sigmoid else gelu_by_formula)
    layer = linear()
    given = [3 * tensors()[0], layer.weight.detach(), layer.bias.detach()]
    for tensor, grad in zip(given, asked, strict=True):
        tensor.requires_grad_(bool(grad))

    def ours(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        layer._parameters.update(weight=weight, bias=bias)  # type: ignore[dict-item]
        return gelu_linear(u, layer)

    both(ours, lambda u, w, c: nn.functional.linear(gelu_by_formula(u), w, c), given)


def kept_bytes(function: Callable[[], Tensor]) -> int:
    """Of the tensors that a gradient keeps, each storage once, but for parameters."""
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(found.values())


def test_the_input_of_the_linear_layer_is_not_kept() -> None:
    x, scale, shift = (t.requires_grad_() for t in tensors())
    layer = linear()
    whole = x.untyped_storage().nbytes()
    assert kept_bytes(lambda: gelu_linear(x, layer)) == whole
    change = scale.untyped_storage().nbytes()
    statistics = 2 * B * N * 8
    assert kept_bytes(lambda: adaptive_linear(x, scale, shift, layer)) == whole + change + statistics
    assert kept_bytes(lambda: layer(gelu(x))) >= 2 * whole, "what it is without"


def test_a_layer_that_is_more_than_linear_is_called() -> None:
    class Twice(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    x, scale, shift = tensors()
    x.requires_grad_()
    plain, twice, hooked = linear(), Twice(C, 3).double(), linear()
    twice.load_state_dict(plain.state_dict())
    hooked.register_forward_hook(lambda module, args, out: 2 * out)
    for layer in (twice, hooked):
        assert torch.equal(gelu_linear(x, layer), 2 * plain(gelu(x)))
        assert torch.equal(adaptive_linear(x, scale, shift, layer), 2 * plain(adaptive_norm(x, scale, shift)))


def test_dropout_falls_between_gelu_and_the_linear_layer() -> None:
    x = tensors()[0].requires_grad_()
    none, all_of_it = nn.Dropout(0.0), nn.Dropout(1.0)
    layer = linear()
    assert torch.equal(gelu_linear(x, layer, none), gelu_linear(x, layer))
    assert torch.equal(gelu_linear(x, layer, all_of_it), layer.bias.expand(B, N, 3))
    assert torch.equal(gelu_linear(x, layer, all_of_it.eval()), gelu_linear(x, layer))


def test_second_gradients_are_those_of_the_formula() -> None:
    """Of a penalty on the first, in which the gradient of what comes out is a constant."""
    layer = linear()
    found: list[list[Tensor]] = []
    for ours in (True, False):
        x, scale, shift = (t.detach().clone().requires_grad_() for t in tensors())
        if ours:
            out = gelu_linear(x, layer).sum() + adaptive_linear(x, scale, shift, layer).sin().sum()
        else:
            out = layer(gelu_by_formula(x)).sum() + layer(norm_by_formula(x, scale, shift)).sin().sum()
        given = [x, scale, shift, layer.weight]
        first = torch.autograd.grad(out, given, create_graph=True)
        penalty = torch.stack([g.square().sum() for g in first]).sum()
        found.append([*first, *torch.autograd.grad(penalty, given)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
