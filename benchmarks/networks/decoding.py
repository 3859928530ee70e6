"""Decoding an image: our autoencoder against diffusers', with time and memory.

`python -m benchmarks.networks.decoding [--size 512] [--compile]` prints a table in Markdown. Weights are random, of the
shapes of SD's `AutoencoderKL`, the same for all. Times are of turns in one process. Memory is the largest resident set
of a process of its own above the one before the call (what oneDNN takes for itself counts), after a call of a small
image.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.alone import alone, reason
from benchmarks.networks.contenders import BASELINES, COMPILED, EAGER, LAST, OWN, OWN_FROZEN, errors, shared_copy
from benchmarks.networks.evaluation import FLOAT32_ERROR
from benchmarks.timing import interleave, ratio, wall_timer

__all__ = ["NAMES", "main", "measure", "memory", "ready", "table"]

NAMES = (EAGER, LAST, OWN, OWN_FROZEN)
SMALL = 64
"""Pixels of the image that is decoded first."""


def _config(channels: int) -> dict[str, Any]:
    return {
        "block_out_channels": tuple(channels * n for n in (1, 2, 4, 4)),
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
    }


def _peer(channels: int) -> Any:
    import diffusers

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.AutoencoderKL(**_config(channels)).eval().requires_grad_(False)


def _theirs(model: Any, z: Tensor) -> Tensor:
    found: Tensor = model.decode(z).sample
    return found


def ready(name: str, channels: int, peer: Any = None) -> tuple[Callable[[Tensor], Tensor], nn.Module]:
    """How the contender decodes latents of either memory format, and its model."""
    if name not in (*NAMES, COMPILED):
        raise ValueError(f"name must be one of {', '.join((*NAMES, COMPILED))}, got {name!r}")
    peer = _peer(channels) if peer is None else peer
    if name in (OWN, OWN_FROZEN):
        from diffkern.nn import Autoencoder, freeze
        from diffkern.nn.weights import autoencoder

        model = Autoencoder(autoencoder.config_from({"_class_name": "AutoencoderKL", **_config(channels)})).eval()
        autoencoder.load(model, peer.state_dict())
        if name == OWN_FROZEN:
            freeze(model)
        return model.decode, model
    if name == EAGER:
        return lambda z: _theirs(peer, z.contiguous()), peer
    last = shared_copy(peer).to(memory_format=torch.channels_last)
    if name == COMPILED:
        from torch._inductor import config

        config.freezing = True
        last.decoder.compile(dynamic=False)
    return lambda z: _theirs(last, z.contiguous(memory_format=torch.channels_last)), last


def _latents(size: int) -> Tensor:
    return torch.randn(1, 4, size // 8, size // 8, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def measure(size: int, channels: int, threads: int, seconds: float, names: Sequence[str]) -> list[dict[str, Any]]:
    """Error against diffusers, time, and how many times as fast as each peer, of every contender."""
    torch.set_num_threads(threads)
    peer, z, rows, calls = _peer(channels), _latents(size), [], {}
    want = _theirs(peer, z)
    for name in names:
        row: dict[str, Any] = {"name": name}
        try:
            run, _ = ready(name, channels, peer)
            row["error"] = errors(run(z), want)[0]
            if name not in BASELINES and row["error"] > FLOAT32_ERROR:
                row["why"] = f"wrong: off by {row['error']:.1e}, {FLOAT32_ERROR:.0e} allowed"
            else:
                calls[name] = lambda run=run: run(z)
        except Exception as error:  # the others still run; its row says why
            row["why"] = reason(error)
        rows.append(row)
    found = interleave(calls, wall_timer(), sample_seconds=0.0, budget_seconds=seconds, rounds=200, least_rounds=3)
    eager = min((n for n in BASELINES if n in calls), key=lambda n: found.stats(n).median, default="")
    for row in rows:
        if row["name"] in calls:
            row["time"] = found.stats(row["name"]).median
            for word, base in (("eager", eager), ("compiled", COMPILED)):
                if base in calls and base != row["name"]:
                    row[word] = ratio(found, base, row["name"]).median
    return rows


@torch.no_grad()
def memory(name: str, size: int, channels: int, threads: int) -> int:
    """Bytes above those before the call that the process had at once; of Linux alone."""
    torch.set_num_threads(threads)
    run, _ = ready(name, channels)
    run(_latents(size if name == COMPILED else SMALL))  # compiled for one size
    z = _latents(size)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _status("VmRSS")
    run(z)
    return _status("VmHWM") - before


def _status(word: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{word}:"))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    least = min((row["memory"] for row in rows if row["name"] in BASELINES and "memory" in row), default=None)
    lines = [
        "| by | error | time | of the faster eager | of compiled | memory | of the leaner eager |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = [f"{row[word]:.2f}x" if word in row else "" for word in ("eager", "compiled")]
        took = row.get("memory")
        cells = [
            row["name"],
            f"{row['error']:.1e}" if "error" in row else "",
            row.get("why") or f"{row['time']:.3g} s",
            *times,
            "" if took is None else f"{took / 2**20:.0f} MiB",
            f"{took / least:.2f}" if took is not None and least else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> int:
    """Exit status: 1 where an output was wrong or a contender failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks.decoding", description=__doc__)
    parser.add_argument(
        "--size", type=int, default=512, help="pixels of a side, a multiple of 8 (default: %(default)s)"
    )
    parser.add_argument("--channels", type=int, default=128, help="of the first level (default: %(default)s, SD's)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all turns (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=0, help="torch's threads (default: every core it may use)")
    parser.add_argument("--compile", action="store_true", help="also torch.compile of channels_last, frozen")
    arguments = parser.parse_args(words)
    names = [*NAMES, *([COMPILED] if arguments.compile else [])]
    threads = arguments.threads or len(os.sched_getaffinity(0))
    size, channels = arguments.size, arguments.channels
    rows = alone(measure, size, channels, threads, arguments.seconds, names)
    for row in rows:
        try:
            row["memory"] = alone(memory, row["name"], size, channels, threads)
        except Exception as error:  # a system that does not say it
            print(f"{row['name']}: no memory, {reason(error)}", file=sys.stderr)
    print(table(rows))
    return 1 if any("why" in row for row in rows) else 0


if __name__ == "__main__":  # not in the processes that it starts
    sys.exit(main())
