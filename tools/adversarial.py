"""Draws docs/images/adversarial_saturation.png: the optimal discriminator, and what a generator learns from it.

    python tools/adversarial.py [--output docs]

All curves are those of `diffkern.objectives.adversarial`. Needs matplotlib (the demo extra).
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from diffkern.names import AdversarialName
from diffkern.objectives.adversarial import generator_loss, optimal_discriminator, optimal_logits, saturation

ROOT = Path(__file__).resolve().parent.parent
BLUE, ORANGE, GREEN, GREY = "#3465a4", "#d9730d", "#2e8b57", "#8a8a8a"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.edgecolor": GREY,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.dpi": 110,
}
KINDS: tuple[tuple[AdversarialName, str, str], ...] = (
    ("minimax", BLUE, "log(1 - D(G)), minimax"),
    ("non_saturating", ORANGE, "-log D(G), non-saturating"),
)
GRID = torch.linspace(-20.0, 30.0, 20_001, dtype=torch.float64)


def normal(mean: float) -> Tensor:
    """The density of N(mean, 1) on the grid."""
    return torch.exp(-0.5 * (GRID - mean) ** 2) / math.sqrt(2.0 * math.pi)


def pull(distance: float, kind: AdversarialName) -> float:
    """|d E loss / d m| of a generator N(m, 1) at m = distance, for data N(0, 1) and the optimal discriminator.

    The discriminator C is held: d/dm E[loss(C(m + z))] = E[loss'(C) C'(x)], by quadrature.
    """
    p, q = normal(0.0), normal(distance)
    ratio = optimal_logits(p.clamp(min=1e-300), q.clamp(min=1e-300))
    slope_of_ratio = torch.gradient(ratio, spacing=(GRID,))[0]
    logits = ratio.requires_grad_()
    (slope,) = torch.autograd.grad(generator_loss(logits, kind, reduction="sum"), logits)
    return abs(float((q * slope * slope_of_ratio).sum() * (GRID[1] - GRID[0])))


def draw() -> Any:
    """Three panels."""
    figure, (game, slopes, far) = plt.subplots(1, 3, figsize=(10.2, 3.0), layout="constrained")
    p, q = normal(0.0), normal(2.0)
    shown = (GRID > -4.0) & (GRID < 6.0)
    game.plot(GRID[shown], p[shown], color=GREY, label="data p")
    game.plot(GRID[shown], q[shown], color=GREEN, label="generated q")
    game.plot(GRID[shown], optimal_discriminator(p, q)[shown], color=BLUE, label="D* = p / (p + q)")
    game.set_title("The optimal discriminator")
    game.set_xlabel("x")
    game.legend(loc="upper right", fontsize=8)
    logits = torch.linspace(-8.0, 8.0, 321, dtype=torch.float64)
    curves = saturation(logits)
    for (kind, color, label), curve in zip(KINDS, (curves.minimax, curves.non_saturating), strict=True):
        slopes.plot(logits, curve.abs(), color=color, label=label)
        distances = torch.linspace(0.25, 8.0, 32).tolist()
        far.plot(distances, [pull(distance, kind) for distance in distances], color=color, label=label)
    slopes.set_title("Gradient in a sample's logit")
    slopes.set_xlabel("logit C of a generated sample")
    slopes.set_ylabel("|d loss / d C|")
    slopes.annotate("D sure:\nit is generated", (-7.8, 0.12), color=GREY, fontsize=8)
    far.set_title("Pull on a generator far from the data")
    far.set_xlabel("distance of N(m, 1) from the data N(0, 1)")
    far.set_ylabel("|d E loss / d m|")
    far.set_yscale("log")
    far.set_ylim(1e-5, 20.0)
    far.legend(loc="lower left", fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder with the folder images")
    folder = parser.parse_args().output / "images"
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure = draw()
        figure.savefig(folder / "adversarial_saturation.png", metadata={"Software": None})
    print(folder / "adversarial_saturation.png")


if __name__ == "__main__":
    main()
