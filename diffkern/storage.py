"""Files written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

__all__ = ["whole", "write"]


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
