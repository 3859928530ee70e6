"""`patch` puts diffkern into an imported guided_diffusion, `unpatch` takes it out again.

Attributes of its classes and modules are replaced, never the classes themselves: objects made before and after, names
imported elsewhere, subclasses, pickles and isinstance all go on as they were.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Iterator
from types import CellType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from diffkern.compat.guided_diffusion import nn, unet
from diffkern.compat.guided_diffusion._fit import fit
from diffkern.compat.guided_diffusion._probe import differences, results, undisturbed, unknown_kinds
from diffkern.compat.guided_diffusion._report import Change, Report
from diffkern.compat.guided_diffusion.gaussian_diffusion import GaussianDiffusion
from diffkern.compat.guided_diffusion.respace import SpacedDiffusion
from diffkern.names import HeadOrder

__all__ = ["Change", "Report", "patch", "unpatch"]

PACKAGES = ("guided_diffusion", "improved_diffusion")
"""What `patch` looks for where no package is given."""
SUBMODULES = ("nn", "gaussian_diffusion", "respace", "unet")
"""What is imported of it where that has not happened yet; others are looked through where they are loaded."""
DIFFUSIONS: tuple[type, ...] = (GaussianDiffusion, SpacedDiffusion)
ATTENTION = ("QKVAttention", "QKVAttentionLegacy")
DUNDERS = ("__setattr__", "__getstate__")
ALREADY = "it is diffkern's already"
OTHER = "it computes something else on a few numbers, or fails on them"
_ABSENT = object()
_done: dict[str, list[tuple[Any, str, Any]]] = {}
"""Package -> what was replaced, in order: owner, attribute, what stood there."""


def patch(package: ModuleType | str | None = None, *, diffusion: bool = True, network: bool = True) -> Report:
    """Makes an imported guided_diffusion run on diffkern; returns what was replaced and what not, with the reason.

    ``package``: a module or its name; by default guided_diffusion, or improved_diffusion, whichever is imported. Also a
    fork's package, or one module of it.
    ``diffusion``: the methods of GaussianDiffusion and SpacedDiffusion, for objects that exist and objects to come.
    ``network``: QKVAttention and QKVAttentionLegacy, also in networks that exist, and timestep_embedding. Both are
    first compared with the original on a few numbers: a fork's that computes something else stays.
    A method whose arguments differ from diffkern's stays or, where it has more of them, gets calls that use those.
    `unpatch` undoes it. Calling it again replaces what has come since.
    Raises ImportError where the package is not imported.
    """
    root = _root(package)
    modules, failed = _modules(root)
    changes = [Change(name, reason=reason) for name, reason in failed]
    todo = _done.setdefault(root.__name__, [])
    with undisturbed():
        if diffusion:
            for ours in DIFFUSIONS:
                for where, original in _classes(modules, ours.__name__):
                    changes += _patch_diffusion(where, original, ours, todo)
        if network:
            for name in ATTENTION:
                for where, original in _classes(modules, name):
                    changes.append(_patch_attention(where, original, todo))
            changes += _patch_embedding(modules, todo)
    return Report(root.__name__, changes)


def unpatch(package: ModuleType | str | None = None) -> Report:
    """Takes out what `patch` put into the package, or into every package: the very attributes it had are back."""
    names = list(_done) if package is None else [package if isinstance(package, str) else package.__name__]
    changes: list[Change] = []
    for name in names:
        done = _done.pop(name, [])
        _undo(done)
        changes += [Change(f"{_name(owner)}.{what}") for owner, what, before in done if before is not _ABSENT]
    return Report(", ".join(names), changes)


# ------------------------------------------------------------------------------------------------------ finding things
def _root(package: ModuleType | str | None) -> ModuleType:
    if isinstance(package, ModuleType):
        return package
    wanted = PACKAGES if package is None else (package,)
    for name in wanted:
        if name in sys.modules:
            return sys.modules[name]
    if package is None:
        raise ImportError(
            "guided_diffusion is not imported: import guided_diffusion before patch() "
            "(pip install git+https://github.com/openai/guided-diffusion), or give patch() the module of a fork"
        )
    raise ImportError(f"package must be an imported module or its name, got {package!r}, which is not imported")


def _modules(root: ModuleType) -> tuple[list[ModuleType], list[tuple[str, str]]]:
    """The package's modules, and those that cannot be had, each with the reason."""
    failed = []
    if hasattr(root, "__path__"):
        for name in SUBMODULES:
            full = f"{root.__name__}.{name}"
            if full in sys.modules:
                continue
            try:
                if importlib.util.find_spec(full) is not None:
                    importlib.import_module(full)
            except Exception as error:  # a package that it needs is absent, or fails
                failed.append((full, f"it cannot be imported: {error}"))
    inside = {root.__name__: root}
    for name, module in list(sys.modules.items()):
        if name.startswith(f"{root.__name__}.") and isinstance(module, ModuleType):
            inside[name] = module
    return list(inside.values()), failed


def _holders(modules: list[ModuleType], name: str) -> Iterator[tuple[ModuleType, Any]]:
    for module in modules:
        if name in vars(module):
            yield module, vars(module)[name]


def _classes(modules: list[ModuleType], name: str) -> list[tuple[str, type]]:
    """(its name in the report, class) of each class that some module holds under this name."""
    found = {held: None for _, held in _holders(modules, name) if isinstance(held, type)}
    return [(_name(held), held) for held in found]


def _name(owner: Any) -> str:
    return owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__qualname__}"


def _put(owner: Any, name: str, value: Any, todo: list[tuple[Any, str, Any]]) -> None:
    todo.append((owner, name, vars(owner).get(name, _ABSENT)))
    if value is _ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _undo(done: list[tuple[Any, str, Any]]) -> None:
    for owner, name, before in reversed(done):
        if before is _ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def _has(todo: list[tuple[Any, str, Any]], owner: Any) -> bool:
    return any(held is owner for held, _, _ in todo)


# ----------------------------------------------------------------------------------------------------------- diffusion
def _patch_diffusion(where: str, original: type, ours: type, todo: list[tuple[Any, str, Any]]) -> list[Change]:
    if issubclass(original, ours) or _has(todo, original):
        return [Change(where, reason=ALREADY)]
    if original.__setattr__ is not object.__setattr__ and ours is GaussianDiffusion:
        return [Change(where, reason="it sets attributes in a way of its own")]
    if ours is not GaussianDiffusion and not any(_has(todo, base) for base in original.__mro__[1:]):
        return [Change(where, reason="the class that it is made of was not replaced")]
    if ours is not GaussianDiffusion:
        return _replace(where, original, ours, todo, {})
    unknown = unknown_kinds(original)
    if unknown:
        return [Change(where, reason=f"it has {', '.join(unknown)}, which diffkern has not")]
    trial: list[tuple[Any, str, Any]] = []
    before = results(original)
    if not before:
        return [Change(where, reason="it cannot be tried: it is not made as guided_diffusion's")]
    try:
        _replace(where, original, ours, trial, {})
        other = differences(before, results(original))
    finally:
        _undo(trial)
    return _replace(where, original, ours, todo, other)


def _replace(
    where: str, original: type, ours: type, todo: list[tuple[Any, str, Any]], other: dict[str, set[str]]
) -> list[Change]:
    """``other``: methods that compute something else, and with which argument."""
    given = _attributes(ours)
    changes = []
    for name, value in given.items():
        before = inspect.getattr_static(original, name, None)
        there = isinstance(before, FunctionType) and not name.startswith(("__", "_dk_"))
        note = None
        if "" in other.get(name, ()):
            changes.append(Change(f"{where}.{name}", reason=OTHER))
            continue
        if isinstance(value, FunctionType):
            value = _moved(value, original)
            if there:
                value, note, reason = fit(before, value, other.get(name, frozenset()))
                if reason is not None:
                    changes.append(Change(f"{where}.{name}", reason=reason))
                    continue
        _put(original, name, value, todo)
        if there:
            changes.append(Change(f"{where}.{name}", note=note))
    base = _attributes(GaussianDiffusion)
    for name, before in list(vars(original).items()):
        if name in given or not isinstance(before, FunctionType) or name.startswith("__"):
            continue
        if ours is not GaussianDiffusion and name in base:
            below: Any = getattr(super(original, original), name)
            if below is not base[name]:  # the fork's own, at least for some calls: it expects a wrapped model
                continue
            _put(original, name, _ABSENT, todo)  # it wraps the model, which the method below it does now
            changes.append(Change(f"{where}.{name}"))
        elif not name.startswith("_"):
            changes.append(Change(f"{where}.{name}", reason="diffkern has no method of this name"))
    return changes


def _attributes(ours: type) -> dict[str, Any]:
    """What the class and its bases define, without what `GaussianDiffusion` gives its subclasses."""
    bases = ours.__mro__ if ours is GaussianDiffusion else ours.__mro__[: ours.__mro__.index(GaussianDiffusion)]
    found: dict[str, Any] = {}
    for base in bases:
        if base is not object:
            for name, value in vars(base).items():
                if name in DUNDERS or not name.startswith("__"):
                    found.setdefault(name, value)
    return found


def _moved(function: FunctionType, owner: type) -> FunctionType:
    """The function as a method of another class: its zero-argument super() starts there."""
    if "__class__" not in function.__code__.co_freevars:
        return function
    at = function.__code__.co_freevars.index("__class__")
    cells = list(function.__closure__ or ())
    cells[at] = CellType(owner)
    moved = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, tuple(cells)
    )
    moved.__kwdefaults__ = function.__kwdefaults__
    moved.__module__, moved.__qualname__, moved.__doc__ = function.__module__, function.__qualname__, function.__doc__
    return moved


# ------------------------------------------------------------------------------------------------------------- network
def _patch_attention(where: str, original: type, todo: list[tuple[Any, str, Any]]) -> Change:
    if original.__module__ == unet.__name__ or _has(todo, original):
        return Change(where, reason=ALREADY)
    forward: Any = vars(original).get("forward")
    order = _order(original)
    if not isinstance(forward, FunctionType) or order is None:
        return Change(where, reason=OTHER)

    def attend(self: Any, qkv: Tensor) -> Tensor:
        return unet.qkv_attention(qkv, getattr(self, "n_heads", 1), order)

    value, note, reason = fit(forward, attend)
    if reason is None:
        _put(original, "forward", value, todo)
    return Change(f"{where}.forward", note=note, reason=reason)


def _order(original: type) -> HeadOrder | None:
    """In which order it reads q, k and v, None where it is neither of the two; improved-diffusion's has no heads."""
    orders: tuple[HeadOrder, ...] = ("legacy", "new")
    x = torch.linspace(-2, 2, 2 * 48 * 5, dtype=torch.float32).sin().reshape(2, 48, 5)
    for arguments, heads in (((2,), 2), ((), 1)):
        try:
            layer = original(*arguments)
            want = layer(x)
        except Exception:  # whatever a fork's layer does with these
            continue
        if getattr(layer, "n_heads", 1) != heads:
            continue
        for order in orders:
            found = unet.qkv_attention(x, heads, order)
            if isinstance(want, Tensor) and want.shape == found.shape and torch.allclose(found, want, atol=1e-4):
                return order
    return None


def _patch_embedding(modules: list[ModuleType], todo: list[tuple[Any, str, Any]]) -> list[Change]:
    changes = []
    for module, held in _holders(modules, "timestep_embedding"):
        where = f"{module.__name__}.timestep_embedding"
        if not isinstance(held, FunctionType) or held.__module__.startswith("diffkern."):
            changes.append(Change(where, reason=ALREADY))
            continue
        t = torch.tensor([0.0, 17.25, 999.0], dtype=torch.float32)
        try:
            same = all(torch.allclose(nn.timestep_embedding(t, dim), held(t, dim), rtol=0, atol=1e-4) for dim in (8, 9))
        except Exception:  # as above
            same = False
        if not same:
            changes.append(Change(where, reason=OTHER))
            continue
        value, note, reason = fit(held, nn.timestep_embedding)
        if reason is None:
            _put(module, "timestep_embedding", value, todo)
        changes.append(Change(where, note=note, reason=reason))
    return changes
