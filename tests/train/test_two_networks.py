"""Training two networks in the same loop: resumption, cuts of a batch, processes, what is refused and what is said."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import training_process
from helpers.lazy import needs
from helpers.tiny_run import TINY, tiny_data
from helpers.two_networks import AUTOENCODER, GAN, first_step, run, same, weights
from torch import Tensor, nn

import diffkern
from diffkern.train import TrainConfig, fit
from diffkern.train.log import read_log

pytestmark = needs("yaml", "safetensors", "matplotlib", "PIL")
BOTH = pytest.mark.parametrize("config", [GAN, AUTOENCODER], ids=["gan", "autoencoder"])
NUMBERS = ("loss", "gradient_norm", "discriminator_loss", "penalty", "real_logit", "fake_logit")


def numbers(out: Path) -> list[dict[str, float]]:
    """What the log has of each line that a run repeats."""
    return [{"step": e["step"], **{n: e[n] for n in NUMBERS if n in e}} for e in read_log(out) if "loss" in e]


@BOTH
def test_a_resumed_run_has_the_bits_of_one_that_was_never_stopped(tmp_path: Path, config: TrainConfig) -> None:
    """Two learning rates, spectral norms and a codebook of averages included; killed after the checkpoint of step 4."""
    own = {**config.adversarial, "learning_rate": 3e-3, "betas": (0.5, 0.9), "collapse_steps": 3}
    config = dataclasses.replace(config, iterations=9, save_every=4, log_every=3, adversarial=own)
    whole = run(config, tmp_path / "whole")

    class Killed(Exception):
        pass

    def kill(step: int, loss: float) -> None:
        if step == 5:
            raise Killed

    with pytest.raises(Killed):
        run(config, tmp_path / "parts", callback=kill)
    rest = run(config, tmp_path / "parts")
    assert rest.losses == whole.losses[4:]
    assert same(weights(rest.trained), weights(whole.trained))
    for name in whole.averages.names:
        pairs = zip(whole.averages.pairs(name), rest.averages.pairs(name), strict=True)
        assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
    assert numbers(tmp_path / "parts") == numbers(tmp_path / "whole")
    assert [line["step"] for line in numbers(tmp_path / "whole")] == [3, 6, 9]
    assert "discriminator_loss" in numbers(tmp_path / "whole")[0]


@BOTH
def test_a_signal_ends_the_step_saves_and_returns(tmp_path: Path, config: TrainConfig) -> None:
    def ask(step: int, loss: float) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    fitted = run(config, tmp_path, callback=ask)
    assert fitted.stopped
    assert fitted.step == 3
    assert run(config, tmp_path).losses == run(config).losses[3:]


@BOTH
def test_micro_batches_do_not_change_a_run(config: TrainConfig) -> None:
    """To rounding: with the discriminator in play, and lambda, the codebook and the spectral norms with it."""
    config = dataclasses.replace(config, adversarial={**config.adversarial, "start": 0})
    found = {n: run(dataclasses.replace(config, micro_batch=n)) for n in (8, 3)}
    torch.testing.assert_close(found[3].losses, found[8].losses, rtol=1e-4, atol=1e-5)
    for name, value in weights(found[8].trained).items():
        torch.testing.assert_close(weights(found[3].trained)[name], value, rtol=2e-3, atol=2e-3, msg=name)


@BOTH
@pytest.mark.full
def test_two_processes_train_the_run_of_one(config: TrainConfig, tmp_path: Path) -> None:
    """To rounding, over an uneven batch of nine; one process goes on from their checkpoint."""
    fields = ("objective", "network", "network_options", "schedule")
    options = {name: getattr(config, name) for name in fields} | {"batch": 9, "log_every": 1, "iterations": 4}
    options |= {"adversarial": {**config.adversarial, **({"start": 1} if config.objective == "autoencoder" else {})}}
    place = str(Path(diffkern.__file__).parent.parent)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [training_process.__file__, json.dumps({"out": str(tmp_path), **options})]
    environment = {**os.environ, "PYTHONPATH": place, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    config = dataclasses.replace(TINY, **options)
    want = run(config, tmp_path / "alone")
    torch.testing.assert_close(found["losses"], want.losses, rtol=1e-4, atol=1e-5)
    for one, other in zip(numbers(tmp_path), numbers(tmp_path / "alone"), strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    more = dataclasses.replace(config, iterations=6)
    torch.testing.assert_close(run(more, tmp_path).losses, run(more).losses[4:], rtol=1e-3, atol=1e-4)


@BOTH
def test_each_network_has_its_own_rate_and_betas_and_is_stepped_alone(config: TrainConfig) -> None:
    own = {**config.adversarial, "start": 0, "learning_rate": 1e-3, "betas": (0.5, 0.9), "d_steps": 1}
    config = dataclasses.replace(config, adversarial=own, weight_decay=0.1)
    stepper, batches = first_step(config)
    first, second = stepper.optimizer.param_groups
    stepper.iterate(batches, 0)
    half = 0.5  # of a warm-up of two iterations
    assert (first["lr"], second["lr"]) == pytest.approx((half * 1e-2, half * 1e-3))
    assert (first["betas"], second["betas"]) == ((0.9, 0.999), (0.5, 0.9))
    steps = {
        float(stepper.optimizer.state[p]["step"])
        for g in (first, second)
        for p in g["params"]
        if p in stepper.optimizer.state
    }
    assert steps == {1.0}
    before = weights(stepper.first)
    stepper.gradient(batches, 0, stepper.critic_parameters, critic_terms(stepper))
    assert all(p.grad is None for p in stepper.first_parameters)
    stepper.update(stepper.critic_parameters)
    assert same(before, weights(stepper.first))


def critic_terms(stepper: Any) -> Any:
    if hasattr(stepper, "gan"):
        return lambda number, batch: stepper._critic_terms(0, number, batch)
    return lambda number, batch: stepper._critic_terms(batch, stepper.images(batch).flip(0))


# ------------------------------------------------------------------------------------------------- what is said


class Sure(nn.Module):
    """A discriminator that tells every image apart from a generator that makes none: its logit is 150 times a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(150.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * (x.mean((1, 2, 3)) + 0.9)


class Black(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor(-3.0))

    def forward(self, z: Tensor) -> Tensor:
        return (torch.tanh(self.level) + 0.0 * z.sum(1))[:, None, None, None].expand(-1, 1, 8, 8)


def test_a_discriminator_that_is_sure_is_said_once_and_the_run_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gan = diffkern.GAN(Black(), Sure(), "minimax", latent_channels=2, shape=(1, 8, 8))
    config = dataclasses.replace(
        TINY, objective="gan", adversarial={"collapse_steps": 3}, iterations=8, learning_rate=1e-6, schedule=None
    )
    images = torch.full((12, 1, 8, 8), 255, dtype=torch.uint8)
    fitted = fit(gan, images, config, out=tmp_path, progress=False)
    assert fitted.step == 8
    said = [entry for entry in read_log(tmp_path) if "warning" in entry]
    assert [entry["step"] for entry in said] == [3]
    assert said[0]["warning"].startswith("the discriminator's loss has been 0 (at most 0.001) for 3 steps, got ")
    assert f"warning: step 3: {said[0]['warning']}" in capsys.readouterr().err


@BOTH
def test_a_gradient_that_is_not_finite_changes_nothing_of_its_network_and_ends_the_run(
    tmp_path: Path, config: TrainConfig
) -> None:
    config = dataclasses.replace(config, bad_steps=1, learning_rate=1e-2, iterations=9)
    stepper, batches = first_step(config)
    stepper.iterate(batches, 0)
    network = stepper.discriminator if config.objective == "gan" else stepper.first  # which sees the images
    before = [p.detach().clone() for p in network.parameters()]
    for batch in batches:
        batch.x0.fill_(float("nan"))
    for _ in range(2):
        done = stepper.iterate(batches, 0)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), before, strict=True))
    assert not torch.isfinite(done.losses).all() or not torch.isfinite(torch.tensor(list(done.terms.values()))).all()
    assert (stepper.skipped, stepper.bad, stepper.too_many_bad) == (2, 2, True)


def test_a_run_that_diverges_ends_with_its_batch(tmp_path: Path) -> None:
    gan = diffkern.GAN(Black(), Sure(), latent_channels=2, shape=(1, 8, 8))
    with torch.no_grad():
        gan.discriminator.factor.fill_(float("nan"))
    config = dataclasses.replace(TINY, objective="gan", bad_steps=2, schedule=None)
    with pytest.raises(RuntimeError, match=r"3 steps in a row had a gradient that is not finite, the last of them it"):
        fit(gan, torch.full((12, 1, 8, 8), 255, dtype=torch.uint8), config, out=tmp_path, progress=False)
    said = [entry["warning"] for entry in read_log(tmp_path) if "warning" in entry]
    assert said == ["the discriminator's loss must be finite, got nan: training has diverged, lower the learning rate"]
    assert (tmp_path / "bad_batch_2_0.safetensors").exists()


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"adversarial": {"los": "hinge"}}, "TrainConfig.adversarial has no entry 'los': did you mean 'loss'?"),
        ({"adversarial": {"loss": "hing"}}, r"TrainConfig.adversarial.loss must be one of 'minimax', .*, got 'hing'"),
        ({"adversarial": {"d_steps": 0}}, r"TrainConfig.adversarial.d_steps must be in 1..1000000000, got 0"),
        ({"adversarial": {"betas": (0.5, 1.0)}}, r"TrainConfig.adversarial.betas must be in \[0, 1\), got"),
        ({"adversarial": {"learning_rate": 0.0}}, "TrainConfig.adversarial.learning_rate must be positive, got 0.0"),
        ({"adversarial": {"penalty_weight": -1.0}}, "TrainConfig.adversarial.penalty_weight must not be negative"),
        (
            {"adversarial": {"discriminator": {"width": 3}}},
            "TrainConfig.adversarial.discriminator must be fields of Disc",
        ),
        (
            {"network_options": {"chanels": 3}},
            r"TrainConfig.network_options must be fields of GeneratorConfig, got .*'channels'",
        ),
        ({"network": "digits"}, r"TrainConfig.network of the objective 'gan' must be one of dcgan-digits"),
        ({"schedule": "cosine"}, "TrainConfig.schedule must be left out where objective is 'gan', got 'cosine'"),
        ({"guidance": 2.0}, "TrainConfig.guidance must be left out where objective is 'gan', got 2.0"),
        ({"latents": "runs/ae"}, "TrainConfig.latents must be left out where objective is 'gan', got 'runs/ae'"),
        ({"degradation": "inpainting"}, "TrainConfig.degradation must be left out where objective is 'gan', got"),
        ({"degradation_options": {"share": 0.5}}, "TrainConfig.degradation_options must be left out where objective"),
        ({"adversarial": {"weight": 1.0}}, "TrainConfig.adversarial.weight must be left out where objective is 'gan'"),
        ({"adversarial": {"start": 5}}, "TrainConfig.adversarial.start must be left out where objective is 'gan'"),
        ({"precision": "float16"}, "TrainConfig.precision must be 'float32' or 'bfloat16' where objective is 'gan'"),
        ({"shard": "fsdp"}, "TrainConfig.shard must be 'ddp' where objective is 'gan', got 'fsdp'"),
        ({"degradation": "deblurring"}, "TrainConfig.degradation must be left out where objective is 'gan', got 'deb"),
        ({"latents": "runs/a"}, "TrainConfig.latents must be left out where objective is 'gan', got 'runs/a'"),
        ({"compile": True}, "TrainConfig.compile must be False where objective is 'gan', got True"),
        ({"autoencoder": {"kl_weight": 1.0}}, "TrainConfig.autoencoder must be left out where objective is 'gan'"),
        ({"objective": "eps"}, r"TrainConfig.adversarial must be left out where objective is 'eps', got"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        run(dataclasses.replace(GAN, **change))
    assert "\n" not in str(error.value)


def test_captions_mean_nothing_to_a_gan() -> None:
    images, labels = tiny_data()
    captioned = images, [f"class {label}" for label in labels.tolist()]
    with pytest.raises(ValueError, match=r"TrainConfig\.text must be False where objective is 'gan', got True"):
        fit(None, captioned, dataclasses.replace(GAN, text=True), progress=False)


def test_data_and_models_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    gan = run(dataclasses.replace(GAN, iterations=1)).trained
    config = dataclasses.replace(GAN, iterations=1)
    x0, labels = tiny_data()
    for model, data, sentence in (
        (
            gan,
            torch.zeros(9, 1, 12, 12),
            r"data must have images of the generator's shape \[1, 8, 8\], got \[1, 12, 12\]",
        ),
        (gan, torch.zeros(9, 1, 8, 8), "data must have labels for a GAN of 3 classes, got none"),
        (gan, (x0, labels + 2), "data must have labels below 3, the GAN's, got "),
        (nn.Linear(1, 1), (x0, labels), "diffusion must be what TrainConfig.objective 'gan' trains, a GAN, got Linear"),
    ):
        with pytest.raises(ValueError, match=sentence):
            fit(model, data, config, progress=False)  # type: ignore[arg-type]
    for own, sentence in (
        ({"loss": "hinge"}, "loss must be the GAN's, 'non_saturating'"),
        ({"penalty": "r1"}, "penalty"),
    ):
        with pytest.raises(ValueError, match=rf"TrainConfig.adversarial.{sentence}"):
            fit(gan, (x0, labels), dataclasses.replace(config, adversarial=own), progress=False)
    with pytest.raises(ValueError, match="objective 'eps' trains, a Diffusion, got GAN"):
        fit(gan, (x0, labels), TINY, progress=False)
    with pytest.raises(AttributeError, match=re.escape("what was trained is no Diffusion, but a GAN: .trained")):
        _ = run(config).diffusion


@BOTH
def test_a_run_of_another_kind_is_refused(tmp_path: Path, config: TrainConfig) -> None:
    run(dataclasses.replace(config, iterations=2), tmp_path)
    other = dataclasses.replace(config, adversarial={**config.adversarial, "learning_rate": 1e-3})
    with pytest.raises(ValueError, match=r"config.adversarial.learning_rate must be None, as in .*00000002, got 0.001"):
        run(other, tmp_path)
    with pytest.raises(ValueError, match="as in"):
        run(TINY, tmp_path)


def test_a_run_from_before_these_objectives_goes_on(tmp_path: Path) -> None:
    whole = run(TINY, tmp_path / "whole")
    run(dataclasses.replace(TINY, iterations=3), tmp_path / "old")
    place = tmp_path / "old" / "checkpoints" / "00000003" / "training.json"
    data = json.loads(place.read_text())
    assert set(data["extra"]["window"]) == {"loss", "norm", "steps"}
    for name in ("adversarial", "autoencoder"):
        del data["extra"]["config"][name]
    place.write_text(json.dumps(data))
    assert run(TINY, tmp_path / "old").losses == whole.losses[3:]


# ----------------------------------------------------------------------------------------------------- what is learned


@needs("sklearn")
@pytest.mark.long
@pytest.mark.parametrize("labels", [True, False], ids=["classes", "none"])
def test_the_preset_makes_all_ten_digits(labels: bool) -> None:
    """No class has less than 4 % of the images, by a classifier of the digits; asked for a class, it comes."""
    from diffkern.data import open_images
    from diffkern.generate import generate
    from diffkern.metrics import evaluate, train_classifier
    from diffkern.train import PRESETS

    images = open_images("digits")
    fitted = fit(None, images, dataclasses.replace(PRESETS["gan-digits"], labels=labels), progress=False)
    with fitted.averages.used("plain"):
        scores = evaluate(list(generate(fitted.trained, 1500)), images, train_classifier(images))
    shares = [c.share or 0.0 for c in scores.classes]
    assert len(shares) == 10
    assert min(shares) >= 0.04
    assert scores.recall > 0.6
    assert (scores.agreement or 0.0) > 0.95 or not labels
