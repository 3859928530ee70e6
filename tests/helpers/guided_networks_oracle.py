"""OpenAI's own UNets, in the copy that azula has, past whatever azula's `__init__` imports."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


@lru_cache(maxsize=1)
def original() -> Any:
    """The module with UNetModel, SuperResModel and EncoderUNetModel; the test is skipped where azula is not."""
    found = importlib.util.find_spec("azula")
    sources = [Path(place) / "plugins/adm/_src" for place in (found and found.submodule_search_locations) or []]
    if not any((source / "unet.py").is_file() for source in sources):
        pytest.skip("needs guided-diffusion's networks (pip install azula)")
    parent = ModuleType("azula_adm")
    parent.__path__ = [str(source) for source in sources]
    sys.modules["azula_adm"] = parent
    return importlib.import_module("azula_adm.unet")
