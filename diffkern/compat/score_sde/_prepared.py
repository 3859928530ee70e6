"""The loop of predictor and corrector whose rows are known before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern import ops
from diffkern.checks import returned
from diffkern.compat.score_sde import _rows
from diffkern.compat.score_sde._updates import POWERS, Fused, Langevin, LangevinCorrector, powers
from diffkern.compat.score_sde.models import ScoreFunction, set_mode


def fused_run(
    predictor: Any, corrector: Any, score_fn: ScoreFunction, x: Tensor, times: Tensor, denoise: bool
) -> Tensor:
    """The state after all ``times`` [N]: one op an update, and one table made on the device for a langevin update.

    The times are read to the host once, before the loop; the labels of all network calls are made there, too. With
    ``denoise`` the last update's mean (its noise is drawn all the same).
    """
    host, last = times.cpu(), len(times) - 1
    scale = score_fn.scale(host)
    steps = max(corrector.n_steps, 0) if isinstance(corrector, Langevin) else 0
    norms = steps > 0 and isinstance(corrector, LangevinCorrector)  # step sizes made after the network's calls
    before: Tensor | None = None
    found: tuple[Tensor, ...] = ()
    if steps:
        triples = _finite(corrector, _rows.triple(corrector.coefficients(host), scale))
        if norms:
            if scale is not None:  # the ratio of the norms will be that of z and m
                triples /= scale.abs()[:, None] ** POWERS
            found = triples.to(x.device).unsqueeze(1).unbind()
            _rows.placed(x.device)  # both are copied before the loop
            powers(x.device)
        else:
            before = _rows.table(triples)
    after: Tensor | None = None
    if isinstance(predictor, Fused):
        triples = _finite(predictor, _rows.triple(predictor.coefficients(host), scale))
        if denoise:
            triples[last, 2] = 0.0
        after = _rows.table(triples)
    # A label of its own for every call: networks may change theirs in place.
    calls = steps + (after is not None)
    labels = iter(score_fn.labels(times).repeat_interleave(calls)[:, None].repeat(1, len(x)).unbind())
    network = score_fn.model
    set_mode(network, train=False)
    for i in range(len(times)):
        for _ in range(steps):
            m = returned(network(x, next(labels)), x.shape)
            x, z = _widened(x, torch.randn_like(x), m)
            if before is None:
                table = _rows.table(corrector.scaled(found[i], m, z, None))
                x = ops.step(x, m, table=table, noise=z)[0]
            else:
                x = ops.step(x, m, table=before, row=i, noise=z)[0]
        if after is not None:
            first = torch.randn_like(x) if predictor.draws_first else None
            m = returned(network(x, next(labels)), x.shape)
            x, z = _widened(x, torch.randn_like(x) if first is None else first, m)
            x = ops.step(x, m, table=after, row=i, noise=z)[0]
    return x


def _finite(update: Any, triples: Tensor) -> Tensor:
    """Raises ValueError for coefficients of which score_sde makes NaN images."""
    bad = ~triples.isfinite().all(1)
    if bool(bad.any()):
        name, N = type(update).__name__, update.sde.N
        raise ValueError(
            f"the coefficients of {name} must be finite (VP and sub-VP: N larger than beta_max, eps so large that the "
            f"standard deviation is not 0), got N = {N}, for which step {int(bad.nonzero()[0])} has "
            f"{triples[bad][0].tolist()}"
        )
    return triples


def _widened(x: Tensor, z: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """State and noise in the wider of the dtypes of state and output."""
    if m.dtype == x.dtype:
        return x, z
    wide = torch.promote_types(x.dtype, m.dtype)
    return x.to(wide), z.to(wide)
