"""Puts the folder that holds the package on the path, and runs every kernel test for two architectures."""

import os
import sys

import pytest

FOLDER = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if FOLDER not in sys.path:
    sys.path.insert(0, FOLDER)


@pytest.fixture(params=["sm_80", "sm_90"])
def arch(request: pytest.FixtureRequest) -> str:
    return str(request.param)
