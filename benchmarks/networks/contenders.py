"""Who runs the same network: diffusers as it is and in channels_last, diffusers on our parts, and our own network.

All have the same weights; those that a contender does not lay out anew are the same memory. A contender that cannot be
had says why and takes no part.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.alone import reason
from benchmarks.networks import guided, own
from benchmarks.networks.peers import Inputs, Network, theirs

__all__ = [
    "ATTENTION",
    "BASELINES",
    "COMPILED",
    "EAGER",
    "EXTRAS",
    "FROZEN",
    "LAST",
    "NAMES",
    "OWN",
    "OWN_FROZEN",
    "REPLACED",
    "REPLACED_FROZEN",
    "Contender",
    "contenders",
    "errors",
    "shared_copy",
]

EAGER, LAST = "diffusers", "diffusers, channels_last"
COMPILED = "the same, compiled"
ATTENTION, REPLACED, OWN = "diffusers, accelerate", "diffusers, replace", "diffkern.nn"
REPLACED_FROZEN, OWN_FROZEN = "diffusers, replace, freeze", "diffkern.nn, freeze"
FROZEN = {REPLACED_FROZEN: REPLACED, OWN_FROZEN: OWN}
"""With the packed weights of convolutions kept (`diffkern.nn.freeze`); whose weights they have."""
BASELINES = (EAGER, LAST)
"""What says which output is right."""
GUIDED = "guided-diffusion, transcribed"
PEERS = (*BASELINES, GUIDED)
"""The fastest one of these is what the others are compared with."""
NAMES = (EAGER, LAST, GUIDED, REPLACED, REPLACED_FROZEN, OWN, OWN_FROZEN)
EXTRAS = {"compile": COMPILED, "attention": ATTENTION}
"""By option: torch.compile of channels_last, frozen; `accelerate` with its attention alone."""
Call = Callable[[nn.Module, Inputs], Tensor]


@dataclass(frozen=True)
class Contender:
    """``model`` None: it cannot be had, and ``why``. ``layout`` is the memory format of its x."""

    name: str
    model: nn.Module | None
    call: Call = theirs
    layout: torch.memory_format = torch.contiguous_format
    why: str = ""

    def run(self, given: Inputs) -> Tensor:
        """An evaluation; x is in its layout already (`Inputs.to`)."""
        assert self.model is not None
        return self.call(self.model, given)


def shared_copy(model: nn.Module) -> nn.Module:
    """A copy with parameters of its own on the same memory, so that one can be laid out anew and trained alone."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach(), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _last(peer: nn.Module) -> nn.Module:
    return shared_copy(peer).to(memory_format=torch.channels_last)


def _compiled(peer: nn.Module) -> nn.Module:
    from torch._inductor import config

    config.freezing = True
    model = _last(peer)
    model.compile(dynamic=False)
    return model


def _accelerated(peer: nn.Module) -> nn.Module:
    from diffkern.compat.diffusers import accelerate

    model = _last(peer)
    if not accelerate(model).swapped:
        raise ValueError("no layer that accelerate knows")
    return model


def _replaced(peer: nn.Module) -> nn.Module:
    from diffkern.compat import diffusers as ours

    model = shared_copy(peer)
    found = ours.replace(model)
    if not found.swapped:
        raise ValueError("no block that replace knows")
    return model


def _frozen(model: nn.Module) -> nn.Module:
    from diffkern.nn import freeze

    model = shared_copy(model)
    freeze(model)
    return model


def contenders(network: Network, peer: nn.Module, wanted: Iterable[str] = NAMES) -> list[Contender]:
    """Those of the names, in that order, with the weights of ``peer`` (which stays as it is).

    guided-diffusion's is left out where it has no such network.
    """
    last = torch.channels_last
    built: dict[str, nn.Module] = {}
    makers: dict[str, tuple[Callable[[], nn.Module], Call, torch.memory_format]] = {
        EAGER: (lambda: peer, theirs, torch.contiguous_format),
        LAST: (lambda: _last(peer), theirs, last),
        COMPILED: (lambda: _compiled(peer), theirs, last),
        ATTENTION: (lambda: _accelerated(peer), theirs, last),
        REPLACED: (lambda: _replaced(built[LAST] if LAST in built else _last(peer)), theirs, last),
        REPLACED_FROZEN: (lambda: _frozen(built[REPLACED]), theirs, last),
        GUIDED: (lambda: guided.build(network, peer), guided.run, torch.contiguous_format),
        OWN: (lambda: own.build(network, peer), own.run, last),
        OWN_FROZEN: (lambda: _frozen(built[OWN]), own.run, last),
    }
    found = []
    for name in wanted:
        if name == GUIDED and network.guided is None:
            continue
        build, call, layout = makers[name]
        try:
            built[name] = build()
            found.append(Contender(name, built[name], call, layout))
        except Exception as error:  # the others still run; its row says why
            found.append(Contender(name, None, why=reason(error)))
    return found


def errors(got: Tensor, want: Tensor) -> tuple[float, float]:
    """(largest difference over the largest value, root mean square of the difference over that of the value)."""
    if got.shape != want.shape:
        raise ValueError(f"the output must have shape {tuple(want.shape)}, got {tuple(got.shape)}")
    got, want = got.detach().double(), want.detach().double()
    difference = got - want
    return (
        float(difference.abs().max() / want.abs().max()),
        float(difference.square().mean().sqrt() / want.square().mean().sqrt()),
    )
