"""No process of the tests may need more memory than a small machine has: a plugin that looks after every test."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from typing import Any

import pytest

LIMIT = 3.0
"""GiB, of the process of the tests and of each that it starts."""


def peaks() -> tuple[float, float]:
    """The most memory that this process, and any one that it has started and waited for, ever had, in GiB."""
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own / 2**20, children / 2**20


class Peak:
    """Fails the test after which the limit is passed (those marked long may), and reports the peak of every worker."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.ran = self.told = False
        self.found: dict[str, tuple[float, float]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        result = yield
        self.ran = True
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
