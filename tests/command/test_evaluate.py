"""`diffkern evaluate`: a model's images, fresh, in shards or made before, against real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.generate_cases import blobs, small_unet
from helpers.lazy import needs

from diffkern.__main__ import main
from diffkern.data import open_images
from diffkern.diffusion import Diffusion
from diffkern.generate import generate
from diffkern.metrics import Classifier, Scores, evaluate
from diffkern.train.validation import validate

pytestmark = needs("PIL", "safetensors", "tqdm", "torch_fidelity", "matplotlib", "yaml")

JOB = ("--sampler", "ddim", "--steps", 2, "--micro-batch", 8, "--n", 24, "--features", "classifier")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in a folder whose config.yaml says its data: 60 images, half of class 0, a third of 1, a sixth of 2."""
    folder = tmp_path_factory.mktemp("run")
    small_unet().save_pretrained(folder)
    blobs(folder / "data.npz")
    (folder / "config.yaml").write_text(f"data: {folder / 'data.npz'}\n")
    return folder


@pytest.fixture(scope="module")
def measured(run: Path) -> dict[str, Any]:
    assert command("--run", run, *JOB) == 0
    found: dict[str, Any] = json.loads((run / "evaluation.json").read_text())
    return found


def command(*arguments: object) -> int:
    return main(["evaluate", "--quiet", *map(str, arguments)])


def test_scores_are_those_of_the_models_images(run: Path, measured: dict[str, Any]) -> None:
    data = open_images(run / "data.npz", size=8, channels=1)
    diffusion = Diffusion.from_pretrained(run).to(memory_format=torch.channels_last)
    classes = torch.tensor([0] * 12 + [1] * 8 + [2] * 4)  # as often as in the data
    made = generate(diffusion, 24, "ddim", 2, classes=classes, micro_batch=8)
    classifier = Classifier.load(next(run.glob("classifier-*.json")).with_suffix(""))
    expected = evaluate(made, data, classifier)
    assert Scores.from_json(json.dumps(measured["scores"])) == expected
    assert [(c["name"], c["images"]) for c in measured["scores"]["classes"]] == [("0", 12), ("1", 8), ("2", 4)]
    assert measured["bits_per_dim"] == pytest.approx(validate(diffusion, data).bits_per_dim)
    assert measured["images"] == {
        "run": str(run),
        "sampler": "ddim",
        "steps": 2,
        "average": None,
        "guidance": None,
        "seed": 0,
        "micro_batch": 8,
    }


def test_a_table_and_a_picture_of_each_class_first(
    run: Path, measured: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    for name in run.glob("classifier-*"):  # trained once, and taken where it is
        (tmp_path / name.name).write_bytes(name.read_bytes())
    assert command("--run", run, *JOB, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"FID{measured['scores']['fid']:>27.4f}  of 24 images against 60;")
    assert "agreement" in printed
    assert f"bits per dimension  {measured['bits_per_dim']:>10.4f}  bound on 60 of the real images\n" in printed
    assert f"images by ddim, 2 steps, 2 model calls; evaluation.json and evaluation.png are in {tmp_path}" in printed
    assert json.loads((tmp_path / "evaluation.json").read_text()) == measured
    assert Image.open(tmp_path / "evaluation.png").size[0] > 10 * 64


def test_shards_and_images_made_before_have_the_same_scores(
    run: Path, measured: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("--run", run, *JOB, "--shards", tmp_path / "shards") == 0
    assert json.loads((run / "evaluation.json").read_text())["scores"] == measured["scores"]
    monkeypatch.setattr(Diffusion, "sample", lambda *_, **__: pytest.fail("they are there"))
    assert command("--run", run, *JOB, "--shards", tmp_path / "shards") == 0
    classifier = next(run.glob("classifier-*.json")).with_suffix("")
    given = ("--images", tmp_path / "shards", "--data", run / "data.npz", "--out", tmp_path / "out")
    assert command(*given, "--features", "classifier", "--weights", classifier) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert found["scores"] == measured["scores"]
    assert (found["images"], found["bits_per_dim"]) == ({"source": str(tmp_path / "shards")}, None)


def test_a_model_without_classes_on_data_without_labels(tmp_path: Path) -> None:
    small_unet(classes=0).save_pretrained(tmp_path / "run")
    blobs(tmp_path / "labelled.npz")
    with np.load(tmp_path / "labelled.npz") as arrays:
        np.save(tmp_path / "data.npy", arrays["images"])
    job = ("--run", tmp_path / "run", "--n", 6, "--sampler", "ddim", "--steps", 1)
    assert command(*job, "--data", tmp_path / "labelled.npz", "--features", "classifier") == 0
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert found["scores"]["agreement"] is None
    classes = found["scores"]["classes"]
    assert all(c["precision"] is c["recall"] is c["agreement"] is None and c["images"] == 0 for c in classes)
    assert sum(c["share"] for c in classes) == pytest.approx(1.0)
    assert command(*job, "--data", tmp_path / "data.npy", "--features", "classifier") == 2


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--images", "a", "--shards", "b"], "give --images or --shards, not both, got 'a' and 'b'"),
        (["--n", "0"], "--n must be at least 1, got 0"),
        (["--n", str(10**9)], "--n must be at most 10000000"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--weights", "w"], "--weights must go with --features, got 'w' alone"),
        (["--features", "nothing"], "must be one of inception, torchvision:NAME, timm:NAME"),
        (["--sampler", "dimm"], "sampler must be one of"),
        (["--data", "none.npz"], "source must be a folder, a file of arrays or tar"),
        (["--data", "five.npz"], "--data must have the 3 classes of the model, got 5"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_bad_arguments_are_one_sentence(
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.chdir(run)
    np.savez("five.npz", images=np.zeros((5, 8, 8), dtype=np.uint8), labels=np.arange(5))
    assert command("--run", run, "--out", tmp_path, *arguments) == 2
    printed = capsys.readouterr().err.strip()
    assert sentence in printed
    assert len(printed.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_one_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: object) -> str:
        assert command(*arguments) == 2
        printed = capsys.readouterr().err.strip()
        assert len(printed.splitlines()) == 1
        return printed

    small_unet(classes=0).save_pretrained(tmp_path / "run")
    assert "--run must be given, the folder of a run" in said()
    assert "--data must be given, the real images, where no run's config.yaml says it" in said(
        "--run", tmp_path / "run"
    )
    assert "--out must be given where there is no --run" in said("--images", run / "data.npz")
    np.save(tmp_path / "flat.npy", np.zeros((6, 4, 6), dtype=np.uint8))
    flat = said("--images", tmp_path / "flat.npy", "--out", tmp_path / "out", "--data", run / "data.npz")
    assert "--data must be images of shape (1, 4, 6), as those to compare, got (1, 8, 8)" in flat
