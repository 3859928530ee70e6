"""Plans of learned variance: the model's second half of the channels sets the noise, element by element."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from helpers.sampling_cases import PLANS, SEEDS, SHAPE, network
from torch import Tensor

from diffkern import ops, samplers, schedules
from diffkern.plan import Plan, Row
from diffkern.sampling import initial, sample

COSINE = schedules.cosine()
LEARNED = samplers.ddpm(COSINE, 12, variance="learned", clip=0.9)


def with_variance(v: float | None = None):
    """The network with a second half of the channels: v everywhere, or something of its own."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        eps = network(x, t)
        return torch.cat([eps, torch.sin(3.0 * x) if v is None else torch.full_like(x, v)], 1)

    return model


def slowly(plan: Plan, model, x: Tensor) -> Tensor:
    """The lecture's formula (000, 002): mu~ + sqrt(exp(v ln beta + (1 - v) ln beta_tilde)) z, v = (o + 1)/2."""
    times = [int(row.time) for row in plan.rows]
    for i, (t, s) in enumerate(zip(times, [*times[1:], -1], strict=True)):
        eps, out = model(x, torch.full((len(x),), t)).chunk(2, 1)
        abar, before = float(COSINE.abar(t)), float(COSINE.abar(s))
        beta = 1.0 - abar / before
        x0 = ((x - math.sqrt(1 - abar) * eps) / math.sqrt(abar)).clamp(-0.9, 0.9)
        mean = math.sqrt(before) * beta / (1 - abar) * x0 + math.sqrt(abar / before) * (1 - before) / (1 - abar) * x
        if s < 0:
            return mean
        tilde = (1 - before) / (1 - abar) * beta
        v = (out + 1) / 2
        std = torch.exp(0.5 * (v * math.log(beta) + (1 - v) * math.log(tilde)))
        x = mean + std * ops.randn(SHAPE, SEEDS, plan.rows[i].stream, dtype=torch.float64)
    raise AssertionError("the last step ends on data")


def test_is_the_formula():
    x = initial(LEARNED, SHAPE, SEEDS, torch.float64)
    model = with_variance()
    torch.testing.assert_close(sample(model, x, LEARNED, seeds=SEEDS), slowly(LEARNED, model, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("v", "variance"), [(1.0, "beta"), (-1.0, "beta_tilde"), (0.0, 0.5)])
def test_constant_outputs_are_the_fixed_variances(v, variance):
    fixed = samplers.ddpm(COSINE, 12, variance=variance, clip=0.9)
    x = initial(LEARNED, SHAPE, SEEDS, torch.float64)
    got = sample(with_variance(v), x, LEARNED, seeds=SEEDS)
    torch.testing.assert_close(got, sample(network, x, fixed, seeds=SEEDS), rtol=1e-9, atol=1e-9)


def test_everything_else_of_a_run():
    """Trajectory, callback, mask, starts, noise tensors, a sample alone: as with any plan."""
    model, x = with_variance(), initial(LEARNED, SHAPE, SEEDS)
    known = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(known.numel()).reshape(SHAPE) % 2).bool()
    seen = []
    got = sample(
        model, x, LEARNED, seeds=SEEDS, mask=mask, known=known, trajectory=True,
        callback=lambda info: seen.append(info["x0"].clone()),
    )  # fmt: skip
    assert len(seen) == 12
    assert max(float(x0.abs().max()) for x0 in seen) <= 0.9 + 1e-6
    for i, row in enumerate(LEARNED.rows):
        z = ops.randn(SHAPE, SEEDS, row.known_stream)
        noised = row.known_s * known.double() + row.known_n * z.double()
        torch.testing.assert_close(
            torch.where(mask, 0.0, got.trajectory[i + 1]), torch.where(mask, 0.0, noised.float()), rtol=1e-6, atol=1e-6
        )
    plain = sample(model, x, LEARNED, seeds=SEEDS)
    drawn = [ops.randn(SHAPE, SEEDS, row.stream) for row in LEARNED.rows if row.draws]
    assert torch.equal(sample(model, x, LEARNED, noise=drawn), plain)
    start = torch.tensor([2, 0, 5])
    late = sample(model, x, LEARNED, seeds=SEEDS, start=start)
    for b in range(3):
        one = slice(b, b + 1)
        assert torch.equal(sample(model, x[one], LEARNED, seeds=SEEDS[one]), plain[one])
        assert torch.equal(sample(model, x[one], LEARNED, seeds=SEEDS[one], start=int(start[b])), late[one])


def test_logprob_is_that_of_the_learned_gaussian():
    model, x = with_variance(), initial(LEARNED, SHAPE, SEEDS, torch.float64)
    got = sample(model, x, LEARNED, seeds=SEEDS, trajectory=True, logprob=True)
    for i, row in enumerate(LEARNED.rows[:-1]):
        before = got.trajectory[i]
        out = model(before, torch.full((3,), row.time, dtype=torch.int64)).chunk(2, 1)[1]
        std = torch.exp(0.5 * (row.r0 + row.r1 * out))
        z = ops.randn(SHAPE, SEEDS, row.stream, dtype=torch.float64)
        want = torch.distributions.Normal(0.0, std).log_prob(std * z).flatten(1).sum(1)
        torch.testing.assert_close(got.logprob[i], want, rtol=1e-9, atol=1e-7)
    assert torch.equal(got.logprob[-1], torch.zeros(3, dtype=torch.float64))


def test_json_and_print():
    assert Plan.from_json(LEARNED.to_json()) == LEARNED
    assert "learned variance" in str(LEARNED)


def test_bad_input_says_what_is_wrong():
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match=r"model must return .* shape \[3, 4, 5, 4\], got shape \[3, 2, 5, 4\]"):
        sample(network, x, LEARNED, seeds=SEEDS)
    with pytest.raises(ValueError, match=r"row 0: w, .* must be 0 in a plan with learned_variance .* got w = 2\.0"):
        LEARNED.with_guidance(2.0)
    with pytest.raises(ValueError, match=r"row 0: every row of a plan with learned_variance calls the model"):
        Plan("noise", (Row(a=1.0, calls_model=False),), learned_variance=True)
    with pytest.raises(ValueError, match=r"learned variance needs x of shape \[B, C, \.\.\.\], got \[3\]"):
        sample(network, torch.zeros(3), replace(LEARNED, name="flat"), seeds=SEEDS)
    assert not PLANS["ddpm"].learned_variance
