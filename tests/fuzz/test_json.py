"""Plans and checkpoints from JSON that was changed at random: what was written, or a sentence."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import Any

import torch
from helpers.fuzzing import fuzz
from hypothesis import strategies as st

from diffkern import samplers, schedules
from diffkern.nn import DiTConfig, UNetConfig
from diffkern.plan import Plan

PLANS = [
    samplers.heun(schedules.edm(), 3),
    samplers.ddpm(schedules.linear(20), 3, variance="learned"),
    samplers.dpmpp_2m_sde(schedules.edm(), 3, noise_path="brownian"),
    samplers.ddim(schedules.cosine(20), 3, clip=1.0).with_threshold(0.9, 2.0),
]
TEXTS = [plan.to_json() for plan in PLANS]
CONFIGS: list[UNetConfig | DiTConfig] = [UNetConfig(), DiTConfig(image_size=(8, 4))]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([10**400, -1, 0, 1, 2**53, 2**63]),
    st.floats(),
    st.text(max_size=6),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)


def places(data: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value in it."""
    found = [here] if here else []
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        found += places(value, (*here, key))
    return found


def changed(data: Any, draw: Any) -> Any:
    """The data with one value, or one name, in the place of another."""
    data = copy.deepcopy(data)
    *way, last = draw(st.sampled_from(places(data)))
    inside = data
    for key in way:
        inside = inside[key]
    if isinstance(inside, dict) and draw(st.integers(0, 3)) == 0:
        value = inside.pop(last)
        if draw(st.booleans()):
            inside[draw(st.text(max_size=5))] = value
    else:
        inside[last] = draw(VALUES)
    return data


def check_sentence(error: ValueError) -> None:
    text = str(error)
    assert type(error) is ValueError
    assert 0 < len(text) < 700
    assert len(text.splitlines()) == 1


@fuzz(400, data=st.data())
def test_a_plan_that_was_changed(data: st.DataObject) -> None:
    start = json.loads(data.draw(st.sampled_from(TEXTS)))
    text = json.dumps(changed(start, data.draw))
    try:
        plan = Plan.from_json(text)
    except ValueError as error:
        check_sentence(error)
        return
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.table.dtype == torch.float64
    assert not bool(plan.table.isnan().any())
    str(plan)


@fuzz(150, text=st.sampled_from(TEXTS), at=st.integers(0, 4000), cut=st.integers(0, 8), new=st.text(max_size=8))
def test_a_plan_whose_text_was_changed(text: str, at: int, cut: int, new: str) -> None:
    at %= len(text)
    try:
        plan = Plan.from_json(text[:at] + new + text[at + cut :])
    except ValueError as error:
        check_sentence(error)
    else:
        assert Plan.from_json(plan.to_json()) == plan


@fuzz(150, data=st.data(), original=st.sampled_from(CONFIGS))
def test_a_network_that_was_changed(data: st.DataObject, original: UNetConfig | DiTConfig) -> None:
    start = json.loads(json.dumps(dataclasses.asdict(original)))
    values = changed(start, data.draw)
    try:
        config = original.from_dict(json.loads(json.dumps(values)))
    except ValueError as error:
        check_sentence(error)
    else:
        assert original.from_dict(config.to_dict()) == config
