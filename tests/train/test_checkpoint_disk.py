"""Checkpoints and what machines do: writers are killed, disks are full, folders are read-only."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.training_cases import trained

from diffkern import Diffusion
from diffkern.train import checkpoint

SIZE = 600
"""Of a disk, KiB: a checkpoint of about 470 fits, a second one does not."""


@pytest.mark.parametrize("kills", [pytest.param(3, marks=pytest.mark.full), pytest.param(20, marks=pytest.mark.long)])
def test_writers_that_are_killed_leave_the_newest_checkpoint_whole(kills: int, root: Path, tmp_path: Path) -> None:
    """The program compares every tensor; what was said to be saved is there, and at most the step after it."""
    program = [sys.executable, str(root / "tests/helpers/checkpoint_writer.py"), str(tmp_path), str(kills), "0"]
    done = subprocess.run(program, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(seen) == kills
    for one in seen:
        assert one["newest"] - one["said"] in (0, 1), one
        assert one["left"] <= 2, one  # a checkpoint begun, an old one half removed
    if kills >= 20:
        assert seen[-1]["newest"] > 5  # they came to write at all
        assert any(one["left"] for one in seen)  # and were killed in the middle of it


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of `SIZE`, where this user may make one."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}k", "tmpfs", str(place)]
    try:
        refused = subprocess.run(command, capture_output=True).returncode != 0
    except OSError:
        refused = True
    if refused:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.full
def test_a_small_disk_holds_the_checkpoint_that_fits_and_refuses_the_next(disk: Path) -> None:
    state = trained()
    diffusion, averages, optimizer = state
    state.steps(1, 1)
    path = checkpoint.save(disk, 1, diffusion=diffusion, averages=averages, optimizer=optimizer)
    kept = {file.name: file.read_bytes() for file in path.iterdir()}
    state.steps(2, 2)
    with pytest.raises(OSError, match=r"No space left on device \(no checkpoint written, the newest is 00000001\)"):
        checkpoint.save(disk, 2, diffusion=diffusion, averages=averages, optimizer=optimizer)
    assert os.listdir(disk / "checkpoints") == ["00000001"]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == kept
    assert Diffusion.from_pretrained(disk).shape == diffusion.shape
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    with pytest.raises(OSError, match=r"Read-only file system \(no checkpoint written, the newest is 00000001\)"):
        checkpoint.save(disk, 2, diffusion=diffusion)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_one_sentence(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir(mode=0o500)
    with pytest.raises(PermissionError, match=r"Permission denied \(no checkpoint written") as error:
        checkpoint.save(run, 1, diffusion=trained().diffusion)
    assert error.value.errno == errno.EACCES
    assert os.listdir(run) == []


def test_a_run_whose_folder_is_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(OSError, match=r"Not a directory \(no checkpoint written.*00000001"):
        checkpoint.save(tmp_path / "run", 1, diffusion=trained().diffusion)
    assert (tmp_path / "run").read_text() == "a file"
