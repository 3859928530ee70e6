"""The tests themselves: what they import of each other, and which of them each of the suites runs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import peak


def imported(path: Path) -> Iterator[str]:
    """The full name of every module that a file imports; of `from a import b` both a and a.b, as b may be one."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            of = "." * node.level + (node.module or "")
            yield from (of, *(f"{of}.{alias.name}" for alias in node.names))


def test_no_test_module_imports_another(root: Path) -> None:
    """What two of them share is in tests/helpers, or in a module of their folder that holds no tests."""
    files = [path for path in (root / "tests").rglob("*.py") if not path.is_relative_to(root / "tests" / "ptxsim")]
    tests = {path.stem for path in files if path.stem.startswith("test_")}
    assert len(tests) > 100
    found = {
        f"{path.relative_to(root)} imports {name}"
        for path in files
        for name in imported(path)
        if not tests.isdisjoint(re.split(r"\.", name))
    }
    assert found == set()


def collected(root: Path, *arguments: str) -> set[str]:
    """Node ids of the tests of one file that `pytest ARGUMENTS` would run."""
    done = pytest_of(root, "--collect-only", "-q", "tests/ops/test_noise.py", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return {line for line in done.stdout.splitlines() if "::" in line}


def pytest_of(root: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`pytest ARGUMENTS`: the program, as `python -m pytest` puts the tree before an installed package."""
    command, variables = [sys.executable, str(Path(sys.executable).with_name("pytest")), *arguments], os.environ
    return subprocess.run(command, cwd=root, env={**variables, **environment}, capture_output=True, text=True)


@pytest.mark.full
def test_a_suite_refuses_to_run_on_another_package_than_the_one_built_for_it(root: Path) -> None:
    """The sanitizers' goals and make test name the folder; in the tree stands a module without a sanitizer."""
    found = pytest_of(root, "tests/ops/test_noise.py", "--collect-only", DIFFKERN_SITE="build/none")
    assert found.returncode == 4
    assert "the package in build/none is to be tested, found " in found.stdout + found.stderr
    makefile = (root / "Makefile").read_text()
    goals = re.findall(r"DIFFKERN_SITE=(\S+) .*?PYTHONPATH=\$\(CURDIR\)/(\S+) ", makefile.replace("\\\n", " "))
    assert [site for site, _ in goals] == [path for _, path in goals] == ["build/site", "build/$@/site"]
    assert "$(PY) -m pytest" not in makefile


@pytest.mark.full
def test_each_suite_holds_the_one_before(root: Path) -> None:
    """make test, make test-all and make test-long; a plain `pytest FILE` runs what CI would."""
    makefile = (root / "Makefile").read_text()
    marks = {
        suite: re.search(rf"^{suite}: TESTS = (.*)$", makefile, re.M) for suite in ("test", "test-all", "test-long")
    }
    quick, all_, long_ = (collected(root, "-m", found[1]) for found in marks.values() if found is not None)
    everything = collected(root, "-m", "")
    assert quick < all_ < everything
    assert long_ == everything - all_
    assert collected(root) == all_


def test_the_long_suite_fuzzes_and_runs_the_sanitizers(root: Path) -> None:
    """On the tests of the ops and the calls of every op; CI runs the fuzz too, as its tests are full, not long."""
    makefile = (root / "Makefile").read_text()
    goals = re.search(r"^test-long: .*\n(?:\t.*\n)*?\t\$\(MAKE\) (.*)$", makefile, re.M)
    assert goals is not None
    assert goals[1].split() == ["fuzz", "asan", "ubsan", "tsan"]
    sanitizers = dict(re.findall(r"^(\w+): SANITIZER = (\w+)$", makefile, re.M))
    assert sanitizers == {"asan": "address", "ubsan": "undefined", "tsan": "thread"}
    lines = "\n".join(re.findall(r"^SANITIZED = .*|suppressions=.*$", makefile, re.M))
    paths = re.findall(r"\btests/[\w/.]+", lines)
    assert len(paths) == 5
    assert [path for path in paths if not (root / path).exists()] == []
    for path in (root / "tests" / "fuzz").glob("test_*.py"):
        assert "mark.long" not in path.read_text()


def test_ci_runs_lint_all_tests_and_the_emulators_own(root: Path) -> None:
    goals = re.findall(r"^make (.*)$", (root / ".ci" / "run").read_text(), re.M)
    assert goals == ["lint", "test-all", "test-emulator"]


@pytest.mark.parametrize("marks", [(), ("long",)], ids=str)
def test_a_process_that_has_grown_too_large_fails_the_test_but_for_a_long_one(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, marks: tuple[str, ...]
) -> None:
    monkeypatch.setattr(peak, "LIMIT", 0.01)
    item: Any = SimpleNamespace(path=None, get_closest_marker=lambda name: name if name in marks else None)
    watch = peak.Peak(request.config)
    for expected in (StopIteration if marks else pytest.fail.Exception, StopIteration):  # it is said once
        teardown = watch.pytest_runtest_teardown(item, nextitem=item)
        next(teardown)
        with pytest.raises(expected):
            teardown.send(None)
