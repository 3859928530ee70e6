"""The wrapper of warp-synchronous instructions, bar.warp.sync and CTA barriers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..aliases import Array, Exec, Handler, Reader
from ..errors import BarrierDivergenceError, ExecError, WarpSyncError
from ..machine.options import Bar, Group
from ..ops.context import I64, U32, Ctx
from ..warp.lanes import ballot

if TYPE_CHECKING:
    from ..machine import Machine


def wsync(cx: Ctx, ex: Exec, mask: Reader | None, aligned: bool, order: bool) -> Handler:
    """mask: reader of the membermask or None (whole warp)."""
    ins = cx.ins
    pred = cx.rd(("reg", ins.pred), "pred") if ins.pred is not None else None
    neg = ins.neg

    def h(m: Machine, g: Group) -> int:
        lanes = g.lanes
        pc, depth = g.pc, g.depth
        whole = True
        if pred is not None:
            p = pred(m, lanes)
            if neg:
                p = ~p
            if not p.all():
                m.enqueue(pc + 1, depth, lanes[~p])
                lanes = lanes[p]
                whole = False
                if not len(lanes):
                    return -1
        key = (depth, pc)
        if m.parked:
            pk = m.parked.pop(key, None)
            if pk is not None:
                lanes = np.sort(np.concatenate([lanes, pk]))
                whole = False
        w = lanes >> 5
        arrived = ballot(m, lanes, None)[w]
        live = m.livemask[w]
        if mask is None:
            mm = np.full(len(lanes), 0xFFFFFFFF, U32)
            if (live != 0xFFFFFFFF).any():
                i = int(np.argmax(live != 0xFFFFFFFF))
                m.fail(
                    WarpSyncError,
                    ins,
                    int(lanes[i]),
                    f"executed by a warp with missing (exited or non-existent) threads, live mask {int(live[i]):#010x}",
                )
        else:
            mm = mask(m, lanes)
            if len(mm) != len(lanes):
                mm = np.repeat(mm, len(lanes))
            own = (mm >> (lanes & 31).astype(U32)) & U32(1)
            if not own.all():
                i = int(np.argmin(own))
                m.fail(
                    WarpSyncError, ins, int(lanes[i]), f"executing thread is not in its membermask {int(mm[i]):#010x}"
                )
        need = mm & live
        ready = (need & ~arrived) == 0
        if ready.all():
            go = lanes
            gm = mm
        else:
            m.parked[key] = lanes[~ready]
            go, gm = lanes[ready], mm[ready]
            whole = False
            if not len(go):
                return -1
        g2 = g if whole else Group(pc, depth, go)
        g2.mm = gm
        m.st.warp_syncs += 1
        ex(m, g2)
        if order and m.race is not None and m.opts.shfl_orders_memory:
            full = (gm & m.livemask[go >> 5]) == m.livemask[go >> 5]
            if full.all():
                m.race.warp_sync(go, True)
            else:
                for k in np.unique(gm):
                    m.race.warp_sync(go[gm == k], False)
        if whole:
            return pc + 1
        m.enqueue(pc + 1, depth, go)
        return -1

    return 1, h


def b_barwarp(cx: Ctx) -> Handler:
    ins = cx.ins
    rm = cx.rd(ins.args[0], "b32")
    pred = cx.rd(("reg", ins.pred), "pred") if ins.pred is not None else None
    neg = ins.neg

    def h(m: Machine, g: Group) -> int:
        lanes, pc, depth = g.lanes, g.pc, g.depth
        whole = True
        if pred is not None:
            p = pred(m, lanes)
            if neg:
                p = ~p
            if not p.all():
                m.enqueue(pc + 1, depth, lanes[~p])
                lanes = lanes[p]
                whole = False
                if not len(lanes):
                    return -1
        mm = rm(m, lanes)
        if len(mm) != len(lanes):
            mm = np.repeat(mm, len(lanes))
        own = (mm >> (lanes & 31).astype(U32)) & U32(1)
        if not own.all():
            i = int(np.argmin(own))
            m.fail(WarpSyncError, ins, int(lanes[i]), f"executing thread is not in its membermask {int(mm[i]):#010x}")
        m.st.warp_syncs += 1
        if m.nbws == 0:
            w = lanes >> 5
            lv = m.livemask[w]
            arr = ballot(m, lanes, None)[w]
            if ((mm & lv & ~arr) == 0).all():
                if m.race is not None:
                    if ((mm & lv) == lv).all():
                        m.race.warp_sync(lanes, True)
                    else:
                        for k in np.unique(mm):
                            m.race.warp_sync(lanes[mm == k], False)
                if whole:
                    return pc + 1
                m.enqueue(pc + 1, depth, lanes)
                return -1
        m.bws_wait[lanes] = True
        m.bws_pc[lanes] = pc
        m.bws_mm[lanes] = mm
        m.bws_depth[lanes] = depth
        m.nbws += len(lanes)
        m.bws_release(np.unique(lanes >> 5))
        return -1

    return 1, h


def b_bar(cx: Ctx) -> Handler:
    ins = cx.ins
    p = ins.parts
    if p[1] == "warp":
        return b_barwarp(cx)
    mode = next((x for x in p[1:] if x in ("sync", "arrive", "red")), None)
    if mode is None or "cluster" in p:
        raise cx.bad()
    args = list(ins.args)
    w = rp = None
    if mode == "red":
        red = next(x for x in p if x in ("popc", "and", "or"))
        w = cx.wr(args.pop(0), "u32" if red == "popc" else "pred")
        rp = cx.rd(args.pop(), "pred")
    rid = cx.rd(args[0], "u32")
    rcnt = cx.rd(args[1], "u32") if len(args) > 1 else None
    if mode == "arrive" and rcnt is None:
        raise cx.bad("(bar.arrive needs a thread count)")
    pred = cx.rd(("reg", ins.pred), "pred") if ins.pred is not None else None
    neg = ins.neg

    if mode == "red":

        def finish(m: Machine, lanes: Array, preds: Array) -> None:
            assert w is not None
            if red == "popc":
                w(m, lanes, np.array([int(preds.sum())], U32))
            else:
                w(m, lanes, np.array([bool(preds.all() if red == "and" else preds.any())]))

        cx.prog.h_red[ins.pc] = finish

    def h(m: Machine, g: Group) -> int:
        lanes, pc, depth = g.lanes, g.pc, g.depth
        whole = True
        if pred is not None:
            q = pred(m, lanes)
            if neg:
                q = ~q
            if not q.all():
                m.enqueue(pc + 1, depth, lanes[~q])
                lanes = lanes[q]
                whole = False
                if not len(lanes):
                    return -1
        ids = rid(m, lanes)
        cnt = rcnt(m, lanes) if rcnt is not None else None
        m_all = len(lanes) == m.nlive
        if mode == "sync" and cnt is None and m_all and not m.bars and len(ids) == 1:
            # every live thread of every CTA arrives together
            cs = np.unique(m.cta_of[lanes])
            m.st.barriers += len(cs)
            if len(lanes) != m.nt * m.ncta and m.opts.exited_barrier != "off":
                nl = np.bincount(m.cta_of[lanes], minlength=m.ncta)
                for c in cs:
                    if nl[c] != m.nt:
                        m.exited_at_barrier(ins, int(c), m.nt - int(nl[c]))
            if m.race is not None:
                m.race.cta_barrier(cs)
            if whole:
                return pc + 1
            m.enqueue(pc + 1, depth, lanes)
            return -1
        if len(ids) != len(lanes):
            ids = np.repeat(ids, len(lanes))
        if (ids > 15).any():
            m.fail(ExecError, ins, int(lanes[0]), "barrier id out of range 0..15")
        pv = np.broadcast_to(rp(m, lanes), lanes.shape) if rp is not None else np.zeros(len(lanes), bool)
        if cnt is not None and len(cnt) != len(lanes):
            cnt = np.repeat(cnt, len(lanes))
        kind = {"sync": 0, "arrive": 1, "red": 2}[mode]
        ctas = m.cta_of[lanes]
        if kind != 1:
            m.nbar += len(lanes)
        touched = []
        keys = ctas.astype(I64) * 16 + ids
        for k in np.unique(keys):
            pos = np.flatnonzero(keys == k)
            bk = (int(k) // 16, int(k) % 16)
            b = m.bars.get(bk)
            if b is None:
                b = m.bars[bk] = Bar()
            c = None
            if cnt is not None:
                c = int(cnt[pos[0]])
                if (cnt[pos] != c).any() or c % 32:
                    m.fail(
                        BarrierDivergenceError,
                        ins,
                        int(lanes[pos[0]]),
                        f"barrier thread count must be uniform and a multiple of 32 (got {c})",
                    )
            if len(b.lanes) and b.count != c:
                m.fail(
                    BarrierDivergenceError,
                    ins,
                    int(lanes[pos[0]]),
                    f"barrier {bk[1]}: threads arrive with different thread counts ({b.count} and {c})",
                )
            b.count = c
            dup = np.intersect1d(b.lanes, lanes[pos])
            if len(dup):
                m.fail(BarrierDivergenceError, ins, int(dup[0]), f"barrier {bk[1]}: thread arrives twice in one phase")
            n = len(pos)
            b.lanes = np.concatenate([b.lanes, lanes[pos]])
            b.pcs = np.concatenate([b.pcs, np.full(n, pc)])
            b.depth = np.concatenate([b.depth, np.full(n, depth)])
            b.kind = np.concatenate([b.kind, np.full(n, kind)])
            b.preds = np.concatenate([b.preds, pv[pos]])
            touched.append(bk)
        if kind == 1:
            m.enqueue(pc + 1, depth, lanes)
        for bk in touched:
            m.bar_check(*bk)
        m.gver += 1
        return -1

    return 1, h
