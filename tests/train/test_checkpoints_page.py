"""The Python of docs/checkpoints.md runs as it stands, twice: the second time goes on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from diffkern.train import checkpoint


@pytest.mark.full
def test_the_page_runs_and_goes_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"^```python\n(.*?)^```", (root / "docs/checkpoints.md").read_text(), re.M | re.S)
    assert len(blocks) == 2
    scope: dict[str, object] = {}
    exec(compile(blocks[0], "checkpoints.md", "exec"), scope)
    assert checkpoint.steps("runs/a") == [1, 2, 3]
    exec(compile(blocks[0], "checkpoints.md", "exec"), scope)
    assert checkpoint.steps("runs/a") == [4, 5, 6]
    exec(compile(blocks[1], "checkpoints.md", "exec"), scope)
