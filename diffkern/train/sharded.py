"""A network in pieces over the processes of a job (FSDP2), and checkpoints that each process writes its part of.

torch.distributed's own parts, with what `diffkern.nn` knows of its networks: `torch.distributed.fsdp.fully_shard`, and
torch.distributed.checkpoint with the storage that is safetensors, as its default reads pickles.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkern.parallel import bare

__all__ = ["is_shared", "pieces_of", "read", "shapes", "shard", "write"]


def shard(network: nn.Module, pieces: Iterable[Iterable[nn.Module]] | None = None, **options: Any) -> None:
    """Cuts the parameters of a network in place, so that each process holds, averages and updates its part alone.

    A piece is gathered when it runs and given back after it; what is in none belongs to the whole network, which stays
    gathered through a step. ``pieces`` are those of `pieces_of` if None. ``options`` go to
    `torch.distributed.fsdp.fully_shard` (``mesh``, ``mp_policy``, ``offload_policy`` ...). Weights of convolutions lose
    their channels_last layout, which FSDP2 does not take. Before the optimizer and `Averages` are made. RuntimeError
    without a job of torch.distributed.
    """
    from torch.distributed.fsdp import fully_shard  # only where a network is cut

    if not torch.distributed.is_initialized():
        raise RuntimeError("shard needs a job of torch.distributed (torchrun, `diffkern.parallel.job`), got none")
    network = bare(network)
    network.to(memory_format=torch.contiguous_format)
    for piece in pieces_of(network) if pieces is None else pieces:
        fully_shard(list(piece), **options)
    fully_shard(network, **options)


def pieces_of(network: nn.Module) -> list[list[nn.Module]]:
    """Modules that run together, for `shard`.

    Of a network of `diffkern.nn` its ``pieces()``; of others the modules whose classes are named in
    ``_no_split_modules``, as those of diffusers and transformers are.
    """
    own: Any = network
    if hasattr(own, "pieces"):
        return [piece for piece in own.pieces() if piece]
    names = getattr(own, "_no_split_modules", None) or ()
    return [[module] for module in network.modules() if type(module).__name__ in names]


def is_shared(tensor: Tensor) -> bool:
    """Whether each process has its part of the tensor alone."""
    return hasattr(tensor, "full_tensor")


def write(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Writes shared tensors, every process its parts into a safetensors file of its own, all at the same time.

    To be called by every process. OSError on all of them where one cannot write.
    """
    checkpoint = _checkpoint()
    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        checkpoint.save(dict(tensors), storage_writer=writer)
    except checkpoint.CheckpointException as error:
        raise _system_error(error, folder) or error from error


def shapes(folder: Path) -> dict[str, list[int]]:
    """The names of the tensors in a folder of `write`, and their whole shapes."""
    found = _checkpoint().HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: list(entry.size) for name, entry in found.items()}


def read(folder: Path, targets: Mapping[str, Tensor]) -> None:
    """Fills tensors from a folder of `write`: of those that are shared each process reads its parts alone.

    Any number of processes may have written; to be called by every process. Nothing is unpickled.
    """
    checkpoint = _checkpoint()
    reader = checkpoint.HuggingFaceStorageReader(str(folder))
    alone = not torch.distributed.is_initialized()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # it says so, and goes on
        checkpoint.load(dict(targets), storage_reader=reader, no_dist=alone)


def _checkpoint() -> Any:
    """torch's module, whose names torch does not say to be public; imported only where something is sharded."""
    from torch.distributed import checkpoint

    return checkpoint


def _system_error(error: Any, folder: Path) -> OSError | None:
    """What the system said to a process, out of torch's summary of the errors of all."""
    for found, _ in error.failures.values():
        if isinstance(found, OSError) and found.errno is not None:
            return OSError(found.errno, os.strerror(found.errno), str(folder))
    return None
