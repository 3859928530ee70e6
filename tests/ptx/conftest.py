"""The kernels of csrc/cuda in the PTX emulator, and their CPU twins."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
from ptx.harness import Cpu, Device, NoNvcc, find_nvcc

ARCHITECTURES = ("sm_80", "sm_90")  # every test; test_architectures.py has a few cases for others


@pytest.fixture(scope="session")
def cpu(tmp_path_factory: pytest.TempPathFactory) -> Cpu:
    return Cpu(tmp_path_factory.mktemp("cpu"))


@functools.cache
def _device(arch: str) -> Device:
    return Device(arch)


@pytest.fixture(scope="session")
def device_of() -> Callable[[str], Device]:
    """Architecture -> its kernels. Without nvcc the tests fail, they are not skipped."""
    try:
        find_nvcc()
    except NoNvcc as error:
        pytest.fail(str(error), pytrace=False)
    return _device


@pytest.fixture(scope="session", params=ARCHITECTURES)
def device(request: pytest.FixtureRequest, device_of: Callable[[str], Device]) -> Device:
    return device_of(request.param)
