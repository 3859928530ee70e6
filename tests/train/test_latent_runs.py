"""Training in latents: cached or on the fly, from start to pictures, resumed, by every kind of network."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import training_process
from helpers.latent_cases import latent_diffusion, small_autoencoder, some_images
from helpers.lazy import needs
from helpers.tiny_run import TINY, tiny_data
from torch import Tensor

import diffkern
from diffkern import Diffusion, ops, schedules
from diffkern.data import open_images, split
from diffkern.data.latents import LatentImages
from diffkern.nn import Autoencoder
from diffkern.train import TrainConfig, fit, make_diffusion
from diffkern.train.latents import Encoder, autoencoder_of, in_latents
from diffkern.train.log import read_log
from diffkern.train.validation import validate

pytestmark = needs("yaml", "safetensors", "matplotlib", "PIL")


def data() -> tuple[Tensor, Tensor]:
    """Bars at three places, uint8 [20, 1, 16, 16], with their places as labels."""
    labels = torch.arange(20) % 3
    images = torch.zeros(20, 1, 16, 16, dtype=torch.uint8)
    for i, label in enumerate(labels.tolist()):
        images[i, :, :, 4 * label : 4 * label + 4] = 200 + i
    return images, labels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of a saved autoencoder, with a standard deviation of about 1 of its latents."""
    small_autoencoder(scale=0.8).save_pretrained(tmp_path / "autoencoder")
    return tmp_path / "autoencoder"


def configuration(folder: Path, **changes: Any) -> TrainConfig:
    cache = str(folder.parent / "cache")
    return dataclasses.replace(TINY, latents=str(folder), cache=cache, **changes)


@pytest.mark.parametrize("flip", [False, True])
def test_both_ways_of_encoding_train_the_same(folder: Path, flip: bool) -> None:
    """To rounding: the encoder adds up its sums in batches of another size."""
    losses = {}
    for encode in ("cached", "on_the_fly"):
        config = configuration(folder, encode=encode, batch=7, iterations=4, flip=flip)
        losses[encode] = fit(None, data(), config, progress=False).losses
    assert losses["cached"] == pytest.approx(losses["on_the_fly"], rel=1e-4)
    other = fit(None, data(), configuration(folder, batch=7, iterations=4, flip=not flip), progress=False).losses
    assert losses["cached"] != pytest.approx(other, rel=1e-4)


def test_16_bits_do_not_round_the_scale_of_kept_latents() -> None:
    diffusion = latent_diffusion(small_autoencoder(scale=1.003, shift=0.1234).to(torch.bfloat16))
    x = some_images()
    mean, std = Encoder(diffusion)(x)
    assert std is not None
    assert torch.equal(mean.float(), diffusion.encode(x))


def test_the_autoencoder_is_not_trained_averaged_or_in_the_optimizer(folder: Path) -> None:
    fitted = fit(None, data(), configuration(folder, iterations=3), progress=False)
    autoencoder = fitted.diffusion.autoencoder
    assert isinstance(autoencoder, Autoencoder)
    for name, tensor in Autoencoder.from_pretrained(folder).state_dict().items():
        assert torch.equal(tensor, autoencoder.state_dict()[name]), name
    names = set(fitted.averages.state_dict()["averages"]["0.050"])
    assert names
    assert not [name for name in names if "autoencoder" in name]
    assert fitted.diffusion.preview_map is not None


def test_a_run_keeps_it_once_resumes_and_has_decoded_pictures(folder: Path, tmp_path: Path) -> None:
    out, whole = tmp_path / "run", tmp_path / "whole"
    common: dict[str, Any] = {"save_every": 2, "sample_every": 2, "validation": 4, "validate_every": 2, "log_every": 1}
    expected = fit(None, data(), configuration(folder, iterations=4, **common), out=whole, progress=False)
    fit(None, data(), configuration(folder, iterations=2, **common), out=out, progress=False)
    folder.rename(folder.with_name("moved"))  # the run has its own
    again = fit(None, data(), configuration(folder, iterations=4, **common), out=out, progress=False)
    assert again.losses == expected.losses[2:]
    assert {path.name for path in (out / "autoencoder").iterdir()} == {
        "config.json",
        "model.safetensors",
        "preview.json",
    }
    for checkpoint in (out / "checkpoints").iterdir():
        assert not (checkpoint / "autoencoder").exists()
        assert "autoencoder" in json.loads((checkpoint / "config.json").read_text())
    from PIL import Image

    with Image.open(out / "samples" / "00000004.png") as picture:
        assert picture.width > 4 * 16
    entry = [entry for entry in read_log(out) if "validation_loss" in entry][-1]
    assert math.isfinite(entry["validation_loss"])
    assert "bits_per_dim" not in entry
    found = Diffusion.from_pretrained(out)
    assert found.image_shape == (1, 16, 16)
    assert found.preview_map == expected.diffusion.preview_map
    assert found.sample(1, "ddim", steps=2, seeds=0).shape == (1, 1, 16, 16)


def test_a_run_may_change_the_way_of_encoding_but_not_the_autoencoder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    fit(None, data(), configuration(folder, iterations=2), out=out, progress=False)
    fit(None, data(), configuration(folder, iterations=3, encode="on_the_fly"), out=out, progress=False)
    other = tmp_path / "other"
    small_autoencoder(1).save_pretrained(other)
    with pytest.raises(ValueError, match=r"autoencoder.hash must be '\w+', as in .*, got '\w+'"):
        fit(None, data(), configuration(other, iterations=4), out=out, progress=False)


@pytest.mark.parametrize(
    ("changes", "shape"),
    [
        ({"objective": "flow", "schedule": None}, (2, 8, 8)),
        ({"objective": "edm", "schedule": None}, (2, 8, 8)),
        ({"objective": "hybrid"}, (2, 8, 8)),
        (
            {
                "network": "DiT-S/2",
                "network_options": {"depth": 1, "width": 16, "heads": 2},
            },
            (2, 8, 8),
        ),
    ],
    ids=["flow", "edm", "hybrid", "dit"],
)
def test_every_network_and_objective_takes_its_size_from_the_latents(
    folder: Path, changes: dict[str, Any], shape: tuple[int, ...]
) -> None:
    fitted = fit(None, data(), configuration(folder, iterations=2, **changes), progress=False)
    assert all(math.isfinite(loss) for loss in fitted.losses)
    assert fitted.diffusion.shape == shape
    assert fitted.diffusion.image_shape == (1, 16, 16)
    config: Any = fitted.diffusion.model.config
    assert (config.in_channels, config.image_size) == (2, 8)


def test_a_diffusion_of_ones_own_trains_on_images_and_on_latents(folder: Path) -> None:
    config = configuration(folder, iterations=2)
    config = dataclasses.replace(config, latents=None)
    autoencoder = Autoencoder.from_pretrained(folder)

    def diffusion() -> Diffusion:
        return make_diffusion(config, (1, 16, 16), 3, autoencoder=autoencoder)

    images = open_images(data())
    losses = fit(diffusion(), images, config, progress=False).losses
    latents = in_latents(diffusion(), images, config, None, False)
    assert isinstance(latents, LatentImages)
    assert in_latents(diffusion(), latents, config, None, False) is latents
    assert fit(diffusion(), latents, config, progress=False).losses == losses
    with pytest.raises(
        ValueError, match=r"data must have images of the diffusion's shape \[1, 16, 16\], got \[1, 8, 8\]"
    ):
        fit(diffusion(), torch.zeros(4, 1, 8, 8), config, progress=False)


def test_validation_is_of_the_modes_both_ways(folder: Path) -> None:
    config = configuration(folder)
    diffusion = make_diffusion(config, (1, 16, 16), 3, autoencoder=Autoencoder.from_pretrained(folder))
    _, held_out = split(open_images(data(), flip=True), 5)
    latents = in_latents(diffusion, held_out, config, None, False)
    found = [validate(diffusion, images) for images in (held_out, latents)]
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-5)
    assert found[0].bits_per_dim is None
    plain = Diffusion(diffusion.model, diffusion.schedule, diffusion.prediction, null=3.0)
    modes = LatentImages(latents, latents.mean, None)  # type: ignore[attr-defined]
    assert validate(plain, modes).loss == found[1].loss


def test_a_network_that_starts_from_a_saved_one_keeps_its_autoencoder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "first"
    fit(None, data(), configuration(folder, iterations=2), out=out, progress=False)
    config = configuration(folder, iterations=2, init=str(out))
    for latents in (str(folder), None):
        again = fit(None, data(), dataclasses.replace(config, latents=latents), out=tmp_path / "second", progress=False)
        assert again.diffusion.image_shape == (1, 16, 16)
    small_autoencoder(1).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"TrainConfig.latents must be left out, or name the autoencoder of init"):
        fit(None, data(), dataclasses.replace(config, latents=str(tmp_path / "other")), progress=False)


def test_what_is_no_folder_of_an_autoencoder_is_said(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"TrainConfig.latents must be the folder of an autoencoder, or of a run .* got .*nothing"
    ):
        autoencoder_of(TrainConfig(latents=str(tmp_path / "nothing")), None)
    with pytest.raises(ValueError, match=r"TrainConfig.encode must be one of 'cached', 'on_the_fly', got 'once'"):
        TrainConfig(encode="once")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="both divisible by 2"):
        make_diffusion(TINY, (1, 15, 16), autoencoder=small_autoencoder())


def test_images_that_are_cropped_at_random_are_encoded_on_the_fly_or_refused(folder: Path) -> None:
    wide = torch.zeros(6, 1, 16, 20, dtype=torch.uint8)
    config = configuration(folder, iterations=1, size=16, crop="random")
    with pytest.raises(
        ValueError, match="images must be augmented by flips alone for their latents to be kept, got crop"
    ):
        fit(None, wide, config, progress=False)
    fit(None, wide, dataclasses.replace(config, encode="on_the_fly"), progress=False)


def test_the_loss_is_measured_without_the_encoder(folder: Path, tmp_path: Path) -> None:
    """Three times the forward pass's operations is the network's alone: the same share either way."""
    from diffkern.train.steps import DiffusionStepper

    counts = []
    from torch.utils.flop_counter import FlopCounterMode

    for encode in ("cached", "on_the_fly"):
        config = configuration(folder, encode=encode)
        diffusion = make_diffusion(config, (1, 16, 16), 3, autoencoder=Autoencoder.from_pretrained(folder))
        stepper = DiffusionStepper(diffusion, config, torch.device("cpu"))
        images = stepper.seen(open_images(data()), None, False)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            stepper.once(images)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_schedules_of_flows_sample_images_again() -> None:
    network = make_diffusion(TINY, (2, 8, 8)).model
    diffusion = Diffusion(network, schedules.flow(), autoencoder=small_autoencoder())
    assert diffusion.sample(2, steps=2, seeds=ops.seeds(0, 2)).shape == (2, 1, 16, 16)


@pytest.mark.full
@pytest.mark.parametrize("encode", ["cached", "on_the_fly"])
def test_two_processes_train_as_one(folder: Path, tmp_path: Path, encode: str) -> None:
    out = tmp_path / "run"
    options = {"latents": str(folder), "cache": str(tmp_path / "cache"), "encode": encode, "iterations": 3}
    environment = {**os.environ, "PYTHONPATH": str(Path(diffkern.__file__).parent.parent), "OMP_NUM_THREADS": "1"}
    call = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", training_process.__file__]
    given = json.dumps({**options, "out": str(out), "flip": True})
    made = subprocess.run(
        [sys.executable, *call, given], env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert made.returncode == 0, made.stderr
    config = configuration(folder, encode=encode, iterations=3, flip=True)
    alone = fit(None, tiny_data(), config, progress=False).losses
    torch.testing.assert_close(json.loads(made.stdout.splitlines()[-1])["losses"], alone, rtol=1e-4, atol=1e-6)
    assert len(list((tmp_path / "cache").glob("latents-*/about.json"))) == (encode == "cached")
    assert Diffusion.from_pretrained(out).image_shape == (1, 8, 8)
