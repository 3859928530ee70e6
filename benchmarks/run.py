"""Run the benchmarks: `python -m benchmarks [--device cpu|cuda] [--cases PATTERN ...] [--out DIR]`.

Each case has a process of its own for its check and a fresh one for its timing, so that neither the order of the cases
nor the check's own allocations decide how the memory allocator behaves.
"""

from __future__ import annotations

import argparse
import ctypes
import fnmatch
import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.alone import alone, reason
from benchmarks.cases import CASES, CPU_ALONE, Case, Setting
from benchmarks.costs import costs_of
from benchmarks.machine import environment
from benchmarks.result import BaselineResult, Result
from benchmarks.timing import Measured, Stats, Timer, device_timer, interleave, ratio, wall_timer
from diffkern import _load

__all__ = ["Options", "check", "choose", "copy_of", "main", "measure"]

HEAPS = {
    "system": "the allocator's defaults: large blocks go back to the system when freed",
    "kept": "freed memory stays with the process: hardly a page fault, the best case of code that allocates",
}


@dataclass(frozen=True)
class Options:
    """How a case is run."""

    device: str = "cpu"
    compiled: bool = True
    threads: int = 1
    seconds: float = 4.0
    heap: str = "system"

    def enter(self) -> None:
        """Set this process up."""
        torch.set_num_threads(self.threads)
        if self.heap == "kept":
            keep_heap()


def keep_heap() -> None:
    """Tell glibc to keep what is freed: no block from mmap, no trimming."""
    trim_threshold, mmap_threshold, mmap_max = -1, -3, -4
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        raise ValueError("--heap kept needs glibc's mallopt, which this system does not have")
    libc.mallopt(mmap_max, 0)
    libc.mallopt(mmap_threshold, 2**30)
    libc.mallopt(trim_threshold, 2**31 - 1)


def choose(patterns: Iterable[str], known: Iterable[str] = CASES) -> list[str]:
    """The cases that match any of the patterns (shell style), in their order; ValueError for one without a match."""
    known, patterns = list(known), list(patterns)
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            raise ValueError(f"--cases must match one of {', '.join(known)}; {pattern!r} matches none")
    return [name for name in known if any(fnmatch.fnmatchcase(name, p) for p in patterns)] if patterns else known


def copy_of(moved: int, device: str) -> Callable[[], object]:
    """A copy that reads and writes `moved` bytes altogether: what the memory allows."""
    count = max(1, moved // 8)
    source, target = torch.ones(count, device=device), torch.zeros(count, device=device)
    return functools.partial(target.copy_, source)


def check(case: Case, device: str = "cpu") -> Result:
    """The result of comparing the case with the reference: not timed yet."""
    with torch.set_grad_enabled(case.grad):
        checks = case.check()
    kept = tuple({**asdict(c), "ok": c.passed} for c in checks)
    kind = str(case.dtype).removeprefix("torch.")
    passed = all(c.passed for c in checks)
    checked = Result(case.name, case.title, case.shape, kind, case.bytes, case.goal_us, kept, passed, flops=case.flops)
    if not (case.counted and passed):
        return checked
    calls = {"diffkern": case.ours, **{b.name: b.fn for b in case.baselines if b.fn is not None}}
    return replace(checked, costs={name: costs_of(call, case.steps, device) for name, call in calls.items()})


def measure(
    case: Case,
    timer: Timer,
    checked: Result,
    *,
    device: str = "cpu",
    seconds: float = 4.0,
    rounds: int = 100,
    run: Callable[..., Measured] = interleave,
) -> Result:
    """`checked` with the times of the case, its baselines and a copy of as many bytes, run in turns."""
    contestants = {"diffkern": case.ours, "copy": copy_of(case.bytes, device)}
    contestants |= {b.name: b.fn for b in case.baselines if b.fn is not None}
    with torch.set_grad_enabled(case.grad):
        measured = run(contestants, timer, budget_seconds=seconds, rounds=rounds)

    def one(b: Any) -> BaselineResult:
        if b.fn is None:
            return BaselineResult(b.name, None, None, b.target, b.note)
        best = min(measured.samples[b.name]) / min(measured.samples["diffkern"])
        times, faults = _per_step(measured, b.name, case.steps), measured.faults.get(b.name)
        return BaselineResult(b.name, times, ratio(measured, b.name, "diffkern"), b.target, b.note, best, faults)

    return replace(
        checked,
        ours=_per_step(measured, "diffkern", case.steps),
        copy=measured.stats("copy"),
        others=measured.others,
        baselines=tuple(one(b) for b in case.baselines),
        faults=measured.faults.get("diffkern"),
    )


def _per_step(measured: Measured, name: str, steps: int) -> Stats:
    return Stats.of([sample / steps for sample in measured.samples[name]])


# ---------------------------------------------------------------------------------------- in a process of its own
def _check_work(name: str, options: Options) -> Result:
    options.enter()
    return check(CASES[name](Setting(options.device, options.compiled)), options.device)


def gemm_rate(dtype: str, threads: int, seconds: float = 0.2) -> float | None:
    """Operations a second of the CPU kernels' matrix products alone, on all threads at once; None without such."""
    if dtype not in ("float32", "float16", "bfloat16"):
        return None
    rate = functools.partial(_load.attention_gemm_rate, dtype, seconds)
    with ThreadPoolExecutor(threads) as pool:
        return 1e9 * sum(pool.map(lambda _: rate(), range(threads)))


def _measure_work(name: str, checked: Result, options: Options) -> Result:
    options.enter()
    case = CASES[name](Setting(options.device, options.compiled))
    timer = _timer(options.device, case.overhead)
    result = measure(case, timer, checked, device=options.device, seconds=options.seconds)
    if case.flops and options.device == "cpu":
        result = replace(result, gemm=gemm_rate(result.dtype, options.threads))
    return result


def _run_case(name: str, options: Options) -> Result:
    try:
        checked = alone(_check_work, name, options)
        return alone(_measure_work, name, checked, options) if checked.passed else checked
    except Exception as error:  # one broken case must not take the others' results with it
        return Result(name, name, (), "", 0, None, (), False, error=reason(error))


def _timer(device: str, overhead: bool = False) -> Timer:
    if device != "cuda":
        return wall_timer()
    return wall_timer(torch.cuda.synchronize) if overhead else device_timer()


def _facts(options: Options) -> dict[str, str]:
    """The environment, and the bytes read and written a second by torch's copy, beyond the caches and as in a step."""
    options.enter()
    facts = environment(options.device)
    found = []
    for moved, what in ((512 << 20, "512 MiB"), (36 << 20, "36 MiB")):
        measured = interleave(
            {"copy": copy_of(moved, options.device)}, _timer(options.device), rounds=15, budget_seconds=2.0
        )
        found.append(f"{moved / measured.stats('copy').median / 1e9:.1f} GB/s moving {what}")
    return {**facts, "copy rate": ", ".join(found), "heap": f"{options.heap}: {HEAPS[options.heap]}"}


# --------------------------------------------------------------------------------------------------- command line
def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time diffkern against its baselines.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", default=[], metavar="PATTERN", help="names or shell patterns; --list")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="folder (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for one case (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (default: every core it may use)")
    parser.add_argument("--heap", choices=tuple(HEAPS), default="system", help="what happens to freed memory; README")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 1 where a case fails or differs from the reference (--strict: or misses a target), 2 for usage."""
    arguments = _arguments(words)
    if arguments.list:
        print("\n".join(CASES))
        return 0
    try:
        names = choose(arguments.cases)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a GPU, and torch sees none: run --device cpu", file=sys.stderr)
        return 2
    if arguments.device == "cuda":
        names = [name for name in names if name not in CPU_ALONE]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    compiled = not arguments.no_compile
    options = Options(arguments.device, compiled, arguments.threads or cores, arguments.seconds, arguments.heap)
    facts = alone(_facts, options)
    print("\n".join(f"{key}: {value}" for key, value in facts.items()), flush=True)
    results = []
    for i, name in enumerate(names):
        results.append(_run_case(name, options))
        print(f"[{i + 1}/{len(names)}] {report.summary(results[-1])}", flush=True)
    written = report.write(results, facts, arguments.out)
    print("\n" + report.markdown(results, {}).strip())
    missed = [line for result in results for line in result.missed]
    print("\nmissed targets:" if missed else "\nno target missed", *missed, sep="\n  ")
    print("written: " + ", ".join(str(path) for path in written))
    wrong = [result.name for result in results if not result.passed]
    if wrong:
        print(f"failed, or differ from the reference: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong or (arguments.strict and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
