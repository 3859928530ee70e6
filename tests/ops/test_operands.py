"""Operands that are none (None, numbers, lists, arrays, 0-d, sparse, quantised, 8-bit floats): one sentence of the op's
own that names the argument, for every argument of every op; and lazily negated views, which are operands."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.op_cases import EVERYTHING, ROWS, table, values
from torch import Tensor

from diffkern import ops

F64 = torch.float64
SHAPE = (2, 4, 5)
X, M = values(SHAPE, 1), values(SHAPE, 2)
BOTH = torch.cat([X, M], 1)
S, INDEX = ops.seeds(0, 2), torch.tensor([0, 1])
N = torch.tensor([[0.9, 0.4, 0.4, -0.9], [0.5, 0.8, 0.6, -0.7]], dtype=F64)
BOUND = torch.tensor([[0.3, -0.9, 0.7, 0.8, 3.0, 0.2, 0.1, 0.0, 0.004, 1.5, 0.5, 1.0]], dtype=F64)
LEARNED = torch.cat([table({"p": 1.1, "q": -0.9, "b": 0.4, "g": 0.5, "known_s": 0.9}), N[:1, :2]], 1)
CHANNELS: dict[str, Any] = {"weight": X[0, :, 0], "bias": M[0, :, 0], "scale": X[:, :, 0]}
CHANNELS |= {"shift": M[:, :, 0], "add": M[:, :, 1]}
Q, QKV = values((2, 3, 4, 8), 5), values((2, 24, 3, 3), 6)
IMAGE, TAPS = values((2, 4, 3, 3), 7), values((3, 4, 3, 3), 8)
TERMS: dict[str, Any] = {"streams": torch.tensor([1, 2]), "weights": torch.tensor([0.5, 0.25], dtype=F64)}
STEP: dict[str, Any] = {"x": X, "m": torch.cat([M, X]), "h0": X, "h1": M, "h2": X, "h3": M, "table": table(EVERYTHING)}
STEP |= {"seeds": S, "mask": X > 0, "known": M}
LEARNED_STEP: dict[str, Any] = {"x": X, "m": BOTH, "table": LEARNED, "seeds": S, "mask": X > 0, "known": M}


def outs(*names: str) -> dict[str, Tensor]:
    return {name: torch.zeros(SHAPE) for name in names}


CALLS: dict[str, tuple[Callable[..., object], dict[str, Any]]] = {
    "randn": (ops.randn, {"shape": SHAPE, "seeds": S, **outs("out")}),
    "noise_sum": (ops.noise_sum, {"size": SHAPE, "seeds": S, **TERMS}),
    "noise_sum_out": (ops.noise_sum_out, {"seeds": S, **TERMS, **outs("out")}),
    "noising": (ops.noising, {"x0": X, "table": N, "index": INDEX, "noise": M}),
    "noising_out": (ops.noising_out, {"x0": X, "table": N, "index": INDEX, "seeds": S, **outs("out", "target", "eps")}),
    "loss": (ops.loss, {"pred": M, "x0": X, "table": N[:, :3].contiguous(), "index": INDEX, "noise": M}),
    "variational": (ops.variational, {"pred": BOTH, "x0": X, "table": BOUND, "seeds": S}),
    "step": (ops.step, STEP),
    "step of two models": (ops.step, {"x": X, "m": M, "m2": M, "table": table(ROWS["eps guided"])}),
    "step with noise": (
        ops.step,
        {"x": X, "m": M, "table": table(ROWS["eps noise"]), "noise": M, "index": INDEX[:1][0]},
    ),
    "step_out": (ops.step_out, {**STEP, **outs("out", "x0", "s", "next")}),
    "learned_step": (ops.learned_step, LEARNED_STEP),
    "learned_step_out": (ops.learned_step_out, {**LEARNED_STEP, **outs("out", "x0", "next")}),
    "step_logprob": (ops.step_logprob, {"after": X, "x": X, "m": M, "table": table(ROWS["eps noise"])}),
    "attention": (ops.attention, {"q": Q, "k": Q, "v": Q}),
    "spatial_attention": (ops.spatial_attention, {"qkv": QKV, "num_heads": 1}),
    "group_norm_act": (ops.group_norm_act, {"x": X, "groups": 1, **CHANNELS}),
    "linear_rows": (ops.linear_rows, {"x": X[0], "weight": M[0], "bias": X[0, :, 0]}),
    "conv3x3": (ops.conv3x3, {"x": IMAGE, "weight": TAPS, "bias": X[0, :3, 0], "packed": ops.pack_conv3x3(TAPS)}),
    "pack_conv3x3": (ops.pack_conv3x3, {"weight": TAPS}),
    "quantile": (ops.quantile, {"x": X, "q": 0.5}),
    "dynamic_threshold": (ops.dynamic_threshold, {"x0": X}),
    "dynamic_threshold_out": (ops.dynamic_threshold_out, {"x0": X, **outs("out")}),
    "moments": (ops.moments, {"x": X}),
}
WITHOUT_OPERANDS = {"seeds", "bound_step", "bound_step_out"}
OPERANDS = [(call, name) for call, (_, given) in CALLS.items() for name in given if isinstance(given[name], Tensor)]


def not_operands(t: Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {"a list": t.tolist(), "an array": t.numpy(), "8 bits": t.float().to(torch.float8_e4m3fn)}
    found["no dimensions"] = torch.zeros((), dtype=t.dtype)
    found["sparse"] = (torch.zeros if t.dtype == torch.bool else torch.ones)(t.shape, dtype=t.dtype).to_sparse()
    if t.is_floating_point():
        found["quantised"] = torch.quantize_per_tensor(t.float().contiguous(), 0.1, 0, torch.qint8)
    return found


@pytest.mark.parametrize(("call", "name"), OPERANDS, ids=[f"{call}-{name}" for call, name in OPERANDS])
def test_what_is_no_operand_is_named(call: str, name: str) -> None:
    function, given = CALLS[call]
    function(**given)
    kind = str(inspect.signature(function).parameters[name].annotation)
    bad = not_operands(given[name]) | ({"none": None} if kind == "Tensor" else {})
    op = function.__name__.removesuffix("_out")
    for what, value in bad.items():
        if what == "no dimensions" and name == "index":
            continue  # one for all samples
        with pytest.raises((RuntimeError, ValueError)) as caught:
            function(**{**given, name: value})
        text = str(caught.value).splitlines()[0]
        assert text.startswith((f"diffkern.{op}: {name} must ", "seeds must ")), (what, text)
        assert "dtype number" not in text, what
        if what == "none":
            assert text.endswith(", got None")
        if what == "8 bits":
            assert text.endswith("got float8_e4m3fn")
        if what == "quantised":
            assert text.endswith("got qint8")


def test_every_op_is_here() -> None:
    assert {function.__name__ for function, _ in CALLS.values()} | WITHOUT_OPERANDS == set(ops.__all__)


@pytest.mark.parametrize("call", CALLS)
def test_a_lazily_negated_view_is_read_and_never_written(call: str) -> None:
    """torch._neg_view, which a complex tensor's .conj().imag is: the value that it shows is what counts."""
    function, given = CALLS[call]
    writes = [name for name in ("out", "target", "eps", "x0", "s", "next") if call.endswith("_out") and name in given]
    writes = [name for name in writes if not (name == "x0" and call in ("noising_out", "dynamic_threshold_out"))]
    read = {n: t for n, t in given.items() if isinstance(t, Tensor) and t.is_floating_point() and n not in writes}
    read = {n: t for n, t in read.items() if n not in ("table", "out")}
    fresh = lambda: {n: torch.zeros(SHAPE) for n in writes}  # noqa: E731
    want = function(**{**given, **fresh()})
    found = function(**{**given, **fresh(), **{n: torch._neg_view(-t) for n, t in read.items()}})
    for a, b in zip(*(r if isinstance(r, tuple) else (r,) for r in (want, found)), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    for name in [*writes, *(["out"] if call == "randn" else [])]:
        with pytest.raises(RuntimeError, match=rf"{name} must be written as it lies in memory, .*resolve_neg\(\)"):
            function(**{**given, **fresh(), name: torch._neg_view(torch.zeros(SHAPE))})


def test_a_complex_view_says_what_it_is() -> None:
    with pytest.raises(RuntimeError, match=r"diffkern\.noising: x0 must be float64, .*, got complex64"):
        ops.noising(X.to(torch.complex64).conj(), N, INDEX, seeds=S)
