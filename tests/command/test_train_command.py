"""The command `train`: flags, presets and files of values, and what it says where they are wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.lazy import needs

import diffkern
from diffkern.__main__ import main
from diffkern.command.train import chosen
from diffkern.train import PRESETS, TrainConfig

pytestmark = needs("yaml", "jsonargparse", "docstring_parser", "safetensors", "sklearn", "matplotlib", "PIL")

SMALL = ["--network_options.channels", "8", "--network_options.heads=1", "--network_options.blocks", "1"]
SMALL += ["--network-options.groups", "4", "--network_options.multipliers", "[1]"]
SMALL += ["--network_options.attention_levels", "[]", "--tensorboard", "false", "--threads", "1", "--quiet"]


def test_a_run_is_made_resumed_and_used_to_begin_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, other = str(tmp_path / "run"), str(tmp_path / "other")
    given = ["train", "--out", run, "--preset", "digits", "--iterations", "2", "--batch", "8", "--limit", "40"]
    given += ["--validation", "10", *SMALL]
    assert main(given) == 0
    said = capsys.readouterr().out
    assert "trained 2 of 2 iterations" in said
    assert f"diffkern sample --run {run} --n 64 --out grid.png" in said
    assert main(["train", "--out", run, "--iterations", "3", "--quiet"]) == 0  # all else is the run's own
    assert "trained 3 of 3 iterations" in capsys.readouterr().out
    assert TrainConfig.load(tmp_path / "run" / "config.yaml").network_options["channels"] == 8
    assert main(["train", "--out", other, "--init", run, *given[3:-1], "--quiet"]) == 0
    first = diffkern.Diffusion.from_pretrained(run, average="raw")
    second = diffkern.Diffusion.from_pretrained(other, average="raw")
    moved = max((a - b).abs().max().item() for a, b in zip(first.parameters(), second.parameters(), strict=True))
    assert 0.0 < moved < 0.1  # two steps of 2e-5 and 4e-5 a weight, from the other's weights


def test_flags_go_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("batch: 32\nlearning_rate: 0.5\nnetwork_options: {channels: 16, blocks: 1}\n")
    given = ["--out", str(tmp_path), "--preset", "digits", "--config", str(tmp_path / "run.yaml")]
    config = chosen([*given, "--batch", "16", "--flip", "--network_options.channels", "24", "--clip", "null"])
    digits = PRESETS["digits"]
    assert (config.batch, config.learning_rate, config.warmup) == (16, 0.5, digits.warmup)
    assert config.flip
    assert config.clip is None
    assert config.network_options == {"channels": 24, "blocks": 1}
    assert chosen(given[:2]) == TrainConfig()


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--learnin-rate", "1"], "--learnin_rate is no flag of diffkern train: did you mean --learning_rate?"),
        (["--batch", "many"], "Parser key \"batch\": Expected a <class 'int'>. Got value: many"),
        (["--batch", "0"], "TrainConfig.batch must be in 1..16777216, got 0"),
        (
            ["--preset", "ddpm"],
            "--preset must be one of digits, digits-text, ddpm-cifar10, edm, flow, ncsn, adm-64, gan-digits, "
            "autoencoder-digits, vq-digits, got 'ddpm'",
        ),
        (["--config", "nowhere.yaml"], "No such file or directory: 'nowhere.yaml'"),
        ([], "--data must be given: a folder of images, a file or a name, got none"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_what_is_wrong_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: list[str], sentence: str
) -> None:
    assert main(["train", "--out", str(tmp_path / "run"), *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("diffkern train: ")
    assert sentence in error
    assert len([line for line in error.splitlines() if not line.startswith("warning:")]) == 1
    assert not (tmp_path / "run").exists()


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert all(f"--{name}" in said for name in TrainConfig().to_dict())
    assert "Images in an iteration, over all processes" in " ".join(said.split())
