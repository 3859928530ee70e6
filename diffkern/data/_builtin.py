"""Images that other packages ship, for trying things without a download."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from diffkern.data._arrays import Arrays
from diffkern.extras import need

__all__ = ["BUILTIN"]


def digits() -> Arrays:
    """scikit-learn's handwritten digits: 1797 of 8 x 8, grey values of 0 .. 16 as v / 8 - 1, 10 classes."""
    raw = need("sklearn.datasets", "scikit-learn", "demo").load_digits()
    return Arrays((raw.images / 8.0 - 1.0).astype(np.float32), raw.target)


BUILTIN: dict[str, Callable[[], Arrays]] = {"digits": digits}
"""What `open_images` knows by name."""
