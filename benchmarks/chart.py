"""The bar chart of a run: how many times faster ours is, one bar a case and baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.result import BaselineResult, Result

__all__ = ["write_chart"]

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
                panels.setdefault(r.size, []).append((r, b))
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
