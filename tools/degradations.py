"""Trains a model that gives back what patches of photographs have lost; writes its picture and table.

    python tools/degradations.py super_resolution         # 4 x 4 times as many pixels: 8 x 8 to 32 x 32 in colour
    python tools/degradations.py inpainting               # colourisation, deblurring
    python tools/degradations.py super_resolution --seconds 300
    python tools/degradations.py super_resolution --iterations 5 --out build/try    # pictures and table there

About twelve minutes each on two cores, nothing from the network. The data are the photographs that scikit-image ships:
trained on their left parts, measured on their right ones, which share no pixel. A run that was stopped goes on
(build/degradations). The table stands in docs/super-resolution.md between the marks of its name.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffkern
from diffkern import ops, pictures
from diffkern.data import Images, Subset, open_images
from diffkern.degradations import get_degradation
from diffkern.diffusion import Diffusion
from diffkern.generate import described, recommended, restore
from diffkern.metrics import PairedScores, paired_scores, train_classifier
from diffkern.train import TrainConfig, fit

sys.path.insert(0, str(Path(__file__).resolve().parent))

from scaling import processor_name
from trained import COMMON, NETWORK

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "super-resolution.md"
OPTIONS: dict[str, dict[str, Any]] = {
    "super_resolution": {"factor": 4},
    "inpainting": {"mask": "box", "share": 0.3},
    "colourisation": {},
    "deblurring": {"sigma": 2.0},
}
APART = 0.75
"""Patches that begin right of this share of a photograph are measured, those that end left of it are trained on."""
PATCH, STRIDE = 32, 8
SEEN, SAMPLES, ROWS = 256, 3, 8
"""Patches that are measured, samples of each in the picture, and rows of it."""
ITERATIONS = 2000
MEASURED = 20
"""Iterations that tell how many fit into --seconds."""
CONFIG = dataclasses.replace(
    COMMON, objective="flow", network_options=NETWORK, times="logit_normal", labels=False, flip=True
)
SAMPLER, STEPS = "heun", 18


def parts(images: Images) -> tuple[Images, Images]:
    """The patches of the photographs' left and right parts, which share no pixel."""
    assert images.labels is not None
    left, right = [], []
    for label in range(int(images.labels.max()) + 1):
        which = torch.nonzero(images.labels == label)[:, 0]
        columns = _columns(images, which)
        edge = APART * ((columns - 1) * STRIDE + PATCH)
        for i, number in enumerate(which.tolist()):
            begin = (i % columns) * STRIDE
            if begin + PATCH <= edge:
                left.append(number)
            elif begin >= edge:
                right.append(number)
    return Subset(images, torch.tensor(left)), Subset(images, torch.tensor(right))


def _columns(images: Images, which: Tensor) -> int:
    """Patches in a row of a photograph: where one does not share its pixels with the next, a row ends; of black ones
    it may seem not to."""
    x0 = images.batch(which)[0]
    follows = (x0[:-1, :, :, STRIDE:] == x0[1:, :, :, :-STRIDE]).flatten(1).all(1)
    ends = torch.nonzero(~follows)[:, 0]
    return math.gcd(len(x0), *(int(end) + 1 for end in ends))


def run(name: str, iterations: int | None, seconds: float | None, out: Path | None) -> None:
    """One degradation: training, samples, scores, picture, table."""
    config = dataclasses.replace(CONFIG, degradation=name, degradation_options=OPTIONS[name])
    training, measured = parts(open_images("photos", flip=True))
    if seconds is not None:
        iterations = fitting(config, training, seconds)
    config = dataclasses.replace(config, iterations=iterations or ITERATIONS)
    folder = (ROOT / "build" / "degradations" if out is None else out) / name
    spent = folder / "minutes.txt"  # before it was stopped
    minutes, start = float(spent.read_text()) if spent.exists() else 0.0, time.perf_counter()
    fitted = fit(None, training, config, out=folder, progress=name)
    minutes += (time.perf_counter() - start) / 60
    spent.write_text(f"{minutes}\n")
    if fitted.stopped:
        raise SystemExit(f"stopped after {fitted.step} iterations; the same command goes on from there")
    with fitted.averages.used("0.100"):
        rows, picture, words = measure(fitted.diffusion, training, measured)
    images = (ROOT / "docs" / "images") if out is None else out
    pictures.write(picture, images / f"degradation_{name}.png")
    table = [
        f"{len(training)} patches, {config.iterations} iterations of {config.batch}, {minutes:.1f} minutes of training",
        f"({processor_name()}, {diffkern.build_info()['isa']}, torch {torch.__version__.split('+')[0]}, "
        f"{time.strftime('%Y-%m-%d')}); {words}; {len(measured)} patches kept apart, of which {rows[0].images}.",
        "",
        *markdown(rows),
        "",
        f"![{name}: input, three samples, truth](images/degradation_{name}.png)",
    ]
    (folder / "table.md").write_text("\n".join(table) + "\n")
    (folder / "scores.json").write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1) + "\n")
    if out is None:
        into_page(name, table)
    print("\n".join(table), flush=True)


def fitting(config: TrainConfig, training: Images, seconds: float) -> int:
    """How many iterations take so long, by some that are thrown away."""
    few = dataclasses.replace(config, iterations=MEASURED)
    times: list[float] = []
    fit(None, training, few, progress=False, callback=lambda *_: times.append(time.perf_counter()))
    each = (times[-1] - times[2]) / (len(times) - 3)  # the first ones are slower
    return max(MEASURED, int(seconds / each))


def measure(diffusion: Diffusion, training: Images, measured: Images) -> tuple[list[PairedScores], Any, str]:
    """The rows of the table, and the picture of input, samples and truth."""
    degradation = diffusion.degradation
    assert degradation is not None
    judge = train_classifier(training, progress=True)
    count = min(SEEN, len(measured))
    truth = measured.batch(torch.arange(count) * len(measured) // count)[0]
    inputs = degradation.degrade(truth, ops.seeds(0, count))
    plan = recommended(diffusion, SAMPLER, STEPS)
    samples = _joined(restore(diffusion, inputs, 1, plan, project=False, progress="samples"))
    kinds = [("input", degradation.shown(inputs)), ("samples", samples)]
    if degradation.projects:
        kinds.append(("samples, projected", degradation.project(samples, inputs)))
    rows = [paired_scores(kind, images, truth, inputs, degradation, judge) for kind, images in kinds]
    some = torch.arange(ROWS) * count // ROWS
    several = _joined(restore(diffusion, inputs[some], SAMPLES, plan, seed=1)).unflatten(0, (len(some), SAMPLES))
    beside = [degradation.shown(inputs[some]).unsqueeze(1), several, truth[some].unsqueeze(1)]
    words = ["input", "samples", *[""] * (SAMPLES - 1), "truth"]
    return rows, pictures.grid(list(torch.cat(beside, 1)), words, scale=3), described(plan)


def _joined(found: Any) -> Tensor:
    return torch.cat([part.images for part in found])


def markdown(rows: list[PairedScores]) -> list[str]:
    """The scores as a table."""
    lines = ["| | PSNR | SSIM | feature distance | consistency | worst |", "|---|--:|--:|--:|--:|--:|"]
    for row in rows:
        values = (
            f"{row.psnr:.2f} | {row.ssim:.3f} | {row.feature_distance:.4f} | {row.consistency:.2f} | {row.worst:.2f}"
        )
        lines.append(f"| {row.name} | {values} |")
    return lines


def into_page(name: str, table: list[str]) -> None:
    """Puts the table between the marks of its name."""
    text = PAGE.read_text()
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    if begin not in text:
        raise SystemExit(f"{PAGE} has no mark {begin}")
    PAGE.write_text(re.sub(f"{begin}.*{end}", lambda _: "\n".join([begin, "", *table, "", end]), text, flags=re.S))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=list(OPTIONS))
    parser.add_argument("--iterations", type=int, help=f"of the training ({ITERATIONS})")
    parser.add_argument("--seconds", type=float, help="so long a training instead")
    parser.add_argument("--out", type=Path, help="folder for the run, picture and table (build/ and docs/)")
    options = parser.parse_args()
    if options.iterations is not None and options.seconds is not None:
        parser.error("give --iterations or --seconds, not both")
    get_degradation(options.name, **OPTIONS[options.name])
    run(options.name, options.iterations, options.seconds, options.out)


if __name__ == "__main__":
    main()
