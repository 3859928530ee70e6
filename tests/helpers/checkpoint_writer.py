"""A program: writers of checkpoints killed (SIGKILL) at random moments; after each the run's folder is looked at.

    python checkpoint_writer.py RUN KILLS SEED

Prints a line of JSON a kill: what was said to be saved last, what is there, and what was left unfinished. Raises if the
newest checkpoint is not whole or not of one step. Writers are forked, so that torch is imported once.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from torch import nn

from diffkern import Diffusion, schedules
from diffkern.train import checkpoint
from diffkern.train.ema import Averages


class Small(nn.Module):
    """Some tensors of one value."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.tensors = nn.ParameterList([nn.Parameter(torch.full((64, 64), value)) for _ in range(4)])


def made(value: float) -> tuple[Diffusion, Averages, torch.optim.Optimizer]:
    diffusion = Diffusion(Small(value), schedules.cosine(20), "eps")
    return diffusion, Averages(diffusion, widths=(0.1,)), torch.optim.SGD(diffusion.parameters(), lr=0.5, momentum=0.5)


def write(run: Path, first: int, last: int, pipe: int) -> None:
    """Steps from ``first`` on, each in a checkpoint of weights, averages and momentum of its number."""
    diffusion, averages, optimizer = made(0.0)
    os.write(pipe, b"0\n")
    for step in range(first, last + 1):
        with torch.no_grad():
            for parameter in diffusion.parameters():
                parameter.fill_(float(step))
                optimizer.state[parameter]["momentum_buffer"] = torch.full_like(parameter, float(step))
        averages = Averages(diffusion, widths=(0.1,))
        checkpoint.save(
            run,
            step,
            diffusion=diffusion,
            averages=averages,
            optimizer=optimizer,
            extra={"at": step},
            keep=2,
            keep_every=5,
        )
        os.write(pipe, f"{step}\n".encode())


def look(run: Path) -> int:
    """The newest step, 0 where there is none; AssertionError where a checkpoint is not that of its number."""
    for path in sorted((run / "checkpoints").glob("[0-9]*")):
        step = int(path.name)
        diffusion, averages, optimizer = made(-1.0)
        found = checkpoint.load(path, diffusion=diffusion, averages=averages, optimizer=optimizer, expect={"at": step})
        moments = [state["momentum_buffer"] for state in optimizer.state.values()]
        every = [*diffusion.parameters(), *averages.tensors("0.100").values(), *moments]
        assert found.step == step
        assert len(every) == 12
        assert all(bool((tensor == step).all()) for tensor in every), path
    return max(checkpoint.steps(run), default=0)


def main(run: Path, kills: int, seed: int) -> None:
    draw = random.Random(seed)
    torch.set_num_threads(1)
    write(run / "imports", 1, 1, os.open(os.devnull, os.O_WRONLY))  # what writers import, before there are any
    look(run / "imports")
    newest = look(run)
    for _ in range(kills):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                write(run, newest + 1, newest + 10_000, writer)
            finally:
                os._exit(1)
        os.close(writer)
        with os.fdopen(reader) as lines:
            lines.readline()
            time.sleep(draw.uniform(0.0, 0.12))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            said = [newest, *map(int, lines.read().split())][-1]
        left = len(list((run / "checkpoints").glob(".*.part"))) if (run / "checkpoints").is_dir() else 0
        newest = look(run)
        print(
            json.dumps({"said": said, "newest": newest, "kept": len(checkpoint.steps(run)), "left": left}), flush=True
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
