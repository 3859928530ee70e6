"""Run unmodified CUDA host code: .cu files are built as one shared library against a fake CUDA runtime (runtime.py),
whose kernel launches are executed by the emulator in this process.

    h = ptxsim.host.Host(["noising.cu", "step.cu"], arch="sm_80", includes=["csrc"], flags=["-std=c++17"])
    x = h.register(torch.randn(1000), "x", readonly=True)      # data_ptr() is now a valid device address
    h.lib.my_extern_c_function(...)        # ctypes; every <<<>>> inside runs in the emulator
    h.check()                              # re-raises the first emulator error
    h.launches[-1]                         # Result of the last launch
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from . import nvcc
from .errors import LaunchError
from .kernel import Kernel, Result
from .memory.buffers import is_torch
from .module import Module, load
from .nvcc import cache_dir
from .runtime import HOSTS, MEM, OWNERS, cuda_include, runtime

__all__ = ["MEM", "Host", "cache_dir", "cuda_include", "runtime"]

Buffer = TypeVar("Buffer")


class Host:
    """One shared library of host launchers and the modules of the kernels they launch.

    sources   one path or several; .cu files give kernels, other files (.cpp) only host code
    src       CUDA source text, instead of or next to the files
    kernels   False: the launchers only; the caller puts modules into `h.modules`
    options   of every launch, see machine.Options; may be changed between calls in `h.options`
    """

    def __init__(
        self,
        sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] = (),
        arch: str = "sm_80",
        src: str | None = None,
        includes: Iterable[str] = (),
        defines: Iterable[str] | Mapping[str, Any] = (),
        flags: Iterable[str] = (),
        kernels: bool = True,
        **options: Any,
    ) -> None:
        rt = runtime()
        self._rt = rt
        self.cc = int("".join(c for c in arch if c.isdigit()))
        files = [os.fspath(sources)] if isinstance(sources, (str, os.PathLike)) else [os.fspath(s) for s in sources]
        if src is not None:
            digest = hashlib.sha256(src.encode()).hexdigest()[:12]
            files.append(os.path.join(cache_dir(), f"host_{digest}.cu"))
            nvcc.write_atomically(files[-1], src)
        if not files:
            raise LaunchError("Host: no source given")
        extra = nvcc.options(includes, defines, flags)
        self.options = options
        self.launches: list[Result] = []
        self.errors: list[Exception] = []
        self._kept: list[Any] = []
        self.modules: list[Module] = []
        key = hashlib.sha256(repr((rt.path, arch, extra)).encode())
        for f in files:
            ptx, content = nvcc.cached(f, arch, extra, kernels)
            key.update(content.encode())
            if ptx:
                self.modules.append(load(ptx, MEM))
        self.so = os.path.join(cache_dir(), f"hostlib_{key.hexdigest()[:16]}.so")
        with nvcc.locked(self.so):
            if not os.path.exists(self.so):
                self._build(files, arch, extra)
        # a library is loaded, and its kernels are registered, once per process however many hosts have it
        self._owner = OWNERS.setdefault(self.so, len(HOSTS))
        if self._owner == len(HOSTS):
            HOSTS.append(self)
        HOSTS[self._owner] = self
        rt.lib.ptxsim_set_owner(self._owner)
        # DEEPBIND: torch puts the real libcudart into the global scope; our runtime must win inside this library
        self._lib = ctypes.CDLL(self.so, mode=os.RTLD_LOCAL | os.RTLD_NOW | os.RTLD_DEEPBIND)

    def _build(self, files: list[str], arch: str, extra: list[str]) -> None:
        rt = self._rt
        part = f"{self.so}.{os.getpid()}.so"
        cmd = ["nvcc", f"-arch={arch}", "-shared", "-Xcompiler", "-fPIC", "-cudart", "none", *files, "-o", part]
        cmd += [rt.path, "-Xlinker", "-rpath," + os.path.dirname(rt.path), "-Xlinker", "-Bsymbolic", *extra]
        r = subprocess.run(cmd, capture_output=True, text=True)
        if r.returncode:
            raise LaunchError(f"nvcc failed ({' '.join(cmd)}):\n{r.stderr}")
        os.replace(part, self.so)

    # -------------------------------------------------------------- the library
    @property
    def lib(self) -> ctypes.CDLL:
        """The library; taking it also sends its launches here and gives the fake device this host's architecture."""
        HOSTS[self._owner] = self
        self._rt.lib.ptxsim_set_cc(self.cc)
        return self._lib

    @property
    def mod(self) -> Module:
        """The module of the only (or first) .cu file."""
        return self.modules[0]

    @property
    def ptx(self) -> str:
        return self.mod.text

    @property
    def kernels(self) -> dict[str, Kernel]:
        """Kernels of all files by mangled name."""
        return {n: k for m in reversed(self.modules) for n, k in m.kernels.items()}

    def find(self, name: str) -> Kernel | None:
        return next((m.kernels[name] for m in self.modules if name in m.kernels), None)

    def check(self) -> None:
        """Raise the first error of the launches since the last check; clears the runtime's last error too."""
        if self.errors:
            e = self.errors[0]
            self.errors.clear()
            self._rt.lib.ptxsim_clear_error()
            raise e

    # -------------------------------------------------------------- buffers of the caller
    def register(self, x: Buffer, name: str | None = None, readonly: bool = False, init: bool = True) -> Buffer:
        """Make a numpy array or CPU tensor device memory at its own address; returns it.

        `x.data_ptr()` (numpy: `x.ctypes.data`) inside a struct or as an argument is then a valid device pointer.
        readonly catches stores (to the whole allocation, so not for one of two views of it). init=False fills the
        elements with 0xFF bytes (NaN), reports kernels that read one before it was written, and lets `unwritten` count
        what is left.
        """
        if not init:
            _poison(x)
        MEM.register(x, name, readonly=readonly, init=init)
        self._kept.append(x)
        return x

    def unwritten(self, x: Any) -> int:
        """Bytes of a buffer registered with init=False that no kernel has written."""
        return MEM.unwritten(x)

    def release(self) -> None:
        """Forget the buffers registered here: their addresses are invalid again."""
        for x in self._kept:
            MEM.unregister(x)
        self._kept.clear()


def _poison(x: Any) -> None:
    """Fill the elements (not the gaps of a strided view) with 0xFF bytes."""
    if is_torch(x):
        import torch

        n = x.element_size()
        x.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[n]).fill_(255 if n == 1 else -1)
    else:
        x.view(f"u{x.itemsize}").fill((1 << 8 * x.itemsize) - 1)
