# ruff: noqa: E501  (CUDA and PTX text)
"""Hand written PTX: parser corners and instructions nvcc rarely emits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ptxsim

HEAD = ".version 9.0\n.target sm_90\n.address_size 64\n"


def kern(
    body: str,
    decl: Any = "",
    params: Any = ".param .u64 p0",
    n: int = 32,
    out: Any = None,
    args: Any = (),
    pre: Any = "",
) -> Any:
    txt = (
        HEAD
        + decl
        + f"""
.visible .entry k({params})
{{
 .reg .pred %p<9>; .reg .b16 %h<9>; .reg .b32 %r<40>; .reg .f32 %f<20>; .reg .b64 %d<20>; .reg .f64 %g<4>;
 ld.param.u64 %d0, [p0];
 cvta.to.global.u64 %d0, %d0;
 mov.u32 %r0, %tid.x;
 mul.wide.u32 %d1, %r0, 8;
 add.s64 %d1, %d0, %d1;   // out + 8*tid
{body}
 ret;
}}
"""
    )
    mod = ptxsim.load(txt)
    o = mod.mem.alloc(n, np.uint64)
    mod.launch("k", 1, n, [o, *args])
    return o, mod


def test_initialisers_and_directives() -> None:
    decl = """
.global .align 4 .u32 a[2][3] = {{1, -2, 0x10}, {4, 5}};
.global .align 8 .u64 ptrs[3] = {a, generic(a)+8, fn};
.global .align 1 .b8 bytes[9] = {0xFF(a), 0xFF00(a), 7, 0b101, 017};
.const .align 8 .f64 dd[2] = {0d3FF0000000000000, 2.5};
.global .f32 ff = 0f40400000;
.global .align 16 .v4 .f32 vv;
.visible .func (.param .b32 r) fn (.param .b32 x)
{ .reg .b32 t; ld.param.b32 t, [x]; add.s32 t, t, 100; st.param.b32 [r], t; ret; }
.section .debug_str { .b8 65,66,0
 L: .b32 7 }
"""
    body = """
 .loc 1 3 0
 .pragma "nounroll";
 mov.u64 %d2, ptrs; ld.global.u64 %d3, [%d2+8]; ld.global.u32 %r1, [%d3]; ld.global.s32 %d4, [a+4];
 { .reg .b32 %r1; mov.b32 %r1, 55; bra L1; mov.b32 %r1, 66; L1: cvt.u64.u32 %d5, %r1; }
 { bra L1; L1: mov.u32 %r3, 3; }
 ld.global.u64 %d6, [ptrs+16];
 { .param .b32 pa; .param .b32 re; st.param.b32 [pa], %r0; pr: .callprototype (.param .b32 _) _ (.param .b32 _); call (re), %d6, (pa), pr; ld.param.b32 %r4, [re]; }
 ld.const.f64 %g0, [dd+8]; cvt.rzi.u32.f64 %r5, %g0; ld.global.f32 %f0, [ff]; cvt.rni.u32.f32 %r6, %f0;
 ld.global.u8 %r7, [bytes+4];
 add.u32 %r1, %r1, %r3; add.u32 %r1, %r1, %r4; add.u32 %r1, %r1, %r5; add.u32 %r1, %r1, %r6; add.u32 %r1, %r1, %r7;
 cvt.u64.u32 %d7, %r1; add.s64 %d7, %d7, %d4; add.s64 %d7, %d7, %d5;
 st.global.u64 [%d1], %d7;"""
    o, mod = kern(body, decl)
    # a[0][2]=16 + 3 + (tid+100) + 2 + 3 + 15 + (-2) + 55
    assert (o == 16 + 3 + np.arange(32) + 100 + 2 + 3 + 15 - 2 + 55).all()
    b = mod.get_global("bytes")
    a = mod.vars["a"].addr
    assert list(b[:5]) == [a & 255, a >> 8 & 255, 7, 5, 15]
    assert list(mod.get_global("a", np.int32)) == [1, -2, 16, 4, 5, 0]


def test_unsupported_and_errors() -> None:
    bad = HEAD + ".visible .entry k()\n{ .reg .b32 %r<3>;\n mov.u32 %r1, %tid.x;\n frob.u32 %r1, %r1;\n ret; }"
    m = ptxsim.load(bad)
    with pytest.raises(ptxsim.UnsupportedError, match=r"line 7.*frob"):
        m.launch("k", 1, 32, [])
    m = ptxsim.load(bad, strict=False)
    with pytest.raises(ptxsim.UnsupportedError, match=r"line 7.*frob"):
        m.launch("k", 1, 32, [])
    with pytest.raises(ptxsim.PtxParseError, match="line 5"):
        ptxsim.load(HEAD + ".visible .entry k()\n{ mov.u32 %zz, 3; }").launch("k", 1, 32, [])


def test_b128_and_vectors() -> None:
    body = """
 .reg .b128 %q<2>;
 mul.wide.u32 %d2, %r0, 16; add.s64 %d2, %d0, %d2;
 ld.global.v2.u64 {%d3, %d4}, [%d2]; mov.b128 %q0, {%d4, %d3}; bar.sync 0; st.global.b128 [%d2], %q0;
 bar.sync 0; ld.global.b128 %q1, [%d2]; mov.b128 {%d5, %d6}, %q1; add.u64 %d5, %d5, 1; bar.sync 0; st.global.v2.b64 [%d2], {%d5, %d6};"""
    txt = (
        HEAD
        + ".visible .entry k(.param .u64 p0)\n{ .reg .b32 %r<4>; .reg .b64 %d<9>;\n ld.param.u64 %d0, [p0]; mov.u32 %r0, %tid.x;"
        + body
        + "ret; }"
    )
    m = ptxsim.load(txt)
    o = m.mem.alloc(64, np.uint64)
    o[:] = np.arange(64)
    m.launch("k", 1, 32, [o])
    i = np.arange(32)
    assert (o[0::2] == 2 * i + 2).all()
    assert (o[1::2] == 2 * i).all()


def test_predicated_and_misc() -> None:
    body = """
 setp.lt.u32 %p1|%p2, %r0, 10; mov.u64 %d2, 0;
 @%p1 add.u64 %d2, %d2, 1; @!%p1 add.u64 %d2, %d2, 2; @%p2 add.u64 %d2, %d2, 4;
 and.pred %p3, %p1, %p2; or.pred %p3, %p3, %p1; not.pred %p4, %p3; xor.pred %p5, %p4, %p1; selp.u64 %d3, 8, 16, %p5; add.u64 %d2, %d2, %d3;
 vote.sync.ballot.b32 %r1, !%p1, 0xffffffff; cvt.u64.u32 %d4, %r1; shl.b64 %d4, %d4, 8; add.u64 %d2, %d2, %d4;
 createpolicy.fractional.L2::evict_last.b64 %d5, 1.0; prefetch.global.L2 [%d0]; fence.proxy.async; membar.gl; griddepcontrol.wait;
 isspacep.global %p6, %d0; @%p6 add.u64 %d2, %d2, 1099511627776; isspacep.shared %p7, %d0; @%p7 mov.u64 %d2, 0;
 st.global.L1::no_allocate.L2::cache_hint.u64 [%d1], %d2, %d5;"""
    o, _ = kern(body)
    i = np.arange(32)
    e = np.where(i < 10, 1, 6) + 8 + (0xFFFFFC00 << 8) + 2**40
    assert (o == e).all()


def test_trace_and_uniform_constant_store() -> None:
    seen = []
    txt = (
        HEAD
        + ".visible .entry k(.param .u64 p0)\n{ .reg .b64 %d<3>;\n ld.param.u64 %d1, [p0];\n st.global.f32 [%d1], 0f3F800000;\n st.global.v2.u32 [%d1+8], {1, 0x2};\n exit; }"
    )
    m = ptxsim.load(txt)
    o = m.mem.alloc(4, np.uint32)
    m.launch("k", 1, 1, [o], trace=lambda ins, lanes: seen.append((ins.op, len(lanes))))
    assert list(o) == [0x3F800000, 0, 1, 2]
    assert seen == [("ld.param.u64", 1), ("st.global.f32", 1), ("st.global.v2.u32", 1), ("exit", 1)]


LAZY = (
    HEAD
    + """
.global .align 4 .b8 table[4] = {1, 2, 3, 4};  // braces { of data
.func (.param .b32 r) twice(.param .b32 a);
.visible .entry unused() { this is no instruction; }
.visible .entry k(
\t.param .u64 p0
)
.maxntid 32, 1, 1
{
\t.reg .b32 %r<4>; .reg .b64 %d<4>;
\tld.param.u64 %d0, [p0];
\t{
\t.reg .b32 %t;
\tmov.u32 %t, %tid.x;
\tadd.s32 %r1, %t, 1;
\t}
\tmul.wide.u32 %d1, %r1, 4;
\tadd.s64 %d2, %d0, %d1;
\tst.global.u32 [%d2+-4], %r1;
\tret;
}
"""
)


def test_lazy_module_parses_what_it_runs_and_can_forget_it() -> None:
    mod = ptxsim.load(LAZY, lazy=True)
    assert [list(mod.kernels), mod.kernels["k"].attrs["maxntid"]] == [["unused", "k"], [32, 1, 1]]
    assert not mod.funcs["twice"].defined
    for _ in range(2):
        out = mod.mem.alloc(32, np.int32)
        mod.launch("k", 1, 32, [out])
        assert out.tolist() == list(range(1, 33))
        assert "st.global" in (mod.funcs["k"].body or [])[-2].text
        assert LAZY.split("\n")[(mod.funcs["k"].body or [])[-2].line - 1].startswith("\tst.global")
        assert mod.funcs["k"].parsed
        mod.forget()
        assert not mod.funcs["k"].parsed
    with pytest.raises(ptxsim.PtxParseError, match=r"unknown|expected"):
        mod.launch("unused", 1, 32, [])
    with pytest.raises(ptxsim.PtxParseError):
        ptxsim.load(LAZY)
