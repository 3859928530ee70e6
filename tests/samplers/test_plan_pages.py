"""docs/plans.md is what tools/plan_pages.py writes, up to the last digits of coefficients."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from diffkern.samplers import SAMPLERS

NUMBER = re.compile(r"-?\d+\.\d+(?:e[-+]\d+)?")


def test_the_page_is_current(root: Path) -> None:
    spec = importlib.util.spec_from_file_location("plan_pages", root / "tools/plan_pages.py")
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    written, made = (root / "docs/plans.md").read_text(), tool.page()
    assert NUMBER.sub("#", written).split() == NUMBER.sub("#", made).split()
    for old, new in zip(NUMBER.findall(written), NUMBER.findall(made), strict=True):
        assert float(old) == pytest.approx(float(new), rel=1e-5)
    for name in SAMPLERS:
        assert f"## `{name}(" in written
