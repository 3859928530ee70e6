"""Runs one call of an op through the CUDA launchers (in the PTX emulator) and through the CPU kernels.

A `Call` names the op, its operands as torch CPU tensors and its outputs by dtype. `Device.run` and `Cpu.run` allocate
the outputs, poison them, run the kernels and give the outputs back; `Device.run` also checks what the emulator can
see: inputs unchanged, every output element written, no race, no access outside of a tensor, no warning.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from helpers import build_description
from helpers.core_headers import enumerators
from helpers.native_layout import CODES, MAX_DIMS, SUM_BLOCK
from torch import Tensor

from diffkern.plan import COLUMNS

HERE = Path(__file__).resolve().parent
# tools/mutants.py puts changed copies of core and cuda here; the CPU kernels always come from the tree.
CUDA_CSRC = Path(os.environ.get("DIFFKERN_PTX_CSRC", build_description.CSRC))

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_LAYOUT = enumerators("Layout")
LAYOUTS = {
    "contiguous": _LAYOUT["contiguous"],
    "misaligned": _LAYOUT["contiguous"],
    "padded": _LAYOUT["contiguous"],
    "channels_last": _LAYOUT["channels_last"],
    "channels_last_misaligned": _LAYOUT["channels_last"],
    "strided": _LAYOUT["strided"],
}

# Views of the arguments in core, in the order of flat.h.
VIEWS = {
    "randn": ("out",),
    "noise_sum": ("out",),
    "noising": ("x0", "noise", "out", "target", "eps"),
    "loss": ("pred", "x0", "noise", "grad"),
    "variational": ("pred", "w", "x0", "noise", "grad", "grad_w"),
    "step_logprob": ("after", "x", "u", "c", "v", "h0", "h1", "h2", "h3", "grad_u", "grad_c", "grad_v"),
    "quantile": ("x", "out"),
    "moments": ("x",),
    "step": ("x", "u", "c", "h0", "h1", "h2", "h3", "noise", "mask", "known", "out", "x0", "s", "next", "next2"),
    "learned_step": ("x", "m", "v", "noise", "mask", "known", "out", "x0", "next", "next2"),
}


# ------------------------------------------------------------------------------------------------------ tensors
def empty(layout: str, batch: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """[batch, *shape] in memory as `layout` says; channels_last wants shape (C, inner...)."""
    count = 1
    for n in shape:
        count *= n
    if layout == "contiguous":
        return torch.empty(batch, *shape, dtype=dtype)
    if layout == "misaligned":  # one element past an aligned address
        return torch.empty(batch * count + 1, dtype=dtype)[1:].view(batch, *shape)
    if layout == "padded":  # a gap between samples that keeps them aligned
        stride = (count + 15) // 16 * 16 + 16
        return torch.empty(batch, stride, dtype=dtype)[:, :count].view(batch, *shape)
    if layout.startswith("channels_last"):
        channels, inner = shape[0], shape[1:]
        if layout == "channels_last":
            flat = torch.empty(batch, *inner, channels, dtype=dtype)
        else:
            flat = torch.empty(batch * count + 1, dtype=dtype)[1:].view(batch, *inner, channels)
        return flat.movedim(-1, 1)
    assert layout == "strided"  # dimensions reversed in memory, every second element of the last
    sizes = [batch, *reversed(shape[1:]), 2 * shape[0] + 1]
    memory = torch.empty(sizes, dtype=dtype)[..., 1 : 2 * shape[0] + 1 : 2]
    return memory.permute(0, *range(len(shape), 0, -1))


def place(values: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout."""
    out = empty(layout, values.shape[0], values.shape[1:], values.dtype)
    out.copy_(values)
    return out


def bits(a: Tensor) -> Tensor:
    return a.clone(memory_format=torch.contiguous_format).view(
        {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[a.element_size()]
    )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, where every NaN equals every NaN (a GPU's NaNs have other payloads than a CPU's)."""
    return first_difference(a, b) is None


def first_difference(a: Tensor, b: Tensor) -> str | None:
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    wrong = (bits(a) != bits(b)) & ~(a.isnan() & b.isnan())
    if not wrong.any():
        return None
    at = tuple(int(i) for i in wrong.nonzero()[0])
    return f"{int(wrong.sum())} of {a.numel()} differ, first at {at}: {a[at].item()!r} and {b[at].item()!r}"


# --------------------------------------------------------------------------------------------------------- calls
@dataclass
class Call:
    """One call of an op. `outputs`: name -> dtype; `in_place`: output name -> input name whose tensor it overwrites."""

    op: str
    layout: str
    batch: int
    shape: tuple[int, ...]
    inputs: dict[str, Tensor]
    outputs: dict[str, torch.dtype]
    table: Tensor | None = None
    index: Tensor | None = None
    first: int = 0
    every: int = 0  # row first + b every of sample b, without an index
    row: Sequence[float] | None = None  # by value
    seeds: Tensor | None = None
    stream: int = 0
    terms: tuple[Sequence[int], Sequence[float]] | None = None  # streams and weights of noise_sum
    reduction: int = 0
    state: torch.dtype = torch.float32
    in_place: dict[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        n = 1
        for size in self.shape:
            n *= size
        return n


def _words(call: Call, view: Tensor | None) -> list[int]:
    if view is None:
        return [0] * (3 + MAX_DIMS)
    strides = list(view.stride()[1:]) if LAYOUTS[call.layout] == 2 else []
    return [view.data_ptr(), CODES[view.dtype], view.stride(0), *strides, *[0] * (MAX_DIMS - len(strides))]


def _ints(values: Sequence[int]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _prepare(call: Call) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(outputs to compare, views by name)."""
    results: dict[str, Tensor] = {}
    views: dict[str, Tensor] = dict(call.inputs)
    for name, dtype in call.outputs.items():
        if name in call.in_place:
            source = views[call.in_place[name]]
            made = empty(call.layout, call.batch, call.shape, dtype)
            made.copy_(source)
            views[call.in_place[name]] = made
        elif name == "next2":  # the second half of a doubled batch
            both = empty(call.layout, 2 * call.batch, call.shape, dtype)
            results["next"] = both
            views["next"], views["next2"] = both[: call.batch], both[call.batch :]
            continue
        elif name == "next" and "next2" in call.outputs:
            continue
        else:
            made = empty(call.layout, call.batch, call.shape, dtype)
        results[name] = views[name] = made
    if call.op in ("loss", "variational"):
        sums = torch.float64 if call.state == torch.float64 else torch.float32
        blocks = (call.count + SUM_BLOCK - 1) // SUM_BLOCK
        results["partials"] = torch.empty(call.batch, blocks * (2 if call.op == "variational" else 1), dtype=sums)
        results["value"] = torch.empty(call.batch if call.reduction == 0 else 1, dtype=sums)
        results["samples"] = torch.empty(call.batch if call.reduction else 0, dtype=sums)
    if call.op == "step_logprob":
        sums = torch.float64 if call.state == torch.float64 else torch.float32
        results["partials"] = torch.empty(call.batch, (call.count + SUM_BLOCK - 1) // SUM_BLOCK, dtype=sums)
        results["value"] = torch.empty(call.batch, dtype=sums)
    if call.op == "variational":
        results["means"] = torch.empty(call.batch, 2, dtype=results["value"].dtype)
    if call.op in ("quantile", "moments"):
        sums = torch.float64 if call.state == torch.float64 else torch.float32
        results["value"] = torch.empty(call.batch, 2 if call.op == "moments" else 1, dtype=sums)
    return results, views


def _workspace(lib: ctypes.CDLL, call: Call) -> Tensor:
    """Memory that the binding layer would give to the kernels: they write it before they read it."""
    words = 0
    if call.op == "quantile":
        lib.dk_quantile_workspace.restype = ctypes.c_int64
        size = lib.dk_quantile_workspace(ctypes.c_int64(call.batch), ctypes.c_int64(call.count))
        words = (size + 7) // 8
    elif call.op == "moments":  # float64 words hold the partial sums of either dtype
        words = call.batch * ((call.count + SUM_BLOCK - 1) // SUM_BLOCK)
    return torch.empty(words, dtype=torch.float64)


def _invoke(lib: ctypes.CDLL, call: Call, results: dict[str, Tensor], views: dict[str, Tensor], work: Tensor) -> int:
    sizes = list(call.shape) if LAYOUTS[call.layout] == 2 else []
    channels = call.shape[0] if LAYOUTS[call.layout] == 1 else 1
    space = [call.batch, call.count, LAYOUTS[call.layout], channels, len(sizes), *sizes, *[0] * (MAX_DIMS - len(sizes))]
    words = [w for name in VIEWS[call.op] for w in _words(call, views.get(name))]
    index = call.index
    rows = [
        0 if call.table is None else call.table.data_ptr(),
        0 if call.table is None else call.table.shape[0],
        0 if index is None else index.data_ptr(),
        index.stride(0) if index is not None and index.dim() else 0,
        int(index is not None and index.dtype == torch.int32),
        call.first,
        call.every,
    ]
    seeds = [0, 0] if call.seeds is None else [call.seeds.data_ptr(), call.seeds.stride(0)]
    extra = [0] * 5
    if call.op in ("step", "learned_step"):
        extra[0] = CODES[call.state]
    if call.op in ("loss", "variational"):
        names = ("partials", "value", "samples", "means")
        extra = [call.reduction, *(results[n].data_ptr() if n in results else 0 for n in names)]
    if call.op == "step_logprob":
        columns = len(call.row) if call.row is not None else 0 if call.table is None else call.table.shape[1]
        learned = int(columns > len(COLUMNS))
        extra = [CODES[call.state], learned, results["partials"].data_ptr(), results["value"].data_ptr(), 0]
    if call.op in ("quantile", "moments"):
        extra[:2] = results["value"].data_ptr(), work.data_ptr()
    values = None if call.row is None else (ctypes.c_double * len(call.row))(*call.row)
    if call.terms is not None:
        chosen, weights = call.terms
        extra = [len(chosen), *chosen]
        values = (ctypes.c_double * max(1, len(weights)))(*weights)
    function = getattr(lib, f"dk_{call.op}")
    return int(
        function(
            _ints(space), _ints(words), _ints(rows), _ints(seeds), ctypes.c_uint64(call.stream), _ints(extra), values
        )
    )


class Cpu:
    """csrc/cpu as a small shared library."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL(str(build_description.cpu_library(HERE / "cpu.cpp")))

    def run(self, call: Call) -> dict[str, Tensor]:
        results, views = _prepare(call)
        assert _invoke(self.lib, call, results, views, _workspace(self.lib, call)) == 0
        return results


# ---------------------------------------------------------------------------------------------------------- device
def flags() -> tuple[str, ...]:
    """Those of the real build. The C functions of the bridges must be seen, and ptxas, which has no part in the tests,
    need not optimise."""
    return (*build_description.nvcc_flags(), "-Xcompiler=-fvisibility=default", "-Xptxas", "-O0")


@functools.cache
def host(files: tuple[Path, ...], defines: tuple[str, ...] = ()) -> Any:
    """The launchers as a shared library, the same for every architecture. The kernels in it are never run: they are
    not optimised, and compute_80 leaves ptxas out."""
    from ptxsim.host import Host

    names, includes = [str(f) for f in files], [str(CUDA_CSRC)]
    HOSTS.append(Host(names, "compute_80", None, includes, defines, (*flags(), "-Xcicc", "-O0"), kernels=False))
    return HOSTS[-1]


@functools.cache
def module(file: Path, defines: tuple[str, ...], arch: str) -> Any:
    """The kernels of one file, ready to run."""
    import ptxsim
    from ptxsim import nvcc
    from ptxsim.host import MEM

    extra = nvcc.options([str(CUDA_CSRC)], defines, flags())
    MODULES.append(ptxsim.load(nvcc.cached(str(file), arch, extra)[0], MEM, lazy=True))
    return MODULES[-1]


HOSTS: list[Any] = []
MODULES: list[Any] = []


def forget(beyond: int = 0) -> None:
    """Let go of the kernels made ready so far, where they have more instructions than ``beyond``, and of what their
    launches counted: their PTX stays, and is read again where it is needed."""
    if beyond and sum(known.held for known in MODULES) <= beyond:
        return
    for known in MODULES:
        known.forget()
    for made in HOSTS:
        made.launches.clear()


class Device:
    """csrc/cuda in the emulator, as PTX of one architecture."""

    def __init__(self, arch: str) -> None:
        names = (name for name in build_description.cuda_sources() if not name.startswith("attention"))
        files = (*(CUDA_CSRC / "cuda" / name for name in names), HERE / "launch.cu")
        self.arch = arch
        self.host = host(files)
        self.files = files
        self.modules = [module(file, (), arch) for file in files]
        self.launches: list[Any] = []

    def library(self, **options: Any) -> ctypes.CDLL:
        """The launchers, with this architecture's kernels behind them."""
        host = self.host
        host.modules = self.modules
        host.options = {"race_global": True, **options}
        host.launches.clear()
        lib = host.lib
        assert isinstance(lib, ctypes.CDLL)
        return lib

    def run(self, call: Call, complete: bool = True, **options: Any) -> dict[str, Tensor]:
        """Outputs of the call. complete=False: some blocks are left out (only_ctas), so not all is written."""
        host = self.host
        results, views = _prepare(call)
        overwritten = set(call.in_place.values())
        before = {}
        for name, tensor in call.inputs.items():
            if tensor.numel() and name not in overwritten:
                host.register(tensor, name, readonly=True)
                before[name] = bits(tensor)
        for name in ("table", "index", "seeds"):
            if getattr(call, name) is not None:
                host.register(getattr(call, name), name, readonly=True)
        for name, tensor in results.items():
            if tensor.numel():
                host.register(tensor, name, init=name in call.in_place)
        try:
            lib = self.library(**options)
            work = _workspace(lib, call)
            if work.numel():
                host.register(work, "workspace", init=False)
            status = _invoke(lib, call, results, views, work)
            self.launches = list(host.launches)
            host.check()
            assert status == 0, f"the launcher returned {status}"
            for name, tensor in results.items():
                if complete and tensor.numel() and name not in call.in_place:
                    assert host.unwritten(tensor) == 0, f"{name}: {host.unwritten(tensor)} bytes were not written"
            for name, tensor in before.items():
                assert torch.equal(bits(tensor), before[name]), f"{name} was changed"
            for launch in self.launches:
                assert not launch.warnings, launch.warnings
                assert launch["local"]["bytes"] == 0, "a kernel uses local memory"
        finally:
            host.release()
        return results


def check(device: Device, cpu: Cpu, call: Call) -> dict[str, Tensor]:
    """The same bits from both; returns the device's outputs."""
    expected, got = cpu.run(call), device.run(call)
    assert expected.keys() == got.keys()
    for name in expected:
        problem = first_difference(got[name], expected[name])
        assert problem is None, f"{name} ({call.op}, {call.layout}, {call.batch} x {call.shape}): {problem} on the CPU"
    return got


# --------------------------------------------------------------------------------------------------------- values
def values(
    seed: int, batch: int, shape: Sequence[int], dtype: torch.dtype, layout: str = "contiguous", special: bool = False
) -> Tensor:
    """Normals times 2 in a memory layout; special: with zeros, infinities, NaN, subnormals and large numbers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, *shape, dtype=torch.float64, generator=generator) * 2
    if special and x.numel():
        odd = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 3e-8, -1e-40, 60000.0, 1e30], dtype=torch.float64)
        pick = torch.randint(0, 40, x.shape, generator=generator)
        x = torch.where(pick < len(odd), odd[pick.clamp(max=len(odd) - 1)], x)
    return place(x.to(dtype), layout)


def seeds_for(batch: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return torch.randint(-(2**63), 2**63 - 1, (batch,), dtype=torch.int64, generator=generator)


def row(names: Sequence[str] = COLUMNS, **columns: float) -> list[float]:
    """A step row by column names, the rest as in diffkern.plan.Row."""
    base = dict.fromkeys(names, 0.0) | {"clip": float("inf"), "k": 1.0}
    assert columns.keys() <= base.keys(), columns
    return list((base | columns).values())


def with_changes(call: Call, **changes: Any) -> Call:
    return replace(call, **changes)
