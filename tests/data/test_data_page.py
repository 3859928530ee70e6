"""The Python of docs/data.md runs as it stands, and its numbers are so."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def test_the_page_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "photos").mkdir()
    values = np.random.default_rng(0).integers(0, 256, (20, 10, 12, 3), dtype=np.uint8)
    for i, value in enumerate(values):
        Image.fromarray(value).save(tmp_path / "photos" / f"{i}.png")
    scope: dict[str, object] = {}
    for block in re.findall(r"^```python\n(.*?)^```", (root / "docs" / "data.md").read_text(), re.M | re.S):
        exec(compile(block, "docs/data.md", "exec"), scope)
    assert scope["x0"].shape == (32, 3, 64, 64)  # type: ignore[attr-defined]
    assert len(scope["validation"]) == 2  # type: ignore[arg-type]
    assert scope["first"] == 256 - 32
