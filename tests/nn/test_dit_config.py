"""What a DiT is made from: JSON, sentences for what makes none, and the published sizes."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from helpers.dit_cases import small

from diffkern.nn import DiT, DiTConfig, preset
from diffkern.nn.presets import PRESETS

PAPER = {
    "S": {2: 33, 4: 33, 8: 33},
    "B": {2: 130, 4: 130, 8: 131},
    "L": {2: 458, 4: 458, 8: 459},
    "XL": {2: 675, 4: 675, 8: 676},
}
"""Millions of parameters: table 4 of Peebles & Xie 2023."""


@pytest.mark.parametrize("name", [name for name in PRESETS if name.startswith("DiT-")])
def test_published_sizes_have_the_parameters_of_the_paper(name: str) -> None:
    size, patch = name.removeprefix("DiT-").split("/")
    config = preset(name)
    assert isinstance(config, DiTConfig)
    with torch.device("meta"):
        model = DiT(config)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == PAPER[size][int(patch)]
    assert (config.patch, config.classes, config.out_channels, config.size) == (int(patch), 1000, 8, (32, 32))


def test_all_of_the_paper_are_there_and_no_other_name_is() -> None:
    assert {f"DiT-{size}/{patch}" for size, sizes in PAPER.items() for patch in sizes} <= set(PRESETS)
    with pytest.raises(ValueError, match=r"name must be one of .*DiT-S/2, .*got 'DiT-XL/3'"):
        preset("DiT-XL/3")


def test_config_through_json() -> None:
    config = small(image_size=(8, 12), attention="torch", mlp_eps=1e-5, embedding=8)
    assert DiTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert DiTConfig.from_dict(json.loads(json.dumps(small().to_dict()))) == small()
    with pytest.raises(ValueError, match=r"DiTConfig has the fields image_size.*, got 'channels'"):
        DiTConfig.from_dict({"channels": 3})
    with pytest.raises(ValueError, match=r"DiTConfig.depth must be an integer, got 2.5"):
        DiTConfig.from_dict({"depth": 2.5})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image_size": 9}, "image_size must be divisible by 2, the size of a patch, got 9"),
        ({"image_size": (8, 9)}, r"image_size must be divisible by 2, the size of a patch, got \(8, 9\)"),
        ({"image_size": (8, 8, 8)}, r"image_size must be one size or \(height, width\), got \(8, 8, 8\)"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"patch": 0}, "patch must be at least 1, got 0"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"depth": 1 << 21}, "depth must be at most 1048576, got 2097152"),
        ({"embedding": 0}, "embedding must be at least 1, got 0"),
        ({"width": 18}, "width must be divisible by 4, got 18"),
        ({"heads": 3}, "heads does not fit: num_heads must divide the 16 channels, got 3"),
        ({"heads": 4}, "heads does not fit: the channels of a head must be a multiple of 8 .*, got 4"),
        ({"mlp_ratio": 0.01}, "mlp_ratio must give between 1 and 1048576 channels for 16, got 0.01"),
        ({"mlp_ratio": math.inf}, "mlp_ratio must give between 1 and 1048576 channels for 16, got inf"),
        ({"classes": -1}, "classes must not be negative, got -1"),
        ({"time_channels": 7}, "time_channels must be even, and at least 4, got 7"),
        ({"time_channels": 2}, "time_channels must be even, and at least 4, got 2"),
        ({"time_freq_shift": 8.0}, "time_freq_shift must be below 8, half of time_channels, got 8.0"),
        ({"eps": 0.0}, "eps must be positive, got 0.0"),
        ({"mlp_eps": math.nan}, "mlp_eps must be positive, got nan"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"time_scale": math.inf}, "time_scale must be finite, got inf"),
        ({"attention": "flash"}, "attention must be one of diffkern, torch, got 'flash'"),
    ],
)
def test_bad_config(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"DiTConfig.{sentence}"):
        small(**changes)
