"""Function bodies: blocks, register declarations, instructions and operands."""

from __future__ import annotations

import contextlib
import re

from ..aliases import Operand
from ..errors import PtxParseError, UnsupportedError
from ..parse.syntax import WIDTH, Func, Ins, Reg, Scope
from .declarations import DeclarationParser
from .syntax import SPECIAL
from .tokens import parse_int


class BodyParser(DeclarationParser):
    """Parses what stands between the braces of a function."""

    def reg_decl(self, f: Func, scope: Scope) -> None:
        ty = ""
        while True:
            self.split_dots()
            v = self.peek()
            if v and v.startswith("."):
                word = self.next()[1:]
                if word in ("v2", "v4"):
                    raise UnsupportedError(f"line {self.line()}: vector registers are not supported")
                if word not in WIDTH:
                    raise PtxParseError(f"line {self.line()}: unknown register type .{word}", line=self.line())
                ty = word
            else:
                break
        while True:
            name = self.next()
            if self.accept("<"):
                n = int(self.next())
                self.expect(">")
                scope.ranges[name] = (ty, n)
            else:
                scope.regs[name] = self._new_reg(f, name, ty)
            if self.accept(","):
                continue
            self.expect(";")
            break

    def _new_reg(self, f: Func, name: str, ty: str) -> Reg:
        r = Reg(name, ty, len(f.regs))
        f.regs.append(r)
        return r

    def find_reg(self, f: Func, scope: Scope, name: str) -> Reg | None:
        s: Scope | None = scope
        mo = re.match(r"^(.*?)(\d+)$", name)
        while s is not None:
            r = s.regs.get(name)
            if r is not None:
                return r
            if s.ranges and mo:
                # the numeric suffix may itself start inside the prefix digits: try all splits
                for cut in range(mo.start(2), len(name)):
                    pre, num = name[:cut], name[cut:]
                    if pre in s.ranges and (num == "0" or num[0] != "0"):
                        ty, n = s.ranges[pre]
                        if int(num) < n:
                            r = self._new_reg(f, name, ty)
                            s.regs[name] = r
                            return r
            s = s.parent
        return None

    def block(self, f: Func, scope: Scope) -> None:
        code = f.code
        while True:
            self.split_dots()
            if self.i >= len(self.t):
                raise PtxParseError(f"unexpected end of file in {f.name}")
            t = self.t[self.i]
            v = t.v
            if v == "}":
                self.next()
                return
            if v == "{":
                self.next()
                self.block(f, Scope(scope))
                continue
            if v == ";":
                self.next()
                continue
            if v == ".reg":
                self.next()
                self.reg_decl(f, scope)
                continue
            if v in (".local", ".shared", ".param", ".global", ".const"):
                for var in self.var_decl(f):
                    scope.vars[var.name] = var
                    var.uid = f"{f.name}:{var.name}:{var.line}:{len(f.pvars)}"
                    if var.space == "local":
                        f.locals.append(var)
                    elif var.space == "shared":
                        f.shareds.append(var)
                    elif var.space == "param":
                        f.pvars.append(var)
                    else:
                        self.vars[f"{f.name}::{var.name}"] = var
                continue
            if v == ".loc":
                self.next()
                r = self.skip_line()
                with contextlib.suppress(ValueError, IndexError):
                    self._cur_loc = (int(r[0]), int(r[1]))
                continue
            if v == ".pragma":
                self.next()
                self.next()
                self.expect(";")
                continue
            if v == ".file":
                self.next()
                r = self.skip_line()
                self.files[int(r[0])] = r[1].strip('"')
                continue
            if v in (".branchtargets", ".calltargets", ".callprototype"):
                raise PtxParseError(f"line {t.line}: {v} without label", line=t.line)
            # label?
            if t.k == "id" and self.peek(1) == ":":
                self.next()
                self.next()
                self.split_dots()
                nv = self.peek()
                if nv == ".branchtargets" or nv == ".calltargets":
                    self.next()
                    names = [self.next()]
                    while self.accept(","):
                        names.append(self.next())
                    self.expect(";")
                    scope.tables[v] = names
                elif nv == ".callprototype":
                    self.next()
                    rets = self.param_list(None) if self.peek() == "(" else []
                    self.next()
                    params = self.param_list(None) if self.peek() == "(" else []
                    while self.peek() != ";":
                        self.next()
                    self.expect(";")
                    scope.protos[v] = (rets, params)
                else:
                    scope.labels[v] = len(code)
                continue
            self.instruction(f, scope)

    def instruction(self, f: Func, scope: Scope) -> None:
        start = self.i
        line = self.t[self.i].line
        pred, neg = None, False
        if self.accept("@"):
            neg = self.accept("!")
            pn = self.next()
            pred = self.find_reg(f, scope, pn)
            if pred is None:
                raise PtxParseError(f"line {line}: unknown predicate {pn}", line=line)
        t = self.tok()
        if t.k != "id":
            raise PtxParseError(
                f"line {line}: expected an instruction, found {t.v!r}: {self.src_lines[line - 1].strip()}", line=line
            )
        op = t.v
        args = []
        while not self.accept(";"):
            args.append(self.operand(f, scope))
            # operands are comma separated; '|' handled inside operand
            if self.peek() == ",":
                self.next()
            elif self.peek() != ";":
                raise PtxParseError(
                    f"line {self.line()}: expected ',' or ';', found {self.peek()!r}: "
                    f"{self.src_lines[self.line() - 1].strip()}",
                    line=self.line(),
                )
        ins = Ins(op, args, pred, neg, line, self._cur_loc, scope, f)
        ins.text = " ".join(x.v for x in self.t[start : self.i - 1])
        ins.text = re.sub(r" ?([,\]\)\}]) ?", r"\1 ", ins.text).replace("[ ", "[").replace("@ ", "@").strip()
        f.code.append(ins)

    def operand(self, f: Func, scope: Scope) -> Operand:
        a = self.primary(f, scope)
        if self.peek() == "|":
            self.next()
            b = self.primary(f, scope)
            return ("pair", a, b)
        return a

    def primary(self, f: Func, scope: Scope) -> Operand:
        t = self.t[self.i]
        v = t.v
        if v == "{":
            self.next()
            out = []
            while not self.accept("}"):
                out.append(self.operand(f, scope))
                self.accept(",")
            return ("vec", out)
        if v == "(":
            self.next()
            out = []
            while not self.accept(")"):
                out.append(self.operand(f, scope))
                self.accept(",")
            return ("list", out)
        if v == "[":
            self.next()
            base = self.primary(f, scope)
            off = 0
            while self.peek() in ("+", "-"):
                off += self.int_expr()
            if self.peek() == ",":
                raise UnsupportedError(f"line {t.line}: tensor/texture address operands are not supported", line=t.line)
            self.expect("]")
            if base[0] == "sym":
                off += base[2]
                base = ("sym", base[1], 0)
            return ("addr", base, off)
        if v == "!":
            self.next()
            return ("not", self.primary(f, scope))
        if v in ("-", "+", "~"):
            self.next()
            x = self.primary(f, scope)
            if v == "+":
                return x
            if x[0] == "imm":
                return ("imm", -x[1] if v == "-" else ~x[1])
            if x[0] == "f32":
                return ("f32", x[1] ^ 0x80000000)
            if x[0] == "f64":
                return ("f64", x[1] ^ (1 << 63))
            if x[0] == "dec":
                return ("dec", -x[1])
            raise PtxParseError(f"line {t.line}: bad operand after {v}", line=t.line)
        self.next()
        if t.k == "num":
            if v[:2] in ("0f", "0F"):
                return ("f32", int(v[2:], 16))
            if v[:2] in ("0d", "0D"):
                return ("f64", int(v[2:], 16))
            if "." in v or ("e" in v.lower() and v[:2].lower() != "0x"):
                return ("dec", float(v))
            return ("imm", parse_int(v))
        if t.k != "id":
            raise PtxParseError(f"line {t.line}: unexpected {v!r}: {self.src_lines[t.line - 1].strip()}", line=t.line)
        if v == "_":
            return ("sink",)
        r = self.find_reg(f, scope, v)
        if r is not None:
            return ("reg", r)
        if v.split(".")[0] in SPECIAL or re.match(r"%(envreg\d+|pm\d+)", v):
            return ("spec", v)
        if v == "WARP_SZ":
            return ("imm", 32)
        if v.startswith("%"):
            raise PtxParseError(f"line {t.line}: unknown register {v}", line=t.line)
        off = 0
        while self.peek() in ("+", "-"):
            off += self.int_expr()
        return ("sym", v, off)
