"""Arguments that many functions take alike: typed once, and shown by name in each of their signatures.

A function with ``**options: Unpack[SomeTypedDict]`` hands them on to the one function that has their defaults. Type
checkers and editors read the names from the TypedDict; `shows_arguments_of` puts them into what `help` and
`inspect.signature` show.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from diffkern.checks import misspelt, renamed

F = TypeVar("F", bound=Callable[..., Any])


def shows_arguments_of(source: Callable[..., Any]) -> Callable[[F], F]:
    """Decorator: in the signature, ``**options`` becomes the arguments of ``source`` that have defaults, by keyword.

    Arguments that the function has itself stay as they are.
    """

    def shown(function: F) -> F:
        own = inspect.signature(function)
        known = {name: p for name, p in own.parameters.items() if p.kind is not p.VAR_KEYWORD}
        for name, p in inspect.signature(source).parameters.items():
            if p.default is not p.empty:
                known.setdefault(name, p.replace(kind=p.KEYWORD_ONLY))

        @functools.wraps(function)
        def checked(*args: Any, **options: Any) -> Any:
            options = renamed(f"{function.__name__}()", options, known)
            for name in options:
                if name not in known:  # else the error would name ``source``
                    raise TypeError(misspelt(f"{function.__name__}()", name, known))
            return function(*args, **options)

        checked.__signature__ = own.replace(parameters=list(known.values()))  # type: ignore[attr-defined]
        return cast(F, checked)

    return shown


def names_the_nearest(function: F) -> F:
    """Decorator: an argument by keyword that the function does not have is answered with the nearest that it has."""
    known = inspect.signature(function).parameters

    @functools.wraps(function)
    def checked(*args: Any, **options: Any) -> Any:
        options = renamed(f"{function.__name__}()", options, known)
        for name in options:
            if name not in known:
                raise TypeError(misspelt(f"{function.__name__}()", name, known))
        return function(*args, **options)

    return cast(F, checked)
