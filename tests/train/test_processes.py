"""Training as processes of their own: several ranks, one that dies, one that is killed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import training_process
from helpers.lazy import needs
from helpers.tiny_run import TINY, tiny_data

import diffkern
from diffkern.train import TrainConfig, fit, newest
from diffkern.train.log import read_log

pytestmark = [needs("yaml", "safetensors", "matplotlib", "PIL"), pytest.mark.full]


def command(world: int, *, restarts: int = 0, **options: Any) -> list[str]:
    launcher = [] if world == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    launcher += [f"--max-restarts={restarts}"] if restarts else []
    return [sys.executable, *launcher, training_process.__file__, json.dumps(options)]


def start(world: int, *, restarts: int = 0, **options: Any) -> subprocess.Popen[str]:
    place = str(Path(diffkern.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": place, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command(world, restarts=restarts, **options), stdout=pipe, stderr=pipe, text=True, env=environment
    )


def finish(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "Warning" not in error, error
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def alone(config: TrainConfig, out: Path | None = None) -> list[float]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return fit(None, tiny_data(), config, out=out, progress=False).losses
    finally:
        torch.set_num_threads(threads)


def test_two_processes_train_the_bits_of_one_until_torchrun_is_told_to_end(tmp_path: Path) -> None:
    """Two gradients have one sum. SIGTERM saves the step that is done; then another number of processes goes on."""
    process = start(2, out=str(tmp_path), iterations=1000, log_every=1, pause=0.05)
    begun = time.monotonic()
    while process.poll() is None and time.monotonic() - begun < 90.0 and len(read_log(tmp_path)) < 4:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    entries = read_log(tmp_path)
    last = len(entries)
    assert 4 <= last < 1000
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [f"{last:08d}"]
    config = dataclasses.replace(TINY, iterations=last + 2, micro_batch=4)
    want = alone(config)
    assert [(entry["step"], entry["loss"]) for entry in entries] == list(enumerate(want[:last], start=1))
    assert alone(config, tmp_path) == want[last:]


def test_four_processes_and_uneven_shares_train_the_same_to_rounding() -> None:
    """A batch of ten on four processes: shares of 2, 3, 2 and 3."""
    found = finish(start(4, iterations=4, batch=10))
    want = alone(dataclasses.replace(TINY, iterations=4, batch=10))
    torch.testing.assert_close(found["losses"], want, rtol=1e-5, atol=1e-6)


def test_a_process_that_dies_ends_the_job_with_its_own_error_and_torchrun_starts_it_again(tmp_path: Path) -> None:
    """In step 5, then, from the checkpoint of step 4 on, in step 9; at the end one process goes on from step 8."""
    config = dataclasses.replace(TINY, iterations=10, micro_batch=4, log_every=1, save_every=2)
    options = {"out": str(tmp_path), "iterations": 10, "log_every": 1, "save_every": 2}
    process = start(2, restarts=1, **options, die=[[1, 5], [1, 9]])
    error = process.communicate(timeout=180)[1]
    ended = time.time()
    assert process.returncode != 0
    assert error.count("RuntimeError: process 1 was to end here") == 2
    path = newest(tmp_path)
    assert path is not None
    assert path.name == "00000008"
    assert ended - path.stat().st_mtime < 30.0  # gloo waits for a process that is lost for ten minutes
    want = alone(config)
    assert alone(config, tmp_path) == want[8:]
    assert [entry["loss"] for entry in read_log(tmp_path)] == want


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_a_run_that_is_killed_at_any_moment_goes_on_bit_for_bit(tmp_path: Path, kills: int) -> None:
    """SIGKILL at random moments, while steps are done and while checkpoints are written; then to the end."""
    draw = random.Random(kills)
    config = dataclasses.replace(TINY, iterations=12 * kills, save_every=3, log_every=1)
    want = alone(config)
    options = {"out": str(tmp_path), "iterations": config.iterations, "save_every": 3, "log_every": 1, "pause": 0.02}
    for _ in range(kills):
        process = start(1, **options)
        begun = time.monotonic()
        last = read_log(tmp_path)
        while process.poll() is None and time.monotonic() - begun < 60.0:  # until it has begun
            if len(read_log(tmp_path)) > len(last) or read_log(tmp_path) != last:
                break
            time.sleep(0.02)
        time.sleep(draw.uniform(0.0, 0.4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        whole = [path for path in (tmp_path / "checkpoints").glob("*") if not path.name.startswith(".")]
        assert all((path / "training.json").exists() for path in whole)
    finish(start(1, **{**options, "pause": 0.0}))
    entries = read_log(tmp_path)
    assert [entry["step"] for entry in entries] == list(range(1, config.iterations + 1))
    assert [entry["loss"] for entry in entries] == want
