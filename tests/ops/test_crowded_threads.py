"""Threads that share one core: a parallel region waits for the one that cannot start, once, and not every time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import diffkern

PROGRAM = """
import json, os, statistics, sys, time
import torch
from diffkern import ops
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # the pool of threads, too, is made on this core
seeds, out = torch.arange(4), torch.empty(4, 3, 128, 128)
times, bits = {}, []
for threads in (1, 2):
    torch.set_num_threads(threads)
    taken = []
    for i in range(150):
        start = time.perf_counter()
        ops.randn(out.shape, seeds, out=out)
        taken.append(time.perf_counter() - start)
    times[threads] = statistics.median(taken)
    bits.append(out.clone())
print(json.dumps([times[1], times[2], torch.equal(*bits)]))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
@pytest.mark.full
def test_two_threads_on_one_core_are_nearly_as_fast_as_one() -> None:
    """Each would wait for the other's slice of time, some milliseconds, in every call of a fraction of one."""
    folder = Path(diffkern.__file__).parent.parent
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    environment["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    one, two, same = json.loads(done.stdout)
    assert same
    assert two <= 2 * one, f"{two * 1e3:.2f} ms with two threads, {one * 1e3:.2f} ms with one"
