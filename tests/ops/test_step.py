"""The universal step: against the reference over rows, dtypes, layouts, shapes and forms of guidance; its bits."""

from __future__ import annotations

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.op_cases import EVERYTHING, LAYOUTS, ROWS, SHAPES, arrange, native_draws, same_bits, table, threads, values
from helpers.tolerances import STATE_DTYPES, check, coarser
from torch import Tensor

from diffkern import _C, ops, reference
from diffkern.ops import VARIATIONAL_COLUMNS
from diffkern.plan import COLUMNS, LEARNED_COLUMNS, SLOTS

NAMES = ("out", "x0", "s", "next")
DOUBLED = {"eps guided", "euler guided", "everything"}


def operands(
    shape: tuple[int, ...], state: torch.dtype, model: torch.dtype, layout: str = "contiguous"
) -> dict[str, Tensor]:
    """All inputs with different values; `m2` is the second prediction."""
    made = {name: values(shape, k, state, layout) for k, name in enumerate(("x", "h0", "h1", "h2", "h3", "known"))}
    return {**made, "m": values(shape, 11, model, layout), "m2": values(shape, 12, model, layout)}


def compare(row: str, inputs: dict[str, Any], model: torch.dtype, what: str, **more: object) -> None:
    """One row: every output against the reference in float64 and in the state's dtype."""
    like = inputs["x"]
    assert like is not None
    arguments = {**inputs, "table": table(ROWS[row]), **more}
    ours = ops.step(**arguments, want_x0=True, want_s=True, next_copies=1)
    with native_draws():
        exact = reference.step(**arguments)
        plain = reference.step(**arguments, compute=like.dtype)
    for name, o, e, p in zip(NAMES, ours, exact, plain, strict=True):
        assert o is not None
        assert o.dtype == (model if name == "next" else like.dtype)
        p = p.to(model) if name == "next" else p
        check(
            o,
            e,
            p,
            f"{row}, {name}, {what}",
            coarser(o.dtype, torch.float64 if like.dtype == torch.float64 else torch.float32),
        )


def test_columns_are_the_native_ones() -> None:
    assert _C.layout()["columns"] == {
        "step": COLUMNS,
        "learned_step": LEARNED_COLUMNS,
        "variational": VARIATIONAL_COLUMNS,
        "noising": ("s", "n", "u", "v"),
        "loss": ("u", "v", "weight"),
    }
    assert _C.layout()["histories"] == SLOTS


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
def test_rows(row: str, state: torch.dtype) -> None:
    """Every row, with a model output of every dtype, in every layout; noise by address and as a tensor."""
    shape, seeds = (3, 4, 16, 17), ops.seeds(1, 3)
    for model, layout in zip(itertools.cycle(STATE_DTYPES), LAYOUTS, strict=False):
        inputs: dict[str, Any] = {**operands(shape, state, model, layout)}
        if row not in DOUBLED:
            inputs["m2"] = None
        what = f"{layout}, model in {model}"
        compare(row, inputs, model, what, seeds=seeds)
        if "noise" in row:
            compare(row, inputs, model, what, noise=values(shape, 20, state, LAYOUTS[LAYOUTS.index(layout) - 1]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    seeds = ops.seeds(1, shape[0])
    for state, layout in itertools.product((torch.float32, torch.bfloat16), LAYOUTS):
        inputs = operands(shape, state, torch.float16, layout)
        mask = values(shape, 30) > 0
        if shape[0] == 0:  # the reference has nothing to stack
            out = ops.step(**inputs, table=table(EVERYTHING), seeds=seeds, mask=mask, want_x0=True)
            assert out[0].shape == shape
            assert out[1] is not None
            continue
        compare("everything", inputs, torch.float16, layout, seeds=seeds, mask=mask)


# --------------------------------------------------------------------------------------------------------- guidance
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "permuted", "sliced"])
@pytest.mark.parametrize("model", STATE_DTYPES, ids=str)
def test_doubled_batch_is_two_tensors(model: torch.dtype, layout: str) -> None:
    shape = (3, 4, 9, 13)
    x, u, c = values(shape, 1, layout=layout), values(shape, 2, model), values(shape, 3, model)
    both = arrange(torch.cat([u, c]), layout)
    for row in DOUBLED - {"everything"}:
        one = ops.step(x, both, table=table(ROWS[row]), want_x0=True)
        two = ops.step(x, u, c, table=table(ROWS[row]), want_x0=True)
        assert same_bits(one[0], two[0])
        assert same_bits(one[1], two[1])
        assert not same_bits(one[0], ops.step(x, u, table=table({**ROWS[row], "w": 0.0}))[0])
    # w = 1 is the conditional prediction; w = 0 takes the unconditional one and reads no other.
    exact = table({"d": 1.0, "w": 1.0})
    torch.testing.assert_close(ops.step(x, both, table=exact)[0], c.float(), rtol=1e-6, atol=1e-6)
    c.fill_(math.nan)
    assert same_bits(ops.step(x, u, c, table=table({"d": 1.0}))[0], u.float())
    assert same_bits(ops.step(x, torch.cat([u, c]), table=table({"d": 1.0}))[0], u.float())


# -------------------------------------------------------------------------------------------------- per-sample rows
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_every_sample_at_a_row_of_its_own(dtype: torch.dtype) -> None:
    names = [name for name in ROWS if name not in DOUBLED]
    rows = table(*(ROWS[name] for name in names))
    batch = len(names)
    shape, seeds = (batch, 3, 41), ops.seeds(0, batch)
    inputs: dict[str, Any] = {**operands(shape, torch.float32, torch.float32), "m2": None}
    del inputs["known"]
    index = torch.randperm(batch, generator=torch.Generator().manual_seed(0)).to(dtype)
    want = {"want_x0": True, "want_s": True, "next_copies": 1}
    for form in (index, torch.stack([index, index]).t().reshape(-1)[::2]):
        ours = ops.step(**inputs, table=rows, index=form, seeds=seeds, **want)
        for b in range(batch):
            single = {name: None if t is None else t[b : b + 1] for name, t in inputs.items()}
            one = ops.step(**single, table=rows, row=int(index[b]), seeds=seeds[b : b + 1], **want)
            assert all(same_bits(o[b : b + 1], p) for o, p in zip(ours, one, strict=True)), names[int(index[b])]
    for k in range(batch):
        at = torch.tensor(k, dtype=dtype)
        by_index = ops.step(**inputs, table=rows, index=at, seeds=seeds)
        assert same_bits(by_index[0], ops.step(**inputs, table=rows, row=k, seeds=seeds)[0])


# --------------------------------------------------------------------------------------------------------- the mask
@pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
def test_masks(state: torch.dtype) -> None:
    """bool, uint8 and the state's dtype; a fraction blends, 0 and 1 select."""
    shape, seeds = (3, 4, 9, 13), ops.seeds(5, 3)
    inputs: dict[str, Any] = {**operands(shape, state, state), "m2": None}
    row = {**ROWS["x0 noise"], "known_s": 0.9, "known_n": 0.43, "known_stream": 3.0 * 2**40}
    open_ = values(shape, 1) > 0
    expected = ops.step(**inputs, table=table(row), seeds=seeds, mask=open_)[0]
    for mask in (open_.to(torch.uint8), 255 * open_.to(torch.uint8), open_.to(state), arrange(open_, "channels_last")):
        assert same_bits(ops.step(**inputs, table=table(row), seeds=seeds, mask=mask)[0], expected)
    free = ops.step(**inputs, table=table(row), seeds=seeds)[0]
    known = ops.step(
        inputs["known"], None, table=table({"a": 0.9, "g": 0.43, "stream": row["known_stream"]}), seeds=seeds
    )[0]
    assert same_bits(expected, torch.where(open_, free, known))
    ROWS["fraction"] = row
    try:
        compare(
            "fraction",
            inputs,
            state,
            "mask in fractions",
            seeds=seeds,
            mask=values(shape, 3).abs().clamp(max=1).to(state),
        )
    finally:
        del ROWS["fraction"]


def test_mask_selects_past_nan() -> None:
    """Selection, not arithmetic: NaN behind a closed (or open) mask does not leak."""
    x, known = torch.full((1, 4), math.nan), values((1, 4), 1)
    rows = table({"a": 1.0, "known_s": 1.0})
    assert same_bits(ops.step(x, None, table=rows, mask=torch.zeros(1, 4), known=known)[0], known)
    assert same_bits(ops.step(known, None, table=rows, mask=torch.ones(1, 4), known=x)[0], known)
    half = ops.step(x, None, table=rows, mask=torch.tensor([[0.0, 0.5, 1.0, 0.0]]), known=known)[0]
    assert half.isnan().tolist() == [[False, True, True, False]]


# ------------------------------------------------------------------------------------- what is not read, NaN, clipping
def test_terms_with_coefficient_zero_are_not_read() -> None:
    """A NaN operand with coefficient 0 leaves no trace, None in its place gives the same bits."""
    shape, nan = (2, 1500), torch.full((2, 1500), math.nan)
    x, m = values(shape, 1), values(shape, 2)
    for row, kept in {
        "euler": ("x", "m"),
        "history 1": ("x", "m", "h0"),
        "noise before clip": ("x", "m"),
        "nothing": (),
    }.items():
        full = dict.fromkeys(("x", "m", "m2", "h0", "h1", "h2", "h3", "known"), nan)
        here = {"x": x, "m": m, "h0": values(shape, 3)}
        full = {**full, **{name: here[name] for name in kept}}
        bare = {"x": None, "m": None, **{name: here[name] for name in kept}}
        if not kept:
            bare["x"] = x  # only its shape
        for want in ({}, {"want_x0": True}, {"next_copies": 1}):
            a = ops.step(**full, table=table({**ROWS[row], "A": 0, "B": 0, "D": 0}), seeds=ops.seeds(0, 2), **want)
            b = ops.step(**bare, table=table({**ROWS[row], "A": 0, "B": 0, "D": 0}), seeds=ops.seeds(0, 2), **want)
            assert all(same_bits(p, q) for p, q in zip(a, b, strict=True) if p is not None), (row, want)
    # x0 is computed only where it is used: here p and q are there, b and x0 are not.
    assert same_bits(ops.step(x, nan, table=table({"a": 1.0, "q": 1.0, "w": 2.0}))[0], x)
    # No coefficient of the slope is read unless it is asked for; a mask without known part reads no known.
    assert same_bits(ops.step(x, nan, table=table({"a": 1.0, "D": 1.0}))[0], x)
    assert same_bits(
        ops.step(x, None, table=table({"a": 1.0}), mask=torch.zeros(shape), known=nan)[0], torch.zeros(shape)
    )


def test_clip_is_torch_clamp() -> None:
    x = torch.tensor([[math.nan, math.inf, -math.inf, 1.5, -1.5, 1.0, 0.25, -0.0]])
    for dtype in STATE_DTYPES:
        out, x0, _, _ = ops.step(x.to(dtype), None, table=table({"p": 1.0, "b": 1.0, "clip": 1.0}), want_x0=True)
        assert x0 is not None
        expected = x.to(dtype).clamp(-1, 1)
        assert torch.equal(x0.nan_to_num(9), expected.nan_to_num(9))
        assert torch.equal(out.nan_to_num(9), expected.nan_to_num(9))
        assert out.isnan().tolist() == [[True] + [False] * 7]


# ----------------------------------------------------------------------------------------------------- same bits
@pytest.mark.parametrize("row", ["eps", "x0 clip noise", "everything"])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_layout_batch_or_threads(row: str, state: torch.dtype) -> None:
    shape, seeds = (4, 3, 131, 127), ops.seeds(2, 4)
    plain: dict[str, Any] = {**operands(shape, state, state)}
    mask = values(shape, 5) > 0
    want = {"want_x0": True, "want_s": True, "next_copies": 1, "table": table(ROWS[row])}
    with threads(1):
        expected = ops.step(**plain, seeds=seeds, mask=mask, **want)
    for n, layout in itertools.product((2, 3), LAYOUTS[:-1]):
        with threads(n):
            moved = {name: None if t is None else arrange(t, layout) for name, t in plain.items()}
            got = ops.step(**moved, seeds=seeds, mask=arrange(mask, layout), **want)
            assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True)), (n, layout)
    for b in range(4):
        single = {name: None if t is None else t[b : b + 1] for name, t in plain.items()}
        one = ops.step(**single, seeds=seeds[b : b + 1], mask=mask[b : b + 1], **want)
        assert all(same_bits(a[0], e[b]) for a, e in zip(one, expected, strict=True))


WANTS: list[dict[str, Any]] = [
    *({}, {"want_x0": True}, {"want_s": True}, {"next_copies": 1}, {"want_x0": True, "next_copies": 2}),
    {"want_s": True, "next_copies": 1},
    {"want_x0": True, "want_s": True},
]


@pytest.mark.parametrize("state", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("row", [name for name in ROWS if name not in ("everything", "nothing")])
def test_outputs_do_not_change_the_bits(row: str, state: torch.dtype) -> None:
    """Common rows run loops of their own; asked for all outputs, the general one: the same formula, the same bits."""
    shape, seeds = (2, 3000), ops.seeds(0, 2)
    inputs: dict[str, Any] = {**operands(shape, state, state), "table": table(ROWS[row])}
    if row not in DOUBLED:
        inputs["m2"] = None
    general = ops.step(**inputs, seeds=seeds, want_x0=True, want_s=True, next_copies=1)
    for want in WANTS:
        special = ops.step(**inputs, seeds=seeds, **{**want, "next_copies": min(want.get("next_copies", 0), 1)})
        assert all(same_bits(a, b) for a, b in zip(special, general, strict=True) if a is not None), want


def terms(row: dict[str, float], want: dict[str, Any]) -> set[str]:
    """core/step.h's step_terms by name."""
    have = {name for name, value in row.items() if value != 0}
    found = {f"kTerm{name.upper()}" for name in have & {"a", "b", "d", "e0", "e1", "e2", "e3", "g"}}
    flags = {"kWantX0": "want_x0", "kWantS": "want_s", "kWantNext": "next_copies"}
    found |= {flag for flag, name in flags.items() if want.get(name)}
    if "kWantS" in found:
        found |= {f"kTermSlope{name}" for name in have & {"A", "B", "D"}}
    if found & {"kTermB", "kTermSlopeB", "kWantX0"}:
        found |= {f"kTerm{name.capitalize()}" for name in have & {"p", "q", "r", "clip"}}
    if "w" in have and found & {"kTermQ", "kTermD", "kTermSlopeD"}:
        found.add("kTermW")
    return found


def test_every_special_loop_is_met(root: Path) -> None:
    """Each set of terms with a loop of its own (step_span.h) is a row and a set of outputs of the test above."""
    text = (root / "csrc/cpu/step_span.h").read_text()
    named: dict[str, set[str]] = {}

    def resolve(expression: str) -> frozenset[str]:
        return frozenset().union(*(named.get(part, {part}) for part in expression.split(" | ")))

    for name, expression in re.findall(r"constexpr uint32_t (k\w+) = ([^;]+);", text):
        named[name] = set(resolve(" ".join(expression.split())))
    loops = {resolve(expression) for expression in re.findall(r"  DO\(([^)]+)\)", text)}
    met = {frozenset(terms(row, want)) for row in ROWS.values() for want in WANTS}
    assert len(loops) > 10
    assert loops - met == set()


# --------------------------------------------------------------------------------------------------- outputs
@pytest.mark.parametrize("copies", [0, 1, 2])
@pytest.mark.parametrize("layout", LAYOUTS[:-1])
def test_next(copies: int, layout: str) -> None:
    """k x' in the model's dtype, or another, once or twice."""
    x, m = values((3, 4, 9, 13), 1, layout=layout), values((3, 4, 9, 13), 2, torch.bfloat16, layout)
    rows = table({**ROWS["x0"], "k": 0.37})
    for dtype in (None, *STATE_DTYPES):
        out, _, _, following = ops.step(x, m, table=rows, next_copies=copies, next_dtype=dtype)
        if copies == 0:
            assert following is None
            continue
        assert following is not None
        assert following.dtype == (dtype or torch.bfloat16)
        once = (torch.tensor(0.37, dtype=torch.float64).float() * out).to(following.dtype)
        assert same_bits(following, torch.cat([once] * copies))
    without_model = ops.step(x, None, table=table({"a": 1.0}), next_copies=1)[3]
    assert without_model is not None
    assert without_model.dtype == x.dtype


@pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
def test_out_and_in_place(state: torch.dtype) -> None:
    shape, seeds = (3, 4, 9, 13), ops.seeds(1, 3)
    inputs: dict[str, Any] = {**operands(shape, state, torch.float16)}
    given = {"table": table(EVERYTHING), "seeds": seeds, "mask": values(shape, 6) > 0}
    expected = ops.step(**inputs, **given, want_x0=True, want_s=True, next_copies=2)
    for layout in LAYOUTS[:-1]:
        nan = torch.full(shape, math.nan, dtype=state)
        outs = [arrange(nan.clone(), layout) for _ in range(3)]
        following = arrange(torch.full((6, *shape[1:]), math.nan, dtype=torch.float16), layout)
        got = ops.step_out(**inputs, **given, out=outs[0], x0=outs[1], s=outs[2], next=following)
        assert got is outs[0]
        assert all(same_bits(a, b) for a, b in zip((*outs, following), expected, strict=True)), layout
    for name in ("x", "h0", "h3", "known"):  # in place of any input, the other outputs over further inputs
        mine = {key: None if t is None else t.clone() for key, t in inputs.items()}
        ops.step_out(**mine, **given, out=mine[name], s=mine["h1"], x0=mine["h2"])
        assert same_bits(mine[name], expected[0]), name
        assert same_bits(mine["h1"], expected[2]), name
        assert same_bits(mine["h2"], expected[1]), name
    # The model's input buffer may be its output buffer: both halves in place.
    x, both = values(shape, 1), values((6, *shape[1:]), 2)
    wanted = ops.step(x, both, table=table(ROWS["eps guided"]), next_copies=2)
    ops.step_out(x, both, table=table(ROWS["eps guided"]), out=x, next=both)
    assert same_bits(x, wanted[0])
    assert same_bits(both, wanted[3])


def test_initial_noise_and_noise_only() -> None:
    """x and m may be absent: the state's shape comes from what is there."""
    seeds, noise = ops.seeds(0, 2), values((2, 7), 1)
    assert same_bits(ops.step(None, None, table=table({"g": 2.0}), noise=noise)[0], 2 * noise)
    out = torch.empty(2, 7)
    ops.step_out(None, None, table=table({"g": 2.0, "stream": 6.0}), seeds=seeds, out=out)
    assert same_bits(out, 2 * ops.randn((2, 7), seeds, 6))
    only = ops.step(None, noise, table=table({"d": 0.5}))[0]
    assert same_bits(only, 0.5 * noise)
