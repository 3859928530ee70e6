"""The same bits at every SIMD level: DIFFKERN_ISA forces each in a process of its own, which hashes its results."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import diffkern
from diffkern import _load

LEVELS = list(_load.layout()["isa"])  # the least first
AVAILABLE = LEVELS[: LEVELS.index(_load.build_info()["isa_best"]) + 1]


@functools.cache
def made_at(level: str) -> dict[str, dict[str, str]]:
    package = str(Path(diffkern.__file__).parent.parent)
    path = os.pathsep.join([package, os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent.parent / "helpers" / "isa_hashes.py")],
        env={**os.environ, "DIFFKERN_ISA": level, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["isa"] == level
    return result


def hashes_at(level: str) -> dict[str, str]:
    return made_at(level)["hashes"]


def needs(level: str) -> None:
    if level not in AVAILABLE:
        pytest.skip(f"this machine has {len(AVAILABLE)} of {len(LEVELS)} levels: {', '.join(AVAILABLE)}")


@pytest.fixture(scope="module")
def scalar() -> dict[str, str]:
    return hashes_at("scalar")


def test_the_level_in_use_has_the_bits_of_scalar(scalar: dict[str, str]) -> None:
    from helpers.isa_hashes import hashes

    here = hashes()
    assert len(here) > 80
    assert {name for name in here if here[name] != scalar[name]} == set()


@pytest.mark.parametrize("level", LEVELS[1:])
def test_every_level_has_the_bits_of_scalar(level: str, scalar: dict[str, str]) -> None:
    needs(level)
    if level == _load.build_info()["isa"]:
        return  # compared above
    there = hashes_at(level)
    assert {name for name in there if there[name] != scalar[name]} == set()


@pytest.mark.parametrize("level", LEVELS[2:])
def test_levels_with_fused_products_agree(level: str) -> None:
    """Convolutions, whose sums of products scalar rounds twice a term."""
    needs(level)
    assert made_at(level)["fused"] == made_at("avx2")["fused"]
