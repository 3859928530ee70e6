"""`diffkern.storage`: files whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffkern import storage


def test_a_file_is_written_through_a_link_and_into_what_is_no_file(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("before")
    link.symlink_to(file)
    storage.write(link, "after")
    assert link.is_symlink()
    assert file.read_text() == "after"
    storage.write("/dev/null", b"x" * 1000)
    assert Path("/dev/null").is_char_device()
    read, written = os.pipe()
    storage.write(f"/dev/fd/{written}", "through")
    assert os.read(read, 100) == b"through"
    os.close(read)
    os.close(written)


def test_a_file_has_the_mode_of_any_other(tmp_path: Path) -> None:
    storage.write(tmp_path / ("n" * 250), "long name")
    (tmp_path / "other").write_text("")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none/file'$"):
        storage.write(tmp_path / "none" / "file", b"")
    with pytest.raises(FileNotFoundError, match=r"other'$"), storage.whole(tmp_path / "file"):
        (tmp_path / "other").read_bytes()
    assert not list(tmp_path.iterdir())


def test_two_files_are_both_written_or_neither(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text("before")

    def write(*, fails: bool) -> None:
        with storage.whole(tmp_path / "a") as a, storage.whole(tmp_path / "b") as b:
            a.write_text("after")
            b.write_text("aft")
            if fails:
                raise RuntimeError

    with pytest.raises(RuntimeError):
        write(fails=True)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "before", "b": "before"}
    write(fails=False)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": "after", "b": "aft"}
