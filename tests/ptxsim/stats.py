"""Counters gathered during a launch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .aliases import Array

if TYPE_CHECKING:
    from .machine import Options
    from .memory import Memory
    from .parse.syntax import Ins
import numpy as np

CLASSES = [
    ("mma", ("mma", "wmma")),
    ("ldmatrix", ("ldmatrix", "stmatrix", "movmatrix")),
    ("cp.async", ("cp",)),
    ("ld/st", ("ld", "ldu", "st")),
    ("atomic", ("atom", "red")),
    ("shuffle/vote", ("shfl", "vote", "match", "redux", "activemask", "elect")),
    ("barrier", ("bar", "barrier", "mbarrier")),
    ("fence", ("membar", "fence")),
    ("control", ("bra", "brx", "call", "ret", "exit", "trap")),
    ("sfu", ("ex2", "lg2", "sin", "cos", "tanh", "rcp", "rsqrt", "sqrt", "div")),
    ("convert", ("cvt", "cvta")),
    ("move", ("mov", "selp", "slct", "prmt")),
    ("compare", ("setp", "set", "testp")),
]
_CLS = {o: c for c, ops in CLASSES for o in ops}
_FT = {"f32", "f64", "f16", "bf16", "f16x2", "bf16x2"}


def classify(ins: Ins) -> str:
    p = ins.parts
    o = p[0]
    ft = next((x for x in reversed(p[1:]) if x in _FT), None)
    if o in ("ld", "st"):
        sp = next(
            (x.split("::")[0] for x in p[1:] if x.split("::")[0] in ("global", "shared", "local", "const", "param")),
            "generic",
        )
        return f"{o}.{sp}"
    if o == "div" and ft is None:
        return "int"
    c = _CLS.get(o)
    if c:
        return c
    if ft:
        k = "fma" if o in ("fma", "mad") else "alu"
        return f"{ft}.{k}"
    return "int"


def nuniq(a: Array) -> int:
    """number of distinct values (sorting beats np.unique's hashing at these sizes)."""
    if len(a) < 2:
        return len(a)
    s = np.sort(a)
    return int(np.count_nonzero(s[1:] != s[:-1])) + 1


def uniq(a: Array) -> Array:
    s = np.sort(a)
    k = np.empty(len(s), bool)
    k[0] = True
    np.not_equal(s[1:], s[:-1], out=k[1:])
    return s[k]


class Stats:
    """Counters per instruction of a kernel, and their summary."""

    def __init__(self, code: list[Ins], opts: Options) -> None:
        n = len(code)
        self.code = code

        def z() -> Array:
            return np.zeros(n, np.int64)

        self.warp_instr, self.thread_instr = z(), z()
        self.g_req, self.g_bytes, self.g_sect, self.g_lane = z(), z(), z(), z()
        self.l_req, self.l_bytes = z(), z()
        self.s_req, self.s_wave, self.s_ideal, self.s_bytes = z(), z(), z(), z()
        self.mma_flops = 0
        self.barriers = 0
        self.warp_syncs = 0
        self.divergent_branches = 0
        self.steps = 0
        self.kind: dict[int, str] = {}  # pc -> r w a c
        self.widths: dict[tuple[str, int], list[int]] = {}  # (kind, bytes per thread) -> [warp requests, accesses]

    def glob(self, pc: int, lanes: Array, addr: Array, size: int, kind: str) -> None:
        self.kind[pc] = kind
        w = lanes >> 5
        requests = nuniq(w)
        self.g_req[pc] += requests
        self.g_bytes[pc] += len(lanes) * size
        c = self.widths.get((kind, size))
        if c is None:
            c = self.widths[kind, size] = [0, 0]
        c[0] += requests
        c[1] += len(lanes)
        key = (w.astype(np.int64) << 40) | ((addr >> 5) & ((1 << 40) - 1))
        self.g_sect[pc] += nuniq(key)

    def bank(self, pc: int, lanes: Array, off: Array, size: int, kind: str) -> None:
        ph = 4 if size == 16 else 2 if size == 8 else 1
        phase = (lanes >> 5) * ph + ((lanes & 31) * ph >> 5)
        self.bank_phases(pc, phase, off, size, len(lanes))
        self.s_req[pc] += nuniq(lanes >> 5)

    def bank_phases(self, pc: int, phase: Array, off: Array, size: int, n: int) -> None:
        w = off >> 2
        if size > 4:
            k = size >> 2
            w = (w[:, None] + np.arange(k)).ravel()
            phase = np.repeat(phase, k)
        u = uniq((phase.astype(np.int64) << 28) | w)
        p = u >> 28
        p = p - p[0]
        c = np.bincount(p * 32 + (u & 31), minlength=(int(p[-1]) + 1) * 32).reshape(-1, 32).max(axis=1)
        self.s_wave[pc] += int(c.sum())
        self.s_ideal[pc] += int((c > 0).sum())
        self.s_bytes[pc] += n * size

    # ------------------------------------------------------------------
    def report(self, memory: Memory, extra: dict[str, Any]) -> dict[str, Any]:
        d: dict[str, Any] = {}
        by: dict[str, int] = {}
        for i, ins in enumerate(self.code):
            if self.warp_instr[i]:
                c = classify(ins)
                by[c] = by.get(c, 0) + int(self.warp_instr[i])
        d["warp_instructions"] = int(self.warp_instr.sum())
        d["thread_instructions"] = int(self.thread_instr.sum())
        tot = d["warp_instructions"]
        d["simt_efficiency"] = d["thread_instructions"] / (32.0 * tot) if tot else 1.0
        d["instructions_by_class"] = dict(sorted(by.items(), key=lambda kv: -kv[1]))
        for nm, kind in (("global_load", "r"), ("global_store", "w"), ("global_atomic", "a"), ("global_cp_async", "c")):
            idx = [pc for pc, k in self.kind.items() if k == kind]
            b = int(self.g_bytes[idx].sum()) if idx else 0
            s = int(self.g_sect[idx].sum()) if idx else 0
            d[nm] = {
                "warp_requests": int(self.g_req[idx].sum()) if idx else 0,
                "bytes": b,
                "sectors": s,
                "efficiency": (b / (32.0 * s)) if s else None,
                **self.by_width(kind),
            }
        ur = uw = 0
        per = {}
        for r in memory.regions:
            a = int(r.rd.sum()) if r.rd is not None else 0
            b = int(r.wr.sum()) if r.wr is not None else 0
            if a or b:
                per[r.name] = {"read_sectors": a, "write_sectors": b}
            ur += a
            uw += b
        d["unique_sectors"] = {
            "read": ur,
            "write": uw,
            "read_bytes": ur * 32,
            "write_bytes": uw * 32,
            "per_buffer": per,
        }
        sq = int(self.s_req.sum())
        d["shared"] = {
            "warp_requests": sq,
            "bytes": int(self.s_bytes.sum()),
            "wavefronts": int(self.s_wave.sum()),
            "ideal_wavefronts": int(self.s_ideal.sum()),
            "bank_conflicts": int((self.s_wave - self.s_ideal).sum()),
        }
        d["local"] = {"warp_requests": int(self.l_req.sum()), "bytes": int(self.l_bytes.sum())}
        d["mma_flops"] = int(self.mma_flops)
        d["barriers"] = int(self.barriers)
        d["warp_syncs"] = int(self.warp_syncs)
        d["divergent_branches"] = int(self.divergent_branches)
        d["emulator_steps"] = int(self.steps)
        d.update(extra)
        return d

    def by_width(self, kind: str) -> dict[str, Any]:
        """Accesses per bytes a thread moves in one, and the share of the bytes moved 16 at a time."""
        w = {size: c for (k, size), c in sorted(self.widths.items()) if k == kind}
        total = sum(size * c[1] for size, c in w.items())
        return {
            "by_width": {size: {"warp_requests": c[0], "accesses": c[1]} for size, c in w.items()},
            "share_16": w[16][1] * 16 / total if 16 in w else (0.0 if w else None),
        }

    def hotspots(self, n: int = 10) -> list[tuple[Any, ...]]:
        out = []
        for pc in range(len(self.code)):
            ins = self.code[pc]
            if self.g_sect[pc]:
                ex = int(self.g_sect[pc]) * 32 - int(self.g_bytes[pc])
                out.append(
                    (
                        ex,
                        "global",
                        ins.line,
                        ins.loc,
                        ins.text,
                        int(self.g_req[pc]),
                        float(self.g_bytes[pc]) / (32.0 * float(self.g_sect[pc])),
                    )
                )
            c = int(self.s_wave[pc] - self.s_ideal[pc])
            if c:
                out.append(
                    (
                        c * 128,
                        "bank",
                        ins.line,
                        ins.loc,
                        ins.text,
                        int(self.s_req[pc]),
                        float(self.s_wave[pc]) / float(self.s_ideal[pc]),
                    )
                )
        out.sort(key=lambda t: -t[0])
        return out[:n]


def table(d: Mapping[str, Any]) -> str:
    L: list[str] = []
    a = L.append
    a(f"kernel {d.get('kernel', '?')}  grid {d.get('grid')}  block {d.get('block')}  time {d.get('seconds', 0):.2f}s")
    a(f"  warp instructions {d['warp_instructions']:>14,}   SIMT efficiency {d['simt_efficiency']:.3f}")
    for c, n in d["instructions_by_class"].items():
        a(f"    {c:<16}{n:>14,}  {100.0 * n / max(1, d['warp_instructions']):5.1f}%")
    for k in ("global_load", "global_store", "global_atomic", "global_cp_async"):
        v = d[k]
        if v["warp_requests"]:
            a(
                f"  {k:<16} requests {v['warp_requests']:>10,}  bytes {v['bytes']:>13,}  sectors {v['sectors']:>11,}  "
                f"efficiency {v['efficiency']:.3f}  16-byte {100.0 * v['share_16']:.0f}%"
            )
    u = d["unique_sectors"]
    a(f"  compulsory       read {u['read_bytes']:,} B   write {u['write_bytes']:,} B")
    s = d["shared"]
    if s["warp_requests"]:
        a(
            f"  shared           requests {s['warp_requests']:>10,}  bytes {s['bytes']:>13,}  wavefronts "
            f"{s['wavefronts']:,} (ideal {s['ideal_wavefronts']:,}, conflicts {s['bank_conflicts']:,})"
        )
    if d["local"]["bytes"]:
        a(f"  local            requests {d['local']['warp_requests']:>10,}  bytes {d['local']['bytes']:>13,}")
    a(f"  mma FLOPs {d['mma_flops']:,}   barriers {d['barriers']:,}   divergent branches {d['divergent_branches']:,}")
    for w in d.get("warnings", [])[:20]:
        a(f"  warning: {w}")
    return "\n".join(L)
