"""Plain data in and out: JSON read into dataclasses with every field checked, files written whole or not at all."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import reprlib
import secrets
import stat
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Made = TypeVar("Made")


# ------------------------------------------------------------------------------------------------------------- JSON
def parse(text: str | bytes, rule: str = "JSON", name: str = "text") -> Any:
    """The value of the JSON ``text``.

    ValueError, "``name`` must be ``rule``, got ...", for what is none: also for NaN and infinities, a name twice in one
    object, and nesting too deep for Python's stack.
    """
    if not isinstance(text, str | bytes | bytearray):
        raise ValueError(f"{name} must be {rule}, got {type(text).__name__}")
    try:
        return json.loads(text, parse_constant=_no_constant, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError(f"{name} must be {rule}, got {shown(text)} (nested too deeply)") from None
    except ValueError as error:  # of json, of int() for thousands of digits, of the two hooks
        raise ValueError(f"{name} must be {rule}, got {shown(text)} ({' '.join(str(error).split())})") from error


def record(made: type[Made], data: Mapping[str, Any], prefix: str = "", **given: Any) -> Made:
    """The dataclass ``made`` of the entries of a JSON object; ``given``: fields that are made already.

    ValueError for a name that it lacks, a field that is missing and a value of another type than the field's:
    "``prefix`` field must be ..., got ...". Numbers are finite, true is no number, lists become tuples.
    """
    kind: Any = made
    readers, required = _fields(kind)
    whole = prefix.rstrip(".: ") or made.__name__
    if not isinstance(data, Mapping):
        raise ValueError(f"{whole} must be an object, got {shown(data)}")
    found = dict(given)
    for name, value in data.items():
        reader = readers.get(name)
        if reader is None or name in given:
            known = ", ".join(sorted(set(readers) - set(given)))
            raise ValueError(f"{whole} does not know {shown(name)[1:-1]}; it knows {known}")
        found[name] = reader.read(value, f"{prefix}{name}")
    for name in required:
        if name not in found:
            raise ValueError(f"{prefix}{name} must be given, got none")
    return made(**found)


def shown(value: Any) -> str:
    """A value for an error, short and on one line."""
    return " ".join(_SHORT.repr(value).split())


_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 60, 60


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice)} stands twice in one object")
    return found


class _Reader(NamedTuple):
    rule: str
    """What a value must be."""
    fits: Callable[[Any], bool]
    make: Callable[[Any, str], Any] | None = None
    """What becomes of a value that fits; where its name is known, for what is inside."""

    def read(self, value: Any, name: str) -> Any:
        if not self.fits(value):
            raise ValueError(f"{name} must be {self.rule}, got {shown(value)}")
        return value if self.make is None else self.make(value, name)


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


_PLAIN = {
    bool: _Reader("true or false", lambda value: isinstance(value, bool)),
    int: _Reader("an integer", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    float: _Reader("a finite number", _is_number),
    str: _Reader("text", lambda value: isinstance(value, str)),
    types.NoneType: _Reader("null", lambda value: value is None),
}


@functools.cache
def _fields(made: type) -> tuple[dict[str, _Reader], list[str]]:
    """How each field is read, and the names of those without a default."""
    hints = typing.get_type_hints(made)
    every = [field for field in dataclasses.fields(made) if field.init]
    missing = dataclasses.MISSING
    required = [field.name for field in every if field.default is missing and field.default_factory is missing]
    return {field.name: _reader(hints[field.name]) for field in every}, required


def _reader(hint: Any) -> _Reader:
    """For the types of plain data: bool, int, float, str, None, unions, literals, tuples, dict[str, Any], records."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if hint in _PLAIN:
        return _PLAIN[hint]
    if dataclasses.is_dataclass(hint):
        kind: Any = hint
        return _Reader("an object", lambda v: isinstance(v, Mapping), lambda v, name: record(kind, v, f"{name}."))
    if origin is dict:
        return _Reader("an object", lambda value: isinstance(value, Mapping))
    if origin is typing.Literal:
        options = f"one of {', '.join(map(repr, parts))}"
        return _Reader(options, lambda value: any(value == part and type(value) is type(part) for part in parts))
    if origin in (typing.Union, types.UnionType):
        kinds = [_reader(part) for part in parts]

        def first(value: Any, name: str) -> Any:
            return next(kind for kind in kinds if kind.fits(value)).read(value, name)

        return _Reader(" or ".join(kind.rule for kind in kinds), lambda v: any(kind.fits(v) for kind in kinds), first)
    assert origin is tuple, f"no reader for {hint}"
    if parts[-1] is ...:
        item = _reader(parts[0])

        def every(value: list[Any], name: str) -> tuple[Any, ...]:
            return tuple(item.read(part, f"{name}[{i}]") for i, part in enumerate(value))

        return _Reader(f"a list (each {item.rule})", lambda v: isinstance(v, list | tuple), every)
    items = [_reader(part) for part in parts]

    def fits(value: Any) -> bool:
        return isinstance(value, list | tuple) and len(value) == len(items)

    def each(value: list[Any], name: str) -> tuple[Any, ...]:
        return tuple(item.read(v, f"{name}[{i}]") for i, (item, v) in enumerate(zip(items, value, strict=True)))

    return _Reader(f"a list of {len(items)} ({', '.join(item.rule for item in items)})", fits, each)


# ------------------------------------------------------------------------------------------------------------ files
def write(path: str | os.PathLike[str], data: bytes | str) -> None:
    """The file: whole or not at all, also with other writers of it and on a full disk.

    The data goes into a file of this call's own beside it (``NAME.xxxx.part``), which takes its place at the end and is
    removed if that fails. What is no regular file, such as /dev/stdout, is written to as it is. OSError names the path.
    """
    content = data.encode() if isinstance(data, str) else data
    try:
        _write(Path(path), content)
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def _write(path: Path, content: bytes) -> None:
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        path.write_bytes(content)
        return
    path = path.resolve()  # a link stays, and what it points to is written
    unfinished = path.with_name(f"{path.name[:64]}.{secrets.token_hex(8)}.part")
    try:
        with open(unfinished, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
