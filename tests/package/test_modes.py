"""What is kept for later calls does not depend on the mode that it was first asked for in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import diffkern
from diffkern.modes import kept, neutral, neutrally, readable

TESTS = Path(__file__).parents[1]


READ_NUMBERS = "log_normal|^k_diffusion|^flow_matching$|^edm sampler|^score_sde$"
"""What reads the numbers of its tensors, which fake ones have not."""


@cache
def results(mode: str) -> Any:
    """What `helpers.mode_cases` found in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "helpers.mode_cases", mode], cwd=TESTS, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.full
@pytest.mark.parametrize("mode", ["inference", "no_grad", "meta", "float64", "bfloat16", "fake"])
def test_what_was_asked_for_in_a_mode_serves_later_calls(mode: str) -> None:
    """The bits of a process that was never in the mode: losses, gradients, plans, samples, drop-ins."""
    first, later = results("none"), results(mode)
    allowed = {"fake": READ_NUMBERS, "meta": "^score_sde$"}.get(mode, "$.")  # its tables are made in the mode itself
    assert not [name for name in later["refused"] if not re.search(allowed, name)], later["refused"]
    assert later["found"] == first["found"]


def test_caches_of_functions_are_made_in_one_place(root: Path) -> None:
    """`modes.kept` is the only lru_cache of the package: any other would take on the caller's mode."""
    for path in (root / "diffkern").rglob("*.py"):
        if path.name not in ("modes.py", "_explained.py", "records.py", "_histories.py"):  # words, types, slots
            found = re.findall(r"lru_cache|functools\.cache\b|import cache\b|inference_mode\(False\)", path.read_text())
            assert found == (["inference_mode(False)"] if path.name in ENTERS else []), path


ENTERS = {"paths.py", "_classifier.py", "_states.py", "_engine.py"}
"""They differentiate a user's function, or make the buffers of one run, and keep nothing."""


@kept(4)
def table(n: int) -> Tensor:
    return torch.arange(n) * torch.ones(n, dtype=torch.float64)


def test_kept_values_are_ordinary_tensors() -> None:
    for n, mode in enumerate((torch.inference_mode(), torch.device("meta"), FakeTensorMode(), torch.no_grad()), 2):
        with mode:
            made = table(n)
        assert type(made) is Tensor
        assert made.device.type == "cpu"
        assert not made.is_inference()
        assert table(n) is made
        weight = torch.ones(n, dtype=torch.float64, requires_grad=True)
        (made * weight).sum().backward()
        assert torch.equal(weight.grad, torch.arange(n).double())  # type: ignore[arg-type]


def test_kept_values_outlive_a_transform() -> None:
    """A tensor made at a level of torch.func is a wrapper that dies with it."""
    torch.func.grad(lambda x: (x * table(9).sum()).sum())(torch.ones(2))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(table(9))
    assert float(table(9).sum()) == 36.0


def test_neutral_modes_end() -> None:
    with torch.inference_mode(), neutral():
        assert not torch.is_inference_mode_enabled()
    with torch.device("meta"):
        with neutral():
            assert torch.zeros(1).device.type == "cpu"
        assert torch.zeros(1).is_meta
    with FakeTensorMode():
        with neutral():
            assert type(torch.zeros(1)) is Tensor
        assert type(torch.zeros(1)) is not Tensor
    assert neutrally(torch.is_grad_enabled)() is False
    assert torch.is_grad_enabled()


def test_readable_values_are_real_and_on_the_cpu() -> None:
    assert readable(torch.zeros(1))
    assert not readable(torch.zeros(1, device="meta"))
    with FakeTensorMode():
        assert not readable(torch.zeros(1))


def test_a_schedule_made_on_the_meta_device_is_a_table_on_the_cpu() -> None:
    with torch.device("meta"):
        schedule = diffkern.linear(4)
        assert schedule.sigma(2).device.type == "cpu"
    # beta = 1e-4, 0.0067333, 0.0133667, 0.02: abar_1 = (1 - 1e-4)(1 - 0.006733333)
    assert float(schedule.abar(1)) == pytest.approx((1 - 1e-4) * (1 - (1e-4 + 0.0199 / 3)), rel=1e-14)
