"""3 x 3 convolutions of the networks: by `ops.conv3x3` where that is the faster one, with weights packed or not."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from diffkern import _load
from diffkern.modes import neutral
from diffkern.nn.plain import is_plain, version
from diffkern.ops import conv3x3, pack_conv3x3

LEAST_PIXELS, LEAST_INPUTS, LEAST_OUTPUTS = 64, 16, 32
"""Of an output image and of the weights; below, torch's convolution is the faster one (measured with AVX2, with the
weights packed in every call). Never of the batch: a sample's bits do not depend on it."""
SHARE_OF_MEMORY = 0.25
"""Of what is free when the weights of a network begin to be packed: what they may take."""
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
    if torch.compiler.is_compiling() or not is_plain(conv, nn.Conv2d) or x.dim() != 4:
        return False
    weight = conv.weight
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or type(weight) not in (Tensor, nn.Parameter):
        return False
    return (
        _geometry(conv) == _GEOMETRY
        and x.device.type == weight.device.type == "cpu"
        and x.shape[1] == weight.shape[1] >= LEAST_INPUTS
        and weight.shape[0] >= LEAST_OUTPUTS
        and x.shape[2] * x.shape[3] * (4 if upsample else 1) >= LEAST_PIXELS
        and _has_vectors()
        and not torch.is_autocast_enabled("cpu")
        and torch._C._get_tracing_state() is None
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
    )


def _geometry(conv: Any) -> tuple[Any, ...]:
    return conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode


@functools.cache
def _has_vectors() -> bool:
    return _load.build_info().get("isa") != "scalar"


# --------------------------------------------------------------------------------------------------- packed weights
class Packed:
    """Weights of convolutions, packed when they are first used and kept, at most ``most`` bytes of them.

    ``most`` None: `SHARE_OF_MEMORY` of what is free now. Weights beyond are packed in every call.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = int(SHARE_OF_MEMORY * _free_memory()) if most is None else most
        self.bytes = 0
        self._of: dict[tuple[int, bool], tuple[Tensor, int, int, Tensor]] = {}

    def of(self, weight: Tensor, upsample: bool) -> Tensor | None:
        """`ops.pack_conv3x3` of the weight as it is; None where there is no room for it.

        A weight that has been written to since, as torch counts it, or has other memory, is packed again.
        """
        key, now = (id(weight), upsample), (version(weight), weight.data_ptr())
        held = self._of.get(key)
        if held is not None and held[1:3] == now:
            return held[3]
        if held is not None:
            self.bytes -= held[3].nbytes
            del self._of[key]
        if self.bytes + 4 * weight.shape[0] * weight.shape[1] * (9 if upsample else 16) > self.most:
            return None
        with neutral():
            made = pack_conv3x3(weight, upsample=upsample)
        self._of[key] = weight, *now, made  # the weight is held, so that its id stays its own
        self.bytes += made.nbytes
        return made

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Within, `convolve` takes packed weights from here."""
        token = _used.set(self)
        try:
            yield
        finally:
            _used.reset(token)


_used: ContextVar[Packed | None] = ContextVar("diffkern_packed_weights", default=None)
_frozen: WeakKeyDictionary[nn.Module, Packed] = WeakKeyDictionary()


def _packed_for(conv: nn.Conv2d, upsample: bool) -> Tensor | None:
    packed = _used.get()
    if packed is None and _frozen:
        packed = _frozen.get(conv)
    return None if packed is None else packed.of(conv.weight, upsample)


def _free_memory() -> int:
    """Bytes that the system would give; without a system that says it, a gigabyte."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return 2**30


class Frozen:
    """What `freeze` returns: `thaw`, or the end of a ``with`` block, undoes it."""

    def __init__(self, layers: Sequence[nn.Module], packed: Packed) -> None:
        self._layers, self._packed = list(layers), packed
        for layer in layers:
            _frozen[layer] = packed

    @property
    def bytes(self) -> int:
        """Of the packed weights so far, beside the weights themselves."""
        return self._packed.bytes

    def thaw(self) -> None:
        """Lets go of the packed weights; a second time there is nothing to do."""
        for layer in self._layers:
            if _frozen.get(layer) is self._packed:
                del _frozen[layer]
        self._layers, self._packed = [], Packed(0)

    def __enter__(self) -> Frozen:
        return self

    def __exit__(self, *_: object) -> None:
        self.thaw()


def freeze(network: nn.Module, *, memory: int | None = None) -> Frozen:
    """Keeps the weights of a network's 3 x 3 convolutions packed from their first use on, until `Frozen.thaw`.

    ``network``: one of `diffkern.nn`, or one of diffusers' that `compat.diffusers.replace` has been called with; its
    convolutions by `ops.conv3x3` (float32 on the CPU) then cost less, with the same bits. `diffkern.sample` does this
    by itself for the length of a run. ``memory``: bytes that packed weights may take, 16 / 9 of the weights' own at
    most; None: a quarter of what is free. Weights beyond are packed in every call.

    Until then the weights are meant to stay: what torch counts (`load_state_dict`, an optimiser's step, `copy_`) or
    puts in their place is seen and packed again, what is written through ``.data`` is not: thaw before.
    Copies and pickles of the network are not frozen. Raises TypeError for anything but a module, ValueError for a
    negative ``memory``.

    Example::

        with diffkern.nn.freeze(pipe.unet) as frozen:
            image = pipe(prompt).images[0]
    """
    if not isinstance(network, nn.Module):
        raise TypeError(f"network must be a torch.nn.Module, got {type(network).__name__}")
    if memory is not None and memory < 0:
        raise ValueError(f"memory must not be negative, got {memory}")
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
    return Frozen([conv for conv in convolutions if _geometry(conv) == _GEOMETRY], Packed(memory))
