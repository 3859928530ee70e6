"""Plain data as JSON: text parsed, and objects of it read into dataclasses with every field checked.

`record` reads an object whose dataclass is known. Where it is one of several, `of_kind` looks its "kind" up in a table;
`kind_of` writes it. Nothing is imported for a file, and nothing but these dataclasses is built.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import reprlib
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

__all__ = ["check_fields", "kind_of", "of_kind", "parse", "record", "shown"]

Made = TypeVar("Made")


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
    "``prefix`` field must be ..., got ...". Numbers are finite, and floats where the field is one; integers have at
    most 64 bits; true is no number; lists become tuples.
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
            known = ", ".join(field for field in readers if field not in given) or "none"
            raise ValueError(f"{whole} has the fields {known}, got {shown(name)}")
        found[name] = reader.read(value, f"{prefix}{name}")
    for name in required:
        if name not in found:
            raise ValueError(f"{prefix}{name} must be given, got none")
    return made(**found)


def check_fields(made: object, prefix: str = "") -> None:
    """Of a dataclass that was made in Python, every field as `record` reads it: for ``__post_init__``.

    ValueError for a value of another type than the field's. Lists become tuples, and integers floats where the field is
    one, also where the dataclass is frozen.
    """
    kind: Any = type(made)
    for name, reader in _fields(kind)[0].items():
        object.__setattr__(made, name, reader.read(getattr(made, name), f"{prefix}{name}"))


def kind_of(value: Any, kinds: Mapping[str, type], what: str, remedy: str) -> dict[str, Any]:
    """{"kind": NAME, field: value, ...} of a dataclass of one of the ``kinds``, which `of_kind` reads.

    ValueError, which ends in the ``remedy``, for any other.
    """
    name = type(value).__name__
    if kinds.get(name) is not type(value):
        raise ValueError(f"{what} must be one of {', '.join(kinds)} to be stored as JSON, got {name}: {remedy}")
    names = [field.name for field in dataclasses.fields(kinds[name]) if field.init]
    return {"kind": name, **{field: getattr(value, field) for field in names}}


def of_kind(data: object, kinds: Mapping[str, type], what: str) -> Any:
    """The dataclass that `kind_of` wrote; ValueError naming the field for anything else."""
    if not isinstance(data, Mapping):
        raise ValueError(f"{what} must be an object, got {shown(data)}")
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"{what}.kind must be one of {', '.join(kinds)}, got {shown(kind)}")
    return record(kinds[kind], {name: value for name, value in data.items() if name != "kind"}, f"{what}.")


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


def _bounded(value: int, name: str) -> int:
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} must be an integer of 64 bits, got {shown(value)}")
    return value


_PLAIN = {
    bool: _Reader("true or false", lambda value: isinstance(value, bool)),
    int: _Reader("an integer", lambda value: isinstance(value, int) and not isinstance(value, bool), _bounded),
    float: _Reader("a finite number", _is_number, lambda value, name: float(value)),
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
