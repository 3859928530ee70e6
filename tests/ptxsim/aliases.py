"""The shapes of functions and values the emulator passes around."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .machine import Machine
    from .machine.options import Group

Array: TypeAlias = NDArray[Any]
# Operands are small tuples, kind first: ("reg", Reg) ("imm", int) ("f32", bits) ("f64", bits) ("dec", float)
# ("sym", name, offset) ("vec", [..]) ("addr", base operand, offset) ("pair", a, b) ("not", operand) ("list", [..])
# ("spec", name) ("sink",)
Operand: TypeAlias = tuple[Any, ...]
# What selects the lanes of a register array: a slice for all of them, or an index array.
Sel: TypeAlias = slice | NDArray[Any]
Number: TypeAlias = int | float | np.generic

Reader: TypeAlias = Callable[["Machine", Sel], Array]  # the operand's values in the selected lanes
Writer: TypeAlias = Callable[["Machine", Sel, Array], None]
Exec: TypeAlias = Callable[["Machine", "Group"], None]  # runs for a group, which then falls through
Step: TypeAlias = Callable[["Machine", "Group"], int]  # returns the next pc, or -1 after re-queueing the lanes itself
Handler: TypeAlias = tuple[int, Callable[["Machine", "Group"], Any]]  # (0, Exec) or (1, Step)
