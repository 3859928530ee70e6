"""`python -m diffkern plan show | diff | make`: print a plan, compare two, write one as JSON.

A source is a file of `Plan.to_json`, ``-`` for such text on stdin, or a sampler with its arguments as in Python:
``ddim``, ``ddim(steps=20, eta=0.5)``, ``"heun(schedule=edm(sigma_max=40), steps=18)"``. Values are literals, schedules
are those of `schedules.SCHEDULES`, linear unless given. After ``show`` and ``make`` the arguments may follow one by
one: ``show ddim schedule=cosine steps=20``.
"""

from __future__ import annotations

import argparse
import ast
import math
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from diffkern import records, storage
from diffkern.checks import SAMPLERS_ELSEWHERE, unknown, word
from diffkern.plan import Plan, Row
from diffkern.samplers import SAMPLERS, get_sampler
from diffkern.schedules.makers import SCHEDULES

__all__ = ["add_command", "apply", "differences", "read", "sampler_call"]

LARGEST = 1_000_000
"""Of the integers in a sampler's arguments: steps, levels of a table, repetitions."""
_HEAD = [field.name for field in fields(Plan) if field.name != "rows"]
_ROW = [field.name for field in fields(Row)]


def read(source: str, arguments: tuple[str, ...] = (), name: str = "source") -> Plan:
    """The plan of a source, with further ``name=value`` arguments of its sampler. Raises ValueError for any other.

    ``name`` is what the source is called where it cannot be read.
    """
    if source == "-" or _is_file(source):
        if arguments:
            raise ValueError(f"arguments belong to a sampler, got {' '.join(arguments)} for the file {source}")
        return Plan.from_json(sys.stdin.read() if source == "-" else _text(source, name))
    sampler, named = sampler_call(source)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"an argument must be name=value, got {argument!r}")
        if key in named:
            raise ValueError(f"{key} must be given once, got it twice for {sampler}")
        named[key] = _value(_parsed(value, argument), key, argument)
    make = get_sampler(sampler)
    schedule = named.pop("schedule", None) or SCHEDULES["linear"]()
    plan = apply(make, sampler, (schedule,), named)
    assert isinstance(plan, Plan)
    return plan


def sampler_call(source: str) -> tuple[str, dict[str, Any]]:
    """The name and the named arguments of ``ddim`` or ``ddim(steps=20, eta=0.5)``; ValueError for anything else."""
    sampler, positional, named = _call(_parsed(_by_name(source), source), source)
    if positional:
        raise ValueError(f"a sampler's arguments must be named, as in {sampler}(steps=20), got {source!r}")
    return sampler, named


def differences(one: Plan, two: Plan, tolerance: float = 0.0) -> list[str]:
    """What differs between two plans, a line each: entries of the head, rows, and of each row its columns.

    Numbers a and b differ if abs(a - b) > tolerance max(abs(a), abs(b)).
    """
    lines = []
    for name in _HEAD:
        if not _same(getattr(one, name), getattr(two, name), tolerance):
            lines.append(f"{name}: {getattr(one, name)} | {getattr(two, name)}")
    if len(one.rows) != len(two.rows):
        lines.append(f"rows: {len(one.rows)} | {len(two.rows)}")
    for i, (a, b) in enumerate(zip(one.rows, two.rows, strict=False)):
        pairs = [(name, getattr(a, name), getattr(b, name)) for name in _ROW]
        changed = [f"{name} {_show(x)} | {_show(y)}" for name, x, y in pairs if not _same(x, y, tolerance)]
        if changed:
            lines.append(f"row {i}: {', '.join(changed)}")
    return lines


def add_command(parser: argparse.ArgumentParser) -> None:
    """The arguments of `plan`."""
    parser.description = __doc__
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    show = actions.add_parser("show", help="print a plan as a table")
    make = actions.add_parser("make", help="write a plan as JSON")
    for action in (show, make):
        action.add_argument("source", help=f"a file, - for stdin, or a sampler: {', '.join(SAMPLERS)}")
        action.add_argument("arguments", nargs="*", metavar="NAME=VALUE", help="the sampler's arguments")
    make.add_argument("-o", "--output", type=Path, help="the file to write; stdout without it")
    diff = actions.add_parser("diff", help="what differs between two plans; exit status 1 if anything does")
    diff.add_argument("one", help="a file, - for stdin, or a sampler with its arguments, in quotes")
    diff.add_argument("two", help="the same")
    diff.add_argument(
        "--tolerance", type=float, default=0.0, help="relative difference of numbers that is none (default 0)"
    )
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    if arguments.action == "diff":
        if not arguments.tolerance >= 0.0:
            raise ValueError(f"--tolerance must be a number >= 0, got {arguments.tolerance}")
        if arguments.one == arguments.two == "-":
            raise ValueError("only one of the two plans can be read from stdin, got - twice")
        found = differences(read(arguments.one, name="one"), read(arguments.two, name="two"), arguments.tolerance)
        for line in found:
            print(line)
        return 1 if found else 0
    plan = read(arguments.source, tuple(arguments.arguments))
    if arguments.action == "show":
        print(plan)
    elif arguments.output is None:
        print(plan.to_json())
    else:
        try:
            storage.write(arguments.output, plan.to_json() + "\n")
        except OSError as error:
            raise ValueError(
                f"--output must be a file that can be written, got {str(arguments.output)!r} ({error.strerror})"
            ) from error
    return 0


def _is_file(source: str) -> bool:
    path = Path(source)
    try:
        return path.suffix == ".json" or path.is_file()
    except OSError:  # a sampler with many arguments is too long for a file's name
        return False


def _text(source: str, name: str) -> str:
    try:
        return Path(source).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise ValueError(
            f"{name} must be a file of a plan's JSON, - for stdin, or a sampler such as ddim(steps=20), got {source!r} "
            f"({why})"
        ) from error


def _same(a: Any, b: Any, tolerance: float) -> bool:
    if isinstance(a, float) and isinstance(b, float | int) and a != b:
        return abs(a - b) <= tolerance * max(abs(a), abs(b))
    return bool(a == b)


def _show(value: Any) -> str:
    """A value for people; saves as the table prints them."""
    if isinstance(value, tuple) and all(isinstance(part, tuple) for part in value):
        return " ".join(f"h{slot}={source}" for slot, source in value) or "none"
    return f"{value!r}"


def _parsed(text: str, whole: str) -> ast.expr:
    try:
        with warnings.catch_warnings():  # of odd escapes
            warnings.simplefilter("ignore")
            return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:  # the last two: nested too deeply
        raise ValueError(
            f"a plan must be a file or a sampler with its arguments, such as ddim(steps=20), got {records.shown(whole)}"
        ) from error


def _by_name(source: str) -> str:
    """The source with its sampler by its own name, which "DPM++ 2M" is none of Python's for."""
    head, bracket, rest = source.partition("(")
    return (word(head.strip(), SAMPLERS, SAMPLERS_ELSEWHERE) or head) + bracket + rest


def _call(node: ast.expr, whole: str) -> tuple[str, list[Any], dict[str, Any]]:
    """(name, positional arguments, named arguments) of ``name`` or ``name(...)``."""
    if isinstance(node, ast.Name):
        return node.id, [], {}
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        raise ValueError(
            f"a plan must be a file or a sampler with its arguments, such as ddim(steps=20), got {records.shown(whole)}"
        )
    positional = [_value(argument, "", whole) for argument in node.args]
    named: dict[str, Any] = {}
    for keyword in node.keywords:
        if keyword.arg is None:
            raise ValueError(f"arguments must be named one by one, got ** in {whole!r}")
        named[keyword.arg] = _value(keyword.value, keyword.arg, whole)
    return node.func.id, positional, named


def _value(node: ast.expr, name: str, whole: str) -> Any:
    """A literal; for ``schedule`` a schedule by its name, with arguments or without."""
    if name == "schedule":
        which, positional, named = _call(node, whole)
        if which not in SCHEDULES:
            raise ValueError(unknown("schedule", which, SCHEDULES))
        return apply(SCHEDULES[which], which, tuple(positional), named)
    if isinstance(node, ast.Name):  # a word without quotes: spacing=karras
        return math.inf if node.id == "inf" else node.id
    try:
        value = ast.literal_eval(_Infinity().visit(node))
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"{name or 'an argument'} must be a number, text or list, got {records.shown(whole)}"
        ) from error
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"{name or 'an argument'} must be at most {LARGEST}, got {records.shown(value)}")
    return value


class _Infinity(ast.NodeTransformer):
    """``inf`` is a number."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(math.inf) if node.id == "inf" else node


def apply(function: Callable[..., Any], name: str, positional: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """The call; an argument that the function does not have, or of the wrong type, in one sentence."""
    try:
        return function(*positional, **named)
    except (TypeError, AttributeError, OverflowError) as error:
        given = ", ".join(f"{key}={records.shown(value)}" for key, value in named.items())
        raise ValueError(f"{name} does not take these arguments: {error} (got {given or 'none'})") from error
