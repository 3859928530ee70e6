"""The Python of docs/generate.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest


def test_the_example_runs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```", (root / "docs" / "generate.md").read_text(), re.M | re.S)
    assert len(blocks) == 1
    scope: dict[str, object] = {}
    exec(compile(blocks[0], "generate.md", "exec"), scope)
    assert "0 torch.Size([4, 3, 8, 8]) tensor([0, 1, 2, 3])" in capsys.readouterr().out
    assert list(scope["every"].shape) == [10, 3, 8, 8]  # type: ignore[attr-defined]
    assert sorted(path.name for path in (tmp_path / "many").iterdir() if not path.name.startswith(".")) == [
        "index.json",
        "shard-000000.npz",
        "shard-000001.npz",
    ]
