"""Whether `info` and the demo notice that torch's threads are too many for the cores, and say what helps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from diffkern.command import _machine, demo, info


@pytest.mark.parametrize(
    ("threads", "cores", "busy", "start"),
    [
        (2, 2, 1.0, "torch runs 2 threads on 2 cores, of which other processes use 1.0 now: "),
        (4, 2, None, "torch runs 4 threads on 2 cores: "),
        (2, 1.5, 0.0, "torch runs 2 threads on 1.5 cores: "),
        (8, 16, 9.0, "torch runs 8 threads on 16 cores, of which other processes use 9.0 now: "),
        (2, 2, 0.2, None),
        (8, 16, 8.0, None),
        (1, 2, 2.0, None),
        (2, 2, None, None),
    ],
)
def test_crowded(threads: int, cores: float, busy: float | None, start: str | None) -> None:
    found = _machine.crowded(threads, cores, busy)
    if start is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith(start)
        assert "OMP_NUM_THREADS=1" in found


def test_quota(tmp_path: Path) -> None:
    assert _machine.quota(tmp_path) == math.inf  # no cgroup at all
    (tmp_path / "cpu").mkdir()
    for name, text in (("quota", "150000\n"), ("period", "100000\n")):
        (tmp_path / "cpu" / f"cpu.cfs_{name}_us").write_text(text)
    assert _machine.quota(tmp_path) == 1.5
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    assert _machine.quota(tmp_path) == math.inf
    for text, cores in (("max 100000\n", math.inf), ("250000 100000\n", 2.5), ("?\n", math.inf)):
        (tmp_path / "cpu.max").write_text(text)
        assert _machine.quota(tmp_path) == cores


def test_other_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred ticks a second on cores 0 and 2 of three, within one second."""
    monkeypatch.setattr(_machine.os, "sysconf", lambda name: 100)
    clock = iter([10.0, 11.0])
    monkeypatch.setattr(_machine.time, "perf_counter", lambda: next(clock))
    stat = tmp_path / "stat"
    stat.write_text("cpu 0\ncpu0 10 0 0 5 0 0 0 0 0\ncpu1 0 0 0 0 0 0 0 0\ncpu2 1 1 1 9 9 1 1 1\nintr 5\n")

    def later(seconds: float) -> None:
        stat.write_text("cpu 0\ncpu0 110 0 0 5 0 0 0 0\ncpu1 900 0 0 0 0 0 0 0\ncpu2 26 1 1 99 9 1 1 26\nintr 5\n")

    monkeypatch.setattr(_machine.time, "sleep", later)
    found = _machine.busy_elsewhere({0, 2}, 1.0, stat)
    assert found == pytest.approx(1.5, abs=0.1)  # what this process itself used is taken off
    assert _machine.busy_elsewhere({0}, 1.0, tmp_path / "none") is None


def test_info_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "crowding", lambda: "torch runs 9 threads on 1 core")
    data = info.report()
    assert data["crowding"] == "torch runs 9 threads on 1 core"
    assert "\nCrowded: torch runs 9 threads on 1 core.\n" in info.text(data)
    assert "Crowded" not in info.text(data | {"crowding": None})


def test_the_demo_says_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    demo.add_demo(parser)
    monkeypatch.setattr(demo, "run_demo", lambda config: [])
    for found, said in (("a crowd", "warning: a crowd\n"), (None, "")):
        monkeypatch.setattr(demo, "crowding", lambda found=found: found)
        arguments = parser.parse_args(["--out", str(tmp_path), "--quiet"])
        assert arguments.run(arguments) == 0
        assert capsys.readouterr().err == said
