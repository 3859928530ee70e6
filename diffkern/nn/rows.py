"""What a network knows of a whole run: its layers over rows of times, and the rows kept while nothing changes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from diffkern.nn.conditions import Known, as_mapping
from diffkern.nn.convolution import Packed, packed_of_runs
from diffkern.nn.embeddings import FourierEmbedding
from diffkern.nn.plain import Snapshot, is_plain, version
from diffkern.ops import linear_rows

MOST = 2**24
"""Numbers of modulations that are kept at a time (64 MiB of float32): rows beyond are computed when they come."""
LEAST_ROWS = 4
"""Evaluations of a run that packing the weights of convolutions pays for."""
_KINDS = (nn.Linear, nn.Embedding, nn.Sequential, nn.SiLU, FourierEmbedding)
_WITHOUT_OPTIONS = (nn.Linear, nn.Sequential, nn.SiLU)
_METHODS = ("__call__", "forward", "run", "known", "changes", "contexts", "embed", "encode")


def _is_tensor(weight: Any) -> bool:
    return type(weight) in (Tensor, nn.Parameter)


def project(layer: Any, x: Tensor, *, silu: bool = False) -> Tensor:
    """``layer(silu(x))`` or ``layer(x)``: without gradients by `ops.linear_rows`, whose rows have bits of their own.

    The layer is called as it is where it is more than a plain `nn.Linear` (a LoRA, hooks), where gradients are
    recorded, in transforms of torch.func, and in graphs that are traced, which then hold torch's own operators.
    """
    if is_eager() and is_plain(layer, nn.Linear) and _is_tensor(layer.weight) and _fits(layer, x):
        return linear_rows(x, layer.weight, layer.bias, act="silu" if silu else None)
    found: Tensor = layer(F.silu(x) if silu else x)
    return found


def is_eager() -> bool:
    traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    derived = torch.is_grad_enabled() or forward_ad._current_level >= 0
    return not (traced or derived) and torch._C._functorch.peek_interpreter_stack() is None


def _fits(layer: Any, x: Tensor) -> bool:
    same = x.dtype == layer.weight.dtype or torch.is_autocast_enabled(x.device.type)
    return same and x.device.type in ("cpu", "cuda", "meta")


def perceptron(layers: Any, x: Tensor) -> Tensor:
    """Linear, SiLU, linear: [rows, in] to [rows, out], by `project` where nothing else hangs on it."""
    if is_plain(layers, nn.Sequential) and len(layers) == 3 and is_plain(layers[1], nn.SiLU):
        return project(layers[2], project(layers[0], x), silu=True)
    found: Tensor = layers(x)
    return found


class KnowsRows:
    """For a network of ours: what it offers to `diffkern.sample` (`diffkern.plan.prepared`).

    The network has ``changes(t, cond, batch)``, ``contexts(cond, batch)`` and
    ``run(x, Known(changes, contexts), cond)``, which is its ``forward(x, t, cond)``.
    """

    def sampling_rows(self, times: Tensor, cond: Any, batch: int) -> Rows | None:
        """A function of (i, x, t, cond) that is this network at ``times[i]``, with its bits.

        None where the network is more than it was made: a subclass, hooks, other layers in the place of its own.
        """
        given = as_mapping(cond).values()
        network: Any = self
        watched = [t for t in (*given, *network.parameters()) if isinstance(t, Tensor)]
        if any(t.is_inference() for t in watched):  # nobody counts how often they are written to
            return None
        return Rows(self, times, cond, batch) if self.is_itself() else None

    def is_itself(self) -> bool:
        """Whether what it makes of time and condition is made by its own layers and methods, which nothing watches."""
        for name in _METHODS:
            method = getattr(type(self), name, None)
            own = method is None or method.__module__.startswith(("diffkern.nn.", "torch.nn."))
            if not own or name in vars(self):
                return False
        if not is_plain(self, type(self)):
            return False
        return all(type(module) in _KINDS and is_plain(module, type(module)) for module in self._known_modules())

    def pieces(self) -> list[list[nn.Module]]:
        """How FSDP2 may cut the network, beside the whole: modules that run together, one list after the other.

        The layers inside of blocks that run before them (modulations, keys and values of a context), then each block.
        """
        network: Any = self
        blocks = list(network._blocks())
        inside = {id(module) for block in blocks for module in block.modules()}
        return [[part for part in self._knowing() if id(part) in inside], *([block] for block in blocks)]

    def _knowing(self) -> list[nn.Module]:
        """The parts that see time and condition alone."""
        raise NotImplementedError

    def _modulations(self) -> list[Any]:
        """The layer that makes each of the changes."""
        raise NotImplementedError

    def _known_modules(self) -> Iterator[nn.Module]:
        for part in self._knowing():
            yield from part.modules()

    @property
    def change_width(self) -> int:
        """Numbers of all modulations of a sample."""
        return sum(layer.out_features for layer in self._modulations())


class _Watch:
    """Whether a network is what it was: its modules, its configuration, and of those that know time and condition the
    weights, options and hooks."""

    def __init__(self, network: Any) -> None:
        self.network, self.known = network, list(network._known_modules())
        self.kinds = [type(module) for module in (network, *self.known)]
        self.links = [(each._modules, *pair) for each in network.modules() for pair in each._modules.items()]
        places = [kept for module in self.known for kept in (module._parameters, module._buffers)]
        weights = [(kept, *pair) for kept in places for pair in kept.items()]
        weights += [(network._parameters, *pair) for pair in network._parameters.items()]
        self.weights = [(*place, None if place[2] is None else Snapshot(place[2])) for place in weights]
        said = [(vars(m), *pair) for m in self.known if type(m) not in _WITHOUT_OPTIONS for pair in vars(m).items()]
        self.options = [(vars(network), "config", network.config), *(each for each in said if each[1] != "training")]
        self.counts = [(module._modules, len(module._modules)) for module in self.known]

    def holds(self) -> bool:
        """Looked at before every evaluation: a walk over lists that are there."""
        for place, name, part in (*self.links, *self.options):
            if place.get(name) is not part:
                return False
        if any(len(modules) != count for modules, count in self.counts):
            return False
        for kept, name, weight, then in self.weights:
            if kept.get(name) is not weight or not (then is None or then.is_of(weight)):
                return False
        if any(name in vars(self.network) for name in _METHODS):
            return False
        return all(map(is_plain, (self.network, *self.known), self.kinds))


class Rows:
    """A network over the rows of a plan: ``rows(i, x, t, cond)`` is ``network(x, t, cond)`` at ``times[i]``, by bits.

    What the network makes of times and condition alone is made for all rows in one product a layer, `MOST` numbers of
    it at a time, and keys and values of the context once. Where weights, condition, hooks or autocast are no longer
    those that it was made with, the network is called as ever.
    """

    def __init__(self, network: Any, times: Tensor, cond: Any, batch: int) -> None:
        self.network, self.times, self.batch = network, times, batch
        self._watch, self._mark = _Watch(network), self._state(cond)
        self._cond, self._given = cond, as_mapping(cond)  # kept: a new tensor must not get the address of one of these
        self._contexts = network.contexts(cond, batch)
        given = self._given
        own = {name: given[name] for name in ("class", "vector", "ids", "augment") if name in given}
        self._own, self._each = own, batch if own else 1
        self._packed = packed_of_runs(network) if len(times) >= LEAST_ROWS else Packed(0)
        self._changes: tuple[Tensor, ...] = ()
        self._first = self._count = 0
        self._row(0)

    def _state(self, cond: Any) -> list[Any]:
        """What the rows were made of, as far as it may change."""
        kind = self.times.device.type
        mode = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_grad_enabled()
        values = cond.items() if isinstance(cond, Mapping) else [("class", cond)]
        return [mode, *((name, id(t), version(t)) for name, t in values if isinstance(t, Tensor))]

    def __call__(self, i: int, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        network = self.network
        same = cond is self._cond and x.shape[0] == self.batch and self._state(cond) == self._mark
        if not same or not self._watch.holds():
            found: Tensor = network(x, t) if cond is None else network(x, t, cond)
            return found
        with self._packed.used():
            return network.run(x, Known(self._row(i), self._contexts), cond)

    def _row(self, i: int) -> tuple[Tensor, ...]:
        if not self._first <= i < self._first + self._count:
            self._changes = ()  # not two of them at a time
            most = MOST // max(1, self._each * self.network.change_width)
            self._first, self._count = i, min(len(self.times) - i, max(1, most))
            times = self.times[i : i + self._count]
            repeated = {name: t.repeat(self._count, *(1,) * (t.dim() - 1)) for name, t in self._own.items()}
            times = times.repeat_interleave(self._each)
            self._changes = self.network.changes(times, repeated, self._count * self._each)
        begin = (i - self._first) * self._each
        return tuple(change[begin : begin + self._each].expand(self.batch, -1) for change in self._changes)
