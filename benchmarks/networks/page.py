"""The section that a run writes: facts, rules and tables in Markdown, between two marks of its page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.networks.contenders import EAGER
from benchmarks.networks.counts import GPUS, LAUNCH, GpuRow
from benchmarks.networks.evaluation import Found, Row
from benchmarks.networks.profiles import KINDS, Profile
from benchmarks.timing import Stats

__all__ = ["BEGIN", "END", "gpu_table", "profile_table", "put", "section", "table"]

BEGIN, END = "<!-- networks: written by `python -m benchmarks.networks` -->", "<!-- end of networks -->"


def put(path: Path, text: str) -> None:
    """Write the section into the page: between its marks, or at its end; a page that is not there is made."""
    old = path.read_text(encoding="utf-8") if path.exists() else ""
    block = f"{BEGIN}\n{text.strip()}\n{END}\n"
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if begin and end:
        new = before + block + after.lstrip("\n")
    else:
        new = (old.rstrip() + "\n\n" if old.strip() else "") + block
    path.write_text(new, encoding="utf-8")


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(*words: str) -> list[str]:
    return [_line(words), "|" + "---|" * len(words)]


def _duration(stats: Stats) -> str:
    scale, unit = (1, "s") if stats.median >= 1 else (1e3, "ms")
    return f"{scale * stats.median:.3g} {unit}"


def _ratio(row: Row) -> str:
    if row.ratio is None:
        return "1 (the fastest)" if row.time is not None else ""
    text = f"{row.ratio.median:.2f} [{row.ratio.p20:.2f}, {row.ratio.p80:.2f}]"
    return text if row.ratio.median >= 1 else f"**{text}**"


def _mebi(number: int | None) -> str:
    return "" if number is None else f"{number / 2**20:.0f} MiB"


def table(found: Sequence[Found], training: bool = False) -> str:
    """Times and ratios; of training steps with memory."""
    words = ["network", "batch", "dtype", "by", "error", "time", "ratio [p20, p80]"]
    lines = _head(*words, *(["peak", "kept", "peak of diffusers'"] if training else []), "busy")
    for one in found:
        start = [f"{one.title}, {one.parameters / 1e6:.1f} M", f"{one.batch}", one.dtype]
        busy = "" if one.others is None else f"{one.others:.0%}"
        if one.why:
            lines.append(_line([*start, one.why, *[""] * (6 if training else 3), ""]))
        base = next((row.peak for row in one.rows if row.name == EAGER), None)
        for i, row in enumerate(one.rows):
            lead = start if i == 0 else [""] * 3
            error = "" if row.error is None else f"{row.error[0 if one.dtype == 'float32' else 1]:.1e}"
            cells = [row.name, error, row.why or (_duration(row.time) if row.time else ""), _ratio(row)]
            if training:
                of = f"{row.peak / base:.2f}" if row.peak and base else ""
                cells += [_mebi(row.peak), _mebi(row.saved), of]
            lines.append(_line([*lead, *cells, busy if i == 0 else ""]))
    return "\n".join(lines) + "\n"


def profile_table(found: Sequence[tuple[str, Sequence[Profile]]]) -> str:
    """Shares of an evaluation by kind; convolutions and linear layers with their share of the products' rate."""
    lines = _head("network", "by", "time", *KINDS, "the largest of the rest")
    for name, rows in found:
        for i, one in enumerate(rows):
            lead = [name if i == 0 else "", one.name]
            if one.why:
                lines.append(_line([*lead, one.why, *[""] * len(KINDS), ""]))
                continue
            cells = []
            for kind in KINDS:
                rate = one.rate(kind) if kind in ("convolution", "linear") else None
                cells.append(f"{one.share(kind):.1%}" + ("" if rate is None else f" at {rate:.0%}"))
            rest = ", ".join(f"{op.removeprefix('aten::')} {share:.1%}" for op, share in one.others)
            lines.append(_line([*lead, f"{one.total * 1e3:.4g} ms", *cells, rest]))
    return "\n".join(lines) + "\n"


def gpu_table(found: Sequence[tuple[str, int, Sequence[GpuRow]]]) -> str:
    """Counts, and the estimates made of them."""
    estimates = [f"{gpu.name}, estimate" for gpu in GPUS]
    lines = _head("network", "batch", "by", "launches", "allocations", "bytes", "around", *estimates, "host, estimate")
    for name, batch, rows in found:
        for i, row in enumerate(rows):
            lead = [name, f"{batch}"] if i == 0 else ["", ""]
            if row.counts is None:
                lines.append(_line([*lead, row.name, row.why, *[""] * (4 + len(GPUS))]))
                continue
            c = row.counts
            cells = [f"{c.launches}", f"{c.allocations}", f"{c.moved / 1e6:.0f} MB", f"{c.around / c.moved:.0%}"]
            cells += [f"{c.roofline(gpu) * 1e3:.3g} ms" for gpu in GPUS]
            lines.append(_line([*lead, row.name, *cells, f"{c.host * 1e3:.2g} ms"]))
    return "\n".join(lines) + "\n"


EVALUATION = """Ratio: time of the fastest of diffusers, diffusers in channels_last and, for ADM, guided-diffusion's
network over the row's, taken round by round in turns in one process; median and 20th to 80th percentile; below 1 in
bold. Same weights, random. Error in float32: the largest difference from diffusers' output over its largest value, at
most 1e-5; in bfloat16: root mean square, from the float32 output, over its own, at most 1.1 times diffusers'. What is
wrong is not timed. Busy: share of the cores that other processes used. "freeze": with `diffkern.nn.freeze`, which keeps
the packed weights of convolutions from call to call, as `diffkern.sample` does by itself for a run."""
TRAINING = """Forward, mean square, backward; no optimiser, no dropout. Error: of the gradient by x. Peak: what torch's
allocator held at once beside the parameters, gradients with it (scratch of oneDNN and of our kernels is not counted);
kept: what the forward stores for the backward."""
RUN = """From noise to images or latents, without guidance, in float32. Diffusers by its pipeline (DDIM of images) or by
the loop of one; `diffkern.nn` by `diffkern.sample`. Error: of the final state from the same noise, at most 1e-3."""
PROFILE = """Shares of an evaluation, by torch's profiler on the calling thread; "at": operations a second of these ops
as a share of what matrix products reach alone on all threads, a convolution's counted by its definition, of which
Winograd's products need 4 in 9. "Between ops" is Python, modules and dispatch."""
GPU = f"""Nothing was timed here. One evaluation in bfloat16 on torch's fake CUDA tensors: ops that write a tensor (a
lower bound of the kernels), bytes that they read and write (each tensor once an op; caches not considered),
allocations; "around": the share of bytes outside convolutions, products and attention. Estimates, not measurements: on
the device, every op at the limit of the data sheet's bandwidth or dense bfloat16 rate; on the host,
{LAUNCH * 1e6:.0f} us a launch (assumed). The larger one is what to expect at best. Code that `torch.compile` generates
is left out: it cannot be listed without a GPU."""


def section(
    command: str,
    facts: dict[str, str],
    evaluations: Sequence[Found],
    trainings: Sequence[Found],
    runs: Sequence[Found],
    profiles: Sequence[tuple[str, Sequence[Profile]]],
    counts: Sequence[tuple[str, int, Sequence[GpuRow]]],
    notes: Sequence[str] = (),
) -> str:
    """All of it; a part without results is left out."""
    parts = [
        f"## Whole networks\n\n`{command}`\n",
        "\n".join(f"- {key}: {value}" for key, value in facts.items()) + "\n",
    ]
    parts += [f"{note}\n" for note in notes]
    if evaluations:
        parts.append(f"### An evaluation\n\n{EVALUATION}\n\n{table(evaluations)}")
    if trainings:
        parts.append(f"### A training step\n\n{TRAINING}\n\n{table(trainings, training=True)}")
    if runs:
        parts.append(f"### A sampling run\n\n{RUN}\n\n{table(runs)}")
    if profiles:
        parts.append(f"### Where the time goes\n\n{PROFILE}\n\n{profile_table(profiles)}")
    if counts:
        parts.append(f"### What a GPU would be asked for\n\n{GPU}\n\n{gpu_table(counts)}")
    return "\n".join(parts)
