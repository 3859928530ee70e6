"""The Python of docs/latent.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "latent.md"


@pytest.mark.full
def test_the_blocks_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) >= 1
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), scope)
    images = scope["images"][:2]
    for name in ("made", "again", "varied", "filled", "pasted"):
        assert scope[name].shape == images.shape, name
    assert torch.equal(scope["pasted"][..., :16], images[..., :16])
    assert [frame.shape for frame in scope["frames"]] == [(2, 3, 8, 8)] * 4
    again = scope["diffusion"]
    assert again.preview_map is not None
    assert torch.equal(again.decode(scope["latents"]), scope["again"])
    assert {path.name for path in (tmp_path / "latent").iterdir()} == {
        "autoencoder",
        "config.json",
        "model.safetensors",
    }
