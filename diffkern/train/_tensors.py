"""An open safetensors file as a mapping whose tensors are read when they are asked for."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from diffkern.extras import need

__all__ = ["Tensors", "opened"]


class Tensors(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for; a tied one under all of its names."""

    def __init__(self, file: Any) -> None:
        self._file, self._tied = file, file.metadata() or {}
        self._names: list[str] = list(file.keys())

    def __getitem__(self, name: str) -> Tensor:
        if self.shape(name) is None:
            raise KeyError(name)
        return self._file.get_tensor(self._tied.get(name, name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def shape(self, name: str) -> list[int] | None:
        """Of a tensor, without reading it; None where there is none."""
        name = self._tied.get(name, name)
        return list(self._file.get_slice(name).get_shape()) if name in self._names else None


@contextlib.contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[Tensors]:
    """The file, for a while; ValueError for one of another kind."""
    safetensors = need("safetensors", "safetensors", "train")
    try:
        file = safetensors.safe_open(str(path), framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a safetensors file, got none ({error})") from error
    with file:
        yield Tensors(file)
