"""Schedules as JSON: `Schedule.to_json`, `Schedule.from_json` and the dicts under them; reached through the methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffkern.records import kind_of, of_kind, record
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


@dataclasses.dataclass(frozen=True)
class _Table:
    """What is stored of a `DiscreteSchedule`."""

    alphas_cumprod: tuple[float, ...]
    name: str = "discrete"
    kept: tuple[int, ...] | None = None


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
    return kind_of(schedule, ALL, "schedule", "pass it as schedule=")


def from_dict(data: object) -> Schedule:
    """The schedule that `to_dict` wrote; ValueError naming the field for anything else."""
    if isinstance(data, Mapping) and data.get("kind") == TABLE:
        return _table(data)
    found: Schedule = of_kind(data, ALL, "schedule")
    return found


def _table(data: Mapping[str, Any]) -> DiscreteSchedule:
    for name in ("alphas_cumprod", "kept"):
        size = len(data[name]) if isinstance(data.get(name), list) else 0
        if size > MOST:
            raise ValueError(f"schedule.{name} must be a list of at most {MOST} numbers, got {size}")
    found = record(_Table, {name: value for name, value in data.items() if name != "kind"}, "schedule.")
    table = DiscreteSchedule(list(found.alphas_cumprod), found.name)
    return table if found.kept is None else table.known_by(list(found.kept))
