"""PTX text -> tokens, and the cursor over them that the parser classes share."""

from __future__ import annotations

import re

from ..errors import PtxParseError
from .syntax import Func, Var

_TOK = re.compile(
    r"""
  (?P<ws>[ \t\r\f\v]+)
 |(?P<nl>\n)
 |(?P<str>"(?:[^"\\]|\\.)*")
 |(?P<num>0[fF][0-9a-fA-F]{8}(?![\w])|0[dD][0-9a-fA-F]{16}(?![\w])|0[xX][0-9a-fA-F]+U?(?![\w])
    |0[bB][01]+U?(?![\w])|\d+\.\d*(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\d+U?(?![\w]))
 |(?P<id>[%$_A-Za-z.][\w$]*(?:(?:\.|::)[\w$]+)*)
 |(?P<p>[{}()\[\]<>,;:@!|=+\-*/?&^~])
""",
    re.X,
)


class Tok:
    __slots__ = ("k", "line", "v")

    def __init__(self, k: str | None, v: str, line: int) -> None:
        self.k, self.v, self.line = k, v, line

    def __repr__(self) -> str:
        return f"{self.v!r}@{self.line}"


def _strip_comments(text: str) -> str:
    def rep(mo: re.Match[str]) -> str:
        s = mo.group(0)
        if s[0] == '"':
            return s
        return "\n" * s.count("\n") + " "

    return re.sub(r'"(?:[^"\\\n]|\\.)*"|//[^\n]*|/\*.*?\*/', rep, text, flags=re.S)


def tokenize(text: str, line: int = 1) -> list[Tok]:
    """The tokens of a text that begins in this line."""
    text = _strip_comments(text)
    out, i, n = [], 0, len(text)
    while i < n:
        mo = _TOK.match(text, i)
        if not mo:
            raise PtxParseError(f"line {line}: cannot tokenize {text[i : i + 30]!r}", line=line)
        k = mo.lastgroup
        v = mo.group(0)
        if k == "nl":
            line += 1
        elif k != "ws":
            out.append(Tok(k, v, line))
        i = mo.end()
    return out


_BODY = re.compile(r'"(?:[^"\\\n]|\\.)*"|[{};]|\.(?:entry|func)\b')


def cut_bodies(text: str) -> tuple[str, list[tuple[int, str]]]:
    """(the text with empty function bodies, in the same lines; each body with its line)."""
    text = _strip_comments(text)
    kept, bodies, depth, header, start, line, at = [], [], 0, False, 0, 1, 0
    for mo in _BODY.finditer(text):
        v = mo.group()
        if v == "{":
            depth += 1
            if depth == 1:
                start = mo.end()
        elif v == "}":
            depth -= 1
            if depth == 0 and header:
                line += text.count("\n", at, start)
                bodies.append((line, text[start : mo.start()]))
                lines = bodies[-1][1].count("\n")
                kept += [text[at:start], "\n" * lines]
                line, at, header = line + lines, mo.start(), False
        elif depth == 0 and v[0] != '"':  # a function without a body ends with a semicolon
            header = v != ";"
    return "".join([*kept, text[at:]]), bodies


def parse_int(v: str) -> int:
    v = v.rstrip("U")
    lo = v.lower()
    if lo.startswith("0x"):
        return int(v, 16)
    if lo.startswith("0b"):
        return int(v, 2)
    if len(v) > 1 and v[0] == "0" and v.isdigit():
        return int(v, 8)
    return int(v)


class TokenCursor:
    """Tokens of one module with the position of the parser, and the module level tables it fills."""

    def __init__(self, text: str, lazy: bool = False) -> None:
        self.src_lines = text.split("\n")
        self.bodies: list[tuple[int, str]] | None = None  # lazy: the bodies of the functions still to come
        if lazy:
            text, self.bodies = cut_bodies(text)
        self.t = tokenize(text)
        self.i = 0
        self.version: str | None = None
        self.target: str | None = None
        self.address_size = 64
        self.files: dict[int, str] = {}
        self.vars: dict[str, Var] = {}
        self.funcs: dict[str, Func] = {}
        self.order: list[str] = []
        self.aliases: dict[str, str] = {}
        self._cur_loc: tuple[int, int] | None = None

    def peek(self, k: int = 0) -> str | None:
        j = self.i + k
        return self.t[j].v if j < len(self.t) else None

    def tok(self) -> Tok:
        if self.i >= len(self.t):
            raise PtxParseError("unexpected end of file")
        t = self.t[self.i]
        self.i += 1
        return t

    def next(self) -> str:
        return self.tok().v

    def expect(self, v: str) -> Tok:
        t = self.tok()
        if t.v != v:
            raise PtxParseError(
                f"line {t.line}: expected {v!r}, found {t.v!r}: {self.src_lines[t.line - 1].strip()}", line=t.line
            )
        return t

    def accept(self, v: str) -> bool:
        if self.peek() == v:
            self.i += 1
            return True
        return False

    def line(self) -> int:
        j = min(self.i, len(self.t) - 1)
        return self.t[j].line

    def skip_line(self) -> list[str]:
        ln = self.t[self.i - 1].line
        out = []
        while self.i < len(self.t) and self.t[self.i].line == ln:
            out.append(self.next())
        return out

    def skip_braces(self) -> None:
        self.expect("{")
        d = 1
        while d:
            v = self.next()
            if v == "{":
                d += 1
            elif v == "}":
                d -= 1

    def split_dots(self) -> None:
        """Directive tokens may be glued ('.reg.b16'): split into '.reg' '.b16'."""
        if self.i >= len(self.t):
            return
        t = self.t[self.i]
        v = t.v
        if v.startswith(".") and v.count(".") > 1:
            parts = ["." + p for p in v[1:].split(".")]
            self.t[self.i : self.i + 1] = [Tok("id", p, t.line) for p in parts]

    def int_expr(self) -> int:
        neg = False
        while self.peek() in ("-", "+"):
            neg ^= self.next() == "-"
        t = self.tok()
        if t.k != "num":
            raise PtxParseError(f"line {t.line}: expected integer, got {t.v}", line=t.line)
        v = parse_int(t.v)
        return -v if neg else v
