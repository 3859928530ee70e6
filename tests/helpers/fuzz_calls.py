"""Valid calls of every op, drawn by hypothesis: any shape, layout, dtype, source of noise and form of a row.

A `Call` has the arguments by name, what the float64 reference answers, and how large the terms are that it adds up: an
error is measured by those, as a sum may cancel.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from diffkern import ops, reference
from diffkern.plan import COLUMNS, LEARNED_COLUMNS
from helpers.op_cases import LAYOUTS, arrange, table

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
COEFFICIENTS = [0.0, -0.0, 1.0, -1.0, 0.5, -0.75, 2.5, 1e-3, -30.0]
STREAMS = [0, 1, 5, 2**32 - 1, 2**40, 2**53 - 1]
SEEDS = [0, 1, -1, 2**63 - 1, -(2**63), 12345]


@dataclass
class Call:
    op: str
    given: dict[str, Any]
    expected: Callable[[], tuple[Tensor | None, ...]]
    """The results in order, in float64; None: not compared."""
    scale: float
    """Of the terms, in units of which the arithmetic may round."""
    inner: float = 0.0
    """Of values that are rounded to the tensors' dtype on the way."""
    outs: dict[str, tuple[tuple[int, ...], torch.dtype]] = field(default_factory=dict)
    """Of an op that writes into given tensors: their shapes and dtypes, in the order of ``expected``."""


@st.composite
def shapes(draw: st.DrawFn, least: int = 1, most: int = 5, channels: int | None = None, empty: bool = False) -> Any:
    """[B, ...] of at most some thousand elements; sometimes across the border of a block of 1024."""
    dims = draw(st.integers(least, most))
    batch = draw(st.integers(0 if empty else 1, 3))
    if dims == 2 and channels is None and draw(st.booleans()):
        return batch, draw(st.sampled_from([1, 63, 64, 1023, 1024, 1025, 2049]))
    inner = [draw(st.sampled_from([1, 2, 3, 5, 8, 17, *([0] if empty else [])])) for _ in range(dims - 1)]
    while math.prod(inner) > 3000:
        inner[inner.index(max(inner))] = 2
    if channels is not None:
        inner[0] = channels
    return batch, *inner


@st.composite
def tensors(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, size: float = 1.5) -> Tensor:
    """Numbers up to ``size`` in any layout, sometimes all zero."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    values = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 * size - size
    if draw(st.integers(0, 15)) == 0:
        values = torch.zeros(shape, dtype=torch.float64)
    return arrange(values.to(dtype), draw(st.sampled_from(LAYOUTS)))


@st.composite
def seeds(draw: st.DrawFn, batch: int) -> Tensor:
    return torch.tensor([draw(st.sampled_from(SEEDS)) for _ in range(batch)], dtype=torch.int64)


@st.composite
def indices(draw: st.DrawFn, batch: int, rows: int) -> Tensor:
    """The row of each sample, or one for all, in either dtype."""
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    if draw(st.booleans()):
        return torch.tensor(draw(st.integers(0, rows - 1)), dtype=dtype)
    return torch.tensor([draw(st.integers(0, rows - 1)) for _ in range(batch)], dtype=dtype)


@st.composite
def source(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    """The noise of training: an address or a tensor."""
    if draw(st.booleans()):
        return {"noise": draw(tensors(shape, dtype))}
    return {"seeds": draw(seeds(shape[0])), "stream": draw(st.sampled_from(STREAMS))}


def coefficient(draw: st.DrawFn) -> float:
    return draw(st.sampled_from(COEFFICIENTS))


@st.composite
def rows_of(draw: st.DrawFn, width: int, batch: int) -> tuple[Tensor, Tensor | None]:
    """A table and the index into it."""
    count = draw(st.sampled_from([1, 2, 4, max(batch, 1)]))
    rows = torch.tensor([[coefficient(draw) for _ in range(width)] for _ in range(count)], dtype=torch.float64)
    return rows, None if count in (1, batch) and draw(st.booleans()) else draw(indices(batch, count))


# ------------------------------------------------------------------------------------------------- noise and training
@st.composite
def seeds_calls(draw: st.DrawFn) -> Call:
    s, n, first = draw(st.integers(-(2**63), 2**64 - 1)), draw(st.integers(0, 5)), draw(st.integers(0, 2**62))

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        return z ^ (z >> 31)

    def expected() -> tuple[Tensor]:
        job = mix((s + 0x9E3779B97F4A7C15) % 2**64)
        found = [mix(job ^ mix((j + 0xD1B54A32D192ED03) % 2**64)) for j in range(first, first + n)]
        return (torch.tensor([v - 2**64 if v >= 2**63 else v for v in found], dtype=torch.int64),)

    return Call("seeds", {"s": s, "n": n, "first": first}, expected, 0.0)


@st.composite
def randn_calls(draw: st.DrawFn) -> Call:
    shape, dtype = draw(shapes(empty=True)), draw(st.sampled_from(DTYPES))
    given = {"shape": shape, "seeds": draw(seeds(shape[0])), "stream": draw(st.sampled_from(STREAMS)), "dtype": dtype}
    return Call("randn", given, lambda: (reference.randn(shape, given["seeds"], given["stream"]),), 6.0)


@st.composite
def noise_sum_calls(draw: st.DrawFn, out: bool = False) -> Call:
    shape, dtype, n = draw(shapes(empty=True)), draw(st.sampled_from(DTYPES)), draw(st.integers(0, 4))
    streams = torch.tensor([draw(st.sampled_from(STREAMS)) for _ in range(n)], dtype=torch.int64)
    weights = torch.tensor([coefficient(draw) for _ in range(n)], dtype=torch.float64)
    given = {"seeds": draw(seeds(shape[0])), "streams": streams, "weights": weights}
    more, outs = ({}, {"out": (shape, dtype)}) if out else ({"size": shape, "dtype": dtype}, {})
    scale = 6.0 * (1 + float(weights.abs().sum()))
    answer = lambda: (reference.noise_sum(shape, *given.values()),)  # noqa: E731
    return Call("noise_sum_out" if out else "noise_sum", {**given, **more}, answer, scale, outs=outs)


@st.composite
def noising_calls(draw: st.DrawFn, out: bool = False) -> Call:
    shape, dtype = draw(shapes()), draw(st.sampled_from(DTYPES))
    rows, index = draw(rows_of(4, shape[0]))
    common = {"x0": draw(tensors(shape, dtype)), "table": rows, "index": index, **draw(source(shape, dtype))}
    wants = [draw(st.booleans()) for _ in range(2)]
    names = ["out", *(name for name, want in zip(("target", "eps"), wants, strict=True) if want)]

    def expected() -> tuple[Tensor | None, ...]:
        found = dict(zip(("out", "target", "eps"), reference.noising(**common), strict=True))
        return tuple(found[name] for name in names) if out else tuple(found[n] if n in names else None for n in found)

    outs = dict.fromkeys(names, (shape, dtype)) if out else {}
    more = {} if out else {"want_target": wants[0], "want_eps": wants[1]}
    return Call("noising_out" if out else "noising", {**common, **more}, expected, 8.0 * 62, outs=outs)


@st.composite
def loss_calls(draw: st.DrawFn) -> Call:
    shape, dtype = draw(shapes()), draw(st.sampled_from(DTYPES))
    rows, index = draw(rows_of(3, shape[0]))
    pred = draw(tensors(shape, draw(st.sampled_from(DTYPES))))
    reduction = draw(st.sampled_from(["none", "mean", "sum"]))
    given = {"pred": pred, "x0": draw(tensors(shape, dtype)), "table": rows, "index": index, "reduction": reduction}
    given.update(draw(source(shape, dtype)))
    rows_size = rows[:, :2].abs().sum(1).max().item()
    scale = shape[0] * (1.5 + 6 * rows_size) ** 2 * float(rows[:, 2].abs().max())
    return Call("loss", given, lambda: (reference.loss(**given),), scale)


@st.composite
def variational_calls(draw: st.DrawFn) -> Call:
    shape = draw(shapes(least=2))
    dtype, learned = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    number = st.floats(-1, 1, width=32)
    rows = []
    for _ in range(2):
        u, v, q, w = (draw(number) for _ in range(4))
        decodes = draw(st.booleans())
        rows.append([
            *(u, v, q, draw(st.sampled_from([0.5, 1.0, math.inf])), draw(st.sampled_from([0.0, 1.0, 3.0]))),
            *(0.3 * w, 0.2 if learned else 0.0, 8.0 if decodes else 0.0, ops.HALF_BIN),
            *(draw(st.sampled_from([0.0, 1.0])), draw(st.sampled_from([0.0, 0.5])), draw(st.sampled_from([0.0, 1.0]))),
        ])  # fmt: skip
    pred = draw(tensors((shape[0], (2 if learned else 1) * shape[1], *shape[2:]), dtype, 1.0))
    given = {"pred": pred, "x0": draw(tensors(shape, dtype, 1.0)), "table": torch.tensor(rows, dtype=torch.float64)}
    given.update(index=draw(indices(shape[0], 2)), reduction=draw(st.sampled_from(["none", "mean", "sum"])))
    given.update(draw(source(shape, dtype)))
    return Call("variational", given, lambda: reference.variational(**given), 4000.0 * shape[0])


# --------------------------------------------------------------------------------------------------------- the step
READS = {"x": ("p", "a", "A"), "m": ("w", "q", "d", "D"), "noise": ("r", "g")}


@st.composite
def step_rows(draw: st.DrawFn, names: tuple[str, ...]) -> dict[str, float]:
    row = {name: coefficient(draw) for name in names if draw(st.booleans())}
    row["clip"] = draw(st.sampled_from([math.inf, math.inf, 1.0, 0.25]))
    row["k"] = draw(st.sampled_from([1.0, 0.5, -2.0, 0.0]))
    row.update(stream=draw(st.sampled_from(STREAMS)), known_stream=draw(st.sampled_from(STREAMS)))
    if draw(st.booleans()):
        row.update(known_s=coefficient(draw), known_n=coefficient(draw))
    return row


def size_of(rows: list[dict[str, float]]) -> float:
    """How large the terms of a step can be: noise up to 6, other operands up to 1.5."""
    most = 0.0
    for row in rows:
        c = {name: abs(row.get(name, 0.0)) for name in COLUMNS}
        m = 1.5 + c["w"] * 3
        x0 = c["p"] * 1.5 + c["q"] * m + c["r"] * 6
        new = c["a"] * 1.5 + c["b"] * x0 + c["d"] * m + 6 * c["g"] + 1.5 * sum(c[f"e{k}"] for k in range(4))
        s = c["A"] * 1.5 + c["B"] * x0 + c["D"] * m
        known = c["known_s"] * 1.5 + c["known_n"] * 6
        most = max(most, x0, s, (new + known) * max(1.0, c["k"]))
    return most


@st.composite
def masks(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    if draw(st.booleans()):
        return (values > 0).to(draw(st.sampled_from([torch.bool, torch.uint8])))
    return (values / 2).to(dtype)


@st.composite
def step_calls(draw: st.DrawFn, op: str = "step", masked: bool | None = None) -> Call:
    """`step`, `step_out`, `learned_step` and `learned_step_out`."""
    out, learned = op.endswith("_out"), op.startswith("learned")
    shape = draw(shapes(least=2 if learned else 1))
    state, model = draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    names = ("p", "q", "a", "b", "d", "g") if learned else COLUMNS[:17]
    rows = [draw(step_rows(tuple(n for n in names if n not in ("clip", "k")))) for _ in range(draw(st.integers(1, 2)))]
    if learned:
        for row in rows:
            row.update(r0=draw(st.sampled_from([0.0, -1.0, 0.5])), r1=draw(st.sampled_from([0.0, 0.3])))
    width = LEARNED_COLUMNS if learned else COLUMNS
    lines = [[{"clip": math.inf, "k": 1.0, **row}.get(name, 0.0) for name in width] for row in rows]
    reads = {name for row in rows for name, value in row.items() if value != 0}
    given: dict[str, Any] = {"table": torch.tensor(lines, dtype=torch.float64)}
    given["x"] = draw(tensors(shape, state))
    given["m"] = None
    if reads & set(READS["m"]) or learned:
        first, second = (draw(tensors(shape, model)) for _ in range(2))
        if learned:
            given["m"] = arrange(torch.cat([first, second], 1), draw(st.sampled_from(LAYOUTS)))
        elif "w" in reads and draw(st.booleans()):
            given["m"] = torch.cat([first, second])
        else:
            given.update(m=first, **({"m2": second} if "w" in reads else {}))
    for k in range(0 if learned else 4):
        if f"e{k}" in reads:
            given[f"h{k}"] = draw(tensors(shape, state))
    masked = draw(st.booleans()) if masked is None else masked
    if masked:
        given["mask"] = draw(masks(shape, state))
        given["known"] = draw(tensors(shape, state))
    by_tensor = draw(st.booleans())
    if by_tensor and reads & {"r", "g"}:
        given["noise"] = draw(tensors(shape, state))
    if (reads & {"r", "g"} and not by_tensor) or (masked and "known_n" in reads):
        given["seeds"] = draw(seeds(shape[0]))
    if draw(st.booleans()):
        given["index"] = draw(indices(shape[0], len(rows)))
    else:
        given["row"] = draw(st.integers(0, len(rows) - 1))
    wants = ["out", *(n for n in (("x0", "next") if learned else ("x0", "s", "next")) if draw(st.booleans()))]
    order = ("out", "x0", "next") if learned else ("out", "x0", "s", "next")
    arguments = dict(given)

    def expected() -> tuple[Tensor | None, ...]:
        function = reference.learned_step if learned else reference.step
        found = dict(zip(order, function(**arguments), strict=True))
        return tuple(found[n] for n in wants) if out else tuple(found[n] if n in wants else None for n in order)

    following = draw(st.sampled_from(DTYPES))
    if out:
        outs = {name: (shape, following if name == "next" else state) for name in wants}
        return Call(op, given, expected, 2 * size_of(rows), outs=outs)
    given.update(want_x0="x0" in wants, next_copies=int("next" in wants), next_dtype=following)
    if not learned:
        given["want_s"] = "s" in wants
    return Call(op, given, expected, 2 * size_of(rows))


@st.composite
def logprob_calls(draw: st.DrawFn) -> Call:
    shape, state, model = draw(shapes()), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))
    row = {name: coefficient(draw) for name in ("p", "q", "a", "b", "d", "e0")}
    row.update(g=draw(st.sampled_from([0.0, 0.5, -1.0, 3.0])), clip=draw(st.sampled_from([1.0, math.inf])))
    given = {name: draw(tensors(shape, state)) for name in ("after", "x", "h0")}
    given.update(m=draw(tensors(shape, model)), table=table(row))
    size = size_of([row]) + 1.5
    scale = math.prod(shape[1:]) * (5.0 + (size / max(abs(row["g"]), 0.5)) ** 2)
    return Call("step_logprob", given, lambda: (reference.step_logprob(**given),), scale)


# ------------------------------------------------------------------------------------------- statistics and attention
@st.composite
def quantile_calls(draw: st.DrawFn) -> Call:
    shape, dtype = draw(shapes()), draw(st.sampled_from(DTYPES))
    given = {"x": draw(tensors(shape, dtype)), "q": draw(st.sampled_from([0.0, 1.0, 0.5, 0.995, 1e-9]))}
    return Call("quantile", given, lambda: (reference.quantile(**given),), 3.0)


@st.composite
def threshold_calls(draw: st.DrawFn, out: bool = False) -> Call:
    shape, dtype = draw(shapes()), draw(st.sampled_from(DTYPES))
    given = {"x0": draw(tensors(shape, dtype, 4.0)), "q": draw(st.sampled_from([0.0, 1.0, 0.5, 0.995]))}
    given["maximum"] = draw(st.sampled_from([1.0, 2.0, math.inf]))
    outs = {"out": (shape, dtype)} if out else {}
    name = "dynamic_threshold_out" if out else "dynamic_threshold"
    return Call(name, given, lambda: (reference.dynamic_threshold(**given),), 8.0, outs=outs)


@st.composite
def moments_calls(draw: st.DrawFn) -> Call:
    shape, dtype = draw(shapes()), draw(st.sampled_from(DTYPES))
    given = {"x": draw(tensors(shape, dtype))}
    return Call("moments", given, lambda: (reference.moments(**given),), 4.0)


@st.composite
def group_norm_calls(draw: st.DrawFn) -> Call:
    dtype, width, groups = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    positions = draw(st.sampled_from([(8,), (67,), (4, 5), (33, 34), (3, 4, 2)]))
    shape = (draw(st.integers(1, 3)), width * groups, *positions)
    given: dict[str, Any] = {"x": draw(tensors(shape, dtype)), "groups": groups}
    sizes = dict.fromkeys(("weight", "bias"), shape[1:2]) | dict.fromkeys(("scale", "shift", "add"), shape[:2])
    for name, size in sizes.items():
        given[name] = draw(tensors(size, draw(st.sampled_from(DTYPES)))) if draw(st.booleans()) else None
    given |= {"eps": draw(st.sampled_from([1e-5, 0.5])), "act": draw(st.sampled_from(["silu", None]))}
    return Call("group_norm_act", given, lambda: (reference.group_norm_act(**given),), 64.0, 1.5)


@st.composite
def linear_rows_calls(draw: st.DrawFn) -> Call:
    dtype, inputs = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1, 5, 16, 67, 530]))
    leading = draw(st.sampled_from([(1,), (4,), (25,), (2, 3), (3, 1, 2)]))
    outputs = draw(st.sampled_from([1, 3, 8, 21]))
    given: dict[str, Any] = {"x": draw(tensors((*leading, inputs), dtype))}
    given["weight"] = draw(tensors((outputs, inputs), dtype))
    given["bias"] = draw(tensors((outputs,), dtype)) if draw(st.booleans()) else None
    given["act"] = draw(st.sampled_from(["silu", None]))
    return Call("linear_rows", given, lambda: (reference.linear_rows(**given),), 2.25 * inputs + 1.5)


@st.composite
def attention_calls(draw: st.DrawFn) -> Call:
    dtype, dim = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([8, 16, 24, 64, 512]))
    batch, heads, queries, keys = (draw(st.integers(1, most)) for most in (2, 3, 40, 70))
    q, k, v = (draw(tensors((batch, heads, n, dim), dtype)) for n in (queries, keys, keys))
    q, k, v = (t.contiguous() if 1 not in (t.stride(2), t.stride(3)) else t for t in (q, k, v))
    scale = draw(st.sampled_from([None, 0.1, 0.0, -0.2]))
    given = {"q": q, "k": k, "v": v, "scale": scale}
    return Call("attention", given, lambda: reference.attention(**given)[:1], 32.0, 1.5)


@st.composite
def spatial_calls(draw: st.DrawFn) -> Call:
    dtype, dim, heads = (draw(st.sampled_from(c)) for c in (DTYPES, [8, 16, 64], [1, 2, 3]))
    positions = draw(st.sampled_from([(1,), (5,), (3, 4), (1, 7), (2, 3, 2)]))
    order = draw(st.sampled_from(["new", "legacy", "edm"]))
    qkv = draw(tensors((draw(st.integers(1, 2)), 3 * heads * dim, *positions), dtype)).contiguous()
    if order != "edm" and draw(st.booleans()):
        qkv = arrange(qkv, "channels_last")
    given = {"qkv": qkv, "num_heads": heads, "order": order, "scale": draw(st.sampled_from([None, 0.1]))}
    return Call("spatial_attention", given, lambda: reference.spatial_attention(**given)[:1], 32.0, 1.5)


CALLS: dict[str, st.SearchStrategy[Call]] = {
    "seeds": seeds_calls(),
    "randn": randn_calls(),
    "noise_sum": noise_sum_calls(),
    "noise_sum_out": noise_sum_calls(out=True),
    "noising": noising_calls(),
    "noising_out": noising_calls(out=True),
    "loss": loss_calls(),
    "variational": variational_calls(),
    "step": step_calls(),
    "step_out": step_calls("step_out"),
    "bound_step": step_calls(masked=False),  # it takes no mask
    "bound_step_out": step_calls("step_out"),
    "learned_step": step_calls("learned_step"),
    "learned_step_out": step_calls("learned_step_out"),
    "step_logprob": logprob_calls(),
    "quantile": quantile_calls(),
    "dynamic_threshold": threshold_calls(),
    "dynamic_threshold_out": threshold_calls(out=True),
    "moments": moments_calls(),
    "group_norm_act": group_norm_calls(),
    "linear_rows": linear_rows_calls(),
    "attention": attention_calls(),
    "spatial_attention": spatial_calls(),
}


def run(name: str, given: dict[str, Any], outs: dict[str, Tensor]) -> list[Tensor | None]:
    """The results, in the order of what is expected."""
    given = {**given, **outs}
    if name.startswith("bound_step"):
        rows, operands = given.pop("table"), {"x": given.pop("x", None), "m": given.pop("m", None)}
        operands["row"] = given.pop("row", 0)
        if name == "bound_step_out":
            ops.bound_step_out(rows)(**operands, **given)
            return list(outs.values())
        wants = {key: given.pop(key) for key in ("want_x0", "want_s", "next_copies", "next_dtype")}
        return list(ops.bound_step(rows, **wants)(**operands, **given))
    found = getattr(ops, name)(**given)
    if outs:
        return list(outs.values())
    return list(found) if isinstance(found, tuple) else [found]
