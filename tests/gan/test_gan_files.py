"""What `GAN.save_pretrained` writes is what `from_pretrained` gives; a file that does not fit is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffkern import GAN, Diffusion, schedules
from diffkern.nn import Discriminator, DiscriminatorConfig, Generator, GeneratorConfig, UNet, UNetConfig

MAKER = GeneratorConfig(8, 1, 5, 4, (1, 2), condition="embedding", classes=3, embedding=3)
CLASSES = torch.tensor([0, 2])


def made(**options: Any) -> GAN:
    judge = DiscriminatorConfig("dcgan", 8, 1, 4, (1, 2), condition="concatenation", classes=3)
    return GAN(Generator(MAKER), Discriminator(judge), **options).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    made(loss="hinge", penalty="r1", penalty_weight=2.5).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return folder


def test_all_that_it_holds_comes_back(tmp_path: Path) -> None:
    gan = made(loss="least_squares", penalty="r1_r2", penalty_weight=0.5)
    x = torch.zeros(2, 1, 8, 8)
    gan.train().discriminator_loss(x, CLASSES, 0)  # moves the vectors of the power iteration, which are stored too
    gan.eval().save_pretrained(tmp_path)
    state = torch.get_rng_state()
    back = GAN.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert back.to_dict() == gan.to_dict()
    assert json.loads(json.dumps(gan.to_dict())) == json.loads((tmp_path / "config.json").read_text())
    assert not back.training
    for name, tensor in gan.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name
    assert torch.equal(back.sample(2, seeds=0, cond=CLASSES), gan.sample(2, seeds=0, cond=CLASSES))
    found = back.discriminator_loss(x, CLASSES, 0, reduction="none")
    assert torch.equal(found, gan.discriminator_loss(x, CLASSES, 0, reduction="none"))
    names = set(load_file(tmp_path / "model.safetensors"))
    assert names == {f"model.{name}" for name in gan.model.state_dict()}


def test_in_another_dtype(tmp_path: Path) -> None:
    made().bfloat16().save_pretrained(tmp_path)
    assert GAN.from_pretrained(tmp_path).generator.enter.weight.dtype == torch.bfloat16  # type: ignore[union-attr]
    wide = GAN.from_pretrained(tmp_path, dtype=torch.float32)
    assert wide.sample(2, seeds=0, cond=CLASSES).dtype == torch.float32


def test_an_average_of_the_generator_beside_the_weights(tmp_path: Path) -> None:
    gan = made()
    name = "generator.enter.bias"
    average = {name: torch.full_like(gan.model.get_parameter(name), 0.25)}
    gan.save_pretrained(tmp_path)
    gan.save_pretrained(tmp_path, weights=average, average="0.100")
    assert torch.equal(GAN.from_pretrained(tmp_path, average="0.100").model.get_parameter(name), average[name])
    assert torch.equal(GAN.from_pretrained(tmp_path).model.get_parameter(name), gan.model.get_parameter(name))
    with pytest.raises(ValueError, match=r"^average must be one of those in .* \(0.100\), got '0.050'$"):
        GAN.from_pretrained(tmp_path, average="0.050")
    with pytest.raises(ValueError, match=r"^weights must have names and shapes of the network's, got \[3\] for gener"):
        gan.save_pretrained(tmp_path, weights={name: torch.zeros(3)})


class Own(nn.Module):
    """Networks of somebody else."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.linear(x)
        return found


def test_networks_of_somebody_else_are_named_and_given_again(tmp_path: Path) -> None:
    gan = GAN(Own(4, 2), Own(2, 1), "wasserstein", latent_channels=4, shape=(2,))
    gan.save_pretrained(tmp_path)
    sentence = r"^generator must be given, as .* was saved with the network '.*Own', which is none of diffkern.nn: from"
    with pytest.raises(ValueError, match=sentence):
        GAN.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"^discriminator must be given, .*: from_pretrained\(path, discriminator="):
        GAN.from_pretrained(tmp_path, Own(4, 2))
    back = GAN.from_pretrained(tmp_path, Own(4, 2), Own(2, 1))
    assert torch.equal(back.sample(3, seeds=1), gan.sample(3, seeds=1))
    with pytest.raises(ValueError, match="must fit the network, got "):
        GAN.from_pretrained(tmp_path, Own(4, 2), Own(2, 3))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda d: d.update(loss="wgan"), "loss must be one of 'minimax', .*, got 'wgan'"),
        (lambda d: d.update(penalty="r3"), "penalty must be .*, got 'r3'"),
        (lambda d: d.update(penalty_weight=-1.0), "penalty_weight must be finite and not negative, got -1.0"),
        (lambda d: d.update(latent_channels=6), "latent_channels must be that of the generator, 5, got 6"),
        (lambda d: d.update(extra=1), "has the fields loss, .*, got 'extra'"),
        (lambda d: d.update(diffkern_gan=2), "must be the configuration of a GAN with diffkern_gan = 1, got 2"),
        (lambda d: d["generator"].update(name="Nothing"), "generator.name must be one of .*, got 'Nothing'"),
        (
            lambda d: d["generator"]["config"].update(channels=8),
            "the weights in .* must be those of its generator, got .* for model.generator",
        ),
        (
            lambda d: d["discriminator"]["config"].update(spectral_norm=False),
            "the weights in .* must be those of its discriminator, got ",
        ),
        (
            lambda d: d["discriminator"]["config"].update(image_size=7),
            "DiscriminatorConfig.image_size must be divisible by 4",
        ),
    ],
)
def test_a_configuration_that_does_not_fit(copy: Path, change: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        GAN.from_pretrained(changed(copy, change))
    assert "\n" not in str(error.value)


def test_folders_of_something_else(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no config.json in .*: GAN.save_pretrained writes it"):
        GAN.from_pretrained(tmp_path)
    small = UNet(UNetConfig(channels=8, groups=2, heads=1, attention_levels=(), middle_attention=False))
    Diffusion(small, schedules.cosine(20), "v").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must be the configuration of a GAN with diffkern_gan = 1, got None"):
        GAN.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be the configuration of a Diffusion with diffkern_diffusion = 1"):
        Diffusion.from_pretrained(saved)
