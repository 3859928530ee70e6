"""Many images from a `diffkern.Diffusion`: cut into micro-batches and shards, the same for any number of processes."""

from __future__ import annotations
