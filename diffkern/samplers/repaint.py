"""RePaint: inpainting that goes back to noise and samples again, so that the painted part comes to fit the known."""

from __future__ import annotations

import itertools
import math

from diffkern import streams
from diffkern.integers import check_rows, integer
from diffkern.modes import neutrally
from diffkern.names import Prediction, Spacing
from diffkern.plan import Plan, Row
from diffkern.samplers.arguments import need_schedule, not_negative
from diffkern.samplers.nodes import Node, chain, ends_on_x0, native_scale, own_grid, row, still
from diffkern.schedules.base import Schedule
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.timesteps import Numbers
from diffkern.signatures import names_the_nearest


@names_the_nearest
@neutrally
def repaint(
    schedule: Schedule,
    steps: int | None = None,
    jump_length: int = 10,
    jump_n_sample: int = 10,
    *,
    eta: float = 1.0,
    prediction: Prediction | None = None,
    sigmas: Numbers | None = None,
    timesteps: Numbers | None = None,
    spacing: Spacing | None = None,
    clip: float | None = None,
) -> Plan:
    """RePaint (arXiv 2201.09865): every ``jump_length`` steps back up by as many levels, ``jump_n_sample`` - 1 times.

        down:  x' = alpha' x0 + sqrt(sigma'^2 - g^2) eps + g z, g = eta sigma' sqrt(1 - (alpha sigma'/(alpha' sigma))^2)
        up:    x' = r x + sqrt(sigma'^2 - r^2 sigma^2) z,         r = alpha'/alpha

    For ``sample(model, x, plan, mask=, known=, seeds=)``, which after every row sets the known part to the known image,
    noised to the row's level: by address, so its bits are those of the noised image itself. eta = 1 (default) is DDPM's
    step with beta_tilde, eta = 0 DDIM's. The state is the schedule's own, the grid is `ddim`'s on tables ("leading"),
    else `euler`'s. Going up is one row without a model call, whatever ``jump_length`` (the authors and diffusers add
    the noise level by level: the same distribution), and belongs to the step after it.

    Where to jump is the authors' schedule: from the levels 0, jump_length, 2 jump_length, ... below steps -
    jump_length, level 0 being the last before clean data. (diffusers jumps one level later, from clean data too.)
    Model calls: steps + jumps jump_length, with jumps = (jump_n_sample - 1) ceil((steps - jump_length)/jump_length).
    ``jump_n_sample`` = 1 is the ancestral sampler alone, 10 and 10 of 250 steps are the paper's.
    """
    not_negative("eta", eta)
    jump_length, jump_n_sample = integer("jump_length", jump_length), integer("jump_n_sample", jump_n_sample)
    need_schedule(schedule)
    if spacing is None:
        spacing = "leading" if isinstance(schedule, DiscreteSchedule) else "linspace"
    space, points = own_grid("repaint", schedule, steps, prediction, sigmas, timesteps, spacing, clip)
    count = len(points) - 1
    last = count - 1
    jumps = len(range(0, count - jump_length, jump_length))
    check_rows("jump_n_sample", jump_n_sample, jumps * (jump_length + 1))
    rows: list[Row] = []
    at: list[Node] = []
    for before, after in itertools.pairwise(_levels(count, jump_length, jump_n_sample)):
        node, to = points[last - before], points[last - after]
        at.append(node if after < before else to)
        rows.append(_down(len(rows), node, to, eta) if after < before else _up(len(rows), node, to))
    return chain("repaint", space, rows, at, native_scale(space, points[0]))


def _levels(steps: int, length: int, samples: int) -> list[int]:
    """The levels in turn, from steps - 1 (noise) to -1 (data): down by one, up by ``length`` at once."""
    jumps = dict.fromkeys(range(0, steps - length, length), samples - 1)
    level = steps - 1
    found = [level]
    while level >= 0:
        if jumps.get(level, 0) > 0:
            jumps[level] -= 1
            level += length
        else:
            level -= 1
        found.append(level)
    return found


def _down(i: int, node: Node, to: Node, eta: float) -> Row:
    """An ancestral step."""
    if node.v == to.v:
        return still(i, node, to)
    if ends_on_x0(to):
        return row(i, node, to, b=1.0)
    ratio = node.alpha * to.sigma / (to.alpha * node.sigma)
    g = min(to.sigma, eta * to.sigma * math.sqrt(max(0.0, 1.0 - ratio * ratio)))
    eps = math.sqrt(to.sigma**2 - g**2)
    if node.clip < math.inf:
        return row(i, node, to, a=eps / node.sigma, b=to.alpha - eps * node.alpha / node.sigma, g=g)
    return row(i, node, to, a=eps * node.P, b=to.alpha, d=eps * node.Q, g=g)


def _up(i: int, node: Node, to: Node) -> Row:
    """Forward noising from one level to a higher one."""
    r = to.alpha / node.alpha
    return Row(
        a=r,
        g=math.sqrt(max(0.0, to.sigma**2 - (r * node.sigma) ** 2)),
        known_s=to.alpha,
        known_n=to.sigma,
        stream=streams.STEP + i,
        known_stream=streams.KNOWN + i,
        time=to.time,
        calls_model=False,
        ends_step=False,
    )
