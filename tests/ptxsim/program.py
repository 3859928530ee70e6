"""Linking: reachable functions of a kernel -> one flat, structurally ordered instruction list."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from .aliases import Array, Handler, Operand, Reader, Sel
from .errors import PtxParseError, UnsupportedError
from .graph import branch_targets, components, layout
from .memory.addresses import SHARED_START
from .parse.syntax import Func, Ins, Var

if TYPE_CHECKING:
    from .machine import Machine
    from .module import Module
    from .ops.context import Ctx


class FInfo:
    """Link time data of one function inside a program."""

    def __init__(self, f: Func) -> None:
        self.f = f
        self.base = 0  # first pc
        self.rb = 0  # first register index
        self.nregs = 0
        self.frame = 0  # local bytes
        self.local_off: dict[int, int] = {}  # id(Var) -> offset in the frame
        self.pv: dict[int, int] = {}  # id(Var) -> param array index
        self.recursive = False


def _align(x: int, a: int) -> int:
    return (x + a - 1) // a * a


class Program:
    """The code a kernel can reach, laid out flat, with its symbols resolved."""

    def __init__(self, module: Module, kernel: Func, redzone: bool) -> None:
        self.module = module
        self.kernel = kernel
        self.finfo: dict[str, FInfo] = {}
        self.code: list[Ins] = []
        self.pinfo: list[tuple[FInfo, Var]] = []  # (finfo, Var) for every param array
        self.calls: dict[int, tuple[list[tuple[int, int]], int]] = {}  # call pc -> (return arrays, frame of the caller)
        self.h_red: dict[int, Callable[[Any, Array, Array], None]] = {}  # bar.red pc -> writer of the result
        self.handlers: list[Handler] = []
        self.granule, self.uses_shared = 1, False
        self._collect(kernel)
        self._layout_shared(redzone)
        self._emit()

    # -- call graph ----------------------------------------------------------
    def _syms(self, f: Func) -> set[str]:
        out: set[str] = set()

        def walk(o: Operand) -> None:
            if o[0] == "sym":
                out.add(o[1])
            elif o[0] in ("vec", "list"):
                for x in o[1]:
                    walk(x)
            elif o[0] == "addr":
                walk(o[1])
            elif o[0] == "pair":
                walk(o[1])
                walk(o[2])

        for ins in f.body or ():
            for o in ins.args:
                walk(o)
        return out

    def _collect(self, kernel: Func) -> None:
        m = self.module
        todo = [kernel]
        seen: dict[str, Func] = {}
        edges: dict[str, set[str]] = {}
        indirect = set()
        data_funcs = {
            n for v in m.vars.values() if v.init for it in v.init if it[0] == "s" for n in [it[1]] if n in m.funcs
        }
        self.used_vars = set()
        taken = set()
        while todo:
            f = todo.pop()
            if f.name in seen or not f.defined:
                continue
            seen[f.name] = f
            edges[f.name] = set()
            for s in self._syms(f):
                if s in m.funcs:
                    edges[f.name].add(m.funcs[s].name)
                    todo.append(m.funcs[s])
                if s in m.vars:
                    self.used_vars.add(s)
            for ins in f.body or ():
                if ins.parts[0] == "call":
                    tgt = next((a for a in ins.args if a[0] in ("sym", "reg")), None)
                    if tgt is not None and tgt[0] == "reg":
                        indirect.add(f.name)
                for o in ins.args:
                    if ins.parts[0] == "mov" and o[0] == "sym" and o[1] in m.funcs:
                        taken.add(m.funcs[o[1]].name)
            if f.name in indirect:
                for n in data_funcs:
                    taken.add(m.funcs[n].name)
                    todo.append(m.funcs[n])
        for n in indirect:
            edges[n] |= {t for t in taken if t in seen}
        names = [kernel.name, *sorted(n for n in seen if n != kernel.name)]
        rec = set()
        for c in components(names, {n: [e for e in edges[n] if e in seen] for n in names}):
            if len(c) > 1 or c[0] in edges[c[0]]:
                rec.update(c)
        for n in names:
            fi = FInfo(seen[n])
            fi.recursive = n in rec
            self.finfo[n] = fi
        self.order = names

    # -- shared memory -------------------------------------------------------
    def _layout_shared(self, redzone: bool) -> None:
        m = self.module
        vs = []
        for n in self.order:
            vs += self.finfo[n].f.shareds
        vs += [v for n, v in m.vars.items() if v.space == "shared" and n in self.used_vars and not v.dyn]
        self.shared_vars = []
        off = SHARED_START
        self.shared_addr = {}
        for v in vs:
            off = _align(off, max(v.align, 16 if redzone else 1))
            self.shared_addr[id(v)] = off
            self.shared_vars.append((off, v.size, v.name))
            off += v.size
            if redzone:
                off = _align(off, 128) + 128
        self.static_bytes = sum(v.size for v in vs)
        dyn = [v for n, v in m.vars.items() if v.space == "shared" and n in self.used_vars and v.dyn]
        al = max([16] + [v.align for v in dyn])
        if vs and redzone:
            al = max(al, 128)
        self.dyn_off = _align(off, al)
        for v in dyn:
            self.shared_addr[id(v)] = self.dyn_off
        self.has_dyn = bool(dyn)

    # -- code ----------------------------------------------------------------
    def _emit(self) -> None:
        rb = 0
        self.regs = []
        # callees first so that they sit at lower pcs than their callers
        for n in self.order[1:] + self.order[:1]:
            fi = self.finfo[n]
            f = fi.f
            fi.rb = rb
            fi.nregs = len(f.regs)
            rb += fi.nregs
            self.regs += f.regs
            o = 0
            for v in f.locals:
                o = _align(o, v.align)
                fi.local_off[id(v)] = o
                o += v.size
            fi.frame = _align(o, 16)
            for v in f.pvars:
                if f.entry and v in f.params:
                    continue
                fi.pv[id(v)] = len(self.pinfo)
                self.pinfo.append((fi, v))
            seq, pos = layout(f)
            fi.base = len(self.code)
            for k, ins in enumerate(seq):
                c = Ins(ins.op, ins.args, ins.pred, ins.neg, ins.line, ins.loc, ins.scope, ins.func)
                c.text = ins.text
                c.pc = fi.base + k
                if ins.op == "ptxsim_jump":
                    c.target = fi.base + pos[ins.target]
                elif ins.parts[0] == "bra":
                    c.target = fi.base + pos[branch_targets(ins)[0]]
                elif ins.parts[0] == "brx":
                    c.target = [fi.base + pos[t] for t in branch_targets(ins)]
                self.code.append(c)
        self.entry_pc = self.finfo[self.kernel.name].base
        off = 0
        self.kparam = {}
        for p in self.kernel.params:
            off = _align(off, p.align)
            self.kparam[p.name] = (off, p.size, p)
            off += p.size
        self.kparam_size = off

    # -- symbol values ---------------------------------------------------------
    def symbol(self, cx: Ctx, name: str, off: int) -> int | Reader:
        """int constant, or a function (m, sel) -> uint64 addresses."""
        ins = cx.ins
        v = ins.scope.find("vars", name) if ins.scope is not None else None
        fi = self.finfo[ins.func.name]
        if v is None:
            v = self.module.vars.get(f"{ins.func.name}::{name}") or self.module.vars.get(name)
        if v is None:
            fn = self.module.funcs.get(name)
            if fn is not None:
                return self.module.func_addr(fn)
            raise PtxParseError(f"line {ins.line}: unknown symbol {name}: {ins.text}", line=ins.line)
        if v.space == "shared":
            return self.shared_addr[id(v)] + off
        if v.space in ("global", "const"):
            if v.addr is None:
                raise UnsupportedError(f"line {ins.line}: extern variable {name} has no definition", line=ins.line)
            return v.addr + off
        if v.space == "local":
            o = fi.local_off[id(v)] + off

            def f(m: Machine, sel: Sel) -> Array:
                return (m.lbase[sel] + o).astype("u8")

            return f
        if v.space == "param":
            if ins.func.entry and name in self.kparam:
                return self.kparam[name][0] + off
            raise UnsupportedError(f"line {ins.line}: address of function parameter {name} taken", line=ins.line)
        raise UnsupportedError(f"line {ins.line}: symbol {name} in space {v.space}")

    def param_ref(self, cx: Ctx, name: str) -> tuple[str, int, int]:
        """('k', offset, size) for kernel parameters, ('p', index, size) for call parameters."""
        ins = cx.ins
        v = ins.scope.find("vars", name) if ins.scope is not None else None
        if v is None or v.space != "param":
            raise PtxParseError(f"line {ins.line}: unknown parameter {name}", line=ins.line)
        if ins.func.entry and name in self.kparam and self.kparam[name][2] is v:
            o, s, _ = self.kparam[name]
            return "k", o, s
        fi = self.finfo[ins.func.name]
        return "p", fi.pv[id(v)], v.size
