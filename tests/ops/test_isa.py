"""The same bits at every SIMD level: DIFFKERN_ISA forces each in a process of its own, which hashes its results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import diffkern
from diffkern._load import build_info

LEVELS = ["portable", "avx2", "avx512", "avx512_bf16"]
AVAILABLE = LEVELS[: LEVELS.index(build_info()["isa_best"]) + 1]


def hashes_at(level: str) -> dict[str, str]:
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
    return result["hashes"]


@pytest.fixture(scope="module")
def portable() -> dict[str, str]:
    return hashes_at("portable")


def test_portable_is_the_level_in_use(portable: dict[str, str]) -> None:
    from helpers.isa_hashes import hashes

    here = hashes()
    assert len(here) > 80
    assert {name for name in here if here[name] != portable[name]} == set()


@pytest.mark.parametrize("level", LEVELS[1:])
def test_level_is_portable(level: str, portable: dict[str, str]) -> None:
    if level not in AVAILABLE:
        pytest.skip(f"this machine has {len(AVAILABLE)} of {len(LEVELS)} levels: {', '.join(AVAILABLE)}")
    if level == build_info()["isa"]:
        return  # compared above
    there = hashes_at(level)
    assert {name for name in there if there[name] != portable[name]} == set()
