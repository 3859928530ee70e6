"""The terms of an autoencoder's and of a GAN's loss against NumPy and torch.autograd, and what is stored at the end."""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.lazy import needs
from helpers.tiny_run import TINY, tiny_data
from helpers.two_networks import AUTOENCODER, GAN, first_step, run
from torch import Tensor, nn

from diffkern.data import open_images
from diffkern.nn import Autoencoder
from diffkern.objectives.adversarial import adaptive_weight, generator_loss
from diffkern.train import AutoencoderTraining, TrainConfig, fit, newest
from diffkern.train.log import read_log
from diffkern.train.perceptual import FeatureDistance, perceptual

pytestmark = needs("yaml", "safetensors", "matplotlib", "PIL")
KL = dataclasses.replace(AUTOENCODER, network_options={**AUTOENCODER.network_options, "regularisation": "kl"})


def array(value: Any) -> np.ndarray:
    found: np.ndarray = value.detach().double().numpy()
    return found


def forward(stepper: Any, batches: Any) -> tuple[np.ndarray, np.ndarray, Any]:
    """Images, reconstructions and what the encoder says, of the first micro-batch."""
    x = stepper.images(batches[0])
    r, encoded = stepper.autoencoder(x, batches[0].seeds)
    return array(x), array(r), encoded


@pytest.mark.parametrize("kind", ["l1", "l2"])
def test_the_loss_of_a_kl_autoencoder_is_that_of_numpy(kind: str) -> None:
    config = dataclasses.replace(KL, autoencoder={"reconstruction": kind, "kl_weight": 0.3}, adversarial={})
    stepper, batches = first_step(config)
    x, r, posterior = forward(stepper, batches)
    mean, logvar = array(posterior.mean), array(posterior.logvar)
    gap = np.abs(x - r) if kind == "l1" else (x - r) ** 2
    pixels = gap.reshape(len(x), -1).mean(1)
    kl = (0.5 * (mean**2 + np.exp(logvar) - 1.0 - logvar)).reshape(len(x), -1).sum(1)
    done = stepper.iterate(batches, 0)
    np.testing.assert_allclose(done.losses.numpy(), pixels + 0.3 * kl / 64, rtol=1e-5)
    assert done.terms == pytest.approx({"reconstruction": pixels.mean(), "kl": kl.mean()}, rel=1e-5)


@pytest.mark.parametrize("decay", [0.9, None])
def test_the_loss_and_the_codebook_of_a_vq_autoencoder_are_those_of_numpy(decay: float | None) -> None:
    """The codes of step 0 by brute force; averages after the gradient's step, of the encoder's numbers before it."""
    own = {**AUTOENCODER.network_options, "decay": decay, "restart_below": 0.0}
    terms = {"commitment_weight": 0.7, "codebook_weight": 2.0}
    stepper, batches = first_step(
        dataclasses.replace(AUTOENCODER, network_options=own, autoencoder=terms, adversarial={}, micro_batch=5)
    )
    codebook = stepper.autoencoder.quantiser
    codes = array(codebook.codes).copy()
    losses, commitment, rows = [], [], []
    for batch in batches:
        x = stepper.images(batch)
        z = array(stepper.autoencoder.encode(x).before)
        flat = z.transpose(0, 2, 3, 1)[..., None, :]
        nearest = codes[((flat - codes) ** 2).sum(-1).argmin(-1)]
        gap = ((flat[..., 0, :] - nearest) ** 2).reshape(len(z), -1).mean(1)
        r = array(stepper.autoencoder.decode(torch.from_numpy(nearest.transpose(0, 3, 1, 2)).float()))
        pixels = np.abs(array(x) - r).reshape(len(z), -1).mean(1)
        losses.append(pixels + (0.7 + (2.0 if decay is None else 0.0)) * gap)
        commitment.append(gap)
        rows.append(flat.reshape(-1, codes.shape[1]))
    done = stepper.iterate(batches, 0)
    np.testing.assert_allclose(done.losses.numpy(), np.concatenate(losses), rtol=1e-4)
    latents = np.concatenate(rows)
    falls = ((latents[:, None] - codes) ** 2).sum(-1).argmin(-1)
    n = np.bincount(falls, minlength=len(codes))
    shares = n[n > 0] / n.sum()
    assert done.terms["commitment"] == pytest.approx(np.concatenate(commitment).mean(), rel=1e-4)
    assert done.terms["code_usage"] == len(shares) / 8
    assert done.terms["code_perplexity"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert ("codebook" in done.terms) == (decay is None)
    if decay is not None:
        sums = np.zeros_like(codes)
        np.add.at(sums, falls, latents)
        want = (decay * codes + (1.0 - decay) * sums) / (decay + (1.0 - decay) * n)[:, None]
        np.testing.assert_allclose(array(codebook.codes), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("micro_batch", [8, 3])
def test_the_adversarial_term_has_the_adaptive_weight_of_the_whole_batch(micro_batch: int) -> None:
    """The gradient is that of torch.autograd of one sum, whatever the cut."""
    own = {**KL.adversarial, "start": 0, "weight": 0.8}
    config = dataclasses.replace(KL, adversarial=own, micro_batch=micro_batch, clip=None, learning_rate=1e-9)
    stepper, batches = first_step(config)
    stepper.power_step()
    x, seeds = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("x0", "seeds"))
    r, posterior = stepper.autoencoder(x, seeds)
    smooth = (x - r).abs().mean() + (1e-6 / 64) * posterior.kl().mean()
    against = generator_loss(stepper.discriminator(r), "hinge")
    weight = adaptive_weight(smooth, against, stepper.autoencoder.last_layer)
    parameters = stepper.first_parameters
    want = torch.autograd.grad(smooth + 0.8 * weight * against, parameters, allow_unused=True)
    ratio, kept = stepper._ratio(batches)
    assert len(kept) == (1 if micro_batch == 8 else 0)
    assert ratio == pytest.approx(float(weight), rel=1e-4)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stepper, "power_step", lambda: None)
        got: list[Tensor | None] = []
        update = stepper.update
        patched.setattr(stepper, "update", lambda given: (got.extend(p.grad.clone() for p in given), update(given))[1])
        done = stepper.iterate(batches, 0)
    assert done.terms["adaptive_weight"] == pytest.approx(float(weight), rel=1e-4)
    for one, other in zip(got, want, strict=False):  # the autoencoder's come first
        torch.testing.assert_close(one, other, rtol=2e-3, atol=1e-6)


def test_the_discriminator_begins_at_its_start_step(tmp_path: Path) -> None:
    run(dataclasses.replace(KL, iterations=4, log_every=1, adversarial={**KL.adversarial, "start": 2}), tmp_path)
    entries = read_log(tmp_path)
    assert ["adversarial" in entry for entry in entries] == [False, False, True, True]
    assert all(("discriminator_loss" in entry) == ("adversarial" in entry) for entry in entries)
    assert 0.0 < entries[-1]["adaptive_weight"] <= 1e4


def test_an_autoencoder_that_keeps_no_activations_trains_alike() -> None:
    """The discriminator in play from the first iteration on, and gradients by hand through the last layer."""
    config = dataclasses.replace(KL, adversarial={**KL.adversarial, "start": 0}, iterations=3)
    want = run(config)
    found = run(dataclasses.replace(config, checkpointing=True))
    assert found.trained.autoencoder.checkpointing
    torch.testing.assert_close(found.losses, want.losses, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"TrainConfig.checkpointing needs a network with a switch for it"):
        run(dataclasses.replace(GAN, checkpointing=True))


def test_the_terms_of_a_gan_are_those_of_numpy() -> None:
    """Non-saturating with a gradient penalty: at the first weights, of the first iteration."""
    own = {**GAN.adversarial, "d_steps": 1, "penalty_weight": 3.0, "loss": "non_saturating"}
    stepper, batches = first_step(dataclasses.replace(GAN, adversarial=own, micro_batch=3, learning_rate=1e-9))
    stepper.power_step()
    found = [stepper.gan.discriminator_terms(b.x0, b.labels, b.seeds) for b in batches]
    real, fake, penalty = (np.concatenate([array(getattr(f, n)) for f in found]) for n in ("real", "fake", "penalty"))
    its = [stepper.gan.generator_terms(b.x0, b.labels, b.seeds).fake for b in batches]
    logits = np.concatenate([array(part) for part in its])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(stepper, "power_step", lambda: None)
        done = stepper.iterate(batches, 0)
    loss = np.log1p(np.exp(-real)) + np.log1p(np.exp(fake))
    want = {"discriminator_loss": loss, "penalty": penalty, "real_logit": real, "fake_logit": fake}
    want["generator_loss"] = np.log1p(np.exp(-logits))
    for name, values in want.items():
        assert done.terms[name] == pytest.approx(values.mean(), rel=1e-4, abs=1e-6), name
    np.testing.assert_allclose(done.losses.numpy(), want["generator_loss"], rtol=1e-4)


def test_the_gradient_of_the_discriminator_has_the_penalty_with_its_weight() -> None:
    own = {**GAN.adversarial, "d_steps": 1, "penalty_weight": 3.0}
    stepper, batches = first_step(dataclasses.replace(GAN, adversarial=own, micro_batch=3))
    stepper.power_step()
    total = sum(stepper.gan.discriminator_loss(b.x0, b.labels, b.seeds, reduction="sum") for b in batches) / 8
    want = torch.autograd.grad(total, stepper.critic_parameters)  # type: ignore[arg-type]
    stepper.gradient(
        batches, 0, stepper.critic_parameters, lambda number, batch: stepper._critic_terms(0, number, batch)
    )
    for parameter, other in zip(stepper.critic_parameters, want, strict=True):
        torch.testing.assert_close(parameter.grad, other, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------- perceptual, PSNR


def test_a_feature_distance_is_the_mean_square_of_each_output() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(1, 3, 3)

    def features(x: Tensor) -> tuple[Tensor, Tensor]:
        return layer(x), x.mean((2, 3))

    x, y = torch.rand(2, 4, 1, 6, 6) * 2.0 - 1.0
    y.requires_grad_()
    found = FeatureDistance(features)(x, y)
    a, b = array(layer(x)), array(layer(y))
    means = (array(x).mean((2, 3)) - array(y).mean((2, 3))) ** 2
    np.testing.assert_allclose(array(found), ((a - b) ** 2).reshape(4, -1).mean(1) + means.mean(1), rtol=1e-5)
    found.sum().backward()
    assert y.grad is not None
    assert bool((y.grad != 0.0).any())
    assert FeatureDistance(nn.Linear(2, 2)).features.weight.requires_grad is False  # type: ignore[union-attr]


def test_the_classifier_of_the_data_compares_features_and_is_kept_in_the_run(tmp_path: Path) -> None:
    config = dataclasses.replace(KL, autoencoder={"perceptual": "classifier", "perceptual_weight": 0.1}, iterations=4)
    fitted = run(config, tmp_path)
    assert len(list(tmp_path.glob("classifier-*.safetensors"))) == 1
    assert read_log(tmp_path)[-1]["perceptual"] > 0.0
    assert all("classifier" not in name for name in fitted.trained.state_dict())
    x = open_images(tiny_data()).batch(torch.arange(3))[0]
    assert fitted.trained.perceptual(x, x).tolist() == [0.0] * 3
    more = dataclasses.replace(config, iterations=6)
    assert run(more, tmp_path).losses == run(more, tmp_path / "again").losses[4:]


def test_perceptual_distances_that_there_are_not_are_refused(tmp_path: Path) -> None:
    images = open_images(tiny_data())
    with pytest.raises(
        ValueError, match=r"TrainConfig.autoencoder.perceptual must be one of classifier, lpips, got 'vg'"
    ):
        perceptual("vg", images, None, torch.device("cpu"))
    with pytest.raises(ValueError, match="perceptual 'classifier' needs data with labels, got none"):
        perceptual("classifier", open_images(tiny_data()[0]), None, torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(sys.modules, "lpips", None)
        with pytest.raises(
            ImportError, match=r"TrainConfig.autoencoder.perceptual 'lpips' needs lpips, which cannot be i"
        ):
            perceptual("lpips", images, None, torch.device("cpu"))
    made = AutoencoderTraining(first_step(KL)[0].autoencoder)
    config = dataclasses.replace(KL, autoencoder={"perceptual": "classifier"}, adversarial={})
    with pytest.raises(
        ValueError, match=r"perceptual must be left out for networks that are given: AutoencoderTraining"
    ):
        fit(made, tiny_data(), config, progress=False)
    with pytest.raises(ValueError, match=r"TrainConfig.adversarial.weight must be 0 without a discriminator, got a"):
        fit(made, tiny_data(), KL, progress=False)


def test_lpips_sees_colour_images_and_gives_one_number_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the package, whose weights are where torchvision keeps them."""

    class Stand(nn.Module):
        def __init__(self, net: str, verbose: bool) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (self.layer(x) - self.layer(y)).square().mean((1, 2, 3), keepdim=True)

    lpips, models = types.ModuleType("lpips"), types.ModuleType("torchvision.models")
    lpips.LPIPS = Stand  # type: ignore[attr-defined]
    weights = types.SimpleNamespace(DEFAULT=types.SimpleNamespace(url="https://nowhere/vgg16-0.pth"))
    models.VGG16_Weights = weights  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lpips", lpips)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    images = open_images(tiny_data())
    with pytest.raises(ValueError, match=r"'lpips' needs VGG's weights in .*vgg16-0.pth, got none there"):
        perceptual("lpips", images, None, torch.device("cpu"))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "vgg16-0.pth").touch()
    distance = perceptual("lpips", images, None, torch.device("cpu"))
    assert distance is not None
    x = images.batch(torch.arange(4))[0]
    y = (-x).requires_grad_()
    found = distance(x, y)
    assert found.shape == (4,)
    found.sum().backward()
    assert y.grad is not None
    assert distance(x, x).tolist() == [0.0] * 4


def test_the_runs_folder_is_the_autoencoder_of_the_average_with_its_scale(tmp_path: Path) -> None:
    config = dataclasses.replace(KL, iterations=6, validation=4, sample_every=6, learning_rate=1e-2)
    fitted = run(config, tmp_path)
    loaded = Autoencoder.from_pretrained(tmp_path).requires_grad_(False)
    with fitted.averages.used(fitted.averages.names[0]):
        for (name, a), b in zip(
            loaded.state_dict().items(), fitted.trained.autoencoder.state_dict().values(), strict=True
        ):
            assert torch.equal(a, b), name
    assert fitted.trained.autoencoder.scale == 1.0  # of the run that goes on
    from diffkern.data import split

    training, held_out = split(open_images(tiny_data()), 4)
    z = loaded.latents(training.batch(torch.arange(len(training)))[0])
    assert float(z.mean()) == pytest.approx(0.0, abs=1e-4)
    assert float(z.std(correction=0)) == pytest.approx(1.0, rel=1e-4)
    x = held_out.batch(torch.arange(4))[0]
    gap = np.abs(array(x) - array(loaded(x)[0])).mean()
    assert read_log(tmp_path)[-1]["validation_loss"] == pytest.approx(gap, rel=1e-5)
    assert (tmp_path / "samples" / "00000006.png").stat().st_size > 0
    path = newest(tmp_path)
    assert path is not None
    whole = AutoencoderTraining.from_pretrained(path, average="raw")
    assert whole.discriminator is not None
    assert torch.equal(whole.autoencoder.last_layer, fitted.trained.autoencoder.last_layer)
    other = run(dataclasses.replace(config, init=str(tmp_path), iterations=1, learning_rate=1e-9), tmp_path / "other")
    start = AutoencoderTraining.from_pretrained(path).autoencoder.last_layer
    torch.testing.assert_close(other.trained.autoencoder.last_layer, start, rtol=0.0, atol=1e-6)
    loaded.save_pretrained(tmp_path / "alone")  # as of other programs: with a new discriminator
    more = dataclasses.replace(config, init=str(tmp_path / "alone"), iterations=2, learning_rate=1e-9)
    tuned = run(dataclasses.replace(more, iterations=1), tmp_path / "tuned")
    torch.testing.assert_close(tuned.trained.autoencoder.last_layer, loaded.last_layer, rtol=0.0, atol=1e-6)
    assert tuned.trained.discriminator is not None
    assert run(more, tmp_path / "tuned").step == 2


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_an_autoencoder_of_16_bits_is_trained_on_in_float32(tmp_path: Path, weight: float) -> None:
    """From its first step, as a resumed run does; to the end, where the scale is measured."""
    run(dataclasses.replace(KL, iterations=1), tmp_path / "first")
    Autoencoder.from_pretrained(tmp_path / "first").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    config = dataclasses.replace(
        KL, iterations=4, save_every=2, init=str(tmp_path / "half"), adversarial={**KL.adversarial, "weight": weight}
    )
    whole = run(config, tmp_path / "whole")
    assert {p.dtype for p in whole.trained.parameters()} == {torch.float32}
    run(dataclasses.replace(config, iterations=2), tmp_path / "parts")
    rest = run(config, tmp_path / "parts")
    assert rest.losses == whole.losses[2:]
    assert Autoencoder.from_pretrained(tmp_path / "parts").last_layer.dtype == torch.float32


def test_a_run_without_a_discriminator_may_be_trained_on_against_one(tmp_path: Path) -> None:
    alone = dataclasses.replace(KL, iterations=2, adversarial={})
    assert run(alone, tmp_path / "alone").trained.discriminator is None
    config = dataclasses.replace(KL, iterations=2, init=str(tmp_path / "alone"))
    against = run(config, tmp_path / "against")
    assert against.trained.discriminator is not None
    assert run(dataclasses.replace(config, iterations=3), tmp_path / "against").step == 3


def test_a_run_that_is_stopped_leaves_no_autoencoder_before_its_end(tmp_path: Path) -> None:
    def ask(step: int, loss: float) -> None:
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    config = dataclasses.replace(KL, iterations=4)
    assert run(config, tmp_path, callback=ask).stopped
    assert not (tmp_path / "config.json").exists()
    assert run(config, tmp_path).step == 4
    assert Autoencoder.from_pretrained(tmp_path).config.scale != 1.0


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"autoencoder": {"reconstruction": "l3"}}, r"autoencoder.reconstruction must be one of 'l1', 'l2', got 'l3'"),
        (
            {"autoencoder": {"kl_wight": 1.0}},
            "TrainConfig.autoencoder has no entry 'kl_wight': did you mean 'kl_weight'",
        ),
        ({"autoencoder": {"kl_weight": -1.0}}, "TrainConfig.autoencoder.kl_weight must not be negative, got -1.0"),
        ({"network": "digits"}, "TrainConfig.network of the objective 'autoencoder' must be one of sd-vae"),
        ({"network_options": {"multipliers": [1, 2, 4, 8, 8]}}, "AutoencoderConfig.* must"),
        (
            {"network_options": {"code": 8}},
            "TrainConfig.network_options must be fields of AutoencoderConfig, got 'code'",
        ),
        ({"times": "uniform"}, "TrainConfig.times must be left out where objective is 'autoencoder', got 'uniform'"),
        (
            {"latents": "runs/ae"},
            "TrainConfig.latents must be left out where objective is 'autoencoder', got 'runs/ae'",
        ),
        (
            {"adversarial": {"d_steps": 2}},
            "TrainConfig.adversarial.d_steps must be left out where objective is 'autoencoder', got 2",
        ),
    ],
)
def test_settings_that_mean_nothing_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        run(dataclasses.replace(AUTOENCODER, **change))
    assert "\n" not in str(error.value)


def test_images_that_do_not_fit_are_refused() -> None:
    made = AutoencoderTraining(first_step(KL)[0].autoencoder)
    config: TrainConfig = dataclasses.replace(TINY, objective="autoencoder", schedule=None)
    with pytest.raises(ValueError, match="shape must end in 1 channels, height and width, both divisible by 2"):
        fit(made, torch.zeros(9, 1, 7, 7), config, progress=False)
    with pytest.raises(ValueError, match="autoencoder must be an Autoencoder, got Linear"):
        AutoencoderTraining(nn.Linear(1, 1))  # type: ignore[arg-type]
