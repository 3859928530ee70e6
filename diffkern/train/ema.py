"""Averages of weights over training: several at once by the power function, the plain one, and any width afterwards.

    averages = Averages(network)                    # "0.050" and "0.100", relative widths
    averages.update(step)                           # after optimizer step number step = 1, 2, ...
    with averages.used("0.100"): validate(network)

The power function's average after step t weighs the weights of step i by the integral of (gamma + 1) tau^gamma /
t^(gamma + 1) over (i - 1, i]. Karras, Aittala, Lehtinen, Hellsten, Aila, Laine 2024, arXiv 2312.02696, section 3.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffkern.parallel import bare, reshard

__all__ = ["WIDEST", "Averages", "gamma_of", "name_of", "width_of"]

WIDEST = 1.0 / math.sqrt(12.0)
"""The relative width of gamma = 0, the mean of all steps."""


def width_of(gamma: float) -> float:
    """The relative width sqrt(gamma + 1)/((gamma + 2) sqrt(gamma + 3)): the profile's standard deviation over t."""
    return math.sqrt(gamma + 1.0) / ((gamma + 2.0) * math.sqrt(gamma + 3.0))


def gamma_of(width: float) -> float:
    """The exponent gamma >= 0 of a relative width in (0, 1/sqrt(12)]: inverse of `width_of`, in float64.

    The largest root of (gamma + 2)^2 (gamma + 3) = (gamma + 1)/width^2 (arXiv 2312.02696, algorithm 2).
    """
    if not 0.0 < width <= WIDEST * (1.0 + 1e-12):
        raise ValueError(f"width must lie in (0, 1/sqrt(12) = {WIDEST:.4f}], the mean of all steps, got {width!r}")
    s = width**-2
    return max(0.0, float(np.roots([1.0, 7.0, 16.0 - s, 12.0 - s]).real.max()))


def name_of(width: float) -> str:
    """ "0.050" of 0.05: at least three decimals, and as many as it takes to be read back."""
    return f"{width:.3f}" if float(f"{width:.3f}") == width else repr(float(width))


class Averages:
    """Running averages of a module's trainable parameters, beside it, in float32 at least.

    - ``widths``: relative widths sigma_rel of power functions, names "0.050", "0.100". A width of 0.1 remembers about
      the last tenth of training, however long training has been.
    - ``decay``: of the plain average "plain", whose factor is min(decay, (1 + t)/(10 + t)); none if None.

    ``module`` may be in DistributedDataParallel or torch.compile, or sharded by FSDP2, where each process averages its
    own shards. Buffers and frozen parameters are not averaged: they are the module's. ``names`` lists the averages.
    """

    def __init__(self, module: nn.Module, widths: Sequence[float] = (0.05, 0.1), decay: float | None = None) -> None:
        self._module = bare(module)
        named = [(name, p) for name, p in self._module.named_parameters() if p.requires_grad and p.is_floating_point()]
        if not named:
            raise ValueError("module must have trainable parameters to average, got none")
        self._names, self._parameters = [_clean(name) for name, _ in named], [p for _, p in named]
        self._gammas: dict[str, float] = {}
        for width in widths:
            if name_of(width) in self._gammas:
                raise ValueError(f"widths must differ, got {list(widths)}")
            self._gammas[name_of(width)] = gamma_of(width)
        if decay is not None and not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must lie in [0, 1), got {decay!r}")
        self.decay, self.step = decay, 0
        self.names = (*self._gammas, *(() if decay is None else ("plain",)))
        self._averages = {name: [_wide(p.detach()).clone() for p in self._parameters] for name in self.names}

    def factor(self, name: str, step: int, since: int) -> float:
        """What is kept of the average: (since/step)^(gamma + 1), so (1 - 1/t)^(gamma + 1) from a step to the next."""
        self._known(name)
        if name in self._gammas:
            return (since / step) ** (self._gammas[name] + 1.0)
        assert self.decay is not None
        return min(self.decay, (1.0 + step) / (10.0 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step number ``step``, counted from 1.

        Steps may be left out: the weights then stand for all steps since the last update. ValueError for a step that
        does not come after the last one.
        """
        if step <= self.step:
            raise ValueError(f"step must come after that of the last update, {self.step}, got {step}")
        weights = [_wide(_local(p)) for p in self._parameters]
        for name, averages in self._averages.items():
            kept = self.factor(name, step, self.step)
            torch._foreach_lerp_([_local(average) for average in averages], weights, 1.0 - kept)
        self.step = step

    def pairs(self, name: str) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Every averaged parameter with its average, which is no copy."""
        self._known(name)
        return zip(self._parameters, self._averages[name], strict=True)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """What `load_state_dict` takes: averages by the names of the parameters, what is not averaged as it is now."""
        every = {id(p): average for p, average in self.pairs(name)}
        parameters = dict(self._module.named_parameters(remove_duplicate=False))
        state = self._module.state_dict(keep_vars=True)
        return {_clean(key): every.get(id(parameters.get(key)), t.detach()) for key, t in state.items()}

    def load_into(self, name: str, module: nn.Module) -> None:
        """Copies an average into another module of the same names and shapes (RuntimeError, torch's, for others)."""
        bare(module).load_state_dict(self.tensors(name))

    @contextlib.contextmanager
    @torch.no_grad()
    def used(self, name: str) -> Iterator[None]:
        """The module has the average's weights for a while, then its own again, bit for bit."""
        own = [_local(p).clone() for p in self._parameters]
        reshard(self._module)
        for parameter, average in self.pairs(name):
            _local(parameter).copy_(_local(average))
        try:
            yield
        finally:
            reshard(self._module)
            with torch.no_grad():
                for parameter, value in zip(self._parameters, own, strict=True):
                    _local(parameter).copy_(value)

    def state_dict(self) -> dict[str, Any]:
        """{"step": ..., "averages": {name: {parameter's name: tensor}}}; the tensors are no copies."""
        named = {name: dict(zip(self._names, averages, strict=True)) for name, averages in self._averages.items()}
        return {"step": self.step, "averages": named}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Copies what `state_dict` gave; ValueError for other averages, names or shapes, before anything is changed."""
        found, own = state["averages"], self.state_dict()["averages"]
        if found.keys() != own.keys():
            raise ValueError(f"averages must be {', '.join(own)}, got {', '.join(found) or 'none'}")
        for name, tensors in own.items():
            for key in sorted(tensors.keys() | found[name].keys()):
                want, got = (None if t is None else list(t.shape) for t in (tensors.get(key), found[name].get(key)))
                if want != got:
                    raise ValueError(f"average {name} of {key} must have the shape {want}, got {got}")
        for name, tensors in own.items():
            for key, average in tensors.items():
                average.copy_(found[name][key])
        self.step = int(state["step"])

    def _known(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"name must be one of {', '.join(self.names) or 'none'}, got {name!r}")


def _clean(name: str) -> str:
    """The name of a parameter whose module was not wrapped by torch.compile."""
    return name.replace("_orig_mod.", "")


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor of FSDP2, any other as it is; without gradients."""
    tensor = tensor.detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
