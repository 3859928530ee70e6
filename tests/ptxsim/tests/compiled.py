"""Compiles the test kernels, with a cache of the PTX keyed on the source text."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from typing import Any

import ptxsim
from ptxsim.nvcc import locked, write_atomically

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = os.path.join(ptxsim.host.cache_dir(), "tests")


def ptx_of(
    name: str | None = None,
    arch: str = "sm_80",
    src: str | None = None,
    defines: Iterable[str] = (),
    flags: Iterable[str] = (),
) -> str:
    """PTX of kernels/<name>.cu, or of the CUDA source text `src`."""
    if src is None:
        with open(os.path.join(HERE, "kernels", f"{name}.cu")) as f:
            src = f.read()
    h = hashlib.sha256(repr((src, arch, tuple(defines), tuple(flags))).encode()).hexdigest()[:20]
    os.makedirs(CACHE, exist_ok=True)
    p = os.path.join(CACHE, h + ".ptx")
    with locked(p):
        if not os.path.exists(p):
            write_atomically(p, ptxsim.compile(src=src, arch=arch, defines=defines, flags=("-std=c++17", *flags)))
    with open(p) as f:
        return f.read()


def mod_of(name: str | None = None, arch: str = "sm_80", **kw: Any) -> ptxsim.Module:
    return ptxsim.load(ptx_of(name, arch, **kw))
