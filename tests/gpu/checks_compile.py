"""Checks of torch.compile and opcheck over the ops."""

from __future__ import annotations

from typing import Any

import torch
from gpu.calls import LOSS, NOISING, Call, lay, seeds_of
from gpu.harness import Target, assert_same
from gpu.step_calls import step_call
from helpers.lazy import Lazy
from helpers.op_cases import ROWS, table, values
from torch import Tensor

from diffkern import ops

dynamo = Lazy("torch._dynamo.utils")


# ------------------------------------------------------------------------------------------------------------ compile
def all_ops(
    x0: Tensor, pred: Tensor, index: Tensor, seeds: Tensor, noising: Tensor, loss: Tensor, steps: Tensor, row: int
) -> tuple[Tensor, ...]:
    """All ops in one graph, with torch ops between them that are exact."""
    x_t, target, eps = ops.noising(x0, noising, index, seeds=seeds, want_target=True, want_eps=True)
    assert target is not None
    assert eps is not None
    value = ops.loss(pred * 0.5, x0, loss, index, seeds=seeds)
    x, clean, _, following = ops.step(x_t, pred, table=steps, row=row, seeds=seeds, want_x0=True, next_copies=2)
    assert clean is not None
    assert following is not None
    buffer = torch.zeros_like(x)
    ops.step_out(x, clean, table=steps, row=row, seeds=seeds, out=buffer)
    return x_t, target, eps, value, x, clean, following, buffer, ops.randn(x0.shape, seeds, 3)


def check_compile(target: Target, **options: Any) -> None:
    """One graph without breaks; the bits of the CPU's eager ops; no recompilation for another row."""
    shape = (4, 3, 8, 9)
    steps = table(*({**ROWS["x0 clip noise"], "a": 0.5 + 0.01 * k, "stream": 2.0**41 + k} for k in range(8)))
    inputs = (values(shape, 1), values(shape, 2), torch.arange(4) % len(NOISING), seeds_of(4), NOISING, LOSS)
    torch._dynamo.reset()
    dynamo.counters.clear()
    compiled: Any = torch.compile(all_ops, fullgraph=True, **options)
    try:
        with torch.no_grad():
            there = target.move(inputs)
            for given in (steps, target.move(steps)):  # a row from the host and one on the device
                for row in (1, 2, 5, 7):
                    got = [target.fetch(t) for t in compiled(*there, given, row)]
                    for k, (a, b) in enumerate(zip(got, all_ops(*inputs, steps, row), strict=True)):
                        assert_same(a, b, f"output {k} of row {row}, compiled with {options}")
        graphs = dynamo.counters["stats"]["unique_graphs"]
        assert graphs <= (4 if target.is_gpu else 2), f"{graphs} graphs: torch.compile started again for a row"
    finally:
        torch._dynamo.reset()


def check_opcheck(target: Target, which: slice = slice(None)) -> None:
    """torch.library.opcheck: schema, fake tensors, autograd registration and aot dispatch on this device."""
    shape, seeds = (3, 2, 5, 4), seeds_of(3)
    x, m, index = values(shape, 1), values(shape, 2), torch.tensor([2, 0, 1])
    both = torch.cat([m, m]).bfloat16()
    want: dict[str, Any] = {"want_x0": True, "want_s": True, "next_copies": 2}
    guided = list(ROWS).index("eps guided")
    leaf, pred = x.clone().requires_grad_(), m.clone().requires_grad_()
    source = {"seeds": seeds, "stream": 5, "noise": None}
    calls = [
        Call("randn", {"size": list(shape), "seeds": seeds, "stream": 5, "dtype": torch.float16}, ""),
        Call(
            "noising",
            {"x0": leaf, "table": NOISING, "index": index, **source, "want_target": True, "want_eps": True},
            "",
        ),
        Call(
            "loss",
            {"pred": pred, "x0": x, "table": LOSS, "index": index, **source, "reduction": 1, "want_grad": True},
            "",
        ),
        step_call("", {"x": lay(x, "channels_last"), "m": lay(both, "channels_last")}, ("table",), row=guided, **want),
        step_call("", {"x": x, "m": both}, index=torch.tensor([guided] * 3), **want),
    ]
    for call in calls[which]:
        arguments = call.on(target)
        for tensor in arguments.values():
            assert not isinstance(tensor, Tensor) or tensor.device.type in (target.device.type, "cpu")
        torch.library.opcheck(getattr(torch.ops.diffkern, call.op).default, (), arguments)
