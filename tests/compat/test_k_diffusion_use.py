"""compat.k_diffusion in use: dtypes, callbacks, one op a model call, batches, limits of the churn, bad input."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from helpers.k_diffusion_cases import (
    ALL,
    ANCESTRAL,
    CHURN,
    SDE,
    STEP,
    Network,
    error,
    levels,
    needs_k_diffusion,
    run,
    start,
    theirs,
)
from helpers.op_counter import EveryOp
from torch import Tensor

from diffkern.compat import k_diffusion as ours

pytestmark = needs_k_diffusion


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse(name: str, dtype: torch.dtype) -> None:
    """Deterministic options, the same model outputs: the distance from float64 is at most the original's."""
    x, sigmas = start(dtype, (4, 3, 16, 16)), levels()
    options: dict[str, Any] = {} if "eta" not in inspect.signature(getattr(ours, f"sample_{name}")).parameters else {
        "eta": 0.0
    }  # fmt: skip
    # Levels that half precision rounds alike, so that only the arithmetic of the state is compared.
    sigmas = torch.cat([sigmas[:-1].to(dtype).float().unique().flip(0), sigmas[-1:]])

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.double().reshape(-1, 1, 1, 1)
        return (x.double() / (1 + level**2).sqrt()).to(x.dtype)

    exact = run(ours, name, x.double(), sigmas.double(), model=network, **options)[0]
    off = [run(m, name, x, sigmas, model=network, **options)[0] for m in (ours, theirs)]
    assert off[0].dtype == off[1].dtype
    rms = [float((o.double() - exact).square().mean().sqrt()) for o in off]
    assert rms[0] <= 1.05 * rms[1]


def test_a_wider_model_widens_the_state() -> None:
    x, sigmas = start(torch.float16), levels()

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        return Network()(x.float(), sigma.float())

    for name in ("heun", "dpmpp_2m", "lms"):
        want, found = (run(module, name, x, sigmas, model=network)[0] for module in (theirs, ours))
        assert found.dtype == want.dtype == torch.float32
        assert error(found, want) <= 1e-3  # the original multiplies its first state in float16


@pytest.mark.parametrize("name", ALL)
def test_callbacks_may_keep_what_they_see(name: str) -> None:
    x, sigmas = start(), levels()
    before = x.clone()
    kept: list[Tensor] = []
    copies: list[Tensor] = []

    def callback(found: dict[str, Any]) -> None:
        for key in ("x", "denoised"):
            kept.append(found[key])
            copies.append(found[key].clone())

    options = {"noise_sampler": lambda s, t: torch.randn_like(x)} if name in SDE else {}
    getattr(ours, f"sample_{name}")(Network(), x, sigmas, callback=callback, disable=True, **options)
    assert torch.equal(x, before)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_one_op_a_model_call(name: str) -> None:
    """Between two model calls: one step op, the noise, no arithmetic on numbers and no device read."""
    x, sigmas = start(), levels()
    m = torch.randn_like(x)
    calls = 0

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return m

    function = getattr(ours, f"sample_{name}")
    z = torch.randn_like(x)
    options = {"noise_sampler": lambda s, t: z} if name in SDE else {}
    function(network, x, sigmas, disable=True, **options)  # makes the plan
    calls = 0
    with EveryOp() as counted:
        function(network, x, sigmas, disable=True, **options)
    ops = counted.counts
    assert ops.pop("diffkern.step") == calls
    assert ops.pop("aten.randn_like", 0) == (
        0 if name not in (*CHURN, *ANCESTRAL) else len(sigmas) - 1 - (name in ANCESTRAL)
    )
    assert sum(count for op, count in ops.items() if "item" in op or "local_scalar" in op) == 0
    # What is left is made once a run, whatever the number of steps: levels, and views of them.
    assert set(ops) <= {
        "aten._to_copy",
        "aten.clone",
        "aten.unbind",
        "aten.unsqueeze",
        "aten.repeat",
        "aten.lift_fresh",
        "aten.detach",
        "aten.promote_types",
    }, ops
    assert sum(ops.values()) < 16, ops


def test_bits_do_not_depend_on_the_batch() -> None:
    x, sigmas = start(shape=(3, 2, 6, 5)), levels()
    for name in ALL:
        options = {"noise_sampler": lambda s, t: torch.zeros(1)} if name in SDE else {}
        if name in (*ANCESTRAL, *SDE):
            options = {"eta": 0.0}
        whole = getattr(ours, f"sample_{name}")(Network(), x, sigmas, disable=True, **options)
        alone = getattr(ours, f"sample_{name}")(Network(), x[1:2], sigmas, disable=True, **options)
        assert torch.equal(whole[1:2], alone), name


def test_limits_of_the_churn_are_compared_in_the_dtype_of_sigmas() -> None:
    """0.3 in float32 is above 0.3: k-diffusion finds the level inside, comparing with a number."""
    x, sigmas = start(), torch.tensor([2.0, 0.3, 0.1, 0.0])
    for limit in ({"s_tmax": 0.3}, {"s_tmin": 0.3}, {"s_tmax": 0.1}):
        want, found = (run(m, "euler", x, sigmas, s_churn=1.0, **limit)[0] for m in (theirs, ours))
        assert error(found, want) <= 1e-5


@pytest.mark.parametrize("name", CHURN)
@pytest.mark.parametrize("limits", [{"s_tmin": 5.0, "s_tmax": 1.0}, {"s_tmax": -1.0}, {"s_tmin": -1.0, "s_tmax": 5.0}])
def test_limits_between_which_no_level_lies_make_no_churn(name: str, limits: dict[str, float]) -> None:
    results = []
    for module in (theirs, ours):
        torch.manual_seed(4)
        results.append((run(module, name, start(), levels(), s_churn=4.0, **limits)[0], torch.rand(1).item()))
    assert error(results[1][0], results[0][0]) <= 9 * STEP[torch.float32]
    assert results[1][1] == results[0][1]


def test_no_gradient_is_recorded() -> None:
    x = start().requires_grad_()
    assert not ours.sample_euler(Network(), x, levels(), disable=True).requires_grad


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    ours.sample_euler(Network(), start(), levels(), disable=False)
    assert "9/9" in capsys.readouterr().err
    ours.sample_euler(Network(), start(), levels(), disable=True)
    assert capsys.readouterr().err == ""


def test_bad_input() -> None:
    x, sigmas = start(), levels()
    for bad, message in (
        (sigmas.tolist(), r"sigmas must be a tensor \[steps \+ 1\], got list"),
        (sigmas[None], r"sigmas must be a tensor \[steps \+ 1\], got shape \[1, 10\]"),
        (sigmas.flip(0), "sigmas must fall strictly"),
        (torch.tensor([1.0, 0.5, 0.5, 0.0]), r"sigmas must fall strictly.*sigmas\[1\] = 0.5 and sigmas\[2\] = 0.5"),
        (torch.tensor([1.0, math.nan, 0.0]), r"sigmas must be finite, got sigmas\[1\] = nan"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.sample_euler(Network(), x, bad, disable=True)
    with pytest.raises(
        ValueError, match=r"model must return a tensor of shape \[2, 3, 5, 7\], got shape \[2, 6, 5, 7\]"
    ):
        ours.sample_heun(lambda x, s: torch.cat([x, x], 1), x, sigmas, disable=True)
    with pytest.raises(ValueError, match=r"model must return a tensor of shape .*, got NoneType"):
        ours.sample_heun(lambda x, s: None, x, sigmas, disable=True)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="churn must be a finite number >= 0, got -1"):
        ours.sample_euler(Network(), x, sigmas, disable=True, s_churn=-1.0)
    with pytest.raises(ValueError, match="eta must be a finite number"):
        ours.sample_euler_ancestral(Network(), x, sigmas, disable=True, eta=-1.0)
    for options, message in (
        ({"eta": -1.0}, "eta must be a finite number of at least 0, got -1"),
        ({"s_noise": math.nan}, "s_noise must be a finite number of at least 0, got nan"),
        ({"r": 0.0}, "r must be a finite number of at least 1e-06, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.sample_dpmpp_sde(Network(), x, sigmas, disable=True, **options)
    with pytest.raises(ValueError, match="solver_type must be 'heun' or 'midpoint'"):
        ours.sample_dpmpp_2m_sde(Network(), x, sigmas, disable=True, solver_type="rk4")
    with pytest.raises(ValueError, match=r"order must be an integer in 1\.\.5, got 6"):
        ours.sample_lms(Network(), x, sigmas, disable=True, order=6)
