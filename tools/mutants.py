"""Seeds faults into copies of the kernels and checks that a test catches every one (`make mutants`).

A fault that survives is a missing test. Those in csrc/core and csrc/cuda are for tests/ptx; the CPU kernels stay as
they are there, so that a fault in a shared formula shows as a difference between the two. Those in csrc/cpu are for
tests/ops: the CPU module is built with them, in minutes for the first and seconds for each after it.
Usage: python tools/mutants.py [NAME ...]   (no name: all of them; --list: their names)
"""

# ruff: noqa: E501 (the table of mutants)
from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Mutant:
    """`old` (once in the file, white space as it comes) becomes `new`; `tests`: files that should notice."""

    name: str
    file: str
    old: str
    new: str
    tests: str


MUTANTS = (
    Mutant("tail one short", "cuda/memory.cuh", "(left < 0 ? 0 : left)", "(left < 1 ? 0 : left - 1)", "randn"),
    Mutant("tail one long", "cuda/memory.cuh", "if (j < n) to[j] =", "if (j <= n) to[j] =", "randn"),
    Mutant("no barrier after staging", "cuda/noise.cuh", "} __syncthreads(); }", "} }", "randn"),
    Mutant("no barrier before the fold", "cuda/loss.cu", "__syncthreads(); if (threadIdx.x < 32)", "if (threadIdx.x < 32)", "loss"),
    Mutant("no barrier after the row", "cuda/noising.cu", "shared_row = find_row<T>(args, b); __syncthreads();", "shared_row = find_row<T>(args, b);", "noising"),
    Mutant("lanes swapped", "cuda/noise.cuh", "z[2] = second.a; z[3] = second.b;", "z[2] = second.b; z[3] = second.a;", "randn"),
    Mutant("nine Philox rounds", "core/philox.h", "kPhiloxRounds = 10", "kPhiloxRounds = 9", "randn"),
    Mutant("coefficients swapped", "cuda/noising.cu", "affine(row.k.u, x0[j], row.k.v, z[j])", "affine(row.k.v, x0[j], row.k.u, z[j])", "noising"),
    Mutant("product rounded before the sum", "core/arith.h", "DK_RN(__fmaf_rn(a, b, c),", "DK_RN(__fadd_rn(__fmul_rn(a, b), c),", "noising"),
    Mutant("strides of the batch only", "cuda/memory.cuh", "for (int d = 0; d < kMaxDims; ++d) sum +=", "for (int d = 1; d < kMaxDims; ++d) sum +=", "noising"),
    Mutant("32-bit block offset", "cuda/randn.cu", "static_cast<int64_t>(blockIdx.x) * tile", "static_cast<int>(blockIdx.x) * tile", "randn"),
    Mutant("third grid dimension forgotten", "cuda/launch.cuh", "static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y", "blockIdx.y", "randn"),
    Mutant("known image on the step's stream", "cuda/step.cu", "chunk_noise<access>(staged_known, seed, row.known_stream,", "chunk_noise<access>(staged_known, seed, row.stream,", "step"),
    Mutant("mask dropped", "cuda/step.cu", "bool full = args.mask.data != nullptr;", "bool full = false;", "step"),
    Mutant("history index", "cuda/step.cu", "load_state<S>(args.h[k], place, h[k]);", "load_state<S>(args.h[0], place, h[k]);", "step"),
    Mutant("bfloat16 three bits off", "cuda/memory.cuh", "return widen(v);", "return 8 * widen(v);", "step"),
    Mutant("bfloat16 truncated", "cuda/memory.cuh", "__float2bfloat16_rn(", "__float2bfloat16_rz(", "randn"),
    Mutant("second copy of next not written", "cuda/step.cu", "if (args.next2.data != nullptr)", "if (false)", "step"),
    Mutant("last row of the table and one more", "core/args.h", "r < rows.count ? r", "r <= rows.count ? r", "step"),
    Mutant("32-bit index read as 64", "core/args.h", "rows.index_is_int32 ? static_cast", "false ? static_cast", "noising"),
    Mutant("seed of the first sample", "cuda/noise.cuh", "seeds.data[sample * seeds.stride]", "seeds.data[0 * sample * seeds.stride]", "randn"),
    Mutant("sum: last term forgotten", "cuda/noise_sum.cu", "j < terms.n; ++j) { const T weight", "j < terms.n - 1; ++j) { const T weight", "noise_sum"),
    Mutant("sum: stream of the first term", "cuda/noise_sum.cu", "draw_quad(seed, terms.stream[j], q, z);", "draw_quad(seed, terms.stream[0], q, z);", "noise_sum"),
    Mutant("sum: product rounded before the sum", "cuda/noise_sum.cu", "fma(weight, static_cast<T>(z[lane]), sum[lane])", "add(mul(weight, static_cast<T>(z[lane])), sum[lane])", "noise_sum"),
    Mutant("sum: second half of a staged quad of doubles", "cuda/noise.cuh", "to[swap] = swap ? make_double2(quad[2], quad[3])", "to[swap] = swap ? make_double2(quad[3], quad[2])", "noise_sum"),
    Mutant("alignment not checked", "cuda/launch.cuh", "if (view.data == nullptr) return true;", "if (view.data == nullptr || width > 0) return true;", "randn"),
    Mutant("loss folded from the inside", "cuda/ordered_sum.cuh", "add(fold<N, 2 * kLength>(values), fold<N, 2 * kLength>(values + kLength))", "add(fold<N / 2, kLength>(values), fold<N / 2, kLength>(values + N / 2))", "loss"),
    Mutant("mean not divided by the batch", "cuda/loss.cu", "args.reduction == Reduction::mean ? args.space.batch : 1", "1", "loss"),
    Mutant("bound: squares for nats", "cuda/variational.cu", "store_squares(all_nats, local, nats);", "store_squares(all_nats, local, square);", "variational"),
    Mutant("bound: nats beyond the tail", "cuda/variational.cu", "nats[j] = j < n ? element.nats : T(0);", "nats[j] = element.nats;", "variational"),
    Mutant("bound: gradients of the halves swapped", "cuda/variational.cu", "pred[j] = element.by_pred; w[j] = element.by_w;", "pred[j] = element.by_w; w[j] = element.by_pred;", "variational"),
    Mutant("bound: decoder forgotten", "cuda/variational.cu", "} else if (row.k.decodes) {", "} else if (false) {", "variational"),
    Mutant("bound: partial sums one apart", "cuda/variational.cu", "args.partials) + 2 * b * blocks", "args.partials) + b * blocks", "variational"),
    Mutant("bound: first bin closed", "core/variational.h", "first = x0 < sub(k.bin, T(1));", "first = x0 < sub(-k.bin, T(1));", "variational"),
    Mutant("quantile: counts not awaited", "cuda/quantile.cu", "p.pass, selected, counts); __syncthreads(); for", "p.pass, selected, counts); for", "statistics"),
    Mutant("quantile: counters added without atomics", "cuda/quantile.cu", "atomicAdd(counts + (is_lower ? 0 : kSecond) + static_cast<int>((key >> shift) & mask), 1u);", "counts[(is_lower ? 0 : kSecond) + static_cast<int>((key >> shift) & mask)] += 1;", "statistics"),
    Mutant("quantile: upper rank among the lower's", "cuda/quantile.cu", "(old.lower.prefix != old.upper.prefix ? kSecond : 0)", "0", "statistics"),
    Mutant("quantile: counts kept for the next pass", "cuda/quantile.cu", "static_cast<int>(kSelectThreads)) counts[i] = 0; if (threadIdx.x == 0) { *selected_of", "static_cast<int>(kSelectThreads)) continue; if (threadIdx.x == 0) { *selected_of", "statistics"),
    Mutant("quantile: last part one chunk short", "cuda/quantile.cu", "args, b, begin, begin + (rest < kBlockPart ? rest : kBlockPart), p.pass", "args, b, begin, begin + (rest < kBlockPart ? rest - 16 : kBlockPart), p.pass", "statistics"),
    Mutant("quantile: NaN is the last number", "core/quantile.h", "return found.nan ? not_a_number<T>() : between;", "return between;", "statistics"),
    Mutant("threshold below 1", "core/quantile.h", "quantile < T(1) ? T(1) : quantile", "quantile", "statistics"),
    Mutant("moments: biased", "core/moments.h", "static_cast<T>(count - 1)", "static_cast<T>(count)", "statistics"),
    Mutant("moments: squares beyond the tail", "cuda/moments.cu", "j < place.n ? (squares ? square_from(x[j], mean) : x[j]) : T(0)", "squares ? square_from(x[j], mean) : x[j]", "statistics"),
    Mutant("moments: no barrier before the fold", "cuda/moments.cu", "} __syncthreads(); if (threadIdx.x < 32)", "} if (threadIdx.x < 32)", "statistics"),
    Mutant("learned step: first half for the variance", "cuda/learned_step.cu", "load_any(args.v, place.offset(args.v), place.n, v);", "load_any(args.m, place.offset(args.m), place.n, v);", "learned_step"),
    Mutant("learned step: variance for its root", "core/learned_step.h", "{static_cast<T>(0.5 * row[kLogVariance0]), static_cast<T>(0.5 * row[kLogVariance1])}", "{static_cast<T>(row[kLogVariance0]), static_cast<T>(row[kLogVariance1])}", "learned_step"),
    Mutant("learned step: terms of another step pass", "cuda/learned_step.cu", "if (learned_step_excess(values) != kLearnedColumns || lacks(row.terms, args))", "if (lacks(row.terms, args))", "learned_step"),
    Mutant("density: gradient of one half for both", "cuda/step_logprob.cu", "cond[j] = parts.c;", "cond[j] = parts.u;", "step_logprob"),
    Mutant("density: a silent row is read", "core/step_logprob.h", "if (!k.random) return;", "", "step_logprob"),
    Mutant("density: clip forgotten in the gradient", "core/step_logprob.h", "x0 < k.step.clip ? k.by_m : k.by_m_clipped", "x0 < k.step.clip ? k.by_m : k.by_m", "step_logprob"),
    Mutant("density: a row with noise in x0 passes", "core/step_logprob.h", "if (row[kR] != 0 || row[kG]", "if (row[kG]", "step_logprob"),
    Mutant("linear: last row of a block for all", "cuda/linear_rows.cu", "(row + (r < last ? r : last)) * stride", "(row + last) * stride", "linear_rows"),
    Mutant("linear: folded in another order", "cuda/linear_rows.cu", "half = kLinearLanes / 2; half > 0; half /= 2", "half = 1; half < kLinearLanes; half *= 2", "linear_rows"),
    Mutant("linear: product rounded before the sum", "cuda/linear_rows.cu", "fma(T(decode(x[r][k])), weight, sum[r])", "add(mul(T(decode(x[r][k])), weight), sum[r])", "linear_rows"),
    Mutant("linear: half of the lanes", "cuda/linear_rows.cu", "k += kLinearLanes", "k += 2 * kLinearLanes", "linear_rows"),
    Mutant("linear: outputs beyond the last", "cuda/linear_rows.cu", "if (lane != 0 || !valid) return;", "if (lane != 0) return;", "linear_rows"),
    Mutant("linear: rows as if they were neighbours", "cuda/linear_rows.cu", "i / args.inputs * args.x.stride", "i / args.inputs * args.inputs", "linear_rows"),
    Mutant("clamp loses NaN", "core/step.h", "const T above = v < -limit ? -limit : v;", "const T above = v > -limit ? v : -limit;", "step"),
    Mutant("noise read although its coefficient is 0", "cuda/step.cu", "} else if (terms & kReadsNoise) {", "} else if (args.noise.data != nullptr) {", "step"),
    Mutant("four stores of 4 bytes", "cuda/memory.cuh", "store_16(reinterpret_cast<uint4*>(to) + k, chunk.word[4 * k], chunk.word[4 * k + 1], chunk.word[4 * k + 2], chunk.word[4 * k + 3]);", "for (int i = 0; i < 4; ++i) reinterpret_cast<volatile uint32_t*>(to)[4 * k + i] = chunk.word[4 * k + i];", "traffic"),
    Mutant("norm: add forgotten in the mean", "core/group_norm.h", "return fma(static_cast<double>(p.positions), added, sum);", "return sum;", "group_norm"),
    Mutant("norm: blocks apart from the mean forgotten", "core/group_norm.h", "return fma(mul(n, apart), apart, squares);", "return squares;", "group_norm"),
    Mutant("norm: last block taken for whole", "core/group_norm.h", "return left < norm_block(p) ? left : norm_block(p);", "return norm_block(p);", "group_norm"),
    Mutant("norm: scale of the first sample", "core/group_norm.h", "norm_given(args.scale, b, c, 0.0, read)); sum =", "norm_given(args.scale, 0, c, 0.0, read)); sum =", "group_norm"),
    Mutant("norm: slope of SiLU by -u", "core/silu.h", "fma(-s.minus, mul(s.e, inverse), T(1))", "fma(s.minus, mul(s.e, inverse), T(1))", "group_norm"),
    Mutant("norm: lanes folded to the first only", "cuda/group_norm.cuh", "return __shfl_sync(0xffffffffu, v, 0);", "return v;", "group_norm"),
    Mutant("norm: factors of the first channel of a chunk", "cuda/group_norm.cuh", "c + (args.problem.channels_last ? j : 0)", "c + 0 * j", "group_norm"),
    Mutant("norm: channels beyond a warp left out", "cuda/group_norm.cuh", "c < end; c += kNormLanes) sum = add(sum, term(c));", "c < end; c += end) sum = add(sum, term(c));", "group_norm"),
    Mutant("norm: R of the first position alone", "cuda/group_norm_grad.cu", "if (added) r = add(r, sub(v, mean));", "if (added) r = sub(v, mean);", "group_norm"),
    Mutant("norm: a group summed before it is read", "cuda/group_norm.cu", "__syncthreads(); if (p.channels_last) {", "if (p.channels_last) {", "group_norm"),
    Mutant("norm: a group finished before it is summed", "cuda/group_norm.cu", "__syncthreads(); if (threadIdx.x < kNormLanes)", "if (threadIdx.x < kNormLanes)", "group_norm"),
    Mutant("norm: a group's run as long as a row of its sample", "cuda/group_norm.cu", "place.step = last ? group.width : kNormLanes;", "", "group_norm"),
    Mutant("norm: 32-bit place of a partial", "cuda/group_norm.cuh", "offset = last ? position * p.channels + c : c * p.positions + position;", "offset = static_cast<int>(last ? position * p.channels + c : c * p.positions + position);", "group_norm"),
    Mutant("norm: 32-bit number of a chunk", "cuda/group_norm.cuh", "const int64_t chunk = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;", "const int chunk = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);", "group_norm"),
    Mutant("norm: 32-bit stride of the batch", "cuda/group_norm_grad.cu", "(args.grad_out.data) + place.b * args.grad_out.batch_stride +", "(args.grad_out.data) + static_cast<int>(place.b * args.grad_out.batch_stride) +", "group_norm"),
    Mutant("norm: gradient by the saved statistics of a neighbour", "cuda/group_norm_grad.cu", "c = index % p.channels, at = b * p.groups + c / norm_width(p);", "c = index % p.channels, at = b * p.groups;", "group_norm"),
    Mutant("conv: first row of the image left out", "cpu/conv3x3.cpp", "inside = y >= 0 && y < args.height && x >= 0", "inside = y > 0 && y < args.height && x >= 0", "conv3x3"),
    Mutant("conv: last column of the image left out", "cpu/conv3x3.cpp", "x >= 0 && x < args.width;", "x >= 0 && x < args.width - 1;", "conv3x3"),
    Mutant("conv: last block of inputs forgotten", "cpu/conv3x3.cpp", "block < blocks; ++block", "block < std::max(blocks - 1, int64_t{1}); ++block", "conv3x3"),
    Mutant("conv: sums of earlier blocks lost", "cpu/conv3x3.cpp", "depth, block > 0, kInputs});", "depth, false, kInputs});", "conv3x3"),
    Mutant("conv: panels of a round as if it were the first", "cpu/conv3x3.cpp", "(args.panel + panel) * kConvPanel", "panel * kConvPanel", "conv3x3"),
    Mutant("conv: weights of a task's first panel for its second", "cpu/conv3x3.cpp", "panel + k / kConvPanel) * args.inputs + c", "panel) * args.inputs + c", "conv3x3"),
    Mutant("conv: last tile of the last strip left out", "cpu/conv3x3.cpp", "tiles = std::min(all.strip, all.all - first);", "tiles = std::min(all.strip, all.all - first - (first > 0));", "conv3x3"),
    Mutant("conv: bias forgotten in a last panel", "cpu/conv3x3.cpp", "bias = args.bias == nullptr ? zeros", "bias = args.bias == nullptr || outputs % kConvPanel != 0 ? zeros", "conv3x3"),
    Mutant("conv: taps turned over the diagonal", "cpu/conv3x3.cpp", "tap / 3 * args.stride[2] + tap % 3 * args.stride[3]", "tap % 3 * args.stride[2] + tap / 3 * args.stride[3]", "conv3x3"),
    Mutant("conv: rows as if the image had no border in memory", "cpu/conv3x3.cpp", "y * args.x_row + x * args.x_pixel", "y * args.width * args.x_pixel + x * args.x_pixel", "conv3x3"),
    Mutant("conv: outputs of a square's last input twice", "cpu/conv3x3.cpp", "(output / kInPanel * args.inputs + c0 + c) * kConvPanel", "(output / kInPanel * args.inputs + c0 + std::min(c, kSquare - 2)) * kConvPanel", "conv3x3"),
    Mutant("conv: a tile's last difference turned round", "cpu/winograd.h", "v[3] = sub(d[1], d[3]);", "v[3] = sub(d[3], d[1]);", "conv3x3"),
    Mutant("conv: fourth power of a point for its third", "cpu/winograd.h", "fma(8.0f, difference2, difference1)", "fma(16.0f, difference2, difference1)", "conv3x3"),
    Mutant("conv: twins as one", "cpu/winograd.h", "u[1] = add(add(g[0], g[2]), g[1]);", "u[1] = mul(0.5f, add(add(g[0], g[2]), g[1]));", "conv3x3"),
)  # fmt: skip


def replace_once(text: str, mutant: Mutant) -> str:
    """White space in `old` matches any white space, so that the formatter cannot break a mutant."""
    pattern = r"\s+".join(re.escape(word) for word in mutant.old.split())
    found = re.findall(pattern, text)
    if len(found) != 1:
        raise SystemExit(f"mutant '{mutant.name}': its text must be in {mutant.file} once, found {len(found)}")
    return re.sub(pattern, lambda _: mutant.new, text)


def of_kernels(mutant: Mutant, folder: Path) -> tuple[Path, dict[str, str]]:
    """The tests and their environment. PTX of files that did not change is found in the folder."""
    csrc = folder / "csrc"
    shutil.rmtree(csrc, ignore_errors=True)
    for part in ("core", "cuda"):
        shutil.copytree(ROOT / "csrc" / part, csrc / part)
    file = csrc / mutant.file
    file.write_text(replace_once(file.read_text(), mutant))
    return ROOT / "tests" / "ptx", {"DIFFKERN_PTX_CSRC": str(csrc), "PTXSIM_CACHE": str(folder / "cache")}


def of_the_cpu(mutant: Mutant, folder: Path) -> tuple[Path, dict[str, str]]:
    """The same for a CPU module of the mutant beside a copy of the package. Other mutants' files become right again."""
    tree, site = folder / "tree", folder / "site"
    if not tree.exists():
        shutil.copytree(ROOT / "csrc", tree / "csrc")
        shutil.copy(ROOT / "CMakeLists.txt", tree)
        shutil.copytree(ROOT / "diffkern", tree / "diffkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        shutil.copytree(tree / "diffkern", site / "diffkern")
        configure = ["cmake", "-S", str(tree), "-B", str(folder / "build"), "-G", "Ninja", "-DDIFFKERN_CUDA=off"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-DDIFFKERN_OUTPUT_DIR={site / 'diffkern'}"]
        subprocess.run(configure, check=True, capture_output=True)
    for name in {m.file for m in MUTANTS if m.file.startswith("cpu/")}:
        right, file = (ROOT / "csrc" / name).read_text(), tree / "csrc" / name
        wanted = replace_once(right, mutant) if name == mutant.file else right
        if file.read_text() != wanted:
            file.write_text(wanted)
    subprocess.run(["cmake", "--build", str(folder / "build")], check=True, capture_output=True)
    return ROOT / "tests" / "ops", {"DIFFKERN_SITE": str(site), "PYTHONPATH": str(site)}


def run(mutant: Mutant, folder: Path) -> tuple[str, float]:
    """("caught" | "survived" | what went wrong, seconds)."""
    start = time.monotonic()
    tests, more = (of_the_cpu if mutant.file.startswith("cpu/") else of_kernels)(mutant, folder)
    command = [
        sys.executable,
        str(Path(sys.executable).with_name("pytest")),  # -m would put the tree before a copy
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        "not sm_90 and not sm_75",
    ]
    command += [str(tests / f"test_{mutant.tests}.py")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | more, capture_output=True, text=True)
    seconds = time.monotonic() - start
    if done.returncode == 0:
        return "SURVIVED", seconds
    if done.returncode == 1 and "nvcc failed" not in done.stdout and re.search(r"^FAILED", done.stdout, re.MULTILINE):
        first = re.search(r"^FAILED \S*?(test_\w+\.py\S*)", done.stdout, re.MULTILINE)
        error = re.search(r"^E +(?:ptxsim\.errors\.)?(\w+(?:Error|Exception))", done.stdout, re.MULTILINE)
        return (
            f"caught by {first.group(1) if first else '?'} ({error.group(1) if error else 'AssertionError'})",
            seconds,
        )
    return f"BROKEN: {done.stdout[-400:]}{done.stderr[-200:]}", seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.list:
        print("\n".join(m.name for m in MUTANTS))
        return
    unknown = set(args.names) - {m.name for m in MUTANTS}
    if unknown:
        raise SystemExit(f"no such mutant: {', '.join(sorted(unknown))} (--list shows them)")
    chosen = [m for m in MUTANTS if not args.names or m.name in args.names]
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        for mutant in chosen:
            result, seconds = run(mutant, Path(folder))
            bad += not result.startswith("caught")
            print(f"{mutant.name:42} {mutant.file:18} {seconds:5.0f} s  {result}", flush=True)
    print(f"{len(chosen) - bad} of {len(chosen)} faults caught")
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
