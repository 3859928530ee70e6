"""The page of ratios: `python -m benchmarks.ratios [--out docs/cpu-ratios.md]`.

Every op and every drop-in step beside what it replaces, from 1 to 2^24 elements, in float32, bfloat16 and float16; and
attention with few and many queries and keys. The cases are those of `python -m benchmarks`, which checks them and times
them at length; here each is timed for a moment, in turns with its baseline, and the fastest times are compared.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import cases, drop_in_cases, statistics_cases
from benchmarks.brownian_case import noise_sum
from benchmarks.case import Case, Setting, random_tensor
from benchmarks.learned_case import learned
from benchmarks.logprob_case import logprob
from benchmarks.machine import environment
from benchmarks.timing import interleave, wall_timer
from benchmarks.variational_case import hybrid
from diffkern import ops

__all__ = ["main"]

SHAPES = {
    0: (1, 1, 1, 1),
    10: (1, 4, 16, 16),
    14: (1, 4, 64, 64),
    18: (4, 4, 128, 128),
    24: (16, 16, 256, 256),
}
"""The states, by the logarithm of their elements."""
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}
OPS: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {
    "randn": (cases.randn, {}),
    "noising": (cases.noising, {}),
    "loss and gradient": (cases.loss, {"prediction": "v"}),
    "loss and gradient, eps stored": (cases.loss, {"prediction": "v", "stored": True}),
    "step, DDIM": (cases.step, {"kind": "ddim"}),
    "step, DDPM with noise": (cases.step, {"kind": "ddpm"}),
    "learned_step": (learned, {}),
    "dynamic_threshold": (statistics_cases.dynamic_threshold, {}),
    "moments": (statistics_cases.moments, {}),
}
FLOAT_ONLY: dict[str, tuple[Callable[..., Case], dict[str, Any]]] = {
    "step_logprob": (logprob, {}),
    "variational": (hybrid, {}),
    "noise_sum": (noise_sum, {}),
}
QUERIES_AND_KEYS = (
    *((1, 1), (1, 77), (1, 256), (4, 77), (8, 256), (16, 16)),
    *((64, 64), (64, 77), (256, 1), (256, 8), (256, 77), (256, 256)),
)


def fastest(ours: Callable[[], object], theirs: Callable[[], object], seconds: float, grad: bool = False) -> float:
    """Time of theirs over ours, each the least over the turns."""
    with torch.set_grad_enabled(grad):
        found = interleave(
            {"ours": ours, "theirs": theirs}, wall_timer(), sample_seconds=2e-4, budget_seconds=seconds, least_rounds=3
        )
    return min(found.samples["theirs"]) / min(found.samples["ours"])


def of_case(build: Callable[..., Case], seconds: float, shape: tuple[int, ...], **options: Any) -> float | None:
    """The ratio of a case; None where it cannot be had (a baseline that refuses the dtype or the size)."""
    try:
        case = build("", Setting("cpu", compiled=False), shape=shape, **options)
        theirs = case.baselines[0].fn
        return None if theirs is None else fastest(case.ours, theirs, seconds, case.grad)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return None


def rows(seconds: float, shapes: Sequence[tuple[int, ...]], drop_ins: bool) -> Iterator[tuple[str, list[float | None]]]:
    """(name, ratios by dtype and then shape) of the ops, or of the drop-ins' steps."""
    if not drop_ins:
        for name, (build, options) in OPS.items():
            yield name, [of_case(build, seconds, s, dtype=d, **options) for d in DTYPES.values() for s in shapes]
        for name, (build, options) in FLOAT_ONLY.items():
            yield name, [of_case(build, seconds, s, **options) for s in shapes]
        return
    for build, options in drop_in_cases.TABLE.values():
        if options["shape"] != drop_in_cases.SMALL or options.get("rng"):
            continue
        config = {key: value for key, value in options.items() if key not in ("shape", "steps", "goal")}
        found = []
        for dtype in DTYPES.values():
            for shape in shapes:
                steps = 50 if math.prod(shape) <= 2**14 else 10
                found.append(of_case(build, seconds, shape, dtype=dtype, steps=steps, **config))
        algorithm = config.get("algorithm_type", "")
        yield f"{config['kind']}{' ' + algorithm if algorithm else ''}", found


def attention_rows(seconds: float) -> Iterator[tuple[str, list[float | None]]]:
    """(queries x keys, ratios by dtype and then channels) against F.scaled_dot_product_attention."""
    for queries, keys in QUERIES_AND_KEYS:
        found: list[float | None] = []
        for dtype in DTYPES.values():
            for dim in (40, 64, 160):
                setting = Setting("cpu", compiled=False)
                q, k, v = (
                    random_tensor(i, (1, 8, n, dim), setting, dtype) for i, n in enumerate((queries, keys, keys))
                )
                ours, theirs = ops.attention, F.scaled_dot_product_attention
                found.append(fastest(lambda: ours(q, k, v), lambda: theirs(q, k, v), seconds))  # noqa: B023
        yield f"{queries} x {keys}", found


def table(head: Sequence[str], lines: Iterator[tuple[str, list[float | None]]]) -> str:
    """Markdown; a ratio below 1 is bold."""
    text = [f"| | {' | '.join(head)} |", f"|---|{'---|' * len(head)}"]
    for name, ratios in lines:
        cells = ["" if r is None else f"{r:.2f}" if r >= 1 else f"**{r:.2f}**" for r in ratios]
        cells += [""] * (len(head) - len(cells))
        text.append(f"| {name} | {' | '.join(cells)} |")
        print(text[-1], file=sys.stderr, flush=True)
    return "\n".join(text) + "\n"


def page(seconds: float, most: int, most_of_drop_ins: int, command: str) -> str:
    """The whole page."""
    shapes, fewer = ([s for power, s in SHAPES.items() if power <= n] for n in (most, most_of_drop_ins))
    facts = "\n".join(f"- {key}: {value}" for key, value in environment("cpu").items())
    sizes, few_sizes = (
        [f"{name} 2^{math.log2(math.prod(s)):.0f}" for name in DTYPES for s in of] for of in (shapes, fewer)
    )
    dims = [f"{name} D {dim}" for name in DTYPES for dim in (40, 64, 160)]
    return f"""# Ratios on the CPU

Time of what is replaced over ours, each the fastest of some turns: above 1 ours is the faster one. Written by
`{command}`; one thread; by the number of elements of the state. Differences of some percent are within the noise of the
machine, and a page of a busy machine says so in its load average.

{facts}

## Ops

Against plain torch or the diffusers scheduler that does the same, as in [benchmarks](benchmarks.md).

{table(sizes, rows(seconds, shapes, drop_ins=False))}
## Steps of the drop-ins

Whole loops of a diffusers scheduler with a model that costs nothing, per step.

{table(few_sizes, rows(seconds, fewer, drop_ins=True))}
## Attention, queries x keys

`diffkern.attention` on (1, 8, queries, D) against `F.scaled_dot_product_attention`. Where bfloat16 is below 1 on a
processor with AMX, the drop-ins leave the call to torch ([how it is chosen](compat-diffusers.md#attention)).

{table(dims, attention_rows(seconds))}"""


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ratios", description="Write the page of ratios.")
    parser.add_argument("--out", type=Path, default=Path("docs/cpu-ratios.md"), help="the page (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.2, help="time for one ratio (default: %(default)s)")
    parser.add_argument("--most", type=int, default=24, help="elements of an op's state, as a power of 2 (%(default)s)")
    parser.add_argument("--most-drop-ins", type=int, default=24, help="the same for the drop-ins (%(default)s)")
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    command = " ".join(["python -m benchmarks.ratios", *(sys.argv[1:] if words is None else words)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        text = page(arguments.seconds, arguments.most, arguments.most_drop_ins, command)
    arguments.out.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
