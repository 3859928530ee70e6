"""Schedules as JSON: `Schedule.to_json`, `Schedule.from_json` and the dicts under them; reached through the methods."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from diffkern.records import from_record, record_of
from diffkern.schedules.base import Schedule
from diffkern.schedules.continuous import (
    CosineSchedule,
    LaplaceSchedule,
    LinearLogSNRSchedule,
    SubVPSchedule,
    VPSchedule,
)
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.exploding import EDMSchedule, ExponentialVESchedule, VESchedule
from diffkern.schedules.paths import FlowSchedule, LogSNRSchedule, PathSchedule

__all__ = ["from_dict", "to_dict"]

KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        VPSchedule,
        SubVPSchedule,
        CosineSchedule,
        LaplaceSchedule,
        LinearLogSNRSchedule,
        VESchedule,
        ExponentialVESchedule,
        EDMSchedule,
        FlowSchedule,
    )
}
"""The schedules that a few numbers define."""
TABLE = DiscreteSchedule.__name__
ALL: dict[str, type] = {**KINDS, TABLE: DiscreteSchedule}
MOST = 1_000_000
"""The longest table that is read."""


def to_dict(schedule: Schedule) -> dict[str, Any]:
    """The schedule as plain data; a table is its alphas_cumprod, exact, and the times that its levels are known by."""
    if type(schedule) is DiscreteSchedule:
        kept = schedule.kept.tolist()
        data = {"kind": TABLE, "name": schedule.name, "alphas_cumprod": schedule.alphas_cumprod.tolist()}
        return data if kept == list(range(schedule.T)) else {**data, "kept": kept}
    if isinstance(schedule, PathSchedule | LogSNRSchedule):
        raise ValueError(
            f"schedule {schedule.name} is made of functions, which JSON does not hold: make it again where it is "
            "loaded, and pass it as schedule="
        )
    return record_of(schedule, ALL, "schedule", "pass it as schedule=")


def from_dict(data: object) -> Schedule:
    """The schedule that `to_dict` wrote; ValueError naming the field for anything else."""
    if isinstance(data, Mapping) and data.get("kind") == TABLE:
        return _table(data)
    found: Schedule = from_record(data, ALL, "schedule")
    return found


def _table(data: Mapping[str, Any]) -> DiscreteSchedule:
    unknown = sorted(set(data) - {"kind", "name", "alphas_cumprod", "kept"})
    if unknown:
        raise ValueError(f"schedule of kind {TABLE} has the fields name, alphas_cumprod, kept, got {unknown[0]!r:.80}")
    name, values, kept = data.get("name", "discrete"), data.get("alphas_cumprod"), data.get("kept")
    if not isinstance(name, str):
        raise ValueError(f"schedule.name must be text, got {name!r:.80}")
    for field, found in (("alphas_cumprod", values), ("kept", [] if kept is None else kept)):
        if not isinstance(found, list) or len(found) > MOST:
            size = f"{len(found)} entries" if isinstance(found, list) else type(found).__name__
            raise ValueError(f"schedule.{field} must be a list of at most {MOST} numbers, got {size}")
    for i, value in enumerate(values):  # type: ignore[arg-type]
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"schedule.alphas_cumprod[{i}] must be a finite number, got {value!r:.80}")
    table = DiscreteSchedule(values, name)  # type: ignore[arg-type]
    return table if kept is None else table.known_by(kept)
