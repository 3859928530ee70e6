"""Mutation testing of the hazard detectors: delete one synchronisation instruction at a time from real PTX.  Every
deletion must be reported (none of these kernels has a redundant barrier or wait)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import ptxsim
from ptxsim.tests.compiled import ptx_of


def entry_span(ptx: str, key: Any) -> Any:
    for mo in re.finditer(r"\.entry\s+(\S+?)\(", ptx):
        if key in mo.group(1):
            a = mo.start()
            b = ptx.index("\n}", a)
            return a, b
    raise KeyError(key)


def mutants(ptx: str, key: Any, pat: Any) -> Iterator[Any]:
    a, b = entry_span(ptx, key)
    for mo in re.finditer(pat, ptx[a:b]):
        s, e = a + mo.start(), a + mo.end()
        yield ptx[:s] + "/*" + ptx[s:e].replace("*/", "") + "*/" + ptx[e:], ptx[:s].count("\n") + 1


def attn_args(mod: ptxsim.Module, N: int = 160) -> Any:
    D = 64
    torch.manual_seed(0)
    q, k, v = [torch.randn(1, N, D).half() for _ in range(3)]
    o = torch.zeros(1, N, D).half()
    kk = next(x for x in mod.kernels.values() if "attn<__half, 64>" in x.demangled.replace("(int)", ""))
    return kk, (3, 1), 128, [q, k, v, o, N, 0.18, 0], (64 + 4 * 64) * (D + 8) * 2


CASES = {
    "scan": (
        "basic",
        "blk_scan",
        r"bar\.sync[^;]*;",
        lambda m: ("blk_scan", 1, 128, [np.arange(128, dtype=np.int32), np.zeros(128, np.int32), 128], 1024),
    ),
    "softmax": (
        "basic",
        "softmax_rows",
        r"bar\.sync[^;]*;",
        lambda m: ("softmax_rows", 2, 128, [np.zeros((2, 300), np.float32), np.zeros((2, 300), np.float32), 300], 0),
    ),
    "transpose": (
        "basic",
        "9transposeILi1",
        r"bar\.sync[^;]*;",
        lambda m: (
            "transpose<1>",
            (2, 2),
            (32, 8),
            [np.zeros((64, 64), np.float32), np.zeros((64, 64), np.float32), 64],
            0,
        ),
    ),
    "gemm": (
        "mma",
        "gemmI6__half",
        r"bar\.sync[^;]*;",
        lambda m: (
            "gemm<__half",
            1,
            128,
            [torch.zeros(64, 64).half(), torch.zeros(64, 64).half(), torch.zeros(64, 64), 64],
            0,
        ),
    ),
    "attn_bar": ("attn", "attnI6__halfLi64", r"bar\.sync[^;]*;", lambda m: attn_args(m)),
    "attn_wait": ("attn", "attnI6__halfLi64", r"cp\.async\.wait_group[^;]*;", lambda m: attn_args(m)),
}


@pytest.mark.parametrize("case", list(CASES))
def test_deleted_sync_is_reported(arch: str, case: Any) -> None:
    name, key, pat, mk = CASES[case]
    ptx = ptx_of(name, arch, defines=("SM90",) if name == "mma" and arch == "sm_90" else ())
    mod = ptxsim.load(ptx)
    k, g, b, args, sm = mk(mod)
    mod.launch(k, g, b, args, shared_bytes=sm)  # the original is clean
    n = 0
    for text, _line in mutants(ptx, key, pat):
        m2 = ptxsim.load(text)
        k, g, b, args, sm = mk(m2)
        with pytest.raises((ptxsim.SharedRaceError, ptxsim.AsyncHazardError, ptxsim.UninitSharedError)):
            m2.launch(k, g, b, args, shared_bytes=sm)
        n += 1
    assert n >= 1
    print(case, arch, n, "mutants, all reported")
