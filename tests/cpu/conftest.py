from __future__ import annotations

from pathlib import Path

import pytest
from helpers.cpu_kernels import LEVELS, Kernels, build, supported


@pytest.fixture(scope="session")
def library() -> Path:
    return build()


@pytest.fixture(scope="session", params=LEVELS)
def kernels(request: pytest.FixtureRequest, library: Path) -> Kernels:
    """The kernels of every level that this machine has."""
    if not supported(library, request.param):
        pytest.skip(f"this machine has no {request.param}")
    return Kernels(library, request.param)
