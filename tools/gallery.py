"""Draws docs/images/gallery_*.png, writes docs/gallery.md: schedules, weightings, time samplers, lecture pictures.

    python tools/gallery.py [--output docs]

What is drawn is what `diffkern.schedules.SCHEDULES`, `diffkern.objectives.weightings.WEIGHTINGS` and
`objectives.time_sampling.TIME_SAMPLERS` hold, so a new entry appears by itself. Needs matplotlib (the demo extra).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from diffkern import ops, schedules
from diffkern.objectives import time_sampling, weightings
from diffkern.schedules import DiscreteSchedule, EDMSchedule, Schedule
from diffkern.simulate import (
    DataMarginal,
    EulerMaruyamaSimulator,
    ForwardSDE,
    HeunSimulator,
    LangevinSDE,
    VectorField,
)

ROOT = Path(__file__).resolve().parent.parent
BLUE, ORANGE, GREEN, GREY = "#3465a4", "#d9730d", "#2e8b57", "#8a8a8a"
LINES = ("#3465a4", "#d9730d", "#2e8b57", "#b0305c", "#7d5ab5", "#6b4a2b", "#1f9fb0", "#808000", "#444444")
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "axes.edgecolor": "#8a8a8a",
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.dpi": 110,
}
PAGE = """# Gallery

Drawn by `make gallery` from the registries of the package, all with their default constants.

## Signal and noise rates

![alpha and sigma of every schedule]({images}/gallery_rates.png)

From data (left) to noise (right), whichever way the schedule's own time runs; EDM along its grid of noise levels.
Formulas and time conventions: the table at the top of `diffkern/schedules/makers.py`.

## Log signal-to-noise ratio

![log-SNR of every schedule]({images}/gallery_log_snr.png)

ln (alpha/sigma)^2: what schedules differ in once the state is rescaled. Where a curve leaves the picture, alpha or
sigma goes to 0 there.

## Weightings

![weight of the squared error of eps, x0 and v for every weighting]({images}/gallery_weightings.png)

The weight of the squared error of a prediction, over the log-SNR of the VP SDE (data on the right). The three lines of
a panel weigh the same loss: they differ in what the network predicts, not in what is learned. `uniform` is the
exception: it gives weight 1 to whatever is predicted. Formulas: `diffkern/objectives/weightings.py`.

## Time sampling

![density of every time sampler]({images}/gallery_time_samplers.png)

Density of training times on the linear table of 1000 steps, relative to uniform times (line), and 20 000 draws (bars).
{second_moment}Formulas: `diffkern/objectives/time_sampling.py`.

## Forward SDEs

![sample paths of three forward SDEs over the density of their marginals]({images}/gallery_forward.png)

Paths of the SDE that a schedule's path comes from, over the density p_t of all of them (each column scaled to its own
maximum), for data at three points. The drift pulls towards 0 in VP and sub-VP and is none in VE; the diffusion adds the
noise. Lecture 001's pictures; `diffkern.simulate.ForwardSDE`.

## A vector field and its flow

![the marginal vector field of the optimal-transport path and the particles that it moves]({images}/gallery_flow.png)

Lecture 003's blue and red: the field u_t, and the flow of the dots, from a normal distribution at t = 0 to data on a
spiral at t = 1. The field is the exact one, `DataMarginal.vector_field`.

## Conditional and marginal paths

![samples and trajectories of a conditional and of the marginal probability path]({images}/gallery_paths.png)

The same noise (grey at the left) carried along p_t(x given z) to one data point z, above, and along the marginal p_t to
all of the data, below. Conditional trajectories are straight lines; those of the marginal field bend, and no two
meet at the same time.

## Langevin dynamics

![samples of Langevin dynamics on a mixture after 0, 10, 100 and 1000 steps]({images}/gallery_langevin.png)

x + h s + sqrt(2 h) z with the exact score of three blurred points: the samples soon fall into the modes, and find
the balance between them slowly. Lectures 000 and 001.
"""
SECOND_MOMENT = """`loss_second_moment` has been fed the losses that a perfect eps network has on Gaussian data of
standard deviation 0.5.
"""


def way(schedule: Schedule, n: int = 400) -> tuple[Tensor, Tensor]:
    """(share of the way from data to noise, time), [n] each; a table's own steps."""
    low, high = schedule.time_range
    if isinstance(schedule, DiscreteSchedule):
        t = torch.arange(schedule.T)
        return (t + 1) / schedule.T, t
    # Close together at the ends, where many schedules are steep.
    share = 0.5 - 0.5 * torch.cos(torch.linspace(0.0, math.pi, n, dtype=torch.float64))
    if isinstance(schedule, EDMSchedule):
        root = 1.0 / schedule.rho  # the way along its Karras grid
        return share, (low**root + share * (high**root - low**root)) ** schedule.rho
    return share, schedule.data_end + share * (schedule.noise_end - schedule.data_end)


def panels(count: int, columns: int, width: float, height: float, **options: Any) -> tuple[Any, list[Any]]:
    """A figure with that many axes in rows of ``columns``; the places left over are empty."""
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(width * columns, height * rows), squeeze=False, layout="constrained", **options
    )
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.05)
    flat = list(axes.flat)
    for empty in flat[count:]:
        empty.set_visible(False)
    for lowest in flat[max(0, count - columns) : count]:
        lowest.xaxis.set_tick_params(labelbottom=True)
    return figure, flat[:count]


def draw_rates() -> Any:
    """alpha and sigma of every schedule; noise rates far above 1 on a logarithmic axis."""
    figure, axes = panels(len(schedules.SCHEDULES), 4, 2.6, 1.9, sharex=True)
    for axis, (name, make) in zip(axes, schedules.SCHEDULES.items(), strict=True):
        schedule = make()
        share, t = way(schedule)
        sigma = schedule.sigma(t)
        axis.plot(share, schedule.alpha(t), color=BLUE)
        axis.plot(share, sigma, color=ORANGE)
        axis.set_title(name)
        if float(sigma.max()) > 5:
            axis.set_yscale("log")
        else:
            axis.set_ylim(-0.03, max(1.05, 1.05 * float(sigma.max())))
        axis.set_xticks([0, 0.5, 1], ["data", "", "noise"])
    handles = [plt.Line2D([], [], color=color) for color in (BLUE, ORANGE)]
    figure.legend(handles, ["alpha, the signal rate", "sigma, the noise rate"], loc="outside upper center", ncols=2)
    return figure


def draw_log_snr() -> Any:
    """All log-SNR curves, in three families."""
    made = {name: make() for name, make in schedules.SCHEDULES.items()}
    tables = [name for name, s in made.items() if isinstance(s, DiscreteSchedule)]
    kept = [name for name, s in made.items() if name not in tables and s.prior_std == 1.0 and s.direction > 0]
    rest = [name for name in made if name not in tables and name not in kept]
    figure, axes = panels(3, 3, 3.7, 4.3, sharey=True)
    titles = ("tables", "t in [0, 1], variance at most 1", "exploding variance, and flow")
    for axis, title, names in zip(axes, titles, (tables, kept, rest), strict=True):
        # Every second line is dashed, so that one that lies on another is seen.
        for name, color, dash in zip(names, cycle(LINES), cycle(("-", (0, (4, 2)))), strict=False):
            share, t = way(made[name])
            value = made[name].log_snr(t)
            shown = torch.isfinite(value)
            axis.plot(share[shown], value[shown], color=color, linestyle=dash, label=name)
        axis.set_title(title)
        axis.set_ylim(-14, 14)
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["data", "", "", "", "noise"])
        axis.axhline(0, color=GREY, linewidth=0.8)
        axis.legend(loc="lower left", fontsize=8, handlelength=1.4)
    axes[0].set_ylabel("log-SNR = ln (alpha/sigma)²")
    return figure


def draw_weightings() -> Any:
    """Weights of the eps, x0 and v error over the log-SNR of the VP SDE; equal weightings share a panel."""
    schedule = schedules.vp()
    t = schedule.time_of_log_snr(torch.linspace(-10.0, 9.0, 300, dtype=torch.float64))
    log_snr = schedule.log_snr(t)
    kept: list[tuple[list[str], weightings.Weighting]] = []
    for name, weighting in weightings.WEIGHTINGS.items():
        twin = next((names for names, other in kept if other == weighting), None)
        if twin is None:
            kept.append(([name], weighting))
        else:
            twin.append(name)
    figure, axes = panels(len(kept), 4, 2.6, 2.1, sharex=True, sharey=True)
    styles = {"eps": (BLUE, "-", 1.8), "x0": (ORANGE, "-", 1.8), "v": (GREEN, (0, (4, 2)), 1.8)}
    for axis, (names, weighting) in zip(axes, kept, strict=True):
        curves = {p: weighting.at(schedule, p, t) for p in styles}
        same = all(torch.equal(curve, curves["eps"]) for curve in curves.values())
        for prediction, (color, dash, wide) in styles.items():
            axis.plot(log_snr, curves[prediction], color=GREY if same else color, linestyle=dash, linewidth=wide)
        if same:
            axis.annotate("eps, x0 and v", (-1, 2.5), color=GREY, ha="center")
        axis.set_title(", ".join(names))
        axis.set_yscale("log")
        axis.set_ylim(3e-4, 3e4)
    figure.supxlabel("log-SNR: noise on the left, data on the right", fontsize=9)
    handles = [plt.Line2D([], [], color=color, linestyle=dash) for color, dash, _ in styles.values()]
    labels = [f"weight of the {p} error" for p in styles]
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def draw_time_samplers() -> Any:
    """Density relative to uniform times on the linear table, and a histogram of draws."""
    schedule = schedules.linear()
    t = torch.arange(schedule.T)
    figure, axes = panels(len(time_sampling.TIME_SAMPLERS), 4, 2.6, 2.1, sharex=True)
    for axis, (name, make) in zip(axes, time_sampling.TIME_SAMPLERS.items(), strict=True):
        sampler = make()
        if isinstance(sampler, time_sampling.LossSecondMoment):
            # E|eps - E[eps given x]|^2 for data N(0, 0.5^2).
            signal = 0.25 * schedule.alpha(t) ** 2
            for _ in range(sampler.history):
                sampler.update(t, signal / (signal + schedule.sigma(t) ** 2))
        draws = sampler.sample(20_000, schedule, generator=torch.Generator().manual_seed(0))
        density = schedule.T * sampler.density(t, schedule)
        inner = density[1:-1]  # the ends of a table may hold the tails of a density that reaches beyond them
        counts = torch.histc(draws.double(), bins=50, min=0, max=schedule.T).double() * 50 / len(draws)
        axis.bar([(i + 0.5) / 50 for i in range(50)], counts.tolist(), width=0.02, color="#c9d8ec")
        axis.plot((t + 0.5) / schedule.T, density, color=BLUE)
        axis.set_ylim(0, max(1.6, 1.15 * max(float(inner.max()), float(counts[1:-1].max()))))
        axis.set_title(name)
        axis.set_xlim(0, 1)
        axis.set_xticks([0, 0.5, 1], ["data", "", "noise"])
    axes[0].set_ylabel("density / uniform")
    return figure


SPOTS = torch.tensor([[-1.0], [0.2], [1.2]], dtype=torch.float64)


def draw_forward() -> Any:
    """Paths of forward SDEs over the heat map of their marginals (lecture 001)."""
    chosen = (schedules.vp(), schedules.sub_vp(), schedules.ve_exponential(5.0))
    figure, axes = panels(len(chosen), 3, 3.3, 2.6)
    ts = torch.linspace(0.0, 1.0, 401, dtype=torch.float64)
    x = torch.linspace(-3.2, 3.2, 161, dtype=torch.float64)[:, None]
    for axis, schedule in zip(axes, chosen, strict=True):
        marginal, shown = DataMarginal(schedule, SPOTS), ts[8::4]
        density = torch.stack([marginal.log_density(x, t) for t in shown], 1).exp()
        heat = (density / density.amax(0)).sqrt()
        axis.pcolormesh(
            shown.numpy(),
            x[:, 0].numpy(),
            heat.numpy(),
            cmap="Oranges",
            vmin=0,
            vmax=1.6,
            shading="nearest",
            rasterized=True,
        )
        simulator = EulerMaruyamaSimulator(ForwardSDE(schedule), seeds=ops.seeds(3, 12))
        paths = simulator.simulate_trajectory(SPOTS.repeat(4, 1), ts)[..., 0]
        axis.plot(ts, paths, color=BLUE, linewidth=0.7, alpha=0.8)
        axis.set_title(schedule.name)
        axis.set_xlim(0, 1)
        axis.set_ylim(-3.2, 3.2)
        axis.set_xticks([0, 0.5, 1], ["data", "", "noise"])
        axis.grid(False)
    return figure


def spiral(n: int = 60) -> Tensor:
    """n points, [n, 2]."""
    angle = torch.linspace(0.8, 3.2 * math.pi, n, dtype=torch.float64)
    return torch.stack([angle.cos(), angle.sin()], 1) * (0.2 * angle)[:, None]


def draw_flow() -> Any:
    """The marginal vector field at four times, and the flow of particles from the noise up to there (lecture 003)."""
    marginal = DataMarginal(schedules.flow(), spiral())
    start = ops.randn((160, 2), ops.seeds(0, 160), dtype=torch.float64)
    ts = torch.linspace(0.0, 0.99, 100, dtype=torch.float64)
    paths = HeunSimulator(VectorField(marginal.vector_field)).simulate_trajectory(start, ts)
    side = torch.linspace(-2.4, 2.4, 15, dtype=torch.float64)
    nodes = torch.cartesian_prod(side, side)
    figure, axes = panels(4, 4, 2.5, 2.85, sharex=True, sharey=True)
    for axis, k in zip(axes, (0, 45, 75, 99), strict=True):
        field = marginal.vector_field(nodes, ts[k])
        field = field / (1.0 + field.norm(dim=1, keepdim=True))  # direction, and a bounded length
        axis.quiver(*nodes.T.numpy(), *field.T.numpy(), color=BLUE, alpha=0.6, scale=18, width=0.005)
        axis.plot(*paths[max(0, k - 25) : k + 1, :40].permute(2, 0, 1), color="#c22f2f", linewidth=0.5, alpha=0.5)
        axis.plot(*paths[k].T, ".", color="#c22f2f", markersize=3)
        axis.set_title(f"t = {float(ts[k]):.2g}")
        frame(axis, 2.5)
    return figure


def frame(axis: Any, reach: float) -> None:
    """A square picture without ticks."""
    axis.set_xlim(-reach, reach)
    axis.set_ylim(-reach, reach)
    axis.set_aspect("equal")
    axis.set_xticks([])
    axis.set_yticks([])


def draw_paths() -> Any:
    """One noise along a conditional and along the marginal path: samples at four times, and trajectories."""
    flow, data = schedules.flow(), spiral()
    marginal, z = DataMarginal(flow, data), data[52]
    start = ops.randn((200, 2), ops.seeds(1, 200), dtype=torch.float64)
    ts = torch.linspace(0.0, 0.99, 100, dtype=torch.float64)
    fields = {
        "conditional": VectorField(lambda x, t: marginal.path.vector_field(x, z.expand_as(x), t)),
        "marginal": VectorField(marginal.vector_field),
    }
    figure, axes = panels(8, 4, 2.5, 2.75, sharex=True, sharey=True)
    for row, (name, field) in enumerate(fields.items()):
        paths = HeunSimulator(field).simulate_trajectory(start, ts)
        for axis, k in zip(axes[4 * row : 4 * row + 4], (0, 45, 75, 99), strict=True):
            axis.plot(*data.T, "x", color=ORANGE, markersize=2.5, alpha=0.7)
            axis.plot(*paths[: k + 1, :25].permute(2, 0, 1), color=BLUE, linewidth=0.6, alpha=0.5)
            axis.plot(*paths[k].T, ".", color=GREY if k == 0 else BLUE, markersize=3)
            axis.set_title(f"{name}, t = {float(ts[k]):.2g}")
            frame(axis, 2.7)
    return figure


def draw_langevin() -> Any:
    """Langevin dynamics on the density of three blurred points, from the same far start (lectures 000, 001)."""
    points = torch.tensor([[-1.4, -0.6], [1.3, -0.9], [0.2, 1.4]], dtype=torch.float64)
    level, noise = schedules.edm(), 0.55
    marginal = DataMarginal(level, points, torch.tensor([0.5, 0.3, 0.2]))
    start = torch.tensor([[-2.2, 2.0]], dtype=torch.float64).repeat(300, 1)
    simulator = EulerMaruyamaSimulator(LangevinSDE(marginal.score, at=noise), seeds=ops.seeds(2, 300))
    paths = simulator.simulate_trajectory(start, torch.linspace(0.0, 20.0, 1001, dtype=torch.float64))
    side = torch.linspace(-2.8, 2.8, 81, dtype=torch.float64)
    nodes = torch.cartesian_prod(side, side)
    density = marginal.log_density(nodes, noise).exp().reshape(81, 81).T
    figure, axes = panels(4, 4, 2.5, 2.85, sharex=True, sharey=True)
    for axis, k in zip(axes, (0, 10, 100, 1000), strict=True):
        axis.contourf(side.numpy(), side.numpy(), density.numpy(), levels=9, cmap="Oranges", alpha=0.75)
        axis.plot(*paths[max(0, k - 100) : k + 1, 0].T, color=BLUE, linewidth=0.8)
        axis.plot(*paths[k].T, ".", color=BLUE, markersize=3, alpha=0.6)
        axis.set_title(f"{k} steps")
        axis.grid(False)
        frame(axis, 2.8)
    return figure


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw and write everything; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of gallery.md (default: docs)")
    output = parser.parse_args(arguments).output
    (output / "images").mkdir(parents=True, exist_ok=True)
    drawings = {
        "rates": draw_rates,
        "log_snr": draw_log_snr,
        "weightings": draw_weightings,
        "time_samplers": draw_time_samplers,
        "forward": draw_forward,
        "flow": draw_flow,
        "paths": draw_paths,
        "langevin": draw_langevin,
    }
    with plt.rc_context(STYLE):
        for name, draw in drawings.items():
            figure = draw()
            figure.savefig(output / "images" / f"gallery_{name}.png")
            plt.close(figure)
    fed = SECOND_MOMENT if "loss_second_moment" in time_sampling.TIME_SAMPLERS else ""
    (output / "gallery.md").write_text(PAGE.format(images="images", second_moment=fed))
    print(f"written: {output / 'gallery.md'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
