"""The notebook, executed as a reader would, with a few iterations of training."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from helpers.lazy import needs

import diffkern

pytestmark = [needs("nbclient", "nbformat", "ipykernel", "sklearn", "torch_fidelity", "PIL"), pytest.mark.full]


def test_every_cell_runs_and_draws(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    place = str(Path(diffkern.__file__).parent.parent)
    monkeypatch.setenv("ITERATIONS", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([place, os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(root / "examples" / "digits.ipynb", as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": place}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert len(cells) <= 11
    drawn = [c for c in cells if any("image/png" in out.get("data", {}) for out in c.outputs)]
    assert len(drawn) == 4
    assert "precision" in "".join(out.get("text", "") for out in cells[-2].outputs)
