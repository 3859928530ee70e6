"""One function in place of another whose arguments may be others."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Set
from typing import Any

__all__ = ["fit"]

VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def fit(
    old: Callable[..., Any], new: Callable[..., Any], avoid: Set[str] = frozenset()
) -> tuple[Any, str | None, str | None]:
    """(function, note, reason): ``new`` for calls written for ``old``; the reason why not, or None.

    With the same arguments it is ``new`` itself. Where they stand in another order or ``old`` has some more, arguments
    are bound as those of ``old``; a call that uses one that ``new`` has not, or one to ``avoid``, goes to ``old``: the
    note says so.
    """
    theirs, mine = inspect.signature(old), inspect.signature(new)
    if not avoid and [(p.name, p.default, p.kind) for p in theirs.parameters.values()] == [
        (p.name, p.default, p.kind) for p in mine.parameters.values()
    ]:
        return new, None, None
    if any(p.kind in VARIADIC for p in (*theirs.parameters.values(), *mine.parameters.values())):
        return None, None, f"its arguments are {theirs}"
    extra = {name: p.default for name, p in theirs.parameters.items() if name not in mine.parameters or name in avoid}
    needed = [name for name, p in mine.parameters.items() if p.default is p.empty and name not in theirs.parameters] + [
        name for name, default in extra.items() if default is inspect.Parameter.empty
    ]
    if needed:
        return None, None, f"its arguments are {theirs}, which leaves {', '.join(needed)} open"
    first = next(iter(theirs.parameters), None)

    @functools.wraps(new)
    def fitted(*args: Any, **kwargs: Any) -> Any:
        bound = theirs.bind(*args, **kwargs)
        if not all(_is(bound.arguments.get(name, default), default) for name, default in extra.items()):
            return old(*args, **kwargs)
        bound.apply_defaults()
        rest = {name: value for name, value in bound.arguments.items() if name in mine.parameters}
        return new(rest.pop(first), **rest) if first is not None else new(**rest)

    fitted.__signature__ = theirs  # type: ignore[attr-defined]
    if avoid:  # what stands for it must call it
        fitted.__module__ = old.__module__
    note = f"calls with {', '.join(extra)} run on the original" if extra else None
    return fitted, note, None


def _is(value: Any, default: Any) -> bool:
    """Whether an argument is left at its default."""
    return value is default or (
        type(value) is type(default) and type(value) in (bool, int, float, str) and value == default
    )
