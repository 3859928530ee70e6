"""Our networks with the weights of diffusers'."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.networks.peers import Inputs, Network

__all__ = ["build", "run"]


def build(network: Network, peer: nn.Module) -> nn.Module:
    """The network of `diffkern.nn` that computes what ``peer`` does, in its dtype."""
    from diffkern.nn import UNet
    from diffkern.nn.weights import diffusers, diffusers_config

    model = UNet(diffusers_config.to_ours({"_class_name": network.kind, **network.config}))
    diffusers.load(model, peer.state_dict())
    return model.to(memory_format=torch.channels_last).eval()


def run(model: nn.Module, given: Inputs) -> Tensor:
    """An evaluation."""
    return model(given.x, given.t, dict(given.cond) or None)
