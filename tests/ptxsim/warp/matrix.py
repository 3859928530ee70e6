"""ldmatrix, stmatrix, movmatrix and mma.sync."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from .. import numerics as N
from ..aliases import Array, Exec, Operand, Reader
from ..instr.address import mach_addr
from ..ops.context import F32, F64, I32, I64, U16, U32, U64, Ctx
from ..parse.syntax import WIDTH
from .lanes import LANE

if TYPE_CHECKING:
    from ..machine import Machine
    from ..machine.options import Group


def b_ldmatrix(cx: Ctx) -> Exec:
    ins = cx.ins
    p = ins.parts
    store = p[0] == "stmatrix"
    if "m8n8" not in p or "b16" not in p:
        raise cx.bad()
    num = 4 if "x4" in p else 2 if "x2" in p else 1
    trans = "trans" in p
    shared = any(x.split("::")[0] == "shared" for x in p)
    if store:
        addr, vec = ins.args[0], ins.args[1]
    else:
        vec, addr = ins.args[0], ins.args[1]
    regs = vec[1] if vec[0] == "vec" else [vec]
    if len(regs) != num:
        raise cx.bad("(register count)")
    ra = mach_addr(cx, addr, "shared" if shared else "generic")
    if store:
        rs = [cx.rd(o, "b32") for o in regs]
    else:
        ws = [cx.wr(o, "b32") for o in regs]
    # element (row, col pair) owned by each lane
    t = LANE
    if trans:
        r0, c0 = (t % 4) * 2, t // 4  # elements [r0][c0] and [r0+1][c0]
        e0, e1 = r0 * 8 + c0, (r0 + 1) * 8 + c0
    else:
        e0 = (t // 4) * 8 + (t % 4) * 2
        e1 = e0 + 1

    def ex(m: Machine, g: Group) -> None:
        ln = g.lanes
        nwp = len(ln) // 32
        off = np.broadcast_to(ra(m, g.lsel), ln.shape)
        off = off.reshape(nwp, 32)[:, : 8 * num]
        al = ln.reshape(nwp, 32)[:, : 8 * num]
        o, al = np.ascontiguousarray(off).ravel(), np.ascontiguousarray(al).ravel()
        # race attribution: each lane accesses the row it supplies the address of
        flat = m.sh.check(ins, al, o, 16, "w" if store else "r", stat=False)
        if m.sh.race is not None and not store:
            # a row is delivered to several lanes: check it against a second lane too, so that a row written by
            # the very lane that supplies its address still needs a warp sync
            m.sh.race_check(ins, al ^ 1, o, m.sh.units(flat, 16), "r", False)
        if m.stats_on:
            ph = (al >> 5) * num + ((al & 31) >> 3)
            m.st.bank_phases(ins.pc, ph, o, 16, len(al))
            m.st.s_req[ins.pc] += nwp
        v16 = m.sh.view(2)
        idx = (flat >> 1).reshape(nwp, num, 8)[..., None] + np.arange(8)
        if not store:
            M = v16[idx].reshape(nwp, num, 64)
            for i in range(num):
                w = M[:, i, e0].astype(U32) | (M[:, i, e1].astype(U32) << U32(16))
                ws[i](m, g.lsel, w.ravel())
        else:
            M = np.empty((nwp, num, 64), U16)
            for i in range(num):
                w = np.broadcast_to(rs[i](m, g.lsel), ln.shape).reshape(nwp, 32)
                M[:, i, e0] = w.astype(U16)
                M[:, i, e1] = (w >> U32(16)).astype(U16)
            v16[idx] = M.reshape(nwp, num, 8, 8)

    return ex


def b_movmatrix(cx: Ctx) -> Exec:
    ins = cx.ins
    if "trans" not in ins.parts or "m8n8" not in ins.parts:
        raise cx.bad()
    w, r = cx.wr(ins.args[0], "b32"), cx.rd(ins.args[1], "b32")
    t = LANE
    e0 = (t // 4) * 8 + (t % 4) * 2
    t0 = ((t % 4) * 2) * 8 + t // 4

    def ex(m: Machine, g: Group) -> None:
        nwp = len(g.lanes) // 32
        v = np.broadcast_to(r(m, g.lsel), g.lanes.shape).reshape(nwp, 32)
        M = np.empty((nwp, 64), U16)
        M[:, e0] = v.astype(U16)
        M[:, e0 + 1] = (v >> U32(16)).astype(U16)
        w(m, g.lsel, (M[:, t0].astype(U32) | (M[:, t0 + 8].astype(U32) << U32(16))).ravel())

    return ex


FragmentMaps: TypeAlias = tuple[int, int, int, tuple[Array, Array], tuple[Array, Array], tuple[Array, Array]]


def frag_maps(shape: str, aty: str, bty: str) -> FragmentMaps | None:
    """(A rows, A cols)[lane, elem], (B k, B n)[lane, elem], (C rows, C cols)[lane, elem]."""
    mm, rest = shape[1:].split("n")
    nn, kk = rest.split("k")
    M, Nn, K = int(mm), int(nn), int(kk)
    g, q = (LANE >> 2)[:, None], (LANE & 3)[:, None]
    if (M, Nn) == (16, 8):
        i = np.arange(4)[None, :]
        C = (g + 8 * (i >= 2), q * 2 + (i & 1))
        w = WIDTH[aty] if aty != "tf32" else 32
        if w == 16 and K in (8, 16):
            n = 8 if K == 16 else 4
            i = np.arange(n)[None, :]
            A = (g + 8 * ((i & 2) >> 1), q * 2 + (i & 1) + 8 * (i >> 2))
            i = np.arange(n // 2)[None, :]
            B = (q * 2 + (i & 1) + 8 * (i >> 1), g + 0 * i)
        elif w == 32 and K in (4, 8):
            n = 4 if K == 8 else 2
            i = np.arange(n)[None, :]
            A = (g + 8 * (i & 1), q + 4 * (i >> 1))
            i = np.arange(n // 2)[None, :]
            B = (q + 4 * i, g + 0 * i)
        elif w == 8 and K in (16, 32):
            n = 16 if K == 32 else 8
            i = np.arange(n)[None, :]
            A = (g + 8 * ((i >> 2) & 1), q * 4 + (i & 3) + 16 * (i >> 3))
            i = np.arange(n // 2)[None, :]
            B = (q * 4 + (i & 3) + 16 * (i >> 2), g + 0 * i)
        else:
            return None
        return M, Nn, K, A, B, C
    if (M, Nn, K) == (8, 8, 4) and aty == "f64":
        z = np.zeros((32, 1), int)
        i = np.arange(2)[None, :]
        return M, Nn, K, (g + z, q + z), (q + z, g + z), (g + 0 * i, q * 2 + i)
    return None


def elements(o: Operand) -> list[Operand]:
    """The registers of an operand that may be a vector."""
    return list(o[1]) if o[0] == "vec" else [o]


def unpack(w: list[Array], ty: str) -> Array:
    """list of (W,32) uint32 registers -> float64 (W,32,elems)."""
    st = np.stack(w, axis=-1)
    if ty == "f64":
        return st.view(F64) if st.dtype != F64 else st
    if ty == "tf32":
        return (st & U32(0xFFFFE000)).view(F32).astype(F64)
    if ty in ("f16", "bf16"):
        h = np.ascontiguousarray(st).view(U16)
        h = h.reshape(h.shape[0], 32, -1)
        return N.h2d(h) if ty == "f16" else N.b2d(h)
    b = np.ascontiguousarray(st).view(np.uint8).reshape(st.shape[0], 32, -1)
    if ty == "s8":
        return b.view(np.int8).astype(F64)
    if ty == "u8":
        return b.astype(F64)
    if ty == "e4m3":
        return N.E4M3[b]
    if ty == "e5m2":
        return N.E5M2[b]
    raise KeyError(ty)


def b_mma(cx: Ctx) -> Exec:
    ins = cx.ins
    p = ins.parts
    shape = next((x for x in p if x.startswith("m") and "n" in x and "k" in x), None)
    tys = [x for x in p if x in WIDTH]
    if shape is None or len(tys) != 4 or "sp" in p or "col" not in p or "row" not in p:
        raise cx.bad()
    dty, aty, bty, cty = tys
    if "xor" in p or "and" in p:
        raise cx.bad()
    fm = frag_maps(shape, aty, bty)
    if fm is None:
        raise cx.bad(f"(mma shape {shape} {aty})")
    M, Nn, K, A, B, C = fm
    D, a, b, c = ins.args
    rt = "b64" if aty == "f64" else "b32"
    ra = [cx.rd(o, rt) for o in elements(a)]
    rb = [cx.rd(o, rt) for o in elements(b)]
    eb = 32 // (WIDTH[aty] if aty != "tf32" else 32) if aty != "f64" else 1
    if len(ra) * eb != A[0].shape[1] or len(rb) * eb != B[0].shape[1]:
        raise cx.bad("(fragment register count)")
    cl = elements(c)
    h_c, h_d = cty == "f16", dty == "f16"
    ct = {"f64": "b64"}.get(cty, "b32")
    rc = [cx.rd(o, ct) for o in cl]
    wd = [cx.wr(o, {"f64": "b64"}.get(dty, "b32")) for o in elements(D)]
    ne = C[0].shape[1]
    if len(rc) != (ne // 2 if h_c else ne) or len(wd) != (ne // 2 if h_d else ne):
        raise cx.bad("(accumulator register count)")
    ia = A[0] * K + A[1]
    ib = B[0] * Nn + B[1]
    ic = C[0] * Nn + C[1]
    flops = 2 * M * Nn * K
    satf = "satfinite" in p
    integer = aty in ("s8", "u8")

    def ex(m: Machine, g: Group) -> None:
        ln, s = g.lanes, g.lsel
        W = len(ln) // 32

        def get(rs: list[Reader]) -> list[Array]:
            return [np.broadcast_to(r(m, s), ln.shape).reshape(W, 32) for r in rs]

        av, bv = unpack(get(ra), aty), unpack(get(rb), bty)
        Am = np.empty((W, M * K), F64)
        Bm = np.empty((W, K * Nn), F64)
        Am[:, ia.ravel()] = av.reshape(W, -1)
        Bm[:, ib.ravel()] = bv.reshape(W, -1)
        P = np.matmul(Am.reshape(W, M, K), Bm.reshape(W, K, Nn)).reshape(W, M * Nn)[:, ic.ravel()].reshape(W, 32, ne)
        cw = np.stack(get(rc), axis=-1)
        if h_c:
            cvv = unpack(get(rc), "f16")
        elif cty == "f32":
            cvv = cw.view(F32).astype(F64)
        elif cty == "f64":
            cvv = cw.view(F64)
        else:
            cvv = cw.view(I32).astype(F64)
        R = P + cvv
        if integer:
            q = R.astype(I64)
            if satf:
                q = np.clip(q, -(2**31), 2**31 - 1)
            out = (q & 0xFFFFFFFF).astype(U32)
        elif h_d:
            h = N.d2h(R)
            out = h[..., 0::2].astype(U32) | (h[..., 1::2].astype(U32) << U32(16))
        elif dty == "f32":
            out = N.canon32(R.astype(F32)).view(U32)
        else:
            out = np.ascontiguousarray(R).view(U64)
        for i, w in enumerate(wd):
            w(m, s, np.ascontiguousarray(out[..., i]).ravel())
        m.st.mma_flops += flops * W

    return ex
