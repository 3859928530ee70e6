"""Calculates bytes and times of training and sampling on 8 to 512 GPUs, and writes them into docs/scale-out.md.

    python tools/scale_out.py               # writes the page's tables
    python tools/scale_out.py --count       # counts parameters and operations again, a minute

Formulas and assumptions: tools/scale_formulas.py. tests/package/test_scale_out_page.py holds the page to them, and
their counts to the networks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from scale_formulas import (
    CASES,
    FAST,
    SLOW,
    Case,
    all_reduce,
    alone,
    checkpoint,
    ddp,
    forward,
    fsdp,
    hidden_from,
    memory_ddp,
    memory_fsdp,
    written,
)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scale-out.md"
GPUS = (8, 16, 32, 64, 128, 256, 512)
TEXT_TOKENS = 77
"""Tokens that SDXL's UNet attends to."""


# -------------------------------------------------------------------------------------------------------------- tables
def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [list(head), ["---", *["---:"] * (len(head) - 1)], *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def digits(value: float, unit: float = 1.0) -> str:
    """Three figures, whole from 100 on."""
    value /= unit
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"


def percent(value: float) -> str:
    return f"{100 * value:.{0 if value >= 0.0995 else 1}f} %"


def networks_table() -> str:
    """Sizes, and bytes of a GPU's memory before any activation."""
    rows = []
    for case in CASES:
        counts = case.counts
        sizes = [4 * counts.parameters, memory_ddp(case), *(memory_fsdp(case, n) for n in (8, 64, 512))]
        cells = [digits(counts.parameters, 1e6), digits(counts.forward, 1e9), *(digits(size, 1e9) for size in sizes)]
        rows.append([case.name, *cells])
    head = ["", "parameters, M", "forward, GFLOP an image", "gradient, GB", "DDP, GB a GPU", "FSDP2 on 8, GB a GPU"]
    return table([*head, "on 64", "on 512"], rows)


def weak_table(case: Case) -> str:
    """The same number of images on each GPU: DDP, and FSDP2 on the fast network."""
    rows = []
    for n in GPUS:
        fast, slow = (ddp(case, n, case.local, network) for network in (FAST, SLOW))
        cut = fsdp(case, n, case.local, FAST)
        one = alone(case, case.local)
        first = [digits(seconds, 1e-3) for seconds in (fast.traffic, fast.exposed, fast.total)]
        second = [digits(seconds, 1e-3) for seconds in (cut.traffic, cut.exposed, cut.total)]
        shares = [percent(one / fast.total), percent(one / slow.total)]
        rows.append([n, *first, *shares, digits(n * case.local / fast.total), *second])
    head = ["GPUs", "DDP: all-reduce, ms", "not hidden, ms", "step, ms", "efficiency", f"with {SLOW.name}", "images/s"]
    return table([*head, "FSDP2: traffic, ms", "not hidden, ms", "step, ms"], rows)


def strong_table() -> str:
    """The published batch on more and more GPUs."""
    rows = []
    for case in CASES:
        cells = []
        for n in GPUS:
            images = case.batch / n
            share = alone(case, case.batch) / (n * ddp(case, n, images, FAST).total)
            cells.append(percent(share) if images >= 1 else "-")
        few = (hidden_from(case, 64, FAST), hidden_from(case, 64, SLOW))
        rows.append([f"{case.name}, {case.batch}", *cells, *few])
    head = ["batch", *map(str, GPUS), f"hidden from, {FAST.name}", SLOW.name]
    return table(head, rows)


def checkpoint_table() -> str:
    """Sizes, and seconds to write: by one process, by 64 of them each its part."""
    rows = []
    for case in CASES:
        size, steps = checkpoint(case), 1000 * ddp(case, 64, case.local, FAST).total
        one, every = written(case, 1), written(case, 64)
        sizes = [digits(size, 1e9), digits(4 * case.counts.parameters, 1e9)]
        rows.append([case.name, *sizes, digits(one), percent(one / (one + steps))])
        rows[-1] += [digits(every), percent(every / (every + steps))]
    head = ["", "whole, GB", "to sample from, GB", "one process, s", "of the time, every 1000 steps"]
    return table([*head, "64 processes, s", "of the time"], rows)


def data_table() -> str:
    """What the images are to be read at, in bytes a second of a node and of the job; what a step's losses need."""
    rows = []
    for case in CASES:
        speed = case.local / ddp(case, 512, case.local, FAST).total
        c, h, w = case.pixels
        rates = [8 * speed, 512 * speed], [8 * speed * case.image, 512 * speed * case.image, 4 * c * h * w * speed]
        cells = [*(digits(rate) for rate in rates[0]), *(digits(rate, 1e6) for rate in rates[1])]
        rows.append([case.name, f"{c} x {h} x {w}", case.image, *cells])
    head = ["", "C x H x W", "bytes an image", "images/s of a node", "of 512 GPUs", "MB/s of a node", "of 512 GPUs"]
    return table([*head, "to a GPU in float32, MB/s"], rows)


def sampling_table(count: int = 50_000, calls: int = 40) -> str:
    """A set for evaluation: processes do not talk; bytes of the shards."""
    rows = []
    for case in CASES:
        one = forward(case, count * calls)
        c, h, w = case.pixels
        rows.append([case.name, digits(count * c * h * w, 1e6), *(digits(one / n) for n in (1, *GPUS))])
    return table(["", "shards, MB", "1 GPU, s", *(f"{n}" for n in GPUS)], rows)


def evaluation_line(count: int = 50_000) -> str:
    """What `Statistics.over_ranks` sums: of Inception 2048 pooled and 2023 spatial features, 1008 logits, a label."""
    sums = sum(8 * (d * d + d) for d in (2048, 2023))
    kept = count * (4 * (2048 + 1008) + 8)
    fast, slow = (all_reduce(sums + kept, 512, network, 7) for network in (FAST, SLOW))
    return (
        f"Of {count} images and Inception these are sums of {digits(sums, 1e6)} MB, and {digits(kept, 1e6)} MB of "
        f"features, logits and labels,\nwhich every process has in the end: {digits(fast, 1e-3)} ms for 512 GPUs, or "
        f"{digits(slow, 1e-3)} ms with {SLOW.name} a node."
    )


def sections() -> dict[str, str]:
    """The parts of the page that are calculated, by the names in its comments."""
    found = {"networks": networks_table(), "batch": strong_table(), "checkpoints": checkpoint_table()}
    found |= {f"weak {case.name}": f"{case.name}, {case.local} images a GPU:\n\n{weak_table(case)}" for case in CASES}
    return found | {"data": data_table(), "sampling": sampling_table(), "evaluation": evaluation_line()}


def filled(text: str, parts: dict[str, str]) -> str:
    """The page with its parts between `<!-- NAME -->` and `<!-- end -->`; ValueError for one it does not have."""
    for name, part in parts.items():
        begin, end = f"<!-- {name} -->\n", "\n<!-- end -->"
        if text.count(begin) != 1:
            raise ValueError(f"the page must have {begin.strip()} once, got {text.count(begin)}")
        before, rest = text.split(begin)
        text = before + begin + part + rest[rest.index(end) :]
    return text


# ------------------------------------------------------------------------------------------------------------ counting
def counted(preset: str) -> tuple[int, int]:
    """Parameters of a network of `diffkern.nn`, and operations of its forward pass on one image, without memory."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from diffkern.nn import DiT, DiTConfig, UNet
    from diffkern.nn.presets import PRESETS
    from diffkern.ops.flops import FLOP_FORMULAS

    config: Any = PRESETS[preset]
    with torch.device("meta"):
        network: Any = DiT(config) if isinstance(config, DiTConfig) else UNet(config)
        x, t = torch.empty(1, config.in_channels, config.image_size, config.image_size), torch.empty(1)
        cond: Any = torch.empty(1, dtype=torch.int64) if config.classes else None
        if getattr(config, "context_channels", None):
            context = torch.empty(1, TEXT_TOKENS, config.context_channels)
            cond = {"context": context, "vector": torch.empty(1, config.vector_channels)}
            cond["ids"] = torch.empty(1, config.ids)
    counter: Any = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    with counter, torch.no_grad():
        network(x, t, cond)
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--count", action="store_true", help="count again and show")
    arguments = parser.parse_args()
    if arguments.count:
        for case in CASES:
            print(case.name, *counted(case.preset))
        return
    arguments.output.write_text(filled(arguments.output.read_text(), sections()))


if __name__ == "__main__":
    main()
