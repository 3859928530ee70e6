"""k-diffusion's own sampling, external and layers, without what its __init__ asks for (CLIP, wandb, torchvision)."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any
from unittest import mock

NEEDED = ("k_diffusion", "torchdiffeq", "torchsde", "scipy", "einops")


def _stub(name: str) -> ModuleType:
    module = ModuleType(name)
    module.__path__ = []
    module.__getattr__ = lambda attribute: mock.MagicMock()  # type: ignore[method-assign]
    return module


def missing() -> list[str]:
    """What is not installed of k-diffusion and of what its samplers need."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


class Peer:
    """`modules`, loaded at the first question for one of them."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # asked for by pytest of all names of a test module
            raise AttributeError(name)
        return getattr(modules(), name)


def sampling() -> Any:
    """The module `sampling`; the test is skipped where it cannot be had."""
    if missing():
        import pytest

        pytest.skip(f"needs {', '.join(missing())}")
    return modules().sampling


@functools.cache
def modules() -> Any:
    """An object with k-diffusion's modules sampling, external and layers."""
    spec = importlib.util.find_spec("k_diffusion")
    assert spec is not None
    parent = ModuleType("k_diffusion")
    parent.__path__ = list(spec.submodule_search_locations or [])
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.functional", "dctorch"]
    names += ["dctorch.functional", "safetensors", "PIL"]
    absent = [name for name in names if importlib.util.find_spec(name.split(".")[0]) is None]
    stubs = {name: _stub(name) for name in absent}
    kept = {name: sys.modules.get(name) for name in ("k_diffusion", *stubs)}
    sys.modules.update({"k_diffusion": parent, **stubs})
    try:
        for name in ("utils", "sampling", "external", "layers"):
            setattr(parent, name, importlib.import_module(f"k_diffusion.{name}"))
    finally:  # what it imported else stays: torch cannot be loaded twice
        for name in [name for name in sys.modules if name.startswith("k_diffusion.")]:
            del sys.modules[name]
        for name, module in kept.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module
    return parent
