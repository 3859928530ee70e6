"""`diffkern.parallel` in a job that torchrun has started, and alone."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import parallel_cases

import diffkern
from diffkern import parallel


def test_alone_everything_is_the_identity() -> None:
    value = torch.tensor([2.5], dtype=torch.float64)
    with parallel.job(torch.device("cpu")):
        assert (parallel.rank(), parallel.world(), parallel.is_main()) == (0, 1, True)
        assert parallel.summed(value) == (value,)
        assert parallel.gathered({"a": [1, None]}) == [{"a": [1, None]}]
        assert list(parallel.share(3)) == [0, 1, 2]
        assert not torch.distributed.is_initialized()


def test_the_page_example_runs(root: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (root / "docs" / "scale-out.md").read_text(), re.M | re.S)
    assert len(blocks) == 1
    scope: dict[str, object] = {}
    exec(compile(blocks[0], "scale-out.md", "exec"), scope)
    assert scope["every"] == [{"rank": 0, "things": 10}]
    assert float(scope["total"]) == 10.0  # type: ignore[arg-type]


@pytest.mark.full
def test_two_processes_share_sum_and_gather_and_one_may_have_nothing_to_do(tmp_path: Path) -> None:
    place = str(Path(diffkern.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": place, "OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *launcher, parallel_cases.__file__, str(tmp_path / "job")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["jobs"] == [0, 1, 0, 1, 0, 1]
    assert 0.9 <= told["waited"] < 5.0
    first, second = told["ranks"]
    for rank, found in enumerate((first, second)):
        assert (found["world"], found["rank"], found["main"]) == ([2, 2, 2], rank, rank == 0)
        assert found["device"] == "cpu"
        assert found["in place"]
        assert found["sums"] == [[3.0, 3.0 * 2.0**60], 5]
        said = "[Errno 28] No space left: 'here'"
        no_json = "Object of type set is not JSON serializable"
        kinds = ("ValueError", "RuntimeError") if rank else ("OSError", "TypeError")
        assert found["by main"] == [{"rank": 0}, [kinds[0], said, kinds[1], no_json]]
        assert found["gathered"] == [
            {"who": 0, "text": "", "none": None},
            {"who": 1, "text": "üüü", "none": None},
        ]
        assert found["shards"] == [True]
    assert (first["shares"], second["shares"]) == ([[], [], [0, 1]], [[], [0], [2, 3, 4]])
    assert (first["parts"], second["parts"]) == ([], [3])  # floor(1/2) = 0 of one micro-batch is the first's
    alone = parallel_cases.without_a_share(tmp_path / "alone")
    assert first["validation"] == second["validation"] == pytest.approx(alone["validation"])
    files = [tmp_path / place / "shards" / "shard-000000.npz" for place in ("job", "alone")]
    assert files[0].read_bytes() == files[1].read_bytes()
