"""docs/adversarial.md: its Python runs, its numbers are those of the losses, and the picture draws them."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch

import diffkern
from diffkern.objectives.adversarial import ADVERSARIAL, saturation

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = (ROOT / "docs" / "adversarial.md").read_text()


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("adversarial_tool", ROOT / "tools" / "adversarial.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (block,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
    scope: dict[str, object] = {}
    exec(compile(block, "docs/adversarial.md", "exec"), scope)
    assert isinstance(scope["gan"], diffkern.GAN)
    assert {path.name for path in tmp_path.iterdir()} == {"digits"}


def test_every_loss_has_a_row() -> None:
    assert re.findall(r"^\| `(\w+)` \|.*\|.*\|.*\|.*\|$", PAGE, re.M)[1:] == list(ADVERSARIAL)


def test_the_pulls_are_those_of_the_page(tool: ModuleType) -> None:
    """By quadrature; both together are the distance, as D + (1 - D) is 1 and the slope of log(p/q) is -m."""
    rows = dict(re.findall(r"^\| (distance m|minimax|non-saturating) \| ([\d.| ]+) \|$", PAGE, re.M))
    numbers = {name: [float(n) for n in row.split("|")] for name, row in rows.items()}
    for m, weak, strong in zip(*numbers.values(), strict=True):
        found = tool.pull(m, "minimax"), tool.pull(m, "non_saturating")
        assert found == (pytest.approx(weak, rel=0.05), pytest.approx(strong, rel=0.05))
        assert sum(found) == pytest.approx(m, rel=1e-3)


def test_the_picture_has_the_curves(tool: ModuleType) -> None:
    figure = tool.draw()
    game, slopes, far = figure.axes
    assert len(game.lines) == 3
    logits = torch.as_tensor(slopes.lines[0].get_xdata())
    curves = saturation(logits)
    for line, curve in zip(slopes.lines, (curves.minimax, curves.non_saturating), strict=True):
        torch.testing.assert_close(torch.as_tensor(line.get_ydata()), curve.abs())
    weak, strong = (line.get_ydata() for line in far.lines)
    assert weak[-1] < 1e-3 < 1.0 < strong[-1]
    tool.plt.close(figure)
