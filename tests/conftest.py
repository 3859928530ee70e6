"""Options and markers shared by all tests."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# Helper modules beside the tests, and the PTX emulator as `ptxsim`.
sys.path.insert(0, str(Path(__file__).parent))

# Side by side with others (-n) a process has one thread, before torch is imported; a test of threads asks for its own.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.update(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu", action="store_true", help="run only the tests marked gpu, and fail when there is no GPU")


def pytest_configure(config: pytest.Config) -> None:
    from helpers.peak import Peak

    if config.getoption("--gpu") and not _has_gpu():
        raise pytest.UsageError("--gpu was given, and torch sees no CUDA GPU")
    config.pluginmanager.register(Peak(config), "peak")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """What collecting makes stays: looking for garbage among it is a fifth of the time, and of every later round."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--gpu"):
        others = [item for item in items if item.get_closest_marker("gpu") is None]
        items[:] = [item for item in items if item.get_closest_marker("gpu") is not None]
        config.hook.pytest_deselected(items=others)
    elif not _has_gpu():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_report_header(config: pytest.Config) -> str:
    import torch

    import diffkern

    wanted = os.environ.get("DIFFKERN_SITE")
    if wanted and (config.rootpath / wanted).resolve() not in Path(diffkern.__file__).resolve().parents:
        raise pytest.UsageError(f"the package in {wanted} is to be tested, found {diffkern.__file__}")
    return f"diffkern {diffkern.__version__} from {Path(diffkern.__file__).parent}, torch {torch.__version__}"


@pytest.fixture(scope="session")
def root() -> Path:
    """The source folder."""
    return Path(__file__).resolve().parent.parent
