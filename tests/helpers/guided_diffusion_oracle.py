"""An installed guided_diffusion's own gaussian_diffusion, respace, losses and nn, past whatever its __init__ imports.

OpenAI's code is not on PyPI under its name; `guided-diffusion-sdk` 1.0.0 there holds K. Crowson's fork of it, whose
sampling and training are OpenAI's but for what a conditional `ddim_sample` returns as "pred_xstart" (FORK).
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from functools import lru_cache
from types import ModuleType
from typing import Any

MODULES = ("nn", "losses", "gaussian_diffusion", "respace")


def missing() -> list[str]:
    return [name for name in ("guided_diffusion",) if importlib.util.find_spec(name) is None]


def load() -> Any:
    """`modules`; in a test file that has it not, the whole file is skipped."""
    if missing():
        import pytest

        pytest.skip("needs guided_diffusion (pip install --no-deps guided-diffusion-sdk)", allow_module_level=True)
    return modules()


@lru_cache(maxsize=1)
def modules() -> Any:
    """An object with guided_diffusion's modules nn, losses, gaussian_diffusion and respace."""
    spec = importlib.util.find_spec("guided_diffusion")
    assert spec is not None
    parent = ModuleType("guided_diffusion")
    parent.__path__ = list(spec.submodule_search_locations or [])
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "guided_diffusion"}
    for name in kept:
        del sys.modules[name]
    sys.modules["guided_diffusion"] = parent
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # names of torch that it uses are deprecated
            for name in MODULES:
                setattr(parent, name, importlib.import_module(f"guided_diffusion.{name}"))
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "guided_diffusion"]:
            del sys.modules[name]
        sys.modules.update(kept)
    return parent


def is_fork() -> bool:
    """Whether a conditional `ddim_sample` returns the unconditional "pred_xstart", as Crowson's fork does."""
    return hasattr(modules().gaussian_diffusion.GaussianDiffusion, "condition_score_with_grad")
