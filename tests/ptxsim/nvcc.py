"""CUDA source -> PTX text, with nvcc."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .errors import LaunchError


def options(
    includes: Iterable[str] = (), defines: Iterable[str] | Mapping[str, Any] = (), flags: Iterable[str] = ()
) -> list[str]:
    """Include folders, macros (a list of NAME or NAME=value, or a dict) and further flags as nvcc takes them."""
    if isinstance(defines, Mapping):
        defines = [f"{a}={b}" if b is not None else a for a, b in defines.items()]
    return [*(f"-I{i}" for i in includes), *(f"-D{d}" for d in defines), *flags]


def compile(
    cu_path: str | None = None,
    arch: str = "sm_80",
    includes: Iterable[str] = (),
    defines: Iterable[str] | Mapping[str, Any] = (),
    src: str | None = None,
    flags: Iterable[str] = (),
    keep: str | None = None,
    lineinfo: bool = True,
    nvcc: str = "nvcc",
) -> str:
    """nvcc -ptx; cu_path is a file, or pass src= with CUDA source text. Returns the PTX text."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("PTXSIM_TMP")) as td:
        if src is not None:
            cu_path = os.path.join(td, "src.cu")
            with open(cu_path, "w") as f:
                f.write(src)
        out = keep or os.path.join(td, "out.ptx")
        if cu_path is None:
            raise LaunchError("compile: give a .cu file or src=")
        cmd = [nvcc, f"-arch={arch}", "-ptx", cu_path, "-o", out]
        if lineinfo:
            cmd.append("-lineinfo")
        cmd += options(includes, defines, flags)
        r = subprocess.run(cmd, capture_output=True, text=True)
        if r.returncode:
            raise LaunchError(f"nvcc failed ({' '.join(cmd)}):\n{r.stderr}")
        with open(out) as f:
            return f.read()


def cache_dir() -> str:
    """PTXSIM_CACHE, else the folder ptxsim of the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", os.path.expanduser("~/.cache"))
    d = os.environ.get("PTXSIM_CACHE") or os.path.join(base, "ptxsim")
    os.makedirs(d, exist_ok=True)
    return d


def write_atomically(path: str, text: str) -> None:
    part = f"{path}.{os.getpid()}"
    with open(part, "w") as f:
        f.write(text)
    os.replace(part, path)


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """One process at a time makes a file of the cache; the others wait and find it."""
    with open(f"{path}.lock", "w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def _digest(path: str) -> str:
    with open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def cached(path: str, arch: str, extra: list[str], ptx: bool = True) -> tuple[str, str]:
    """(PTX, digest of every file that went into it) of a .cu file, compiled only when one of those files changed.

    Any other file (.cpp), or any with ptx=False, gives no PTX, only the digest.
    """
    path = os.path.abspath(path)
    ptx = ptx and path.endswith(".cu")
    cmd = ["nvcc", f"-arch={arch}", *extra]
    key = hashlib.sha256(repr((path, os.getcwd(), cmd, _version(), ptx)).encode()).hexdigest()[:20]
    entry = os.path.join(cache_dir(), f"ptx_{key}.json")
    with locked(entry):
        return _fresh(entry) or _make(entry, path, cmd, ptx)


@functools.cache
def _version() -> str:
    return subprocess.run(["nvcc", "--version"], capture_output=True, text=True).stdout


def _fresh(entry: str) -> tuple[str, str] | None:
    if not os.path.exists(entry):
        return None
    with open(entry) as f:
        d = json.load(f)
    same = all(os.path.exists(p) and _digest(p) == h for p, h in d["files"].items())
    return (d["ptx"], d["digest"]) if same else None


def _make(entry: str, path: str, cmd: list[str], ptx: bool) -> tuple[str, str]:
    text = ""
    with tempfile.TemporaryDirectory(dir=os.environ.get("PTXSIM_TMP")) as td:
        dep, out = os.path.join(td, "dep"), os.path.join(td, "out.ptx")
        make = ["-ptx", "-lineinfo", "-o", out, "-MD"] if ptx else ["-M"]
        r = subprocess.run([*cmd, path, *make, "-MF", dep], capture_output=True, text=True)
        if r.returncode:
            raise LaunchError(f"nvcc failed ({' '.join([*cmd, path])}):\n{r.stderr}")
        with open(dep) as f:
            names = f.read().partition(":")[2].replace("\\\n", " ").split()
        if ptx:
            with open(out) as f:
                text = f.read()
    files = {p: _digest(p) for p in sorted({path, *(n for n in names if os.path.isfile(n))})}
    digest = hashlib.sha256(repr((sorted(files.items()), _version())).encode()).hexdigest()
    write_atomically(entry, json.dumps({"files": files, "digest": digest, "ptx": text}))
    return text, digest
