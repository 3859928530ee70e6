"""Variables, initialisers and parameter lists."""

from __future__ import annotations

from typing import Any

from ..errors import PtxParseError, UnsupportedError
from ..parse.syntax import WIDTH, Func, Var
from .syntax import SPACES
from .tokens import Tok, TokenCursor, parse_int


class DeclarationParser(TokenCursor):
    """Parses declarations: state space variables, initialisers, parameters."""

    def var_decl(self, func: Func | None) -> list[Var]:
        """Parses '.space [.align n] [.vN] .type name[..] [= init] {, name..};'"""
        out = []
        self.split_dots()
        line = self.line()
        space = self.next()[1:].split("::")[0]
        align, ty, vec = None, "", 1
        while True:
            self.split_dots()
            v = self.peek()
            if v == ".align":
                self.next()
                align = int(self.next())
            elif v == ".attribute":
                self.next()
                self.expect("(")
                d = 1
                while d:
                    x = self.next()
                    d += (x == "(") - (x == ")")
            elif v in (".v2", ".v4"):
                vec = int(self.next()[2:])
            elif v in (".ptr",):
                self.next()
            elif v is not None and v.startswith("."):
                word = v[1:]
                if word in WIDTH:
                    ty = word
                    self.next()
                elif word in SPACES:  # .ptr .global .align
                    self.next()
                elif word in ("texref", "samplerref", "surfref"):
                    raise UnsupportedError(f"line {line}: .{word} variables are not supported", line=line)
                else:
                    raise PtxParseError(f"line {line}: unknown directive {v} in declaration", line=line)
            else:
                break
        while True:
            name = self.next()
            n: int | None = None
            unsized = False
            rng = None
            if self.accept("<"):
                rng = int(self.next())
                self.expect(">")
            while self.accept("["):
                if self.accept("]"):
                    unsized = True
                    n = 0 if n is None else n
                else:
                    d = self.int_expr()
                    self.expect("]")
                    n = d if n is None else n * d
            if not ty:
                raise PtxParseError(f"line {line}: declaration of {name} without a type", line=line)
            es = max(1, WIDTH[ty] // 8) * vec
            init = None
            if self.accept("="):
                init = self.initializer()
            if unsized and init is not None:
                n = len(init)
            size = es * (1 if n is None else n)
            names = [name] if rng is None else [f"{name}{k}" for k in range(rng)]
            for nm in names:
                var = Var(nm, space, align or es, ty, size, init, False, func, line)
                var.dyn = unsized and init is None
                out.append(var)
            if self.accept(","):
                continue
            if self.peek() == ";":
                self.next()
            break
        return out

    def initializer(self) -> list[Any]:
        """Returns a flat list of ('i',int) ('f',bits,width) ('s',name,off,mask,generic)."""
        if self.accept("{"):
            out: list[Any] = []
            while not self.accept("}"):
                out += self.initializer()
                self.accept(",")
            return out
        v = self.peek()
        t = self.t[self.i]
        if v == "-" or v == "+":
            neg = self.next() == "-"
            t = self.tok()
            return [self._num_init(t, neg)]
        if t.k == "num":
            self.next()
            if self.peek() == "(":  # mask(sym+off)
                mask = parse_int(t.v)
                self.next()
                r = self.sym_init()
                self.expect(")")
                return [("s", r[0], r[1], mask)]
            return [self._num_init(t, False)]
        if v == "generic":
            self.next()
            self.expect("(")
            r = self.sym_init()
            self.expect(")")
            off = self.opt_off()
            return [("s", r[0], r[1] + off, None)]
        r = self.sym_init()
        return [("s", r[0], r[1], None)]

    def sym_init(self) -> tuple[str, int]:
        if self.peek() == "generic":
            self.next()
            self.expect("(")
            r = self.sym_init()
            self.expect(")")
            return (r[0], r[1] + self.opt_off())
        name = self.next()
        return (name, self.opt_off())

    def opt_off(self) -> int:
        off = 0
        while self.peek() in ("+", "-"):
            off += self.int_expr()
        return off

    def _num_init(self, t: Tok, neg: bool) -> tuple[Any, ...]:
        v = t.v
        if v[:2] in ("0f", "0F"):
            return ("f", int(v[2:], 16) ^ (0x80000000 if neg else 0), 32)
        if v[:2] in ("0d", "0D"):
            return ("f", int(v[2:], 16) ^ ((1 << 63) if neg else 0), 64)
        if "." in v or ("e" in v.lower() and not v.lower().startswith("0x")):
            return ("d", -float(v) if neg else float(v))
        n = parse_int(v)
        return ("i", -n if neg else n)

    def param_list(self, func: Func | None) -> list[Var]:
        self.expect("(")
        out = []
        while not self.accept(")"):
            if self.accept(","):
                continue
            self.split_dots()
            if self.peek() == ".reg":
                raise UnsupportedError(f"line {self.line()}: .reg function parameters are not supported")
            # parse a single declaration without swallowing the comma-separated next one
            out.append(self.one_param(func))
        return out

    def one_param(self, func: Func | None) -> Var:
        line = self.line()
        self.next()  # .param
        align, ty = None, ""
        while True:
            self.split_dots()
            v = self.peek()
            if v == ".align":
                self.next()
                align = int(self.next())
            elif v in (".ptr", ".global", ".const", ".local", ".shared", ".generic"):
                self.next()
                if self.peek() == ".align" and ty:
                    self.next()
                    self.next()
            elif v is not None and v.startswith(".") and v[1:] in WIDTH:
                ty = self.next()[1:]
            else:
                break
        name = self.next() if self.t[self.i].k == "id" else "_"
        n = None
        while self.accept("["):
            n = 0 if self.peek() == "]" else self.int_expr()
            self.expect("]")
        if not ty:
            raise PtxParseError(f"line {line}: parameter {name} without a type", line=line)
        es = max(1, WIDTH[ty] // 8)
        return Var(name, "param", align or es, ty, es * (1 if n is None else n), None, False, func, line)
