"""step_logprob: gradients, bits, compilation, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.logprob_cases import EULER, LEARNED, TABLE, doubled, operands, without
from helpers.op_cases import arrange, check_sentence, same_bits, threads, values
from helpers.op_cases import table as step_table
from torch import Tensor

from diffkern import ops
from diffkern.plan import COLUMNS


# --------------------------------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("row", [0, 1, 4, 5])
def test_gradcheck_with_guidance(row: int) -> None:
    given = operands((3, 2, 5), torch.float64, torch.float64)
    rest = without(given, "m", "m2")
    m, m2 = given["m"].requires_grad_(), given["m2"].requires_grad_()
    assert torch.autograd.gradcheck(lambda m, m2: ops.step_logprob(m=m, m2=m2, **rest, table=TABLE, row=row), (m, m2))
    both = torch.cat([m, m2]).detach().requires_grad_()
    index = torch.tensor([row, 2, 3])
    assert torch.autograd.gradcheck(lambda m: ops.step_logprob(m=m, **rest, table=TABLE, index=index), (both,))


def test_gradcheck_of_a_learned_variance() -> None:
    given = without(operands((4, 2, 5), torch.float64, torch.float64), "m", "m2")
    m, index = doubled((4, 2, 5), torch.float64).requires_grad_(), torch.arange(4)
    moderate = LEARNED.clone()
    moderate[1, len(COLUMNS)] = -1.0
    assert torch.autograd.gradcheck(lambda m: ops.step_logprob(m=m, **given, table=moderate, index=index), (m,))
    (grad,) = torch.autograd.grad(ops.step_logprob(m=m, **given, table=moderate, index=index).sum(), m)
    assert (grad[:3].abs() > 0).float().mean() > 0.9  # both halves, where x0 is not clipped


def test_only_m_has_a_gradient() -> None:
    given = operands((3, 2, 5), torch.float32, torch.float32)
    says = r"differentiable in m and m2 only, and after, x, a history or the table requires grad: detach it, or"
    for name in ("after", "x", "h2"):
        leaf = given | {name: given[name].clone().requires_grad_()}
        check_sentence(lambda leaf=leaf: ops.step_logprob(**leaf, table=TABLE), says)
        with torch.no_grad():
            ops.step_logprob(**leaf, table=TABLE)
    m = given["m"].clone().requires_grad_()
    value = ops.step_logprob(given["after"], given["x"], m, table=TABLE)
    with pytest.raises(RuntimeError, match=r"differentiable once only, use diffkern\.reference\.step_logprob"):
        torch.autograd.grad(value.sum(), m, create_graph=True)


def test_gradient_of_a_policy_ratio() -> None:
    """DDPO's clipped ratio: the gradient is the advantage times the score, where the ratio is 1."""
    given = operands((3, 2, 5), torch.float32, torch.float32)
    m, advantage = given["m"].clone().requires_grad_(), torch.tensor([1.0, -2.0, 0.5])
    old = ops.step_logprob(given["after"], given["x"], given["m"], table=TABLE)
    new = ops.step_logprob(given["after"], given["x"], m, table=TABLE)
    ratio = (new - old).exp()
    assert ratio.tolist() == [1.0, 1.0, 1.0]
    (grad,) = torch.autograd.grad((advantage * ratio).sum(), m)
    (score,) = torch.autograd.grad(ops.step_logprob(given["after"], given["x"], m, table=TABLE).sum(), m)
    torch.testing.assert_close(grad, advantage[:, None, None] * score)


# -------------------------------------------------------------------------------------------------------------- bits
def run(given: dict, rows: dict) -> tuple[Tensor, ...]:
    h = (given[f"h{k}"] for k in range(4))
    m2 = given.get("m2")
    results = torch.ops.diffkern.step_logprob(
        given["after"], given["x"], given["m"], m2, *h, rows["table"], 0, rows["index"], True
    )
    return tuple(t for t in results if t is not None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_bits_do_not_depend_on_threads_batch_or_layout(dtype: torch.dtype, learned: bool) -> None:
    shape = (4, 3, 131, 67)
    given = operands(shape, dtype, dtype)
    if learned:
        given = without(given, "m2") | {"m": doubled(shape, dtype)}
    rows = {"table": LEARNED if learned else TABLE, "index": torch.tensor([2, 0, 1, 3]) if learned else None}
    rows["index"] = torch.tensor([2, 0, 1, 3]) if learned else torch.tensor([4, 0, 3, 5])
    with threads(1):
        expected = run(given, rows)
    for n in (2, 3):
        with threads(n):
            assert all(same_bits(a, b) for a, b in zip(run(given, rows), expected, strict=True)), n
    for b in range(4):
        one = run({name: t[b : b + 1] for name, t in given.items()}, {**rows, "index": rows["index"][b : b + 1]})
        assert all(same_bits(a[0], e[b]) for a, e in zip(one, expected, strict=True)), b
    for layout in ("permuted", "sliced"):
        got = run({name: arrange(t, layout) for name, t in given.items()}, rows)
        assert all(same_bits(a, e) for a, e in zip(got, expected, strict=True)), layout


def test_channels_last_is_read_as_it_lies() -> None:
    """Memory order is another order of the sum: the gradient has the same bits, the value the last places differ."""
    shape = (2, 3, 37, 29)
    given = operands(shape, torch.float32, torch.float32)
    rows = {"table": TABLE, "index": torch.tensor([0, 4])}
    value, *grads = run(given, rows)
    other, *other_grads = run({name: arrange(t, "channels_last") for name, t in given.items()}, rows)
    assert all(g.is_contiguous(memory_format=torch.channels_last) for g in other_grads)
    assert all(same_bits(a, b) for a, b in zip(grads, other_grads, strict=True))
    torch.testing.assert_close(value, other, rtol=1e-6, atol=0)


# ----------------------------------------------------------------------------------------------------------- compile
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.full
def test_compile_and_export(learned: bool) -> None:
    shape = (3, 2, 5, 4)
    given = without(operands(shape, torch.float32, torch.float32), "m", "m2")
    m, rows = (doubled(shape, torch.float32), LEARNED) if learned else (values(shape, 7), TABLE[:2].contiguous())
    m.requires_grad_()
    index = torch.tensor([0, 1, 0])

    def loss(m: Tensor, index: Tensor) -> Tensor:
        return (
            ops.step_logprob(m=m * 2, **given, table=rows, index=index).exp().sum()
            + ops.step_logprob(m=m, **given, table=rows, row=1).mean()
        )

    compiled = torch.compile(loss, fullgraph=True)
    (expected,), (got,) = (torch.autograd.grad(f(m, index), m) for f in (loss, compiled))
    torch.testing.assert_close(got, expected)

    class Module(torch.nn.Module):
        def forward(self, m: Tensor, index: Tensor) -> Tensor:
            return loss(m, index)

    exported = torch.export.export(Module(), (m.detach(), index))
    assert same_bits(exported.module()(m.detach(), index), loss(m.detach(), index))


def test_a_row_by_number_stays_symbolic() -> None:
    """A loop over rows is compiled once more at most, then the row is a number of the graph."""
    given = operands((2, 3, 4), torch.float32, torch.float32)
    compiled = torch.compile(
        lambda m, row: ops.step_logprob(given["after"], given["x"], m, table=rows, row=row), fullgraph=True,
        backend="aot_eager", dynamic=True,
    )  # fmt: skip
    rows = step_table(*({**EULER, "g": 0.1 * k} for k in range(1, 6)))
    for row in range(5):
        expected = ops.step_logprob(given["after"], given["x"], given["m"], table=rows, row=row)
        assert same_bits(compiled(given["m"], row), expected)


# --------------------------------------------------------------------------------------------------------- bad input
def test_bad_input() -> None:
    given = operands((2, 3, 4), torch.float32, torch.float32)
    wide = torch.zeros(2, 6, 4)

    def call(**changes: object) -> object:
        base: dict = {**without(given, "m2", "h0", "h1", "h2", "h3"), "table": TABLE}
        return ops.step_logprob(**{**base, **changes})

    def rows(row: int = 0, source: Tensor = TABLE, **columns: float) -> Tensor:
        made = source[row : row + 1].clone()
        for name, value in columns.items():
            made[0, COLUMNS.index(name)] = value
        return made

    call()
    check_sentence(lambda: call(after=torch.zeros(())), r"after must have a batch dimension")
    check_sentence(
        lambda: call(after=given["after"].int()), r"after must be float64, float32, float16 or bfloat16, got"
    )
    check_sentence(lambda: call(x=torch.zeros(2, 3, 5)), r"x must have the shape of after \[2, 3, 4\], got \[2, 3, 5\]")
    check_sentence(lambda: call(x=given["x"].double()), r"x must have the dtype of after \(float32\), got float64")
    check_sentence(lambda: call(h3=given["x"].half()), r"h3 must have the dtype of after \(float32\), got float16")
    check_sentence(lambda: call(x=given["x"].to("meta")), r"x must be on the device of after \(cpu\), got meta")
    check_sentence(lambda: call(m=wide), r"m must have the shape of after \[2, 3, 4\], got \[2, 6, 4\]")
    check_sentence(lambda: call(m=given["m"].int()), r"m must be float64, float32, float16 or bfloat16, got int32")
    check_sentence(lambda: call(m2=torch.zeros(2, 3)), r"m2 must have the shape of after \[2, 3, 4\], got \[2, 3\]")
    check_sentence(lambda: call(m2=given["m"].half()), r"m2 must have the dtype of m \(float32\), got float16")
    check_sentence(lambda: call(m=None, m2=given["m"]), r"m must be given with m2, got None")
    shape = r"table must have shape \[rows, 21\], or \[rows, 23\] for a learned variance, got \[7, 20\]"
    check_sentence(lambda: call(table=TABLE[:, :20].contiguous()), shape)
    check_sentence(lambda: call(table=TABLE[0]), r"for a learned variance, got \[21\]")
    check_sentence(lambda: call(table=TABLE.float()), r"table must be float64, got float32")
    check_sentence(lambda: call(table=TABLE[:, ::1].t().contiguous().t()), r"table must be contiguous, got strides")
    check_sentence(lambda: call(row=7), r"row must be in \[0, 7\), the rows of the table, got 7")
    check_sentence(lambda: call(row=-1), r"row must be in \[0, 7\), the rows of the table, got -1")
    check_sentence(
        lambda: call(index=torch.tensor([0, 7])), r"index must be in \[0, 7\), the rows of the table, got 7 "
    )
    check_sentence(lambda: call(index=torch.tensor([0, -1])), r"index must be in \[0, 7\), .* got -1 for sample 1")
    check_sentence(lambda: call(index=torch.tensor([0, 1, 2])), r"index must have shape \[\] or \[2\], got \[3\]")
    check_sentence(lambda: call(index=torch.tensor([0.0, 1])), r"index must be int64 or int32, got float32")
    check_sentence(lambda: call(table=rows(r=0.5)), r"r must be 0 \(x0 must hold no noise\), got 0\.5 in row 0")
    check_sentence(lambda: call(table=rows(clip=0.0)), r"clip must be positive \(inf: no clipping\), got 0 in row 0")
    check_sentence(lambda: call(table=rows(g=math.inf)), r"g must be finite, got inf in row 0")
    check_sentence(lambda: call(table=rows(a=math.nan)), r"table must not hold NaN, got NaN in row 0, column 5")
    check_sentence(lambda: call(x=None), r"x must be given: the row has p = 1\.25")
    check_sentence(lambda: call(x=None, table=rows(1)), r"x must be given: the row has a = 1")
    check_sentence(lambda: call(m=None), r"m must be given: the row has q = -0\.75")
    check_sentence(lambda: call(m=None, table=rows(1)), r"m must be given: the row has d = -0\.3")
    check_sentence(lambda: call(row=5), r"h0 must be given: the row has e0 = 0\.1")
    guided = (
        r"m must hold two predictions for guidance \(a doubled batch \[uncond \| cond\], or m2\): the row has w = 2\.5"
    )
    check_sentence(lambda: call(row=2), guided)
    check_sentence(lambda: call(index=torch.tensor([0, 2])), guided)
    # learned variance
    learned = r"m must hold the prediction and its log-variance, twice the channels of after \[2, 3, 4\], got "
    check_sentence(lambda: call(table=LEARNED), learned + r"\[2, 3, 4\]")
    check_sentence(lambda: call(table=LEARNED, m=None), r"m must be given: the row has q = -0\.75")
    alone = torch.cat([step_table({"a": 1.0, "g": 1.0}), torch.tensor([[-1.0, 0.5]], dtype=torch.float64)], 1)
    check_sentence(lambda: call(table=alone, m=None), r"m must be given: the row has r1 = 0\.5")
    alone[0, -1] = math.inf
    check_sentence(lambda: call(table=alone, m=wide), r"r1 must be finite, got inf in row 0")
    check_sentence(lambda: call(table=LEARNED, m=torch.zeros(4, 6, 4)), learned + r"\[4, 6, 4\]")
    both = r"m2 must not be given where the variance is learned, got \[2, 3, 4\]"
    check_sentence(lambda: call(table=LEARNED, m=wide, m2=given["m"]), both)
    excess = r"w, r, e0 \.\. e3, A, B and D must be 0 in a row with learned variance, got 1\.5 in row 0, column "
    for column, name in ((0, "w"), (9, "e1")):
        bad = rows(0, LEARNED, **{name: 1.5})
        check_sentence(lambda bad=bad: call(table=bad, m=wide), excess + str(column))
    native = torch.ops.diffkern.step_logprob
    nothing = (None,) * 6
    check_sentence(
        lambda: native(given["after"], given["x"], None, *nothing[:5], TABLE, 3, None, True),
        r"m must be given where a gradient is asked for, got None",
    )
