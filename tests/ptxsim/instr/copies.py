"""cp.async and mbarrier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..aliases import Exec
from ..errors import BarrierDivergenceError, ExecError
from ..machine.options import MBar
from ..ops.context import I64, U32, U64, Ctx
from ..parse.syntax import Ins
from .address import addr_reader, lanes_addr, mach_addr

if TYPE_CHECKING:
    from ..machine import Machine
    from ..machine.options import Group


def b_cp(cx: Ctx) -> Exec:
    ins = cx.ins
    p = ins.parts
    if p[1] != "async" or "bulk" in p:
        raise cx.bad()
    if "commit_group" in p:

        def commit(m: Machine, g: Group) -> None:
            m.cp_group[g.lanes] += 1

        return commit
    if "wait_all" in p:

        def wait_all(m: Machine, g: Group) -> None:
            m.cp_group[g.lanes] += 1
            m.cp_wait(g.lanes, 0)

        return wait_all
    if "wait_group" in p:
        n = ins.args[0][1]

        def wait_group(m: Machine, g: Group) -> None:
            m.cp_wait(g.lanes, n)

        return wait_group
    if "mbarrier" in p:
        noinc = "noinc" in p
        fa = mach_addr(cx, ins.args[0], "shared" if any(x.startswith("shared") for x in p) else "generic")

        def arrive(m: Machine, g: Group) -> None:
            # completion is modelled as immediate: earlier copies of the thread land, then it arrives
            m.cp_wait(g.lanes, -1)
            for lane, a in zip(g.lanes.tolist(), lanes_addr(fa, m, g).tolist(), strict=False):
                b = mb_get(m, ins, lane, a)
                if not noinc:
                    b.pending += 1
                mb_arrive(m, ins, b, lane, 1)

        return arrive
    glob = "global" in p
    shr = any(x.split("::")[0] == "shared" for x in p)
    if not (glob and shr) or "shared::cluster" in p:
        raise cx.bad()
    dst, src, cp, *extra = ins.args
    if cp[0] != "imm" or cp[1] not in (4, 8, 16) or ("cg" in p and cp[1] != 16):
        raise cx.bad("(cp-size)")
    size = cp[1]
    hint = any(x.endswith("cache_hint") for x in p)
    if hint and extra:
        extra = extra[:-1]
    rsz = rig = None
    if extra:
        o = extra[0]
        if (o[0] == "reg" and o[1].width == 1) or o[0] == "not":
            rig = cx.rd(o, "pred")
        else:
            rsz = cx.rd(o, "u32")
    fd, fs = addr_reader(cx, dst), addr_reader(cx, src)

    def issue(m: Machine, g: Group) -> None:
        n = len(g.lanes)
        if rsz is not None:
            nb = np.broadcast_to(rsz(m, g.lsel), (n,)).astype(I64)
            if (nb > size).any():
                m.fail(ExecError, ins, int(g.lanes[int(np.argmax(nb > size))]), "cp.async src-size larger than cp-size")
        elif rig is not None:
            nb = np.where(np.broadcast_to(rig(m, g.lsel), (n,)), 0, size).astype(I64)
        else:
            nb = np.full(n, size, I64)
        m.cp_issue(ins, g.lanes, lanes_addr(fd, m, g), lanes_addr(fs, m, g), size, nb)

    return issue


def mb_get(m: Machine, ins: Ins, lane: int, a: int) -> MBar:
    c = int(m.cta_of[lane])
    b = m.mbars.get((c, a))
    if b is None:
        m.fail(ExecError, ins, lane, f"mbarrier object at shared offset {a} was never initialised", address=a)
    return b


def mb_complete(m: Machine, b: MBar) -> bool:
    if b.pending == 0 and b.tx == 0:
        b.phase += 1
        b.pending = b.count
        b.acc_done, b.acc = b.acc, None
        return True
    return False


def mb_arrive(m: Machine, ins: Ins, b: MBar, lane: int, cnt: int) -> None:
    if cnt > b.pending:
        m.fail(BarrierDivergenceError, ins, lane, f"mbarrier arrive count {cnt} exceeds the pending count {b.pending}")
    b.pending -= cnt
    if m.race is not None:
        acc = m.race.release(np.array([lane]))
        b.acc = acc if b.acc is None else np.maximum(b.acc, acc)
    mb_complete(m, b)


def b_mbarrier(cx: Ctx) -> Exec:
    ins = cx.ins
    p = ins.parts
    op = p[1]
    sp = "shared" if any(x.split("::")[0] == "shared" for x in p) else "generic"
    if any(x == "shared::cluster" for x in p) and op not in ("arrive",):
        raise cx.bad()
    if op in ("init", "inval"):
        fa = mach_addr(cx, ins.args[0], sp)
        rc = cx.rd(ins.args[1], "u32") if op == "init" else None

        def ex(m: Machine, g: Group) -> None:
            ad = lanes_addr(fa, m, g)
            m.sh.check(ins, g.lanes, ad, 8, "w", atomic=False)
            cn = np.broadcast_to(rc(m, g.lsel), ad.shape) if rc is not None else np.zeros(ad.shape, U32)
            for i, lane in enumerate(g.lanes.tolist()):
                k = (int(m.cta_of[lane]), int(ad[i]))
                if op == "init":
                    m.mbars[k] = MBar(int(cn[i]))
                else:
                    m.mbars.pop(k, None)

        return ex
    if op in ("arrive", "arrive_drop", "expect_tx", "complete_tx"):
        exp = "expect_tx" in p
        args = list(ins.args)
        d = None
        if args[0][0] != "addr":
            d = args.pop(0)
        wr = cx.wr(d, "b64") if d is not None else None
        fa = mach_addr(cx, args[0], sp)
        rc = cx.rd(args[1], "u32") if len(args) > 1 else None

        def ex(m: Machine, g: Group) -> None:
            ad = lanes_addr(fa, m, g)
            m.sh.check(ins, g.lanes, ad, 8, "rw", atomic=True)
            cn = np.broadcast_to(rc(m, g.lsel), ad.shape) if rc is not None else None
            out = np.zeros(len(ad), U64)
            for i, lane in enumerate(g.lanes.tolist()):
                b = mb_get(m, ins, lane, int(ad[i]))
                out[i] = b.phase
                n = int(cn[i]) if cn is not None else 1
                if op == "expect_tx":
                    b.tx += n
                elif op == "complete_tx":
                    b.tx -= n
                    mb_complete(m, b)
                elif exp:
                    b.tx += n
                    mb_arrive(m, ins, b, lane, 1)
                else:
                    if op == "arrive_drop":
                        b.count -= n
                    mb_arrive(m, ins, b, lane, n)
            if wr is not None:
                wr(m, g.lsel, out)

        return ex
    if op in ("test_wait", "try_wait"):
        parity = "parity" in p
        d, a, st = ins.args[:3]
        wr = cx.wr(d, "pred")
        fa = mach_addr(cx, a, sp)
        rs = cx.rd(st, "u32" if parity else "b64")

        def ex(m: Machine, g: Group) -> None:
            ad = lanes_addr(fa, m, g)
            m.sh.check(ins, g.lanes, ad, 8, "r", atomic=True)
            sv = np.broadcast_to(rs(m, g.lsel), ad.shape)
            out = np.zeros(len(ad), bool)
            for i, lane in enumerate(g.lanes.tolist()):
                b = mb_get(m, ins, lane, int(ad[i]))
                ok = b.phase & 1 != int(sv[i]) & 1 if parity else b.phase > int(sv[i])
                out[i] = ok
                if ok and m.race is not None and b.acc_done is not None:
                    m.race.acquire(np.array([lane]), b.acc_done)
            wr(m, g.lsel, out)
            if not out.all():
                m.want_yield = True

        return ex
    if op == "pending_count":
        raise cx.bad()
    raise cx.bad()
