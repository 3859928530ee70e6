from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch

import ptxsim
from ptxsim.tests.compiled import mod_of


def ref(q: Any, k: Any, v: Any, causal: int) -> Any:
    q, k, v = [x.double() for x in (q, k, v)]
    s = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if causal:
        n = q.shape[-2]
        s = s.masked_fill(torch.triu(torch.ones(n, n, dtype=torch.bool), 1), -math.inf)
    return torch.softmax(s, -1) @ v


def run(mod: ptxsim.Module, dt: Any, H: Any, N: int, D: int, causal: int, **kw: Any) -> Any:
    torch.manual_seed(N * 7 + D)
    q, k, v = [torch.randn(H, N, D).to(dt) for _ in range(3)]
    o = torch.full((H, N, D), float("nan"), dtype=dt)
    sm = (64 + 4 * 64) * (D + 8) * 2
    name = f"attn<{'__half' if dt == torch.float16 else '__nv_bfloat16'}, {D}>"
    k_ = next(x for x in mod.kernels.values() if name in x.demangled.replace("(int)", ""))
    t = time.time()
    r = mod.launch(
        k_, (-(-N // 64), H), 128, [q, k, v, o, N, 1.4426950408889634 / math.sqrt(D), causal], shared_bytes=sm, **kw
    )
    e = (o.double() - ref(q, k, v, causal)).abs().max().item()
    return e, r, time.time() - t


@pytest.mark.parametrize(
    ("dt", "D"), [(torch.float16, 32), (torch.float16, 64), (torch.bfloat16, 64), (torch.bfloat16, 128)]
)
@pytest.mark.parametrize("N", [1, 17, 64, 100, 128, 193])
@pytest.mark.parametrize("causal", [0, 1])
def test_attention(arch: str, dt: Any, D: int, N: int, causal: int) -> None:
    mod = mod_of("attn", arch)
    e, r, _ = run(mod, dt, 2, N, D, causal)
    assert e < (2e-3 if dt == torch.float16 else 2e-2), e
    assert not r.warnings
    nb = sum(min(-(-N // 64), i + 1) if causal else -(-N // 64) for i in range(-(-N // 64)))
    assert r["mma_flops"] == 2 * 2 * nb * 64 * 64 * D * 2


def test_attention_speed() -> None:
    mod = mod_of("attn", "sm_80")
    _e, r, dt = run(mod, torch.bfloat16, 1, 128, 64, 0)
    assert r["ctas"] == 2
    print(f"\n2 CTA x 128 threads attention N=128 d=64: {dt:.2f} s", r["warp_instructions"], "warp instructions")
    assert dt < 20


@pytest.mark.parametrize(("bug", "exc"), [(1, "AsyncHazardError"), (2, "SharedRaceError"), (3, "SharedRaceError")])
def test_attention_bugs(arch: str, bug: int, exc: Any) -> None:
    mod = mod_of("attn", arch, defines=(f"BUG={bug}",))
    with pytest.raises((ptxsim.AsyncHazardError, ptxsim.SharedRaceError, ptxsim.UninitSharedError)) as ei:
        run(mod, torch.float16, 1, 193, 64, 0)
    assert type(ei.value).__name__ == exc, ei.value
