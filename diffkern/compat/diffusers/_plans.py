"""The drop-ins' rows as plans that `diffkern.sample` runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from diffkern import streams
from diffkern.checks import PREDICTIONS_ELSEWHERE
from diffkern.compat.diffusers._host import Number
from diffkern.names import TimeDtype
from diffkern.plan import COLUMNS, Plan, Row
from diffkern.schedules.predictions import check_prediction

PREDICTIONS = {**PREDICTIONS_ELSEWHERE, "flow_prediction": "velocity"}
"""diffusers' names of the predictions in diffkern's."""


def plan_of(
    name: str,
    table: Tensor,
    times: Sequence[Number],
    prediction: str,
    *,
    saves: Sequence[Sequence[tuple[int, str]]] | None = None,
    learned: Tensor | None = None,
    init_scale: float = 1.0,
    first_k: float = 1.0,
    time_dtype: TimeDtype = "int64",
) -> Plan:
    """Rows of a table as a plan: row i is given the model's time ``times[i]``. ``learned`` [S, 2] holds r0 and r1 where
    the model learned its variance."""
    rows = []
    for i, (values, time) in enumerate(zip(table.tolist(), times, strict=True)):
        entries = dict(zip(COLUMNS, values, strict=True))
        entries["stream"], entries["known_stream"] = streams.STEP + i, streams.KNOWN + i
        if learned is not None:
            entries["r0"], entries["r1"] = learned[i].tolist()
        rows.append(Row(**entries, time=float(time), saves=tuple(saves[i]) if saves else ()))
    return Plan(
        name=name,
        rows=tuple(rows),
        init_scale=init_scale,
        first_k=first_k,
        prediction=check_prediction(PREDICTIONS.get(prediction, prediction)),
        time_dtype=time_dtype,
        learned_variance=learned is not None,
    )


def thresholded(plan: Plan, config: Any) -> Plan:
    """``plan`` with the config's dynamic thresholding (`Plan.with_threshold`), or as it is where there is none.

    Raises ValueError for what a plan does not say: a ``sample_max_value`` below 1, where the original divides by less
    than 1, and rows that read the model beside x0.
    """
    if not config.thresholding:
        return plan
    maximum = config.sample_max_value
    if not maximum >= 1.0:
        raise ValueError(f"a plan's threshold is at least 1, got sample_max_value={maximum}: use step")
    return plan.with_threshold(config.dynamic_thresholding_ratio, None if maximum == math.inf else float(maximum))
