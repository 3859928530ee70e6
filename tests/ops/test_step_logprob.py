"""The log-density of a step: against torch.distributions and the reference, its gradients, its bits, bad input."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.logprob_cases import LEARNED, TABLE, doubled, operands, without
from helpers.op_cases import LAYOUTS, SHAPES, same_bits, values
from helpers.op_cases import table as step_table
from helpers.tolerances import STATE_DTYPES, check, coarser
from torch import Tensor
from torch.distributions import Normal

from diffkern import ops, reference, samplers, schedules
from diffkern.plan import COLUMNS


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
