"""guided-diffusion's UNet by our transcription: the tests' description of it, with torch's layers where it has them.

Its attention is two products and a softmax, as there; its norms are computed in float32.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.networks import own
from benchmarks.networks.peers import Inputs, Network

__all__ = ["Guided", "build", "run"]


class Guided(nn.Module):
    """The weights by the names of its state dict, and the arguments of its constructor."""

    def __init__(self, state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> None:
        super().__init__()
        sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
        from helpers import guided_networks, named_weights

        class Layers(named_weights.Weights):
            def affine(self, name: str, x: Tensor, out: int, bias: bool = True) -> Tensor:
                x = x.to(self.state[f"{name}.weight"].dtype)
                return F.linear(x, self(f"{name}.weight", out, x.shape[1]), self(f"{name}.bias", out) if bias else None)

            def group_norm(self, name: str, x: Tensor, groups: int, eps: float) -> Tensor:
                weight, bias = (self(f"{name}.{kind}", x.shape[1]).float() for kind in ("weight", "bias"))
                return F.group_norm(x.float(), groups, weight, bias, eps).to(x.dtype)

        self.arguments = dict(arguments)
        self.function = guided_networks.unet
        self.layers = Layers({name: nn.Parameter(tensor) for name, tensor in state.items()}, closed=True)
        self.weights = nn.ParameterList(self.layers.state.values())

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        return self.function(self.layers, self.arguments, x, t, y)


def build(network: Network, peer: nn.Module) -> nn.Module:
    """What ``peer`` computes, with its weights by way of our network of the same."""
    from diffkern.nn.weights import guided_diffusion

    arguments = dict(network.guided or {})
    state = guided_diffusion.export(own.build(network, peer), use_new_attention_order=True)
    with torch.no_grad():
        state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    return Guided(state, arguments).eval()


def run(model: nn.Module, given: Inputs) -> Tensor:
    """An evaluation."""
    return model(given.x, given.t, given.cond.get("class"))
