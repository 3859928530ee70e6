"""The loops of other trainers in examples/, as programs of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.lazy import needs

import diffkern

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.full
@pytest.mark.parametrize("name", [pytest.param(n, marks=needs(n, "sklearn")) for n in ("accelerate", "lightning")])
def test_a_loop_of_another_trainer_runs(tmp_path: Path, name: str) -> None:
    place = str(Path(diffkern.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": place, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLES / f"{name}_loop.py"), "--iterations", "3", "--batch", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    loss = re.search(r"step 3: loss (\d\.\d+)$", done.stdout, re.MULTILINE)
    assert loss is not None
    assert 0.1 < float(loss[1]) < 3.0
