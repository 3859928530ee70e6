"""`diffkern train`, `sample` and `evaluate` of models that are given an image, and cascades."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.diffusion_cases import small_unet
from helpers.generate_cases import blobs
from helpers.lazy import needs

from diffkern import Diffusion, pictures, schedules
from diffkern.__main__ import main
from diffkern.command import _restoration
from diffkern.data import open_images, split
from diffkern.degradations import Colourisation, Degradation, Inpainting, SuperResolution, from_dict
from diffkern.generate import cascade, generate, recommended, restore
from diffkern.metrics import paired_scores
from diffkern.pixels import to_bytes

pytestmark = needs("PIL", "safetensors", "tqdm", "yaml", "jsonargparse", "matplotlib")

FAST = ("--steps", 2, "--sampler", "ddim", "--quiet")


def model(degradation: Degradation | None = None, size: int = 8, channels: int = 1, **fields: Any) -> Diffusion:
    own: dict[str, Any] = {"image_size": size, "channels": 8, "groups": 4, "heads": 1, "zero_init": False}
    own |= {"in_channels": channels, "out_channels": channels}
    if degradation is not None:
        own |= {"concat_channels": degradation.channels(channels), "concat_upsample": "bilinear"}
    return Diffusion(small_unet(**own, **fields), schedules.cosine(20), "v", degradation=degradation)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models in folders, and images: ``low`` of 4 x 4, ``whole`` of 8 x 8, a mask."""
    folder = tmp_path_factory.mktemp("runs")
    made = {
        "base": model(size=4),
        "twice": model(SuperResolution(2)),
        "inpainting": model(Inpainting(share=0.3)),
        "colours": model(Colourisation(), channels=3, classes=0),
        "again": model(SuperResolution(2), 16, classes=0),
    }
    for name, diffusion in made.items():
        diffusion.save_pretrained(folder / name)
    generator = torch.Generator().manual_seed(0)
    for name, size, channels in (("low", 4, 1), ("whole", 8, 1), ("grey", 8, 1), ("mask", 8, 1)):
        for i in range(1 if name == "mask" else 3):
            image = torch.rand(channels, size, size, generator=generator) * 2.0 - 1.0
            pictures.write(pictures.plain(image.sign() if name == "mask" else image), folder / name / f"{i}.png")
    return folder


def command(name: str, *arguments: object) -> int:
    return main([name, *map(str, arguments)])


def opened(folder: Path, channels: int = 1) -> torch.Tensor:
    images = open_images(str(folder), channels=channels, cache=False)
    return images.batch(torch.arange(len(images)))[0]


def files(folder: Path) -> np.ndarray:
    from PIL import Image

    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


def expected_files(parts: Any) -> np.ndarray:
    images = torch.cat([part.images for part in parts])
    found = to_bytes(images).movedim(1, -1).numpy()
    return found[..., 0] if found.shape[-1] == 1 else found


def loaded(folder: Path) -> Diffusion:
    return Diffusion.from_pretrained(folder).to(memory_format=torch.channels_last)


def test_samples_of_inputs_are_those_of_restore(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--run", runs / "twice", "--input", runs / "low", "--n", 2, "--classes", "1,0", "--guidance", 2, *FAST)
    assert command("sample", *given, "--out-dir", tmp_path / "each", "--out", tmp_path / "all.png") == 0
    printed = capsys.readouterr().out
    assert f"9 images in {tmp_path / 'all.png'}" in printed, "input and two samples, three times"
    diffusion = loaded(runs / "twice")
    plan = recommended(diffusion, "ddim", 2)
    parts = restore(diffusion, opened(runs / "low"), 2, plan, classes=[1, 0, 1], guidance=2.0)
    assert (files(tmp_path / "each") == expected_files(parts)).all()
    low = files(tmp_path / "each").reshape(6, 4, 2, 4, 2).mean((2, 4))
    assert np.abs(low - files(runs / "low").repeat(2, 0)).max() <= 2.0, "consistent, to 2/255"
    free = (*given[:-1], "--no-project", "--quiet", "--out-dir", tmp_path / "free")
    assert command("sample", *free) == 0
    assert np.abs(files(tmp_path / "free").reshape(6, 4, 2, 4, 2).mean((2, 4)) - low).max() > 2.0
    one = ("--run", runs / "twice", "--input", runs / "low" / "0.png", *FAST, "--out-dir", tmp_path / "one")
    assert command("sample", *one) == 0
    assert files(tmp_path / "one").shape == (1, 8, 8)


def test_inpainting_keeps_what_is_known(runs: Path, tmp_path: Path) -> None:
    given = ("--run", runs / "inpainting", "--input", runs / "whole", "--mask", runs / "mask" / "0.png", *FAST)
    assert command("sample", *given, "--out-dir", tmp_path / "each") == 0
    hidden, whole, made = files(runs / "mask")[0] > 127, files(runs / "whole"), files(tmp_path / "each")
    assert (made[:, ~hidden] == whole[:, ~hidden]).all()
    assert (made[:, hidden] != whole[:, hidden]).any()


def test_whole_images_are_degraded_first(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--run", runs / "inpainting", "--input", runs / "whole", "--degrade", "--seed", 4, *FAST)
    assert command("sample", *given, "--out", tmp_path / "a.png") == 0
    assert "9 images in" in capsys.readouterr().out, "input, sample and truth"
    assert (
        command("sample", "--run", runs / "colours", "--input", runs / "grey", *FAST, "--out", tmp_path / "b.png") == 0
    )
    assert (tmp_path / "b.png").is_file()


def test_a_cascade_by_one_command(runs: Path, tmp_path: Path) -> None:
    given = ("--run", runs / "base", "--then", runs / "twice", "--then", runs / "again", "--n", 5, "--seed", 3, *FAST)
    assert command("sample", *given, "--out-dir", tmp_path / "all") == 0
    models = [loaded(runs / name) for name in ("base", "twice", "again")]
    plans = [recommended(each, "ddim", 2) for each in models]
    parts = list(cascade(models, 5, plans, seed=3, classes=[0, 1, 2, 0, 1]))
    assert (files(tmp_path / "all") == expected_files(parts)).all()
    base = torch.cat([part.images for part in generate(models[0], 5, plans[0], seed=3, classes=[0, 1, 2, 0, 1])])
    low = files(tmp_path / "all").reshape(5, 4, 4, 4, 4).mean((2, 4))
    assert np.abs(low - (base[:, 0].clamp(-1, 1).numpy() + 1.0) * 127.5).max() <= 2.0


@pytest.mark.full
def test_training_sampling_and_evaluation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blobs(tmp_path / "data.npz")
    run = tmp_path / "run"
    network = '{"channels": 8, "groups": 4, "heads": 1, "blocks": 1}'
    job = ("--data", tmp_path / "data.npz", "--out", run, "--preset", "digits", "--validation", 20, "--iterations", 4)
    job += ("--network-options", network, "--batch", 8, "--sample-every", 4, "--sample-n", 10, "--sample-steps", 2)
    job += ("--degradation", "super_resolution", "--degradation-options.factor", 4)
    job += ("--degradation-options.augmentation", 0.5, "--quiet")
    assert command("train", *job) == 0
    assert (run / "samples" / "00000004.png").is_file()
    diffusion = loaded(run)
    assert diffusion.degradation == SuperResolution(4, augmentation=0.5)
    assert diffusion.model.config.ids == 1
    capsys.readouterr()
    assert command("train", "--out", run, "--iterations", 6, "--quiet") == 0, "goes on by its config.yaml"
    diffusion = loaded(run)
    assert f"diffkern evaluate --run {run}" in capsys.readouterr().out, "a sample would need an input"
    assert command("evaluate", "--run", run, *FAST) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["PSNR", "SSIM", "features", "consistency", "worst"]
    assert [line.split()[0] for line in printed[1:4]] == ["input", "samples", "projected"]
    found = json.loads((run / "evaluation.json").read_text())
    assert from_dict(found["degradation"]) == diffusion.degradation
    assert found["rows"][2]["worst"] <= 2.0
    assert (run / "evaluation.png").is_file()
    apart = split(open_images(str(tmp_path / "data.npz")), 20)[1]
    truth = apart.batch(torch.arange(20))[0]
    inputs = SuperResolution(4).degrade(truth)
    parts = restore(diffusion, inputs, 1, recommended(diffusion, "ddim", 2), classes=apart.labels, project=False)
    row = paired_scores("samples", torch.cat([p.images for p in parts]), truth, inputs, SuperResolution(4))
    assert found["rows"][1]["psnr"] == pytest.approx(row.psnr, rel=1e-6)
    assert found["rows"][1]["ssim"] == pytest.approx(row.ssim, rel=1e-6)


def test_features_are_looked_at_before_anything_is_sampled(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sampled(*given: Any, **options: Any) -> None:
        raise AssertionError("sampled")

    monkeypatch.setattr(_restoration, "restore", sampled)
    blobs(tmp_path / "data.npz")
    given = ("evaluate", "--run", runs / "twice", "--data", tmp_path / "data.npz", "--out", tmp_path, *FAST)
    refused(capsys, "extractor must be one of inception, .*got 'nonsense'", *given, "--features", "nonsense")


def test_a_model_of_images_and_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator, texts = torch.Generator().manual_seed(0), [["left", "right side"][i % 2] for i in range(12)]
    images = (torch.rand(12, 1, 8, 8, generator=generator) * 255).to(torch.uint8)
    np.savez(tmp_path / "data.npz", images=images.numpy(), texts=np.array(texts))
    network = '{"channels": 8, "groups": 4, "heads": 1, "blocks": 1, "transformer_depth": 1, "context_channels": 8}'
    job = ("--data", tmp_path / "data.npz", "--text", "--preset", "digits", "--validation", 0, "--iterations", 2)
    job += ("--network-options", network, "--batch", 4, "--sample-every", 2, "--sample-n", 10, "--sample-steps", 2)
    job += ("--degradation", "super_resolution", "--degradation-options.factor", 2, "--quiet")
    assert command("train", *job, "--out", tmp_path / "run") == 0
    assert (tmp_path / "run" / "samples" / "00000002.png").is_file(), "its pictures, by the captions"
    diffusion, data = loaded(tmp_path / "run"), open_images(str(tmp_path / "data.npz"), labels="text")
    capsys.readouterr()
    assert command("evaluate", "--run", tmp_path / "run", *FAST) == 0, "without a classifier where labels are captions"
    found = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    truth, tokens = data.batch(torch.arange(12))
    inputs, plan = SuperResolution(2).degrade(truth), recommended(diffusion, "ddim", 2)
    parts = restore(diffusion, inputs, 1, plan, classes=tokens, project=False)
    row = paired_scores("samples", torch.cat([p.images for p in parts]), truth, inputs, SuperResolution(2))
    assert found["rows"][1]["psnr"] == pytest.approx(row.psnr, rel=1e-6)

    for i, image in enumerate(inputs[:3]):
        pictures.write(pictures.plain(image), tmp_path / "low" / f"{i}.png")
    given = ("--run", tmp_path / "run", "--input", tmp_path / "low", "--text", "left", "--text", "right side", *FAST)
    assert command("sample", *given, "--guidance", 2, "--out-dir", tmp_path / "made") == 0
    model: Any = diffusion.model
    asked = model.tokens(["left", "right side", "left"])
    expected = expected_files(restore(diffusion, opened(tmp_path / "low"), 1, plan, classes=asked, guidance=2.0))
    assert (files(tmp_path / "made") == expected).all()
    refused(capsys, "text must be of the 3 words of the vocabulary, got 'rigt'", "sample", *given, "--text", "rigt")


def refused(capsys: pytest.CaptureFixture[str], sentence: str, *arguments: object) -> None:
    import re

    assert main(list(map(str, arguments))) != 0
    error = capsys.readouterr().err.strip()
    assert re.search(sentence, error), error
    assert "\n" not in error


def test_what_does_not_fit_is_one_sentence(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, low = runs / "whole", runs / "low"
    cases: list[tuple[str, tuple[object, ...]]] = [
        ("--input must be given for a model that is given images", ("twice",)),
        ("--input must go with a model that is given images, got one without", ("base", "--input", low)),
        ("--then must stand without --input, got both", ("base", "--then", runs / "twice", "--input", low)),
        ("--input must stand without --shards, got both", ("twice", "--input", low, "--shards", tmp_path)),
        ("--mask must be given for inpainting", ("inpainting", "--input", whole)),
        ("--mask must go with inpainting and without --degrade", ("twice", "--input", low, "--mask", whole)),
        ("--mask must be one for all of the 3 images of .*got 3 of", ("inpainting", "--input", whole, "--mask", low)),
        ("image must be floating|height and width of x", ("twice", "--input", runs / "colours")),
        ("model 1 must take images .*4, 4.*, those of model 0, got .*8, 8", ("base", "--then", runs / "again")),
        ("--classes must be left out for a model without", ("colours", "--input", whole, "--classes", "1")),
        ("augmentation must lie in", ("twice", "--input", low, "--augmentation", "0.5")),
        ("--input must stand without --first, got both", ("twice", "--input", low, "--first", 1)),
        ("--text must be left out for a model that reads no texts", ("twice", "--input", low, "--text", "three")),
        ("--text must stand without --classes", ("twice", "--input", low, "--text", "three", "--classes", 1)),
        ("--mask must go with --input, got neither", ("base", "--mask", whole)),
        ("--degrade must go with --input, got neither", ("base", "--degrade")),
        ("--without must go with --input, got neither", ("base", "--without", "image")),
        ("--augmentation must go with --input or --then, got", ("base", "--augmentation", 0.1)),
        ("--no-project must go with --input or --then, got", ("base", "--no-project")),
        ("--then must stand without --degrade, got both", ("base", "--then", runs / "twice", "--degrade")),
    ]
    for sentence, (run, *arguments) in cases:
        if arguments and arguments[-1] == runs / "colours":
            sentence = "source must be a folder with images"
        refused(capsys, sentence, "sample", "--run", runs / str(run), *arguments, *FAST)
    train = ("train", "--data", "digits", "--out", tmp_path / "run", "--quiet")
    refused(capsys, "degradation must be a name where degradation_options", *train, "--degradation-options.factor", 2)
    options = ("--degradation", "super_resolution", "--degradation-options.factor", 3, "--preset", "digits")
    refused(capsys, "divisible by factor = 3", *train, *options)
    refused(capsys, "must be a UNet for a degradation", *train, "--degradation", "deblurring", "--network", "DiT-S/2")
    assert not (tmp_path / "run").exists()


RANKS = """
import sys
from pathlib import Path
import torch
from diffkern.__main__ import main

runs, out = map(Path, sys.argv[1:])
torch.set_num_threads(1)
fast = ["--steps", "2", "--micro-batch", "2", "--quiet"]
given = ["sample", "--run", f"{runs}/twice", *fast, "--input", f"{runs}/low", "--n", "3"]
assert main([*given, "--out", f"{out}/given.png", "--out-dir", f"{out}/given"]) == 0
then = ["sample", "--run", f"{runs}/base", *fast, "--then", f"{runs}/twice", "--n", "5"]
assert main([*then, "--out", f"{out}/c.png"]) == 0
data = ["--data", f"{runs}/data.npz", "--n", "9", "--features", "classifier", "--out", f"{out}/evaluation"]
assert main(["evaluate", "--run", f"{runs}/twice", *fast, *data]) == 0
"""


@pytest.mark.full
def test_two_processes_write_what_one_writes(runs: Path, tmp_path: Path) -> None:
    blobs(runs / "data.npz")
    written = []
    for world in (1, 2):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        job = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        out = tmp_path / str(world)
        started = [
            subprocess.Popen(
                [sys.executable, "-c", RANKS, str(runs), str(out)],
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    **(job if world > 1 else {}),
                    "RANK": str(rank),
                },
                stdout=subprocess.PIPE,
            )
            for rank in range(world)
        ]
        try:
            printed = [process.communicate(timeout=200)[0] for process in started]
        finally:
            for process in started:
                process.kill()
        assert [process.returncode for process in started] == [0] * world
        assert all(b"PSNR" in text for text in printed[:1])
        assert all(text == b"" for text in printed[1:]), "the main rank alone says it"
        files = [path for path in sorted(out.rglob("*")) if path.is_file()]
        written.append({str(path.relative_to(out)): path.read_bytes() for path in files})
    assert len(written[0]) == 9 + 2 + 2 + 2, "files of each, two pictures, the evaluation, its classifier"
    assert written[1] == written[0]
