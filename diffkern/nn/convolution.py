"""3 x 3 convolutions of the networks: by `ops.conv3x3` where that is the faster one, with weights packed or not."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._ops import _len_torch_dispatch_stack_pre_dispatch
from torch.autograd import forward_ad
from torch.nn import functional as F

from diffkern import _load
from diffkern.integers import integer
from diffkern.modes import kept, neutral
from diffkern.nn.plain import Snapshot, is_plain
from diffkern.ops import conv3x3, pack_conv3x3

LEAST_PIXELS, LEAST_INPUTS, LEAST_OUTPUTS = 64, 16, 32
"""Of an output image and of the weights; below, torch's convolution is the faster one (measured with AVX2). With the
weights packed in every call, one image of 8 x 8 pixels still takes a quarter longer than torch's, which a network's
other layers make up for; packed, or of four images, less. Never of the batch: a sample's bits do not depend on it."""
SHARE_OF_MEMORY = 0.25
"""Of what is free when the weights of a network begin to be packed: what they may take."""
_HAS_VECTORS = _load.build_info().get("isa") != "scalar"
_GEOMETRY = ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")


def convolve(conv: Any, x: Tensor, *, upsample: bool = False) -> Tensor:
    """``conv(x)``, or ``conv`` of x with every pixel twice in both directions, of a 3 x 3 convolution."""
    if is_ours(conv, x, upsample):
        return conv3x3(x, conv.weight, conv.bias, upsample=upsample, packed=_packed_for(conv, upsample))
    found: Tensor = conv(F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x)
    return found


def is_ours(conv: Any, x: Tensor, upsample: bool = False) -> bool:
    """Whether `convolve` takes `ops.conv3x3`: plain layers, float32 on a CPU with AVX2, sizes that pay, no tracing.

    Graphs, transforms of torch.func, modes of dispatch and autocast see torch's convolution.
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if not (_HAS_VECTORS and _is_plain(x) and x.dim() == 4 and x.shape[1] >= LEAST_INPUTS):
        return False
    if x.shape[2] * x.shape[3] * (4 if upsample else 1) < LEAST_PIXELS or not is_plain(conv, nn.Conv2d):
        return False
    weight, bias = conv.weight, conv.bias
    return (
        _geometry(conv) == _GEOMETRY
        and _is_plain(weight)
        and (bias is None or _is_plain(bias))
        and weight.shape[0] >= LEAST_OUTPUTS
        and weight.shape[1:] == (x.shape[1], 3, 3)
        and not torch.is_autocast_enabled("cpu")
        and torch._C._len_torch_dispatch_stack() == _len_torch_dispatch_stack_pre_dispatch() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def _is_plain(t: Tensor) -> bool:
    return type(t) in (Tensor, nn.Parameter) and t.dtype == torch.float32 and t.is_cpu


def _geometry(conv: Any) -> tuple[Any, ...]:
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode


def chosen() -> str:
    """Which convolutions of the networks run by what on this CPU, in words."""
    if not _HAS_VECTORS:
        return "torch's (the code in use has no vectors)"
    return (
        f"Winograd F(2, 3) for 3 x 3 in float32 from {LEAST_PIXELS} pixels, {LEAST_INPUTS} inputs and {LEAST_OUTPUTS} "
        "outputs on; torch's otherwise"
    )


# --------------------------------------------------------------------------------------------------- packed weights
class _Held(NamedTuple):
    packed: Tensor
    made_of: Snapshot


class Packed:
    """Weights of convolutions, packed when they are first used and kept while the layer lives: ``most`` bytes at most.

    ``most`` None: `SHARE_OF_MEMORY` of what is free now. Weights beyond are packed in every call, and so are inference
    tensors, as nobody counts how often they are written to.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = int(SHARE_OF_MEMORY * _free_memory()) if most is None else most
        self._of: dict[bool, WeakKeyDictionary[nn.Module, _Held]] = {up: WeakKeyDictionary() for up in (False, True)}
        self._lock = Lock()

    @property
    def bytes(self) -> int:
        """Of the packed weights that are held now."""
        with self._lock:
            return self._bytes()

    def _bytes(self) -> int:
        return sum(held.packed.nbytes for layers in self._of.values() for held in layers.values())

    def of(self, conv: nn.Conv2d, upsample: bool) -> Tensor | None:
        """`ops.pack_conv3x3` of the layer's weight as it is; None where there is no room for it.

        Another weight, one in other memory, and one that has been written to as torch counts it, is packed again.
        """
        weight, layers = conv.weight, self._of[upsample]
        with self._lock:
            held = layers.get(conv)
            if held is not None:
                if held.made_of.is_of(weight):
                    return held.packed
                del layers[conv]
            outputs, inputs = weight.shape[:2]
            if weight.is_inference() or self._bytes() + _size(outputs, inputs, upsample) > self.most:
                return None
            made_of = Snapshot(weight)
            with neutral():
                made = pack_conv3x3(weight, upsample=upsample)
            layers[conv] = _Held(made, made_of)
            return made

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Within, `convolve` takes packed weights from here, but of layers that are frozen."""
        token = _used.set(self)
        try:
            yield
        finally:
            _used.reset(token)


_used: ContextVar[Packed | None] = ContextVar("diffkern_packed_weights", default=None)
_running: WeakKeyDictionary[nn.Module, weakref.ref[Packed]] = WeakKeyDictionary()
_frozen: WeakKeyDictionary[nn.Module, tuple[Packed, ...]] = WeakKeyDictionary()
"""Of a layer all that it is frozen by; the last is used."""
_changes = Lock()


def packed_of_runs(network: nn.Module) -> Packed:
    """Packed weights that all runs of a network under way share, for as long as one of them holds it."""
    with _changes:
        there = _running.get(network)
        packed = None if there is None else there()
        if packed is None:
            packed = Packed()
            _running[network] = weakref.ref(packed)
        return packed


def _packed_for(conv: nn.Conv2d, upsample: bool) -> Tensor | None:
    frozen = _frozen.get(conv) if _frozen else None
    packed = frozen[-1] if frozen else _used.get()
    return None if packed is None else packed.of(conv, upsample)


@kept(256)
def _size(outputs: int, inputs: int, upsample: bool) -> int:
    """Bytes of a packed weight."""
    return pack_conv3x3(torch.empty(outputs, inputs, 3, 3, device="meta"), upsample=upsample).nbytes


def _free_memory() -> int:
    """Bytes that the system would give; without a system that says it, a gigabyte."""
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return 2**30


class Frozen:
    """What `freeze` returns: `thaw`, or the end of a ``with`` block, undoes it."""

    def __init__(self, network: nn.Module, packed: Packed) -> None:
        self._packed = packed
        with _changes:
            for layer in network.modules():
                if isinstance(layer, nn.Conv2d) and _geometry(layer) == _GEOMETRY:
                    _frozen[layer] = *_frozen.get(layer, ()), packed

    @property
    def bytes(self) -> int:
        """Of the packed weights so far, beside the weights themselves."""
        return self._packed.bytes

    def thaw(self) -> None:
        """Lets go of the packed weights; a second time there is nothing to do."""
        with _changes:
            for layer, by in list(_frozen.items()):
                left = tuple(packed for packed in by if packed is not self._packed)
                if left:
                    _frozen[layer] = left
                else:
                    del _frozen[layer]
        self._packed = Packed(0)

    def __enter__(self) -> Frozen:
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw()


def freeze(network: nn.Module, *, memory: int | None = None) -> Frozen:
    """Keeps the weights of a network's 3 x 3 convolutions packed from their first use on, until `Frozen.thaw`.

    ``network``: one of `diffkern.nn`, or one of diffusers' that `compat.diffusers.replace` has been called with; its
    convolutions by `ops.conv3x3` (float32 on the CPU) then cost less, with the same bits. `diffkern.sample` does this
    by itself for the length of a run. ``memory``: bytes that packed weights may take, 16 / 9 of the weights' own where
    outputs are a multiple of 64; None: a quarter of what is free. Weights beyond are packed in every call. Layers that
    are in the network now are meant; of two freezes the later one holds until it is undone.

    Until then the weights are meant to stay: what torch counts (`load_state_dict`, an optimiser's step, `copy_`) or
    puts in their place (a new parameter, ``.data = ``, `to`) is seen and packed again; what is written into ``.data``
    (``weight.data.copy_``; ``weight.data += ``, as peft merges a LoRA) or by numpy is not: thaw before. Weights made in
    `torch.inference_mode` are packed in every call.
    Copies and pickles of the network are not frozen. Raises TypeError for anything but a module, ValueError for
    ``memory`` that is no integer of at least 0.

    Example::

        with diffkern.nn.freeze(pipe.unet) as frozen:
            image = pipe(prompt).images[0]
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
    most = None if memory is None else integer("memory", memory, 0)
    return Frozen(network, Packed(most))
