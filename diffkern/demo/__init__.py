"""The demo: a small class-conditional diffusion model of handwritten digits, trained and sampled with the fused ops.

`data` the digits · `train` the training loop · `recipe` what it trains · `generate` images of a plan · `evaluate` the
classifier and the Frechet distance · `pictures` the PNGs · `run` the whole job; its command: `diffkern.command.demo`.

What it needs beyond torch (scikit-learn, matplotlib, Pillow, safetensors, tqdm) is the extra ``diffkern[demo]``,
imported where it is used.
"""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtra(ImportError):
    """A package of the extra ``diffkern[demo]`` is not installed."""


def need(module: str, package: str) -> Any:
    """The imported module, or one sentence that says how to get the package it comes from."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(
            f"this needs {package}, which cannot be imported ({error}): pip install 'diffkern[demo]'"
        ) from error


__all__ = ["MissingExtra", "need"]
