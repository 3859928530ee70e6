"""What a parsed module is made of: types, registers, variables, instructions, scopes, functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..aliases import Operand

_OF_WIDTH = {
    1: "pred",
    8: "b8 u8 s8 e4m3 e5m2",
    16: "b16 u16 s16 f16 bf16 e4m3x2 e5m2x2",
    32: "b32 u32 s32 f32 f16x2 bf16x2 tf32 u16x2 s16x2",
    64: "b64 u64 s64 f64 f32x2",
    128: "b128",
}
WIDTH = {name: bits for bits, names in _OF_WIDTH.items() for name in names.split()}


class Reg:
    """A virtual register; `slot` numbers the registers of a function."""

    __slots__ = ("name", "slot", "ty", "width")

    def __init__(self, name: str, ty: str, slot: int) -> None:
        self.name, self.ty, self.slot = name, ty, slot
        self.width = WIDTH[ty]

    def __repr__(self) -> str:
        return self.name


class Var:
    """A variable in some state space."""

    __slots__ = ("addr", "align", "dyn", "extern", "func", "init", "line", "name", "size", "space", "ty", "uid")

    def __init__(
        self,
        name: str,
        space: str,
        align: int,
        ty: str,
        size: int,
        init: list[Any] | None = None,
        extern: bool = False,
        func: Func | None = None,
        line: int = 0,
    ) -> None:
        self.name, self.space, self.align, self.ty, self.size = name, space, align, ty, size
        self.init, self.extern, self.func, self.line = init, extern, func, line
        self.addr: int | None = None
        self.dyn = False
        self.uid: str | None = None

    def __repr__(self) -> str:
        return f"<{self.space} {self.name} size={self.size} align={self.align}>"


class Ins:
    """One instruction."""

    __slots__ = ("args", "func", "line", "loc", "neg", "op", "parts", "pc", "pred", "scope", "target", "text")

    def __init__(
        self,
        op: str,
        args: list[Operand],
        pred: Reg | None,
        neg: bool,
        line: int,
        loc: tuple[int, int] | None,
        scope: Scope | None,
        func: Func,
    ) -> None:
        self.op = op
        self.parts = op.split(".")
        self.args = args
        self.pred, self.neg = pred, neg
        self.line, self.loc, self.scope, self.func = line, loc, scope, func
        self.text = ""
        self.pc = -1
        self.target: Any = None  # pc, or list of pcs, of a branch

    def __repr__(self) -> str:
        return f"line {self.line}: {self.text}"


class Scope:
    """Names declared between one pair of braces."""

    def __init__(self, parent: Scope | None) -> None:
        self.parent = parent
        self.regs: dict[str, Reg] = {}
        self.ranges: dict[str, tuple[str, int]] = {}  # prefix -> (type, count)
        self.vars: dict[str, Var] = {}
        self.labels: dict[str, int] = {}
        self.tables: dict[str, list[str]] = {}
        self.protos: dict[str, tuple[list[Var], list[Var]]] = {}

    def find(self, attr: str, name: str) -> Any:
        s: Scope | None = self
        while s is not None:
            d = getattr(s, attr)
            if name in d:
                return d[name]
            s = s.parent
        return None


class Func:
    """An entry or a device function."""

    def __init__(self, name: str, entry: bool) -> None:
        self.name, self.entry = name, entry
        self.params: list[Var] = []
        self.rets: list[Var] = []
        self.defined = False
        self.parse_body: Callable[[], None] | None = None  # of a function that is parsed when it is asked for
        self.parsed = False
        self.attrs: dict[str, Any] = {}
        self.line = 0
        self.demangled = name
        self._clear()

    def _clear(self) -> None:
        self.code: list[Ins] = []
        self.regs: list[Reg] = []  # by slot
        self.locals: list[Var] = []
        self.shareds: list[Var] = []
        self.pvars: list[Var] = [*self.params, *self.rets]

    def begin(self) -> None:
        """The header is complete and a body follows."""
        self.defined = True
        self._clear()

    @property
    def body(self) -> list[Ins] | None:
        """None: declared only."""
        if self.parse_body is not None and not self.parsed:
            self.parsed = True
            self.parse_body()
        return self.code if self.defined else None

    def forget(self) -> None:
        """Let go of a body that can be parsed again."""
        if self.parsed:
            self.parsed = False
            self._clear()

    def __repr__(self) -> str:
        return f"<{'entry' if self.entry else 'func'} {self.demangled}>"


SPECIAL = {
    "%" + name
    for name in [
        "tid",
        "ntid",
        "ctaid",
        "nctaid",
        "laneid",
        "warpid",
        "nwarpid",
        "smid",
        "nsmid",
        "gridid",
        "clock",
        "clock_hi",
        "clock64",
        "globaltimer",
        "globaltimer_lo",
        "globaltimer_hi",
        "lanemask_eq",
        "lanemask_le",
        "lanemask_lt",
        "lanemask_ge",
        "lanemask_gt",
        "total_smem_size",
        "dynamic_smem_size",
        "aggr_smem_size",
        "reserved_smem_offset_begin",
        "reserved_smem_offset_end",
        "reserved_smem_offset_cap",
        "is_explicit_cluster",
        "clusterid",
        "nclusterid",
        "cluster_ctaid",
        "cluster_nctaid",
        "cluster_ctarank",
        "cluster_nctarank",
        "current_graph_exec",
    ]
}
SPACES = ("global", "const", "shared", "local", "param")
LINKAGE = (".visible", ".extern", ".weak", ".common", ".internal")
