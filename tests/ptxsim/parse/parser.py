"""PTX text -> module structure.  Hand written tokenizer + recursive parser."""

from __future__ import annotations

import functools
import subprocess

from ..errors import PtxParseError, UnsupportedError
from ..parse.syntax import Func, Scope
from .body import BodyParser
from .syntax import LINKAGE, SPACES
from .tokens import tokenize


class Parser(BodyParser):
    """One module: `Parser(text).parse()` fills `vars`, `funcs`, `files`, `target`.

    lazy: the body of a function is parsed when it is asked for, and again after `Func.forget`.
    """

    def parse(self) -> Parser:
        while self.i < len(self.t):
            self.split_dots()
            v = self.peek()
            if v == ".version":
                self.next()
                self.version = self.next()
            elif v == ".target":
                self.next()
                self.target = self.next()
                while self.accept(","):
                    self.next()
            elif v == ".address_size":
                self.next()
                self.address_size = int(self.next())
                if self.address_size != 64:
                    raise UnsupportedError("only .address_size 64 is supported")
            elif v == ".file":
                self.next()
                r = self.skip_line()
                self.files[int(r[0])] = r[1].strip('"')
            elif v == ".section":
                self.next()
                self.next()
                self.skip_braces()
            elif v == ".loc":
                self.next()
                self.skip_line()
            elif v == ".pragma":
                self.next()
                self.next()
                self.expect(";")
            elif v == ".alias":
                self.next()
                a = self.next()
                self.expect(",")
                self.aliases[a] = self.next()
                self.expect(";")
            elif v == ";":
                self.next()
            else:
                self.top_decl()
        for a, b in self.aliases.items():
            if b in self.funcs:
                self.funcs[a] = self.funcs[b]
        demangle(list(self.funcs.values()))
        self.t = []
        return self

    def top_decl(self) -> None:
        link = set()
        while True:
            self.split_dots()
            if self.peek() in LINKAGE:
                link.add(self.next())
            else:
                break
        v = self.peek()
        if v == ".entry":
            self.next()
            self.func(True, link)
        elif v == ".func":
            self.next()
            self.func(False, link)
        elif v and v[0] == "." and v[1:] in SPACES:
            for var in self.var_decl(None):
                var.extern = ".extern" in link
                old = self.vars.get(var.name)
                if old is None or old.extern or old.init is None:
                    self.vars[var.name] = var
        else:
            raise PtxParseError(
                f"line {self.line()}: unexpected {v!r} at module level: {self.src_lines[self.line() - 1].strip()}",
                line=self.line(),
            )

    def func(self, entry: bool, link: set[str]) -> None:
        line = self.line()
        rets = []
        if not entry and self.peek() == "(":
            rets = self.param_list(None)
        name = self.next()
        f = Func(name, entry)
        f.line = line
        f.rets = rets
        if self.peek() == "(":
            f.params = self.param_list(f)
        while True:
            self.split_dots()
            v = self.peek()
            if v in (";", "{"):
                break
            if v in (
                ".maxntid",
                ".reqntid",
                ".minnctapersm",
                ".maxnctapersm",
                ".maxnreg",
                ".reqnctapercluster",
                ".maxclusterrank",
            ):
                self.next()
                vals = [int(self.next())]
                while self.accept(","):
                    vals.append(int(self.next()))
                f.attrs[v[1:]] = vals
            elif v in (".noreturn", ".explicitcluster", ".blocksareclusters"):
                self.next()
                f.attrs[v[1:]] = True
            elif v == ".pragma":
                self.next()
                self.next()
                self.expect(";")
            elif v in (".attribute", ".abi_preserve", ".abi_preserve_control"):
                self.next()
                if self.peek() == "(":
                    while self.next() != ")":
                        pass
                else:
                    self.next()
            elif v == ".loc":
                self.next()
                self.skip_line()
            else:
                raise PtxParseError(f"line {self.line()}: unexpected {v!r} in function header", line=self.line())
        if self.accept(";"):
            if name not in self.funcs:
                self.funcs[name] = f
                self.order.append(name)
            return
        for p in f.params + f.rets:
            p.func = f
        f.begin()
        if self.bodies is None:
            self.expect("{")
            self.body(f)
        else:
            self.expect("{")
            self.expect("}")
            line, text = self.bodies.pop(0)
            f.parse_body = functools.partial(self.late_body, f, text, line)
        old = self.funcs.get(name)
        self.funcs[name] = f
        if old is None:
            self.order.append(name)

    def body(self, f: Func) -> None:
        """What follows the opening brace."""
        top = Scope(None)
        for p in f.params + f.rets:
            top.vars[p.name] = p
        self._cur_loc = None
        self.block(f, top)

    def late_body(self, f: Func, text: str, line: int) -> None:
        known = len(self.vars)
        self.t, self.i = tokenize(text + "}", line), 0
        self.body(f)
        self.t = []
        if len(self.vars) != known:  # it would have had to get memory when the module was loaded
            raise UnsupportedError(f"{f.name}: a module variable in a function needs lazy=False")


def demangle(funcs: list[Func]) -> None:
    names = [f.name for f in funcs]
    if not names:
        return
    try:
        r = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, timeout=20)
        out = r.stdout.split("\n")
        for f, d in zip(funcs, out, strict=False):
            f.demangled = d or f.name
    except (OSError, subprocess.SubprocessError):
        pass
