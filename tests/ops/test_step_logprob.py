"""The log-density of a step: against torch.distributions and the reference, its gradients, its bits, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.op_cases import EVERYTHING, LAYOUTS, SHAPES, arrange, check_sentence, same_bits, threads, values
from helpers.op_cases import table as step_table
from helpers.tolerances import STATE_DTYPES, check, coarser
from torch import Tensor
from torch.distributions import Normal

from diffkern import ops, reference, samplers, schedules
from diffkern.plan import COLUMNS

DDPM = {"p": 1.25, "q": -0.75, "clip": 1.0, "a": 0.3, "b": 0.6, "g": 0.2}
EULER = {"a": 1.0, "d": -0.3, "g": 0.7}
GUIDED = {"p": 1.25, "q": -0.75, "b": 0.875, "d": 0.5, "w": 2.5, "g": 0.4}
SILENT = {**DDPM, "g": 0.0}
ALL = {**{k: v for k, v in EVERYTHING.items() if k != "r"}, "g": 0.5}
HISTORIES = {"a": 0.5, "e0": 0.1, "e1": -0.2, "e2": 0.3, "e3": -0.4, "g": -1.3}
TABLE = step_table(DDPM, EULER, GUIDED, SILENT, ALL, HISTORIES, {"p": 0.7, "b": 0.2, "g": 1e-3})
PLAIN = {**{k: v for k, v in ALL.items() if k not in ("w", "e0", "e1", "e2", "e3", "A", "B", "D")}, "clip": 0.8}
LEARNED = torch.cat(
    [
        step_table(DDPM, {**EULER, "g": 1.0}, PLAIN, SILENT),
        torch.tensor([[-0.3, 0.5], [-8.5, 0.9], [0.2, -0.3], [-1.0, 1.0]], dtype=torch.float64),
    ],
    dim=1,
)


def operands(shape: tuple[int, ...], dtype: torch.dtype, m_dtype: torch.dtype, layout: str = "contiguous") -> dict:
    """Everything that a row of TABLE may read: after and m apart by some standard deviations, so that both matter."""
    names = {name: values(shape, k, dtype, layout) for k, name in enumerate(("after", "x", "h0", "h1", "h2", "h3"))}
    return {**names, "m": values(shape, 7, m_dtype, layout), "m2": values(shape, 8, m_dtype, layout)}


def doubled(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous", seed: int = 7) -> Tensor:
    """A prediction with a variance beside the mean."""
    return values((shape[0], 2 * shape[1], *shape[2:]), seed, dtype, layout)


def without(given: dict, *names: str) -> dict:
    return {name: t for name, t in given.items() if name not in names}


# ------------------------------------------------------------------------------------------------ torch.distributions
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 2e-6)], ids=str)
def test_is_the_log_prob_of_a_normal(dtype: torch.dtype, rtol: float) -> None:
    shape = (5, 3, 17, 19)
    given = operands(shape, dtype, dtype)
    after, x, m = (given[name].double() for name in ("after", "x", "m"))
    x0 = (1.25 * x - 0.75 * m).clamp(-1, 1)
    expected = Normal(0.3 * x + 0.6 * x0, 0.2).log_prob(after).flatten(1).sum(1)
    got = ops.step_logprob(given["after"], given["x"], given["m"], table=TABLE)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=rtol, atol=0)


def test_learned_variance_is_a_normal_of_its_own_in_every_element() -> None:
    shape = (3, 2, 11, 7)
    given, m = operands(shape, torch.float64, torch.float64), doubled(shape, torch.float64)
    mean, v = m.chunk(2, dim=1)
    std = torch.exp((-8.5 + 0.9 * v) / 2)
    after = given["x"] - 0.3 * mean + std * given["h0"]
    expected = Normal(given["x"] - 0.3 * mean, std).log_prob(after).flatten(1).sum(1)
    got = ops.step_logprob(after, given["x"], m, table=LEARNED, row=1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)


def test_of_a_sample_that_the_step_made() -> None:
    """What `step` draws has the density that this op states: log p = sum ln N(z; 0, 1) - N ln g."""
    shape, z = (4, 3, 32, 32), values((4, 3, 32, 32), 9, torch.float64)
    given = operands(shape, torch.float64, torch.float64)
    after = ops.step(given["x"], given["m"], table=TABLE, noise=z)[0]
    expected = Normal(0.0, 1.0).log_prob(z.double()).flatten(1).sum(1) - z[0].numel() * math.log(0.2)
    torch.testing.assert_close(ops.step_logprob(after, given["x"], given["m"], table=TABLE), expected)


def test_every_row_of_a_plan_integrates_to_one() -> None:
    """exp(L) over a grid of next states of one element, for the rows of DDPM (beta-tilde, its last row silent)."""
    plan = samplers.ddpm(schedules.linear(), 5)
    rows = plan.table
    x, m = torch.tensor([[0.4]], dtype=torch.float64), torch.tensor([[-0.3]], dtype=torch.float64)
    for row in range(len(rows)):
        mean = ops.step(x, m, table=rows * torch.tensor([name != "g" for name in COLUMNS]), row=row)[0]
        g = float(rows[row, COLUMNS.index("g")])
        if g == 0:
            assert ops.step_logprob(mean, x, m, table=rows, row=row).tolist() == [0.0]
            continue
        grid = mean + g * torch.linspace(-9, 9, 2001, dtype=torch.float64)[:, None]
        density = ops.step_logprob(grid, x.expand(2001, 1), m.expand(2001, 1), table=rows, row=row).exp()
        assert float(density.sum()) * 18 * g / 2000 == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("g", [1e-3, 0.37, 50.0])
def test_float32_sum_of_a_large_image(learned: bool, g: float) -> None:
    """3 x 256 x 256: the value in float32 is as good as float32 can state it, a few units in the last place."""
    shape = (2, 3, 256, 256)
    x, m, z = (values(shape, k) for k in range(3))
    rows = step_table({"a": 0.3, "d": 0.5, "g": g})
    model = m
    if learned:
        rows = torch.cat([rows, torch.tensor([[-0.4, 0.7]], dtype=torch.float64)], 1)
        model = torch.cat([m, values(shape, 5).tanh()], 1)
    after = ops.step(x, m, table=step_table({"a": 0.3, "d": 0.5, "g": g}), noise=z)[0]
    exact = reference.step_logprob(after, x, model, table=rows)
    got = ops.step_logprob(after, x, model, table=rows)
    # The mean is rounded to float32 (some 1e-7 of x), which moves L by that over g an element, at random.
    rounding = 1e-7 / g * math.sqrt(x[0].numel())
    assert ((got.double() - exact).abs() <= 4e-7 * exact.abs() + 3 * rounding).all(), (got, exact)
    if g == 0.37:
        torch.testing.assert_close(got.double(), exact, rtol=3e-7, atol=0)


# --------------------------------------------------------------------------------------------------------- reference
@pytest.mark.parametrize("shape", [s for s in SHAPES if 0 not in s], ids=str)
@pytest.mark.parametrize("dtype", STATE_DTYPES, ids=str)
def test_against_the_reference(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Value and gradient for rows of every kind, every layout, and a prediction of every dtype."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    index = torch.arange(shape[0]) * 3 % len(TABLE)
    for k, layout in enumerate(LAYOUTS):
        m_dtype = STATE_DTYPES[(STATE_DTYPES.index(dtype) + k) % 4]
        given = operands(shape, dtype, m_dtype, layout)
        compare_with_reference(given, {"table": TABLE, "index": index.roll(k)}, wide, f"{shape}, {layout}")
        if len(shape) > 1:
            given = without(given, "m2") | {"m": doubled(shape, m_dtype, layout)}
            compare_with_reference(given, {"table": LEARNED, "index": index % 4}, wide, f"learned, {shape}, {layout}")


def compare_with_reference(given: dict, rows: dict, wide: torch.dtype, what: str) -> None:
    leaves = [name for name in ("m", "m2") if name in given]
    results = []
    for compute in (None, torch.float64, wide):
        mine = {name: t if name not in leaves else t.detach().to(compute or t.dtype) for name, t in given.items()}
        for name in leaves:
            mine[name].requires_grad_()
        value = ops.step_logprob(**mine, **rows) if compute is None else None
        if value is None:
            value = reference.step_logprob(**mine, **rows, compute=compute)
        grads = torch.autograd.grad(value.sum(), [mine[name] for name in leaves], allow_unused=True)
        grads = [torch.zeros_like(mine[n]) if g is None else g for n, g in zip(leaves, grads, strict=True)]
        results.append((value, *grads))
    assert results[0][0].dtype == wide
    for k, (ours, exact, plain) in enumerate(zip(*results, strict=True)):
        dtype = coarser(wide, given[leaves[k - 1]].dtype) if k else wide
        if dtype == torch.float64:
            atol = 1e-13 * float(exact.detach().abs().max())
            torch.testing.assert_close(ours, exact, rtol=0, atol=atol, msg=lambda text: f"{what}: {text}")
        else:
            check(ours, exact, plain, f"{what}, output {k}", dtype)


def test_two_halves_of_a_doubled_batch_are_m_and_m2() -> None:
    shape = (3, 2, 5, 4)
    given = operands(shape, torch.float32, torch.bfloat16)
    both = torch.cat([given["m"], given["m2"]]).requires_grad_()
    m, m2 = given["m"].requires_grad_(), given["m2"].requires_grad_()
    rest = without(given, "m", "m2")
    one = ops.step_logprob(m=both, **rest, table=TABLE, row=4)
    two = ops.step_logprob(m=m, m2=m2, **rest, table=TABLE, row=4)
    assert same_bits(one, two)
    weights = torch.tensor([0.5, 0.0, -3.0])
    (grad,) = torch.autograd.grad(one, both, weights)
    assert same_bits(grad, torch.cat(torch.autograd.grad(two, (m, m2), weights)))
    assert grad[:3].abs().max() > 0
    assert grad[3:].abs().max() > 0


# ------------------------------------------------------------------------------------------------------- rows, index
def test_without_noise_it_is_exactly_zero() -> None:
    """g = 0: 0.0, gradient 0, and nothing is read, NaN or not there at all."""
    after = torch.full((2, 3, 5), math.nan)
    m = torch.full((2, 3, 5), math.nan, requires_grad=True)
    value = ops.step_logprob(after, after, m, table=TABLE, row=3)
    assert value.tolist() == [0.0, 0.0]
    assert not value.signbit().any()
    assert torch.autograd.grad(value.sum(), m)[0].abs().max() == 0
    assert ops.step_logprob(after, None, None, table=TABLE, row=3).tolist() == [0.0, 0.0]
    wide = torch.full((2, 6, 5), math.nan, requires_grad=True)
    learned = ops.step_logprob(after, after, wide, table=LEARNED, row=3)
    assert learned.tolist() == [0.0, 0.0]
    assert torch.autograd.grad(learned.sum(), wide)[0].abs().max() == 0


def test_nan_stays_nan() -> None:
    given = operands((3, 2, 5, 4), torch.float32, torch.float32)
    given["after"][1, 0, 2, 2] = math.nan
    got = ops.step_logprob(given["after"], given["x"], given["m"], table=TABLE)
    assert got.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("index", [torch.tensor([4, 0, 3, 6]), torch.tensor([4, 0, 3, 6], dtype=torch.int32)], ids=str)
def test_a_row_for_each_sample(index: Tensor) -> None:
    given = operands((4, 2, 5, 4), torch.float32, torch.float32)
    got = ops.step_logprob(**given, table=TABLE, index=index)
    rows = [ops.step_logprob(**given, table=TABLE, row=int(r))[b] for b, r in enumerate(index)]
    assert same_bits(got, torch.stack(rows))
    one = ops.step_logprob(**given, table=TABLE, index=index[1])
    assert same_bits(one, ops.step_logprob(**given, table=TABLE, row=int(index[1])))


def test_empty() -> None:
    assert ops.step_logprob(torch.zeros(0, 3), torch.zeros(0, 3), torch.zeros(0, 3), table=TABLE).shape == (0,)
    none = torch.zeros(2, 0, 3)
    assert ops.step_logprob(none, none, none, table=TABLE).tolist() == [0.0, 0.0]  # an empty product of densities


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
    says = r"differentiable in m and m2 only, and after, x or a history requires grad: detach it, or use diffkern\.refe"
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
    leaf = given["m"].clone().requires_grad_()
    native = torch.ops.diffkern.step_logprob
    nothing = (None,) * 6
    check_sentence(
        lambda: native(given["after"], given["x"], None, *nothing[:5], TABLE, 3, None, True),
        r"m must be given where a gradient is asked for, got None",
    )
    value = native(given["after"], given["x"], leaf, *nothing[:5], TABLE, 0, None, False)[0]
    check_sentence(lambda: value.sum().backward(), r"want_grad must be true where a gradient is asked for")
