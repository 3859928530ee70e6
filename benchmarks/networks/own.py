"""Our networks with the weights of diffusers'."""

from __future__ import annotations

from torch import Tensor, nn

from benchmarks.networks.peers import Inputs, Network

__all__ = ["build", "run"]


def build(network: Network, peer: nn.Module) -> nn.Module:
    """The network of `diffkern.nn` that computes what ``peer`` does, in its dtype and for evaluation."""
    config = {"_class_name": network.kind, **network.config}
    if network.kind == "DiTTransformer2DModel":
        return _dit(config, peer)
    from diffkern.nn import UNet
    from diffkern.nn.weights import diffusers, diffusers_config

    model = UNet(diffusers_config.to_ours(config))
    diffusers.load(model, peer.state_dict())
    return model.eval()


def _dit(config: dict[str, object], peer: nn.Module) -> nn.Module:
    from diffkern.nn import DiT
    from diffkern.nn.weights import dit

    first = next(peer.parameters())
    if first.is_meta:  # whether its blocks share their embeddings, as they do, cannot be read
        return DiT(dit.diffusers_config(config)).to(first.dtype)
    return dit.load_diffusers(peer.state_dict(), config)


def run(model: nn.Module, given: Inputs) -> Tensor:
    """An evaluation."""
    return model(given.x, given.t, dict(given.cond) or None)
