"""The package's top level: what ``dir(diffkern)`` shows, by one rule, and what is there after ``import diffkern``."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import diffkern
from diffkern import compat, objectives, ops, samplers, sampling, schedules

# The wings that `python -m diffkern` runs, and the modules beside the wings that a user calls: others (`checks`,
# `tableaus` ...) are ground that wings alone stand on.
PROGRAMS = {"command", "demo"}
GROUND = {"brownian", "plan", "reference", "streams"}
# Verbs and results that come from no list taken whole.
CHOSEN = {"Diffusion", "Plan", "Row", "Sampled", "__version__", "bits_per_dim", "build_info", "convert", "cuda_status"}
CHOSEN |= {"GAN", "log_likelihood"}


def functions(module: object) -> dict[str, object]:
    """The functions that a module lists."""
    listed = {name: getattr(module, name) for name in module.__all__}  # type: ignore[attr-defined]
    return {name: value for name, value in listed.items() if inspect.isroutine(value)}


def losses() -> dict[str, object]:
    """Every function of `objectives` that is a loss by its name."""
    modules = [getattr(objectives, name) for name in objectives.__all__]
    return {name: value for module in modules for name, value in functions(module).items() if name.endswith("_loss")}


def rooms() -> set[str]:
    """The wings, which are packages, and the modules beside them that a user calls."""
    return {module.name for module in pkgutil.iter_modules(diffkern.__path__) if module.ispkg} - PROGRAMS | GROUND


def test_dir_shows_what_the_rule_says() -> None:
    """Wings, every schedule, sampler, op and loss, and the verbs of sampling; nothing else."""
    rule = {"SAMPLERS", "SCHEDULES"} | rooms() | CHOSEN | set(ops.__all__)
    for module in (samplers, schedules.makers, sampling, objectives.losses):
        rule |= set(functions(module))
    rule |= set(losses())
    assert set(dir(diffkern)) == rule


@pytest.mark.parametrize(
    "names",
    [
        {name: getattr(ops, name) for name in ops.__all__},
        samplers.SAMPLERS,
        schedules.SCHEDULES,
        functions(sampling),
        losses(),
    ],
    ids=["ops", "samplers", "schedules", "sampling", "losses"],
)
def test_every_one_is_a_top_level_name(names: dict[str, object]) -> None:
    """All of a kind or none: and it is the thing itself, not another of its name."""
    assert names
    assert {name: getattr(diffkern, name) for name in names} == dict(names)


def test_no_name_comes_from_two_places() -> None:
    assert [name for name, count in Counter(diffkern.__all__).items() if count > 1] == []


def test_no_private_name_and_no_import_shows() -> None:
    shown = set(dir(diffkern)) - {"__version__"}
    assert not [name for name in shown if name.startswith("_")]
    assert shown.isdisjoint({"Any", "TYPE_CHECKING", "import_module", "losses", "makers"})


@pytest.mark.full
def test_wings_are_there_after_import_diffkern() -> None:
    """In a fresh process: `nn`, `compat` and each drop-in are imported only when they are asked for."""
    drop_ins = [name for name in dir(compat) if name != "diffusers" or importlib.util.find_spec("diffusers")]
    late = ["nn", "compat", *(f"compat.{name}" for name in drop_ins)]
    code = "import sys, diffkern\n"
    code += "\n".join(f"assert 'diffkern.{name}' not in sys.modules, 'early: {name}'" for name in late) + "\n"
    code += "\n".join(f"assert diffkern.{name} is sys.modules['diffkern.{name}']" for name in late)
    package = Path(diffkern.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=package, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr


def test_every_drop_in_is_listed() -> None:
    present = {module.name for module in pkgutil.iter_modules(compat.__path__)} - {"kit"}
    assert set(dir(compat)) == present


@pytest.mark.parametrize("module", [diffkern, compat])
def test_an_unknown_name_is_an_attribute_error(module: object) -> None:
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        module.no_such_name  # type: ignore[attr-defined]  # noqa: B018


def test_the_docstring_names_every_wing() -> None:
    assert diffkern.__doc__ is not None
    for name in rooms():
        assert f"`{name}`" in diffkern.__doc__, name
