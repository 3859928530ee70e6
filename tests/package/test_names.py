"""The words of string arguments as types are those that are taken at run time."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
from helpers.lazy import needs

import diffkern
from diffkern import data, degradations, draws, guidance, names, nn, objectives, ops, samplers, schedules
from diffkern.compat.score_sde._ode import check_solver
from diffkern.objectives import adversarial, flow_matching, time_sampling, variational, weightings
from diffkern.ops import _attention, _common, _conv3x3
from diffkern.plan import Plan
from diffkern.sampling import _predictor_corrector
from diffkern.schedules import grids, predictions
from diffkern.simulate import _divergence, likelihood

S = schedules.linear(20)
X = torch.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)
TAPS = torch.ones(2, 2, 3, 3)


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        (names.Prediction, predictions.PREDICTIONS),
        (names.SamplerName, samplers.SAMPLERS),
        (names.WeightingName, weightings.WEIGHTINGS),
        (names.TimesName, time_sampling.TIME_SAMPLERS),
        (names.AdversarialName, adversarial.ADVERSARIAL),
        (names.DegradationName, degradations.DEGRADATIONS),
        (names.Reduction, _common.REDUCTIONS),
        (names.LevelSpacing, grids.LEVELS),
        (names.Spacing, [*grids.SPACINGS, *grids.LEVELS]),
        (names.HeadOrder, _attention._ORDERS),
        (names.Precision, _conv3x3._FORMS),
        (names.Coupling, flow_matching.COUPLINGS),
        (names.Projection, draws.PROJECTIONS),
        (names.Divergence, _divergence.DIVERGENCES),
        (names.Solver, likelihood.SOLVERS),
        (names.Norm, _predictor_corrector.NORMS),
    ],
)
def test_the_type_has_the_words_that_are_taken(words: Any, taken: Any) -> None:
    assert sorted(get_args(words)) == sorted(taken)


def net(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.5 * x


def corrected(corrector: Any = "langevin", predictor: Any = "ancestral", **options: Any) -> Plan:
    """pc_plan has no langevin corrector, whose step depends on the sample."""
    if corrector == "langevin":
        diffkern.predictor_corrector(net, X, S, 2, seeds=0, corrector=corrector, predictor=predictor, **options)
        corrector = "none"
    return diffkern.pc_plan(S, 2, corrector=corrector, predictor=predictor, **options)


def rng(word: Any) -> object:
    from diffkern.compat.diffusers import DDIMScheduler

    return DDIMScheduler().diffkern(rng=word)


def adversarial_losses(word: Any) -> object:
    logits = X[:, 0, 0]
    return diffkern.discriminator_loss(logits, logits, word), diffkern.generator_loss(logits, word, logits)


def penalised(word: Any) -> object:
    generator, discriminator = nn.gan_preset("dcgan-digits")
    return diffkern.GAN(nn.Generator(generator), nn.Discriminator(discriminator), penalty=word)


# For every type a function that takes its words and refuses others, by the argument's name.
TAKERS: dict[str, tuple[Any, Callable[[Any], object]]] = {
    "Prediction": (names.Prediction, predictions.check_prediction),
    "SamplerName": (names.SamplerName, samplers.get_sampler),
    "WeightingName": (names.WeightingName, weightings.get_weighting),
    "TimesName": (names.TimesName, time_sampling.get_time_sampler),
    "AdversarialName": (names.AdversarialName, adversarial_losses),
    "GradientPenalty": (names.GradientPenalty, penalised),
    "DegradationName": (names.DegradationName, degradations.get_degradation),
    "Reduction": (names.Reduction, lambda w: diffkern.prediction_loss(X, X, 3, S, seeds=0, reduction=w)),
    "TableSpacing": (names.TableSpacing, lambda w: grids.spaced_timesteps(20, 4, w)),
    "LevelSpacing": (names.LevelSpacing, lambda w: grids.levels(S, 4, w)),
    "Spacing": (names.Spacing, lambda w: samplers.ddim(S, 4, spacing=w)),
    "ShiftKind": (names.ShiftKind, lambda w: grids.dynamically_shifted(torch.tensor([1.0, 0.5]), 1.0, w)),
    "ReverseVariance": (names.ReverseVariance, weightings.VLB),
    "LearnedVariance": (names.LearnedVariance, lambda w: (samplers.ddpm(S, 4, variance=w), variational_table(w))),
    "Crop": (names.Crop, lambda w: data.open_images(torch.zeros(1, 1, 2, 2), crop=w)),
    "NoisePath": (names.NoisePath, lambda w: samplers.dpmpp_sde(S, 4, noise_path=w)),
    "MultistepSolver": (names.MultistepSolver, lambda w: samplers.dpmpp_2m_sde(S, 4, solver=w)),
    "UniPCVariant": (names.UniPCVariant, lambda w: samplers.unipc(S, 4, variant=w)),
    "EpsFrom": (names.EpsFrom, lambda w: samplers.ddim(S, 4, eps_from=w)),
    "GuidanceForm": (names.GuidanceForm, lambda w: guidance.classifier_free(net, X, X, 2.0, form=w)),
    "HeadOrder": (
        names.HeadOrder,
        lambda w: (nn.SpatialSelfAttention(32, 2, order=w), ops.spatial_attention(torch.ones(1, 48, 4), 2, w)),
    ),
    "Activation": (
        names.Activation,
        lambda w: (ops.group_norm_act(torch.ones(1, 4, 4), 2, act=w), ops.linear_rows(X, X[0], act=w)),
    ),
    "Precision": (
        names.Precision,
        lambda w: (ops.conv3x3(TAPS, TAPS, precision=w), ops.pack_conv3x3(TAPS, precision=w)),
    ),
    "Attention": (names.Attention, lambda w: nn.SpatialSelfAttention(32, 2, attention=w)),
    "TimeDtype": (names.TimeDtype, lambda w: Plan("mine", samplers.ddim(S, 4).rows, time_dtype=w)),
    "Coupling": (names.Coupling, lambda w: objectives.flow_matching.flow_matching_loss(net, X, coupling=w, seeds=0)),
    "Projection": (names.Projection, lambda w: draws.projections((2, 3), 0, kind=w)),
    "Divergence": (names.Divergence, lambda w: log_likelihood(divergence=w)),
    "Solver": (names.Solver, lambda w: log_likelihood(solver=w, steps=None if w == "rk45" else 2)),
    "Norm": (names.Norm, lambda w: diffkern.rk45(net, X, schedules.vp(), rtol=1e-1, norm=w)),
    "Corrector": (names.Corrector, lambda w: corrected(corrector=w)),
    "Predictor": (names.Predictor, lambda w: corrected("ald", predictor=w)),
    "OdeSolver": (names.OdeSolver, check_solver),
    "Rng": (names.Rng, rng),
}


def variational_table(word: Any) -> torch.Tensor:
    return variational.variational_table(S, "eps", word)


def log_likelihood(**options: Any) -> object:
    return diffkern.log_likelihood(net, X, schedules.vp(), seeds=0, **{"solver": "euler", "steps": 2, **options})


def test_every_type_of_words_is_taken_somewhere() -> None:
    literal = {name for name, value in vars(names).items() if get_origin(value) is Literal}
    assert literal == set(TAKERS)


@pytest.mark.parametrize("name", TAKERS)
def test_every_word_is_taken_and_no_other(name: str) -> None:
    if name == "Rng":
        pytest.importorskip("diffusers")
    words, take = TAKERS[name]
    for word in get_args(words):
        take(word)
    with pytest.raises(ValueError, match=r"must be .*got 'no such word'"):
        take("no such word")


SNIPPET = """
import torch

from diffkern import Diffusion, guidance, linear, nn, ops, samplers, simple_loss
from diffkern.names import SamplerName
from diffkern.schedules import grids

net = torch.nn.Linear(2, 2)
x = torch.zeros(2, 2)
name: SamplerName = "ddim"
text = str(input())
diffusion = Diffusion(net, linear(), "v", weight="min_snr", times="logit_normal", target="x0")
diffusion.sample(4, name)
diffusion.sample(4, "dpmpp_2m", steps=20, spacing="karras")
diffusion.sample(4, samplers.get_sampler(text))
diffusion.plan("ddim")
samplers.dpmpp_2m_sde(linear(), 4, noise_path="brownian", solver="heun")
samplers.ddpm(linear(), variance=0.5)
Diffusion(net, linear(), "epsilom")  # typo
Diffusion(net, linear(), weight="min-snr")  # typo
Diffusion(net, linear(), times="lognormal")  # typo
Diffusion(net, linear(), target="noise")  # typo
diffusion.sample(4, "dimm")  # typo
diffusion.sample(4, text)  # typo
diffusion.plan("dpm++_2m")  # typo
simple_loss(net, x, 3, linear(), weight="minsnr")  # typo
samplers.ddim(linear(), num_inference_steps=4)  # typo
samplers.ddim(linear(), eps_from="models")  # typo
samplers.ddpm(linear(), variance="lerned")  # typo
samplers.euler(linear(), 4, spacing="kerras")  # typo
samplers.euler_maruyama(linear(), 4, noise_path="brown")  # typo
samplers.dpmpp_2m_sde(linear(), 4, solver="huen")  # typo
samplers.unipc(linear(), 4, variant="bh3")  # typo
guidance.classifier_free(net, x, x, 2.0, form="papr")  # typo
nn.SpatialSelfAttention(32, 2, order="old")  # typo
nn.SpatialSelfAttention(32, 2, attention="sdpa")  # typo
ops.spatial_attention(x, 2, "old")  # typo
grids.spaced_timesteps(20, 4, "karras")  # typo
grids.levels(linear(), 4, "trailing")  # typo
grids.dynamically_shifted(x, 1.0, "exp")  # typo
linear().table("epsilon")  # typo
"""


@pytest.mark.full
@needs("mypy")
def test_a_type_checker_finds_every_typo_and_nothing_else(root: Path, tmp_path: Path) -> None:
    snippet = tmp_path / "snippet.py"
    snippet.write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", str(snippet)]  # the project's options and its cache, without which: 2 min
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    found = {int(line) for line in re.findall(r"^\S*snippet\.py:(\d+): error:", done.stdout, re.M)}
    lines = dict(enumerate(SNIPPET.splitlines(), 1))
    expected = {i for i, line in lines.items() if line.endswith("# typo")}
    assert [lines[i] for i in sorted(found)] == [lines[i] for i in sorted(expected)], done.stdout
