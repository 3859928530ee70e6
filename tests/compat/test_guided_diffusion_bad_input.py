"""compat.guided_diffusion's spacings and schedules, and what it refuses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.guided_diffusion_runs import (
    make,
    network,
    spaced,
    state,
)

from diffkern.compat import guided_diffusion as gd


def test_bad_input() -> None:
    x, t, model = state(), torch.tensor([9, 0, 4, 1]), network()
    d = make()
    for betas, message in (
        ([[0.1]], r"betas must be 1-D and not empty, got shape \[1, 1\]"),
        ([], "betas must be 1-D and not empty"),
        ([0.1, 0.0], r"betas must lie in \(0, 1\], got 0.0 at 1"),
        ([0.1, math.nan], r"betas must lie in \(0, 1\], got nan at 1"),
        ([1.1], r"betas must lie in \(0, 1\], got 1.1 at 0"),
    ):
        with pytest.raises(AssertionError, match=message):
            make(betas=betas)
    with pytest.raises(AssertionError, match=r"t must have shape \[4\] \(one timestep a sample\), got \[2\]"):
        d.p_sample(model, x, t[:2])
    with pytest.raises(AssertionError, match=r"t must have shape \[4\]"):
        d.p_mean_variance(model, x, t[0])
    with pytest.raises(AssertionError, match=r"model must return a tensor of shape \[4, 2, 3, 5\].*got shape \[4, 4"):
        d.ddim_sample(network("LEARNED"), x, t)
    with pytest.raises(AssertionError, match=r"model must return a tensor of shape \[4, 4, 3, 5\].*got shape \[4, 2"):
        make(variance="LEARNED").p_sample(model, x, t)
    with pytest.raises(AssertionError, match="got NoneType"):
        d.p_sample(lambda x, t: None, x, t)
    with pytest.raises(AssertionError, match="eta must be 0"):
        d.ddim_reverse_sample(model, x, t, eta=0.5)
    with pytest.raises(AssertionError, match="shape must be a tuple or a list, got str"):
        d.p_sample_loop(model, "4", device="cpu")
    for bad in (torch.tensor([9, 0, 100, 1]), torch.tensor([9, 0, -1, 1])):
        for call in (
            lambda bad: d.p_sample(model, x, bad),
            lambda bad: d.ddim_sample(model, x, bad),
            lambda bad: make(variance="LEARNED").p_sample(network("LEARNED"), x, bad),
            lambda bad: d.q_sample(x, bad),
            lambda bad: d._vb_terms_bpd(model, x, x, bad),
        ):
            with pytest.raises(IndexError, match=r"t must lie in 0\.\.99, got"):
                call(bad)
    for kind in ("p_sample", "ddim_sample"):
        with pytest.raises(TypeError, match="cond_fn must return a tensor, got NoneType"):
            getattr(d, kind)(model, x, t, cond_fn=lambda x, t: None)
    with pytest.raises(IndexError, match=r"t must be int64 or int32 timesteps, got torch\.float32"):
        d.q_sample(x, t.float())
    for name, call in (
        ("noise", lambda: d.q_sample(x, t, x[:, :1])),
        ("x_start", lambda: d.q_posterior_mean_variance(x[:, :1], x, t)),
        ("x_t", lambda: d._predict_xstart_from_eps(x, t, x[:, :1])),
        ("x_t", lambda: d._predict_xstart_from_xprev(x, t, x[:, :1])),
    ):
        with pytest.raises(AssertionError, match=f"{name} must have the shape of"):
            call()
    for mean, variance, message in (
        ("v", "FIXED_SMALL", "model_mean_type must be"),
        ("EPSILON", "v", "model_var_type must be"),
    ):
        wrong = make()
        wrong.model_mean_type = getattr(gd.ModelMeanType, mean, mean)
        wrong.model_var_type = getattr(gd.ModelVarType, variance, variance)
        with pytest.raises(NotImplementedError, match=message):
            wrong.p_sample(model, x, t)


def test_bad_spacing() -> None:
    with pytest.raises(ValueError, match="cannot keep exactly 8 of 20 steps"):
        gd.space_timesteps(20, "ddim8")
    with pytest.raises(ValueError, match="cannot divide section of 5 steps into 6"):
        gd.space_timesteps(10, [1, 6])
    for counts in ([], [3, -1]):
        with pytest.raises(ValueError, match="section_counts must be numbers >= 0"):
            gd.space_timesteps(10, counts)
    for keep in ({0, 100}, {-1}, set()):
        with pytest.raises(ValueError, match=r"use_timesteps must be some of 0\.\.99, got"):
            make(cls=gd.SpacedDiffusion, use_timesteps=keep)  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="schedule_name must be 'linear' or 'cosine', got 'sigmoid'"):
        gd.get_named_beta_schedule("sigmoid", 10)


def test_spacing() -> None:
    assert gd.space_timesteps(300, [10, 15, 20]) >= {0, 99, 100, 199, 200, 299}
    assert len(gd.space_timesteps(300, "10,15,20")) == 45
    assert gd.space_timesteps(300, np.array([10, 15, 20])) == gd.space_timesteps(300, "10,15,20")  # type: ignore[arg-type]
    assert gd.space_timesteps(1000, "ddim50") == set(range(0, 1000, 20))
    assert gd.space_timesteps(7, "7") == set(range(7))
    assert gd.space_timesteps(10, [0, 1]) == {5}
    d, whole = spaced("25", rescale=False), make(betas=gd.get_named_beta_schedule("linear", 1000))
    np.testing.assert_allclose(d.alphas_cumprod, whole.alphas_cumprod[d.timestep_map], rtol=1e-12)
    assert (d.num_timesteps, d.original_num_steps) == (25, 1000)
    assert d.use_timesteps == set(d.timestep_map)


def test_schedules() -> None:
    """Linear: 0.0001 to 0.02 for 1000 steps; cosine: abar of arXiv 2102.09672, eq. 17, betas below 0.999."""
    linear = gd.get_named_beta_schedule("linear", 1000)
    assert (linear.dtype, linear.shape) == (np.float64, (1000,))
    np.testing.assert_allclose(linear[[0, -1]], [1e-4, 0.02], rtol=1e-12)
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    cosine = gd.get_named_beta_schedule("cosine", 1000)
    np.testing.assert_allclose(cosine, np.minimum(1 - f[1:] / f[:-1], 0.999), rtol=1e-9)
    np.testing.assert_allclose(gd.betas_for_alpha_bar(4, lambda t: 1 - t, 0.5), [0.25, 1 / 3, 0.5, 0.5], rtol=1e-12)
