"""A program: jobs of 2 and 4 processes on networks that FSDP2 has cut, beside one process with the whole network.

    python sharded_jobs.py FOLDER

Prints one line of JSON. Processes are forked, so that torch is imported once.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as _  # noqa: F401  (imported once, before there are children)
from torch.distributed.fsdp import FSDPModule

from diffkern import Diffusion, parallel, schedules
from diffkern.nn import DiT, DiTConfig
from diffkern.train import checkpoint
from diffkern.train.ema import Averages
from diffkern.train.sharded import shard
from helpers.diffusion_cases import small_unet
from helpers.training_cases import TINY

BATCH = 4
LABELS = torch.tensor([0, 1, 2, 0])


class State:
    """A diffusion, cut where there is a job, with averages and optimizer."""

    def __init__(self, network: Callable[[], torch.nn.Module] | None = None) -> None:
        made = dit() if network is None else network()
        self.diffusion = Diffusion(made, schedules.cosine(20), "v", shape=(1, 8, 8))
        if parallel.world() > 1:
            shard(self.diffusion.model)
        self.averages = Averages(self.diffusion, widths=(0.1,), decay=0.5)
        self.optimizer = torch.optim.AdamW(self.diffusion.parameters(), lr=1e-2, foreach=True)

    def parts(self) -> dict[str, Any]:
        return {"diffusion": self.diffusion, "averages": self.averages, "optimizer": self.optimizer}

    def loss(self, step: int) -> torch.Tensor:
        mine = parallel.share(BATCH)
        x0 = torch.rand(BATCH, 1, 8, 8, generator=torch.Generator().manual_seed(step)) * 2.0 - 1.0
        seeds = torch.arange(BATCH) + BATCH * step
        places = slice(mine.start, mine.stop)
        return self.diffusion.loss(x0[places], seeds=seeds[places], cond=LABELS[places])

    def steps(self, first: int, last: int) -> list[float]:
        """The mean losses of these steps over the whole batch."""
        return [self._step(step) for step in range(first, last + 1)]

    def _step(self, step: int) -> float:
        loss = self.loss(step)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.averages.update(step)
        return mean(loss)

    @torch.no_grad()
    def held_out(self) -> float:
        return mean(self.loss(1000))

    def sampled(self) -> list[float]:
        """The pixels of two images."""
        return self.diffusion.sample(2, "ddim", steps=2, seeds=0, cond=LABELS[:2]).flatten().tolist()


def mean(loss: torch.Tensor) -> float:
    (total,) = parallel.summed(loss.detach().double())
    return total.item() / parallel.world()


def job(world: int, run: Callable[..., Any], folder: Path, *args: str) -> Any:
    """What the first process returns; an error of any ends the program."""
    place = folder / f"{run.__name__}-{world}{'-'.join(args)}"
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                dist.init_process_group("gloo", init_method=f"file://{place}.store", rank=rank, world_size=world)
                found = run(folder, *args)
                if rank == 0:
                    place.with_suffix(".json").write_text(json.dumps(found))
                code = 0
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        raise SystemExit(f"{run.__name__} on {world} processes failed")
    return json.loads(place.with_suffix(".json").read_text())


def begins(folder: Path) -> dict[str, Any]:
    """Three steps, a validation with each average between them, checkpoints in both forms."""
    state = State()
    losses = state.steps(1, 2)
    own = state.held_out()
    with state.averages.used("plain"):
        averaged = state.held_out()
    again, images = state.held_out(), state.sampled()
    losses += state.steps(3, 3)
    checkpoint.save(folder / "whole", 3, **state.parts(), extra={"at": 3})
    checkpoint.save(folder / "parts", 3, **state.parts(), extra={"at": 3}, keep=1, sharded=True)
    pieces = sum(isinstance(module, FSDPModule) for module in state.diffusion.modules())
    found = {"losses": losses, "held_out": [own, averaged, again], "pieces": pieces, "images": images}
    return {**found, "full": is_full(folder, state), "unet": State(unet).steps(1, 1)}


def goes_on(folder: Path, name: str) -> dict[str, Any]:
    """From a checkpoint of another number of processes; saves in parts."""
    state = State()
    newest = checkpoint.newest(folder / name)
    assert newest is not None
    found = checkpoint.load(newest, **state.parts(), expect={"at": 3})
    losses = state.steps(4, 5)
    checkpoint.save(folder / name, 5, **state.parts(), sharded=True)
    return {"losses": losses, "world": found.world, "random": found.random}


def is_full(folder: Path, state: State) -> list[list[Any]]:
    """Every process is told of the disk of the second, and of the first's."""
    seen, flush = [], os.fsync

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for rank in (1, 0):
        os.fsync = full if parallel.rank() == rank else flush
        try:
            checkpoint.save(folder / "full", 1, **state.parts(), sharded=True)
        except OSError as error:
            seen.append([error.errno, str(error)])
        os.fsync = flush
    checkpoint.save(folder / "full", 2, **state.parts(), sharded=True)
    return parallel.gathered([*seen, sorted(os.listdir(folder / "full" / "checkpoints"))])


def dit() -> torch.nn.Module:
    """The transformer, whose modulations run before its blocks."""
    torch.manual_seed(0)
    made = DiT(DiTConfig(image_size=8, patch=4, in_channels=1, width=16, depth=1, heads=2, classes=3))
    torch.nn.init.normal_(made.leave.weight, std=0.1)
    for module in made.blocks:
        torch.nn.init.normal_(module.modulate.weight, std=0.1)
    return made


def unet() -> torch.nn.Module:
    """Its weights lie as channels_last, which FSDP2 does not take."""
    return small_unet(0, **TINY)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    alone = State()
    want = alone.steps(1, 2)
    own = alone.held_out()
    with alone.averages.used("plain"):
        averaged = alone.held_out()
    images = alone.sampled()
    want += alone.steps(3, 5)
    found = {
        "want": want,
        "want_held_out": [own, averaged, own],
        "want_images": images,
        "want_unet": State(unet).steps(1, 1),
        "two": job(2, begins, folder),
        "four": job(4, goes_on, folder, "parts"),
    }
    last = {}
    for name in ("whole", "parts"):
        path = checkpoint.newest(folder / name)
        assert path is not None
        state = State()
        last[name] = {"step": checkpoint.load(path, **state.parts()).step}
        opened = Diffusion.from_pretrained(folder / name, average="plain").state_dict()
        plain = state.averages.tensors("plain")
        last[name]["averages"] = max((t - opened[key]).abs().max().item() for key, t in plain.items())
        last[name]["losses"] = state.steps(last[name]["step"] + 1, 7)
        last[name]["files"] = sorted(file.name for file in path.iterdir())
    found["want"] += alone.steps(6, 7)
    print(json.dumps({**found, "last": last}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
