"""Writes docs/gpu-report.md: what the CUDA kernels cost, found out without a GPU.

    python tools/gpu_report.py [--output docs/gpu-report.md] [--no-tests] [--only attention]

Counters come from the PTX emulator, registers from ptxas for every architecture, instruction widths from SASS (when
cuobjdump or nvdisasm is there: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm), the coverage table from a run
of tests/ptx. Times are estimates from counted bytes and instructions and datasheet rates, and say so.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.util
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpu_report_attention
from gpu_report_common import ROOT, architectures, nvcc, nvcc_version, run, sources, table

ACCESS = ("direct", "staged", "scalar")
# Per multiprocessor: threads, blocks, registers, shared memory in bytes (CUDA programming guide, technical
# specifications per compute capability); 1 KiB a block of shared memory is the system's.
LIMITS = {
    75: (1024, 16, 65536, 65536),
    80: (2048, 32, 65536, 167936),
    86: (1536, 16, 65536, 102400),
    89: (1536, 24, 65536, 102400),
    90: (2048, 32, 65536, 233472),
    100: (2048, 32, 65536, 233472),
    120: (1536, 24, 65536, 102400),
}


@dataclass(frozen=True)
class Gpu:
    """Datasheet: memory bytes a second, multiprocessors, boost clock in Hz."""

    name: str
    bandwidth: float
    multiprocessors: int
    clock: float


GPUS = (
    Gpu("A100 SXM 80 GB", 2.039e12, 108, 1.41e9),
    Gpu("H100 SXM", 3.35e12, 132, 1.98e9),
    Gpu("RTX 4090", 1.008e12, 128, 2.52e9),
)


# What a kernel's true template arguments are called, in their order; of the others it is "full".
FLAGS = {
    ("moments", "sums_kernel"): ("squares",),
    ("moments", "finish_kernel"): ("squares",),
    ("group_norm", "sums_kernel"): ("channels_last",),
    ("group_norm", "apply_kernel"): ("silu",),
    ("group_norm_grad", "sums_kernel"): ("channels_last", "silu"),
    ("group_norm_grad", "apply_kernel"): ("silu",),
}


def kernel_name(symbol: str) -> str:
    """step: step_kernel<float, direct, full> and the like, from nvcc's name for the file and the kernel."""
    name = run(["c++filt", symbol]).strip().split("(dk::", 2)
    text = re.sub(r"\(dk::cuda::Access\)(\d)", lambda m: ACCESS[int(m.group(1))], "(dk::".join(name))
    text = re.sub(r"\(dk::cuda::\(anonymous namespace\)::(\w+)\)(\d)", lambda m: f"{m[1].lower()} {m[2]}", text)
    found = re.search(r"_GLOBAL__N__[0-9a-f]{8}_\d+_(\w+?)_cu_[0-9a-f]{8}", symbol)
    file = found.group(1) if found else "?"
    match = re.search(r"(\w+_kernel)<([^(]*)>\(", text)
    if match is None:
        plain = re.search(r"(\w+_kernel)\(", text)
        return f"{file}: {plain.group(1)}" if plain else text
    flags = itertools.chain(FLAGS.get((file, match.group(1)), ()), itertools.repeat("full"))
    words = match.group(2).replace("dk::", "").split(", ")
    words = [next(flags) if word == "true" else word for word in words if word != "false" or not next(flags)]
    return f"{file}: {match.group(1)}<{', '.join(words)}>"


# ------------------------------------------------------------------------------------------------------ ptxas
@dataclass
class Compiled:
    registers: int
    spills: int
    shared: int


def occupancy(arch: int, threads: int, compiled: Compiled) -> float:
    most, blocks, registers, shared = LIMITS[arch]
    per_warp = (compiled.registers * 32 + 255) // 256 * 256
    fit = [blocks, most // threads, registers // per_warp // (threads // 32)]
    fit.append(shared // (compiled.shared + (0 if arch == 75 else 1024)) if compiled.shared else blocks)
    return min(fit) * threads / most


def compile_all(folder: Path) -> dict[str, dict[int, Compiled]]:
    """kernel -> architecture -> what ptxas says; the sm_80 and sm_90 cubins stay in the folder."""
    found: dict[str, dict[int, Compiled]] = defaultdict(dict)
    names: dict[str, str] = {}
    for source in sources(attention=False):
        for arch in architectures():
            cubin = folder / f"{source.stem}_{arch}.cubin"
            log = run(nvcc(arch, "-cubin", "-Xptxas", "-v", source, "-o", cubin))
            for part in log.split("Compiling entry function '")[1:]:
                symbol = part.split("'", 1)[0]
                name = names.setdefault(symbol, kernel_name(symbol))
                if arch in found[name]:
                    raise SystemExit(f"two kernels are called {name}")
                numbers = [
                    sum(int(n) for n in re.findall(pattern, part))
                    for pattern in (r"Used (\d+) registers", r"(\d+) bytes spill", r"(\d+) bytes smem")
                ]
                found[name][arch] = Compiled(*numbers)
    return found


@functools.cache
def device() -> Any:
    """The kernels in the emulator, as sm_80 PTX."""
    from ptx.harness import Device

    return Device("sm_80")


@functools.cache
def threads() -> dict[str, int]:
    """Threads of a block by kernel, from the launch bounds in the PTX."""
    kernels = {symbol: kernel for module in device().modules for symbol, kernel in module.kernels.items()}
    bounds = {symbol: kernel.attrs.get("maxntid") for symbol, kernel in kernels.items()}
    return {kernel_name(symbol): math.prod(bound) for symbol, bound in bounds.items() if bound}


def registers_section(found: dict[str, dict[int, Compiled]]) -> str:
    rows = []
    for kernel, by_arch in found.items():
        spills = sum(c.spills for c in by_arch.values())
        cells = [f"{c.registers} ({occupancy(a, threads()[kernel], c):.0%})" for a, c in by_arch.items()]
        rows.append([f"`{kernel}`", threads()[kernel], max(c.shared for c in by_arch.values()), spills, *cells])
    head = ["kernel", "threads", "shared bytes", "spilled bytes", *(f"sm_{a}" for a in architectures())]
    return table(head, rows)


# -------------------------------------------------------------------------------------------------------- SASS
def disassembler() -> list[str] | None:
    """cuobjdump -sass or nvdisasm, from PATH or the PyPI packages."""
    places = [Path(p) for p in os.environ.get("PATH", "").split(os.pathsep)]
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        places += [
            Path(folder) / "cu13" / "bin",
            Path(folder) / "cuda_cuobjdump" / "bin",
            Path(folder) / "cuda_nvdisasm",
        ]
    for tool, options in (("cuobjdump", ["-sass"]), ("nvdisasm", ["-c"])):
        for place in places:
            if (place / tool).is_file():
                os.environ["PATH"] += f"{os.pathsep}{place}"  # cuobjdump calls nvdisasm
                return [str(place / tool), *options]
    return None


def sass_section(folder: Path, arch: int) -> str:
    tool = disassembler()
    if tool is None:
        return "Not made: no cuobjdump or nvdisasm (pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm).\n"
    rows = []
    for source in sources(attention=False):
        text = run([*tool, str(folder / f"{source.stem}_{arch}.cubin")])
        for part in re.split(r"(?:Function : |\.section\s+\.text\.)", text)[1:]:
            symbol = re.match(r"[\w$]+", part)
            if symbol is None or "_kernel" not in symbol.group(0):
                continue
            name = kernel_name(symbol.group(0))
            operations = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", part)
            wide = sum(".128" in o for o in operations if o.startswith(("LDG", "STG")))
            memory = sum(o.startswith(("LDG", "STG")) for o in operations)
            local = sum(o.startswith(("LDL", "STL")) for o in operations)
            count = {
                k: sum(o.split(".")[0] == k and "FTZ" not in o for o in operations) for k in ("FFMA", "FMUL", "FADD")
            }
            rows.append([f"`{name}`", len(operations), memory, wide, local, *count.values()])
    head = ["kernel", "instructions", "global memory", "of them 128-bit", "local memory", "FFMA", "FMUL", "FADD"]
    return table(head, rows)


def rounding_section(folder: Path) -> str:
    """Products and sums of the PTX against those of the SASS, for kernels without a rarely taken second copy."""
    tool = disassembler()
    if tool is None:
        return ""
    source = """
#include <core/noising.h>
#include <core/normal.h>
extern "C" __global__ void normals(const uint32_t* r, float* z) {
  const dk::Pair p = dk::normal_pair(r[0], r[1]);
  z[0] = p.a; z[1] = p.b;
}
extern "C" __global__ void products(const float* x, float* y) {
  y[0] = dk::add(dk::mul(x[0], x[1]), x[2]);
  y[1] = dk::sub(dk::mul(x[3], x[4]), x[5]);
  y[2] = dk::affine(x[6], x[7], x[8], x[9]);
}
"""
    path = folder / "rounding.cu"
    path.write_text(source)
    rows = []
    ptx = run(nvcc(80, "-ptx", path, "-o", "/dev/stdout"))
    run(nvcc(80, "-cubin", path, "-o", folder / "rounding.cubin"))
    sass = run([*tool, str(folder / "rounding.cubin")])
    for kernel in ("normals", "products"):
        in_ptx = ptx.split(f".visible .entry {kernel}")[1].split(".visible .entry")[0]
        in_sass = next(p for p in re.split(r"(?:Function : |\.section\s+\.text\.)", sass) if p.startswith(kernel))
        p = [len(re.findall(rf"\b{op}\.rn\.f32", in_ptx)) for op in ("fma", "mul", "(?:add|sub)")]
        s = [len(re.findall(rf"\b{op}(?!\S*FTZ)\b", in_sass)) for op in ("FFMA", "FMUL", "FADD")]
        rows.append([kernel, *p, *s])
    return table(["code", "PTX fma", "PTX mul", "PTX add", "FFMA", "FMUL", "FADD"], rows)


# ---------------------------------------------------------------------------------------------------- counters
def measure() -> list[tuple[str, str, Any, int]]:
    """(case, dtype, counters of its main kernel, elements)."""
    from ptx.calls.whole_tiles import BATCH, SHAPE, cases
    from ptx.harness import DTYPES, Device

    device = Device("sm_80")
    out = []
    for dtype in DTYPES:
        for layout in ("contiguous", "channels_last"):
            for name, call in cases(dtype, layout).items():
                device().run(call)
                label = name if layout == "contiguous" else f"{name}, channels_last"
                out.append(
                    (
                        label,
                        str(dtype).removeprefix("torch."),
                        device().launches[0],
                        BATCH * SHAPE[0] * SHAPE[1] * SHAPE[2],
                    )
                )
    return out


def counters_section(measured: list[tuple[str, str, Any, int]]) -> str:
    rows = []
    for name, dtype, launch, elements in measured:
        load, store, unique = launch["global_load"], launch["global_store"], launch["unique_sectors"]
        volume = (unique["read_bytes"] + unique["write_bytes"]) / elements
        asked, distinct = load["sectors"] + store["sectors"], (unique["read_bytes"] + unique["write_bytes"]) // 32
        moved = load["bytes"] + store["bytes"]
        wide = sum(16 * k["by_width"].get(16, {"accesses": 0})["accesses"] for k in (load, store))
        conflicts, instructions = launch["shared"]["bank_conflicts"], launch["thread_instructions"] / elements
        shares = [f"{asked / distinct:.3f}", f"{wide / moved:.1%}"]
        rows.append([name, dtype, f"{volume:.2f}", *shares, conflicts, f"{instructions:.1f}"])
    head = ["case", "dtype", "bytes an element", "sectors asked / distinct", "bytes moved 16 at a time"]
    return table([*head, "bank conflicts", "PTX instructions an element"], rows)


def roofline_section(measured: list[tuple[str, str, Any, int]]) -> str:
    size = 16 * 3 * 256 * 256
    rows = []
    for name, dtype, launch, elements in measured:
        if "channels_last" in name or dtype == "float64":
            continue
        unique = launch["unique_sectors"]
        volume = (unique["read_bytes"] + unique["write_bytes"]) / elements * size
        instructions = launch["warp_instructions"] / elements * size
        cells = []
        for gpu in GPUS:
            memory = volume / gpu.bandwidth
            issue = instructions / (4 * gpu.multiprocessors * gpu.clock)
            cells.append(f"{1e6 * max(memory, issue):.1f} us ({'memory' if memory >= issue else 'instructions'})")
        rows.append([name, dtype, f"{volume / 1e6:.1f} MB", *cells])
    return table(["case at (16,3,256,256)", "dtype", "traffic", *(g.name for g in GPUS)], rows)


# ---------------------------------------------------------------------------------------------------- coverage
def coverage_section(folder: Path) -> str:
    result = folder / "junit.xml"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", f"--junitxml={result}", str(ROOT / "tests" / "ptx")], cwd=ROOT
    )
    counts: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    for case in xml.etree.ElementTree.parse(result).iter("testcase"):
        file = case.get("classname", "").rsplit(".", 1)[-1].removeprefix("test_")
        failed = any(child.tag in ("failure", "error", "skipped") for child in case)
        counts[file, case.get("name", "").split("[")[0].removeprefix("test_").replace("_", " ")][failed] += 1
    rows = [[file, check, good, bad or ""] for (file, check), (good, bad) in counts.items()]
    return table(["kernel or topic", "check", "passed", "failed"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "gpu-report.md")
    parser.add_argument("--no-tests", action="store_true", help="leave out the coverage table")
    parser.add_argument("--only", choices=["attention"], help="make this part anew and keep the rest of the report")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.only:
            text = gpu_report_attention.replace(args.output.read_text(), gpu_report_attention.section(folder))
            args.output.write_text(text)
            print(f"written: {args.output}, part {args.only}")
            return
        found = compile_all(folder)
        measured = measure()
        spills = sum(c.spills for by_arch in found.values() for c in by_arch.values())
        text = f"""# The CUDA kernels, measured without a GPU

Made by `make gpu-report` on {datetime.date.today()} with nvcc {nvcc_version()}. How:
[gpu-without-gpu.md](gpu-without-gpu.md). `direct`, `staged` and `scalar` are the three ways a kernel reaches memory
(csrc/cuda/launch.cuh).

## Traffic and instructions, counted in the emulator (sm_80 PTX)

Shape (2,3,32,64). Per-sample lookups (index, row, seed: a few sectors a block) are part of the numbers; they are what
is above 1.000 and below 100% in the contiguous cases. In channels_last, bank conflicts come from the exchange of the
noise.

{counters_section(measured)}
## Registers and occupancy (ptxas)

Registers a thread (theoretical occupancy at full blocks). Spilled bytes over all architectures: {spills}.

{registers_section(found)}
## SASS, sm_80

Static counts, all paths of a kernel together: the one-at-a-time stores of a sample's last chunk stand beside the
128-bit ones that do the work, and `staged` and `scalar` kernels hold several ways to draw noise.

{sass_section(folder, 80)}
Products and sums stay apart (an FFMA beyond the PTX's fma belongs to the Newton steps of a square root, whose
operations are also in FMUL and FADD):

{rounding_section(folder)}
## Roofline estimate (not a measurement)

max(counted bytes / datasheet bandwidth, counted PTX warp instructions / (4 a cycle a multiprocessor at boost clock)).
Launch latency, tails and caches are not in it, and PTX instructions are not yet machine instructions.

{roofline_section(measured)}
{gpu_report_attention.section(folder)}"""
        if not args.no_tests:
            text += f"\n## Coverage (tests/ptx)\n\n{coverage_section(folder)}"
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(text)
    print(f"written: {args.output}")


if __name__ == "__main__":
    if shutil.which("c++filt") is None:
        raise SystemExit("c++filt (binutils) is needed to read kernel names")
    main()
