"""The Python of docs/diffusion.md and of the README's first example runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent


def block(page: Path) -> str:
    """The first block of Python after the first heading that has one."""
    found = re.search(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)
    assert found is not None
    return found.group(1)


@pytest.mark.full
@pytest.mark.parametrize("page", ["docs/diffusion.md", "README.md"])
def test_the_first_example_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    text = block(ROOT / page)
    assert "diffkern.Diffusion(" in text
    scope: dict[str, object] = {}
    exec(compile(text, page, "exec"), scope)
    assert {path.name for path in tmp_path.iterdir()} == {"digits"}
