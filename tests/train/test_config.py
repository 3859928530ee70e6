"""The configuration of a training run: its rules, its YAML, the learning rate that it says, its presets."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from diffkern.train.config import TrainConfig
from diffkern.train.learning_rate import learning_rate
from diffkern.train.objectives import OBJECTIVES
from diffkern.train.presets import PRESETS


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    config = TrainConfig(
        objective="edm",
        network_options={"channels": 16, "multipliers": [1, 2]},
        averages=(0.05, 0.1, 0.2),
        clip=None,
        micro_batch=7,
        seed=2**63 - 1,
        data="a: folder # with signs",
    )
    config.save(tmp_path / "config.yaml")
    assert TrainConfig.load(tmp_path / "config.yaml") == config


def test_a_part_of_a_configuration_leaves_the_rest_at_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "part.yaml").write_text("batch: 32\nlearning_rate: 1\n")
    assert TrainConfig.load(tmp_path / "part.yaml") == TrainConfig(batch=32, learning_rate=1.0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("iteratons: 5", "TrainConfig has no field 'iteratons': did you mean 'iterations'?"),
        ("batch: many", "TrainConfig.batch must be an integer, got 'many'"),
        ("batch: 0", "TrainConfig.batch must be in 1..16777216, got 0"),
        ("clip: 0.0", "TrainConfig.clip must be positive and finite, got 0.0"),
        (
            "objective: gans",
            "TrainConfig.objective must be one of 'eps', 'x0', 'v', 'edm', 'flow', 'ncsn', 'hybrid', 'gan'",
        ),
        ("averages: [0.3]", "TrainConfig.averages must be in (0, 0.28)"),
        ("averages: [0.1, 0.1]", "TrainConfig.averages must be different from each other"),
        ("drop: 1.0", "TrainConfig.drop must be in [0, 1), got 1.0"),
        ("validation: 2.5", "TrainConfig.validation must be a whole number of images, or a share below 1, got 2.5"),
        ("seed: -1", "TrainConfig.seed must be in 0..2**63 - 1, got -1"),
        ("- 1\n- 2", "must be a configuration in YAML, name: value"),
        ("a: [", "must be a configuration in YAML, got"),
        ("!!python/object/apply:os.system ['true']", "must be a configuration in YAML, got"),
    ],
)
def test_a_wrong_entry_is_one_sentence(tmp_path: Path, text: str, sentence: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ValueError) as found:  # noqa: PT011  (the sentence is looked at below)
        TrainConfig.load(path)
    assert sentence in str(found.value)


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("batch", "8", "TrainConfig.batch must be an integer, got '8'"),
        ("averages", 0.1, "TrainConfig.averages must be a list (each a finite number), got 0.1"),
        ("betas", (0.9,), "TrainConfig.betas must be a list of 2"),
        ("flip", "yes", "TrainConfig.flip must be true or false, got 'yes'"),
        ("sampler", "ddimm", "TrainConfig.sampler must be one of 'ddpm', "),
        ("drop", None, "TrainConfig.drop must be a finite number, got None"),
    ],
)
def test_a_field_of_another_type_is_one_sentence_in_python_too(field: str, value: Any, sentence: str) -> None:
    options: dict[str, Any] = {field: value}
    with pytest.raises(ValueError) as found:  # noqa: PT011  (the sentence is looked at below)
        TrainConfig(**options)
    assert sentence in str(found.value)
    assert TrainConfig(weight_decay=1, averages=[0.05]) == TrainConfig(weight_decay=1.0, averages=(0.05,))  # type: ignore[arg-type]


def test_the_learning_rate_rises_and_falls_as_it_says() -> None:
    config = TrainConfig(iterations=100, warmup=10, learning_rate=2.0, decay="cosine", final_rate=0.1)
    assert learning_rate(config, 0) == pytest.approx(0.2)
    assert learning_rate(config, 4) == pytest.approx(1.0 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.04))))
    assert learning_rate(config, 50) == pytest.approx(2.0 * 0.55)
    assert learning_rate(config, 100) == pytest.approx(0.2)
    constant = dataclasses.replace(config, decay="constant")
    assert [learning_rate(constant, i) for i in (9, 10, 99)] == [2.0, 2.0, 2.0]
    root = dataclasses.replace(config, decay="inverse_sqrt")
    assert learning_rate(root, 9) == 2.0
    assert learning_rate(root, 39) == pytest.approx(1.0)  # sqrt(10/40)
    assert learning_rate(TrainConfig(warmup=0, decay="inverse_sqrt"), 3) == pytest.approx(1e-4)  # sqrt(1/4)


DIFFUSIONS = [name for name, config in PRESETS.items() if config.objective in OBJECTIVES]


def test_a_preset_of_two_networks_makes_them() -> None:
    import torch

    from diffkern.train.adversarial import make_gan
    from diffkern.train.reconstruction import make_autoencoder

    with torch.device("meta"):
        gan = make_gan(PRESETS["gan-digits"], (1, 8, 8), 10)
        plain = make_gan(PRESETS["gan-digits"], (1, 8, 8), 0)
        made = {n: make_autoencoder(PRESETS[n], (1, 28, 28)).autoencoder for n in ("autoencoder-digits", "vq-digits")}
    assert (gan.shape, gan.classes, plain.classes) == ((1, 8, 8), 10, 0)
    assert {n: a.latent_shape((1, 28, 28)) for n, a in made.items()} == dict.fromkeys(made, (2, 7, 7))
    assert [a.config.regularisation for a in made.values()] == ["kl", "vq"]
    assert sorted(PRESETS.keys() - {*DIFFUSIONS}) == ["autoencoder-digits", "gan-digits", "vq-digits"]


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_a_preset_makes_a_model(name: str) -> None:
    import torch

    from diffkern.train.objectives import make_diffusion
    from diffkern.vocabulary import Vocabulary

    config = PRESETS[name]
    size = config.size or (8 if name.startswith("digits") else 32)
    words = Vocabulary.of(["seven, thick"]) if config.text else None
    with torch.device("meta"):
        classes = 10 if config.labels and words is None else 0
        diffusion = make_diffusion(config, (3, size, size), classes, vocabulary=words)
    assert diffusion.shape == (3, size, size)
    assert diffusion.prediction == OBJECTIVES[config.objective].prediction
    assert diffusion.drop == (0.1 if config.labels else 0.0)


def wrong_models() -> list[tuple[dict[str, Any], str]]:
    return [
        ({"network_options": {"chanels": 3}}, "must be fields of UNetConfig, got 'chanels': did you mean 'channels'?"),
        ({"network_options": {"channels": "3"}}, "UNetConfig.channels must be an integer, got '3'"),
        ({"network": "ddpm"}, "name must be one of digits"),
        ({"schedule": "linar"}, "TrainConfig.schedule must be one of"),
        ({"schedule_options": {"beta": 1}}, "TrainConfig.schedule_options must be arguments of linear"),
        ({"times_options": {"mean": 1}}, "TrainConfig.times must be a name where times_options are given, got"),
        (
            {"objective": "edm", "times": "log_normal", "times_options": {"P_mean": 1}},
            "TrainConfig.times_options must be constants of log_normal",
        ),
    ]


@pytest.mark.parametrize(("options", "sentence"), wrong_models())
def test_a_model_that_cannot_be_made_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    from diffkern.train.objectives import make_diffusion

    with pytest.raises(ValueError) as found:  # noqa: PT011  (the sentence is looked at below)
        make_diffusion(TrainConfig(**{"network": "digits", **options}), (1, 8, 8), 10)
    assert sentence in str(found.value)


def test_the_first_weights_come_from_the_seed_alone() -> None:
    import torch

    from diffkern.train.objectives import make_network

    config = TrainConfig(network="digits", network_options={"channels": 16, "heads": 2, "blocks": 1}, seed=3)
    torch.manual_seed(11)
    first = make_network(config, (1, 8, 8), 10)
    before = torch.get_rng_state()
    second = make_network(config, (1, 8, 8), 10)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize(
    ("network", "options", "wrong"),
    [
        ("sd-1", {}, "context_channels = 768"),
        ("digits", {"concat_channels": 3}, "concat_channels = 3"),
        ("digits", {"vector_channels": 5}, "vector_channels = 5"),
        ("digits", {"ids": 2}, "ids = 2"),
    ],
)
def test_a_network_that_needs_more_than_classes_is_refused_before_it_is_built(
    network: str, options: dict[str, int], wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffkern.train import objectives

    monkeypatch.setattr(objectives, "UNet", lambda _: pytest.fail("was built"))
    config = TrainConfig(network=network, network_options=options)
    with pytest.raises(
        ValueError, match=f"TrainConfig.network must need nothing but classes, got '{network}' with {wrong}"
    ):
        objectives.make_network(config, (4, 64, 64), 0)


def test_an_autoencoder_is_no_network_of_diffusion() -> None:
    from diffkern.train import objectives

    with pytest.raises(ValueError, match=r"^TrainConfig\.network must be a network of noise and time, got 'sd-vae'$"):
        objectives.make_network(TrainConfig(network="sd-vae"), (3, 64, 64), 0)


def test_the_constants_of_times_reach_their_sampler() -> None:
    from diffkern.objectives.time_sampling import LogNormal
    from diffkern.train.objectives import make_diffusion, resampling

    config = TrainConfig(
        network="digits", objective="edm", times="log_normal", times_options={"mean": -0.4, "std": 1.0}
    )
    assert make_diffusion(config, (1, 8, 8), 0).times == LogNormal(-0.4, 1.0)
    table = TrainConfig(network="digits", times="loss_second_moment", times_options={"history": 3})
    found = resampling(table, make_diffusion(table, (1, 8, 8), 0))
    assert found is not None
    assert (found.T, found.history) == (1000, 3)
    for name in ("T", "device"):
        wrong = dataclasses.replace(table, times_options={name: 5})
        with pytest.raises(ValueError, match=f"times_options must be constants of loss_second_moment, got: .*'{name}'"):
            resampling(wrong, make_diffusion(table, (1, 8, 8), 0))
