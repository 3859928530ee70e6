"""The demo, small: its command line and the whole job."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from helpers.lazy import needs

import diffkern
from diffkern.__main__ import main
from diffkern.command import demo as command
from diffkern.demo import run
from diffkern.demo.run import DemoConfig, Line, markdown, run_demo
from diffkern.extras import MissingExtra, need
from diffkern.train.log import read_log

pytestmark = needs("sklearn", "matplotlib", "PIL", "safetensors", "yaml", "torch_fidelity", "scipy")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--guidance", "nan"], "--guidance must be finite, got nan"),
        (["--seed", str(2**63)], "TrainConfig.seed must be in 0..2**63 - 1, got 9223372036854775808"),
        (["--batch", str(10**9)], "TrainConfig.batch must be in 1..16777216, got 1000000000"),
        (["--iterations", "0"], "TrainConfig.iterations must be in 1..1000000000, got 0"),
        (["--per-class", str(10**9)], "--per-class must be at most 1000000"),
        (["--out", __file__], "must be a folder, and is a file"),
    ],
)
def test_the_demo_refuses_before_it_trains(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.setattr(command, "run_demo", lambda config: pytest.fail("it began"))
    assert main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named() -> None:
    with pytest.raises(MissingExtra, match=r"this needs nothing-like-it, .*pip install 'diffkern\[demo\]'"):
        need("diffkern_no_such_module", "nothing-like-it", "demo")


@pytest.mark.full
def test_the_whole_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, sample, measure, draw; again from the folder, by the commands."""
    training = dataclasses.replace(
        DemoConfig().train,
        network_options={"channels": 8, "blocks": 1, "heads": 2, "embedding": 16},
        schedule_options={"T": 50},
        iterations=4,
        batch=16,
        log_every=2,
        threads=1,
        tensorboard=False,
    )
    config = DemoConfig(out=tmp_path, train=training, per_class=8, runs=(("ddpm", 5), ("heun", 3)), progress=False)
    lines = run_demo(config)
    assert [line.images for line in lines] == ["real digits", "ddpm", "heun"]
    assert lines[0].agreement > 0.95  # real digits, kept apart
    assert min(lines[0].precision, lines[0].recall) > 0.8
    made = {path.name for path in tmp_path.iterdir()}
    pictures = {"ddpm_5.png", "heun_3.png", "forward.png", "real.png", "trajectory.png", "loss.png"}
    assert pictures | {"checkpoints", "config.yaml", "log.jsonl", "results.json", "table.md"} <= made
    assert (tmp_path / "table.md").read_text().strip() == markdown(lines)
    assert markdown(lines) in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert [line["images"] for line in results["samplers"]] == [line.images for line in lines]
    assert results["images_per_sampler"] == 80
    assert [entry["step"] for entry in read_log(tmp_path) if "loss" in entry] == [2, 4]
    assert (
        diffkern.Diffusion.from_pretrained(tmp_path).prediction
        == diffkern.Diffusion.from_pretrained(tmp_path, average="raw").prediction
    )
    again = tmp_path / "again.png"
    given = ["--guidance=1.5", "--micro-batch=80", "--ink", "--quiet", "--threads=1"]
    for sampler, steps in config.runs:
        arguments = ["--run", tmp_path, "--sampler", sampler, "--steps", steps, "--out", again, *given]
        assert main(["sample", *map(str, arguments)]) == 0
        assert again.read_bytes() == (tmp_path / f"{sampler}_{steps}.png").read_bytes()


def test_a_demo_that_is_interrupted_stops_and_goes_on_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopped:
        stopped, step = True, 3

    monkeypatch.setattr(run, "fit", lambda *arguments, **options: Stopped())
    monkeypatch.setattr(run, "train_classifier", lambda images, progress: None)
    monkeypatch.setattr(run, "_real", lambda *arguments: Line("real digits", None, None, None, 1.0, 0.0, 1.0, 1.0))
    assert len(run_demo(DemoConfig(out=tmp_path, progress=False))) == 1
    assert "stopped after 3 of 600 iterations; the same command goes on from there" in capsys.readouterr().out
