"""The command: `python -m benchmarks.networks [--cases PATTERN ...] [--out PAGE]`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.alone import alone, reason
from benchmarks.machine import environment
from benchmarks.networks import page
from benchmarks.networks.contenders import EXTRAS, NAMES
from benchmarks.networks.counts import GpuRow, on_gpu
from benchmarks.networks.evaluation import Found, evaluate, train
from benchmarks.networks.peers import NETWORKS
from benchmarks.networks.profiles import Profile, profiles
from benchmarks.networks.sampling import run_of
from benchmarks.run import choose

__all__ = ["CASES", "Case", "has_bfloat16", "main"]


@dataclass(frozen=True)
class Case:
    """``kind``: evaluation, training, run, profile or gpu. ``quick``: run unless cases are named."""

    kind: str
    network: str
    batch: int
    quick: bool = False
    sampler: str = ""
    half: bool = False

    @property
    def name(self) -> str:
        words = {
            "evaluation": "",
            "training": "-train",
            "run": f"-{self.sampler}",
            "profile": "-profile",
            "gpu": "-gpu",
        }
        return f"{self.network}{words[self.kind]}-{self.batch}{'-bf16' if self.half else ''}"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.half or self.kind == "gpu" else torch.float32


KINDS = ("evaluation", "training", "run", "profile", "gpu")
_EVALUATIONS = {"ddpm": (1, 4, 16), "adm": (1, 4), "sd": (1,), "dit": (1, 4)}
_QUICK = {("ddpm", 1), ("ddpm", 4), ("ddpm", 16), ("adm", 1), ("dit", 1)}
_TRAININGS = {"ddpm": (4, 16), "adm": (1, 4), "dit": (4, 16)}


def _cases() -> dict[str, Case]:
    found = []
    for half in (False, True):
        for network, batches in _EVALUATIONS.items():
            found += [Case("evaluation", network, b, (network, b) in _QUICK, half=half) for b in batches]
        for network, batches in _TRAININGS.items():
            found += [Case("training", network, b, (network, b) == ("ddpm", 4), half=half) for b in batches]
    found += [Case("run", "ddpm", 1, True, "ddim"), Case("run", "ddpm", 1, False, "dpmpp_2m")]
    found += [Case("run", "sd", 1, False, "dpmpp_2m"), Case("run", "sd", 1, False, "ddim")]
    for half in (False, True):
        found += [Case("profile", n, b, n in ("ddpm", "dit"), half=half) for n in NETWORKS for b in (1, 4) if n != "sd"]
        found.append(Case("profile", "sd", 1, half=half))
    found += [Case("gpu", network, batch, batch == 1) for network in NETWORKS for batch in (1, 16)]
    return {case.name: case for case in found}


CASES = _cases()


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16."""
    known = (getattr(torch.cpu, f"_is_{what}_supported", None) for what in ("avx512_bf16", "amx_tile", "arm_bf16"))
    return any(ask is not None and ask() for ask in known)


def _work(case: Case, threads: int, wanted: Sequence[str], seconds: float) -> Any:
    torch.set_num_threads(threads)
    if case.kind == "evaluation":
        return evaluate(case.network, case.batch, case.dtype, wanted=wanted, seconds=seconds)
    if case.kind == "training":
        return train(case.network, case.batch, case.dtype, wanted=wanted, seconds=seconds)
    if case.kind == "run":
        return run_of(case.network, case.sampler, case.batch, wanted=wanted, seconds=seconds)
    if case.kind == "profile":
        return profiles(case.network, case.batch, case.dtype, wanted=wanted)
    return on_gpu(case.network, case.batch, wanted=wanted)


def _failed(case: Case, why: str) -> Any:
    """What stands in the place of the case's result."""
    if case.kind == "profile":
        return [Profile("", why=why)]
    if case.kind == "gpu":
        return [GpuRow("", why=why)]
    return Found(case.network, NETWORKS[case.network].title, case.batch, _word(case.dtype), 0, (), why=why)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _title(case: Case) -> str:
    word = "" if case.kind == "gpu" else f", batch {case.batch}, {_word(case.dtype)}"
    return NETWORKS[case.network].title + word


def _facts(threads: int) -> dict[str, str]:
    torch.set_num_threads(threads)
    return environment("cpu")


def write(
    out: Path, command: str, facts: dict[str, str], found: Sequence[tuple[Case, Any]], notes: Sequence[str]
) -> None:
    """The section so far."""
    of = {kind: [(case, result) for case, result in found if case.kind == kind] for kind in KINDS}
    evaluations, trainings, runs = ([result for _, result in of[kind]] for kind in KINDS[:3])
    profiled = [(_title(case), result) for case, result in of["profile"]]
    counted = [(_title(case), case.batch, result) for case, result in of["gpu"]]
    page.put(out, page.section(command, facts, evaluations, trainings, runs, profiled, counted, notes))


def _summary(case: Case, result: Any) -> str:
    """The lines printed as soon as a case is done."""
    lines = [case.name]
    if isinstance(result, Found):
        lines[0] += f" {result.why}"
        for row in result.rows:
            time = f"{row.time.median * 1e3:.1f} ms" if row.time else ""
            ratio = f", {row.ratio.median:.2f}x" if row.ratio else ""
            lines.append(f"    {row.name}: {row.why or time + ratio}")
    else:
        lines += [f"    {row.name}: {row.why or 'done'}" for row in result]
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 1 where a case failed as a whole or an output was wrong, 2 for usage."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description="Measure whole networks.")
    parser.add_argument("--cases", nargs="+", default=[], metavar="PATTERN", help="names or shell patterns; --list")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.md"), help="the page (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for one case's turns (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (default: every core it may use)")
    for option, what in EXTRAS.items():
        parser.add_argument(f"--{option}", action="store_true", help=f"also time {what}")
    parser.add_argument("--list", action="store_true", help="print the names of the cases; * those of the default")
    arguments = parser.parse_args(words)
    if arguments.list:
        print("\n".join(f"{name} *" if case.quick else name for name, case in CASES.items()))
        return 0
    quick = [name for name, case in CASES.items() if case.quick]
    try:
        names = choose(arguments.cases, CASES) if arguments.cases else quick
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    notes = []
    if not has_bfloat16():
        names = [name for name in names if not CASES[name].half]
        notes.append("bfloat16 is left out on the CPU: this processor has no products of it.")
    threads = arguments.threads or len(os.sched_getaffinity(0))
    wanted = [*NAMES, *(name for option, name in EXTRAS.items() if getattr(arguments, option))]
    command = " ".join(["python -m benchmarks.networks", *(sys.argv[1:] if words is None else words)])
    facts = alone(_facts, threads)
    found: list[tuple[Case, Any]] = []
    wrong = []
    for i, name in enumerate(names):
        case = CASES[name]
        try:
            result = alone(_work, case, threads, wanted, arguments.seconds)
        except Exception as error:  # one broken case must not take the others' results with it
            result = _failed(case, reason(error))
            wrong.append(name)
        if isinstance(result, Found) and any(row.why.startswith("wrong") for row in result.rows):
            wrong.append(name)
        found.append((case, result))
        print(f"[{i + 1}/{len(names)}] {_summary(case, result)}", flush=True)
        write(arguments.out, command, facts, found, notes)
    if wrong:
        print(f"failed, or wrong: {', '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0
