"""Numbers that stand in the headers of csrc/core, read from there."""

from __future__ import annotations

import re
from pathlib import Path

CORE = Path(__file__).resolve().parent.parent.parent / "csrc" / "core"


def constant(name: str) -> int:
    """The integer that a `constexpr` has, a number or a power of two."""
    power, number = re.fullmatch(r"(int64_t\{1\} << )?(\d+)", _found(rf"constexpr \w+ {name} = ([^;]*);")).groups()
    return 1 << int(number) if power else int(number)


def enumerators(name: str) -> dict[str, int]:
    """The names of an enum that counts from 0."""
    body = re.sub(r"//[^\n]*", "", _found(rf"enum (?:class )?{name} : \w+ \{{(.*?)\}};"))
    return {part.strip(): number for number, part in enumerate(body.split(",")) if part.strip()}


def _found(pattern: str) -> str:
    texts = [path.read_text() for path in sorted(CORE.glob("*.h"))]
    (only,) = (match for text in texts for match in re.findall(pattern, text, re.DOTALL))
    return str(only)
