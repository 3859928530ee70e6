"""Images for training and evaluation, whatever they are kept in, and the order in which a run sees them.

    images = open_images("photos/", size=64, flip=True)
    training, validation = split(images, 0.1)
    stream = Stream(len(training), seed=0)
    for batches in loader(training, stream, batch=128, micro_batch=32, seed=0, workers=2):
        ...

`Images` are a number, a shape, labels and a batch by index; `Stream` is their order in a run, and `example_seeds` what
makes each example's time, noise and flip: functions of a position, so that a run is the same for any number of
processes, workers and micro-batches, and resumes anywhere.
"""

from __future__ import annotations

from diffkern.data.images import Images, Retold, Subset, retold, split
from diffkern.data.loading import Batch, loader
from diffkern.data.opening import open_images
from diffkern.data.stream import Stream, example_seeds

__all__ = [
    "Batch",
    "Images",
    "Retold",
    "Stream",
    "Subset",
    "example_seeds",
    "loader",
    "open_images",
    "retold",
    "split",
]
