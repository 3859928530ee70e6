"""Modes that a caller may be in, and what must not depend on them.

What is kept for later calls (tables, plans, schedules) is made under `neutral` modes, so that it has the same bits, and
serves every later call, wherever it was first asked for: under `torch.inference_mode`, a default device, fake tensors,
a transform of `torch.func`, or while torch.compile or torch.export traces, for which it is a constant. The default
dtype is torch's one mode of the whole process, which is not touched: what is kept states its dtype.

Values are looked at, to raise a clear error, where `readable` says so. `evaluating` is a network's own mode.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

F = TypeVar("F", bound=Callable[..., Any])
_TRACERS = [getattr(torch._C._TorchDispatchModeKey, name) for name in ("FAKE", "PROXY", "FUNCTIONAL")]


@contextmanager
def neutral() -> Iterator[None]:
    """Inside: ordinary tensors, made on the CPU where no device is named, without gradients, and real ones.

    What torch.compile traces stays in its graph: there it only makes no inference tensors.
    """
    if torch.compiler.is_dynamo_compiling():
        with torch.inference_mode(False):
            yield
        return
    with ExitStack() as modes:
        if torch._C._functorch.peek_interpreter_stack() is not None:
            from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

            modes.enter_context(temporarily_clear_interpreter_stack())
        if any(map(torch._C._get_dispatch_mode, _TRACERS)) or torch._ops._len_torch_dispatch_stack_pre_dispatch():
            from torch.utils._python_dispatch import _disable_current_modes

            modes.enter_context(_disable_current_modes())
        modes.enter_context(torch.inference_mode(False))
        modes.enter_context(torch.no_grad())
        if torch._C._len_torch_function_stack():  # default devices are there; each op inside pays for one more
            modes.enter_context(torch.device("cpu"))
        yield


def untraced(function: F) -> F:
    """Decorator: torch.compile calls the function while it traces, and takes the result for a constant.

    Arguments are numbers, strings, devices, or objects that never change and were made outside of what is compiled; it
    compiles again for other ones.
    """

    def boxed(*args: Any, **kwargs: Any) -> tuple[Any]:
        return (function(*args, **kwargs),)

    # What torch.compiler.assume_constant_result does, which imports all of torch.compile first. In a tuple, as torch
    # does not keep two tensors of one function apart.
    boxed._dynamo_marked_constant = True  # type: ignore[attr-defined]

    @functools.wraps(function)
    def found(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_dynamo_compiling():
            return function(*args, **kwargs)
        made = boxed(*args, **kwargs)[0]
        return made.detach() if isinstance(made, Tensor) else made  # of which the tracer knows that it has no gradient

    return cast(F, found)


def neutrally(function: F) -> F:
    """Decorator: the function runs under `neutral` modes. torch.compile breaks its graph there."""

    @functools.wraps(function)
    def found(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(
                msg=f"{function.__name__}() is to be called outside of what torch.compile compiles"
            )
        with neutral():
            return function(*args, **kwargs)

    return cast(F, found)


def kept(most: int) -> Callable[[F], F]:
    """Decorator: an lru_cache of ``most`` results made under `neutral` modes, and `untraced`; hashable arguments."""

    def decorate(function: F) -> F:
        return untraced(cast(F, functools.lru_cache(most)(neutrally(function))))

    return decorate


def readable(values: Tensor) -> bool:
    """Whether values may be looked at: real ones on the CPU, where it costs nothing, and not while a graph is made.

    Those of a transform of torch.func (vmap) are not.
    """
    return values.device.type == "cpu" and real(values)


def real(values: Tensor) -> bool:
    """`readable` on any device: looking at values of a GPU waits for it."""
    if torch.compiler.is_compiling() or values.is_meta or isinstance(values, FakeTensor):
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(values)


def fakes(device: torch.device | str) -> object:
    """The FakeTensorMode of a caller that this device, which may not exist outside of it, belongs to; None without."""
    if torch.compiler.is_compiling() or str(device) == "cpu":
        return None
    return torch._C._get_dispatch_mode(_TRACERS[0])


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while, put back module by module, by the last of the threads that are at it."""
    alone = torch.compiler.is_dynamo_compiling()  # which traces no locks
    training = _begin(module) if alone else _first(module)
    try:
        yield
    finally:
        if alone:
            _end(training)
        else:
            _last(module)


def _begin(module: nn.Module) -> list[nn.Module]:
    training = [inside for inside in module.modules() if inside.training]
    module.eval()
    return training


def _end(training: list[nn.Module]) -> None:
    for inside in training:
        inside.training = True


def _first(module: nn.Module) -> list[nn.Module]:
    with _LOCK:
        count, training = _RUNNING.get(module, (0, []))
        training = training if count else _begin(module)
        _RUNNING[module] = count + 1, training
    return training


def _last(module: nn.Module) -> None:
    with _LOCK:
        count, training = _RUNNING.pop(module)
        if count > 1:
            _RUNNING[module] = count - 1, training
        else:
            _end(training)


_LOCK = threading.Lock()
_RUNNING: WeakKeyDictionary[nn.Module, tuple[int, list[nn.Module]]] = WeakKeyDictionary()
