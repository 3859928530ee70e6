"""Integer and bit instructions against plain Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ptxsim
from ptxsim.tests.compiled import mod_of

rng = np.random.default_rng(4)


@pytest.fixture
def mod(arch: str) -> ptxsim.Module:
    return mod_of("num", arch)


def test_bits(mod: ptxsim.Module) -> None:
    n = 1024
    a, b, c = [rng.integers(0, 2**32, n, dtype=np.uint64).astype(np.uint32) for _ in range(3)]
    b[::3] &= 63
    c[::2] &= 63
    c[::5] &= 31
    a[:4] = [0, 0xFFFFFFFF, 0x80000000, 1]
    b[1:3] = [0, 0xFFFFFFFF]
    o = np.zeros((64, n), np.uint32)
    mod.launch("bits", n // 128, 128, [a, b, c, o, n])
    M = 0xFFFFFFFF

    def S(v: Any) -> Any:
        return v - (1 << 32) if v >> 31 else v

    def rev(v: Any) -> Any:
        return int(f"{v:032b}"[::-1], 2)

    def clamp(v: Any, lo: Any, hi: Any) -> Any:
        return max(lo, min(hi, v))

    def sx(v: Any, w: Any) -> Any:
        return ((v & ((1 << w) - 1)) ^ (1 << (w - 1))) - (1 << (w - 1))

    def bfe(x: Any, y: Any, z: Any, s: Any) -> Any:
        pos, ln = y & 0xFF, z & 0xFF
        sb = 0 if (not s or ln == 0) else x >> min(pos + ln - 1, 31) & 1
        return sum((((x >> (pos + i)) & 1) if (i < ln and pos + i <= 31) else sb) << i for i in range(32))

    def bfi(x: Any, f: Any, pos: Any, ln: Any) -> Any:
        pos, ln = pos & 0xFF, ln & 0xFF
        for i in range(ln):
            if pos + i > 31:
                break
            f = (f & ~(1 << (pos + i))) | ((x >> i & 1) << (pos + i))
        return f & M

    def prmt(x: Any, y: Any, z: Any, mode: str | None) -> Any:
        v = [(x | y << 32) >> (8 * k) & 0xFF for k in range(8)]
        if mode is None:
            r = 0
            for i in range(4):
                s = z >> (4 * i) & 15
                q = v[s & 7]
                if s & 8:
                    q = 0xFF if q & 0x80 else 0
                r |= q << (8 * i)
            return r
        k = z & 3
        tab = {
            "f4e": [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5], [3, 4, 5, 6]],
            "b4e": [[0, 7, 6, 5], [1, 0, 7, 6], [2, 1, 0, 7], [3, 2, 1, 0]],
            "rc8": [[i] * 4 for i in range(4)],
            "ecl": [[0, 1, 2, 3], [1, 1, 2, 3], [2, 2, 2, 3], [3, 3, 3, 3]],
            "ecr": [[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 2, 2], [0, 1, 2, 3]],
            "rc16": [[0, 1, 0, 1], [2, 3, 2, 3], [0, 1, 0, 1], [2, 3, 2, 3]],
        }[mode][k]
        return sum(v[t] << (8 * i) for i, t in enumerate(tab))

    def lop3(x: Any, y: Any, z: Any, t: Any) -> Any:
        return sum((t >> ((x >> i & 1) * 4 + (y >> i & 1) * 2 + (z >> i & 1)) & 1) << i for i in range(32))

    def fu(x: Any) -> Any:
        return x.bit_length() - 1 if x else M

    def f24(v: Any) -> Any:
        return sx(v, 24)

    def byt(v: Any, i: Any) -> Any:
        return v >> (8 * i) & 0xFF

    for i in range(n):
        x, y, z = int(a[i]), int(b[i]), int(c[i])
        v = y << 32 | x
        zc = min(z, 32)
        sX, sY, sZ = S(x), S(y), S(z)
        mh = (sX * sY) >> 32
        e = [bfe(x, y, z, 0), bfe(x, y, z, 1), bfi(x, z, y, 9), bfi(x, y, 5, z), prmt(x, y, z, None)]
        e += [prmt(x, y, z, m) for m in ("f4e", "b4e", "rc8", "ecl", "ecr", "rc16")]
        e += [
            (v << (z & 31)) >> 32 & M,
            v >> (z & 31) & M,
            (v << zc) >> 32 & M,
            v >> zc & M,
            lop3(x, y, z, 0x1B),
            lop3(x, y, z, 0xE8),
            0 if z > 31 else x << z & M,
            0 if z > 31 else x >> z,
            (sX >> min(z, 31)) & M,
        ]
        e += [
            bin(x).count("1"),
            32 - y.bit_length(),
            rev(x),
            fu(y),
            fu(x if sX >= 0 else ~x & M),
            (31 - fu(y)) if y else M,
        ]
        e += [
            (z + abs(sX - sY)) & M,
            (z + abs(x - y)) & M,
            (f24(x) * f24(y)) & M,
            ((((x & 0xFFFFFF) * (y & 0xFFFFFF)) >> 16) + z) & M,
        ]
        e += [
            (sZ + sum(sx(byt(x, k), 8) * byt(y, k) for k in range(4))) & M,
            (z + sum(byt(x, k) * byt(y, k) for k in range(4))) & M,
            (sZ + sum(sx(x >> (16 * k) & 0xFFFF, 16) * sx(byt(y, k + 2), 8) for k in range(2))) & M,
        ]
        e += [
            clamp(sX + sY, -(2**31), 2**31 - 1) & M,
            clamp(sX - sY, -(2**31), 2**31 - 1) & M,
            (mh + sZ) & M,
            (x * y) >> 32,
            clamp(mh + sZ, -(2**31), 2**31 - 1) & M,
        ]
        e += [x if sZ >= 0 else y, int(y == 0), min(sX, sY) & M, max(x, y), (-sX if sX < 0 else sX) & M, -sX & M]

        def u8(q: Any) -> Any:
            return clamp(S(q), 0, 255)

        def s16(q: Any) -> Any:
            return clamp(S(q), -32768, 32767) & 0xFFFF

        e += [
            clamp(sX, -128, 127) & M,
            clamp(sX, 0, 65535),
            sx(x, 8) & M,
            (z << 16 | u8(x) << 8 | u8(y)) & M,
            s16(x) << 16 | s16(y),
        ]
        lane = x + y
        h = (z + (lane >> 32)) & M
        lane &= M
        l2 = (lane - z) & M
        h2 = (h - x - (1 if lane < z else 0)) & M
        e += [l2 ^ h2]
        p = x * y
        lo = (p & M) + z
        e += [(lo & M) ^ (((p >> 32) + z + (lo >> 32)) & M)]

        def bm(pos: Any, ln: Any) -> Any:
            return 0 if pos > 31 else (((1 << min(ln, 32)) - 1) << pos) & M

        e += [bm(x, z), bm(x & 31, z & 31)]
        nz = min(z, 32)
        e += [(sx(x, nz) & M) if 0 < nz < 32 else (0 if nz == 0 else x), x & ((1 << (z & 31)) - 1)]
        lane, hh = x & 0xFFFF, x >> 16
        e += [hh | ((lane * hh + lane) & 0xFFFF) << 16]
        sv = v - (1 << 64) if v >> 63 else v
        e += [(sv >> min(z, 63)) & M, (sx(x, 16) * sx(y, 16) + z) & M]
        got = [int(q) for q in o[: len(e), i]]
        assert got == [q & M for q in e], (i, [k for k in range(len(e)) if got[k] != e[k] & M], hex(x), hex(y), hex(z))


# ------------------------------------------------------------------ numerics unit tests
def test_bits64(mod: ptxsim.Module) -> None:
    n = 512
    x, y = [rng.integers(0, 2**64, n, dtype=np.uint64) for _ in range(2)]
    p, q = [rng.integers(0, 80, n).astype(np.uint32) for _ in range(2)]
    p[::7] = rng.integers(0, 2**32, len(p[::7]))
    x[:5] = [0, 2**64 - 1, 2**63, 1, 2**63 - 1]
    y[:3] = [0, 5, 2**64 - 1]
    x[10:60] >>= rng.integers(0, 60, 50).astype(np.uint64)
    o = np.zeros((40, n), np.uint64)
    mod.launch("bits64", 4, 128, [x, y, p, q, o, n])
    M = (1 << 64) - 1

    def S(v: Any, w: Any = 64) -> Any:
        return v - (1 << w) if v >> (w - 1) else v

    for i in range(n):
        a, b, c, d = int(x[i]), int(y[i]), int(p[i]), int(q[i])
        pos, ln = c & 255, d & 255
        sb = a >> min(pos + ln - 1, 63) & 1 if ln else 0

        def be(s: int, a: int = a, pos: int = pos, ln: int = ln) -> int:
            return sum((((a >> (pos + k)) & 1) if (k < ln and pos + k <= 63) else s) << k for k in range(64))

        f = b
        for k in range(ln):
            if pos + k > 63:
                break
            f = f & ~(1 << (pos + k)) | (a >> k & 1) << (pos + k)
        sa, sb_ = S(a), S(b)
        e = [be(0), be(sb), f, a << c if c < 64 else 0, a >> c if c < 64 else 0, sa >> min(c, 63)]
        m1 = 0xFFFFFFFF
        na = a if sa >= 0 else ~a & M
        e += [
            a.bit_length() - 1 if a else m1,
            na.bit_length() - 1 if na else m1,
            64 - b.bit_length(),
            min(sa, sb_),
            max(a, b),
            (sa * sb_) >> 64,
            a * b + a,
            c * d,
            S(c, 32) * S(d, 32),
            S(c, 32) * S(d, 32) + a,
        ]
        lane = a + b
        e += [(lane & M) ^ ((a + b + (lane >> 64)) & M), ((a - b) & M) ^ ((b - a - (a < b)) & M), (a << 32 | a >> 32)]
        h = [a >> (16 * k) & 0xFFFF for k in range(4)]
        e += [h[3] | h[0] << 16 | h[2] << 32 | h[1] << 48, abs(sa)]
        qt = abs(sa) // 1000 * (1 if sa >= 0 else -1)
        c16 = c & 0xFFFF
        e += [
            qt,
            sa - qt * 1000,
            (c16 << d) & 0xFFFF if d < 16 else 0,
            S(c16, 16) >> min(d, 15),
            a if sa < sb_ else b,
            max(sa, 0),
            max(-(2**31), min(2**31 - 1, sa)),
            S(a & 255, 8),
            ((a * b) >> 64) + a,
        ]
        got = [int(v) for v in o[: len(e), i]]
        assert got == [v & M for v in e], (i, [k for k in range(len(e)) if got[k] != e[k] & M], hex(a), hex(b), c, d)
