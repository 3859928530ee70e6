"""What a run found, as a Markdown table, CSV, JSON and a bar chart; and the facts about the machine it ran on."""

from __future__ import annotations

import csv
import datetime
import io
import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.costs import Costs
from benchmarks.timing import Stats

__all__ = [
    "BaselineResult",
    "Result",
    "environment",
    "markdown",
    "summary",
    "to_csv",
    "to_json",
    "write",
    "write_chart",
]


@dataclass(frozen=True)
class BaselineResult:
    """One baseline: its time and time(baseline) / time(ours), both over the rounds. `stats` None: not available."""

    name: str
    stats: Stats | None
    ratio: Stats | None
    target: float | None
    note: str = ""
    ratio_of_minima: float | None = None
    """Fastest time of the baseline over ours: what a quiet machine would show, where the median was disturbed."""
    faults: float | None = None
    """Page faults of a call."""

    @property
    def met(self) -> bool | None:
        """Whether the median ratio reaches the target; None without a target or a measurement."""
        return None if self.target is None or self.ratio is None else self.ratio.median >= self.target


@dataclass(frozen=True)
class Result:
    """One case. Times are seconds of one update (a loop's time is divided by its steps)."""

    name: str
    title: str
    shape: tuple[int, ...]
    dtype: str
    bytes: int
    goal_us: float | None
    checks: tuple[dict[str, Any], ...]
    passed: bool
    ours: Stats | None = None
    copy: Stats | None = None
    others: float | None = None
    """Share of the cores that other processes used while this was timed."""
    baselines: tuple[BaselineResult, ...] = field(default_factory=tuple)
    faults: float | None = None
    """Page faults of a call of ours."""
    flops: int = 0
    """Operations of its matrix products."""
    gemm: float | None = None
    """Operations a second that the matrix products reach without anything around them, measured in the same process."""
    costs: dict[str, Costs] = field(default_factory=dict)
    """Dispatched ops and peak memory of ours ("diffkern") and of the baselines, where they were counted."""
    error: str = ""
    """Why there is nothing else: the case raised, or crashed."""

    @property
    def rate(self) -> float:
        """Bytes a second that ours moves, counting each input and output once."""
        return self.bytes / self.ours.median if self.ours else math.nan

    @property
    def floor(self) -> float:
        """Time of a copy that moves as many bytes, over ours: 1 is the floor."""
        return self.copy.median / self.ours.median if self.copy and self.ours else math.nan

    @property
    def flop_rate(self) -> float:
        """Operations of matrix products a second."""
        return self.flops / self.ours.median if self.ours else math.nan

    @property
    def share(self) -> str:
        """How near the limit of the hardware: of the floor of memory, or of the rate of bare matrix products."""
        if self.flops and self.gemm:
            return f"{self.flop_rate / self.gemm:.2f} of the products"
        return f"{self.flop_rate / 1e9:.0f} GFLOP/s" if self.flops else f"{self.floor:.2f}"

    @property
    def goal_met(self) -> bool | None:
        return None if self.goal_us is None or self.ours is None else self.ours.median * 1e6 <= self.goal_us

    @property
    def missed(self) -> list[str]:
        """The targets of this case that were not reached, in words."""
        found = []
        for b in self.baselines:
            if b.met is False and b.ratio is not None:
                found.append(f"{self.name}: {b.ratio.median:.2f}x of {b.name}, target {b.target:.3g}x")
        if self.goal_met is False and self.ours is not None:
            found.append(f"{self.name}: {self.ours.median * 1e6:.1f} us, goal {self.goal_us:g} us")
        return found


# ----------------------------------------------------------------------------------------------------- machine
def _command(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False, cwd=Path(__file__).parent)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _processor() -> str:
    for line in _command("lscpu").splitlines():
        if line.startswith("Model name:"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    commit = _command("git", "rev-parse", "--short=12", "HEAD")
    return commit + (" with changes" if commit and _command("git", "status", "--porcelain") else "")


def environment(device: str) -> dict[str, str]:
    """Machine, versions, date and commit: enough to read a number a year later."""
    import diffkern
    from diffkern import _load

    found = {
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
        "device": device,
        "processor": _processor(),
        "cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
        "threads": f"{torch.get_num_threads()}",
        "isa": str(_load.build_info().get("isa", "")),
        "torch capability": torch.backends.cpu.get_cpu_capability(),
        "load average": " ".join(f"{load:.2f}" for load in os.getloadavg()) if hasattr(os, "getloadavg") else "",
        "diffkern": diffkern.__version__,
        "torch": torch.__version__,
        "diffusers": _version("diffusers"),
        "python": platform.python_version(),
        "commit": _commit(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = f"{torch.version.cuda}"
    return {key: value for key, value in found.items() if value}


# ------------------------------------------------------------------------------------------------------- texts
def _duration(seconds: float) -> str:
    micro = seconds * 1e6
    return f"{micro / 1000:.2f} ms" if micro >= 1000 else f"{micro:.0f} us" if micro >= 100 else f"{micro:.1f} us"


def _timing(stats: Stats) -> str:
    return f"{_duration(stats.median)} (min {_duration(stats.minimum)}, ±{50 * stats.spread:.0f} %)"


def _pages(faults: float | None) -> str:
    return f", {faults:.0f} page faults" if faults is not None and faults >= 1 else ""


def _costs(result: Result, name: str) -> str:
    found = result.costs.get(name)
    if found is None:
        return ""
    ops = f"{found.ops:.1f}".removesuffix(".0")
    return f", {ops} {'op' if ops == '1' else 'ops'} a step, peak {found.peak / 2**20:.3g} MiB"


def _shape(result: Result) -> str:
    return "x".join(map(str, result.shape))


def summary(result: Result) -> str:
    """The lines printed as soon as a case is done."""
    if result.error:
        return f"{result.name}: FAILED, {result.error}"
    if not result.passed or result.ours is None:
        failed = [
            f"{c['what']}: error {c['error']:.2g} over {c['tolerance']:.2g}" for c in result.checks if not c["ok"]
        ]
        return f"{result.name}: NOT TIMED, differs from the reference ({'; '.join(failed)})"
    busy = "" if result.others is None else f", others used {result.others:.0%} of the cores"
    goal = "" if result.goal_us is None else f", goal {result.goal_us:g} us {'met' if result.goal_met else 'MISSED'}"
    share = f"{result.rate / 1e9:.1f} GB/s, {result.share} of the floor"
    if result.flops:
        share = f"{result.flop_rate / 1e9:.0f} GFLOP/s" + (f", {result.share}" if result.gemm else "")
    lines = [
        f"{result.name} ({_shape(result)} {result.dtype}): {_timing(result.ours)}{_pages(result.faults)}"
        f"{_costs(result, 'diffkern')}{goal}; "
        f"{share}{busy}"
    ]
    for b in result.baselines:
        if b.stats is None or b.ratio is None:
            lines.append(f"    {b.name}: {b.note}")
            continue
        target = "" if b.target is None else f", target {b.target:.3g}x {'met' if b.met else 'MISSED'}"
        lines.append(
            f"    {b.ratio.median:.2f}x of {b.name} [{b.ratio.p20:.2f}, {b.ratio.p80:.2f}], "
            f"of the minima {b.ratio_of_minima:.2f}x{target}: {_timing(b.stats)}"
            f"{_pages(b.faults)}{_costs(result, b.name)}"
        )
    return "\n".join(lines)


_HEAD = "| case | shape | dtype | ours | baseline | its time | ratio [p20, p80] | of minima | target | of the floor |"


def markdown(results: Sequence[Result], facts: dict[str, str]) -> str:
    """The table, one line a case and baseline, under the facts of the machine."""
    lines = [f"- {key}: {value}" for key, value in facts.items()]
    lines += ["", _HEAD + " busy |", "|" + "---|" * _HEAD.count("|")]
    for r in results:
        first = [r.title, _shape(r), r.dtype]
        if r.ours is None:
            lines.append(
                "| " + " | ".join([*first, r.error or "differs from the reference: not timed", *[""] * 7]) + " |"
            )
            continue
        goal = "" if r.goal_us is None else f", goal {r.goal_us:g} us {'✓' if r.goal_met else '✗'}"
        mine = [_timing(r.ours) + _pages(r.faults) + _costs(r, "diffkern") + goal]
        after = [r.share, "" if r.others is None else f"{r.others:.0%}"]
        for i, b in enumerate(r.baselines):
            lead = [*first, *mine] if i == 0 else [""] * 4
            end = after if i == 0 else ["", ""]
            if b.stats is None or b.ratio is None:
                middle = [b.name, b.note, "", "", ""]
            else:
                target = "" if b.target is None else f"{b.target:.3g}x {'✓' if b.met else '✗'}"
                ratio = f"**{b.ratio.median:.2f}x** [{b.ratio.p20:.2f}, {b.ratio.p80:.2f}]"
                middle = [
                    b.name,
                    _timing(b.stats) + _pages(b.faults) + _costs(r, b.name),
                    ratio,
                    f"{b.ratio_of_minima:.2f}x",
                    target,
                ]
            lines.append("| " + " | ".join([*lead, *middle, *end]) + " |")
    return "\n".join(lines) + "\n"


def to_csv(results: Sequence[Result]) -> str:
    """One line a case and baseline; seconds, bytes and plain ratios."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    columns = [f"{who}_{what}" for who in ("ours", "baseline") for what in ("median_s", "min_s", "p20_s", "p80_s")]
    head = ["case", "shape", "dtype", "bytes", "passed", "baseline", *columns]
    head += ["ratio_median", "ratio_p20", "ratio_p80", "ratio_of_minima", "target", "met"]
    head += ["copy_median_s", "others", "faults", "baseline_faults", "flops", "gemm_flops_per_s"]
    writer.writerow([*head, "ops_a_step", "baseline_ops_a_step", "peak_bytes", "baseline_peak_bytes"])
    for r in results:
        for b in r.baselines or (BaselineResult("", None, None, None),):
            times = [value for stats in (r.ours, b.stats) for value in _numbers(stats)]
            ratios = [b.ratio.median, b.ratio.p20, b.ratio.p80, b.ratio_of_minima] if b.ratio else [""] * 4
            end = [b.target, b.met, r.copy.median if r.copy else None, r.others, r.faults, b.faults]
            end += [r.flops or None, r.gemm]
            both = r.costs.get("diffkern"), r.costs.get(b.name)
            end += [c and c.ops for c in both] + [c and c.peak for c in both]
            start = [r.name, _shape(r), r.dtype, r.bytes, r.passed, b.name]
            writer.writerow([*start, *times, *ratios, *("" if value is None else value for value in end)])
    return stream.getvalue()


def _numbers(stats: Stats | None) -> list[Any]:
    return [""] * 4 if stats is None else [stats.median, stats.minimum, stats.p20, stats.p80]


def to_json(results: Sequence[Result], facts: dict[str, str]) -> str:
    """Everything, as data."""
    return json.dumps({"environment": facts, "results": [asdict(r) for r in results]}, indent=1) + "\n"


# ------------------------------------------------------------------------------------------------------- chart
_COLOURS = {"diffusers": "#3b6fb6", "eager": "#4a9d8f", "torch.compile": "#c98a2b", "torch.add": "#8d6ab8"}
_COLOURS |= {"sdpa": "#3b6fb6", "sdpa on views": "#7fa3d1", "sdpa with copies": "#8d6ab8", "einsum": "#4a9d8f"}
_COLOURS |= {"einsum compiled": "#c98a2b"}
_NAMES = {"eager": "eager torch", "torch.add": "one torch.add"}
_OTHER, _MISSED, _INK, _PALE = "#4a9d8f", "#c0392b", "#222222", "#8a8a8a"


def write_chart(results: Sequence[Result], facts: dict[str, str], path: Path) -> None:
    """Bars of the speed ratio, one a case and baseline and one panel a shape; a black tick is the target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    panels: dict[str, list[tuple[Result, BaselineResult]]] = {}
    for r in results:
        for b in r.baselines:
            if b.ratio is not None:
                panels.setdefault(_shape(r), []).append((r, b))
    if not panels:
        return
    rows = [len(bars) for bars in panels.values()]
    height = max(2.6, 0.26 * sum(rows) + 0.7 * len(rows) + 1.0)
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(10, height), height_ratios=[n + 0.6 for n in rows], sharex=True, squeeze=False
    )
    every = [
        v for bars in panels.values() for _, b in bars if b.ratio for v in (b.ratio.p80, b.target or 1, b.ratio.p20)
    ]
    low, high = min(0.5, *(0.8 * v for v in every)), 1.9 * max(every)
    for axis, (shape, bars) in zip(axes[:, 0], panels.items(), strict=True):
        labels = []
        for y, (r, b) in enumerate(bars):
            assert b.ratio is not None
            ratio = b.ratio
            axis.barh(y, ratio.median - 1, left=1, height=0.72, color=_COLOURS.get(b.name, _OTHER), zorder=2)
            axis.plot([ratio.p20, ratio.p80], [y, y], color=_INK, lw=1.0, alpha=0.55, zorder=3)
            if b.target is not None:
                axis.plot([b.target] * 2, [y - 0.43, y + 0.43], color=_INK, lw=2.2, zorder=4)
            text = f"{ratio.median:.1f}x" if ratio.median >= 2 else f"{ratio.median:.2f}x"
            end = min(max(ratio.p80, ratio.median, b.target or 0.0, 1.0) * 1.05, high / 1.35)
            axis.text(
                end, y, text, va="center", fontsize=8.5, zorder=5, color=_MISSED if b.met is False else _INK,
                fontweight="bold" if b.target is not None else "normal",
            )  # fmt: skip
            same = y > 0 and bars[y - 1][0] is r
            kind = "" if r.dtype == "float32" else f" ({r.dtype})"
            labels.append(f"vs {b.name}" if same else f"{r.title}{kind}  vs {b.name}")
        axis.set_yticks(range(len(bars)), labels, fontsize=8.5)
        axis.set_ylim(len(bars) - 0.4, -0.6)
        axis.set_xscale("log")
        axis.set_xlim(low, high)
        axis.axvline(1, color=_PALE, lw=1, zorder=1)
        axis.grid(axis="x", which="major", color="#e4e4e4", lw=0.8, zorder=0)
        axis.tick_params(axis="both", length=0)
        axis.set_title(shape.replace("x", " × "), loc="left", fontsize=10, fontweight="bold")
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
        ticks = [v for v in (0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128) if low <= v <= high]
        axis.set_xticks(ticks, [f"{v:g}x" for v in ticks])
        axis.minorticks_off()
    axes[-1, 0].set_xlabel("time of the baseline / time of diffkern (higher is better, log scale)", fontsize=9)
    used = [name for name in _COLOURS if any(b.name == name for bars in panels.values() for _, b in bars)]
    against = "against" if len(used) < 5 else "vs"  # all of them stand in one line
    handles: list[Any] = [Patch(color=_COLOURS[name], label=f"{against} {_NAMES.get(name, name)}") for name in used]
    if any(b.target is not None for bars in panels.values() for _, b in bars):
        handles.append(Line2D([], [], color=_INK, lw=2.2, label="target (red: missed)"))
    handles.append(Line2D([], [], color=_INK, lw=1.0, alpha=0.55, label="20–80 % of the rounds"))
    machine = (
        facts.get("gpu") or f"{facts.get('processor', '')}, {facts.get('threads', '?')} threads, {facts.get('isa', '')}"
    )
    names = ("diffkern", "torch", "diffusers")
    versions = ", ".join(f"{name} {facts[name]}" for name in names if name in facts)
    figure.suptitle("diffkern: how many times faster", x=0.012, y=1 - 0.1 / height, ha="left", va="top", fontsize=13)
    under = f"{machine}  ·  {versions}  ·  {facts.get('date', '')}"
    busiest = max((r.others for r in results if r.others is not None), default=0.0)
    if busiest > 0.1:
        under += f"  ·  BUSY MACHINE: others used up to {busiest:.0%}"
    figure.text(0.012, 1 - 0.42 / height, under, fontsize=8.5, color="#555555", va="top")
    figure.legend(
        handles=handles, loc="upper left", bbox_to_anchor=(0.004, 1 - 0.55 / height), ncol=len(handles), fontsize=8.5,
        frameon=False, handlelength=1.4, columnspacing=1.4,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.66 / height), pad=0.6)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def write(results: Sequence[Result], facts: dict[str, str], folder: Path) -> list[Path]:
    """Write table.md, results.csv, results.json, ratios.png and attention.png into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
        "table.md": markdown(results, facts),
        "results.csv": to_csv(results),
        "results.json": to_json(results, facts),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    charts = []
    for name, of in (("ratios.png", False), ("attention.png", True)):
        write_chart([r for r in results if bool(r.flops) is of], facts, folder / name)
        if (folder / name).exists():
            charts.append(folder / name)
    return [folder / name for name in texts] + charts
