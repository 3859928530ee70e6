"""Plans with dynamic thresholding: x0 -> clamp(x0, -s, s)/s with s a quantile of each sample's abs(x0)."""

from __future__ import annotations

import pytest
import torch
from helpers.op_counter import CountOps
from helpers.sampling_cases import SEEDS, SHAPE, network
from torch import Tensor

from diffkern import ops, samplers, schedules
from diffkern.plan import Plan
from diffkern.sampling import initial, sample

LINEAR = schedules.linear()
PLANS = {
    "ddpm": samplers.ddpm(LINEAR, 10, clip=1.0).with_threshold(0.9),
    "ddim": samplers.ddim(LINEAR, 10, clip=1.0).with_threshold(0.8, 1.5),
    "euler": samplers.euler(LINEAR, 8, clip=1.0).with_threshold(0.9),
    "heun": samplers.heun(LINEAR, 6, clip=1.0).with_threshold(0.9, 2.0),
    "dpmpp_2m": samplers.dpmpp_2m(LINEAR, 8).with_threshold(0.95),
    "dpmpp_2m_sde": samplers.dpmpp_2m_sde(LINEAR, 8).with_threshold(0.95),
    "unipc": samplers.unipc(LINEAR, 8).with_threshold(0.95),
}


def loud(x: Tensor, t: Tensor) -> Tensor:
    """Estimates of x0 far outside [-1, 1], so that the threshold works."""
    return 2.0 * network(x, t) - 0.7 * x


def slowly(plan: Plan, model, x: Tensor) -> Tensor:
    """The rows one at a time with torch.quantile between the estimate and the step."""
    quantile, maximum = plan.threshold
    histories: dict[int, Tensor] = {}
    scale = plan.first_k
    for row in plan.rows:
        m = model(scale * x, torch.full((len(x),), row.time))
        x0 = row.p * x + row.q * m
        s = torch.quantile(x0.abs().flatten(1), quantile, dim=1).clamp(min=1.0, max=maximum)
        s = s.reshape(-1, *[1] * (x.ndim - 1))
        x0 = x0.clamp(-s, s) / s
        new = row.a * x + row.b * x0
        for slot, e in enumerate((row.e0, row.e1, row.e2, row.e3)):
            new = new + e * histories[slot] if e else new
        if row.g:
            new = new + row.g * ops.randn(SHAPE, SEEDS, row.stream, dtype=torch.float64)
        made = {"x": x, "x0": x0, "s": row.A * x + row.B * x0}
        histories |= {slot: made[source] for slot, source in row.saves}
        x, scale = new, row.k
    return x


@pytest.mark.parametrize("name", PLANS)
def test_is_the_formula(name):
    plan = PLANS[name]
    x = initial(plan, SHAPE, SEEDS, torch.float64)
    got, want = sample(loud, x, plan, seeds=SEEDS), slowly(plan, loud, x)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # times are float32
    assert not torch.allclose(
        got, sample(loud, x, Plan(plan.name, plan.rows, plan.init_scale, plan.first_k), seeds=SEEDS)
    )


@pytest.mark.parametrize("name", PLANS)
def test_a_sample_does_not_see_its_batch(name):
    plan = PLANS[name]
    x = initial(plan, SHAPE, SEEDS)
    together = sample(loud, x, plan, seeds=SEEDS)
    for b in range(3):
        assert torch.equal(sample(loud, x[b : b + 1], plan, seeds=SEEDS[b : b + 1])[0], together[b])


def test_a_maximum_of_one_is_a_clip():
    clipped = samplers.ddim(LINEAR, 10, clip=1.0)
    x = initial(clipped, SHAPE, SEEDS)
    got = sample(loud, x, clipped.with_threshold(0.995, 1.0))
    torch.testing.assert_close(got, sample(loud, x, clipped), rtol=1e-5, atol=1e-5)


def test_guidance_comes_before_the_threshold():
    plan = PLANS["ddim"]
    x, cond, uncond = initial(plan, SHAPE, SEEDS, torch.float64), torch.ones(3), torch.zeros(3)

    def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        return loud(x, t) + 0.2 * c.reshape(-1, 1, 1, 1).to(x.dtype)

    def guided(x: Tensor, t: Tensor) -> Tensor:
        u, c = model(x, t, uncond), model(x, t, cond)
        return u + 3.0 * (c - u)

    got = sample(model, x, plan, cond=cond, uncond=uncond, guidance=3.0)
    torch.testing.assert_close(got, slowly(plan, guided, x), rtol=1e-6, atol=1e-6)
    weights = [1.0] * 5 + [3.0] * 5
    assert torch.isfinite(sample(model, x, plan, cond=cond, uncond=uncond, guidance=weights)).all()


def test_with_a_learned_variance():
    plan = samplers.ddpm(LINEAR, 10, variance="learned", clip=1.0).with_threshold(0.9)
    fixed = samplers.ddpm(LINEAR, 10, variance="beta", clip=1.0).with_threshold(0.9)
    x = initial(plan, SHAPE, SEEDS, torch.float64)
    got = sample(lambda x, t: torch.cat([loud(x, t), torch.ones_like(x)], 1), x, plan, seeds=SEEDS)
    torch.testing.assert_close(got, sample(loud, x, fixed, seeds=SEEDS), rtol=1e-9, atol=1e-9)


def test_a_learned_variance_of_another_dtype():
    plan = samplers.ddpm(LINEAR, 4, variance="learned", clip=1.0).with_threshold(0.9)
    x = initial(plan, SHAPE, SEEDS)
    want = sample(lambda x, t: torch.cat([loud(x, t), x], 1), x, plan, seeds=SEEDS)
    got = sample(lambda x, t: torch.cat([loud(x, t), x], 1).bfloat16(), x, plan, seeds=SEEDS)
    torch.testing.assert_close(got, want, rtol=0.1, atol=0.1)
    assert sample(lambda x, t: torch.cat([x, x], 1).bfloat16(), x[:0], plan, seeds=SEEDS[:0]).shape == (0, *SHAPE[1:])


def test_three_ops_a_model_call():
    plan = PLANS["ddim"]
    x = initial(plan, SHAPE, SEEDS)
    with CountOps(SHAPE) as counted:
        sample(lambda x, _t: x, x, plan)
    assert counted.fused == {"step_out": 20, "dynamic_threshold_out": 10}
    assert sum(n for name, n in counted.large.items() if not name.startswith(("empty", "new_empty"))) == 0


def test_json_print_and_bad_input():
    for plan in PLANS.values():
        assert Plan.from_json(plan.to_json()) == plan
    assert "threshold 0.8 up to 1.5" in str(PLANS["ddim"])
    with pytest.raises(ValueError, match=r"row 0: a threshold needs a row that reads the model through x0 alone"):
        samplers.ddim(LINEAR, 10).with_threshold(0.9)
    with pytest.raises(ValueError, match=r"quantile of a threshold must lie in \[0, 1\], got 1\.5"):
        PLANS["ddim"].with_threshold(1.5)
    with pytest.raises(ValueError, match=r"maximum of a threshold must be a finite number >= 1, or None, got 0\.5"):
        PLANS["ddim"].with_threshold(0.9, 0.5)
