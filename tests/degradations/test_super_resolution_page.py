"""The Python of docs/super-resolution.md runs, its table has every degradation with its defaults; its tool runs."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from diffkern.degradations import DEGRADATIONS, Degradation
from diffkern.metrics import consistency


def test_the_example_runs(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (root / "docs" / "super-resolution.md").read_text(), re.M | re.S)
    assert len(blocks) == 1
    scope: dict[str, Any] = {}
    exec(compile(blocks[0], "super-resolution.md", "exec"), scope)
    printed = capsys.readouterr().out
    assert "0 torch.Size([3, 1, 16, 16]) tensor([0, 1, 2])" in printed
    assert "projected" in printed
    assert scope["every"].shape == (16, 1, 16, 16)
    assert scope["several"].shape == (4, 1, 16, 16)
    assert float(consistency(scope["exact"], scope["low"], scope["degradation"]).max()) <= 2.0


def test_the_table_has_every_degradation(root: Path) -> None:
    page = (root / "docs" / "super-resolution.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(\w+)\((.*?)\)` \|", page, re.M)
    common = {field.name for field in dataclasses.fields(Degradation)}
    expected = []
    for name, kind in DEGRADATIONS.items():
        own = [f"{f.name}={f.default!r}" for f in dataclasses.fields(kind) if f.name not in common]
        expected.append((name, kind.__name__, ", ".join(own).replace("'", '"')))
    assert rows == expected
    assert "<!-- super_resolution -->" in page
    assert "<!-- end of super_resolution -->" in page


@pytest.mark.full
def test_the_tool_keeps_measured_patches_apart(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training of two iterations: a table and a picture; and no pixel of those measured was trained on."""
    pytest.importorskip("skimage")
    monkeypatch.syspath_prepend(str(root / "tools"))
    import degradations as tool

    from diffkern.data import open_images

    photos = open_images("photos")
    left, right = tool.parts(photos)
    for label in range(7):
        patches = photos.batch(torch.nonzero(photos.labels == label)[:, 0])[0]
        columns = tool._columns(photos, torch.nonzero(photos.labels == label)[:, 0])
        assert len(patches) % columns == 0
        assert min(columns, len(patches) // columns) == 29, "the shorter side of each photograph is 256"
        width = (columns - 1) * 8 + 32
        first = int(torch.nonzero(photos.labels == label)[0])
        at = {
            name: (some.indices[some.labels == label] - first) % columns * 8
            for name, some in (("l", left), ("r", right))
        }
        assert int(at["l"].max()) + 32 <= int(at["r"].min())
        assert int(at["r"].min()) >= 0.75 * width
    for name, value in (("SEEN", 6), ("ROWS", 2), ("SAMPLES", 2), ("STEPS", 2)):
        monkeypatch.setattr(tool, name, value)
    monkeypatch.setattr(tool, "train_classifier", lambda images, progress: tool_classifier(images))
    tool.run("inpainting", 2, None, tmp_path)
    assert (tmp_path / "degradation_inpainting.png").is_file()
    table = (tmp_path / "inpainting" / "table.md").read_text()
    assert [row.split(" | ")[0] for row in table.splitlines() if row.startswith("| ")][1:] == [
        "| input",
        "| samples",
        "| samples, projected",
    ]


def tool_classifier(images: Any) -> Any:
    from diffkern.metrics import train_classifier

    return train_classifier(images, steps=2)
