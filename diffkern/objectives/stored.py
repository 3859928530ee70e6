"""Weightings and time samplers as JSON; reached through the methods `to_json` and `from_json`."""

from __future__ import annotations

from typing import Any

from diffkern.objectives import weightings
from diffkern.objectives._densities import CosMap, LogitNormal, LogNormal, Mode, Uniform
from diffkern.objectives._time_sampler import TimeSampler
from diffkern.objectives._weighting import Weighting
from diffkern.records import kind_of, of_kind

WEIGHTINGS: dict[str, type] = {type(kind).__name__: type(kind) for kind in weightings.WEIGHTINGS.values()}
TIME_SAMPLERS: dict[str, type] = {kind.__name__: kind for kind in (Uniform, LogitNormal, Mode, CosMap, LogNormal)}


def weighting_to_dict(weighting: Weighting) -> dict[str, Any]:
    """The weighting's kind and constants."""
    return kind_of(weighting, WEIGHTINGS, "weight", "pass it as weight= where it is loaded")


def weighting_from_dict(data: object) -> Weighting:
    """The weighting that `weighting_to_dict` wrote."""
    found: Weighting = of_kind(data, WEIGHTINGS, "weight")
    return found


def times_to_dict(sampler: TimeSampler) -> dict[str, Any]:
    """The time sampler's kind and constants."""
    return kind_of(sampler, TIME_SAMPLERS, "times", "pass it as times= where it is loaded")


def times_from_dict(data: object) -> TimeSampler:
    """The time sampler that `times_to_dict` wrote."""
    found: TimeSampler = of_kind(data, TIME_SAMPLERS, "times")
    return found
