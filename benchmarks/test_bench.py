"""The same cases under pytest-benchmark, on the CPU: `pytest benchmarks/test_bench.py --benchmark-only`.

Each case is checked against the reference and then timed, once for ours and once for each baseline, in one group.
Here they run one after the other; for ratios use `python -m benchmarks`, which runs them in turns.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import pytest
import torch

from benchmarks.cases import CASES, Case, Setting

pytest.importorskip("pytest_benchmark")
pytest.importorskip("diffusers")


@functools.lru_cache(maxsize=1)
def _checked(name: str) -> Case:
    """The case after its check, kept while its contestants are timed."""
    case = CASES[name](Setting("cpu", compiled=bool(os.environ.get("DIFFKERN_BENCH_COMPILE"))))
    with torch.set_grad_enabled(case.grad):
        failed = [check for check in case.check() if not check.passed]
    assert not failed, f"{name} differs from the reference: {failed}"
    return case


BASELINES = {
    "randn": ("torch.randn",),
    "noising": ("eager", "torch.compile"),
    "loss": ("eager", "torch.compile"),
    "attention": ("sdpa",),
    "group": ("eager",),
    "linear": ("eager",),
    "conv3x3": ("channels_last", "prepacked"),
    "attention-nchw": ("sdpa on views", "sdpa with copies", "einsum"),
}


def _contestants() -> list[Any]:
    params = []
    for name in CASES:
        kind = "attention-nchw" if name.startswith("attention-nchw") else name.split("-")[0]
        others = BASELINES.get(kind, ("diffusers",))
        params += [pytest.param(name, who, id=f"{name}-{who}") for who in ("diffkern", *others)]
    return params


@pytest.mark.parametrize(("name", "who"), _contestants())
def test_case(benchmark: Any, name: str, who: str) -> None:
    case = _checked(name)
    fn = case.ours if who == "diffkern" else next(b.fn for b in case.baselines if b.name == who)
    if fn is None:
        pytest.skip("not there, or set DIFFKERN_BENCH_COMPILE=1 to time torch.compile")
    benchmark.group = name
    benchmark.extra_info.update(bytes=case.bytes, steps=case.steps, shape=list(case.shape), dtype=str(case.dtype))
    with torch.set_grad_enabled(case.grad):
        benchmark(fn)
