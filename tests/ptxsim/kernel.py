"""One kernel of a module: parameters, handlers, argument packing."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

from .errors import UnsupportedError
from .instr.address import memparts
from .instr.build import build
from .machine import Machine
from .machine.options import Group
from .ops.context import Ctx
from .parse.syntax import WIDTH, Func
from .program import Program
from .stats import Stats, table

if TYPE_CHECKING:
    from .module import Module


PACK = {
    "u8": "B",
    "s8": "b",
    "b8": "B",
    "u16": "H",
    "s16": "h",
    "b16": "H",
    "u32": "I",
    "s32": "i",
    "b32": "I",
    "u64": "Q",
    "s64": "q",
    "b64": "Q",
    "f32": "f",
    "f64": "d",
}


class Result(dict[str, Any]):
    """Launch report; behaves like a dict, str() gives a table."""

    stats: Stats  # the raw counters, per instruction

    def __str__(self) -> str:
        return table(self)

    @property
    def stdout(self) -> str:
        return str(self.get("stdout", ""))

    @property
    def warnings(self) -> list[str]:
        return list(self.get("warnings", []))


class Kernel:
    """An entry function: its parameters with their offsets, and its linked programs."""

    def __init__(self, module: Module, f: Func) -> None:
        self.module, self.f = module, f
        self.name, self.demangled = f.name, f.demangled
        off = 0
        self.params: list[dict[str, Any]] = []
        for p in f.params:
            off = (off + p.align - 1) // p.align * p.align
            self.params.append({"name": p.name, "offset": off, "size": p.size, "align": p.align, "type": p.ty})
            off += p.size
        self.param_size = off
        self.attrs = f.attrs
        self._prog: dict[bool, Program] = {}

    def __repr__(self) -> str:
        ps = ", ".join(f"{p['type']}[{p['size']}]@{p['offset']}" for p in self.params)
        return f"<kernel {self.demangled} params({ps})>"

    @property
    def held(self) -> int:
        return sum(len(program.code) for program in self._prog.values())

    def forget(self) -> None:
        self._prog.clear()

    def program(self, redzone: bool = True) -> Program:
        k = bool(redzone)
        if k not in self._prog:
            pr = Program(self.module, self.f, redzone)
            pr.granule, pr.uses_shared = _granule(pr)
            for ins in pr.code:
                cx = Ctx(pr, ins, pr.finfo[ins.func.name].rb)
                try:
                    pr.handlers.append(build(cx))
                except UnsupportedError as e:
                    # unknown instructions raise when (and only when) they are executed
                    if self.module.strict:
                        raise
                    pr.handlers.append((1, _raiser(e)))
            self._prog[k] = pr
        return self._prog[k]


def _raiser(e: Exception) -> Callable[[Machine, Group], NoReturn]:
    def h(m: Machine, g: Group) -> NoReturn:
        raise e

    return h


def _granule(pr: Program) -> tuple[int, bool]:
    """(bytes of the smallest shared access, whether shared memory is used at all)."""
    g, used = 16, bool(pr.shared_vars) or pr.has_dyn
    for ins in pr.code:
        o = ins.parts[0]
        if o in ("ld", "st", "atom", "red", "ldu"):
            sp, vec, ty, _, _ = memparts(Ctx(pr, ins, 0))
            if sp in ("shared", "generic") and ty:
                g = min(g, WIDTH[ty] // 8 * vec)
        elif o == "cp" and ins.parts[1] == "async" and len(ins.args) >= 3:
            if ins.args[2][0] == "imm":
                g = min(g, ins.args[2][1])
        elif o == "mbarrier":
            g = min(g, 8)
        elif o == "wmma" and ins.parts[1] != "mma":
            g = min(g, max(1, WIDTH[[x for x in ins.parts if x in WIDTH][-1]] // 8))
    return max(1, g), used


def smem_limit(target: str | None) -> int:
    """Bytes of shared memory a CTA of this target may use, dynamic memory opted in."""
    sm = int("".join(c for c in (target or "sm_80").split("_")[1] if c.isdigit()))
    return {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227}.get(
        sm, 99 if sm in (120, 121) else 163
    ) * 1024
