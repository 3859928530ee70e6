"""Measures training and sampling on one and on two processes, and writes the table into docs/scale-out.md.

    python tools/scaling.py [--repeats 2] [--output docs/scale-out.md]

Needs two idle cores, three minutes. The same code as everybody's: `diffkern.train.fit` and `diffkern.generate` under
torchrun with gloo, one thread a process. Strong scaling: the batch, the number of images stay; weak: those of each
process stay. Beside them two processes at once that do not know of each other: what the machine has for two.
Of training the images a second of the run's log, the median of its lines without the first; of all the best of the
repeats, which take turns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from scale_out import PAGE, filled, table

ROOT = Path(__file__).resolve().parent.parent
BATCH, ITERATIONS, WINDOW = 16, 12, 3
IMAGES, STEPS, MICRO_BATCH = 16, 10, 8
NETWORK = {"channels": 32, "groups": 8}
"""Of ddpm-cifar10, so that a step takes about a second on a core."""


# ------------------------------------------------------------------------------------------------------- one process
def train(batch: int, folder: str) -> float:
    """Images a second of a short run."""
    import torch

    from diffkern.train import TrainConfig, fit
    from diffkern.train.log import read_log

    images = torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(
        network="ddpm-cifar10",
        network_options=NETWORK,
        iterations=ITERATIONS,
        batch=batch,
        log_every=WINDOW,
        threads=1,
        tensorboard=False,
    )
    fit(None, images, config, out=folder, progress=False)
    return statistics.median(entry["images_per_second"] for entry in read_log(folder)[1:])


def sample(n: int) -> float:
    """Images a second of one job of n, from the moment that all processes begin to that at which all have ended."""
    from diffkern import parallel
    from diffkern.generate import generate
    from diffkern.train import TrainConfig, make_diffusion

    config = TrainConfig(network="ddpm-cifar10", network_options=NETWORK)
    diffusion = make_diffusion(config, (3, 32, 32)).eval()
    for _ in generate(diffusion, MICRO_BATCH, "ddim", 1, micro_batch=MICRO_BATCH, share=range):
        pass
    parallel.barrier()
    start = time.perf_counter()
    for _ in generate(diffusion, n, "ddim", STEPS, micro_batch=MICRO_BATCH):
        pass
    parallel.barrier()
    return n / (time.perf_counter() - start)


def work(world: int) -> None:
    """Both for a job of so many processes; the main one prints what it measured."""
    import torch

    from diffkern import parallel

    torch.set_num_threads(1)
    with parallel.job(torch.device("cpu")), tempfile.TemporaryDirectory() as folder:
        shared = parallel.gathered(folder)[0]
        found = {"train strong": train(BATCH, f"{shared}/strong"), "sample strong": sample(IMAGES)}
        if world > 1:
            found["train weak"] = train(world * BATCH, f"{shared}/weak")
            found["sample weak"] = sample(world * IMAGES)
        if parallel.is_main():
            print(json.dumps(found), flush=True)
        parallel.barrier()  # the folder is the main one's


# ------------------------------------------------------------------------------------------------------- all processes
def start(world: int) -> subprocess.Popen[str]:
    launcher = [] if world == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, __file__, "--worker", str(world)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def result(process: subprocess.Popen[str]) -> dict[str, float]:
    out = process.communicate()[0]
    if process.returncode:
        raise SystemExit(f"a measured process ended with {process.returncode}")
    found: dict[str, float] = json.loads(out.splitlines()[-1])
    return found


def measured(repeats: int) -> dict[str, dict[str, float]]:
    """The best of each, by "one", "two" and "apart" (the sum of two that do not know of each other)."""
    every: dict[str, list[dict[str, float]]] = {"one": [], "two": [], "apart": []}
    for _ in range(repeats):
        every["one"].append(result(start(1)))
        every["two"].append(result(start(2)))
        both = [result(process) for process in [start(1), start(1)]]
        every["apart"].append({name: sum(found[name] for found in both) for name in both[0]})
    return {kind: {name: max(f[name] for f in found) for name in found[0]} for kind, found in every.items()}


def report(found: dict[str, dict[str, float]], processor: str, day: str) -> str:
    """The table of `measured`."""
    one, two, apart = found["one"], found["two"], found["apart"]
    what = {
        "train strong": f"training, batch {BATCH}",
        "train weak": f"training, {BATCH} images a process",
        "sample strong": f"sampling {IMAGES} images",
        "sample weak": f"sampling {IMAGES} images a process",
    }
    rows = []
    for name, words in what.items():
        kind, same = name.split()[0] + " strong", two[name]
        cells = [f"{one[kind]:.2f}", f"{same:.2f}", f"{same / one[kind]:.2f}", f"{apart[kind]:.2f}"]
        rows.append([words, *cells, f"{100 * same / apart[kind]:.0f} %"])
    head = ["images/s", "1 process", "2 processes", "times as fast", "2 apart", "job / apart"]
    lines = [table(head, rows), "", f"{processor}, {day}."]
    return "\n".join(lines)


def processor_name() -> str:
    """Of this machine, with its cores."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--output", type=Path, default=PAGE)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments: Any = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    text = report(measured(arguments.repeats), processor_name(), datetime.date.today().isoformat())
    print(text)
    arguments.output.write_text(filled(arguments.output.read_text(), {"measured": text}))


if __name__ == "__main__":
    main()
