"""Schemas: every op has a fake, a reference and a call here with all arguments distinct; opcheck over all of them.

The boxing layer of the stable ABI compares only the number of arguments, so an op whose C++ parameters stand in another
order than its schema would run and mix them up: these calls would notice.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import op_names
from helpers.attention_cases import FORMATS, LAYOUTS, inputs, qkv_of
from helpers.op_cases import EVERYTHING, ROWS, arrange, check_sentence, native_draws, same_bits, table, values
from helpers.suites import few
from helpers.winograd import packed_weight
from torch import Tensor

from diffkern import ops, reference
from diffkern.plan import COLUMNS, LEARNED_COLUMNS

SHAPE = (3, 2, 5, 4)
SEEDS = torch.tensor([11, -12, 13])
INDEX = torch.tensor([2, 0, 1])
TERMS = torch.tensor([7, 5, 2**50]), torch.tensor([0.5, -2.0, 0.3], dtype=torch.float64)
NOISING = torch.tensor([[0.9, 0.43, 0.31, -0.92], [0.2, 0.98, 0.77, -0.21], [0.5, 0.6, 0.7, 0.8]], dtype=torch.float64)
LOSS = torch.tensor([[0.31, -0.92, 1.5], [0.77, -0.21, 2.5], [0.7, 0.8, 3.5]], dtype=torch.float64)
VARIATIONAL = torch.tensor(
    [
        [0.3, -0.9, 0.7, 0.8, 3.0, 0.2, 0.1, 0.0, 0.004, 1.5, 0.5, 1.0],
        [0.1, 0.8, -0.6, 1.2, 0.0, 0.3, 0.15, 9.0, 0.005, 0.5, 0.25, 1.0],
        [0.0, 1.0, 0.5, math.inf, 2.0, 0.4, 0.05, 0.0, 0.006, 0.75, 0.7, 0.5],
    ],
    dtype=torch.float64,
)


def learned_table(*rows: dict[str, float]) -> Tensor:
    """A table for `learned_step` from named coefficients; clip is inf and k is 1 unless given."""
    lines = [[{"clip": math.inf, "k": 1.0, **row}.get(name, 0.0) for name in LEARNED_COLUMNS] for row in rows]
    return torch.tensor(lines, dtype=torch.float64)


STEP = table(ROWS["eps"], EVERYTHING, {**EVERYTHING, "a": 0.1, "e3": 2.0})
LEARNED = learned_table(
    {**{"p": 1.1, "q": -0.9, "clip": 1.5, "a": 0.6, "b": 0.4, "d": 0.3, "g": 0.5, "k": 0.8, "known_s": 0.9},
     **{"known_n": 0.43, "stream": 2.0**41 + 9, "known_stream": 2.0**40, "r0": -0.7, "r1": 0.3}},
    {**{"p": 1.2, "q": -0.8, "clip": 1.4, "a": 0.5, "b": 0.3, "d": 0.2, "g": 0.6, "k": 0.7, "known_s": 0.8},
     **{"known_n": 0.53, "stream": 2.0**41 + 7, "known_stream": 2.0**40, "r0": 0.6, "r1": -0.2}},
    {**{"p": 0.7, "q": 0.2, "a": 0.4, "b": 0.2, "d": 0.1, "k": 0.6, "known_s": 0.7, "known_n": 0.63},
     **{"stream": 5.0, "known_stream": 6.0, "r0": 0.5, "r1": 0.1}},
)  # fmt: skip
T = {name: values(SHAPE, k) for k, name in enumerate(("x", "m", "m2", "h0", "h1", "h2", "h3", "known", "noise"))}
MASK = values(SHAPE, 20).abs().clamp(max=1)
BOTH = torch.cat([T["m"], T["h1"]], 1)
LEARNED_INPUTS = (T["x"], BOTH, LEARNED, 1, INDEX, SEEDS, None, MASK, T["known"])
STEP_INPUTS = (*(T[n] for n in ("x", "m", "m2", "h0", "h1", "h2", "h3")), STEP, 1, None, SEEDS, None, MASK, T["known"])


def stepped(inputs: tuple[Any, ...], *results: Any) -> tuple[Any, ...]:
    """The arguments of a step's op from (x, m, m2, h0, h1, h2, h3, table, row, index, seeds, noise, mask, known)."""
    x, m, *others, rows, row, index, seeds, noise, mask, known = inputs
    return x, m, rows, row, *results, *others, index, seeds, noise, mask, known


LOGPROB = STEP.clone()
LOGPROB[:, COLUMNS.index("r")] = 0
LOGPROB_INPUTS = (T["known"], *STEP_INPUTS[:7], LOGPROB, 1, None, True)


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape or SHAPE, dtype=dtype)


Q, K, V, UP = (values((2, 3, n, 16), 40 + n) for n in (9, 7, 7, 9))
V = V.flip(2)
OUT, LSE = (t.float() for t in reference.attention(Q, K, V, 0.3))
QKV, UP_MAP = values((2, 96, 3, 4), 50), values((2, 32, 3, 4), 51)
OUT_MAP, LSE_MAP = (t.float() for t in reference.spatial_attention(QKV, 2, "legacy", 0.3))


def gradients(function: Callable[..., tuple[Tensor, Tensor]], up: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.double().requires_grad_() for t in tensors]
    return torch.autograd.grad(function(*leaves)[0], leaves, up.double())


def leaf(t: Tensor) -> Tensor:
    return t.clone().requires_grad_()


NORMED, NORMED_UP = values((2, 6, 5, 4), 60), values((2, 6, 5, 4), 61)
OF_CHANNELS = (values((1, 6), 62)[0], values((1, 6), 63)[0], *(values((2, 6), k) for k in (64, 65, 66)))


def normed(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor, add: Tensor) -> tuple[Tensor, ...]:
    groups = (x.double() + add[:, :, None, None]).reshape(2, 2, -1)
    rstd = (groups.var(2, unbiased=False) + 0.1).rsqrt()
    y = reference.group_norm_act(x, 2, weight, bias, scale=scale, shift=shift, add=add, eps=0.1)
    return y, groups.mean(2), rstd


NORMED_STATISTICS = tuple(t.float() for t in normed(NORMED, *OF_CHANNELS)[1:])


LINEAR = values((5, 7), 66), values((6, 7), 67), values((1, 6), 68)[0]
CONVOLVED = values((2, 3, 5, 4), 69), values((6, 3, 3, 3), 70), values((1, 6), 71)[0]


def step_reference() -> tuple[Tensor, ...]:
    x, m, m2, h0, h1, h2, h3, rows, row, index, seeds, noise, mask, known = STEP_INPUTS
    return reference.step(
        *(x, m, m2, h0, h1, h2, h3),
        **{"table": rows, "row": row, "index": index, "seeds": seeds, "noise": noise, "mask": mask, "known": known},
    )


def learned_reference() -> tuple[Tensor, ...]:
    x, m, rows, row, index, seeds, noise, mask, known = LEARNED_INPUTS
    given = {"table": rows, "row": row, "index": index, "seeds": seeds, "noise": noise, "mask": mask, "known": known}
    return reference.learned_step(x, m, **given)


def variational_reference() -> tuple[Tensor, ...]:
    pred = torch.cat([T["m"], T["h0"]], 1).requires_grad_()
    value, means = reference.variational(pred, T["x"] / 2, VARIATIONAL, INDEX, seeds=SEEDS, stream=5, reduction="sum")
    return value, means, torch.autograd.grad(value, pred)[0].double()


def logprob_reference() -> tuple[Tensor, ...]:
    after, x, m, m2, h0, h1, h2, h3, rows, row, index, _ = LOGPROB_INPUTS
    m, m2 = leaf(m), leaf(m2)
    value = reference.step_logprob(after, x, m, m2, h0, h1, h2, h3, table=rows, row=row, index=index)
    return value, *(t.double() for t in torch.autograd.grad(value.sum(), (m, m2)))


# What every public op is found in, by its name.
WHERE = {
    "benchmark case": ["benchmarks/*.py"],
    "check on the GPU": ["tests/gpu/*.py"],
}
# Op -> arguments that differ from each other in value, and the reference's answer in the order of the outputs.
CALLS: dict[str, tuple[tuple[Any, ...], Callable[[], tuple[Tensor, ...]]]] = {
    "randn": ((SHAPE, SEEDS, 5, torch.float64), lambda: (reference.randn(SHAPE, SEEDS, 5),)),
    "randn_out": ((SEEDS, 5, empty()), lambda: (reference.randn(SHAPE, SEEDS, 5),)),
    "noise_sum": ((SHAPE, SEEDS, *TERMS, torch.float64), lambda: (reference.noise_sum(SHAPE, SEEDS, *TERMS),)),
    "noise_sum_out": ((SEEDS, *TERMS, empty()), lambda: (reference.noise_sum(SHAPE, SEEDS, *TERMS),)),
    "noising": (
        (T["x"], NOISING, INDEX, SEEDS, 5, None, True, True),
        lambda: reference.noising(T["x"], NOISING, INDEX, seeds=SEEDS, stream=5),
    ),
    "noising_out": (
        (T["x"], NOISING, INDEX, None, 5, T["noise"], empty(), empty(), empty()),
        lambda: reference.noising(T["x"], NOISING, INDEX, noise=T["noise"]),
    ),
    "loss": (
        (T["m"], T["x"], LOSS, INDEX, SEEDS, 5, None, 2, False, True),
        lambda: (reference.loss(T["m"], T["x"], LOSS, INDEX, seeds=SEEDS, stream=5, reduction="sum"),),
    ),
    "variational": (
        (torch.cat([T["m"], T["h0"]], 1), T["x"] / 2, VARIATIONAL, INDEX, SEEDS, 5, None, 2, True),
        variational_reference,
    ),
    "quantile": ((T["x"], 0.7), lambda: (reference.quantile(T["x"], 0.7),)),
    "dynamic_threshold": ((T["x"], 0.9, 1.1), lambda: (reference.dynamic_threshold(T["x"], 0.9, 1.1),)),
    "dynamic_threshold_out": ((T["x"], 0.9, 1.1, empty()), lambda: (reference.dynamic_threshold(T["x"], 0.9, 1.1),)),
    "moments": ((T["x"],), lambda: (reference.moments(T["x"]),)),
    "group_norm_act": ((NORMED, 2, *OF_CHANNELS, 0.1, 1), lambda: normed(NORMED, *OF_CHANNELS)),
    "group_norm_act_grad": (
        (NORMED_UP, NORMED, *NORMED_STATISTICS, 2, *OF_CHANNELS, 1),
        lambda: gradients(lambda *t: normed(*t)[:1], NORMED_UP, NORMED, *OF_CHANNELS),
    ),
    "linear_rows": ((*LINEAR, 1), lambda: (reference.linear_rows(*LINEAR, act="silu"),)),
    "conv3x3": ((*CONVOLVED, None, 2), lambda: (reference.conv3x3(*CONVOLVED, upsample=True),)),
    "pack_conv3x3": ((CONVOLVED[1], 0), lambda: (packed_weight(CONVOLVED[1], "exact"),)),
    "attention": ((Q, K, V, 0.3), lambda: reference.attention(Q, K, V, 0.3)),
    "attention_grad": (
        (UP, Q, K, V, OUT, LSE, 0.3),
        lambda: gradients(lambda *t: reference.attention(*t, 0.3), UP, Q, K, V),
    ),
    "spatial_attention": ((QKV, 2, 1, 0.3), lambda: reference.spatial_attention(QKV, 2, "legacy", 0.3)),
    "spatial_attention_grad": (
        (UP_MAP, QKV, OUT_MAP, LSE_MAP, 2, 1, 0.3),
        lambda: gradients(lambda t: reference.spatial_attention(t, 2, "legacy", 0.3), UP_MAP, QKV),
    ),
    "step": (stepped(STEP_INPUTS, True, True, 1, torch.float64), step_reference),
    "step_ad": (stepped(STEP_INPUTS, True, True, 1, torch.float64), step_reference),
    "learned_step": ((*LEARNED_INPUTS, True, 1, torch.float64), learned_reference),
    "learned_step_out": ((*LEARNED_INPUTS, empty(), empty(), empty(dtype=torch.float64)), learned_reference),
    "step_logprob": (LOGPROB_INPUTS, logprob_reference),
    "step_out": (stepped(STEP_INPUTS, empty(), empty(), empty(), empty(dtype=torch.float64)), step_reference),
}


DIFFERENTIABLE = (
    "noising",
    "loss",
    "variational",
    "step_ad",
    "step_logprob",
    "attention",
    "spatial_attention",
    "group_norm_act",
    "linear_rows",
    "conv3x3",
)
OPS = op_names.registered()


def test_every_op_has_a_call() -> None:
    """From which its test against the reference, its opcheck and its test of bad input are made."""
    assert set(OPS) == set(CALLS)


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_its_parts(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"diffkern::{name}", "CPU")
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"diffkern::{name}", "Meta"), "no fake"
    base = op_names.base_of(name)
    assert base in reference.__all__, "no reference"
    assert base in ops.__all__, "no typed function"
    differentiable = torch._C._dispatch_has_kernel_for_dispatch_key(f"diffkern::{name}", "Autograd")
    assert differentiable == (name in DIFFERENTIABLE)
    assert op_names.schema(name).is_mutable == name.endswith("_out")


@pytest.mark.parametrize("what", WHERE)
@pytest.mark.parametrize("name", op_names.public())
def test_every_op_is_named_where_all_are_measured_and_compared(root: Path, name: str, what: str) -> None:
    if what == "check on the GPU" and name in op_names.CPU_ALONE:
        return
    sources = [path.read_text() for pattern in WHERE[what] for path in root.glob(pattern)]
    assert sources
    assert any(re.search(rf"\b{name}(_out)?\b", source) for source in sources), f"no {what} for {name}: {WHERE[what]}"


@pytest.mark.parametrize("name", OPS)
def test_call_with_all_arguments_distinct(name: str) -> None:
    arguments, expected = CALLS[name]
    arguments = tuple(a.clone() if isinstance(a, Tensor) else a for a in arguments)
    schema = op_names.schema(name)
    assert len(arguments) == len(schema.arguments)
    returned = getattr(torch.ops.diffkern, name)(*arguments)
    if name.endswith("_out"):
        outs = [a for a, s in zip(arguments, schema.arguments, strict=True) if s.alias_info and s.alias_info.is_write]
    else:
        outs = [t for t in (returned if isinstance(returned, tuple) else (returned,)) if t is not None]
    answers = expected()
    assert len(outs) == len(answers)
    for got, answer in zip(outs, answers, strict=True):
        torch.testing.assert_close(got.double(), answer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_a_tensor_of_a_dtype_that_no_op_takes_is_refused_by_its_name(name: str) -> None:
    arguments, _ = CALLS[name]
    for i, (value, argument) in enumerate(zip(arguments, op_names.schema(name).arguments, strict=True)):
        if not isinstance(value, Tensor):
            continue
        wrong = (*arguments[:i], value.to(torch.complex64), *arguments[i + 1 :])
        sentence = rf"^diffkern\.(pack_)?{op_names.base_of(name)}(_grad)?: .*\b{argument.name}\b.*complex64"
        check_sentence(lambda wrong=wrong: getattr(torch.ops.diffkern, name)(*wrong), sentence)


def test_what_a_call_of_randn_leaves_out_is_stream_0_and_float32() -> None:
    alone, all_of_it = (torch.ops.diffkern.randn(SHAPE, SEEDS, *more) for more in ((), (0, torch.float32)))
    assert same_bits(alone, all_of_it)
    assert same_bits(torch.vmap(lambda s: ops.randn((1, *SHAPE[1:]), s[None]))(SEEDS)[:, 0], alone)
    for stream in (0.0, None, ""):
        with pytest.raises(RuntimeError, match="stream"):
            ops.randn(SHAPE, SEEDS, stream)  # type: ignore[arg-type]


def test_step_ad_is_step() -> None:
    a, b = torch.ops.diffkern.step(*CALLS["step"][0]), torch.ops.diffkern.step_ad(*CALLS["step_ad"][0])
    assert all(same_bits(p, q) for p, q in zip(a, b, strict=True))


# ----------------------------------------------------------------------------------------------------------- opcheck
def opcheck_samples() -> dict[str, tuple[str, tuple[Any, ...]]]:
    """Several calls of each op: with and without optional arguments, gradients, layouts and dtypes."""
    samples = {name: (name, arguments) for name, (arguments, _) in CALLS.items()}
    none = [None] * 6
    for layout in ("channels_last", "permuted", "sliced", "expanded"):
        x, m = arrange(T["x"], layout), arrange(T["m"], layout)
        samples[f"noising {layout}"] = ("noising", (x, NOISING, INDEX, SEEDS, 5, None, True, False))
        samples[f"loss {layout}"] = ("loss", (m, x, LOSS, INDEX, SEEDS, 5, None, 0, True))
        both = torch.cat([m, m]).to(torch.bfloat16)
        samples[f"step {layout}"] = ("step", (x, both, table(ROWS["eps guided"]), 0, True, True, 2, None))
        samples[f"quantile {layout}"] = ("quantile", (x.bfloat16(), 0.5))
        samples[f"dynamic_threshold {layout}"] = ("dynamic_threshold", (x.half(), 0.995, math.inf))
        out = arrange(empty(), layout.replace("expanded", "permuted"))
        samples[f"dynamic_threshold_out {layout}"] = ("dynamic_threshold_out", (x, 0.995, 2.0, out))
        samples[f"moments {layout}"] = ("moments", (x.double(),))
    samples["noising gradient"] = ("noising", (leaf(T["x"]), NOISING, INDEX, None, 0, leaf(T["noise"]), True, True))
    samples["noising one row"] = ("noising", (T["x"].half(), NOISING[:1], None, SEEDS, 0, None, False, False))
    for reduction in range(3):
        arguments = (leaf(T["m"]), leaf(T["x"]), LOSS, None, None, 0, leaf(T["noise"]), reduction, True)
        samples[f"loss gradient {reduction}"] = ("loss", arguments)
    for wide in (False, True):
        arguments = (leaf(T["m"].bfloat16()), T["x"], LOSS, INDEX, SEEDS, 0, None, 1, True, wide)
        samples[f"loss bfloat16 {wide}"] = ("loss", arguments)
    pred = torch.cat([T["m"], T["h0"]], 1)
    for name, made in (("gradient", leaf(pred)), ("bfloat16", pred.bfloat16()), ("sliced", arrange(pred, "sliced"))):
        arguments = (made, T["x"], VARIATIONAL, INDEX, None, 0, T["noise"], 1, True)
        samples[f"variational {name}"] = ("variational", arguments)
    fixed = VARIATIONAL.clone()
    fixed[:, 6] = 0
    samples["variational fixed"] = ("variational", (leaf(T["m"]), T["x"], fixed, INDEX, SEEDS, 0, None, 0, True))
    given = [leaf(t) if isinstance(t, Tensor) and t is not STEP and t.is_floating_point() else t for t in STEP_INPUTS]
    given[12] = MASK
    samples["step_ad gradient"] = ("step_ad", stepped(tuple(given), True, True, 2, None))
    samples["step_ad few"] = ("step_ad", (leaf(T["x"]), leaf(T["m"]), table(ROWS["eps"]), 0))
    after, x, m, m2, *rest = LOGPROB_INPUTS
    samples["step_logprob gradient"] = ("step_logprob", (after, x, leaf(m), leaf(m2), *rest))
    both = leaf(torch.cat([m, m2]).half())
    samples["step_logprob doubled"] = ("step_logprob", (after, x, both, None, *rest[:6], INDEX, True))
    few = (arrange(after, "sliced"), arrange(x, "permuted"), m, *none[:5], table(ROWS["eps noise"]), 0, None, False)
    samples["step_logprob few"] = ("step_logprob", few)
    learned = torch.cat([table(ROWS["x0 clip noise"], ROWS["euler"]), torch.tensor([[-0.5, 0.4]] * 2).double()], 1)
    for layout in ("contiguous", "channels_last", "sliced"):
        wide = leaf(arrange(torch.cat([m, m2], 1), layout))
        given = (arrange(after, layout), arrange(x, layout), wide, *none[:5], learned, 0, INDEX % 2, True)
        samples[f"step_logprob learned {layout}"] = ("step_logprob", given)
    index = (T["x"], T["m"], T["m2"], *none[:4], table(ROWS["eps"], ROWS["eps noise"]), 0, INDEX % 2, SEEDS, *none[:3])
    samples["step index"] = ("step", stepped(index, False, False, 0, None))
    samples["step_out few"] = ("step_out", stepped(STEP_INPUTS, empty(), None, None, None))
    for layout in ("channels_last", "permuted", "sliced"):
        x, m = arrange(T["x"], layout), arrange(BOTH, layout).to(torch.bfloat16)
        arguments = (x, m, LEARNED, 1, None, None, T["noise"], None, None, layout == "sliced", 2, None)
        samples[f"learned_step {layout}"] = ("learned_step", arguments)
    plain = torch.zeros(1, 23, dtype=torch.float64).index_fill_(1, torch.tensor([4, 5]), 0.5)  # clip and a
    samples["learned_step without m"] = ("learned_step", (T["x"], None, plain, 0, *none[:5], True, 1, None))
    samples["learned_step_out few"] = ("learned_step_out", (*LEARNED_INPUTS, empty(), None, None))
    samples["noising_out few"] = ("noising_out", (T["x"], NOISING, INDEX, SEEDS, 0, None, empty(), None, None))
    samples["randn_out bfloat16"] = ("randn_out", (SEEDS, 0, arrange(empty(dtype=torch.bfloat16), "channels_last")))
    for layout in LAYOUTS:
        q, k, v = inputs((2, 3, 9, 7, 16), torch.float16, (layout, "bnhd", layout))
        samples[f"attention {layout}"] = ("attention", (q, k, v, 0.25))
        samples[f"attention_grad {layout}"] = ("attention_grad", (q, q, k, v, q, LSE, 0.25))
    samples["attention expanded"] = ("attention", (*inputs((2, 3, 9, 7, 16), layouts=("expanded batch",) * 3), 0.25))
    samples["attention one token"] = ("attention", (*inputs((1, 1, 1, 1, 8), layouts=("bhdn",) * 3), 0.25))
    samples["attention gradient"] = ("attention", (leaf(Q), leaf(K), leaf(V), 0.25))
    samples["attention gradient of k"] = ("attention", (Q.double(), leaf(K.double()), V.double(), 0.25))
    for form in FORMATS:
        x, up = qkv_of((2, 96, 3, 4), torch.bfloat16, form), values((2, 32, 3, 4), 5, torch.bfloat16)
        samples[f"spatial {form}"] = ("spatial_attention", (x, 2, 0, 0.25))
        samples[f"spatial gradient {form}"] = ("spatial_attention", (leaf(x.float()), 2, 1, 0.25))
        samples[f"spatial_grad {form}"] = ("spatial_attention_grad", (up, x, up, LSE_MAP, 2, 0, 0.25))
    samples["spatial edm"] = ("spatial_attention", (leaf(qkv_of((2, 96, 3, 2, 2))), 2, 2, 0.25))
    samples["spatial one position"] = ("spatial_attention", (qkv_of((2, 96, 1, 1), form="channels_last"), 2, 1, 0.25))
    for layout in ("contiguous", "channels_last", "permuted", "sliced", "expanded"):
        x, up = arrange(NORMED, layout), NORMED_UP.bfloat16()
        samples[f"group_norm_act {layout}"] = ("group_norm_act", (x.half(), 2, None, None, *OF_CHANNELS[2:], 0.0, 0))
        samples[f"group_norm_act gradient {layout}"] = ("group_norm_act", (leaf(x), 2, *map(leaf, OF_CHANNELS), 0.1, 1))
        given = (up, x.bfloat16(), *NORMED_STATISTICS, 2, OF_CHANNELS[0], None, None, None, None, 1)
        samples[f"group_norm_act_grad {layout}"] = ("group_norm_act_grad", given)
    samples["group_norm_act empty"] = ("group_norm_act", (NORMED[:0], 3, *[None] * 5, 0.1, 1))
    x, weight, bias = LINEAR
    samples["linear_rows gradient"] = ("linear_rows", (leaf(x), leaf(weight), leaf(bias), 1))
    samples["linear_rows of other strides"] = (
        "linear_rows",
        (leaf(x.t().contiguous().t()), weight.t().contiguous().t(), None, 0),
    )
    samples["linear_rows empty"] = ("linear_rows", (x[:0].half(), weight.half(), None, 1))
    x, weight, bias = CONVOLVED
    for form in range(3):
        packed = torch.ops.diffkern.pack_conv3x3(weight, form)
        samples[f"conv3x3 gradient {form}"] = ("conv3x3", (leaf(x), leaf(weight), leaf(bias), None, form))
        samples[f"conv3x3 packed {form}"] = ("conv3x3", (arrange(x, "permuted"), weight, None, packed, form))
        samples[f"conv3x3 empty {form}"] = ("conv3x3", (x[..., :0], weight, None, None, form))
        samples[f"pack_conv3x3 {form}"] = ("pack_conv3x3", (arrange(weight, "sliced"), form))
    samples["noise_sum_out permuted"] = ("noise_sum_out", (SEEDS, *TERMS, arrange(empty(), "permuted")))
    samples["noise_sum empty"] = ("noise_sum", ((0, 3), SEEDS[:0], *(t[:0] for t in TERMS), torch.bfloat16))
    samples["quantile empty"] = ("quantile", (T["x"][:0], 0.5))
    samples["moments empty"] = ("moments", (T["x"][:0],))
    samples["randn empty"] = ("randn", ((0, 3), SEEDS[:0], 0, torch.float32))
    return samples


SAMPLES = opcheck_samples()


# One call of every op; the layouts, dtypes and missing arguments of each are in `full`.
@pytest.mark.parametrize("sample", few(SAMPLES, *CALLS))
def test_opcheck(sample: str) -> None:
    name, arguments = SAMPLES[sample]
    torch.library.opcheck(getattr(torch.ops.diffkern, name).default, arguments)


def test_reference_uses_the_same_draws() -> None:
    with native_draws():
        exact = reference.noising(T["x"], NOISING, INDEX, seeds=SEEDS, stream=5)[2]
    assert torch.equal(exact, ops.randn(SHAPE, SEEDS, 5, dtype=torch.float64))
