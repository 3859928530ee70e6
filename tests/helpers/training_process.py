"""A training run as a program of its own, for tests that start several processes or kill one: the tiny case.

    python -m torch.distributed.run --nproc-per-node 2 training_process.py '{"out": "run", "iterations": 6}'

``options`` is an object of fields of `TrainConfig` and of: out; die: [[rank, step], ...], where that process raises,
one for each time that torchrun starts it; pause: seconds after each step. The main process prints {"losses": [...],
"step": ...} as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


def main(options: dict[str, Any]) -> None:
    import torch

    from diffkern import parallel
    from diffkern.train import fit
    from helpers.tiny_run import TINY, tiny_data

    torch.set_num_threads(1)
    out, die, pause = options.pop("out", None), options.pop("die", []), options.pop("pause", 0.0)
    die = die[int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) :][:1]

    def after(step: int, loss: float) -> None:
        time.sleep(pause)
        if [parallel.rank(), step] in die:
            raise RuntimeError(f"process {parallel.rank()} was to end here")

    with parallel.job(torch.device("cpu")):
        config = dataclasses.replace(TINY, **options)
        fitted = fit(None, tiny_data(), config, out=out, progress=False, callback=after)
        if parallel.is_main():
            print(json.dumps({"losses": fitted.losses, "step": fitted.step}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
