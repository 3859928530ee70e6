"""The engine of every weight map: a table of `Key`, read in one direction or the other.

A map says for each of our tensors which of theirs it is made of; nothing is computed with them but moved, so the same
bits come back from a round trip in either direction. What needs no move is a view of what was given.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import pickle
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffkern.names import HeadOrder
from diffkern.records import shown

__all__ = ["Key", "Source", "fill", "read_state", "stored", "to_ours", "to_theirs", "unfilled"]

Source: TypeAlias = "Mapping[str, Tensor] | str | os.PathLike[str]"
"""A state dict, or a file that holds one: safetensors, or torch.save of nothing but tensors."""
Shapes: TypeAlias = "Mapping[str, Sequence[int]]"
Network = TypeVar("Network", bound=nn.Module)


@dataclasses.dataclass(frozen=True, eq=False)
class Key:
    """One of our tensors, and what it is called and looks like there.

    ours      our name; None for a constant of theirs that our network does not keep: ``value``
    theirs    their names; of several the rows (dim 0) stand one below the other in ours, in equal parts
    axes      trailing axes of size 1 that a matrix [out, in] has there: 0 linear, 1 and 2 convolutions; None: as ours
    rows      the order of the rows of qkv there; ours is "new", [3, heads, D]; "legacy" [heads, 3, D], "edm"
              [heads, D, 3], as `ops.spatial_attention` takes them; ``heads`` says how many
    table     a table of classes there, which has no row for "no class": "rows" [K, E] of an embedding, "columns" [E, K]
              of a linear layer over one-hot vectors; ours is [K + 1, E], and the last row is zero
    value     what a constant must be
    """

    ours: str | None
    theirs: tuple[str, ...]
    axes: int | None = None
    rows: HeadOrder = "new"
    heads: int = 1
    table: Literal["rows", "columns"] | None = None
    value: Tensor | None = None

    def shape_there(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of each of theirs, for the shape of ours; ValueError where the rows do not divide."""
        first, *others = shape
        if self.table is not None:
            return (first - 1, *others) if self.table == "rows" else (*others, first - 1)
        if first % (len(self.theirs) * (1 if self.rows == "new" else 3 * self.heads)):
            raise ValueError(f"the rows of {self.ours} must divide into {len(self.theirs)} parts, got {tuple(shape)}")
        first //= len(self.theirs)
        return (first, *others) if self.axes is None else (first, others[0], *(1,) * self.axes)

    def read(self, found: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
        """Ours of theirs."""
        if self.table is not None:
            table = found[0] if self.table == "rows" else found[0].transpose(0, 1)
            return torch.cat([table, table.new_zeros(1, table.shape[1])])
        whole = found[0] if len(found) == 1 else torch.cat(list(found))
        if self.rows != "new":
            axes, back = _ORDERS[self.rows](self.heads)
            whole = whole.unflatten(0, axes).permute(*back, *range(3, whole.dim() + 2)).flatten(0, 2)
        return whole.reshape(tuple(shape))

    def write(self, ours: Tensor) -> tuple[Tensor, ...]:
        """Theirs of ours."""
        if self.table is not None:
            if ours[-1].count_nonzero():
                raise ValueError(
                    f"{self.ours} must end in a row of zeros, as {self.theirs[0]} has no row for no class, got "
                    "one that was trained"
                )
            return (ours[:-1] if self.table == "rows" else ours[:-1].transpose(0, 1).contiguous(),)
        if self.rows != "new":
            back = _ORDERS[self.rows](self.heads)[1]
            there = [back.index(i) for i in range(3)]
            ours = ours.unflatten(0, (3, self.heads, -1)).permute(*there, *range(3, ours.dim() + 2)).flatten(0, 2)
        if self.axes is not None:
            ours = ours.reshape(*ours.shape[:2], *(1,) * self.axes)
        return (ours,) if len(self.theirs) == 1 else ours.chunk(len(self.theirs))


_ORDERS: dict[str, Any] = {  # how the rows unfold there, and the axes of that in our order [3, heads, D]
    "legacy": lambda heads: ((heads, 3, -1), (1, 0, 2)),
    "edm": lambda heads: ((heads, -1, 3), (2, 0, 1)),
}


def to_ours(keys: Iterable[Key], state: Mapping[str, Tensor], shapes: Shapes) -> dict[str, Tensor]:
    """Our state dict of theirs; ``shapes``: that of every tensor of our network, by name.

    ValueError that lists every name which ``state`` lacks, which the map does not know, or whose shape is another
    (for a constant: whose value is). Dtypes and devices stay. Tensors are views of the given ones where no row moves.
    """
    keys = list(keys)
    faults: list[str] = []
    made: dict[str, Tensor] = {}
    for key in keys:
        try:
            there = _shape_there(key, shapes)
        except ValueError as error:
            faults.append(str(error))
            continue
        found: list[Tensor] = []
        for name in key.theirs:
            if name not in state:
                faults.append(f"{name} is missing")
            elif tuple(state[name].shape) != there:
                faults.append(f"{name} must have shape {list(there)}, got {list(state[name].shape)}")
            elif key.value is not None and not torch.equal(state[name].cpu().to(key.value.dtype), key.value):
                faults.append(f"{name} must be {shown(key.value.flatten().tolist())}, got other values")
            else:
                found.append(state[name])
        if key.ours is not None and len(found) == len(key.theirs):
            made[key.ours] = key.read(found, shapes[key.ours])
    known = {name for key in keys for name in key.theirs}
    faults += [f"{name} is unknown" for name in state if name not in known]
    mapped = {key.ours for key in keys}
    faults += [f"nothing there is {name} of our network" for name in shapes if name not in mapped]
    if faults:
        raise ValueError(f"weights must be those of this network, got {len(faults)} differences: {'; '.join(faults)}")
    return made


def to_theirs(keys: Iterable[Key], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict of ours: the inverse of `to_ours`.

    ValueError that lists every name which ``state`` lacks or which the map does not know, and for a trained row of
    "no class" where theirs has none. Tensors are views of the given ones where no row moves.
    """
    keys = list(keys)
    mapped = {key.ours for key in keys if key.ours is not None}
    faults = [f"{name} is missing" for name in sorted(mapped) if name not in state]
    faults += [f"{name} is unknown" for name in state if name not in mapped]
    made: dict[str, Tensor] = {}
    for key in keys:
        if key.ours is None:
            assert key.value is not None
            made.update({name: key.value.clone() for name in key.theirs})
        elif key.ours in state:
            try:
                key.shape_there(state[key.ours].shape)
                made.update(zip(key.theirs, key.write(state[key.ours]), strict=True))
            except ValueError as error:
                faults.append(str(error))
    if faults:
        raise ValueError(f"state must be that of this network, got {len(faults)} differences: {'; '.join(faults)}")
    return made


def stored(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict as files want it, contiguous: our convolutions' weights are channels_last."""
    return {name: tensor.contiguous() for name, tensor in state.items()}


def _shape_there(key: Key, shapes: Shapes) -> tuple[int, ...]:
    if key.ours is None:
        assert key.value is not None
        return tuple(key.value.shape)
    if key.ours not in shapes:
        raise ValueError(f"{', '.join(key.theirs)} has no place in our network ({key.ours})")
    return key.shape_there(shapes[key.ours])


class _NoInitialValues(TorchFunctionMode):
    """`torch.nn.init` leaves tensors as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return func(*args, **(kwargs or {}))


def unfilled(made: Callable[[], Network]) -> Network:
    """The network that ``made()`` returns, whose weights have no initial values, as `fill` gives all of them theirs.

    On the CPU; torch's generator stays as it is.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), _NoInitialValues():
        return made()


def fill(network: nn.Module, keys: Iterable[Key], source: Source) -> None:
    """Their weights into our network, which takes their dtype where all of them have one.

    The network has copies of its own. ValueError as of `to_ours` and `read_state`; the network is untouched then.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    made = to_ours(keys, read_state(source), shapes)
    dtypes = {tensor.dtype for tensor in made.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        network.to(dtypes.pop())
    network.load_state_dict(made)


def read_state(source: Source, name: str = "weights") -> dict[str, Tensor]:
    """The tensors of a state dict, or of a file of one, by name; those of a file on the CPU.

    A file is known by its beginning, not by its name: safetensors, or what torch.save wrote, of which nothing but
    tensors is unpickled. ValueError in one sentence for a truncated file and for any other; OSError as of `open`.
    """
    if isinstance(source, Mapping):
        found: Any = source
    else:
        path = Path(source)
        with open(path, "rb") as file:
            start = file.read(9)
        if start[8:] == b"{":
            found = _safetensors(path, name)
        elif start[:2] == b"PK" or start[:1] == b"\x80":
            found = _pickled(path, name)
        else:
            raise ValueError(f"{_whole(name, path)} (it begins with {start!r})")
    rule = f"{name} must be a state dict, tensors by name"
    if not isinstance(found, Mapping):
        raise ValueError(f"{rule}, got {shown(found)}")
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            inside = f": give {key!r} of it" if isinstance(value, Mapping) else ""
            raise ValueError(f"{rule}, got {shown(key)} of type {type(value).__name__}{inside}")
    return dict(found)


def _safetensors(path: Path, name: str) -> dict[str, Tensor]:
    try:
        safetensors = importlib.import_module("safetensors")
        load = importlib.import_module("safetensors.torch").load_file
    except ImportError as error:
        raise ImportError(f"reading {path} needs safetensors, which cannot be imported ({error})") from None
    try:
        found: dict[str, Tensor] = load(str(path))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{_whole(name, path)} ({_line(error)})") from None
    return found


def _pickled(path: Path, name: str) -> Any:
    try:
        with open(path, "rb") as file, warnings.catch_warnings():  # the file, as torch goes by the ending of a name
            warnings.simplefilter("ignore", UserWarning)  # of pickles that it did not write
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{name} must hold nothing but tensors, as other objects run code when they are read, got {path}: "
            "save the state dict of what is in it, where you trust it"
        ) from None
    except Exception as error:  # of the reader of archives, and of the unpickler of what is cut off: of any type
        raise ValueError(f"{_whole(name, path)} ({_line(error)})") from None


def _whole(name: str, path: Path) -> str:
    return f"{name} must be a whole safetensors or torch file, got {path}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
