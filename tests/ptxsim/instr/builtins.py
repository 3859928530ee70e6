"""printf and assert of the device."""

from __future__ import annotations

import re
import struct
from typing import TYPE_CHECKING

import numpy as np

from ..aliases import Handler, Reader
from ..errors import TrapError
from ..ops.context import I32, NPD, Ctx
from ..parse.syntax import WIDTH, Ins

if TYPE_CHECKING:
    from ..machine import Machine
    from ..machine.options import Group


def builtin(cx: Ctx, name: str, pin: list[tuple[int, int]], pout: list[tuple[int, int]], pr: Reader | None) -> Handler:
    ins = cx.ins

    def arg(m: Machine, i: int, lane: int, ty: str) -> int:
        idx, _s = pin[i]
        return int(m.P[idx][lane, : WIDTH[ty] // 8].view(NPD[ty])[0])

    if name == "vprintf":

        def h(m: Machine, g: Group) -> int:
            lanes = g.lanes
            if pr is not None:
                lanes = lanes[pr(m, lanes)]
            for lane in lanes.tolist():
                fmt = m.cstring(ins, lane, arg(m, 0, lane, "u64"))
                s, n = c_format(m, ins, lane, fmt, arg(m, 1, lane, "u64"))
                m.res["_out"].append(s)
                if pout:
                    m.P[pout[0][0]][lane, :4] = np.array([n], I32).view(np.uint8)
            return g.pc + 1

        return 1, h
    if name == "__assertfail":

        def h(m: Machine, g: Group) -> int:
            lanes = g.lanes
            if pr is not None:
                lanes = lanes[pr(m, lanes)]
                if not len(lanes):
                    return g.pc + 1
            lane = int(lanes[0])
            m.fail(
                TrapError,
                ins,
                lane,
                f"device assertion failed: {m.cstring(ins, lane, arg(m, 0, lane, 'u64'))} at "
                f"{m.cstring(ins, lane, arg(m, 1, lane, 'u64'))}:{arg(m, 2, lane, 'u32')} in "
                f"{m.cstring(ins, lane, arg(m, 3, lane, 'u64'))}",
            )

        return 1, h
    raise cx.bad(f"(external function {name})")


_FORMAT = re.compile(r"%([-+ #0]*)(\*|\d+)?(?:\.(\*|\d+))?(hh|h|ll|l|z|j|t)?([diouxXcsfFeEgGaAp%])")


def c_format(m: Machine, ins: Ins, lane: int, fmt: str, buf: int) -> tuple[str, int]:
    pos = [buf]
    cnt = [0]

    def take(n: int) -> bytes:
        a = (pos[0] + n - 1) // n * n
        pos[0] = a + n
        return m.read_bytes(ins, lane, a, n)

    def rep(mo: re.Match[str]) -> str:
        fl, wd, pc_, ln, cv = mo.groups()
        if cv == "%":
            return "%"
        cnt[0] += 1
        if wd == "*":
            wd = str(struct.unpack("<i", take(4))[0])
        if pc_ == "*":
            pc_ = str(struct.unpack("<i", take(4))[0])
        spec = "%" + (fl or "") + (wd or "") + ("." + pc_ if pc_ is not None else "")
        if cv in "fFeEgGaA":
            return (spec + ("f" if cv in "aA" else cv)) % struct.unpack("<d", take(8))[0]
        if cv == "s":
            return (spec + "s") % m.cstring(ins, lane, struct.unpack("<q", take(8))[0])
        if cv == "p":
            return hex(struct.unpack("<Q", take(8))[0])
        if cv == "c":
            return chr(take(4)[0])
        n = 8 if ln in ("ll", "l", "z", "j", "t") else 4
        v = struct.unpack({4: "<i", 8: "<q"}[n] if cv in "di" else {4: "<I", 8: "<Q"}[n], take(n))[0]
        return (spec + ("d" if cv in "diu" else cv)) % v

    return _FORMAT.sub(rep, fmt), cnt[0]
