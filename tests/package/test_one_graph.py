"""Losses, noising and sampling in one graph of torch.compile, and in torch.export, from a process's first call on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import diffkern

TESTS = Path(__file__).parents[1]


@pytest.mark.full
@pytest.mark.parametrize("group", ["seeds", "table", "continuous", "models", "samplers", *(
    f"exported {name}" for name in ("table", "continuous", "models", "samplers"))])  # fmt: skip
def test_one_graph_in_a_fresh_process(group: str) -> None:
    """fullgraph=True, one graph for every time of the batch, eager's values; nothing is called before."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "helpers.graph_cases", group],
        cwd=TESTS, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) >= 2
    wrong = {name: result for name, result in found.items() if result[0] != 1 or not result[1] <= 1e-5}
    assert not wrong


@pytest.mark.full
def test_a_schedule_made_in_a_graph_breaks_it_with_the_remedy() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return x * diffkern.linear().alpha(3).float()

    torch._dynamo.reset()
    x = torch.ones(2)
    with pytest.raises(Exception, match=r"linear\(\) is to be called outside of what torch.compile compiles"):
        torch.compile(step, fullgraph=True, backend="eager")(x)
    assert torch.equal(torch.compile(step, backend="eager")(x), step(x))
