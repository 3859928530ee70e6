"""Valid calls of every op, drawn by hypothesis: any shape, layout, dtype, source of noise and form of a row.

A `Call` has the arguments by name, what the float64 reference answers, and how large the terms are that it adds up: an
error is measured by those, as a sum may cancel.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from diffkern import ops, reference
from diffkern.plan import COLUMNS, LEARNED_COLUMNS
from helpers.fuzz_draws import (
    DTYPES,
    STREAMS,
    Call,
    coefficient,
    indices,
    rows_of,
    seeds,
    shapes,
    source,
    tensors,
)
from helpers.fuzz_layers import attention_calls, conv3x3_calls, group_norm_calls, linear_rows_calls, spatial_calls
from helpers.op_cases import LAYOUTS, arrange, table


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
    "conv3x3": conv3x3_calls(),
    "pack_conv3x3": conv3x3_calls(packs=True),
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
