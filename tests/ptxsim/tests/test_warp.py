from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ptxsim
from ptxsim.tests.compiled import mod_of

rng = np.random.default_rng(1)


@pytest.fixture
def mod(arch: str) -> ptxsim.Module:
    return mod_of("warp", arch)


@pytest.mark.parametrize("w", [32, 16, 8, 2])
@pytest.mark.parametrize("d", [1, 3, 7, 16])
def test_shfl(mod: ptxsim.Module, w: Any, d: Any) -> None:
    n = 96
    x = rng.integers(0, 1000, n).astype(np.int32)
    o = np.zeros((5, n), np.int32)
    mod.launch("k_shfl", 1, n, [x, o, d, w])
    for t in range(n):
        b = t // w * w
        lane = t - b
        assert o[0, t] == x[b + d % w]
        assert o[1, t] == x[t - d if lane - d >= 0 else t]
        assert o[2, t] == x[t + d if lane + d < w else t]
        if d < w:
            assert o[3, t] == x[b + (lane ^ d)]
        assert o[4, t] == x[b + (x[t] & 63) % w]


def test_shfl_pred(mod: ptxsim.Module) -> None:
    n = 64
    x = rng.integers(0, 1000, n).astype(np.int32)
    o = np.zeros((2, n), np.int32)
    mod.launch("k_shfl_pred", 1, n, [x, o])
    for t in range(n):  # segment mask 0x18 -> width 8, clamp 0x1f
        lane = t % 8
        ok = lane + 5 < 8
        assert o[1, t] == ok
        assert o[0, t] == x[t + 5 if ok else t]


def test_vote_match_redux(mod: ptxsim.Module) -> None:
    n = 64
    for hi in (10, 100):
        x = rng.integers(0, hi, n).astype(np.int32)
        o = np.zeros((14, n), np.uint32)
        mod.launch("k_vote", 1, n, [x, o])
        for w in range(2):
            s = slice(w * 32, w * 32 + 32)
            v = x[s].astype(np.int64)

            def bits(p: Any) -> Any:
                return sum(1 << i for i in range(32) if p[i])

            assert (o[0, s] == bits(v & 1)).all()
            assert (o[1, s] == (v == 3).any()).all()
            assert (o[2, s] == (v < 90).all()).all()
            assert (o[3, s] == [bits(v % 5 == q % 5) for q in v]).all()
            al = len(set(v // 100)) == 1
            assert (o[4, s] == (0xFFFFFFFF if al else 0)).all()
            assert (o[5, s] == al).all()
            assert (o[6, s] == v.sum()).all()
            assert (o[7, s].astype(np.int32) == (-v).min()).all()
            assert (o[8, s] == v.max()).all()
            r = np.bitwise_xor.reduce(v) + np.bitwise_or.reduce(v) * 256 + np.bitwise_and.reduce(v | 8) * 65536
            assert (o[9, s] == r).all()
            assert (o[10, s] == [0xFFFFFFFF ^ i for i in range(32)]).all()
            odd = bits(v & 1)
            ok = [(q == (odd if v[i] & 1 else ~odd & 0xFFFFFFFF)) or q == 0xFFFFFFFF for i, q in enumerate(o[11, s])]
            assert all(ok)
            assert (o[12, s] == [bits((v % 3 == 0) & (v % 2 == 1)) if q % 3 == 0 else 0 for q in v]).all()
            for i in range(32):
                tl = v[i // 8 * 8 : i // 8 * 8 + 8]
                assert o[13, w * 32 + i] == tl[(i % 8) ^ 3] + (tl == 7).any() * 1000 + (i % 8) * 10000


def test_halves(mod: ptxsim.Module) -> None:
    o = np.zeros(64, np.int32)
    mod.launch("k_halves", 1, 64, [o])
    v = np.arange(64) * 3
    for w in range(2):
        assert (o[w * 32 : w * 32 + 16] == v[w * 32 : w * 32 + 16].sum()).all()
        assert (o[w * 32 + 16 : w * 32 + 32] == -v[w * 32 + 16 : w * 32 + 32].sum()).all()


def test_divergence(mod: ptxsim.Module) -> None:
    n = 128
    x = rng.integers(0, 200, n).astype(np.int32)
    o = np.zeros(n, np.int32)
    r = mod.launch("k_diverge", 1, n, [o, x])

    def f(t: Any, v: Any) -> Any:
        s = 0
        i = 0
        while i < v:
            if (i ^ t) & 1:
                s += i
            else:
                s -= 1
                if s < -20:
                    break
            while s > 1000:
                s //= 3
            i += 1
        return s

    ref = np.array([f(t, int(x[t])) for t in range(n)])
    assert (o == ref[np.arange(n) ^ 1]).all()
    assert r["divergent_branches"] > 0
    assert r["simt_efficiency"] < 1


def test_spinlock_forward_progress(mod: ptxsim.Module) -> None:
    lock, cnt = np.zeros(1, np.int32), np.zeros(1, np.int32)
    mod.launch("k_spin", 2, 64, [lock, cnt])
    assert cnt[0] == 128
    assert lock[0] == 0


def test_cooperative_wait(mod: ptxsim.Module) -> None:
    f, o = np.zeros(1, np.int32), np.zeros(32, np.int32)
    mod.launch("k_grid_wait", 2, 32, [f, o], cooperative=True)
    assert (o == 42).all()
    f[0] = 0
    with pytest.raises(ptxsim.StepLimitError):
        mod.launch("k_grid_wait", 2, 32, [f, o], ctas_per_chunk=1, max_steps=20000)


def test_grid_sync(mod: ptxsim.Module) -> None:
    n = 5 * 96
    o, p = np.zeros(n, np.int32), np.zeros(n, np.int32)
    mod.launch("k_gridsync", 5, 96, [o, p], cooperative=True)
    r = (np.arange(n) + 100) % n
    assert (o == 2 * (n - 1 - r)).all()
    with pytest.raises(ptxsim.TrapError):
        mod.launch("k_gridsync", 5, 96, [o, p])


def test_named_barriers(mod: ptxsim.Module) -> None:
    o = np.zeros((4, 64), np.int32)
    r = mod.launch("k_named", 1, 128, [o])
    for it in range(4):
        assert (o[it] == it * 1000 + (np.arange(64) ^ 1)).all()
    assert r["barriers"] == 8


def test_barrier_reductions(mod: ptxsim.Module) -> None:
    x = rng.integers(0, 100, 256).astype(np.int32)
    o = np.zeros(256, np.int32)
    mod.launch("k_barred", 1, 256, [x, o])
    assert (o == (x > 50).sum() * 100 + 10 + int((x == 77).any())).all()


def test_mbarrier(mod: ptxsim.Module) -> None:
    o = np.zeros((3, 128), np.int32)
    mod.launch("k_mbar", 2, 128, [o], ctas_per_chunk=1)
    for i in range(3):
        assert (o[i] == ((np.arange(128) + 37) & 127) * (i + 1)).all()


def test_early_exit_barrier(mod: ptxsim.Module) -> None:
    o = np.zeros(64, np.int32)
    r = mod.launch("k_early", 1, 64, [o, 50])
    assert (o[:50] == 49 - np.arange(50)).all()
    assert any("exited" in w for w in r.warnings)
    with pytest.raises(ptxsim.BarrierDivergenceError):
        mod.launch("k_early", 1, 64, [o, 50], exited_barrier="error")


# ------------------------------------------------------------------ cp.async
@pytest.mark.parametrize("n", [128, 500, 1000])
def test_pipeline(mod: ptxsim.Module, n: int) -> None:
    x = rng.standard_normal((n, 4)).astype(np.float32)
    xb = mod.mem.alloc((n, 4), np.float32)
    xb[:] = x
    o = mod.mem.alloc((n, 4), np.float32)
    r = mod.launch("k_pipe<0>", 1, 128, [xb, o, n])
    assert (o == x * 2).all()
    assert r["global_cp_async"]["bytes"] == 16 * n
    for k, exc in ((1, ptxsim.AsyncHazardError), (2, ptxsim.SharedRaceError), (3, ptxsim.AsyncHazardError)):
        with pytest.raises(exc):
            mod.launch(f"k_pipe<{k}>", 1, 128, [xb, o, n])


def test_cp_small(mod: ptxsim.Module) -> None:
    x = rng.integers(1, 1000, 128).astype(np.int32)
    o = np.zeros(256, np.int32)
    mod.launch("k_cp4", 1, 128, [x, o], race_shared="off")
    assert (o[:128] == x[np.arange(128) ^ 1]).all()
    z = np.where(np.arange(128) % 2 == 0, x, 0)
    assert (o[128:] == z[np.arange(128) ^ 3]).all()
    # two threads write the same pair of bytes: same warp, same instruction -> not a race
    mod.launch("k_cp4", 1, 128, [x, o])


# ------------------------------------------------------------------ planted bugs
def expect(
    mod: ptxsim.Module, exc: Any, name: str, grid: Any, block: Any, args: Any, match: Any = None, **kw: Any
) -> Any:
    with pytest.raises(exc, match=match) as ei:
        mod.launch(name, grid, block, args, **kw)
    assert ei.value.line > 0
    assert ei.value.kernel
    return ei.value


def test_bug_oob(mod: ptxsim.Module) -> None:
    x = np.zeros(100, np.float32)
    e = expect(mod, ptxsim.OutOfBoundsError, "b_oob", 2, 64, [x, 100], "b_oob|outside|unregistered")
    assert e.cta == 1
    assert e.tid == 36
    mod.launch("b_oob", 2, 64, [x, 99])
    expect(mod, ptxsim.OutOfBoundsError, "b_oob_ld", 1, 32, [np.zeros((31, 4), np.float32), np.zeros(32, np.float32)])
    # a view: bytes before/after belong to the same allocation but not to the registered span
    big = np.zeros(300, np.float32)
    expect(mod, ptxsim.OutOfBoundsError, "b_oob", 2, 64, [big[100:200], 100], "outside buffer")
    expect(mod, ptxsim.OutOfBoundsError, "b_null", 1, 32, [0])


def test_bug_misaligned(mod: ptxsim.Module) -> None:
    x = mod.mem.alloc(200, np.float32)
    o = np.zeros(32, np.float32)
    mod.launch("b_misal", 1, 32, [x, o, 4])
    expect(mod, ptxsim.MisalignedError, "b_misal", 1, 32, [x, o, 1])
    expect(mod, ptxsim.MisalignedError, "b_misal", 1, 32, [x[2:], o, 0])


def test_bug_shared_oob(mod: ptxsim.Module) -> None:
    o = np.zeros(64, np.int32)
    mod.launch("b_smem_oob", 1, 64, [o, 0])
    expect(mod, ptxsim.OutOfBoundsError, "b_smem_oob", 1, 64, [o, 1], "shared memory access")
    mod.launch("b_smem_dyn", 1, 64, [o, 0], shared_bytes=256)
    expect(mod, ptxsim.OutOfBoundsError, "b_smem_dyn", 1, 64, [o, 1], shared_bytes=256)
    expect(mod, ptxsim.OutOfBoundsError, "b_smem_dyn", 1, 64, [o, 0])


def test_bug_races(mod: ptxsim.Module) -> None:
    o = np.zeros(128, np.int32)
    expect(mod, ptxsim.SharedRaceError, "b_race", 1, 128, [o], uninit_shared="off")
    mod.launch("b_race", 1, 128, [o], race_shared="off", uninit_shared="off")
    r = mod.launch("b_race", 1, 128, [o], race_shared="warn", uninit_shared="off")
    assert any("race" in w for w in r.warnings)
    expect(mod, ptxsim.SharedRaceError, "b_race_war", 1, 128, [o])
    expect(mod, ptxsim.SharedRaceError, "b_race_waw", 1, 128, [o])
    mod.launch("b_race_waw", 1, 32, [o])
    expect(mod, ptxsim.SharedRaceError, "b_warp<0>", 1, 128, [o])
    mod.launch("b_warp<1>", 1, 128, [o])
    assert (o == np.arange(128) ^ 1).all()
    expect(mod, ptxsim.SharedRaceError, "b_atomrace", 1, 128, [o])


def test_bug_uninit(mod: ptxsim.Module) -> None:
    o = np.zeros(128, np.int32)
    e = expect(mod, ptxsim.UninitSharedError, "b_uninit", 1, 128, [o])
    assert e.tid == 77
    mod.launch("b_uninit", 1, 128, [o], uninit_shared="off")
    assert o[77] == -1


def test_bug_barriers(mod: ptxsim.Module) -> None:
    o = np.zeros(128, np.int32)
    expect(mod, ptxsim.BarrierDivergenceError, "b_bardiv", 1, 32, [o], race_shared="off")
    with pytest.raises(ptxsim.DeadlockError, match="barrier 1"):
        mod.launch("b_barmiss", 1, 64, [o])
    with pytest.raises(ptxsim.DeadlockError, match="expecting 64"):
        mod.launch("b_barcount", 1, 64, [o])
    with pytest.raises((ptxsim.DeadlockError, ptxsim.WarpSyncError)):
        mod.launch("b_shflmask", 1, 32, [o])
    expect(mod, ptxsim.WarpSyncError, "b_shflown", 1, 32, [o])


def test_bug_global_race(mod: ptxsim.Module) -> None:
    o = np.zeros(512, np.int32)
    mod.launch("b_grace", 4, 128, [o])
    expect(mod, ptxsim.GlobalRaceError, "b_grace", 4, 128, [o], race_global=True)
    expect(mod, ptxsim.GlobalRaceError, "b_grace", 4, 128, [o], race_global=True, ctas_per_chunk=1)
    expect(mod, ptxsim.GlobalRaceError, "b_grace_rw", 4, 128, [o], race_global=True)
    mod.launch("b_grace_rw", 1, 128, [o], race_global=True)


def test_bug_misc(mod: ptxsim.Module) -> None:
    o = np.zeros(64, np.int32)
    expect(mod, ptxsim.StepLimitError, "b_loop", 1, 32, [o], max_steps=5000)
    ro = np.zeros(64, np.int32)
    mod.register(ro, "ro", readonly=True)
    expect(mod, ptxsim.ReadOnlyError, "b_ro", 1, 32, [ro])
    expect(mod, ptxsim.OutOfBoundsError, "b_local", 1, 32, [o, 8], "local memory")
    u = np.zeros(64, np.int32)
    mod.register(u, "u", init=False)
    expect(mod, ptxsim.UninitGlobalError, "b_gun", 1, 32, [u, o])
    with pytest.raises(ptxsim.LaunchError):
        mod.launch("b_gun", 1, 2048, [u, o])
    with pytest.raises(ptxsim.LaunchError):
        mod.launch("b_gun", 1, 32, [u])
