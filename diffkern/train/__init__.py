"""Training a `diffkern.Diffusion`: configuration, loop, averages, checkpoints, on one machine or many."""

from __future__ import annotations
