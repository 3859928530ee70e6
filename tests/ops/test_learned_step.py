"""The step of a network that learned its variance: against the reference and diffusers, its bits, what it reads."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.op_cases import LAYOUTS, SHAPES, arrange, check_sentence, native_draws, same_bits, threads, values
from helpers.op_cases import table as step_table
from helpers.tolerances import STATE_DTYPES, check, coarser
from torch import Tensor

from diffkern import ops, reference
from diffkern.ops import LEARNED_COLUMNS
from diffkern.plan import COLUMNS

NAMES = ("out", "x0", "next")
SHAPES_WITH_CHANNELS = [shape for shape in SHAPES if len(shape) > 1]
FROM_EPS, FROM_X0 = {"p": 1.25, "q": -0.75}, {"a": 0.625, "b": 0.375}
RANGE = {"g": 1.0, "r0": -3.1, "r1": 0.9, "stream": 2.0**41 + 5}
MASKED = {"known_s": 0.9, "known_n": 0.43, "known_stream": 3.0 * 2**40 + 1}
ROWS: dict[str, dict[str, float]] = {
    "range": {**FROM_EPS, **FROM_X0, **RANGE},
    "range clip": {**FROM_EPS, **FROM_X0, **RANGE, "clip": 1.0},
    "direct": {**FROM_EPS, **FROM_X0, **RANGE, "r0": 0.0, "r1": 1.0},
    "slope": {"a": 1.0, "d": -0.3, **RANGE, "g": 0.7},
    "fixed": {**FROM_EPS, "b": 0.8, "d": 0.2, **RANGE, "r1": 0.0},
    "last": {**FROM_EPS, **FROM_X0, **RANGE, "g": 0.0, "clip": 1.0},
    "noise alone": {"a": 1.0, **RANGE},
    "masked": {**FROM_EPS, **FROM_X0, **RANGE, **MASKED, "k": 0.8},
}


def table(*rows: dict[str, float]) -> Tensor:
    defaults = {"clip": math.inf, "k": 1.0}
    found = [[{**defaults, **row}.get(name, 0.0) for name in LEARNED_COLUMNS] for row in rows]
    return torch.tensor(found, dtype=torch.float64)


TABLE = table(*ROWS.values())


def twice(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[0], 2 * shape[1], *shape[2:])


def operands(
    shape: tuple[int, ...], state: torch.dtype, model: torch.dtype, layout: str = "contiguous"
) -> dict[str, Tensor]:
    made = {name: values(shape, k, state, layout) for k, name in enumerate(("x", "known"))}
    return {**made, "m": values(twice(shape), 11, model, layout)}


def compare(row: str, inputs: dict[str, Any], model: torch.dtype, what: str, **more: object) -> None:
    """One row: every output against the reference in float64 and in the state's dtype."""
    state = inputs["x"].dtype
    wide = torch.float64 if state == torch.float64 else torch.float32
    arguments = {**inputs, "table": table(ROWS[row]), **more}
    ours = ops.learned_step(**arguments, want_x0=True, next_copies=1)
    with native_draws():
        exact = reference.learned_step(**arguments)
        plain = reference.learned_step(**arguments, compute=state)
    for name, o, e, p in zip(NAMES, ours, exact, plain, strict=True):
        assert o is not None
        assert o.dtype == (model if name == "next" else state)
        p = p.to(model) if name == "next" else p
        check(o, e, p, f"{row}, {name}, {what}", coarser(o.dtype, wide))


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
def test_rows(row: str, state: torch.dtype) -> None:
    """Every row, with a model output of every dtype, in every layout; noise by address and as a tensor."""
    shape, seeds = (3, 4, 16, 17), ops.seeds(1, 3)
    mask = values(shape, 30) > 0 if row == "masked" else None
    for model, layout in zip(itertools.cycle(STATE_DTYPES), LAYOUTS, strict=False):
        inputs = operands(shape, state, model, layout)
        what = f"{layout}, model in {model}"
        compare(row, inputs, model, what, seeds=seeds, mask=mask)
        noise = values(shape, 20, state, LAYOUTS[LAYOUTS.index(layout) - 1])
        known = {"seeds": seeds, "mask": mask} if row == "masked" else {}  # the seeds are the known image's then
        compare(row, inputs, model, what, noise=noise, **known)


@pytest.mark.parametrize("shape", SHAPES_WITH_CHANNELS, ids=str)
def test_shapes(shape: tuple[int, ...]) -> None:
    seeds = ops.seeds(1, shape[0])
    for state, layout in itertools.product((torch.float32, torch.bfloat16), LAYOUTS):
        inputs = operands(shape, state, torch.float16, layout)
        mask = values(shape, 30) > 0
        if 0 in shape:
            out = ops.learned_step(**inputs, table=table(ROWS["masked"]), seeds=seeds, mask=mask, want_x0=True)
            assert out[0].shape == shape
            assert out[1] is not None
            continue
        compare("masked", inputs, torch.float16, layout, seeds=seeds, mask=mask)


# ------------------------------------------------------------------------------------------- what the variance means
def test_constant_log_variance_is_the_step() -> None:
    """exp(0) = 1 exactly: with r0 = r1 = 0 the bits are those of `step`; v = -r0 / r1 gives them as well."""
    shape, seeds = (2, 3, 37, 29), ops.seeds(4, 2)
    for state in STATE_DTYPES:
        given = operands(shape, state, state)
        x, m, known = given["x"], given["m"], given["known"]
        for name in ("range clip", "slope", "masked"):
            row = {**ROWS[name], "r0": 0.0, "r1": 0.0}
            mask = values(shape, 5) > 0 if name == "masked" else None
            plain = {column: value for column, value in row.items() if column in COLUMNS}
            common: dict[str, Any] = {"seeds": seeds, "mask": mask, "known": known, "want_x0": True, "next_copies": 2}
            expected = ops.step(x, m[:, :3].contiguous(), table=step_table(plain), **common)
            got = ops.learned_step(x, m, table=table(row), **common)
            assert all(same_bits(a, b) for a, b in zip(got, (expected[0], expected[1], expected[3]), strict=True))
            m = torch.cat([m[:, :3], torch.full_like(m[:, 3:], 0.25)], 1)
            balanced = ops.learned_step(x, m, table=table({**row, "r0": -0.5, "r1": 2.0}), **common)
            assert all(same_bits(a, b) for a, b in zip(got, balanced, strict=True))


def test_the_standard_deviation_is_learned() -> None:
    """Over many draws, each element has the spread that its own v asks for."""
    v = torch.linspace(-1, 1, 8).reshape(1, 1, 8)
    m = torch.cat([torch.zeros(1, 1, 8), v], 1).expand(20000, 2, 8)
    x = torch.zeros(20000, 1, 8)
    low, high = math.log(0.02), math.log(0.3)
    row = {"a": 1.0, "g": 1.0, "r0": 0.5 * (low + high), "r1": 0.5 * (high - low)}
    out = ops.learned_step(x, m, table=table(row), seeds=ops.seeds(0, 20000))[0]
    expected = torch.exp(0.5 * (row["r0"] + row["r1"] * v.flatten()))
    assert math.isclose(float(expected[0]) ** 2, 0.02, rel_tol=1e-5)
    assert math.isclose(float(expected[-1]) ** 2, 0.3, rel_tol=1e-5)
    # the standard deviation of n draws is known to 1 / sqrt(2 n)
    torch.testing.assert_close(out.std(0).flatten() / expected, torch.ones(8), rtol=0, atol=5 / math.sqrt(40000))


@pytest.mark.parametrize("kind", ["learned_range", "learned"])
@pytest.mark.parametrize("clip", [True, False])
def test_diffusers(kind: str, clip: bool) -> None:
    """DDPMScheduler with a learned variance, on the noise that it drew: 2e-6 relative, at every kind of step."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(variance_type=kind, clip_sample=clip)
    shape = (2, 3, 16, 16)
    x, m = values(shape, 1), values(twice(shape), 2)
    m[:, 3:] = m[:, 3:].tanh()
    if kind == "learned":
        m[:, 3:] = m[:, 3:].abs() + 0.1
    abar = torch.cat([torch.ones(1), scheduler.alphas_cumprod])
    for t in (999, 500, 1, 0):
        expected = scheduler.step(m, t, x, generator=torch.Generator().manual_seed(7)).prev_sample
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(7))
        # beta and the like in float32, as there: it loses digits where beta is small
        here, before, beta = (float(v) for v in (abar[t + 1], abar[t], 1 - abar[t + 1] / abar[t]))
        noise_here, noise_before = (float(1 - abar[k]) for k in (t + 1, t))
        small = max(noise_before / noise_here * beta, 1e-20)
        row = {
            **{"p": here**-0.5, "q": -((noise_here / here) ** 0.5), "clip": 1.0 if clip else math.inf},
            **{"a": (1 - beta) ** 0.5 * noise_before / noise_here, "b": before**0.5 * beta / noise_here},
            **{"g": float(t > 0), "r0": 0.5 * math.log(beta * small), "r1": 0.5 * math.log(beta / small)},
        }
        ours = m
        if kind == "learned":  # there the network gives the variance, here its logarithm
            row |= {"r0": 0.0, "r1": 1.0}
            ours = torch.cat([m[:, :3], m[:, 3:].log()], 1)
        got = ops.learned_step(x, ours, table=table(row), noise=noise)[0]
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6 * float(expected.abs().max()))


# ------------------------------------------------------------------------------------------------- what is not read
def test_what_a_row_does_not_need_is_not_read() -> None:
    shape, nan = (2, 3, 400), torch.full((2, 3, 400), math.nan)
    x, m, seeds = values(shape, 1), values(twice(shape), 2), ops.seeds(0, 2)
    poisoned = torch.cat([m[:, :3], nan], 1)
    for name in ("fixed", "last"):  # v
        expected = ops.learned_step(x, m, table=table(ROWS[name]), seeds=seeds)[0]
        assert same_bits(ops.learned_step(x, poisoned, table=table(ROWS[name]), seeds=seeds)[0], expected)
    # z in the last row, the mean of a row that reads only v, and all of m in one that reads none
    last = ops.learned_step(x, m, table=table(ROWS["last"]))[0]
    assert same_bits(ops.learned_step(x, m, table=table(ROWS["last"]), noise=nan)[0], last)
    expected = ops.learned_step(x, m, table=table(ROWS["noise alone"]), seeds=seeds)[0]
    only_v = torch.cat([nan, m[:, 3:]], 1)
    assert same_bits(ops.learned_step(x, only_v, table=table(ROWS["noise alone"]), seeds=seeds)[0], expected)
    plain = {"a": 0.5, "g": 1.0, "r0": -1.0, "k": 0.5}
    got = ops.learned_step(x, None, table=table(plain), seeds=seeds, next_copies=1)
    with native_draws():
        wanted = reference.learned_step(x, None, table=table(plain), seeds=seeds)
    torch.testing.assert_close(got[0].double(), wanted[0], rtol=1e-6, atol=1e-6)
    assert got[2] is not None
    assert got[2].dtype == x.dtype


def test_nan_and_infinity_stay_where_they_are() -> None:
    shape, seeds = (1, 1, 8), ops.seeds(0, 1)
    x, m = torch.zeros(shape), torch.zeros(1, 2, 8)
    m[0, 1] = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 300.0, -300.0, 0.0, 0.0])
    x[0, 0, 6] = math.nan
    m[0, 0, 7] = math.inf
    row = table({"a": 1.0, "d": 0.5, "g": 1.0, "r1": 1.0})
    z = ops.randn(shape, seeds)
    out = ops.learned_step(x, m, table=row, seeds=seeds)[0].flatten()
    assert out.isnan().tolist() == [True, False, False, False, False, False, True, False]
    infinite = math.inf * z.flatten().sign()
    assert out[[1, 4]].tolist() == infinite[[1, 4]].tolist()  # exp(150) is more than a float32 can hold
    assert out[2] == 0
    assert abs(out[5]) < 1e-38
    assert out[3] == z.flatten()[3]
    assert out[7] == math.inf


# ------------------------------------------------------------------------------------- rows, masks, outputs, the bits
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32], ids=str)
def test_every_sample_at_a_row_of_its_own(dtype: torch.dtype) -> None:
    batch = len(ROWS)
    shape, seeds = (batch, 3, 41), ops.seeds(0, batch)
    inputs = operands(shape, torch.float32, torch.float16)
    mask = values(shape, 3) > 0
    index = torch.randperm(batch, generator=torch.Generator().manual_seed(0)).to(dtype)
    for form in (index, torch.stack([index, index]).t().reshape(-1)[::2]):
        for given in (None, mask):
            want: dict[str, Any] = {"table": TABLE, "want_x0": True, "next_copies": 1}
            ours = ops.learned_step(**inputs, index=form, seeds=seeds, mask=given, **want)
            for b in range(batch):
                single = {name: t[b : b + 1] for name, t in inputs.items()}
                one_mask = None if given is None else given[b : b + 1]
                one = ops.learned_step(**single, row=int(index[b]), seeds=seeds[b : b + 1], mask=one_mask, **want)
                assert all(same_bits(o[b : b + 1], p) for o, p in zip(ours, one, strict=True)), int(index[b])
    for k in range(batch):
        at = torch.tensor(k, dtype=dtype)
        by_index = ops.learned_step(**inputs, table=TABLE, index=at, seeds=seeds)[0]
        assert same_bits(by_index, ops.learned_step(**inputs, table=TABLE, row=k, seeds=seeds)[0])


@pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
def test_masks(state: torch.dtype) -> None:
    """bool, uint8 and the state's dtype; closed elements are the re-noised known image, bit for bit."""
    shape, seeds = (3, 4, 9, 13), ops.seeds(5, 3)
    inputs = operands(shape, state, state)
    open_, rows = values(shape, 1) > 0, table(ROWS["masked"])
    expected = ops.learned_step(**inputs, table=rows, seeds=seeds, mask=open_)[0]
    for mask in (open_.to(torch.uint8), 255 * open_.to(torch.uint8), open_.to(state), arrange(open_, "channels_last")):
        assert same_bits(ops.learned_step(**inputs, table=rows, seeds=seeds, mask=mask)[0], expected)
    free = ops.learned_step(**inputs, table=rows, seeds=seeds)[0]
    renoise = step_table({"a": 0.9, "g": 0.43, "stream": MASKED["known_stream"]})
    known = ops.step(inputs["known"], None, table=renoise, seeds=seeds)[0]
    assert same_bits(expected, torch.where(open_, free, known))
    fractions = values(shape, 3).abs().clamp(max=1).to(state)
    compare("masked", inputs, state, "mask in fractions", seeds=seeds, mask=fractions)


@pytest.mark.parametrize("row", ["range clip", "masked"])
@pytest.mark.parametrize("state", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_layout_batch_or_threads(row: str, state: torch.dtype) -> None:
    shape, seeds = (4, 3, 131, 127), ops.seeds(2, 4)
    plain = operands(shape, state, state)
    mask = values(shape, 5) > 0
    want: dict[str, Any] = {"want_x0": True, "next_copies": 1, "table": table(ROWS[row])}
    with threads(1):
        expected = ops.learned_step(**plain, seeds=seeds, mask=mask, **want)
    for n, layout in itertools.product((2, 3), LAYOUTS[:-1]):
        with threads(n):
            moved = {name: arrange(t, layout) for name, t in plain.items()}
            got = ops.learned_step(**moved, seeds=seeds, mask=arrange(mask, layout), **want)
            assert all(same_bits(a, b) for a, b in zip(got, expected, strict=True)), (n, layout)
    for b in range(4):
        single = {name: t[b : b + 1] for name, t in plain.items()}
        one = ops.learned_step(**single, seeds=seeds[b : b + 1], mask=mask[b : b + 1], **want)
        assert all(same_bits(a[0], e[b]) for a, e in zip(one, expected, strict=True))


def test_noise_tensor_is_the_draw_at_the_address() -> None:
    shape, seeds = (2, 3, 37, 29), ops.seeds(3, 2)
    for state in (torch.float32, torch.float64):
        inputs = operands(shape, state, torch.float32)
        z = ops.randn(shape, seeds, int(RANGE["stream"]), dtype=state)
        by_address = ops.learned_step(**inputs, table=table(ROWS["range"]), seeds=seeds)[0]
        assert same_bits(by_address, ops.learned_step(**inputs, table=table(ROWS["range"]), noise=z)[0])


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_next(copies: int) -> None:
    """k x' in the model's dtype, or another, once or twice."""
    shape, seeds = (3, 4, 9, 13), ops.seeds(0, 3)
    x, m = values(shape, 1), values(twice(shape), 2, torch.bfloat16)
    rows = table({**ROWS["range"], "k": 0.37})
    for dtype in (None, *STATE_DTYPES):
        out, _, following = ops.learned_step(x, m, table=rows, seeds=seeds, next_copies=copies, next_dtype=dtype)
        if copies == 0:
            assert following is None
            continue
        assert following is not None
        once = (torch.tensor(0.37, dtype=torch.float64).float() * out).to(dtype or torch.bfloat16)
        assert same_bits(following, torch.cat([once] * copies))


@pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
def test_out_and_in_place(state: torch.dtype) -> None:
    shape, seeds = (3, 4, 9, 13), ops.seeds(1, 3)
    inputs = operands(shape, state, torch.float16)
    given: dict[str, Any] = {"table": table(ROWS["masked"]), "seeds": seeds, "mask": values(shape, 6) > 0}
    expected = ops.learned_step(**inputs, **given, want_x0=True, next_copies=2)
    for layout in LAYOUTS[:-1]:
        outs = [arrange(torch.full(shape, math.nan, dtype=state), layout) for _ in range(2)]
        following = arrange(torch.full((6, *shape[1:]), math.nan, dtype=torch.float16), layout)
        got = ops.learned_step_out(**inputs, **given, out=outs[0], x0=outs[1], next=following)
        assert got is outs[0]
        assert all(same_bits(a, b) for a, b in zip((*outs, following), expected, strict=True)), layout
    for first, second in (("x", "known"), ("known", "x")):  # in place of an input, x0 over another
        mine = {name: t.clone() for name, t in inputs.items()}
        ops.learned_step_out(**mine, **given, out=mine[first], x0=mine[second])
        assert same_bits(mine[first], expected[0])
        assert same_bits(mine[second], expected[1])
    z = ops.randn(shape, seeds, int(RANGE["stream"]), dtype=state)
    plain = {name: inputs[name] for name in ("x", "m")}
    by_tensor = ops.learned_step(**plain, table=table(ROWS["range"]), noise=z)[0]
    ops.learned_step_out(**plain, table=table(ROWS["range"]), noise=z, out=z)  # over the noise
    assert same_bits(z, by_tensor)


@pytest.mark.full
def test_compile_and_export() -> None:
    shape = (3, 2, 5, 4)
    x, m, seeds, index = values(shape, 1), values(twice(shape), 2), ops.seeds(0, 3), torch.tensor([0, 5, 2])

    def sample(x: Tensor, m: Tensor, row: int) -> tuple[Tensor, ...]:
        out, clean, following = ops.learned_step(x + 1, m * 2, table=TABLE, row=row, seeds=seeds, want_x0=True)
        assert clean is not None
        assert following is None
        buffer = torch.empty_like(out)
        ops.learned_step_out(out, m, table=TABLE, index=index, seeds=seeds, out=buffer)
        last = ops.learned_step(buffer, m, table=TABLE, row=row, seeds=seeds, next_copies=2)[2]
        assert last is not None
        return out, clean, buffer, last

    compiled = torch.compile(sample, fullgraph=True)
    for row in (0, 1, 5):
        for got, expected in zip(compiled(x, m, row), sample(x, m, row), strict=True):
            torch.testing.assert_close(got, expected)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, m: Tensor) -> Tensor:
            return ops.learned_step(x, m, table=TABLE, index=index, seeds=seeds)[0]

    exported = torch.export.export(Module(), (x, m))
    assert same_bits(exported.module()(x, m), Module()(x, m))


# --------------------------------------------------------------------------------------------------------- bad input
SHAPE = (2, 3, 4)
X, M = values(SHAPE, 1), values(twice(SHAPE), 2)
S, NOISY, LAST = ops.seeds(0, 2), table(ROWS["range"]), table(ROWS["last"])
BUFFER = torch.zeros(64)
TWICE = r"m must hold the prediction and its log-variance, twice the channels of x \[2, 3, 4\], got "
GRAD = "not differentiable, and a tensor requires grad"


def call(x: Tensor = X, m: Tensor | None = M, rows: Tensor = LAST, **more: Any) -> object:
    return ops.learned_step(x, m, table=rows, **more)


def call_out(x: Tensor = X, m: Tensor | None = M, rows: Tensor = LAST, **more: Any) -> object:
    return ops.learned_step_out(x, m, table=rows, **{"out": torch.zeros(SHAPE), **more})


def unused(column: str) -> tuple[Callable[[], object], str]:
    at = LEARNED_COLUMNS.index(column)
    sentence = rf"w, r, e0 \.\. e3, A, B and D must be 0 in a row with learned variance, got 0\.5 in row 0, column {at}"
    return (lambda: call(rows=table({**ROWS["last"], column: 0.5}))), sentence


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "m of one half": (lambda: call(m=X), r"diffkern\.learned_step: " + TWICE + r"\[2, 3, 4\]"),
    "m of three": (lambda: call(m=torch.cat([M, X], 1)), TWICE + r"\[2, 9, 4\]"),
    "m doubled in its batch": (lambda: call(m=torch.cat([X, X])), TWICE + r"\[4, 3, 4\]"),
    "m in other places": (lambda: call(m=M[:, :, :3]), TWICE + r"\[2, 6, 3\]"),
    "no channels": (lambda: call(X[:, 0, 0], M[:, 0, 0]), r"twice the channels of x \[2\], got \[2\]"),
    "m integer": (lambda: call(m=M.int()), r"m must be float64, float32, float16 or bfloat16, got int32"),
    "m missing for q": (lambda: call(m=None), r"m must be given: the row has q = -0\.75"),
    "m missing for d": (lambda: call(m=None, rows=table({"d": 0.5})), r"m must be given: the row has d = 0\.5"),
    "m missing for r1": (
        lambda: call(m=None, rows=table({"g": 1.0, "r1": 0.5}), seeds=S),
        r"m must be given: the row has r1 = 0\.5",
    ),
    "m on meta": (lambda: call(m=M.to("meta")), r"m must be on the device of x \(cpu\), got meta"),
    "x 0-D": (lambda: call(torch.tensor(1.0)), r"x must have a batch dimension"),
    "x integer": (lambda: call(X.int()), r"x must be float64, float32, float16 or bfloat16, got int32"),
    **{f"{column} is not 0": unused(column) for column in ("w", "r", "e0", "e1", "e2", "e3", "A", "B", "D")},
    "not 0 by index": (
        lambda: call(rows=table(ROWS["last"], {"e2": 0.5}), index=torch.tensor([0, 1])),
        r"got 0\.5 in row 1, column 10",
    ),
    "r0 infinite": (lambda: call(rows=table({"r0": -math.inf})), r"r0 must be finite, got -inf in row 0"),
    "r1 infinite": (lambda: call(rows=table({"r1": math.inf})), r"r1 must be finite, got inf in row 0"),
    "r1 NaN": (lambda: call(rows=table({"r1": math.nan})), r"table must not hold NaN, got NaN in row 0, column 22"),
    "clip zero": (lambda: call(rows=table({"clip": 0.0})), r"clip must be positive \(inf: no clipping\), got 0 in row"),
    "table of the step": (
        lambda: call(rows=LAST[:, :21].contiguous()),
        r"table must have shape \[rows, 23\], got \[1, 21\]",
    ),
    "table dtype": (lambda: call(rows=LAST.float()), r"table must be float64, got float32"),
    "row large": (lambda: call(row=1), r"row must be in \[0, 1\), the rows of the table, got 1"),
    "row negative": (lambda: call(row=-1), r"row must be in \[0, 1\), the rows of the table, got -1"),
    "index large": (lambda: call(index=torch.tensor([0, 1])), r"index must be in \[0, 1\).*, got 1 for sample 1"),
    "index shape": (lambda: call(index=torch.zeros(3).long()), r"index must have shape \[\] or \[2\], got \[3\]"),
    "noise missing": (lambda: call(rows=NOISY), r"seeds .* or noise .* must be given: the row has g = 1"),
    "noise and seeds": (lambda: call(rows=NOISY, seeds=S, noise=X), r"give either seeds .* or noise .*, got both"),
    "noise shape": (lambda: call(rows=NOISY, noise=M), r"noise must have the shape of x \[2, 3, 4\], got \[2, 6, 4\]"),
    "noise dtype": (lambda: call(rows=NOISY, noise=X.half()), r"noise must have the dtype of x \(float32\), got floa"),
    "seeds length": (lambda: call(rows=NOISY, seeds=S[:1]), r"seeds must have shape \[2\]"),
    "stream fraction": (
        lambda: call(rows=table({"g": 1.0, "stream": 0.5}), seeds=S),
        r"stream must be an integer in \[0, 2\^53\), got 0\.5 in row 0",
    ),
    "known missing": (
        lambda: call(rows=table(ROWS["masked"]), seeds=S, mask=X > 0),
        r"known must be given: the row has known_s = 0\.9",
    ),
    "known noise": (
        lambda: call(rows=table({"known_n": 0.5}), mask=X > 0),
        r"seeds must be given: the row re-noises the known image with known_n = 0\.5",
    ),
    "mask dtype": (lambda: call(mask=X.half()), r"mask must be bool, uint8 or the dtype of the state \(float32\), got"),
    "mask shape": (lambda: call(mask=M > 0), r"mask must have the shape of x \[2, 3, 4\], got \[2, 6, 4\]"),
    "copies": (lambda: call(next_copies=3), r"next_copies must be 0, 1 or 2, got 3"),
    "x requires grad": (lambda: call(X.clone().requires_grad_()), r"diffkern\.learned_step: " + GRAD),
    "m requires grad": (lambda: call(m=M.clone().requires_grad_()), GRAD),
    "out: x0 requires grad": (
        lambda: call_out(x0=torch.zeros(SHAPE).requires_grad_()),
        r"diffkern\.learned_step_out: " + GRAD,
    ),
    "out shape": (
        lambda: call_out(out=torch.zeros(2, 3, 5)),
        r"x must have the shape of out \[2, 3, 5\], got \[2, 3, 4\]",
    ),
    "out expanded": (lambda: call_out(out=torch.zeros(2, 1, 4).expand(SHAPE)), r"out must not have stride 0"),
    "out over m": (
        lambda: call_out(m=BUFFER[:48].view(2, 6, 4), out=BUFFER[:24].view(SHAPE)),
        r"out must not overlap m in memory",
    ),
    "out partly x": (
        lambda: call_out(BUFFER[:24].view(SHAPE), out=BUFFER[8:32].view(SHAPE)),
        r"out must not overlap x in memory",
    ),
    "out is x0": (
        lambda: call_out(out=BUFFER[:24].view(SHAPE), x0=BUFFER[:24].view(SHAPE)),
        r"out must not overlap the output x0 in memory",
    ),
    "next shape": (
        lambda: call_out(next=torch.zeros(6, 3, 4)),
        r"next must have the shape of out \[2, 3, 4\], got \[6, 3, 4\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_one_clear_sentence(name: str) -> None:
    before = BUFFER.clone()
    check_sentence(*BAD[name])
    assert torch.equal(BUFFER, before), "an output was written before the check"


def test_gradients_are_no_obstacle_where_none_are_recorded() -> None:
    with torch.no_grad():
        out = ops.learned_step(X.clone().requires_grad_(), M, table=LAST)[0]
    assert not out.requires_grad
