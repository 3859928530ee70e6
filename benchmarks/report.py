"""What a run found, as a Markdown table, CSV and JSON, and the folder with these and the charts."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.chart import write_chart
from benchmarks.result import BaselineResult, Result
from benchmarks.timing import Stats

__all__ = ["BaselineResult", "Result", "markdown", "summary", "to_csv", "to_json", "write"]


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
        f"{result.name} ({result.size} {result.dtype}): {_timing(result.ours)}{_pages(result.faults)}"
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
        first = [r.title, r.size, r.dtype]
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
            start = [r.name, r.size, r.dtype, r.bytes, r.passed, b.name]
            writer.writerow([*start, *times, *ratios, *("" if value is None else value for value in end)])
    return stream.getvalue()


def _numbers(stats: Stats | None) -> list[Any]:
    return [""] * 4 if stats is None else [stats.median, stats.minimum, stats.p20, stats.p80]


def to_json(results: Sequence[Result], facts: dict[str, str]) -> str:
    """Everything, as data."""
    return json.dumps({"environment": facts, "results": [asdict(r) for r in results]}, indent=1) + "\n"


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
