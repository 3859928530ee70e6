"""What the ops share: fake tensors, checks, coefficients in the arithmetic of the kernels."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

native = torch.ops.diffkern
REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
ACTIVATIONS = {None: 0, "silu": 1}
_CHECKED = os.environ.get("DIFFKERN_CHECK", "") not in ("", "0")


def active() -> bool:
    """Whether a transform of torch.func, or vmap, is at work. torch.compile breaks its graph there."""
    found: bool = torch._C._are_functorch_transforms_active()
    if found and torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(
            msg="diffkern's ops inside of torch.func.grad or vmap are not for torch.compile: compile the network that "
            "is called there, or take gradients by autograd (loss.backward(), torch.autograd.grad) of what is compiled"
        )
    return found


def empty_like(x: Tensor, dtype: torch.dtype | None = None, copies: int = 1) -> Tensor:
    """The fake of csrc/bind's empty_like: the strides of x where it is [B, ...] or channels_last without gaps."""
    dtype = x.dtype if dtype is None else dtype
    shape = list(x.shape)
    inner = 1
    for n in shape[1:]:
        inner = inner * n
    strides = list(x.stride())
    if (is_packed(x, False) or is_packed(x, True)) and (shape[0] <= 1 or strides[0] == inner):
        strides[0] = inner
        shape[0] = shape[0] * copies
        return torch.empty_strided(shape, strides, dtype=dtype, device=x.device)
    shape[0] = shape[0] * copies
    return torch.empty(shape, dtype=dtype, device=x.device)


def is_packed(x: Tensor, channels_last: bool) -> bool:
    if channels_last and x.dim() < 3:
        return False
    order = [1, *range(x.dim() - 1, 1, -1)] if channels_last else range(x.dim() - 1, 0, -1)
    expected = 1
    for d in order:
        if x.shape[d] != 1 and x.stride(d) != expected:
            return False
        expected = expected * x.shape[d]
    return True


def check_on_device(name: str, index: Tensor | None, table: Tensor) -> None:
    """Checked mode (DIFFKERN_CHECK=1): reads a CUDA index back and raises where the kernel would give NaN."""
    if _CHECKED and index is not None and index.is_cuda:
        outside = (index < 0) | (index >= table.shape[0])
        if bool(outside.any()):
            raise RuntimeError(
                f"diffkern.{name}: index must be in [0, {table.shape[0]}), the rows of the table, "
                f"got {index[outside].flatten()[0].item()}"
            )


def gather(table: Tensor, index: Tensor) -> Tensor:
    """table[index] as [B or 1, columns]; NaN where the index is outside, as in the kernels (never a device assert)."""
    at = index.reshape(-1).long()
    inside = (at >= 0) & (at < table.shape[0])
    return torch.where(inside[:, None], table[at.clamp(0, table.shape[0] - 1)], float("nan"))


def rows_of(table: Tensor, index: Tensor | None, dims: int) -> Tensor:
    """Rows of a noising or loss table as [B or 1, columns, 1, ...]: coefficients that broadcast over samples."""
    rows = table if index is None else gather(table, index)
    return rows.reshape(rows.shape[0], rows.shape[1], *(1,) * (dims - 1))


def times(coefficient: Tensor, x: Tensor | float | None) -> Tensor | float:
    """coefficient * x in the arithmetic of the kernels; 0.0 where there is no x."""
    if not isinstance(x, Tensor):
        return 0.0
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return coefficient.to(wide) * x.to(wide)


def as_dtype_of(value: Tensor | float, like: Tensor) -> Tensor:
    return value.to(like.dtype) if isinstance(value, Tensor) else torch.zeros_like(like)


# An op with an autograd formula costs 4 us a call more, also where nothing requires grad: more than a small call takes.
below_autograd = torch._C._AutoDispatchBelowAutograd


def differentiates(*tensors: Tensor | None) -> bool:
    """Whether autograd must see a call on these; torch.compile always sees it."""
    if torch.compiler.is_compiling():
        return True
    if torch.is_grad_enabled():
        for t in tensors:
            if t is not None and t.requires_grad:
                return True
    return False


def is_traced() -> bool:
    """Whether what is called now is seen by a tracer, a transform or a mode of dispatch."""
    if torch.compiler.is_compiling() or active():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or torch._C._get_tracing_state() is not None


def autocast(t: Tensor) -> Tensor:
    """As torch casts the inputs of its own products and attention: float64 and other devices' tensors stay."""
    kind = t.device.type
    if kind not in ("cpu", "cuda") or not torch.is_autocast_enabled(kind):
        return t
    return t.to(torch.get_autocast_dtype(kind)) if t.is_floating_point() and t.dtype != torch.float64 else t


def refuse_onnx(name: str, instead: str = "") -> None:
    """Raise ValueError with the way out while torch.onnx.export traces: `instead`, or attention="torch"."""
    onnx = sys.modules.get("torch.onnx")
    if onnx is not None and onnx.is_in_onnx_export():
        if instead:
            raise ValueError(f"diffkern.{name} is not known to ONNX: call {instead} in a network that is exported")
        raise ValueError(
            f'attention must be "torch" in a network that is exported to ONNX, which has no diffkern.{name}, got '
            '"diffkern": call set_attention("torch") of the network, or set attention of the blocks of diffkern.nn'
        )


def refuse_tangents(op: str, *tensors: Tensor | None) -> None:
    """The ops have no forward-mode derivatives: said, as torch would take their tangents for zeros."""
    if forward_ad._current_level < 0:
        return
    for t in tensors:
        if t is None:
            continue
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(t)
        if wrapped or forward_ad.unpack_dual(t).tangent is not None:
            raise NotImplementedError(
                f"diffkern.{op}: has no forward-mode derivative (torch.func.jvp, forward_ad), and a tensor carries a "
                f"tangent: use reverse mode, or diffkern.reference.{op.removesuffix('_out')}"
            )


def refuse_grad(op: str, *tensors: Tensor | None) -> None:
    """Ops that write into given tensors have no gradient: said, instead of a graph that ends in silence."""
    refuse_tangents(op, *tensors)
    if not torch.is_grad_enabled():
        return
    transformed = active()
    for t in tensors:  # a loop: any() with a generator takes twice as long
        if t is not None and (t.requires_grad or (transformed and is_tracked(t))):
            raise RuntimeError(f"diffkern.{op}: not differentiable, and a tensor requires grad: use torch.no_grad()")


def is_tracked(t: Tensor) -> bool:
    """Whether a transform of torch.func, at any of its levels, records the gradient of a tensor."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        if functorch.is_gradtrackingtensor(t):
            return True
        t = functorch.get_unwrapped(t)
    return t.requires_grad


def is_plain(t: Tensor) -> bool:
    """Whether a tensor is itself: no fake of a tracer, no wrapper of torch.func or vmap."""
    return type(t) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(t)


def refuse_batches(op: str, *tensors: Tensor | None) -> None:
    """Ops that vmap has no rule for: said, with what to use."""
    if active() and any(t is not None and torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors):
        instead = f"diffkern.ops.{op.removesuffix('_out')}" if op.endswith("_out") else f"diffkern.reference.{op}"
        raise NotImplementedError(
            f"diffkern.{op}: has no part in torch.func and vmap, got a tensor of theirs: use {instead}"
        )


def wrote(*outputs: Tensor | None) -> None:
    """Tells autograd that tensors have changed, so that a backward pass that saved one of them raises."""
    torch.autograd.graph.increment_version([t for t in outputs if t is not None])


def one_device(op: str, *, row_by_value: bool = False, **tensors: Tensor | None) -> None:
    """For the fakes: a mix of meta and real tensors comes here, and must not pass for a result.

    row_by_value: the table may stay on the CPU, as its row travels in the arguments.
    """
    given = {name: t for name, t in tensors.items() if t is not None}
    first = next(iter(given))
    for name, t in given.items():
        if t.device != given[first].device and not (row_by_value and name == "table" and t.is_cpu):
            raise RuntimeError(
                f"diffkern.{op}: {name} must be on the device of {first} ({given[first].device}), got {t.device}"
            )


def refuse_twice(op: str) -> None:
    """In a backward pass whose gradient torch cannot differentiate: said, as it would pass for a constant."""
    if torch.is_grad_enabled():  # create_graph
        raise RuntimeError(
            f"diffkern.{op}: differentiable once only, use diffkern.reference.{op} for higher derivatives"
        )


_SMALL = 2**18
_NARROW = (torch.float16, torch.bfloat16)


def stores_wide(pred: Tensor) -> bool:
    """Whether a 16-bit prediction is small enough (1 MiB in float32) to have its gradient stored unrounded.

    That is quicker than to make it in the backward pass.
    """
    return pred.dtype in _NARROW and pred.numel() <= _SMALL


def widened(pred: Tensor) -> Tensor:
    """A prediction that requires grad in float32 where its gradient is stored so, else itself."""
    narrow = pred.dtype in _NARROW and pred.requires_grad and torch.is_grad_enabled()
    return pred.to(torch.float32) if narrow and not torch.compiler.is_compiling() and stores_wide(pred) else pred


def stores_gradient(pred: Tensor, x0: Tensor) -> bool:
    """Whether a loss makes its gradient in the forward pass.

    Not where that would round it to less than the arithmetic has before the incoming gradient (a loss scale of 65536,
    say) is there: the backward pass makes it then, from what the forward pass read.
    """
    return pred.dtype == torch.float64 or (pred.dtype == torch.float32 and x0.dtype != torch.float64)


def is_usual(pred: Tensor, *constants: Tensor | None) -> bool:
    """Whether a call is one of plain eager training: on tensors of no other kind, with a gradient of pred alone.

    An autograd function of its own then serves it, at half the cost of the op's, which every tracer and transform sees.
    """
    if type(pred) is not Tensor or not pred.requires_grad or not torch.is_grad_enabled():
        return False
    for t in constants:
        if t is not None and (type(t) is not Tensor or t.requires_grad):
            return False
    return not is_traced()


def scaled_gradient(grad: Tensor, g_value: Tensor) -> Tensor:
    """The gradient that a forward pass stored, times that of its value ([] or [B])."""
    if is_plain(g_value) and g_value.is_cpu:  # reading a CPU value costs nothing
        dims = g_value.dim()
        one = g_value if not dims else g_value[(0,) * dims] if g_value.numel() and not any(g_value.stride()) else None
        if one is not None and one.item() == 1.0:
            return grad  # the usual loss.backward() or value.sum(): nothing to scale
    scale = g_value.reshape(-1, *(1,) * (grad.dim() - 1)) if g_value.dim() else g_value
    return (grad * scale).to(grad.dtype)


def weighted_by(table: Tensor, index: Tensor | None, g_value: Tensor, columns: slice) -> tuple[Tensor, Tensor | None]:
    """(table, index) whose `columns`, the weights, are multiplied in float64 by a gradient that came in ([] or [B])."""
    if g_value.dim():
        rows, index = table if index is None else gather(table, index), None
        g_value = g_value[:, None]
        rows = rows.expand(g_value.shape[0], -1)
    else:
        rows = table
    parts = rows[:, : columns.start], rows[:, columns] * g_value, rows[:, columns.stop :]
    return torch.cat([part for part in parts if part.shape[1]], 1), index


def dot(a: Tensor | float | None, b: Tensor | float | None) -> Tensor | float:
    """sum a b of each sample, float64 [B]: products in the arithmetic of the kernels, their sum in float64.

    0.0 where one is absent.
    """
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0
    wide = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    products = a.to(wide) * b.to(wide)
    return products.reshape(products.shape[0], math.prod(products.shape[1:])).sum(1, dtype=torch.float64)


def table_gradient(
    columns: Sequence[Tensor | float], table: Tensor, index: Tensor | None, row: int | None = None
) -> Tensor:
    """The gradient of a table from that of each sample's row, given by columns ([B] or 0.0)."""
    like = next(column for column in columns if isinstance(column, Tensor))
    each = torch.stack([column + torch.zeros_like(like) for column in columns], 1)
    if index is None and row is None:
        return each if table.shape[0] == each.shape[0] else each.sum(0, keepdim=True)
    if index is None:
        return torch.zeros_like(table).index_add(
            0, torch.tensor([row], device=table.device), each.sum(0, keepdim=True).to(table.device)
        )
    at = index.reshape(-1).long().clamp(0, table.shape[0] - 1)  # outside: NaN is what is added
    each = each if len(at) == len(each) else each.sum(0, keepdim=True)
    return torch.zeros_like(table, device=each.device).index_add(0, at, each).to(table.device)


# ------------------------------------------------------------------------------------------------------- torch.func
class _Once(torch.autograd.Function):
    """Gradients that a kernel made, of which there is no derivative: said where one is asked for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, count: int, *tensors: Any) -> Any:
        return tuple(None if t is None else t.view_as(t) for t in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with torch.enable_grad():
            refuse_twice(ctx.op)


def once(op: str, make: Callable[[], Sequence[Tensor | None]], *of: Tensor | None) -> Sequence[Tensor | None]:
    """``make()``, gradients by a kernel as functions of the tensors ``of``: not differentiable again.

    Raises RuntimeError where a graph of them is recorded; torch.func records one always, so that it is told later.
    """
    if not active():
        refuse_twice(op)
        return make()
    with torch.no_grad():
        made = make()
    found: Sequence[Tensor | None] = _Once.apply(op, len(made), *made, *of)
    return found


def function(
    op: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """An op with its gradient for torch.func, which does not take those of torch.library.register_autograd."""
    members = {
        "forward": staticmethod(lambda *args: op(*args)),
        "setup_context": staticmethod(setup),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    return type("Transformed", (torch.autograd.Function,), members)
