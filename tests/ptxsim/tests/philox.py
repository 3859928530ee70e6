"""Philox 4x32-10 in numpy, for kernels that draw."""

from __future__ import annotations

from typing import Any

import numpy as np


def philox_ref(c: Any, k: Any) -> Any:
    c = [np.asarray(v, np.uint64) for v in c]
    k = [np.uint64(v) for v in k]
    M = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k[0], p1 & M, (p0 >> np.uint64(32)) ^ c[3] ^ k[1], p0 & M]
        k = [(k[0] + np.uint64(0x9E3779B9)) & M, (k[1] + np.uint64(0xBB67AE85)) & M]
    return np.stack(c, -1).astype(np.uint32)
