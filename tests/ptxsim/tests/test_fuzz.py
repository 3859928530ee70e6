# ruff: noqa: E501  (CUDA and PTX text)
"""Differential fuzzing: the same __host__ __device__ functions run natively on the CPU (compiled by nvcc's host
compiler) and in the emulator must agree bit for bit."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ptxsim
from ptxsim.nvcc import locked, write_atomically
from ptxsim.tests.compiled import CACHE, ptx_of

SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 100))]
N = 160


class Gen:
    def __init__(self, seed: int) -> None:
        self.r = random.Random(seed)

    def c(self, xs: Any) -> str:
        return self.r.choice(xs)

    def expr(self, ty: str, d: Any) -> str:
        r = self.r
        if d <= 0 or r.random() < 0.12:
            if r.random() < 0.25:
                if ty in ("u32", "u64"):
                    return f"(({ty}){r.choice([0, 1, 2, 3, 7, 31, 255, 256, 65535, 0x7FFFFFFF, r.getrandbits(31)])}u)"
                return f"(({ty}){r.choice([0.5, 1.25, -2.0, 3.1415, 1e-3, 100.0, -0.75])})"
            return f"{ {'u32': 'a', 'u64': 'l', 'f32': 'f', 'f64': 'd'}[ty] }[{r.randrange(4)}]"

        def e(t: Any = ty) -> str:
            return self.expr(t, d - 1)

        if ty in ("u32", "u64"):
            s = "int" if ty == "u32" else "long long"
            w = 32 if ty == "u32" else 64
            k = r.randrange(22)
            if k < 3:
                return f"({e()} {self.c(['+', '-', '*'])} {e()})"
            if k < 5:
                return f"({e()} {self.c(['&', '|', '^'])} {e()})"
            if k == 5:
                return f"(~{e()})"
            if k == 6:
                return f"({e()} {self.c(['<<', '>>'])} ({e('u32')} & {w - 1}))"
            if k == 7:
                return f"(({ty})(({s}){e()} >> ({e('u32')} & {w - 1})))"
            if k == 8:
                return f"({e()} {self.c(['/', '%'])} ({e()} | 1u))"
            if k == 9:
                return f"(({ty})((({s}){e()} >> 1) {self.c(['/', '%'])} (({s})({e()} >> 2) + 1)))"
            if k == 10:
                t = self.c(["u32", "u64", "f32", "f64"])
                return f"({e(t)} {self.c(['<', '<=', '>', '==', '!='])} {e(t)} ? {e()} : {e()})"
            if k == 11:
                return f"(({s}){e()} {self.c(['<', '>='])} ({s}){e()} ? {e()} : {e()})"
            if k == 12:
                return f"(({ty})({self.c(['signed char', 'unsigned char', 'short', 'unsigned short'])}){e()})"
            if k == 13:
                return f"(({ty}){e('u64' if ty == 'u32' else 'u32')})"
            if k == 14:
                return f"(({ty})({s}){e('u32') if ty == 'u64' else e('u64')})"
            if k == 15:
                return f"rotl{w}({e()}, {e('u32')})"
            if k == 16:
                return f"mulhi{w}({e()}, {e()})"
            if k == 17:
                return f"bitsel<{ty}>({e()}, {e()}, {e()})"
            if k == 18:
                return f"(({ty})({s})clampf({e('f32')}))"
            if k == 19:
                return f"(({ty})fbits({e('f32')}))"
            if k == 20:
                return f"(({ty})popcnt({e('u32')}) + ({e('u32')} % 7u == 3u))"
            return f"(({ty})tab[{e('u32')} & 15u])"
        k = r.randrange(14)
        m = "f" if ty == "f32" else ""
        if k < 5:
            return f"({e()} {self.c(['+', '-', '*'])} {e()})"
        if k == 5:
            return f"({e()} / ({e()} + ({ty})1.5))"
        if k == 6:
            return f"(-{e()})"
        if k == 7:
            return f"fabs{m}({e()})"
        if k == 8:
            return f"sqrt{m}(fabs{m}({e()}))"
        if k == 9:
            return f"fma{m}({e()}, {e()}, {e()})"
        if k == 10:
            return f"(({ty})({self.c(['int', 'unsigned', 'long long', 'unsigned long long'])}){e('u32' if r.random() < 0.5 else 'u64')} * ({ty})1e-6)"
        if k == 11:
            return f"(({ty}){e('f64' if ty == 'f32' else 'f32')})"
        if k == 12:
            t = self.c(["u32", "f32", "f64"])
            return f"({e(t)} {self.c(['<', '>=', '!='])} {e(t)} ? {e()} : {e()})"
        return f"{self.c(['floor', 'ceil', 'trunc', 'rint'])}{m}({e()})"

    def stmt(self, d: Any) -> str:
        r = self.r
        ty = self.c(["u32", "u32", "u64", "f32", "f64"])
        v = f"{ {'u32': 'a', 'u64': 'l', 'f32': 'f', 'f64': 'd'}[ty] }[{r.randrange(4)}]"
        k = r.randrange(9)
        if d <= 0 or k < 4:
            return f"{v} = {self.expr(ty, 3)};"

        def body(n: int) -> str:
            return " ".join(self.stmt(d - 1) for _ in range(n))

        if k == 4:
            return f"if ({self.expr('u32', 2)} & {r.randrange(1, 9)}u) {{ {body(2)} }} else {{ {body(1)} }}"
        if k == 5:
            return f"for (u32 i{d} = 0; i{d} < ({self.expr('u32', 1)} & 7u); i{d}++) {{ {body(2)} }}"
        if k == 6:
            cs = " ".join(
                f"case {i}: {body(1)} {'break;' if r.random() < 0.8 else ''}" for i in range(r.randrange(3, 8))
            )
            return f"switch ({self.expr('u32', 2)} & 7u) {{ {cs} default: {body(1)} }}"
        if k == 7:
            return f"{{ u32 t[8]; for (int q = 0; q < 8; q++) t[q] = a[q & 3] * (q + 1u); t[{self.expr('u32', 1)} & 7u] ^= {self.expr('u32', 1)}; a[{r.randrange(4)}] = t[{self.expr('u32', 1)} & 7u] + t[3]; }}"
        return f"{v} = {self.expr(ty, 5)};"

    def program(self) -> str:
        fs = []
        for i in range(4):
            fs.append(
                f"__host__ __device__ __noinline__ void fn{i}(u32* a, u64* l, f32* f, f64* d, const u32* tab) {{ "
                + " ".join(self.stmt(2) for _ in range(6))
                + " }"
            )
        return "\n".join(fs)


PRE = r"""
#include <cstdio>
#include <cstring>
#include <cmath>
typedef unsigned u32; typedef unsigned long long u64; typedef float f32; typedef double f64;
#define HD __host__ __device__
HD inline u32 rotl32(u32 x, u32 n) { n &= 31; return n ? (x << n) | (x >> (32 - n)) : x; }
HD inline u64 rotl64(u64 x, u32 n) { n &= 63; return n ? (x << n) | (x >> (64 - n)) : x; }
HD inline u32 mulhi32(u32 a, u32 b) { return (u32)(((u64)a * b) >> 32); }
HD inline u64 mulhi64(u64 a, u64 b) { return (u64)(((unsigned __int128)a * b) >> 64); }
template <typename T> HD inline T bitsel(T m, T a, T b) { return (m & a) | (~m & b); }
HD inline float clampf(float x) { return x > -1e9f ? (x < 1e9f ? x : 1e9f) : -1e9f; }
HD inline u32 fbits(float x) { if (x != x) return 7u; u32 r; memcpy(&r, &x, 4); return r; }
HD inline u32 popcnt(u32 x) { u32 c = 0; while (x) { x &= x - 1; c++; } return c; }
"""
POST = r"""
struct Rec { u32 a[4]; u32 pad[4]; u64 l[4]; f32 f[4]; f64 d[4]; };
HD inline void run(Rec& r, const u32* tab) { fn0(r.a, r.l, r.f, r.d, tab); fn1(r.a, r.l, r.f, r.d, tab); fn2(r.a, r.l, r.f, r.d, tab); fn3(r.a, r.l, r.f, r.d, tab); }
__global__ void kern(Rec* r, const u32* tab, int n) { int i = blockIdx.x * blockDim.x + threadIdx.x; if (i < n) { Rec t = r[i]; run(t, tab); r[i] = t; } }
#ifndef __CUDA_ARCH__
int main(int argc, char** argv) {
  FILE* f = fopen(argv[1], "rb"); u32 tab[16]; int n; fread(&n, 4, 1, f); fread(tab, 4, 16, f);
  Rec* r = new Rec[n]; fread(r, sizeof(Rec), n, f); fclose(f);
  for (int i = 0; i < n; i++) run(r[i], tab);
  f = fopen(argv[2], "wb"); fwrite(r, sizeof(Rec), n, f); fclose(f); }
#endif
"""
REC = np.dtype([("a", "<u4", 4), ("pad", "<u4", 4), ("l", "<u8", 4), ("f", "<f4", 4), ("d", "<f8", 4)])


def host_exe(src: str, seed: int) -> str:
    h = hashlib.sha256(src.encode()).hexdigest()[:16]
    exe = os.path.join(CACHE, f"fuzz_{h}")
    os.makedirs(CACHE, exist_ok=True)
    with locked(exe):
        if not os.path.exists(exe):
            write_atomically(f"{exe}.cu", src)
            plain = ["-O1", "-std=c++17", "-ffp-contract=off", "-fno-strict-aliasing", "-w"]
            as_host = ["-x", "c++", "-D__host__=", "-D__device__="]
            subprocess.run(["g++", *plain, *as_host, "-o", f"{exe}.part", f"{exe}.cu"], check=True)
            os.replace(f"{exe}.part", exe)
    return exe


@pytest.mark.parametrize("seed", SEEDS)
def test_fuzz(arch: str, seed: int, tmp_path: Path) -> None:
    g = Gen(seed)
    body = g.program()
    src = PRE + body + POST
    hsrc = (
        src.replace("__global__ void kern", "static void kern")
        .replace("int i = blockIdx.x * blockDim.x + threadIdx.x;", "int i = 0;")
        .replace("__noinline__", "")
    )
    exe = host_exe(hsrc, seed)
    rng = np.random.default_rng(seed)
    rec = np.zeros(N, REC)
    rec["a"] = rng.integers(0, 2**32, (N, 4))
    rec["a"][::3] &= 0xFF
    rec["l"] = rng.integers(0, 2**63, (N, 4))
    rec["l"][::2] >>= np.uint64(40)
    rec["f"] = rng.standard_normal((N, 4)) * np.exp2(rng.uniform(-8, 8, (N, 4)))
    rec["d"] = rng.standard_normal((N, 4)) * np.exp2(rng.uniform(-8, 8, (N, 4)))
    tab = rng.integers(0, 2**32, 16, dtype=np.uint64).astype(np.uint32)
    fi, fo = str(tmp_path / "in"), str(tmp_path / "out")
    with open(fi, "wb") as f:
        f.write(np.int32(N).tobytes() + tab.tobytes() + rec.tobytes())
    subprocess.run([exe, fi, fo], check=True)
    ref = np.fromfile(fo, REC)
    mod = ptxsim.load(ptx_of(src=src, arch=arch, flags=("-fmad=false", "-w")))
    out = rec.copy()
    mod.launch("kern", -(-N // 64), 64, [out, tab, N])
    for k in ("a", "l"):
        assert (out[k] == ref[k]).all(), (k, np.argwhere(out[k] != ref[k])[:4])
    for k in ("f", "d"):
        x, y = out[k], ref[k]
        bad = ~((x == y) & (np.signbit(x) == np.signbit(y)) | (np.isnan(x) & np.isnan(y)))
        assert not bad.any(), (k, np.argwhere(bad)[:4], x[bad][:4], y[bad][:4])
