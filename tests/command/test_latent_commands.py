"""The commands on models in latents: training makes one, samples are pixels, what is evaluated are pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.latent_cases import small_autoencoder
from helpers.lazy import needs

from diffkern.__main__ import main
from diffkern.diffusion import Diffusion
from diffkern.generate import generate, read_shards
from diffkern.nn import Autoencoder
from diffkern.pictures import as_bytes
from diffkern.train import TrainConfig

pytestmark = needs("PIL", "safetensors", "tqdm", "matplotlib", "yaml", "jsonargparse")

SMALL = ("--network", "digits", "--network_options.channels", 8, "--network_options.heads", 1)
SMALL += (
    "--network_options.groups",
    4,
    "--network_options.blocks",
    1,
    "--batch",
    8,
    "--quiet",
    "--tensorboard",
    "false",
)


def command(name: str, *arguments: object) -> int:
    return main([name, *map(str, arguments)])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained for two iterations in the latents of 1 x 16 x 16 images of two classes."""
    folder = tmp_path_factory.mktemp("latent")
    small_autoencoder(scale=0.8).save_pretrained(folder / "autoencoder")
    labels = np.arange(40) % 2
    images = np.zeros((40, 16, 16), np.uint8)
    for i, label in enumerate(labels):
        images[i, :, 8 * label : 8 * label + 8] = 150 + 2 * i
    np.savez(folder / "data.npz", images=images, labels=labels)
    given = ("--data", folder / "data.npz", "--latents", folder / "autoencoder", "--cache", folder / "cache")
    assert command("train", *given, "--out", folder / "run", "--iterations", 2, *SMALL) == 0
    return folder / "run"


def test_a_run_knows_its_latents(run: Path) -> None:
    config = TrainConfig.load(run / "config.yaml")
    assert (config.latents, config.encode) == (str(run.parent / "autoencoder"), "cached")
    assert [path.name for path in run.parent.glob("cache/latents-*") if path.is_dir()]
    assert (run / "autoencoder" / "preview.json").is_file()
    assert command("train", "--out", run, "--iterations", 3, "--encode", "on_the_fly", "--quiet") == 0
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"] == 3


def test_samples_are_pixels(run: Path, tmp_path: Path) -> None:
    from PIL import Image

    job = ("--run", run, "--quiet", "--steps", 2, "--sampler", "ddim", "--micro-batch", 2)
    assert command("sample", *job, "--n", 3, "--out-dir", tmp_path / "each", "--out", tmp_path / "grid.png") == 0
    diffusion = Diffusion.from_pretrained(run).to(memory_format=torch.channels_last)
    made = torch.cat([p.images for p in generate(diffusion, 3, "ddim", 2, classes=[0, 1, 0], micro_batch=2)])
    assert made.shape == (3, 1, 16, 16)
    for j, path in enumerate(sorted((tmp_path / "each").iterdir())):
        assert (np.asarray(Image.open(path)) == as_bytes(made)[j, :, :, 0].numpy()).all()
    assert Image.open(tmp_path / "grid.png").width > 2 * 16
    assert command("sample", *job, "--n", 3, "--shards", tmp_path / "shards") == 0
    shards = torch.cat([part.images for part in read_shards(tmp_path / "shards")])
    assert (as_bytes(shards) == as_bytes(made)).all()


def test_no_sampler_keeps_latents_in_the_range_of_images(run: Path) -> None:
    from diffkern.generate import recommended

    diffusion = Diffusion.from_pretrained(run)
    plan = recommended(diffusion, "ddim", 2)
    assert all(row.clip is None or not np.isfinite(row.clip) for row in plan.rows)
    plain = Diffusion(diffusion.model, diffusion.schedule, diffusion.prediction)
    assert all(row.clip == 1.0 for row in recommended(plain, "ddim", 2).rows)


@pytest.mark.full
def test_what_is_evaluated_are_pixels(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ("--run", run, "--quiet", "--steps", 2, "--sampler", "ddim", "--n", 12, "--features", "classifier")
    assert command("evaluate", *job, "--out", tmp_path) == 0
    assert "bits per dimension" not in capsys.readouterr().out
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert found["bits_per_dim"] is None
    assert found["scores"]["images"] == 12
    assert found["scores"]["reference"] == 40
    assert (tmp_path / "evaluation.png").is_file()


@pytest.mark.full
def test_latents_of_an_autoencoder_that_was_trained_by_the_command(run: Path, tmp_path: Path) -> None:
    data, options = run.parent / "data.npz", ("--network_options.channels", 8, "--network_options.groups", 4)
    sizes = (
        "--network_options.multipliers",
        "[1,2]",
        "--network_options.blocks",
        1,
        "--network_options.latent_channels",
        2,
    )
    common = ("--batch", 8, "--iterations", 2, "--quiet", "--tensorboard", "false")
    first = ("--objective", "autoencoder", "--data", data, "--out", tmp_path / "a", *options, *sizes, *common)
    assert command("train", *first) == 0
    autoencoder = Autoencoder.from_pretrained(tmp_path / "a")
    assert autoencoder.scale != 1.0
    given = ("--data", data, "--latents", tmp_path / "a", "--cache", tmp_path / "cache", "--out", tmp_path / "b")
    assert command("train", *given, "--iterations", 2, *SMALL) == 0
    diffusion = Diffusion.from_pretrained(tmp_path / "b")
    assert diffusion.image_shape == (1, 16, 16)
    assert diffusion.shape == (2, 8, 8)


def test_a_folder_without_an_autoencoder_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--data", run.parent / "data.npz", "--latents", tmp_path / "none", "--out", tmp_path / "run", *SMALL)
    assert command("train", *given) != 0
    assert "TrainConfig.latents must be the folder of an autoencoder, or of a run" in capsys.readouterr().err
