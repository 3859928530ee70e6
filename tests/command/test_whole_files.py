"""Files are whole or not at all: with two writers of one, and on a full disk."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from diffkern import storage
from diffkern.__main__ import main


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    monkeypatch.setattr(os, call, full_disk)
    with pytest.raises(OSError, match=r"No space left on device: '.*file'"):
        storage.write(path, "other")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "mine")]


def test_two_writers_leave_the_file_of_one(tmp_path: Path) -> None:
    """Whole, whichever came last; and none of theirs in between is left."""
    path, start = tmp_path / "file", threading.Barrier(2)
    failed: list[BaseException] = []

    def writer(text: str) -> None:
        try:
            start.wait()
            for _ in range(15):
                storage.write(path, text * 100_000)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=writer, args=(text,)) for text in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() in ("a" * 100_000, "b" * 100_000)


def test_a_full_disk_leaves_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "plan.json"
    file.write_text("mine")
    monkeypatch.setattr(os, "fsync", full_disk)
    assert main(["plan", "make", "ddim", "steps=3", "-o", str(file)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("plan.json", "mine")]
