"""The step of a network that learned its variance: against the reference and diffusers, its bits, what it reads."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from helpers.learned_cases import MASKED, RANGE, ROWS, table, twice
from helpers.op_cases import LAYOUTS, SHAPES, arrange, native_draws, same_bits, threads, values
from helpers.op_cases import table as step_table
from helpers.tolerances import STATE_DTYPES, check, coarser
from torch import Tensor

from diffkern import ops, reference
from diffkern.plan import COLUMNS

NAMES = ("out", "x0", "next")
SHAPES_WITH_CHANNELS = [shape for shape in SHAPES if len(shape) > 1]


TABLE = table(*ROWS.values())


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
