"""Where this process stands among those of its job, on torch.distributed alone: all that training, sampling and
evaluation on many devices ask for.

Without a job (no torchrun) a process is rank 0 of 1 and everything here is the identity, so that callers need no case
of their own.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist

__all__ = [
    "bare",
    "barrier",
    "by_main",
    "class_of",
    "device",
    "device_of",
    "gathered",
    "is_main",
    "job",
    "rank",
    "reshard",
    "share",
    "summed",
    "world",
]

_JOBS: collections.Counter[str] = collections.Counter()
"""How many jobs this process has been in, by the place where they meet."""


def _running() -> bool:
    return dist.is_available() and dist.is_initialized()


def bare(model: nn.Module) -> nn.Module:
    """The network inside of DistributedDataParallel and torch.compile."""
    while True:
        inside = getattr(model, "_orig_mod", None) or (
            model.module if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel) else None
        )
        if inside is None:
            return model
        model = inside


def class_of(model: nn.Module) -> type[nn.Module]:
    """The class of a network, also of one that FSDP2 has cut, which gives it a class of its own above it."""
    kind = type(model)
    if hasattr(kind, "set_requires_gradient_sync") and kind.__name__.startswith("FSDP"):
        found: type[nn.Module] = kind.__mro__[2]  # the second is torch's FSDPModule
        return found
    return kind


def reshard(model: nn.Module) -> None:
    """Each process has its part of the weights alone again: what FSDP2 gathers for a call without gradients stays."""
    for module in model.modules():
        cut: Any = module
        if hasattr(cut, "reshard") and hasattr(cut, "unshard"):
            cut.reshard()


def rank() -> int:
    """Number of this process in its job, from 0."""
    return dist.get_rank() if _running() else 0


def world() -> int:
    """How many processes the job has."""
    return dist.get_world_size() if _running() else 1


def is_main() -> bool:
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def device() -> torch.device:
    """Where tensors must be for `summed`: this rank's GPU in a job on NCCL, else the CPU."""
    if _running() and dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def device_of(name: str) -> torch.device:
    """The device of this process: ``name`` itself, or of "cuda" the GPU that torchrun's LOCAL_RANK gives it."""
    if name == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(name)


@contextlib.contextmanager
def job(device: torch.device, timeout: float = 600.0) -> Iterator[None]:
    """The job that torchrun's environment describes, for a while: NCCL on GPUs, gloo elsewhere.

    Nothing where torchrun started nothing (no WORLD_SIZE), and where a job is running already; one may follow another,
    entered by all alike. ``timeout``, seconds: how long a rank waits for one that does not come before it ends with an
    error.
    """
    if _running() or "WORLD_SIZE" not in os.environ:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    wait, stores = timedelta(seconds=timeout), cast(Any, dist)
    store, number, count = next(stores.rendezvous("env://", timeout=wait))
    # The store that torchrun keeps still has the addresses of jobs before and of those it has started again.
    place = os.environ.get("MASTER_ADDR", "") + ":" + os.environ.get("MASTER_PORT", "")
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = stores.PrefixStore(f"diffkern/{again}/{count}/{_JOBS[place]}", store)
    _JOBS[place] += 1
    dist.init_process_group(backend, store=own, rank=number, world_size=count, timeout=wait)
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(n: int) -> range:
    """Of n things this rank's: floor(r n/w) .. floor((r + 1) n/w) - 1; the ranks' parts follow each other."""
    return range(rank() * n // world(), (rank() + 1) * n // world())


def summed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The sums of each over all ranks, in place; in their own dtype, so float64 stays exact to its rounding."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
    return tensors


def gathered(value: Any) -> list[Any]:
    """The JSON-able ``value`` of every rank, by rank. Travels as JSON: nothing is unpickled."""
    if world() == 1:
        return [value]
    where = device()
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(where)
    sizes = [torch.zeros(1, dtype=torch.int64, device=where) for _ in range(world())]
    dist.all_gather(sizes, torch.tensor([text.numel()], device=where))
    most = int(max(size.item() for size in sizes))
    padded = torch.zeros(most, dtype=torch.uint8, device=where)
    padded[: text.numel()] = text
    every = [torch.empty_like(padded) for _ in range(world())]
    dist.all_gather(every, padded)
    texts = (bytes(found[: int(size)].tolist()) for found, size in zip(every, sizes, strict=True))
    return [json.loads(text) for text in texts]


def by_main(do: Callable[[], Any]) -> Any:
    """What ``do()`` returns on the main rank, a JSON-able value, on every rank; the others do not call it.

    Its error is raised there, and by the others one of the same sentence: a ValueError for a ValueError or OSError, a
    RuntimeError for others.
    """
    error: Exception | None = None
    found = None
    if is_main():
        try:
            found = json.loads(json.dumps(do()))
        except Exception as caught:
            error = caught
    plain = isinstance(error, ValueError | OSError)
    found, text, plain = gathered([found, None if error is None else str(error), plain])[0]
    if error is not None:
        raise error
    if text is not None:
        raise (ValueError if plain else RuntimeError)(text)
    return found


def barrier() -> None:
    """Waits until every rank is here."""
    if world() > 1:
        dist.barrier()
