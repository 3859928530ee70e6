"""Run the benchmarks: `python -m benchmarks.run [--device cpu|cuda] [--cases PATTERN ...] [--out DIR]`."""

from __future__ import annotations

import argparse
import fnmatch
import functools
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks import report
from benchmarks.cases import CASES, Case, Setting
from benchmarks.report import BaselineResult, Result
from benchmarks.timing import Measured, Stats, Timer, device_timer, interleave, ratio, wall_timer

__all__ = ["choose", "copy_of", "main", "measure"]


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


def measure(
    case: Case,
    timer: Timer,
    *,
    device: str = "cpu",
    seconds: float = 4.0,
    rounds: int = 60,
    run: Callable[..., Measured] = interleave,
) -> Result:
    """Check the case against the reference, then time it; a case that fails its check is not timed."""
    with torch.set_grad_enabled(case.grad):
        checks = case.check()
        passed = all(check.passed for check in checks)
        kept = tuple({**asdict(check), "ok": check.passed} for check in checks)
        kind = str(case.dtype).removeprefix("torch.")
        result = functools.partial(
            Result, case.name, case.title, case.shape, kind, case.bytes, case.goal_us, kept, passed
        )
        if not passed:
            return result()
        contestants = {"diffkern": case.ours, "copy": copy_of(case.bytes * case.steps, device)}
        contestants |= {b.name: b.fn for b in case.baselines if b.fn is not None}
        measured = run(contestants, timer, budget_seconds=seconds, rounds=rounds)

    def per_step(name: str) -> Stats:
        return Stats.of([sample / case.steps for sample in measured.samples[name]])

    baselines = tuple(
        BaselineResult(b.name, None, None, b.target, b.note)
        if b.fn is None
        else BaselineResult(b.name, per_step(b.name), ratio(measured, b.name, "diffkern"), b.target, b.note)
        for b in case.baselines
    )
    return result(ours=per_step("diffkern"), copy=per_step("copy"), others=measured.others, baselines=baselines)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description="Time diffkern against its baselines."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", nargs="+", default=[], metavar="PATTERN", help="names or shell patterns; --list")
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="folder (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for one case (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (default: every core it may use)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--strict", action="store_true", help="exit with 1 if a target is missed")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Exit status 0, or 1 where a case differs from the reference (or, with --strict, misses a target)."""
    arguments = _arguments(words)
    if arguments.list:
        print("\n".join(CASES))
        return 0
    try:
        names = choose(arguments.cases)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("--device cuda needs a GPU, and torch sees none: run --device cpu", file=sys.stderr)
        return 2
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(arguments.threads or cores)
    wall = wall_timer(torch.cuda.synchronize if device == "cuda" else None)
    timer = device_timer() if device == "cuda" else wall
    facts = report.environment(device)
    facts["copy rate"] = _copy_rate(timer, device)
    print("\n".join(f"{key}: {value}" for key, value in facts.items()), flush=True)
    setting = Setting(device, not arguments.no_compile)
    results = []
    for i, name in enumerate(names):
        case = CASES[name](setting)
        result = measure(case, wall if case.overhead else timer, device=device, seconds=arguments.seconds)
        results.append(result)
        print(f"[{i + 1}/{len(names)}] {report.summary(result)}", flush=True)
    written = report.write(results, facts, arguments.out)
    print("\n" + report.markdown(results, {}).strip())
    missed = [line for result in results for line in result.missed]
    print("\nmissed targets:" if missed else "\nno target missed", *missed, sep="\n  ")
    print("written: " + ", ".join(str(path) for path in written))
    wrong = [result.name for result in results if not result.passed]
    if wrong:
        print(f"differ from the reference: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong or (arguments.strict and missed) else 0


def _copy_rate(timer: Timer, device: str) -> str:
    """Bytes read and written a second by torch's copy, beyond the caches and at the size of a large step."""
    found = []
    for moved, what in ((512 << 20, "512 MiB"), (36 << 20, "36 MiB")):
        samples = interleave({"copy": copy_of(moved, device)}, timer, rounds=15, budget_seconds=2.0)
        found.append(f"{moved / samples.stats('copy').median / 1e9:.1f} GB/s moving {what}")
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(main())
