"""The pages against the code: what docs/architecture.md names is there and its Python runs, links lead somewhere."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffkern import sample, samplers, schedules

ROOT = Path(__file__).resolve().parent.parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "benchmarks").glob("*.md")])

FILE = r"((?:diffkern|csrc|tests|tools|benchmarks)/[\w/.]*\w|CMakeLists\.txt|pyproject\.toml)"


def names_in(path: Path) -> set[str]:
    """Dotted names of a Python file's functions, classes and constants; of a C++ file all words."""
    if path.suffix != ".py":
        return set(re.findall(r"\w+", path.read_text()))

    def found(body: list[ast.stmt], above: str) -> Iterator[str]:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield above + node.name
                yield from found(node.body, f"{above}{node.name}.")
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (above + target.id for target in targets if isinstance(target, ast.Name))

    return set(found(ast.parse(path.read_text()).body, ""))


def test_every_file_and_function_on_the_page_is_there() -> None:
    stations = re.findall(rf"`{FILE}(?::([\w.]+))?`", PAGE.read_text())
    assert len(stations) > 50
    for file, name in stations:
        if "NAME" in file:
            continue
        assert (ROOT / file).exists(), file
        assert not name or name in names_in(ROOT / file), f"{file} has no {name}"


# Files of diffusers that its page speaks of.
FOREIGN = {"tests/testing_utils.py", "tests/others/test_utils.py"}


def paths_in(page: Path) -> set[str]:
    """Files of the project that a page names, and the targets of its links."""
    text = page.read_text()
    linked = {target for target in re.findall(r"\]\(([^)\s]+\.\w+)(?:#\S*)?\)", text) if "://" not in target}
    named = {name for name in re.findall(rf"`{FILE}", text) if re.search(r"\.\w+$", name)}
    return {str((page.parent / target).resolve()) for target in linked} | {str(ROOT / n) for n in named - FOREIGN}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_page_names_a_file_that_is_not_there(page: Path) -> None:
    missing = [path for path in paths_in(page) if not Path(path).exists() and "NAME" not in path and "*" not in path]
    assert not missing


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"({page.name})" in index, f"docs/index.md says nothing of {page.name}"


def test_every_cited_paper_is_in_the_references() -> None:
    """By arXiv number. Pages of numbers that programs write cite nothing."""
    written = {"plans.md", "gpu-report.md", "benchmarks.md", "references.md"}
    pages = [page for page in PAGES if page.name not in written]
    known = set(re.findall(r"^\| (\d{4}\.\d{5}) \|", (ROOT / "docs" / "references.md").read_text(), re.M))
    for path in [*pages, *(ROOT / "diffkern").rglob("*.py")]:
        cited = set(re.findall(r"\b[12]\d(?:0[1-9]|1[0-2])\.\d{5}\b", path.read_text()))
        assert cited <= known, f"{path.relative_to(ROOT)} cites {sorted(cited - known)}"


# ------------------------------------------------------------------------------------------------- the page's Python


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    """What the blocks of Python on the page define."""
    scope: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        exec(compile(block, str(PAGE), "exec"), scope)
    return scope


@pytest.mark.parametrize("schedule", [schedules.linear(), schedules.edm()], ids=lambda s: s.name)
def test_the_sampler_of_the_page_is_adams_bashforth(made: dict[str, Any], schedule: schedules.Schedule) -> None:
    """It is `lms` of order 2."""
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ours, theirs = (make(schedule, 12, prediction="x0") for make in (made["ab2"], _lms_of_order_2))
    runs = [sample(lambda x, t: 0.3 * x, x * plan.init_scale, plan) for plan in (ours, theirs)]
    torch.testing.assert_close(*runs, rtol=1e-12, atol=1e-12)


def _lms_of_order_2(schedule: schedules.Schedule, steps: int, prediction: str) -> Any:
    return samplers.lms(schedule, steps, order=2, prediction=prediction)


def test_the_schedules_of_the_page_are_schedules(made: dict[str, Any]) -> None:
    table = made["quadratic"](100)
    assert table.T == 100
    assert float(table.alphas_cumprod[0]) == pytest.approx(1 - 0.02 / 100**2)
    path = made["CubicLogSNRSchedule"]()
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    torch.testing.assert_close(path.time_of_log_snr(path.log_snr(t)), t, rtol=0, atol=1e-4)
    torch.testing.assert_close(path.alpha(t) ** 2 + path.sigma(t) ** 2, torch.ones_like(t))
    assert samplers.ddim_inversion(path, 4).model_calls == 4
