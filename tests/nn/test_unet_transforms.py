"""A UNet under function transforms, autocast and checkpointing, copied and pickled: the same numbers everywhere."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from helpers.unet_cases import OPTIONS, awake, config, inputs
from torch import Tensor
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from diffkern.nn import UNet

CASES = {
    "adaptive group norm": {},
    "transformer, classes": {**OPTIONS["transformer"], "classes": 5, "modulation": "add"},
    "ConvNeXt": OPTIONS["ConvNeXt"],
}
cases = pytest.mark.parametrize("changes", CASES.values(), ids=CASES)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def gradients(network: UNet, *given: Any) -> list[Tensor]:
    network.zero_grad()
    network(*given).square().mean().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in network.parameters()]


def near(a: Tensor, b: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.detach().abs().max()))


@cases
def test_functional_call_runs_with_other_weights(changes: dict[str, Any]) -> None:
    network, other = awake(config(**changes)), awake(config(**changes))
    given = inputs(network.config)
    with torch.no_grad():
        assert torch.equal(functional_call(network, dict(other.named_parameters()), given), other(*given))


@cases
def test_vmap_over_the_weights_of_an_ensemble(changes: dict[str, Any]) -> None:
    networks = [awake(config(**changes)) for _ in range(2)]
    parameters, buffers = stack_module_state(networks)  # type: ignore[arg-type]
    given = inputs(networks[0].config)
    with torch.no_grad():
        found = vmap(lambda p, b: functional_call(networks[0], (p, b), given))(parameters, buffers)
        for one, network in zip(found, networks, strict=True):
            near(one, network(*given))


@cases
def test_grad_of_the_weights_is_that_of_backward(changes: dict[str, Any]) -> None:
    network = awake(config(**changes))
    given = inputs(network.config)
    parameters = {name: p.detach() for name, p in network.named_parameters()}
    found = grad(lambda p: functional_call(network, p, given).square().mean())(parameters)
    for one, expected in zip(found.values(), gradients(network, *given), strict=True):
        near(one, expected)


def test_gradients_a_sample_are_vmap_of_grad() -> None:
    network = awake(config())
    x, t, _ = inputs(network.config)
    parameters = {name: p.detach() for name, p in network.named_parameters()}

    def loss(p: dict[str, Tensor], x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = functional_call(network, p, (x[None], t[None]))
        return out.square().mean()

    found = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, x, t)
    for i in range(2):
        for one, expected in zip(found.values(), gradients(network, x[i : i + 1], t[i : i + 1]), strict=True):
            near(one[i], expected, 1e-4)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # in torch's forward mode
def test_forward_mode_is_a_sentence_or_torchs() -> None:
    """Our ops have no tangents, and say so; with torch's the network has them, where torch's attention is not asked."""
    network = awake(config(**OPTIONS["no attention"])).double()
    x, t, _ = inputs(network.config)
    x = x.double()
    with pytest.raises(NotImplementedError, match="forward-mode"):
        jvp(lambda x: network(x, t), (x,), (torch.ones_like(x),))
    network.set_attention("torch")
    out, tangent = jvp(lambda x: network(x, t), (x,), (torch.ones_like(x),))
    step = 1e-6
    with torch.no_grad():
        near(tangent, (network(x + step, t) - network(x - step, t)) / (2 * step), 1e-6)
        near(out, network(x, t))


@cases
def test_torchs_kernels_give_the_same(changes: dict[str, Any]) -> None:
    network = awake(config(**changes))
    given = inputs(network.config)
    ours = gradients(network, *given)
    out = network(*given)
    network.set_attention("torch")
    near(network(*given), out)
    assert network.config.attention == "torch"
    for one, expected in zip(gradients(network, *given), ours, strict=True):
        near(one, expected, 1e-4)


@cases
def test_autocast_is_near_float32_and_gives_float32_gradients(changes: dict[str, Any]) -> None:
    network = awake(config(**changes))
    given = inputs(network.config)
    expected, exact = network(*given).detach(), gradients(network, *given)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(*given)
        assert out.dtype == torch.bfloat16
        assert network(given[0].bfloat16(), *given[1:]).dtype == torch.bfloat16
    assert (out.float() - expected).norm() < 0.03 * expected.norm()
    network.zero_grad()
    out.float().square().mean().backward()
    for parameter, value in zip(network.parameters(), exact, strict=True):
        if parameter.grad is not None and value.any():
            assert parameter.grad.dtype == torch.float32
            assert (parameter.grad - value).norm() < 0.2 * value.norm() + 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_of_another_dtype(dtype: torch.dtype) -> None:
    network = awake(config(**CASES["transformer, classes"]))
    x, t, cond = inputs(network.config)
    with torch.no_grad():
        expected = network(x, t, cond)
        out = network.to(dtype)(x.to(dtype), t, cond)
    assert out.dtype == dtype
    assert (out.float() - expected).norm() < 0.05 * expected.norm()


@cases
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_checkpointing_gives_equal_gradients(changes: dict[str, Any], dropout: float) -> None:
    network = awake(config(**changes, dropout=dropout)).train()
    given = inputs(network.config)
    torch.manual_seed(1)
    plain = gradients(network, *given)
    network.checkpointing = True
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(gradients(network, *given), plain, strict=True))


def kept_by(network: UNet, *given: Any) -> int:
    """Numbers that one evaluation keeps for the backward pass."""
    sizes: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(*given)
    return sum(sizes)


def test_checkpointing_keeps_less() -> None:
    kept = []
    for checkpointing in (False, True):
        network = awake(config(resample="residual")).train()
        network.checkpointing = checkpointing
        kept.append(kept_by(network, *inputs(network.config, batch=8)))
    assert kept[1] < 0.5 * kept[0]


def test_a_whole_network_inside_a_checkpoint() -> None:
    network = awake(config()).train()
    x, t, _ = inputs(network.config)
    expected = gradients(network, x, t)
    network.zero_grad()
    checkpoint(network, x, t, use_reentrant=False).square().mean().backward()
    for parameter, value in zip(network.parameters(), expected, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, value)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_a_copy_is_the_same_network_and_its_own(copied: Any) -> None:
    network = awake(config(**OPTIONS["FIR"], **OPTIONS["Fourier"], classes=5))
    given = inputs(network.config)
    again = copied(network)
    with torch.no_grad():
        out = network(*given)
        assert torch.equal(again(*given), out)
        again.leave.weight.add_(1.0)
        assert torch.equal(network(*given), out)
    assert again.config == network.config


def test_modes_are_left_as_they_were() -> None:
    network = awake(config())
    given = inputs(network.config)
    with torch.inference_mode():
        out = network(*given)
    x = given[0].clone().requires_grad_()
    found = network(x, *given[1:])
    near(found, out)
    found.sum().backward()
    assert x.grad is not None
    assert x.grad.any()
