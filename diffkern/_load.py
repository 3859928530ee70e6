"""Loads the native modules, and knows why the CUDA one is not usable.

`_C` (CPU) must be there. `_cuda` is present or absent: it is loaded when it is there and this torch is a CUDA build.
Where it is not, the first op called on a CUDA tensor raises the sentence that `cuda_status` gives.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import torch

__all__ = ["CudaStatus", "build_info", "cuda_status"]

REBUILD = "put nvcc on PATH and reinstall with DIFFKERN_CUDA=on pip install --no-build-isolation ."


class CudaStatus(NamedTuple):
    """Whether the ops run on CUDA tensors here, and one sentence: with what, or why not and what to do."""

    ready: bool
    text: str


def _load_cpu() -> ModuleType:
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < (2, 10):
        raise ImportError(f"diffkern needs torch >= 2.10, found torch {torch.__version__}: pip install 'torch>=2.10'")
    try:
        return importlib.import_module("diffkern._C")
    except ModuleNotFoundError as error:
        raise ImportError(
            "diffkern's native module _C was not built for this Python: run `make build` or "
            "`pip install --no-build-isolation .` in the source folder"
        ) from error
    except ImportError as error:
        raise ImportError(
            f"diffkern's native module _C cannot be loaded with torch {torch.__version__} ({error}): "
            "reinstall with pip install --no-build-isolation ."
        ) from error


def _load_cuda() -> tuple[ModuleType | None, str]:
    """The module, or None and the reason."""
    if torch.version.cuda is None:
        return None, (
            f"diffkern's CUDA ops are off because torch {torch.__version__} is a build without CUDA: "
            "install a CUDA build of torch"
        )
    try:
        return importlib.import_module("diffkern._cuda"), ""
    except ModuleNotFoundError:
        return None, f"diffkern was built without its CUDA module (no nvcc, or DIFFKERN_CUDA=off): {REBUILD}"
    except ImportError as error:
        return None, f"diffkern's CUDA module cannot be loaded with torch {torch.__version__} ({error}): {REBUILD}"


def _explain_on_cuda(reason: str) -> torch.library.Library:
    """Ops called on CUDA tensors raise the reason, instead of the dispatcher's list of every backend it knows."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise RuntimeError(reason)

    library = torch.library.Library("diffkern", "IMPL")
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("diffkern::") and not torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA"):
            library.impl(name.removeprefix("diffkern::"), refuse, "CUDA")
    return library


_cpu = _load_cpu()
_cuda, _cuda_missing = _load_cuda()
_explained = _explain_on_cuda(_cuda_missing) if _cuda is None and torch.version.cuda is not None else None


def build_info() -> dict[str, Any]:
    """What the native modules say of their build: version, compiler, build type, ISA; CUDA version, architectures."""
    return {**_cpu.build_info(), **(_cuda.build_info() if _cuda is not None else {})}


def layout() -> dict[str, Any]:
    """What the native ops expect: columns of the tables by op, the order of sums, dtypes, instruction sets."""
    return dict(_cpu.layout())


def attention_gemm_rate(dtype: str, seconds: float) -> float:
    """GFLOP/s of one thread of the matrix products that attention on the CPU is made of: what its speed is held to."""
    return float(_cpu.attention_gemm_rate(dtype, seconds))


def architecture_serves(archs: str, capability: tuple[int, int]) -> bool:
    """Whether code for `archs` ("80 90+PTX") runs on a GPU of that compute capability.

    Machine code of X.Y runs on X.Z with Z >= Y; PTX of X.Y is compiled by the driver for anything from X.Y on; names
    that end in a or f run on exactly that one.
    """
    device = capability[0] * 10 + capability[1]
    for arch in archs.split():
        match = re.fullmatch(r"(\d+)([af]?)(\+PTX)?", arch)
        if match is None:
            continue
        number = int(match[1])
        if number == device or (not match[2] and number < device and (match[3] or number // 10 == device // 10)):
            return True
    return False


def driver_version() -> int:
    """The CUDA version that the NVIDIA driver serves, as 13000 for 13.0; 0 without a driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int(0)
    return version.value if library.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def driver_serves(cuda: str, driver: int) -> bool:
    """Whether a driver that reports `driver` (13000 for CUDA 13.0) runs what nvcc `cuda` ("13.0.88") built.

    Within one major version every driver runs machine code of any minor version.
    """
    return driver // 1000 >= int(cuda.split(".")[0])


def cuda_status() -> CudaStatus:
    """Whether the ops run on CUDA tensors here; if not, why, and what to do."""
    if _cuda is None:
        return CudaStatus(False, _cuda_missing)
    info = _cuda.build_info()
    cuda, archs = str(info["cuda_version"]), str(info["cuda_archs"])
    driver = driver_version()
    if driver == 0:
        return CudaStatus(False, "no NVIDIA driver was found: CUDA ops need a GPU and its driver")
    if not driver_serves(cuda, driver):
        return CudaStatus(
            False,
            f"the NVIDIA driver serves CUDA {driver // 1000}.{driver % 1000 // 10} and diffkern was built with "
            f"{cuda}: update the driver, or rebuild with an older nvcc",
        )
    if not torch.cuda.is_available():
        return CudaStatus(False, "torch sees no CUDA GPU: check nvidia-smi and CUDA_VISIBLE_DEVICES")
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not architecture_serves(archs, capability):
            number = f"{capability[0]}.{capability[1]}"
            return CudaStatus(
                False,
                f"diffkern was built for the architectures {archs}, and GPU {index} "
                f"({torch.cuda.get_device_name(index)}) is {number}: "
                f"reinstall with TORCH_CUDA_ARCH_LIST={number} pip install --no-build-isolation .",
            )
    return CudaStatus(True, f"nvcc {cuda}, architectures {archs}")
