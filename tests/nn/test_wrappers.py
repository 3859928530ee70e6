"""Preconditioned denoisers, scores and flows against their formulas, and as networks of `Diffusion`."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffkern
from diffkern.nn import (
    DiT,
    DiTConfig,
    FlowNetwork,
    Preconditioned,
    PreconditionedConfig,
    ScoreNetwork,
    UNet,
    UNetConfig,
)

SMALL = UNetConfig(image_size=4, channels=8, multipliers=(1,), blocks=1, attention_levels=(), middle_attention=False,
                   classes=3, zero_init=False)  # fmt: skip
SIGMA = torch.tensor([0.05, 3.0])
COND = torch.tensor([2, 3])


def network(**changes: Any) -> UNet:
    torch.manual_seed(0)
    return UNet(dataclasses.replace(SMALL, **changes))


def image() -> Tensor:
    return torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1))


def by_sample(f: Any) -> Tensor:
    """f of a noise level, a number, for each of both."""
    return torch.tensor([f(float(sigma)) for sigma in SIGMA])


def over(c: Tensor) -> Tensor:
    return c[:, None, None, None]


# Table 1 of Karras et al. 2022, as numbers.
TABLE: dict[str, list[Any]] = {
    "edm": [
        lambda s: 0.25 / (s * s + 0.25),
        lambda s: s * 0.5 / math.sqrt(s * s + 0.25),
        lambda s: 1 / math.sqrt(s * s + 0.25),
        lambda s: math.log(s) / 4,
    ],
    "vp": [lambda s: 1.0, lambda s: -s, lambda s: 1 / math.sqrt(s * s + 1), None],
    "ve": [lambda s: 1.0, lambda s: s, lambda s: 1.0, lambda s: math.log(s / 2)],
    "iddpm": [lambda s: 1.0, lambda s: -s, lambda s: 1 / math.sqrt(s * s + 1), None],
}


@pytest.mark.parametrize("form", TABLE)
def test_a_denoiser_is_the_sum_of_its_parts(form: str) -> None:
    inner, x = network(), image()
    wrapped = Preconditioned.of(inner, form)
    found = wrapped.coefficients(SIGMA)
    for value, formula in zip(found, TABLE[form], strict=True):
        if formula is not None:
            torch.testing.assert_close(value, by_sample(formula))
    skip, out, scale, noise = found
    expected = over(skip) * x + over(out) * inner(over(scale) * x, noise, COND)
    torch.testing.assert_close(wrapped(x, SIGMA, COND), expected)


def test_the_time_of_vp_is_where_the_schedule_has_that_noise() -> None:
    noise = Preconditioned.of(network(), "vp").coefficients(SIGMA.double())[3]
    t = noise / 999
    torch.testing.assert_close((torch.exp(0.5 * 19.9 * t**2 + 0.1 * t) - 1).sqrt(), SIGMA.double())


def test_the_step_of_iddpm_is_the_nearest_of_its_cosine_schedule() -> None:
    wrapped = Preconditioned.of(network(), "iddpm")
    # Where no ratio is at its floor, u_j^2 = 1/a_j - 1 up to one factor, a_M.
    M, products = 1000, [math.sin(0.5 * math.pi * j / (1000 * 1.008)) ** 2 for j in range(1001)]
    for j in (100, 500, 999):
        level = math.sqrt(products[M] / products[j] - 1)
        step = wrapped.coefficients(torch.tensor([level * 1.0001], dtype=torch.float64))[3]
        assert step.item() == M - 1 - j
    # At its floor: u_(j-1)^2 + 1 is 1/C_1 of u_j^2 + 1, at j = 1 alone, as a_0 = 0.
    most = math.sqrt(products[M] / products[1] / 0.001 - 1)
    assert wrapped.coefficients(torch.tensor([2 * most], dtype=torch.float64))[3].item() == M - 1


def test_a_learned_variance_is_left_out() -> None:
    inner, x = network(learned_variance=True), image()
    wrapped = Preconditioned.of(inner, "iddpm")
    _, out, scale, noise = wrapped.coefficients(SIGMA)
    expected = x + over(out) * inner(over(scale) * x, noise)[:, :1]
    torch.testing.assert_close(wrapped(x, SIGMA), expected)


def test_the_score_of_a_noise_conditional_network_is_divided_by_the_noise() -> None:
    inner, x = network(), image()
    torch.testing.assert_close(ScoreNetwork.of(inner)(x, SIGMA, COND), inner(x, SIGMA.log(), COND) / over(SIGMA))
    t = torch.tensor([0.0 + 1e-3, 1.0])
    sigma = 0.01 * (50.0 / 0.01) ** t
    found = ScoreNetwork.of(inner, sigma_min=0.01, sigma_max=50.0)(x, t)
    torch.testing.assert_close(found, inner(x, sigma.log()) / over(sigma))


def test_the_score_of_an_eps_network_is_that_of_the_vp_schedule() -> None:
    inner, x, t = network(), image(), torch.tensor([0.1, 0.9])
    sigma = diffkern.vp().sigma(t).float()
    torch.testing.assert_close(ScoreNetwork.of(inner, "vp")(x, t), -inner(x, 999 * t) / over(sigma))


def test_a_flow_runs_either_way() -> None:
    inner, x, t = network(), image(), torch.tensor([0.0, 0.75])
    torch.testing.assert_close(FlowNetwork.of(inner)(x, t, COND), inner(x, 1000 * t, COND))
    backwards = FlowNetwork.of(inner, backwards=True)
    torch.testing.assert_close(backwards(x, t), -inner(x, 1000 - 1000 * t))


CASES = {
    "edm": (lambda n: Preconditioned.of(n, "edm"), diffkern.edm(), "x0"),
    "ve": (lambda n: ScoreNetwork.of(n, sigma_min=0.01, sigma_max=50.0), diffkern.ve(), "score"),
    "vp": (lambda n: ScoreNetwork.of(n, "vp"), diffkern.vp(), "score"),
    "flow": (lambda n: FlowNetwork.of(n, backwards=True), diffkern.flow(), "velocity"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_wrapped_network_is_trained_sampled_and_saved_by_diffusion(name: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    wrap, schedule, prediction = CASES[name]
    diffusion = diffkern.Diffusion(wrap(network()), schedule, prediction, drop=0.5)
    diffusion.loss(image(), cond=COND).backward()
    assert all(p.grad is not None for p in diffusion.model.parameters())
    assert diffusion.shape == (1, 4, 4)
    assert diffusion.time_scale == 1.0
    diffusion.save_pretrained(tmp_path)
    again = diffkern.Diffusion.from_pretrained(tmp_path)
    assert again.model.config == diffusion.model.config
    options: dict[str, Any] = {"steps": 2, "seeds": 0, "cond": COND[:1], "guidance": 2.0}
    torch.testing.assert_close(again.sample(1, "euler", **options), diffusion.sample(1, "euler", **options))


def test_a_file_whose_inner_network_is_larger_than_its_weights_is_not_built(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    diffkern.Diffusion(Preconditioned.of(network()), diffkern.edm(), "x0").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["network"]["config"]["network"]["blocks"] = 1000
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"network\.config\.blocks must fit the \d+ tensors of the file, got 1000"):
        diffkern.Diffusion.from_pretrained(tmp_path)


def test_a_denoiser_of_edm_is_its_prediction_by_the_plan() -> None:
    """`Diffusion(network, edm(), "edm")` has the same preconditioning."""
    inner = network(classes=0)
    raw = diffkern.Diffusion(inner, diffkern.edm(), "edm", time_scale=1.0)
    wrapped = diffkern.Diffusion(Preconditioned.of(inner, "edm"), diffkern.edm(), "x0")
    torch.testing.assert_close(wrapped.denoise(image(), SIGMA), raw.denoise(image(), SIGMA))


def test_a_dit_is_wrapped_as_a_unet_is() -> None:
    config = DiTConfig(image_size=4, in_channels=1, width=16, depth=1, heads=2, classes=3, learned_variance=True)
    inner, x = DiT(config), image()
    for parameter in inner.parameters():
        nn.init.normal_(parameter, std=0.1)
    wrapped = FlowNetwork.of(inner)
    t = torch.tensor([0.0, 0.75])
    torch.testing.assert_close(wrapped(x, t, COND), inner(x, 1000 * t, COND)[:, :1])
    assert FlowNetwork(wrapped.config).network.config == config
    assert (wrapped.null_class, wrapped.config.in_channels, wrapped.config.image_size) == (3, 1, 4)


def test_what_cannot_be_wrapped_is_one_sentence() -> None:
    inner, x = network(), image()
    with pytest.raises(ValueError, match=r"network must be one of UNet.*, got Linear"):
        Preconditioned.of(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=r"network must be one of UNet.*, got FlowNetwork"):
        Preconditioned.of(FlowNetwork.of(inner))
    with pytest.raises(ValueError, match=r"network\.kind must be one of UNetConfig.*, got 'X'"):
        PreconditionedConfig({"kind": "X"})
    with pytest.raises(ValueError, match="did you mean 'edm'"):
        Preconditioned.of(inner, "EDM")
    with pytest.raises(ValueError, match=r"PreconditionedConfig\.sigma_data must be positive and finite, got 0"):
        Preconditioned.of(inner, sigma_data=0.0)
    with pytest.raises(ValueError, match=r"sigma_min and sigma_max must go together, got 0\.1 and None"):
        ScoreNetwork.of(inner, sigma_min=0.1)
    with pytest.raises(ValueError, match=r"t must be above 0, where there is noise, got 0"):
        Preconditioned.of(inner)(x, torch.zeros(2))
    with pytest.raises(ValueError, match=r"t must be 0-dim or have one time for each of the 2 samples, got \(3,\)"):
        FlowNetwork.of(inner)(x, torch.zeros(3))


def test_a_wrapper_keeps_the_dtype_and_no_batch() -> None:
    wrapped = Preconditioned.of(network().to(torch.bfloat16), "edm")
    assert wrapped(image().to(torch.bfloat16), SIGMA).dtype == torch.bfloat16
    assert wrapped(image()[:0].to(torch.bfloat16), torch.tensor(1.0)).shape == (0, 1, 4, 4)
