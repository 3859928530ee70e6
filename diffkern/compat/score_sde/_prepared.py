"""Predictor and corrector as rows that are known before the loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffkern.compat.kit import loop
from diffkern.compat.score_sde import _rows
from diffkern.compat.score_sde._updates import POWERS, Langevin, LangevinCorrector, LinearPredictor
from diffkern.compat.score_sde.models import ScoreFunction, set_mode


def prepared_run(
    predictor: Any, corrector: Any, score_fn: ScoreFunction, x: Tensor, times: Tensor, denoise: bool
) -> Tensor:
    """The state after all ``times`` [N]: one op an update, and one table made on the device for a langevin update.

    The times are read to the host once, before the loop; the labels of all network calls are made there, too. With
    ``denoise`` the last update's mean (its noise is drawn all the same).
    """
    host = times.cpu()
    scale = score_fn.scale(host)
    steps = max(corrector.n_steps, 0) if isinstance(corrector, Langevin) else 0
    norms = steps > 0 and isinstance(corrector, LangevinCorrector)  # step sizes made after the network's calls
    found: tuple[Tensor, ...] = ()
    rows: list[Tensor] = []
    """Of each time: the corrector's rows, then the predictor's."""
    if steps:
        triples = _finite(corrector, _rows.triple(corrector.coefficients(host), scale))
        rows += [triples] * steps
        if norms:
            if scale is not None:  # the ratio of the norms will be that of z and m
                triples = triples / scale.abs()[:, None] ** POWERS
            found = triples.to(x.device).unsqueeze(1).unbind()
            _rows.placed(x.device)  # these are copied before the loop
            _rows.COPIES.on(POWERS, x.device)
    predicts = isinstance(predictor, LinearPredictor)
    if predicts:
        triples = _finite(predictor, _rows.triple(predictor.coefficients(host), scale))
        if denoise:
            triples[-1, 2] = 0.0
        rows.append(triples)
    calls, network = len(rows), score_fn.model
    set_mode(network, train=False)
    if not calls:
        return x
    table = _rows.table(torch.stack(rows, 1).flatten(0, 1))
    # A label of its own for every call: networks may change theirs in place.
    labels = score_fn.labels(times).repeat_interleave(calls)[:, None].repeat(1, len(x)).unbind()
    drawn = x

    def call(x: Tensor, i: int) -> Tensor:
        """The network's output; the noise is drawn beside it, in the dtype that the state has before the output."""
        nonlocal drawn
        first = predicts and predictor.draws_first and i % calls == steps
        if first:
            drawn = torch.randn_like(x)
        m: Tensor = network(x, labels[i])
        if not first:
            drawn = torch.randn_like(x)
        return m

    def late(i: int, m: Tensor, z: Tensor | None) -> Tensor | None:
        at, update = divmod(i, calls)
        assert z is not None
        return _rows.table(corrector.scaled(found[at], m, z, None)) if update < steps else None

    return loop.run(loop.of_table(table), x, call, lambda dtype, i: drawn, late=late if norms else None)


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
