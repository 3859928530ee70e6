"""Which floating point instructions of a kernel ptxas may still fuse.

`mul.f32` followed by `add.f32` may become one fused multiply-add in machine code, with one rounding instead of two;
`mul.rn.f32` and `add.rn.f32` may not. The same holds for f64, f16 and bf16. A kernel that promises bits must have a
rounding modifier on every one of them.
"""

from __future__ import annotations

from collections.abc import Iterable

from .module import Module, load
from .parse.syntax import Func

FUSABLE = {"add", "sub", "mul", "mad", "fma"}
FLOAT_TYPES = {"f16", "f16x2", "bf16", "bf16x2", "f32", "f32x2", "f64"}
ROUNDINGS = {"rn", "rz", "rm", "rp"}


def unrounded(ptx: str | Module, kernel: str | None = None) -> list[str]:
    """Floating add, sub, mul, mad and fma without a rounding modifier, as "function: PTX line (source): instruction".

    ptx: PTX text, a path to it, or a loaded module.
    kernel: a name as Module.launch takes it; the device functions it can reach count too. None: the whole module.
    """
    mod = ptx if isinstance(ptx, Module) else load(ptx)
    fs: Iterable[Func]
    if kernel is None:
        fs = (f for f in mod.funcs.values() if f.defined)
    else:
        fs = (i.f for i in mod.kernel(kernel).program().finfo.values())
    out = []
    for f in fs:
        kept = f.parsed
        for ins in f.body or ():
            p = set(ins.parts[1:])
            if ins.parts[0] in FUSABLE and p & FLOAT_TYPES and not p & ROUNDINGS:
                where = f" ({mod.parsed.files.get(ins.loc[0], ins.loc[0])}:{ins.loc[1]})" if ins.loc else ""
                out.append(f"{f.demangled}: line {ins.line}{where}: {ins.text}")
        if not kept:  # a whole lazy module is a lot of memory
            f.forget()
    return out
