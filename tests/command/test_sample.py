"""`diffkern sample`: grids, single files and shards from a run's folder, and one sentence for what is wrong."""

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
from helpers.generate_cases import blobs, small_unet
from helpers.lazy import needs

from diffkern import nn
from diffkern.__main__ import main
from diffkern.command import _arguments
from diffkern.diffusion import Diffusion
from diffkern.generate import generate, read_shards
from diffkern.pictures import as_bytes
from diffkern.schedules.makers import cosine
from diffkern.train import Averages, checkpoint

pytestmark = needs("PIL", "safetensors", "tqdm")

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    small_unet().save_pretrained(folder)
    blobs(folder / "data.npz")
    return folder


def sample(run: Path, *arguments: object) -> int:
    return main(["sample", "--run", str(run), "--quiet", *map(str, arguments)])


def pixels(path: Path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path))


# ------------------------------------------------------------------------------------------------------------- pictures
def test_a_grid_repeats_bit_for_bit(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ("--sampler", "dpmpp_2m", "--steps", 3)
    for name in ("a.png", "b.png"):
        assert sample(run, *common, "--out", tmp_path / name) == 0
    printed = capsys.readouterr().out
    assert f"24 images in {tmp_path / 'a.png'}\n" in printed, "8 of each class"
    assert "a second, by dpmpp_2m, 3 steps, 3 model calls\n" in printed
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert sample(run, *common, "--seed", 1, "--out", tmp_path / "c.png") == 0
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "a.png").read_bytes()


def test_one_file_an_image_is_the_image_pixel_by_pixel(run: Path, tmp_path: Path) -> None:
    job = ("--sampler", "heun", "--steps", 2, "--micro-batch", 1, "--guidance", 2)
    assert sample(run, *job, "--classes", "2,1,0-1", "--out-dir", tmp_path / "all") == 0
    names = ["00000_class2.png", "00001_class1.png", "00002_class0.png", "00003_class1.png"]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == names
    diffusion = Diffusion.from_pretrained(run).to(memory_format=torch.channels_last)
    made = generate(diffusion, 4, "heun", 2, classes=[2, 1, 0, 1], micro_batch=1, guidance=2.0)
    for name, part in zip(names, made, strict=True):
        assert (pixels(tmp_path / "all" / name) == as_bytes(part.images)[0, :, :, 0].numpy()).all()
    assert sample(run, *job, "--classes", 0, "--first", 2, "--out-dir", tmp_path / "one") == 0
    assert (tmp_path / "one" / names[2]).read_bytes() == (tmp_path / "all" / names[2]).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["--n", "5"], 5),
        (["--n", "5", "--classes", "1"], 5),
        (["--per-class", "2"], 6),
        (["--per-class", "2", "--classes", "0,2"], 4),
        (["--classes", "0-2,1"], 4),
    ],
)
def test_how_many_images(run: Path, tmp_path: Path, arguments: list[str], count: int) -> None:
    assert sample(run, "--steps", 1, *arguments, "--out-dir", tmp_path) == 0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [int(name[:5]) for name in names] == list(range(count))


def test_colour_without_classes(tmp_path: Path) -> None:
    diffusion = small_unet(in_channels=3, out_channels=3, classes=0)
    diffusion.save_pretrained(tmp_path / "run")
    out = ("--out", tmp_path / "grid.png", "--out-dir", tmp_path / "each")
    assert sample(tmp_path / "run", "--n", 5, "--steps", 1, "--scale", 1, *out) == 0
    assert pixels(tmp_path / "grid.png").shape[2] == 3
    assert sorted(path.name for path in (tmp_path / "each").iterdir())[-1] == "00004.png"
    assert pixels(tmp_path / "each" / "00004.png").shape == (8, 8, 3)
    assert sample(tmp_path / "run", "--classes", 0, "--out", tmp_path / "x.png") == 2


def test_the_folder_of_a_run_gives_its_newest_checkpoint_and_the_average_asked_for(run: Path, tmp_path: Path) -> None:
    diffusion = small_unet()
    optimizer = torch.optim.AdamW(diffusion.parameters())
    averages = Averages(diffusion.model, (0.05, 0.1))
    checkpoint.save(tmp_path / "run", 1, diffusion=diffusion, averages=averages, optimizer=optimizer)
    for average in ("0.050", "raw"):
        assert sample(tmp_path / "run", "--steps", 1, "--average", average, "--out", tmp_path / f"{average}.png") == 0
    assert sample(run, "--steps", 1, "--out", tmp_path / "plain.png") == 0
    assert (tmp_path / "raw.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
    assert sample(tmp_path / "run", "--average", "0.2", "--out", tmp_path / "x.png") == 2


def test_shards_are_taken_up_again(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    job = ("--steps", 1, "--n", 7, "--micro-batch", 2, "--shards", tmp_path / "s")
    assert sample(run, *job) == 0
    assert f"1 shards in {tmp_path / 's'}\n" in capsys.readouterr().out
    assert sum(len(part.images) for part in read_shards(tmp_path / "s")) == 7
    assert sample(run, *job) == 0
    assert sample(run, *job, "--seed", 9) == 2
    assert "got those of another, whose seed is 0 instead of 9" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sampler", "dpm"], "sampler must be one of ddpm, ddim, euler, heun, midpoint, rk4"),
        (["--sampler", "ddim(eat=1)"], "ddim does not take these arguments: ddim() got an unexpected keyword"),
        (
            ["--sampler", "ddim(schedule=edm)"],
            "--sampler must leave the schedule to the model, got 'ddim(schedule=edm)'",
        ),
        (
            ["--sampler", "euler", "--eta", "1"],
            "euler does not take these arguments: euler() got an unexpected keyword",
        ),
        (["--classes", "0-12"], "--classes must lie in 0..2 and rise within a range, got '0-12'"),
        (["--classes", "cat"], "--classes must be like 3 or 0,1,7 or 0-9, got 'cat'"),
        (["--classes", "9" * 5000], "--classes must be like 3 or 0,1,7 or 0-9, got '9999"),
        (["--steps", "0"], "steps must be an integer in 1..100000, got 0"),
        (["--steps", "101", "--sampler", "ddim"], "steps must be an integer"),
        (["--steps", str(10**12), "--sampler", "heun"], "steps must be an integer in 1..100000, got 1000000000000"),
        (["--micro-batch", "0"], "micro_batch must be an integer in 1..2**31 - 1, got 0"),
        (["--n", "0"], "--n must be at least 1, got 0"),
        (["--n", "3", "--per-class", "1"], "give --n or --per-class, not both, got 3 and 1"),
        (["--per-class", "0"], "--per-class must be at least 1, got 0"),
        (
            ["--per-class", str(10**9)],
            "--per-class must be at most 3333333 (a job has 10000000 images), got 1000000000",
        ),
        (["--first", "-1"], "--first must lie in 0..2**63 - 1 - 24, got -1"),
        (["--first", str(2**70)], "--first must lie in 0..2**63 - 1 - 24, got 1180591620717411303424"),
        (["--seed", str(2**64)], "seed must be an integer of 64 bits, got 18446744073709551616"),
        (["--guidance", "nan"], "guidance must be finite, got nan"),
        (["--scale", "0"], "scale must lie in 1..334 for a picture of 24 images of 8 x 8, got 0"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--threads", str(10**10)], "--threads must be at most 1024, got 10000000000"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
        (["--shards", "s"], "--shards must stand without --out, got both"),
        (["--checkpoint", "model.safetensors"], "--checkpoint model.safetensors was a file of the demo of earlier"),
    ],
)
def test_bad_arguments_are_one_sentence(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert sample(run, "--out", tmp_path / "no.png", *arguments) == 2
    printed = capsys.readouterr().err.strip()
    assert sentence in printed
    assert len(printed.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_bad_folders_are_one_sentence(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*arguments: object) -> str:
        assert main(["sample", *map(str, arguments)]) == 2
        printed = capsys.readouterr().err.strip()
        assert len(printed.splitlines()) == 1
        return printed

    assert "--run must be given, the folder of a run or of Diffusion.save_pretrained, got none" in said()
    assert "where there is none" in said("--run", tmp_path / "none")
    assert "--run must be a folder, got the file" in said("--run", run / "model.safetensors")
    assert f"there is no config.json in {tmp_path}" in said("--run", tmp_path)
    assert "must be a folder, and is a file" in said("--run", run, "--out-dir", run / "config.json")
    assert "must be a file, and is a folder" in said("--run", run, "--out", tmp_path)
    Diffusion(torch.nn.Linear(2, 2), cosine(10)).save_pretrained(tmp_path)
    assert "model must be given" in said("--run", tmp_path)
    two = nn.UNetConfig(image_size=8, in_channels=2, out_channels=2, channels=8, heads=1, embedding=16)
    Diffusion(nn.UNet(two), cosine(10)).save_pretrained(tmp_path)
    assert "images must have shape (1, H, W) or (3, H, W) to be drawn, got (2, 8, 8)" in said("--run", tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sentence is for machines without a GPU")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"--device cuda cannot be used: .+"):
        _arguments.check_device("cuda")


@pytest.mark.parametrize(("text", "classes"), [("3", [3]), ("0,1,7", [0, 1, 7]), ("8-9, 0-2", [8, 9, 0, 1, 2])])
def test_classes_in_words(text: str, classes: list[int]) -> None:
    assert _arguments.parse_classes(text, 10) == classes


# ---------------------------------------------------------------------------------------------------------------- ranks
RANKS = """
import sys

import torch

from diffkern import parallel
from diffkern.__main__ import main

run, out = sys.argv[1:]
job = ["sample", "--run", run, "--steps", "2", "--n", "7", "--micro-batch", "2", "--threads", "1", "--quiet"]
with parallel.job(torch.device("cpu"), timeout=100.0):
    assert main([*job, "--out", f"{out}/grid.png", "--out-dir", f"{out}/each"]) == 0
    assert main([*job, "--shards", f"{out}/shards"]) == 0
    assert main([*job, "--seed", "1", "--shards", f"{out}/shards"]) == 2  # in every rank
    assert main([*job, "--n", "1", "--out", f"{out}/one.png"]) == 0  # a rank without an image
    job = ["--run", run, "--data", f"{run}/data.npz", "--n", "20", "--sampler", "ddim", "--steps", "2", "--quiet"]
    job += ["--micro-batch", "4", "--features", "classifier", "--out", f"{out}/evaluation"]
    assert main(["evaluate", *job]) == 0
    assert main(["evaluate", *job, "--shards", f"{out}/many"]) == 0
"""


def written(folder: Path, but: str) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    files = [path for path in files if path.parent.name != but]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.full
def test_two_processes_write_what_one_writes(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As torchrun starts them; this one is the first of the two."""
    one, two = tmp_path / "one", tmp_path / "two"
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["ranks.py", str(run), str(one)])
    exec(RANKS, {})
    capfd.readouterr()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    job = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    second = {**os.environ, **job, "RANK": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([sys.executable, "-c", RANKS, str(run), str(two)], env=second, cwd=ROOT)
    try:
        for name, value in {**job, "RANK": "0"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["ranks.py", str(run), str(two)])
        exec(RANKS, {})
        assert process.wait(100) == 0
    finally:
        process.kill()
        process.wait()
        torch.set_num_threads(threads)
    printed = capfd.readouterr()
    assert printed.out.count("7 images in") == 4, "the main rank alone says it"
    assert printed.err.count("got those of another, whose seed is 0 instead of 1") == 2
    assert printed.out.count("FID, n to infinity") == 2
    found = [json.loads((out / "evaluation" / "evaluation.json").read_text()) for out in (one, two)]
    compare(found[1], found[0])
    files = [written(out, "evaluation") for out in (one, two)]
    assert len(files[0]) == 1 + 7 + 2 + 1 + 2
    assert files[1] == files[0]


def compare(found: Any, expected: Any) -> None:
    """Up to the features' rounding: a process sees other batches."""
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            compare(found[name], value)
    elif isinstance(expected, list):
        for part, other in zip(found, expected, strict=True):
            compare(part, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)
    else:
        assert found == expected
