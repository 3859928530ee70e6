"""No process of the tests may need more memory than a small machine has: a plugin that looks after every test."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

LIMIT = 3.0
"""GiB, of the process of the tests and of each that it starts."""
PLENTY = 1.5
"""GiB from which on a process lets go of what a module of tests has left behind."""


def peaks() -> tuple[float, float]:
    """The most memory that this process, and any one that it has started and waited for, ever had, in GiB."""
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own / 2**20, children / 2**20


def held() -> float:
    """The memory that this process has now, in GiB; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**30
    except OSError:
        return 0.0


def let_go() -> None:
    """Compiled graphs, garbage, and memory that the allocator keeps."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None:
        dynamo.reset()
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Peak:
    """Fails the test after which the limit is passed (those marked long may), and reports the peak of every worker."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.ran = self.told = False
        self.found: dict[str, tuple[float, float]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> Iterator[None]:
        result = yield
        self.ran = True
        if (nextitem is None or nextitem.path != item.path) and held() > PLENTY:
            let_go()
        if max(peaks()) > LIMIT and not self.told:
            self.told = True
            if item.get_closest_marker("long") is None:
                own, children = peaks()
                pytest.fail(
                    f"the limit of a process is {LIMIT} GiB: this one had {own:.2f}, one of its own {children:.2f}"
                )
        return result

    def pytest_sessionfinish(self) -> None:
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["peaks"] = peaks()
        elif self.ran:
            self.found["this process"] = peaks()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """Of pytest-xdist, in the process that the workers report to."""
        if "peaks" in getattr(node, "workeroutput", {}):
            self.found[node.gateway.id] = node.workeroutput["peaks"]

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if not self.found:
            return
        each = (f"{name} {own:.2f} ({children:.2f})" for name, (own, children) in self.found.items())
        terminalreporter.write_line(f"peak memory in GiB (of what it started): {', '.join(each)}")
