"""The fake CUDA runtime: shim/ptxsimrt.c, built once and loaded into this process, with its callbacks.

Libraries built by host.Host link against it.  Every kernel launch, allocation and symbol look-up of their host code
comes back here, with the number of the library it came from, and is served by the emulator.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np

from .aliases import Array
from .errors import LaunchError
from .kernel import smem_limit
from .memory import Memory
from .nvcc import cache_dir

if TYPE_CHECKING:
    from .host import Host
    from .kernel import Kernel

SHIM = os.path.join(os.path.dirname(os.path.abspath(__file__)), "shim", "ptxsimrt.c")
C_FLAGS = ["-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", "-Wl,-Bsymbolic"]
INVALID_CONFIGURATION, INVALID_DEVICE_FUNCTION, LAUNCH_FAILURE = 9, 98, 719  # cudaError_t

# owner, kernel, grid, block, arguments, dynamic shared bytes, cooperative -> cudaError_t
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_char_p,
    *[ctypes.c_uint] * 6,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_uint64,
    ctypes.c_int,
)
_MEM = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int)
_SYM = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint64))
_ATTR = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_int64))

MEM = Memory()  # cudaMalloc has no library to belong to: one device memory for the process
HOSTS: list[Host] = []  # by owner number: the host that launches of a library go to
OWNERS: dict[str, int] = {}  # path of a loaded library -> owner number
_live: dict[int, Array] = {}
_loaded: Runtime | None = None


class Runtime:
    """The loaded shim. `hooks` keeps the callbacks alive."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.lib = ctypes.CDLL(path, mode=os.RTLD_LOCAL | os.RTLD_NOW)
        self.hooks = (_LAUNCH(_on_launch), _MEM(_on_mem), _SYM(_on_sym), _ATTR(_on_attr))
        self.lib.ptxsim_set_hooks(*self.hooks)


def cuda_include() -> str:
    """The include folder of the toolkit that nvcc belongs to, as nvcc itself reports it."""
    cmd = ["nvcc", "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull]
    for line in subprocess.run(cmd, capture_output=True, text=True).stderr.splitlines():
        if line.startswith("#$ TOP="):
            for sub in ("include", "targets/x86_64-linux/include", "targets/sbsa-linux/include"):
                p = os.path.realpath(os.path.join(line[7:].strip(), sub))
                if os.path.exists(os.path.join(p, "cuda_runtime_api.h")):
                    return p
    raise LaunchError("CUDA headers not found")


def runtime() -> Runtime:
    """Build (once) and load the fake runtime; installs the hooks."""
    global _loaded
    if _loaded is None:
        with open(SHIM, "rb") as f:
            h = hashlib.sha256(f.read() + repr(C_FLAGS).encode()).hexdigest()[:12]
        so = os.path.join(cache_dir(), f"libptxsimrt_{h}.so")
        if not os.path.exists(so):
            part = f"{so}.{os.getpid()}"
            r = subprocess.run(
                ["gcc", *C_FLAGS, f"-I{cuda_include()}", "-o", part, SHIM], capture_output=True, text=True
            )
            if r.returncode:
                raise LaunchError(f"the fake runtime does not compile:\n{r.stderr}")
            os.replace(part, so)
        _loaded = Runtime(so)
    return _loaded


def _on_mem(p: int, n: int, alloc: int) -> None:
    if alloc:
        a: Array = np.ctypeslib.as_array((ctypes.c_uint8 * n).from_address(p))
        _live[p] = a
        MEM.register(a, f"cudaMalloc@{p:#x}")
    elif p in _live:
        MEM.unregister(_live.pop(p))


def _on_sym(owner: int, name: bytes, nb: Any) -> int | None:
    for mod in HOSTS[owner].modules:
        a = mod.gbuf.get(name.decode())
        if a is not None:
            nb[0] = a.nbytes
            return int(a.ctypes.data)
    return None


def _on_attr(owner: int, name: bytes, out: Any) -> int:
    k = HOSTS[owner].find(name.decode())
    if k is None:
        return INVALID_DEVICE_FUNCTION
    try:
        prog = k.program()
    except Exception as e:  # must not propagate through C
        HOSTS[owner].errors.append(e)
        return INVALID_DEVICE_FUNCTION
    bound = k.attrs.get("maxntid") or k.attrs.get("reqntid")
    out[0] = prog.static_bytes
    out[1] = prog.finfo[prog.kernel.name].frame
    out[2] = int(np.prod(bound)) if bound else 1024
    out[3] = smem_limit(k.module.target)
    return 0


def _on_launch(
    owner: int, name: bytes, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, args: Any, shared: int, coop: int
) -> int:
    h = HOSTS[owner]
    k = h.find(name.decode())
    if k is None:
        return INVALID_DEVICE_FUNCTION
    options = dict(h.options)
    if coop:
        options["cooperative"] = True
    try:
        block = _parameter_block(k, args)
        r = k.module.launch(k, (gx, gy, gz), (bx, by, bz), params=block, shared_bytes=int(shared), **options)
    except LaunchError as e:
        h.errors.append(e)
        return INVALID_CONFIGURATION
    except Exception as e:  # must not propagate through C
        h.errors.append(e)
        return LAUNCH_FAILURE
    h.launches.append(r)
    return 0


def _parameter_block(k: Kernel, args: Any) -> bytes:
    buf = bytearray(k.param_size)
    for i, p in enumerate(k.params):
        buf[p["offset"] : p["offset"] + p["size"]] = ctypes.string_at(args[i], p["size"])
    return bytes(buf)
