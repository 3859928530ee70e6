"""The walls: what a folder of csrc may include, what a wing of the package may import, how deep and how long it gets.

docs/architecture.md prints WALLS as a table, and is compared with it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from helpers import import_graph
from helpers.import_graph import Import, wing

TORCH = r"(torch|ATen|c10)/"
CUDA = r"(cuda|cooperative_groups|nv/|cub/|thrust/|mma\.h|sm_)"
PYTHON = r"(pybind11/|Python\.h)"
SIMD = r"\w*intrin\.h|arm_neon\.h"

# What the headers of each folder may not be, and which folders it may include from.
FORBIDDEN = {
    "core": (f"{TORCH}|{PYTHON}|{CUDA}|{SIMD}", {"core"}),
    "cpu": (f"{TORCH}|{PYTHON}|{CUDA}", {"core", "cpu"}),
    "cuda": (f"{TORCH}|{PYTHON}|{SIMD}", {"core", "cuda"}),
    # Kernels are reached through the prototypes in core only; ATen and c10 are not stable ABI.
    "bind": (f"ATen/|c10/|torch/extension\\.h|torch/all\\.h|{SIMD}", {"core", "bind"}),
}


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.M)


@pytest.mark.parametrize("folder", FORBIDDEN)
def test_include_walls(root: Path, folder: str) -> None:
    forbidden, allowed = FORBIDDEN[folder]
    csrc = root / "csrc"
    paths = [path for path in (csrc / folder).rglob("*") if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
    assert paths
    for path in paths:
        for name in includes(path):
            where = f"{path.relative_to(root)} includes {name}"
            assert re.match(forbidden, name) is None, where
            for candidate in (path.parent / name, csrc / name):
                if candidate.is_file():
                    assert candidate.resolve().relative_to(csrc).parts[0] in allowed, where


def test_torch_and_pybind11_do_not_meet(root: Path) -> None:
    """pybind11 in module_*.cpp only, and no torch header there: torch brings a pybind11 of its own."""
    for path in (root / "csrc/bind").iterdir():
        names = includes(path)
        torch_headers = [name for name in names if re.match(TORCH, name)]
        if path.name.startswith("module_"):
            assert not torch_headers
            assert any(name.startswith("pybind11/") for name in names)
            local = [path.parent / name for name in names if (path.parent / name).is_file()]
            assert not [name for header in local for name in includes(header) if re.match(TORCH, name)]
        else:
            assert not [name for name in names if re.match(PYTHON, name)], path.name


# ------------------------------------------------------------------------------------------------------- the package

# Of every wing: which others it may import, whatever the module.
WALLS = {
    "modes": "",
    "streams": "",
    "tableaus": "",
    "integers": "",
    "checks": "",
    "names": "",
    "records": "",
    "storage": "",
    "progress": "",
    "extras": "",
    "pixels": "",
    "pictures": "records storage extras pixels",
    "parallel": "",
    "signatures": "checks",
    "vocabulary": "checks records",
    "_load": "",
    "schedules": "modes integers checks names records",
    "plan": "modes streams names records schedules",
    "reference": "checks names plan",
    "ops": "integers checks names _load plan",
    "brownian": "modes streams ops",
    "draws": "streams checks names ops",
    "degradations": "streams modes checks names records ops draws",
    "samplers": "modes streams tableaus integers checks names signatures schedules plan brownian",
    "nn": "modes streams integers checks names records storage extras parallel vocabulary _load ops",
    "objectives": "modes streams integers checks names records progress schedules ops draws",
    "guidance": "modes integers checks names schedules plan ops",
    "sampling": "modes streams tableaus integers checks names progress signatures schedules plan ops brownian draws "
    "samplers",
    "simulate": "streams tableaus integers checks names schedules plan ops draws objectives",
    "diffusion": "modes checks names records storage parallel schedules plan ops draws degradations samplers nn "
    "objectives sampling simulate",
    "gan": "modes streams integers checks names records parallel ops draws nn objectives",
    "compat": "modes streams tableaus integers checks names schedules plan ops brownian samplers nn "
    "objectives sampling simulate diffkern",
    "data": "streams integers checks names records progress extras pixels parallel vocabulary ops draws",
    "metrics": "checks records storage progress extras pixels pictures parallel",
    "train": "streams checks names records storage progress extras pictures parallel schedules plan ops draws "
    "degradations nn objectives diffusion gan data metrics generate",
    "generate": "integers names records storage progress pixels pictures parallel schedules plan ops samplers",
    "demo": "storage extras pictures ops objectives diffusion data metrics train generate",
    "command": "checks records storage extras pictures parallel _load schedules plan ops degradations samplers nn "
    "diffusion gan data metrics train generate demo diffkern",
    "diffkern": "streams _load schedules plan reference ops brownian degradations samplers objectives guidance "
    "sampling simulate diffusion gan",
    "__main__": "",
}
LONGEST_CHAIN = 14
"""Imports at module level, one behind the other; from a command through training to the ground."""
LONGEST_FILE = 400
# Who may touch the native modules and ops by name.
NATIVE = {"_load", "ops"}


@pytest.fixture(scope="module")
def imports(root: Path) -> dict[str, list[Import]]:
    return import_graph.imports(root / "diffkern")


def test_a_wing_imports_what_its_entry_names(imports: dict[str, list[Import]]) -> None:
    wings = {wing(module, imports) for module in imports}
    assert wings == set(WALLS), "a wing without an entry in WALLS, or an entry without a wing"
    allowed = {name: {name, *others.split()} for name, others in WALLS.items()}
    wrong = [
        f"{module} imports {found.name}"
        for module, all_found in imports.items()
        for found in all_found
        if not found.typing_only and wing(found.name, imports) not in allowed[wing(module, imports)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_entry_names_more_than_is_imported(imports: dict[str, list[Import]]) -> None:
    used: dict[str, set[str]] = {name: set() for name in WALLS}
    for module, all_found in imports.items():
        used[wing(module, imports)] |= {wing(found.name, imports) for found in all_found if not found.typing_only}
    for name, others in WALLS.items():
        assert set(others.split()) <= used[name], f"{name} no longer imports {set(others.split()) - used[name]}"


def test_wings_stand_on_each_other_without_circles() -> None:
    standing: set[str] = set()
    # The front door imports from the wings; commands and drop-ins ask it for names, when they are called.
    left = {name: set(others.split()) - {"diffkern"} for name, others in WALLS.items()}
    while left:
        free = [name for name, others in left.items() if others <= standing]
        assert free, f"a circle among {sorted(left)}"
        standing.update(free)
        left = {name: others for name, others in left.items() if name not in free}


def test_the_page_prints_the_walls(root: Path) -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]*) \|$", (root / "docs" / "architecture.md").read_text(), re.M)
    printed = {name: set(re.findall(r"`(\w+)`", others)) for name, others in rows}
    assert printed == {name: set(others.split()) for name, others in WALLS.items()}


def test_what_is_private_to_a_package_is_imported_by_it_alone(imports: dict[str, list[Import]]) -> None:
    """By full dotted name: `a.b._c` and `a.b._c.d` belong to `a.b`, and `a.b.module._name` as well."""
    wrong = []
    for module, all_found in imports.items():
        for found in all_found:
            owner = import_graph.owner(found.name, imports)
            if owner is not None and not f"{module}.".startswith(f"{owner}."):
                wrong.append(f"{module} imports {found.name}, private to {owner}")
    assert not wrong, "\n".join(wrong)


def test_chains_of_imports_are_short(imports: dict[str, list[Import]]) -> None:
    chain = import_graph.longest_chain(imports)
    assert len(chain) - 1 <= LONGEST_CHAIN, " -> ".join(chain)


def test_files_are_short(root: Path) -> None:
    lines = {path: len(path.read_text().splitlines()) for path in (root / "diffkern").rglob("*.py")}
    assert not {str(path.relative_to(root)): n for path, n in lines.items() if n > LONGEST_FILE}


def test_only_ops_reaches_the_native_ops(root: Path, imports: dict[str, list[Import]]) -> None:
    package = root / "diffkern"
    for path in package.rglob("*.py"):
        if wing(import_graph.module_name(path, package), imports) not in NATIVE:
            assert "torch.ops.diffkern" not in import_graph.code(path), path.name
    for module, all_found in imports.items():
        if wing(module, imports) not in NATIVE:
            assert not [
                found for found in all_found if found.name.split(".")[:2] in (["diffkern", "_C"], ["diffkern", "_cuda"])
            ]
