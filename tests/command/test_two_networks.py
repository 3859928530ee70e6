"""A GAN and an autoencoder from the command line: trained, sampled, evaluated, reconstructed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.lazy import needs
from helpers.tiny_run import tiny_data
from helpers.two_networks import AUTOENCODER, GAN

from diffkern.__main__ import main
from diffkern.command.train import chosen
from diffkern.nn import Autoencoder
from diffkern.train import TrainConfig
from diffkern.train.log import read_log

pytestmark = needs("yaml", "jsonargparse", "docstring_parser", "safetensors", "matplotlib", "PIL")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    x0, labels = tiny_data()
    path = tmp_path_factory.mktemp("data") / "bars.npz"
    np.savez(path, images=x0.numpy(), labels=labels.numpy())
    return path


def trained(config: TrainConfig, data: Path, out: Path, *flags: str) -> Path:
    values = config.to_dict() | {"iterations": 3, "log_every": 1, "validation": 4.0, "threads": 1, "batch": 8}
    TrainConfig.from_dict(values).save(out.with_suffix(".yaml"))
    given = ["train", "--out", str(out), "--config", str(out.with_suffix(".yaml")), "--data", str(data)]
    assert main([*given, *flags, "--quiet"]) == 0
    return out


def test_dictionaries_of_dictionaries_are_flags() -> None:
    flags = [
        "--adversarial.discriminator.channels",
        "8",
        "--adversarial.loss",
        "hinge",
        "--autoencoder.kl_weight",
        "0.5",
    ]
    flags += ["--adversarial.discriminator.multipliers", "[1, 2]", "--adversarial.betas", "[0.5, 0.9]"]
    config = chosen(["--out", "nowhere", *flags])
    assert config.adversarial == {
        "loss": "hinge",
        "betas": [0.5, 0.9],
        "discriminator": {"channels": 8, "multipliers": [1, 2]},
    }
    assert config.autoencoder == {"kl_weight": 0.5}


def test_a_gan_is_trained_sampled_and_evaluated(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(GAN, data, tmp_path / "run", "--adversarial.discriminator.channels", "6")
    assert f"diffkern sample --run {run} --n 64 --out grid.png" in capsys.readouterr().out
    assert TrainConfig.load(run / "config.yaml").adversarial["discriminator"] == {"channels": 6}
    assert read_log(run)[-1]["validation_loss"] > 0.0
    common = ["sample", "--run", str(run), "--quiet"]
    assert main([*common, "--n", "6", "--out", str(tmp_path / "a.png"), "--average", "raw"]) == 0
    assert "6 images in" in capsys.readouterr().out
    assert main([*common, "--classes", "1,1", "--out-dir", str(tmp_path / "each")]) == 0
    assert sorted(path.name for path in (tmp_path / "each").iterdir()) == ["00000_class1.png", "00001_class1.png"]
    assert main([*common, "--n", "9", "--shards", str(tmp_path / "shards")]) == 0
    with np.load(tmp_path / "shards" / "shard-000000.npz") as arrays:
        assert arrays["arr_0"].shape == (9, 8, 8, 1)
        assert arrays["arr_1"].tolist() == [0, 1, 2] * 3
    capsys.readouterr()
    for flag, value in (("--steps", "4"), ("--sampler", "ddim"), ("--guidance", "2.0")):
        assert main([*common, flag, value]) == 2
        assert f"{flag} must be left out for a GAN, got " in capsys.readouterr().err
    given = ["evaluate", "--run", str(run), "--n", "12", "--features", "classifier", "--quiet"]
    assert main(given) == 0
    table = capsys.readouterr().out
    assert "a generator, one call" in table
    assert "share" in table
    found: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    assert found["images"]["sampler"] == "generator"
    assert found["bits_per_dim"] is None
    assert sum(c["share"] for c in found["scores"]["classes"]) == pytest.approx(1.0)
    assert [c["images"] for c in found["scores"]["classes"]] == [5, 4, 3]
    assert main(["reconstruct", "--run", str(run)]) == 2
    assert "--run must be the folder of an autoencoder, got" in capsys.readouterr().err


def test_a_gan_without_classes_is_told_which_of_the_datas_it_makes(tmp_path: Path, data: Path) -> None:
    run = trained(GAN, data, tmp_path / "run", "--labels", "false")
    assert main(["evaluate", "--run", str(run), "--n", "12", "--features", "classifier", "--quiet"]) == 0
    found = json.loads((run / "evaluation.json").read_text())["scores"]
    assert found["agreement"] is None
    assert [c["images"] for c in found["classes"]] == [0, 0, 0]
    assert sum(c["share"] for c in found["classes"]) == pytest.approx(1.0)


def test_an_autoencoder_is_trained_and_reconstructs(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(AUTOENCODER, data, tmp_path / "run")
    assert f"diffkern reconstruct --run {run} --n 32 --out pairs.png" in capsys.readouterr().out
    entry = read_log(run)[-1]
    words = f"mean |x - r| {entry['validation_loss']:.4f}, PSNR {entry['validation_psnr']:.2f} dB"
    given = ["reconstruct", "--run", str(run), "--quiet", "--out", str(tmp_path / "pairs.png")]
    assert main(given) == 0  # those that the run kept apart, by the folder's own weights
    assert f"4 images and their reconstructions in {tmp_path / 'pairs.png'}: {words}" in capsys.readouterr().out
    assert (tmp_path / "pairs.png").stat().st_size > 0
    each = tmp_path / "each"
    assert main([*given, "--average", "raw", "--data", str(data), "--n", "5", "--out-dir", str(each)]) == 0
    assert "5 images and their" in capsys.readouterr().out
    assert [path.name for path in sorted(each.iterdir())] == [f"{i:05d}.png" for i in (0, 4, 8, 12, 16)]
    Autoencoder.from_pretrained(run).save_pretrained(tmp_path / "alone")
    assert main(["reconstruct", "--run", str(tmp_path / "alone"), "--data", str(data), *given[3:]]) == 0
    capsys.readouterr()
    assert main(["reconstruct", "--run", str(tmp_path / "alone")]) == 2
    assert "--data must be given, the images, where no run's config.yaml says them, got none" in capsys.readouterr().err
    assert main(["sample", "--run", str(run)]) == 2
    assert f"got the autoencoder in {run}: diffkern reconstruct" in capsys.readouterr().err
