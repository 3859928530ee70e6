"""vmap over the ops: how a vmapped batch becomes part of the batch.

Samples do not know their neighbours, so a batch of batches is one batch: every rule folds [V, B, ...] into [V B, ...].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffkern.ops._common import is_tracked, native


class Fold:
    """The arguments of one vmapped call, V of them, as one batch."""

    def __init__(self, info: Any, like: Tensor, dim: int | None) -> None:
        """``like`` (vmapped along ``dim``, or not) is [B, ...] in each call."""
        self.V: int = info.batch_size
        self.B: int = like.shape[0] if dim is None or dim > 0 else like.shape[1]

    def front(self, t: Tensor, dim: int | None) -> Tensor:
        """[V, ...]."""
        return t.expand(self.V, *t.shape) if dim is None else t.movedim(dim, 0)

    def samples(self, t: Tensor | None, dim: int | None) -> Tensor | None:
        """[B, ...] -> [V B, ...]; [2 B, ...] = [first | second] -> [2 V B, ...], the same."""
        if t is None:
            return None
        t = self.front(t, dim)
        copies = t.shape[1] // self.B if self.B else 1
        if copies > 1:
            t = t.reshape(self.V, copies, self.B, *t.shape[2:]).movedim(1, 0)
            return t.reshape(copies * self.V * self.B, *t.shape[3:])
        return t.reshape(self.V * t.shape[1], *t.shape[2:])

    def back(self, t: Tensor | None, copies: int = 1) -> Tensor | None:
        """[V B, ...] -> [V, B, ...], and [2 V B, ...] -> [V, 2 B, ...]."""
        if t is None:
            return None
        shape = t.shape[1:]
        if copies > 1:
            return t.reshape(copies, self.V, self.B, *shape).movedim(0, 1).reshape(self.V, copies * self.B, *shape)
        return t.reshape(self.V, -1 if t.numel() else self.B, *shape)

    def rows(
        self, table: Tensor, table_dim: int | None, index: Tensor | None, index_dim: int | None
    ) -> tuple[Tensor, Tensor | None]:
        """(table, index) that give every sample its row."""
        if table_dim is None and index is None:
            return (table if table.shape[0] == 1 else table.repeat(self.V, 1)), None
        if index is None:
            each = self.front(table, table_dim).expand(self.V, self.B, -1)
            return each.reshape(self.V * self.B, -1).contiguous(), None
        if table_dim is None and index_dim is None and index.dim() == 0:
            return table, index
        at = self.front(index, index_dim)
        at = at.reshape(self.V, -1).expand(self.V, self.B)
        if table_dim is not None:
            table = table.movedim(table_dim, 0)
            count = table.shape[1]
            inside = (at >= 0) & (at < count)
            at = torch.where(inside, at + count * torch.arange(self.V, device=at.device)[:, None], -1)
            table = table.reshape(self.V * count, -1).contiguous()
        return table, at.reshape(-1)

    def each(self, *given: tuple[Tensor | None, int | None]) -> list[Tensor | None]:
        return [self.samples(t, dim) for t, dim in given]


def first_of(pairs: Sequence[tuple[Any, int | None]]) -> tuple[Tensor, int | None]:
    """The first that is a tensor, with its dimension."""
    return next((t, dim) for t, dim in pairs if t is not None)


def out_dims(outs: Sequence[Tensor | None]) -> tuple[int | None, ...]:
    return tuple(None if t is None else 0 for t in outs)


# --------------------------------------------------------------------------------------------------- the ops' rules
def _randn(info: Any, in_dims: Any, size: Any, seeds: Tensor, *stream_and_dtype: Any) -> Any:
    fold = Fold(info, seeds, in_dims[1])
    made = native.randn([fold.V * fold.B, *size[1:]], fold.samples(seeds, in_dims[1]), *stream_and_dtype)
    return fold.back(made), 0


def _noise_sum(
    info: Any, in_dims: Any, size: Any, seeds: Tensor, streams: Tensor, weights: Tensor, dtype: torch.dtype
) -> Any:
    fold = Fold(info, seeds, in_dims[1])
    if in_dims[2] is None and in_dims[3] is None:
        made = native.noise_sum([fold.V * fold.B, *size[1:]], fold.samples(seeds, in_dims[1]), streams, weights, dtype)
        return fold.back(made), 0
    # The terms are read on the host, the same for the whole batch of a call.
    given = [fold.front(t, dim).contiguous() for t, dim in zip((seeds, streams, weights), in_dims[1:4], strict=True)]
    return torch.stack([native.noise_sum(size, *one, dtype) for one in zip(*given, strict=True)]), 0


def _noising(info: Any, in_dims: Any, *args: Any) -> Any:
    x0, table, index, seeds, stream, noise, *wants = args
    fold = Fold(info, x0, in_dims[0])
    rows = fold.rows(table, in_dims[1], index, in_dims[2])
    x0, seeds, noise = fold.each((x0, in_dims[0]), (seeds, in_dims[3]), (noise, in_dims[5]))
    outs = tuple(fold.back(t) for t in native.noising(x0, *rows, seeds, stream, noise, *wants))
    return outs, out_dims(outs)


def _reduced(value: Tensor, fold: Fold, reduction: int) -> Tensor:
    value = value.reshape(fold.V, fold.B)
    return value if reduction == 0 else value.sum(1)


def _for_each(rows: tuple[Tensor, Tensor | None], columns: slice, reduction: int, batch: int) -> tuple[Any, Any]:
    """Rows whose weights hold the 1 / B of a mean over each batch."""
    table, index = rows
    if reduction != 1:
        return rows
    parts = table[:, : columns.start], table[:, columns] / batch, table[:, columns.stop :]
    return torch.cat([part for part in parts if part.shape[1]], 1), index


def _loss_of(op: Any, columns: slice) -> Callable[..., Any]:
    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        pred, x0, table, index, seeds, stream, noise, reduction, *wants = args
        fold = Fold(info, x0, in_dims[1])
        rows = _for_each(fold.rows(table, in_dims[2], index, in_dims[3]), columns, reduction, fold.B)
        pred, x0, seeds, noise = fold.each(*((args[i], in_dims[i]) for i in (0, 1, 4, 6)))
        value, *more = op(pred, x0, *rows, seeds, stream, noise, 0, *wants)
        outs = (_reduced(value, fold, reduction), *(fold.back(t) for t in more))
        return outs, out_dims(outs)

    return rule


_STEP = tuple(argument.name for argument in native.step.default._schema.arguments)


def _step(info: Any, in_dims: Any, *args: Any) -> Any:
    given = dict(zip(_STEP, args, strict=False))  # what has its default may be left out
    dims = {name: dim for name, dim in zip(_STEP, in_dims, strict=False) if given[name] is not None}
    states = ("x", "h0", "h1", "h2", "h3", "noise", "known", "m")  # m may be two batches
    fold = Fold(info, *first_of([(given.get(name), dims.get(name)) for name in states]))
    names = ("x", "m", "m2", "h0", "h1", "h2", "h3", "seeds", "noise", "mask", "known")
    operands = dict(zip(names, fold.each(*((given.get(name), dims.get(name)) for name in names)), strict=True))
    table, row, index = given["table"], given["row"], given.get("index")
    if dims.get("table") is not None and index is None:
        like = next(t for t in operands.values() if t is not None)
        table, index = table.to(like.device), torch.tensor(row, device=like.device)
    if index is not None:
        table, index = fold.rows(table, dims.get("table"), index, dims.get("index"))
    tracked = [t for name, t in operands.items() if name not in ("seeds", "mask") and t is not None]
    if torch.is_grad_enabled() and any(is_tracked(t) for t in (*tracked, table)):
        raise NotImplementedError(
            "diffkern.step: a bound step (of schedulers' loops) has no gradient out of vmap: use diffkern.ops.step"
        )
    x, m = operands.pop("x"), operands.pop("m")
    wants = {name: given[name] for name in ("want_x0", "want_s", "next_copies", "next_dtype") if name in given}
    outs = native.step(x, m, table, row, index=index, **wants, **operands)
    found = (*(fold.back(t) for t in outs[:3]), fold.back(outs[3], max(wants.get("next_copies", 0), 1)))
    return found, out_dims(found)


def _step_logprob(info: Any, in_dims: Any, *args: Any) -> Any:
    *_, table, row, index, want_grad = args
    fold = Fold(info, args[0], in_dims[0])
    operands = fold.each(*((args[i], in_dims[i]) for i in range(8)))
    after, _, m, *_ = operands
    assert after is not None
    doubled = m is not None and len(m) != len(after)
    if in_dims[8] is not None and index is None:
        table, index = table.to(after.device), torch.tensor(row, device=after.device)
    if index is not None:
        table, index = fold.rows(table, in_dims[8], index, None if args[10] is None else in_dims[10])
    value, grad, grad2 = native.step_logprob(*operands, table, row, index, want_grad)
    outs = fold.back(value), fold.back(grad, 2 if doubled else 1), fold.back(grad2)
    return outs, out_dims(outs)


def _batched_alike(op: Any, tensors: int) -> Callable[..., Any]:
    """The rule of an op whose first arguments are [B, ...], and all of its results."""

    def rule(info: Any, in_dims: Any, *args: Any) -> Any:
        fold = Fold(info, *first_of([(args[i], in_dims[i]) for i in range(tensors)]))
        made = op(*fold.each(*((args[i], in_dims[i]) for i in range(tensors))), *args[tensors:])
        outs = (made,) if isinstance(made, Tensor) else tuple(made)
        outs = tuple(fold.back(t) for t in outs)
        return (outs[0], 0) if isinstance(made, Tensor) else (outs, out_dims(outs))

    return rule


def _group_norm_act(info: Any, in_dims: Any, *args: Any) -> Any:
    x, groups, weight, bias, scale, shift, add, eps, act = args
    if in_dims[2] is not None or in_dims[3] is not None:
        return _one_by_one(native.group_norm_act, info, in_dims, args)
    fold = Fold(info, *first_of([(args[i], in_dims[i]) for i in (0, 4, 5, 6)]))
    x, scale, shift, add = fold.each(*((args[i], in_dims[i]) for i in (0, 4, 5, 6)))
    made = tuple(fold.back(t) for t in native.group_norm_act(x, groups, weight, bias, scale, shift, add, eps, act))
    return made, (0, 0, 0)


def _group_norm_act_grad(info: Any, in_dims: Any, *args: Any) -> Any:
    return _one_by_one(native.group_norm_act_grad, info, in_dims, args)


def _linear_rows(info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Tensor | None, act: int) -> Any:
    """Rows of all calls as rows of one; where each has weights of its own, a call for each."""
    if in_dims[1] is not None or in_dims[2] is not None:
        made, _ = _one_by_one(lambda *args: (native.linear_rows(*args),), info, in_dims, (x, weight, bias, act))
        return made[0], 0
    fold = Fold(info, x, in_dims[0])
    return fold.back(native.linear_rows(fold.samples(x, in_dims[0]), weight, bias, act)), 0


def _conv3x3(info: Any, in_dims: Any, x: Tensor, weight: Tensor, bias: Any, packed: Any, form: int) -> Any:
    """Samples of all calls as those of one; where each has weights of its own, a call for each."""
    if any(dim is not None for dim in in_dims[1:4]):
        if in_dims[3] is not None:
            packed = packed.movedim(in_dims[3], 0).contiguous()
            in_dims = (*in_dims[:3], 0, in_dims[4])
        args = x, weight, bias, packed, form
        made, _ = _one_by_one(lambda *args: (native.conv3x3(*args),), info, in_dims, args)
        return made[0], 0
    fold = Fold(info, x, in_dims[0])
    return fold.back(native.conv3x3(fold.samples(x, in_dims[0]), weight, bias, packed, form)), 0


def _pack_conv3x3(info: Any, in_dims: Any, *args: Any) -> Any:
    made, _ = _one_by_one(lambda *args: (native.pack_conv3x3(*args),), info, in_dims, args)
    return made[0], 0


def _one_by_one(op: Any, info: Any, in_dims: Any, args: Any) -> Any:
    """A call for each of the vmapped batch: where parameters, or their gradients, are of it."""
    calls = [
        op(*(arg if dim is None else arg.select(dim, k) for arg, dim in zip(args, in_dims, strict=True)))
        for k in range(info.batch_size)
    ]
    made = tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*calls, strict=True))
    return made, out_dims(made)


def rules(weight: slice, bound: slice) -> dict[str, Callable[..., Any]]:
    """Of all ops that return new tensors; the slices are the columns of weights of `loss` and `variational`."""
    return {
        "randn": _randn,
        "noise_sum": _noise_sum,
        "noising": _noising,
        "loss": _loss_of(native.loss, weight),
        "variational": _loss_of(native.variational, bound),
        "step": _step,
        "step_ad": _step,
        "step_logprob": _step_logprob,
        "attention": _batched_alike(native.attention, 3),
        "attention_grad": _batched_alike(native.attention_grad, 6),
        "spatial_attention": _batched_alike(native.spatial_attention, 1),
        "spatial_attention_grad": _batched_alike(native.spatial_attention_grad, 4),
        "group_norm_act": _group_norm_act,
        "group_norm_act_grad": _group_norm_act_grad,
        "linear_rows": _linear_rows,
        "conv3x3": _conv3x3,
        "pack_conv3x3": _pack_conv3x3,
        "quantile": _batched_alike(native.quantile, 1),
        "dynamic_threshold": _batched_alike(native.dynamic_threshold, 1),
        "moments": _batched_alike(native.moments, 1),
    }
