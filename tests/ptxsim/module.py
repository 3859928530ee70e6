"""Loading modules, marshalling arguments and launching kernels."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from .aliases import Array
from .errors import LaunchError, PtxParseError, UnsupportedError
from .kernel import PACK, Kernel, Result, smem_limit
from .machine import Machine, Options, dims3
from .machine.state import register_bytes
from .memory import Memory
from .memory.addresses import FUNC_BASE
from .memory.buffers import buffer_span, is_torch
from .parse import Parser
from .parse.syntax import WIDTH, Func, Var
from .stats import Stats


class Module:
    """The kernels and variables of one PTX text, ready to launch."""

    def __init__(
        self,
        text: str,
        mem: Memory | None = None,
        strict: bool = True,
        origin: str | None = None,
        lazy: bool = False,
    ) -> None:
        self.text = text
        self.origin = origin
        self.strict = strict
        self.parsed = Parser(text, lazy).parse()
        self.funcs = self.parsed.funcs
        self.vars = self.parsed.vars
        self.target = self.parsed.target
        self.mem = mem if mem is not None else Memory()
        self._faddr: dict[str, int] = {}
        self.func_by_addr: dict[int, Func] = {}
        self._coop_ws: Array | None = None
        self._globals()
        self.kernels = {f.name: Kernel(self, f) for f in self.funcs.values() if f.entry and f.defined}
        self.last: Result | None = None

    @property
    def held(self) -> int:
        """How many instructions of its kernels are ready to run: each takes about 7 KiB."""
        return sum(k.held for k in self.kernels.values())

    def forget(self) -> None:
        """Let go of what running the kernels has made; of a lazy module also of the parsed bodies."""
        self.last = None
        for k in self.kernels.values():
            k.forget()
        for f in self.funcs.values():
            f.forget()

    def func_addr(self, fn: Func) -> int:
        a = self._faddr.get(fn.name)
        if a is None:
            a = FUNC_BASE + 256 * (len(self._faddr) + 1)
            self._faddr[fn.name] = a
            self.func_by_addr[a] = fn
        return a

    def _globals(self) -> None:
        self.gbuf = {}
        todo = []
        for n, v in self.vars.items():
            if v.space in ("global", "const") and not v.extern and v.size:
                a = self.mem.alloc((v.size,), np.uint8, name=f"{v.space} variable {n}")
                v.addr = self.mem.register(a)
                self.gbuf[n] = a
                todo.append(v)
            elif v.space in ("global", "const") and v.size == 0 and not v.extern:
                a = self.mem.alloc((16,), np.uint8, name=f"{v.space} variable {n}")
                v.addr = self.mem.register(a)
                self.gbuf[n] = a
        for v in todo:
            if v.init:
                b = self._init_bytes(v)
                self.gbuf[v.name if v.name in self.gbuf else next(k for k, x in self.vars.items() if x is v)][
                    : len(b)
                ] = np.frombuffer(b, np.uint8)

    def _init_bytes(self, v: Var) -> bytes:
        es = max(1, WIDTH[v.ty] // 8)
        out = bytearray()
        for it in v.init or ():
            if it[0] == "i":
                out += (it[1] & ((1 << (8 * es)) - 1)).to_bytes(es, "little")
            elif it[0] == "f":
                if es == it[2] // 8:
                    out += it[1].to_bytes(es, "little")
                else:
                    x = struct.unpack("<f" if it[2] == 32 else "<d", it[1].to_bytes(it[2] // 8, "little"))[0]
                    out += struct.pack("<d" if es == 8 else "<f", x)
            elif it[0] == "d":
                out += struct.pack("<d" if es == 8 else "<f", it[1])
            else:
                _, name, off, mask = it
                if name in self.vars:
                    a = self.vars[name].addr
                    if a is None:
                        raise UnsupportedError(f"initialiser refers to {name}, which has no address")
                    a += off
                elif name in self.funcs:
                    a = self.func_addr(self.funcs[name])
                else:
                    raise PtxParseError(f"initialiser of {v.name} refers to unknown {name}")
                if mask is not None:
                    sh = (mask & -mask).bit_length() - 1
                    a = (a & mask) >> sh
                out += (a & ((1 << (8 * es)) - 1)).to_bytes(es, "little")
        return bytes(out)

    # -------------------------------------------------------------- lookups
    def kernel(self, name: str | Kernel) -> Kernel:
        if isinstance(name, Kernel):
            return name
        if name in self.kernels:
            return self.kernels[name]
        c = [k for k in self.kernels.values() if k.demangled == name]
        if not c:
            c = [k for k in self.kernels.values() if k.demangled.split("(")[0].split("<")[0].split(" ")[-1] == name]
        if not c:
            c = [k for k in self.kernels.values() if name in k.demangled or name in k.name]
        if len(c) == 1:
            return c[0]
        have = ", ".join(k.demangled for k in self.kernels.values())
        raise LaunchError(
            f"kernel {name!r} is {'ambiguous' if c else 'unknown'}; "
            f"candidates: {', '.join(k.demangled for k in c) or have}"
        )

    def get_global(self, name: str, dtype: Any = np.uint8) -> Array:
        """numpy view of a module variable (mangled name, or unique substring)."""
        if name in self.gbuf:
            return self.gbuf[name].view(dtype)
        c = [n for n in self.gbuf if name in n]
        if len(c) != 1:
            raise LaunchError(f"variable {name!r}: candidates {c}")
        return self.gbuf[c[0]].view(dtype)

    def register(self, x: Any, name: str | None = None, **kw: Any) -> int:
        return self.mem.register(x, name, **kw)

    addr = register

    # -------------------------------------------------------------- launch
    def pack(self, k: Kernel, args: Sequence[Any]) -> Array:
        if len(args) != len(k.params):
            raise LaunchError(f"{k.demangled}: expected {len(k.params)} arguments, got {len(args)}")
        buf = bytearray(k.param_size)
        for i, (a, p) in enumerate(zip(args, k.params, strict=False)):
            buf[p["offset"] : p["offset"] + p["size"]] = self.pack_one(k, i, a, p)
        return np.frombuffer(bytes(buf), np.uint8).copy()

    def pack_one(self, k: Kernel, i: int, a: Any, p: dict[str, Any]) -> bytes:
        size, ty = p["size"], p["type"]

        def bad(why: str) -> LaunchError:
            return LaunchError(f"{k.demangled}: argument {i} ({ty}[{size}]): {why}")

        if a is None:
            a = 0
        if isinstance(a, (bytes, bytearray, memoryview)):
            b = bytes(a)
            if len(b) != size:
                raise bad(f"{len(b)} bytes given")
            return b
        if isinstance(a, np.void) or (isinstance(a, np.ndarray) and a.ndim == 0 and a.dtype.names):
            b = a.tobytes()
            if len(b) != size:
                raise bad(f"{len(b)} bytes given")
            return b
        if is_torch(a) or (isinstance(a, np.ndarray)):
            if size != 8:
                raise bad("a buffer needs a 64-bit pointer parameter")
            return struct.pack("<Q", self.mem.register(a, None if self._named(a) else f"arg{i}", auto=True))
        if isinstance(a, np.generic):
            b = a.tobytes()
            if len(b) == size:
                return b
            a = a.item()
        if isinstance(a, bool):
            a = int(a)
        if p["type"] not in PACK or (ty == "b8" and size > 1):
            raise bad(f"pass struct parameters as bytes, got {type(a).__name__}")
        f = PACK[ty]
        if isinstance(a, float):
            if size == 4:
                return struct.pack("<f", a)
            if size == 8:
                return struct.pack("<d", a)
            if size == 2:
                raise bad("pass 16-bit floats as numpy scalars or bytes")
            raise bad("float given")
        if isinstance(a, int):
            if f in "fd":
                return struct.pack("<" + f, float(a))
            return (a & ((1 << (8 * size)) - 1)).to_bytes(size, "little")
        raise bad(f"cannot pass {type(a).__name__}")

    def _named(self, a: Any) -> bool:
        sp, sn, _, _ = buffer_span(a)
        return (sp, sn) in self.mem._by_host

    def launch(
        self,
        name: str | Kernel,
        grid: int | Iterable[int],
        block: int | Iterable[int],
        args: Sequence[Any] = (),
        shared_bytes: int = 0,
        params: bytes | None = None,
        **opts: Any,
    ) -> Result:
        """Run a kernel; returns a Result (counters, warnings, printf output).

        args   one entry per kernel parameter; or params=bytes with the raw parameter block
        opts   see machine.Options
        """
        k = self.kernel(name)
        o = opts.pop("options", None) or Options(**opts)
        grid, block = dims3(grid), dims3(block)
        self.mem.epoch += 1
        if "reqnctapercluster" in k.attrs or "explicitcluster" in k.attrs:
            raise UnsupportedError(f"{k.demangled}: thread block clusters are not supported")
        nt = block[0] * block[1] * block[2]
        if nt < 1 or nt > 1024 or block[2] > 64:
            raise LaunchError(f"invalid block {block}")
        if min(grid) < 1 or grid[1] > 65535 or grid[2] > 65535 or grid[0] > 2**31 - 1:
            raise LaunchError(f"invalid grid {grid}")
        mx = k.attrs.get("maxntid")
        if mx and nt > int(np.prod(mx)):
            raise LaunchError(f"{k.demangled}: block {block} exceeds .maxntid {mx}")
        rq = k.attrs.get("reqntid")
        if rq and tuple(([*rq, 1, 1, 1])[:3]) != block:
            raise LaunchError(f"{k.demangled}: block {block} differs from .reqntid {rq}")
        if params is not None:
            if len(params) < k.param_size:
                raise LaunchError(f"{k.demangled}: parameter block has {len(params)} bytes, needs {k.param_size}")
            kp = np.frombuffer(bytes(params), np.uint8).copy()
        else:
            kp = self.pack(k, list(args))
        prog = k.program(o.shared_redzone)
        limit = smem_limit(self.target)
        if prog.static_bytes > 48 * 1024:
            raise LaunchError(f"{k.demangled}: {prog.static_bytes} bytes of static shared memory exceed 48 KiB")
        if prog.static_bytes + shared_bytes > limit:
            raise LaunchError(
                f"{k.demangled}: {prog.static_bytes + shared_bytes} bytes of shared memory exceed the "
                f"{limit} byte limit of {self.target}"
            )
        n = grid[0] * grid[1] * grid[2]
        ctas = list(range(n)) if o.only_ctas is None else [int(c) for c in o.only_ctas if c < n]
        T = (nt + 31) // 32 * 32
        lanes = min(o.lanes_per_chunk, o.max_chunk_registers // max(1, register_bytes(prog)))
        per = max(1, lanes // T)
        sb = prog.static_bytes + shared_bytes + 1024
        per = max(1, min(per, o.max_chunk_shared // sb))
        if o.ctas_per_chunk:
            per = o.ctas_per_chunk
        if o.cooperative:
            per = len(ctas)
        for r in self.mem.regions:
            r.reset_stats()
        st = Stats(prog.code, o)
        res: dict[str, Any] = {"_warn": {}, "_out": []}
        if o.cooperative:
            if self._coop_ws is None:
                self._coop_ws = self.mem.alloc((64,), np.uint8, name="grid barrier workspace")
            self._coop_ws[:] = 0
            res["_coop"] = self.mem.register(self._coop_ws)
        t0 = time.time()
        for i in range(0, len(ctas), per):
            m = Machine(prog, prog.handlers, ctas[i : i + per], grid, block, kp, self.mem, o, shared_bytes, st, res)
            m.run()
            m.let_go()
        dt = time.time() - t0
        rep = st.report(
            self.mem,
            {
                "kernel": k.demangled,
                "grid": grid,
                "block": block,
                "seconds": dt,
                "ctas": len(ctas),
                "static_shared": prog.static_bytes,
                "dynamic_shared": shared_bytes,
                "stdout": "".join(res["_out"]),
                "warnings": [w + (f" (x{c})" if c > 1 else "") for w, c in res["_warn"].values()],
            },
        )
        rep["hotspots"] = st.hotspots()
        self.last = result = Result(rep)
        result.stats = st
        return result


def load(ptx: str, mem: Memory | None = None, strict: bool = True, lazy: bool = False) -> Module:
    """Module from PTX text or a path to a .ptx file. lazy: the body of a function is parsed when it is needed."""
    origin = None
    if "\n" not in ptx and os.path.exists(ptx):
        origin = ptx
        with open(ptx) as f:
            ptx = f.read()
    return Module(ptx, mem, strict, origin, lazy)
