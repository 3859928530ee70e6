"""tools/peer_tests.py on a stand-in for diffusers' tests/schedulers: whose classes run, and what is reported."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers.lazy import needs

pytestmark = needs("diffusers")
TOOL = Path(__file__).parent.parent.parent / "tools" / "peer_tests.py"

CLASSES = """
import unittest

import diffusers
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from diffusers.schedulers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

from .helpers import SIZE


class Common(unittest.TestCase):
    def test_step(self):
        scheduler = DDPMScheduler()
        x = torch.ones(SIZE)
        assert scheduler.step(0.1 * x, 999, x, generator=torch.manual_seed(0)).prev_sample.shape == x.shape

    @unittest.skip("as some of diffusers' own")
    def test_skipped(self):
        raise AssertionError

    def test_fails_everywhere(self):
        assert DDPMScheduler().config.beta_end == 7.0


class WhoseTest(unittest.TestCase):
    classes = (DDPMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler)

    def test_all_are_diffkerns(self):
        assert all(c.__module__.startswith("diffkern.") for c in self.classes)
        assert diffusers.DDPMScheduler is DDPMScheduler
        assert UniPCMultistepScheduler in DDPMScheduler().compatibles

    def test_all_are_the_originals(self):
        assert all(c.__module__.startswith("diffusers.") for c in self.classes)
"""
BROKEN = "from diffusers import NoSuchScheduler\n"
PARTS = {"__init__.py": "", "helpers.py": "SIZE = (2, 3, 4, 4)\n", "test_scheduler_some.py": CLASSES}


def package(folder: Path, **files: str) -> Path:
    """A package tests/schedulers, whose files import each other by relative names as diffusers' do."""
    inside = folder / "tests" / "schedulers"
    inside.mkdir(parents=True)
    (folder / "tests" / "__init__.py").write_text("")
    for name, text in {**PARTS, **files}.items():
        (inside / name).write_text(text)
    return inside


def tool(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(TOOL), *arguments], capture_output=True, text=True, timeout=300)


def counts(printed: str, name: str) -> list[list[int]]:
    return [[int(n) for n in line.split()[1:]] for line in printed.splitlines() if re.match(rf"{name} +\d", line)]


@pytest.mark.full
def test_both_runs_are_compared_test_by_test(tmp_path: Path) -> None:
    """The classes are replaced, and only without --original; a failing test and a skipped one are counted as such."""
    ran = tool(str(package(tmp_path)), "--compare")
    assert counts(ran.stdout, "test_scheduler_some.py") == [[2, 2, 1], [2, 2, 1]], ran.stdout + ran.stderr
    assert counts(ran.stdout, "all") == [[2, 2, 1], [2, 2, 1]]
    lost = re.search(r"only on diffusers' classes: 1\n  (.*)\n", ran.stdout)
    assert lost is not None
    assert lost[1].endswith("WhoseTest::test_all_are_the_originals")
    won = re.search(r"only on diffkern's classes: 1\n  (.*)\n", ran.stdout)
    assert won is not None
    assert won[1].endswith("WhoseTest::test_all_are_diffkerns")
    assert ran.returncode == 1


@pytest.mark.full
def test_a_file_that_can_not_be_read_fails_and_arguments_reach_pytest(tmp_path: Path) -> None:
    folder = package(tmp_path, **{"test_scheduler_broken.py": BROKEN})
    ran = tool(str(folder), "-k", "test_step or broken")
    assert ran.returncode != 0
    assert counts(ran.stdout, "test_scheduler_broken.py") == [[0, 1, 0]]
    assert "NoSuchScheduler" in ran.stdout
    ran = tool(str(folder / "test_scheduler_some.py"), "-k", "test_step or all_are_diffkerns")
    assert (ran.returncode, counts(ran.stdout, "all")) == (0, [[2, 0, 0]]), ran.stdout


@pytest.fixture(scope="module")
def peer_tests() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peer_tests", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_missing_folder_is_refused(peer_tests: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["no/such/folder"], ["--original", "-k", "euler"]):
        with pytest.raises(SystemExit):
            peer_tests.main(arguments)
        assert "a folder or file of diffusers' tests/schedulers is missing" in capsys.readouterr().err


def test_how_a_test_ended_is_its_worst_part(peer_tests: ModuleType) -> None:
    outcomes = peer_tests.Outcomes()

    def report(test: str, when: str, outcome: str) -> None:
        outcomes.pytest_runtest_logreport(
            pytest.TestReport(test, ("", 0, ""), {}, outcome, None, when)  # type: ignore[arg-type]
        )

    for test, ends in {"a/t.py::A::x": "pff", "a/t.py::A::y": "ppf", "b/u.py::z": "s p", "b/u.py::w": "ppp"}.items():
        for when, end in zip(("setup", "call", "teardown"), ends, strict=True):
            if end != " ":
                report(test, when, {"p": "passed", "f": "failed", "s": "skipped"}[end])
    found = outcomes.found
    assert found == {"a/t.py::A::x": "failed", "a/t.py::A::y": "failed", "b/u.py::z": "skipped", "b/u.py::w": "passed"}
    assert counts(peer_tests.table(found), "all") == [[1, 2, 1]]
