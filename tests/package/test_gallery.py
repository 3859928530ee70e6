"""The gallery draws every entry of the registries."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from diffkern import schedules
from diffkern.objectives import time_sampling, weightings


@pytest.fixture(scope="module")
def gallery() -> ModuleType:
    pytest.importorskip("matplotlib")
    path = Path(__file__).parent.parent.parent / "tools" / "gallery.py"
    spec = importlib.util.spec_from_file_location("gallery", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("draw", "names"),
    [
        ("draw_rates", schedules.SCHEDULES),
        ("draw_weightings", weightings.WEIGHTINGS),
        ("draw_time_samplers", time_sampling.TIME_SAMPLERS),
    ],
)
def test_every_entry_has_a_panel_with_lines_in_it(gallery, draw, names):
    figure = getattr(gallery, draw)()
    shown = [axis for axis in figure.axes if axis.get_visible()]
    titles = [name for axis in shown for name in axis.get_title().split(", ")]
    assert titles == list(names)
    for axis in shown:
        assert axis.lines
        for line in axis.lines:
            assert len(line.get_ydata()) > 1
    gallery.plt.close(figure)


def test_every_schedule_has_its_log_snr(gallery):
    figure = gallery.draw_log_snr()
    labels = [text.get_text() for axis in figure.axes for text in axis.get_legend().get_texts()]
    assert sorted(labels) == sorted(schedules.SCHEDULES)
    gallery.plt.close(figure)


@pytest.mark.parametrize(
    ("draw", "count"), [("draw_forward", 3), ("draw_flow", 4), ("draw_paths", 8), ("draw_langevin", 4)]
)
def test_the_lectures_pictures_have_paths_that_move(gallery, draw, count):
    figure = getattr(gallery, draw)()
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert len(shown) == count
    for axis in shown:
        drawn = torch.cat([torch.as_tensor(line.get_xydata()).flatten() for line in axis.lines])
        assert bool(drawn.isfinite().all())
        assert axis.get_title()
    ends = [torch.as_tensor(axis.lines[-1].get_xydata()) for axis in (shown[0], shown[-1])]
    assert not torch.equal(*ends)
    gallery.plt.close(figure)


def test_the_page_shows_every_picture(gallery, tmp_path, capsys, monkeypatch):
    figures = {
        "draw_rates",
        "draw_log_snr",
        "draw_weightings",
        "draw_time_samplers",
        "draw_forward",
        "draw_flow",
        "draw_paths",
        "draw_langevin",
    }
    for name in figures:
        monkeypatch.setattr(gallery, name, lambda: gallery.plt.figure())
    assert gallery.main(["--output", str(tmp_path)]) == 0
    page = (tmp_path / "gallery.md").read_text()
    pictures = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert len(pictures) == 8
    assert all(f"images/{name}" in page for name in pictures)
    # The page that is checked in is the one that the tool writes.
    assert (Path(gallery.ROOT) / "docs" / "gallery.md").read_text() == page
