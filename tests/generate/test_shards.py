"""Shards of images: the same bytes for any number of processes, only the missing made again, other jobs refused."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.generate_cases import elementwise, in_turn, small_unet

import diffkern
from diffkern import parallel, storage
from diffkern.generate import fingerprint, generate, read_shards, shards, write_shards

JOB: dict[str, Any] = {"sampler": "ddim", "steps": 2, "seed": 3, "classes": "even", "micro_batch": 2, "shard": 4}


@pytest.fixture(scope="module")
def diffusion() -> diffkern.Diffusion:
    return small_unet()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != shards.LOCK}


@pytest.fixture(scope="module")
def whole(diffusion: diffkern.Diffusion, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards") / "whole"
    write_shards(folder, diffusion, 10, **JOB)
    return folder


# ------------------------------------------------------------------------------------------------------------ the files
def test_shards_hold_the_images_as_bytes(diffusion: diffkern.Diffusion, whole: Path) -> None:
    assert sorted(contents(whole)) == [
        "index.json",
        "shard-000000.npz",
        "shard-000001.npz",
        "shard-000002.npz",
    ]
    made = torch.cat(
        [part.images for part in generate(diffusion, 10, "ddim", 2, seed=3, classes="even", micro_batch=2)]
    )
    bytes_of = ((made.double() + 1.0) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1).numpy()
    for k, n in enumerate((4, 4, 2)):
        with np.load(whole / f"shard-{k:06d}.npz", allow_pickle=False) as arrays:
            assert arrays["arr_0"].dtype == np.uint8
            assert arrays["arr_0"].shape == (n, 8, 8, 1)
            assert (arrays["arr_0"] == bytes_of[4 * k : 4 * k + n]).all()
            assert arrays["arr_1"].tolist() == [j % 3 for j in range(4 * k, 4 * k + n)]
    assert json.loads((whole / "index.json").read_text())["n"] == 10


def test_what_is_read_is_what_was_written(whole: Path) -> None:
    parts = list(read_shards(whole, micro_batch=3))
    assert [(part.first, len(part.images)) for part in parts] == [(0, 3), (3, 1), (4, 3), (7, 1), (8, 2)]
    read = torch.cat([part.images for part in parts])
    assert read.shape == (10, 1, 8, 8)
    written = torch.from_numpy(np.concatenate([np.load(path)["arr_0"] for path in sorted(whole.glob("*.npz"))]))
    torch.testing.assert_close(read.permute(0, 2, 3, 1), written / 127.5 - 1.0)
    assert torch.cat([part.classes for part in parts if part.classes is not None]).tolist() == [
        j % 3 for j in range(10)
    ]


def test_colour_images_without_classes_from_the_middle_of_a_job(tmp_path: Path) -> None:
    diffusion = diffkern.Diffusion(elementwise().model, diffkern.cosine(100), shape=(3, 4, 6))
    files = write_shards(tmp_path / "s", diffusion, 5, "ddim", 1, first=3, micro_batch=2, shard=4)
    assert [path.name for path in files] == ["shard-000000.npz", "shard-000001.npz"]
    parts = list(read_shards(tmp_path / "s"))
    assert [(part.first, tuple(part.images.shape), part.classes) for part in parts] == [
        (3, (1, 3, 4, 6), None),
        (4, (4, 3, 4, 6), None),
    ]
    made = torch.cat([part.images for part in generate(diffusion, 5, "ddim", 1, first=3, micro_batch=2)])
    assert (torch.cat([part.images for part in parts]) - made.clamp(-1, 1)).abs().max() <= 0.5 / 127.5 + 1e-6


# ------------------------------------------------------------------------------------------------ ranks and killed jobs
@pytest.mark.parametrize("world", [2, 4])
def test_shards_have_the_same_bytes_for_every_number_of_ranks(
    diffusion: diffkern.Diffusion, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: int
) -> None:
    made: list[list[str]] = []

    def run() -> object:
        before = set(contents(tmp_path)) if parallel.rank() else set()
        files = write_shards(tmp_path, diffusion, 10, **JOB)
        made.append(sorted(set(contents(tmp_path)) - before - {"index.json"}))
        return files

    files = in_turn(monkeypatch, world, run)
    assert contents(tmp_path) == contents(whole)
    assert all(found == files[0] for found in files)
    assert [len(names) for names in made] == {2: [1, 2], 4: [0, 1, 1, 1]}[world]


def test_only_what_is_missing_is_made_again(
    diffusion: diffkern.Diffusion, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, data in contents(whole).items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "shard-000000.npz").unlink()
    (tmp_path / "shard-000002.npz").write_bytes(contents(whole)["shard-000002.npz"][:-30])  # cut short
    (tmp_path / "shard-000001.npz.0123456789abcdef.part").write_bytes(b"left by a writer that was killed")
    written: list[str] = []
    write = shards._write
    monkeypatch.setattr(shards, "_write", lambda path, *rest: (written.append(path.name), write(path, *rest)))
    write_shards(tmp_path, diffusion, 10, **JOB)
    assert written == ["shard-000000.npz", "shard-000002.npz"]
    assert contents(tmp_path) == contents(whole)
    monkeypatch.setattr(diffkern.Diffusion, "sample", lambda *_, **__: pytest.fail("nothing was missing"))
    write_shards(tmp_path, diffusion, 10, **JOB)


@pytest.mark.parametrize(("first", "then"), [(5, 10), (8, 10), (1, 3)])
@pytest.mark.parametrize("classes", ["even", None])
def test_a_job_grows_and_has_the_bytes_of_one_that_was_large_at_once(
    diffusion: diffkern.Diffusion, tmp_path: Path, first: int, then: int, classes: Any
) -> None:
    """Also where a last file, and in it a last micro-batch, was not full."""
    job = {**JOB, "classes": classes}
    for n in (first, then):
        write_shards(tmp_path / "grown", diffusion, n, **job)
    write_shards(tmp_path / "at once", diffusion, then, **job)
    assert contents(tmp_path / "grown") == contents(tmp_path / "at once")


def test_a_job_that_another_is_at_is_left_alone_and_a_reader_sees_what_it_opened(
    diffusion: diffkern.Diffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shards(tmp_path, diffusion, 5, **JOB)
    before = contents(tmp_path)
    monkeypatch.setattr(shards, "PATIENCE", 0.1)
    with (
        storage.locked(tmp_path / shards.LOCK, 0.0),
        pytest.raises(ValueError, match="must be written to by one job at a time, and another is at it"),
    ):
        write_shards(tmp_path, diffusion, 8, **JOB)
    assert contents(tmp_path) == before
    reader = read_shards(tmp_path)
    write_shards(tmp_path, diffusion, 8, **JOB)
    assert [len(part.images) for part in reader] == [4, 1]


def test_a_job_grows_by_the_same_classes_alone(diffusion: diffkern.Diffusion, tmp_path: Path) -> None:
    job = {**JOB, "classes": [0, 1, 2]}
    write_shards(tmp_path, diffusion, 3, **job)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="got those of another, whose classes is"):
        write_shards(tmp_path, diffusion, 5, **{**job, "classes": [0, 1, 1, 0, 2]})
    assert contents(tmp_path) == before
    write_shards(tmp_path, diffusion, 5, **{**job, "classes": [0, 1, 2, 0, 2]})
    assert sum(len(part.images) for part in read_shards(tmp_path)) == 5


@pytest.mark.parametrize("calls", [0, 1, 3])
def test_a_job_that_is_ended_goes_on_where_it_was(
    diffusion: diffkern.Diffusion, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    left = iter(range(calls))
    sample = diffkern.Diffusion.sample

    def ended(self: diffkern.Diffusion, *arguments: Any, **options: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return sample(self, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(diffkern.Diffusion, "sample", ended)
        with pytest.raises(KeyboardInterrupt):
            write_shards(tmp_path, diffusion, 10, **JOB)
    assert len(contents(tmp_path)) == 1 + calls // 2
    with pytest.raises(ValueError, match=r"must hold all 3 shards of its job, got \d \(without shard-\d+\.npz\)"):
        read_shards(tmp_path)
    write_shards(tmp_path, diffusion, 10, **JOB)
    assert contents(tmp_path) == contents(whole)


def test_a_full_disk_is_one_sentence_and_what_was_whole_stays(
    diffusion: diffkern.Diffusion, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter(range(2))  # of index.json and of the first shard

    def fsync(_: int) -> None:
        if next(free, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match=r"No space left on device: '.*shard-000001\.npz'"):
            write_shards(tmp_path, diffusion, 10, **JOB)
    assert sorted(contents(tmp_path)) == ["index.json", "shard-000000.npz"]
    write_shards(tmp_path, diffusion, 10, **JOB)
    assert contents(tmp_path) == contents(whole)


PROGRAM = """
import sys
from helpers.generate_cases import small_unet
from diffkern.generate import write_shards

write_shards(sys.argv[1], small_unet(), 120, "ddim", 2, seed=3, classes="even", micro_batch=2, shard=4)
"""


@pytest.mark.full
def test_a_job_that_is_killed_goes_on_and_leaves_the_same_bytes(diffusion: diffkern.Diffusion, tmp_path: Path) -> None:
    path = os.pathsep.join([*sys.path, str(Path(__file__).parents[1])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(tmp_path / "killed")], env=environment)
    try:
        until = time.monotonic() + 100
        while len(list((tmp_path / "killed").glob("*.npz"))) < 3 and time.monotonic() < until:
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    there = {path.name: path.read_bytes() for path in (tmp_path / "killed").glob("*.npz")}
    assert 3 <= len(there) < 30
    for name in ("killed", "whole"):
        write_shards(tmp_path / name, diffusion, 120, **JOB)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert there.items() <= contents(tmp_path / "killed").items()


# ----------------------------------------------------------------------------------------------------------- other jobs
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": 4}, "whose seed is 3 instead of 4"),
        ({"steps": 3}, "whose steps is 2 instead of 3"),
        ({"eta": 0.5}, "whose plan is '[0-9a-f.]+' instead of"),
        ({"sampler": "ddpm"}, "whose sampler is 'ddim' instead of 'ddpm'"),
        ({"n": 8}, "whose n is 10 instead of 8"),
        ({"first": 4}, "whose first is 0 instead of 4"),
        ({"classes": None}, "whose classes is '[0-9a-f.]+' instead of None"),
        ({"guidance": 2.0}, "whose guidance is None instead of 2.0"),
        ({"micro_batch": 4}, "whose micro_batch is 2 instead of 4"),
        ({"shard": 6}, "whose shard is 4 instead of 6"),
    ],
)
def test_the_folder_of_another_job_is_refused(
    diffusion: diffkern.Diffusion, whole: Path, change: dict[str, Any], sentence: str
) -> None:
    before = contents(whole)
    with pytest.raises(
        ValueError, match=f"must be empty or hold the shards of this job, got those of another, {sentence}"
    ):
        write_shards(whole, diffusion, **{"n": 10, **JOB, **change})
    assert contents(whole) == before


def test_the_folder_of_another_model_is_refused_in_every_rank(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = small_unet()
    next(other.parameters()).data.flatten()[0] += 1e-3

    def refused() -> str:
        with pytest.raises(ValueError, match="got those of another, whose model is") as caught:
            write_shards(whole, other, 10, **JOB)
        return str(caught.value)

    assert len(set(in_turn(monkeypatch, 2, refused))) == 1


def test_a_model_is_known_by_its_tensors_and_what_reads_them(diffusion: diffkern.Diffusion) -> None:
    assert fingerprint(small_unet()) == fingerprint(diffusion)
    assert fingerprint(small_unet(groups=4)) != fingerprint(diffusion)
    assert fingerprint(diffkern.Diffusion(diffusion.model, diffusion.schedule, "v")) != fingerprint(diffusion)


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("photo.png", b"mine", r"must be empty or hold the shards of this job, got photo\.png without index\.json"),
        ("index.json", b"{", r"index\.json must be JSON, got b?'\{'"),
        ("index.json", b"[1]", r"index\.json must be the index of shards with diffkern_shards = 1, got None"),
        ("index.json", b'{"diffkern_shards": 1, "n": 3}', r"index\.json: \w+ must be given, got none"),
    ],
)
def test_a_folder_of_other_things_is_refused(
    diffusion: diffkern.Diffusion, tmp_path: Path, name: str, content: bytes, sentence: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        write_shards(tmp_path, diffusion, 10, **JOB)
    assert contents(tmp_path) == {name: content}
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        read_shards(tmp_path)


def test_bad_input_is_one_sentence(diffusion: diffkern.Diffusion, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(ValueError, match="file must be a folder, and is a file"):
        write_shards(file, diffusion, 10, **JOB)
    with pytest.raises(ValueError, match="shard must be a multiple of micro_batch = 2, got 5"):
        write_shards(tmp_path / "s", diffusion, 10, **{**JOB, "shard": 5})
    with pytest.raises(ValueError, match="n must be an integer of at least 1, got 0"):
        write_shards(tmp_path / "s", diffusion, 0, **JOB)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_images_that_are_no_numbers_are_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion = elementwise()
    monkeypatch.setattr(
        diffkern.Diffusion,
        "sample",
        lambda self, n, *_, **__: torch.tensor([0.0, float("nan")])[:n].reshape(-1, 1, 1, 1).expand(n, 1, 4, 4),
    )
    with pytest.raises(RuntimeError, match="images must be finite, got NaN or infinity in image 1: the network"):
        write_shards(tmp_path, diffusion, 2, "ddim", 1, micro_batch=2)
    assert sorted(contents(tmp_path)) == ["index.json"]


def test_shards_are_about_a_thousand_images_and_whole_micro_batches(tmp_path: Path) -> None:
    write_shards(tmp_path, elementwise(), 2300, "ddim", 1, micro_batch=100)
    assert [len(np.load(path)["arr_0"]) for path in sorted(tmp_path.glob("*.npz"))] == [1100, 1100, 100]
