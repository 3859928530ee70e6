"""The part "Attention" of docs/gpu-report.md: ptxas and emulator numbers of csrc/cuda/attention*.cu."""

from __future__ import annotations

import datetime
import re
import resource
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gpu_report_common import architectures, nvcc, nvcc_version, sources, table

F16, F32 = torch.float16, torch.float32
TOKENS = 128  # queries and keys
ORDERS = {"tokens": "bnhd", "nchw": "nchw"}
CASES = (
    *((F16, dim, order) for dim in (40, 64, 128) for order in ORDERS),
    (F16, 256, "tokens"),
    (F16, 512, "tokens"),
    *((F32, 64, order) for order in ORDERS),
)


# ------------------------------------------------------------------------------------------------------ ptxas
@dataclass
class Family:
    """One file for one architecture."""

    registers: list[int] | None  # of each kernel; None: it does not compile
    spills: int
    seconds: float

    def __str__(self) -> str:
        if self.registers is None:
            return "does not compile"
        return f"{len(self.registers)} / {max(self.registers, default=0)} / {self.spills} / {self.seconds:.0f}"


def compile_family(source: Path, arch: int, folder: Path) -> tuple[str | None, float]:
    """What ptxas says, or None when the file does not compile, and the processor seconds that it took."""

    def seconds() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = seconds()
    command = nvcc(arch, "-cubin", "-Xptxas", "-v", source, "-o", folder / f"{source.stem}_{arch}.cubin")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    log = done.stdout + done.stderr
    if done.returncode:
        print(f"{source.name} does not compile for sm_{arch}:\n{log}")
    return None if done.returncode else log, seconds() - before


def compile_all(folder: Path) -> dict[str, dict[int, Family]]:
    found: dict[str, dict[int, Family]] = {source.stem: {} for source in sources(attention=True)}
    for arch in architectures():
        for source in sources(attention=True):
            log, seconds = compile_family(source, arch, folder)
            registers = None if log is None else [int(n) for n in re.findall(r"Used (\d+) registers", log)]
            spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill", log or ""))
            found[source.stem][arch] = Family(registers, spills, seconds)
    return found


def compiled_section(found: dict[str, dict[int, Family]]) -> str:
    rows = [[f"`{file}`", *by_arch.values()] for file, by_arch in found.items()]
    totals = []
    for arch in architectures():
        of = [by_arch[arch] for by_arch in found.values()]
        registers = [n for f in of for n in f.registers or ()]
        totals.append(Family(registers, sum(f.spills for f in of), sum(f.seconds for f in of)))
    rows.append(["all", *totals])
    return table(["file", *(f"sm_{a}" for a in architectures())], rows)


# ---------------------------------------------------------------------------------------------------- counters
@dataclass
class Pass:
    """All launches of one forward or backward pass."""

    name: str
    dtype: torch.dtype
    dim: int
    order: str
    run: Any

    def total(self, *path: str) -> int:
        """Of one counter over the launches."""
        total = 0
        for launch in self.run.launches:
            value: Any = launch
            for key in path:
                value = value.get(key, 0) if key == path[-1] else value[key]
            total += value
        return total


def measure() -> Iterator[Pass]:
    from ptx.attention_harness import Attention, exact, place, random

    device = Attention("sm_80")
    for dtype, dim, order in CASES:
        plain = [random(seed, 1, 1, TOKENS, dim, dtype=dtype) for seed in range(4)]
        q, k, v, grad = (place(t, ORDERS[order]) for t in plain)
        yield Pass("forward", dtype, dim, order, device.forward(q, k, v))
        true = exact(*plain)
        out = place(true.out.to(dtype), ORDERS[order])
        yield Pass("backward", dtype, dim, order, device.backward(q, k, v, out, grad, true.lse.float()))


def counters_section() -> str:
    from ptx.attention_harness import conflicts, share

    rows = []
    for p in measure():
        kind = "mma" if p.dtype == F16 else "f32.fma"
        launches = p.run.launches
        issued = p.total("warp_instructions")
        part = sum(share(launch, kind) * launch["warp_instructions"] for launch in launches) / issued
        # multiplications and additions: 2 products forward, 5 backward, each of TOKENS x TOKENS x D
        needed = (2 if p.name == "forward" else 5) * 2 * TOKENS * TOKENS * p.dim
        work = p.total("mma_flops") if kind == "mma" else 64 * p.total("instructions_by_class", kind)
        asked = p.total("global_load", "bytes") + p.total("global_cp_async", "bytes")
        least = p.run.minimum_bytes()
        read, written = p.total("unique_sectors", "read_bytes"), p.total("unique_sectors", "write_bytes")
        rows.append(
            [
                f"{str(p.dtype).removeprefix('torch.')} {p.name}",
                p.dim,
                p.order,
                len(launches),
                f"{part:.1%}",
                f"{work / needed:.2f}",
                f"{read / 1024:.1f} / {least[0] / 1024:.1f} ({read / least[0]:.2f})",
                f"{asked / 1024:.1f}",
                f"{written / 1024:.1f} / {least[1] / 1024:.1f} ({written / least[1]:.2f})",
                sum(len(conflicts(launch)) for launch in launches),
            ]
        )
    head = ["pass", "D", "layout", "launches", "mma or ffma", "work / least", "KiB read / least", "KiB asked"]
    return table([*head, "KiB written / least", "bank conflicts"], rows)


def section(folder: Path) -> str:
    """From its heading on."""
    compiled = compile_all(folder)
    return f"""## Attention

Made on {datetime.date.today()} with nvcc {nvcc_version()}. Nothing here ran on a GPU: the numbers are of ptxas and of a
PTX emulator.

### Registers and spills (ptxas)

Kernels / most registers of one / bytes spilled by all / processor seconds of nvcc for the file. On sm_75 the
tensor cores have no bfloat16 and the float16 backward pass goes to D = 128; kernels beyond that only trap.

{compiled_section(compiled)}
### Counted in the emulator (sm_80 PTX)

Batch 1, one head, {TOKENS} queries and keys, head dim D; layout `tokens` is [B, N, H, D], `nchw` is [B, H, D, N]. All
launches of a pass together.

- mma or ffma: their share of the issued warp instructions (`mma` in float16, `f32.fma` in float32). It is a share of
  PTX, which counts every step of address arithmetic and every move; SASS folds most of them into the loads, stores
  and products themselves. A bound against slow loops, not a rate of the machine. At {TOKENS} keys the beginning and the
  end of a block weigh much; tests/ptx/test_attention_mma.py has the bounds at 512 keys.
- work / least: multiplications and additions of those instructions against the formula's (2 products forward, 5
  backward). Head dims are padded to steps of 16, and the backward pass computes again what it does not store; in
  float32 the exponentials are in it too.
- KiB read, written / least: distinct 32-byte sectors of each launch, against every input and output of the pass once.
  KiB asked: what all blocks load; beyond KiB read, a block loads what another did before.
- bank conflicts: shared-memory instructions that have any.

{counters_section()}"""


def replace(text: str, part: str) -> str:
    """The report with this part in the place of its old one, or before the coverage table."""
    found = re.search(r"^## Attention\n(?:(?!^## ).*\n?)*", text, re.MULTILINE)
    place = found or re.search(r"^(?=## Coverage)|\Z", text, re.MULTILINE)
    assert place is not None
    before, after = text[: place.start()].rstrip("\n"), text[place.end() :]
    return f"{before}\n\n{part}" + (f"\n{after}" if after else "")
