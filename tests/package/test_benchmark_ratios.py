"""The page of ratios is made of the benchmarks' cases; what is slower stands out, what cannot be had is empty."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

# At the end: the package under test stays the installed one.
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

pytest.importorskip("benchmarks")
pytest.importorskip("diffusers")

from benchmarks import drop_in_cases, ratios


def test_table() -> None:
    text = ratios.table(["f32", "f16"], iter([("a", [0.5, 2.0]), ("b", [None, 1.0]), ("c", [3.456])]))
    assert text.splitlines()[2:] == ["| a | **0.50** | 2.00 |", "| b |  | 1.00 |", "| c | 3.46 |  |"]


@pytest.mark.full
def test_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ratios, "SHAPES", {0: (1, 1, 1, 1), 4: (1, 1, 4, 4)})
    monkeypatch.setattr(ratios, "OPS", {"moments": ratios.OPS["moments"]})
    monkeypatch.setattr(ratios, "FLOAT_ONLY", {"noise_sum": ratios.FLOAT_ONLY["noise_sum"]})
    monkeypatch.setattr(ratios, "QUERIES_AND_KEYS", ((1, 3),))
    monkeypatch.setattr(drop_in_cases, "TABLE", {"ddim": drop_in_cases.TABLE["diffusers-ddim-small"]})
    monkeypatch.setattr(ratios.torch, "set_num_threads", lambda n: None)
    path = tmp_path / "page.md"
    assert ratios.main(["--seconds", "0.001", "--most-drop-ins", "0", "--out", str(path)]) == 0
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in path.read_text().splitlines() if "|" in line}
    assert [len(rows[name]) for name in ("moments", "noise_sum", "DDIMScheduler", "1 x 3")] == [6, 6, 3, 9]
    for name, found in rows.items():
        if name not in ("", "---"):
            wanted = 2 if name == "noise_sum" else len(found)
            assert sum(float(cell.strip(" *")) > 0 for cell in found if cell.strip()) == wanted, name
