"""Runs diffusers' own scheduler tests with diffusers' classes replaced by diffkern's.

    git clone --depth 1 --branch v0.42.1 https://github.com/huggingface/diffusers
    python tools/peer_tests.py diffusers/tests/schedulers             # on diffkern's classes
    python tools/peer_tests.py diffusers/tests/schedulers --original  # on diffusers' own
    python tools/peer_tests.py diffusers/tests/schedulers --compare   # on both: what fails only on diffkern's?

Before a test file is read, every scheduler of `diffkern.compat.diffusers` takes the place of its original in
`diffusers` and `diffusers.schedulers`, so `from diffusers import DDPMScheduler` gives diffkern's, and so do
`compatibles`. The installed diffusers is tested, not the clone's. Arguments that are not listed go to pytest. Prints
passed, failed and skipped a file; the exit status is 1 where a test failed (--compare: on diffkern's classes alone).
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

KINDS = ("passed", "failed", "skipped")


def replace() -> list[str]:
    """Put diffkern's classes under their originals' names; returns the names."""
    diffusers = importlib.import_module("diffusers")
    schedulers = importlib.import_module("diffusers.schedulers")
    ours = importlib.import_module("diffkern.compat.diffusers")
    names = [name for name in ours.__all__ if name.endswith("Scheduler")]
    for name in names:
        setattr(diffusers, name, getattr(ours, name))
        setattr(schedulers, name, getattr(ours, name))
    return names


class Outcomes:
    """A pytest plugin that keeps how each test ended: test id -> passed, failed or skipped."""

    def __init__(self) -> None:
        self.found: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            # A test whose teardown fails has failed, whatever its call did.
            self.found[report.nodeid] = report.outcome

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome == "failed":
            self.found[f"{report.nodeid}::(collection)"] = "failed"


def table(found: dict[str, str]) -> str:
    """passed, failed and skipped, a line a file and one for all."""
    files: dict[str, Counter[str]] = {}
    for test, outcome in found.items():
        files.setdefault(test.split("::")[0].rsplit("/", 1)[-1], Counter())[outcome] += 1
    files["all"] = sum(files.values(), Counter())
    width = max(map(len, files))
    lines = [" " * width + "".join(kind.rjust(9) for kind in KINDS)]
    lines += [name.ljust(width) + "".join(f"{count[kind]:9}" for kind in KINDS) for name, count in files.items()]
    return "\n".join(lines)


def run(arguments: list[str], original: bool) -> tuple[dict[str, str], int]:
    """The outcomes of pytest with these arguments in this process, and its exit status."""
    if not original:
        print(f"replaced: {', '.join(replace())}")
    outcomes = Outcomes()
    # Without the options of a project that the clone lies in.
    options = ["-q", "--disable-warnings", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "filterwarnings="]
    status = pytest.main([*options, *arguments], plugins=[outcomes])
    return outcomes.found, int(status)


def compare(arguments: list[str]) -> int:
    """Both runs, a process each; lists what passes on diffusers' classes and does not on diffkern's."""
    both: list[dict[str, str]] = []
    for mode in (["--original"], []):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "outcomes.json"
            subprocess.run([sys.executable, __file__, *mode, "--outcomes", str(path), *arguments], check=False)
            both.append(json.loads(path.read_text()))
    theirs, ours = both
    lost = sorted(test for test, outcome in theirs.items() if outcome == "passed" and ours.get(test) != "passed")
    won = sorted(test for test, outcome in ours.items() if outcome == "passed" and theirs.get(test) != "passed")
    for title, tests in (("only on diffusers' classes", lost), ("only on diffkern's classes", won)):
        print(f"pass {title}: {len(tests)}", *tests, sep="\n  ")
    return 1 if lost or "passed" not in theirs.values() else 0


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--original", action="store_true", help="run on diffusers' own classes")
    parser.add_argument("--compare", action="store_true", help="run on both and list what differs")
    parser.add_argument("--outcomes", type=Path, help="write how each test ended as JSON")
    options, rest = parser.parse_known_args(arguments)
    if not any(Path(argument.split("::")[0]).exists() for argument in rest):
        parser.error("a folder or file of diffusers' tests/schedulers is missing")
    if options.compare:
        return compare(rest)
    found, status = run(rest, options.original)
    if options.outcomes:
        options.outcomes.write_text(json.dumps(found))
    versions: dict[str, Any] = {name: importlib.import_module(name).__version__ for name in ("diffusers", "torch")}
    print("classes of", "diffusers" if options.original else "diffkern", *(f"{k} {v}" for k, v in versions.items()))
    print(table(found))
    return status


if __name__ == "__main__":
    sys.exit(main())
