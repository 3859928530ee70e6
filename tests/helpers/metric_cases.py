"""Images whose features are known: what the tests of metrics measure, alone and as a process of a job.

python metric_cases.py FILE WORLD RANK            one rank; FILE is where the ranks meet; writes JSON to FILE-RANK.json
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from diffkern import parallel
from diffkern.metrics import Features, Statistics, evaluate, quantised, reference_statistics


class Corners:
    """An extractor: the image's first pixels, on the 256 levels of a file; two of them as logits, all as a map."""

    name, dims, device = "corners@0", 3, torch.device("cpu")

    def __call__(self, images: Tensor) -> Features:
        x = quantised(images).flatten(1).float() / 255.0
        return Features(x[:, :3], x[:, :4], 5.0 * x[:, :2])


class Drawn:
    """Random images [n, 1, 4, 4] of two classes, by a seed; brighter by ``shift``."""

    classes = ("dark", "bright")
    shape = (1, 4, 4)

    def __init__(self, n: int, seed: int = 0, shift: float = 0.0) -> None:
        random = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(n) % 2
        self.images = torch.rand(n, 1, 4, 4, generator=random) - 1.0 + shift + self.labels[:, None, None, None]
        self.fingerprint = f"drawn {n} {seed} {shift}"

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


def measured(folder: Path | None = None) -> dict[str, Any]:
    """What every rank of a job sees: of shares, of batches of its own, and with a rank that has none."""
    fake, real = Drawn(31, seed=1, shift=-0.1), Drawn(37)
    mine = parallel.share(len(fake))
    batches = fake.batch(torch.arange(mine.start, mine.stop))
    every = iter([(fake.images, fake.labels)] if parallel.is_main() else [])
    path = None if folder is None else folder / "reference.safetensors"
    whole = reference_statistics(real, Corners(), path, batch=5)
    again = reference_statistics(real, Corners(), path)
    one = Statistics("corners@0", keep=True)
    if parallel.is_main():
        one.update(Corners()(fake.images), fake.labels)
    alone = one.over_ranks()
    return {
        "scores": evaluate(fake, real, Corners(), batch=7).to_json(),
        "own batches": evaluate(iter([batches]), whole, Corners()).to_json(),
        "one rank's batches": evaluate(every, whole, Corners()).to_json(),
        "again": torch.equal(again.moments()[1], whole.moments()[1]),
        "order": torch.equal(whole.features, Corners()(real.images).pooled),
        "labels": torch.equal(whole.labels, real.labels),
        "one rank's": [alone.count, alone.features.sum().item(), alone.labels.sum().item()],
    }


if __name__ == "__main__":
    import json

    meeting, world, rank = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", world_size=world, rank=rank)
    found = measured(Path(meeting).parent)
    Path(f"{meeting}-{rank}.json").write_text(json.dumps(found))  # libraries print too
    torch.distributed.destroy_process_group()
