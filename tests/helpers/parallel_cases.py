"""What every process of a job finds in `diffkern.parallel`, and in what stands on it where its share is none.

python -m torch.distributed.run --nproc-per-node 2 parallel_cases.py FOLDER      prints JSON
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from diffkern import parallel
from diffkern.data import open_images
from diffkern.generate import generate, write_shards
from diffkern.train.validation import validate
from helpers.generate_cases import small_unet


def everywhere() -> dict[str, Any]:
    """The functions themselves."""
    me = parallel.rank()
    whole = torch.tensor([1.0, 2.0**60], dtype=torch.float64) * (me + 1)
    count = torch.tensor(5 * me)
    sums = parallel.summed(whole, count)
    with parallel.job(torch.device("cpu")):  # there is one already: it stays
        inside = parallel.world()
    try:
        parallel.by_main(lambda: (_ for _ in ()).throw(OSError(28, "No space left", "here")))
        error = None
    except (OSError, ValueError) as caught:
        error = [type(caught).__name__, str(caught)]
    try:
        parallel.by_main(lambda: {1, 2})
    except (TypeError, RuntimeError) as caught:
        error = [*(error or ()), type(caught).__name__, str(caught)]
    return {
        "world": [parallel.world(), inside, parallel.world()],
        "rank": me,
        "main": parallel.is_main(),
        "device": str(parallel.device()),
        "shares": [list(parallel.share(n)) for n in (0, 1, 5)],
        "in place": sums[0] is whole and sums[1] is count,
        "sums": [sums[0].tolist(), sums[1].item()],
        "by main": [parallel.by_main(lambda: {"rank": me}), error],
        "gathered": parallel.gathered({"who": me, "text": "ü" * 3 * me, "none": None}),
    }


def without_a_share(folder: Path) -> dict[str, Any]:
    """One micro-batch, one shard, one image kept apart for a job of several: what does a process without it do?"""
    diffusion = small_unet()
    parts = list(generate(diffusion, 3, "ddim", 2, micro_batch=4))
    files = write_shards(folder / "shards", diffusion, 3, "ddim", 2, micro_batch=4)
    pixels = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8)
    held_out = validate(diffusion, open_images(pixels))
    return {
        "parts": [len(part.images) for part in parts],
        "shards": [path.is_file() for path in files],
        "validation": list(held_out),
    }


def waited(seconds: float) -> float:
    """How long the main process waits for one that does not come."""
    begun = time.monotonic()
    with parallel.job(torch.device("cpu"), timeout=seconds):
        if not parallel.is_main():
            time.sleep(seconds + 4.0)
            return 0.0
        try:
            parallel.barrier()
        except RuntimeError:
            return time.monotonic() - begun
    raise AssertionError("nobody was missing")


if __name__ == "__main__":
    torch.set_num_threads(1)
    jobs = []
    for _ in range(3):
        with parallel.job(torch.device("cpu")):
            jobs += parallel.gathered(parallel.rank())
    with parallel.job(torch.device("cpu")):
        every = parallel.gathered({**everywhere(), **without_a_share(Path(sys.argv[1]))})
        main = parallel.is_main()
    missing = waited(1.0)
    if main:
        print(json.dumps({"ranks": every, "jobs": jobs, "waited": missing}))
