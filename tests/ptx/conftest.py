"""The kernels of csrc/cuda in the PTX emulator, and their CPU twins."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest
from helpers.build_description import NoNvcc, cuda_units
from ptx.harness import Cpu, Device, forget

# Of every test. test_architectures.py has a few cases for others, and shows that sm_90 has the PTX of sm_80, so that
# running it as well would prove nothing more.
ARCHITECTURES = ("sm_80",)


@pytest.fixture(scope="session")
def cpu() -> Cpu:
    return Cpu()


@functools.cache
def _device(arch: str) -> Device:
    return Device(arch)


@pytest.fixture(scope="session")
def device_of() -> Callable[[str], Device]:
    """Architecture -> its kernels. Without nvcc the tests fail, they are not skipped."""
    try:
        cuda_units()
    except NoNvcc as error:
        pytest.fail(str(error), pytrace=False)
    return _device


@pytest.fixture(scope="session", params=ARCHITECTURES)
def device(request: pytest.FixtureRequest, device_of: Callable[[str], Device]) -> Device:
    return device_of(request.param)


@pytest.fixture(scope="module", autouse=True)
def _kernels_are_let_go() -> Iterator[None]:
    yield
    forget()


@pytest.fixture(autouse=True)
def _large_kernels_are_let_go() -> Iterator[None]:
    """Half a gigabyte of them is kept."""
    yield
    forget(beyond=60_000)
