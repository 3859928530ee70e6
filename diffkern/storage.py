"""Files and folders written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "filling",
    "flushed",
    "linked",
    "locked",
    "numbered",
    "remove",
    "unfinished_in",
    "whole",
    "whole_folder",
    "write",
]


def write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """The file, of this content: `whole`."""
    content = data.encode() if isinstance(data, str) else data
    with whole(path) as unfinished:
        unfinished.write_bytes(content)


@contextlib.contextmanager
def whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write the file, so that it is whole or not at all, also with other writers of it and on a full disk.

    A name of this call's own beside it (``NAME.xxxx.part``): what is written there takes the file's place at the end,
    and is removed if anything fails. What is no regular file, such as /dev/stdout, is written to as it is. OSError
    names the ``path``.
    """
    place = Path(path)
    unfinished = place
    try:
        if place.exists() and not stat.S_ISREG(place.stat().st_mode):
            yield place
            return
        place = place.resolve()  # a link stays, and what it points to is written
        unfinished = place.with_name(f"{place.name[:64]}.{secrets.token_hex(8)}.part")
        with _beside(place, unfinished):
            yield unfinished
    except OSError as error:
        if error.errno is None or (error.filename is not None and error.filename != str(unfinished)):
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextlib.contextmanager
def _beside(place: Path, unfinished: Path) -> Iterator[None]:
    try:
        with open(unfinished, "xb") as file:
            mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        yield
        with open(unfinished, "rb") as file:
            os.fsync(file.fileno())
        unfinished.chmod(mode)  # of any new file: safetensors puts one in its place that others cannot read
        os.replace(unfinished, place)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write the files of a new folder, so that it is there whole or not at all, also after a power cut.

    A folder ``.NAME.xxxx.part`` beside it: its files are flushed to the disk, then it takes the name, which is flushed
    too. It is removed if anything fails; what a killed process leaves, `unfinished_in` finds. OSError names ``path``;
    a folder that is there already is left as it is.
    """
    place = Path(path)
    unfinished = place.with_name(f".{place.name[:64]}.{secrets.token_hex(8)}.part")
    try:
        if place.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
        place.parent.mkdir(parents=True, exist_ok=True)
        unfinished.mkdir()
        yield unfinished
        for file in unfinished.rglob("*"):
            flushed(file)
        flushed(unfinished)
        unfinished.rename(place)
        flushed(place.parent)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
        raise


@contextlib.contextmanager
def locked(path: str | os.PathLike[str], patience: float) -> Iterator[None]:
    """Holds the lock ``path``, a file that stays, until the block or the process ends; nothing where the file system
    has no locks. TimeoutError where another holds it for longer than ``patience`` seconds.
    """
    import fcntl  # not on every system

    with open(path, "a") as file:
        end, held = time.monotonic() + patience, None
        while held is None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES):  # ENOSYS, ENOLCK, EOPNOTSUPP
                    held = False
                elif time.monotonic() >= end:
                    raise TimeoutError(errno.ETIMEDOUT, "held by another", os.fspath(path)) from None
                else:
                    time.sleep(0.05)
        try:
            yield
        finally:
            if held:
                fcntl.flock(file, fcntl.LOCK_UN)  # also for processes that were forked with it


def flushed(path: Path) -> None:
    """Has the system write the file, or the names in the folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def numbered(folder: str | os.PathLike[str]) -> list[Path]:
    """The folders in a folder whose names are digits, by their numbers; none where there is no such folder."""
    if not os.path.isdir(folder):
        return []
    found = [path for path in Path(folder).iterdir() if path.name.isdecimal() and path.name.isascii() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def unfinished_in(folder: str | os.PathLike[str]) -> list[Path]:
    """What writers of `whole_folder` and `remove` have left in a folder where they were killed."""
    return sorted(Path(folder).glob(".*.part"))


def linked(source: Path, place: Path) -> None:
    """The file under a second name, by a hard link; a copy where the file system has none."""
    try:
        os.link(source, place)
    except FileExistsError:
        raise
    except OSError:
        with whole(place) as unfinished:
            shutil.copyfile(source, unfinished)


def remove(folder: Path) -> None:
    """Removes a folder, which is gone under its name before its first file is."""
    if not folder.name.endswith(".part"):
        folder = folder.rename(folder.with_name(f".{folder.name[:64]}.{secrets.token_hex(8)}.part"))
    shutil.rmtree(folder)


@contextlib.contextmanager
def filling(path: str | os.PathLike[str]) -> Iterator[None]:
    """safetensors' errors of the disk, which are its own, as OSError with the number that they name."""
    try:
        yield
    except Exception as error:
        number = re.search(r"os error (\d+)", str(error))
        if type(error).__name__ != "SafetensorError" or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), os.fspath(path)) from error
