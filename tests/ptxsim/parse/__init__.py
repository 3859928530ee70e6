"""PTX text -> module structure.  Hand written tokenizer + recursive parser."""

from __future__ import annotations

from .parser import Parser

__all__ = ["Parser"]
