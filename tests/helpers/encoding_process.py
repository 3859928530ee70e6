"""Encodes images as a process of a job: python -m torch.distributed.run ... encoding_process.py '{"cache": ...}'.

Prints, on the main process, what every process encoded and found as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from diffkern import parallel
from diffkern.data import open_images
from diffkern.data.latents import encoded


class Encode:
    """Means of 2 x 2 with deviations of a tenth of them; counts its images."""

    def __init__(self, pause: float = 0.0, fails: bool = False) -> None:
        self.seen, self.pause, self.fails = 0, pause, fails

    def __call__(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        time.sleep(self.pause)
        if self.fails and self.seen:
            raise RuntimeError("no more")
        self.seen += len(x0)
        mean = torch.nn.functional.avg_pool2d(x0, 2)
        return mean, 0.1 * mean.abs()


def pixels(n: int = 11) -> Tensor:
    """uint8 [n, 1, 4, 4]."""
    return (torch.arange(n * 16).reshape(n, 1, 4, 4) * 37 % 256).to(torch.uint8)


def main(options: dict[str, Any]) -> None:
    with parallel.job(torch.device("cpu")):
        me = parallel.rank()
        cache = Path(options["cache"]) / str(me) if options.get("own") else options["cache"]
        encode = Encode(options.get("pause", 0.0), bool(options.get("fails")) and me == 1)
        try:
            images = encoded(open_images(pixels(), flip=True), encode, "a", cache=cache, batch=2)
            found = [encode.seen, float(torch.from_numpy(images.mean).double().sum()), None]
        except RuntimeError as error:
            found = [encode.seen, 0.0, str(error)]
        every = parallel.gathered(found)
        if parallel.is_main():
            print(json.dumps(every))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
