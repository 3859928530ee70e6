"""The list of floating point instructions without a rounding modifier."""

from __future__ import annotations

import pytest

import ptxsim
from ptxsim.tests.compiled import ptx_of

SRC = r"""
#include <cuda_fp16.h>
__device__ __noinline__ float helper(float a, float b) { return a * b; }
__global__ void loose(float* x, double* y, __half* h, float s) {
  x[0] = x[1] * s; y[0] = y[1] - y[2]; h[0] = h[1] * h[2]; }
__global__ void tight(float* x, double* y, float s) {
  x[0] = __fadd_rn(__fmul_rn(x[1], s), x[2]); x[3] = __fmaf_rn(x[4], x[5], s); x[6] = __fadd_rz(s, x[7]) / s;
  y[0] = __dadd_rn(__dmul_rn(y[1], y[2]), y[3]); }
__global__ void calls(float* x) { x[0] = helper(x[1], x[2]); }
"""


def test_compiled_kernels(arch: str) -> None:
    """With -fmad=true nvcc leaves the choice to ptxas; -fmad=false writes .rn, but not into asm of half products."""
    may_fuse = ptx_of(src=SRC, arch=arch)
    for kernel, ops in (("loose", ["mul.f32", "sub.f64", "mul.f16"]), ("tight", []), ("calls", ["mul.f32"])):
        found = ptxsim.unrounded(may_fuse, kernel)
        assert [op in s for op, s in zip(ops, found, strict=True)] == [True] * len(ops)
    assert all(".cu:" in s for s in ptxsim.unrounded(may_fuse, "calls"))
    exact = ptx_of(src=SRC, arch=arch, flags=("-fmad=false",))
    assert ["mul.f16" in s for s in ptxsim.unrounded(exact)] == [True]


HEAD = ".version 8.0\n.target sm_80\n.address_size 64\n"


@pytest.mark.parametrize(
    ("ins", "found"),
    [
        ("mul.f32 %f1, %f2, %f3", True),
        ("mul.rn.f32 %f1, %f2, %f3", False),
        ("add.ftz.f32 %f1, %f2, %f3", True),
        ("sub.rz.ftz.f32 %f1, %f2, %f3", False),
        ("fma.rn.f32 %f1, %f2, %f3, %f1", False),
        ("mul.f64 %d1, %d2, %d3", True),
        ("add.rm.f64 %d1, %d2, %d3", False),
        ("add.f16 %h1, %h2, %h3", True),
        ("mul.rn.bf16 %h1, %h2, %h3", False),
        ("sub.f16x2 %r1, %r2, %r3", True),
        ("add.s32 %r1, %r2, %r3", False),
        ("mul.lo.s32 %r1, %r2, %r3", False),
        ("mad.lo.u32 %r1, %r2, %r3, %r1", False),
        ("neg.f32 %f1, %f2", False),
    ],
)
def test_modifiers(ins: str, found: bool) -> None:
    regs = ".reg .f32 %f<4>; .reg .f64 %d<4>; .reg .b16 %h<4>; .reg .b32 %r<4>; "
    text = f"{HEAD}.visible .entry k()\n{{ {regs}\n {ins};\n ret; }}\n.visible .entry other()\n{{ ret; }}"
    got = ptxsim.unrounded(text, "k")
    assert len(got) == found
    assert all("k: line 6" in s and ins in s for s in got)
    assert ptxsim.unrounded(text) == got
    assert not ptxsim.unrounded(text, "other")


def test_callees_count() -> None:
    fn = "(.param .b32 r) f (.param .b32 a)\n{ .reg .f32 %f<3>;\n ld.param.f32 %f1, [a];\n"
    fn += " mul.f32 %f2, %f1, %f1;\n st.param.f32 [r], %f2; ret; }\n"
    call = "{ .param .b32 p; .param .b32 q; st.param.f32 [p], 0f3F800000; call (q), f, (p); }"
    text = f"{HEAD}.func {fn}.visible .entry k()\n{{ {call}\n ret; }}\n.visible .entry other()\n{{ ret; }}"
    mod = ptxsim.load(text)
    assert ["mul.f32" in s for s in ptxsim.unrounded(mod, "k")] == [True]
    assert ptxsim.unrounded(mod, "other") == []
