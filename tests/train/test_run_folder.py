"""The folder of a run: one job at a time, a full disk, other clocks and time zones, and wandb's run."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lazy import needs
from helpers.tiny_run import TINY, tiny_data

import diffkern
from diffkern.train import TrainConfig, fit
from diffkern.train import run as run_module
from diffkern.train.log import Log, read_log

pytestmark = needs("yaml", "safetensors", "matplotlib", "PIL")


def run(config: TrainConfig, out: Path | None = None, **options: Any) -> Any:
    return fit(None, tiny_data(), config, out=out, progress=False, **options)


# ---------------------------------------------------------------------------------------------------- one job at a time
HOLDER = """
import sys
from diffkern import storage
with storage.locked(sys.argv[1], 0.0):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_another_job_trains_in_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(dataclasses.replace(TINY, iterations=3), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    place = str(Path(diffkern.__file__).parent.parent)
    pipe, environment = subprocess.PIPE, {**os.environ, "PYTHONPATH": place}
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")], stdin=pipe, stdout=pipe, text=True, env=environment
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        monkeypatch.setattr(run_module, "PATIENCE", 0.1)
        with pytest.raises(ValueError, match=r"the run in .* must be trained by one job at a time, and another"):
            run(dataclasses.replace(TINY, iterations=5), tmp_path)
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        other.kill()
    assert run(dataclasses.replace(TINY, iterations=5), tmp_path).step == 5


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_without_locks_are_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refused)
    assert run(dataclasses.replace(TINY, iterations=2), tmp_path).step == 2


def test_a_log_that_cannot_be_closed_leaves_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "PATIENCE", 0.0)

    def broken(_: Log) -> None:
        raise RuntimeError("no end")

    with monkeypatch.context() as patched:
        patched.setattr(Log, "close", broken)
        with pytest.raises(RuntimeError, match="no end") as kept:
            run(dataclasses.replace(TINY, iterations=2), tmp_path)
    assert run(dataclasses.replace(TINY, iterations=3), tmp_path).step == 3
    assert kept.traceback  # which holds the frames, and with them the run


# ------------------------------------------------------------------------------------------------------------ full disk
def test_a_disk_that_fills_while_logging_ends_the_run_and_loses_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(TINY, iterations=9, log_every=1, save_every=3)
    whole = run(config, tmp_path / "whole")
    write = Log.write

    def full(self: Log, step: int, **values: Any) -> None:
        if step == 5:
            self._file.close()
            self._file = open("/dev/full", "a")  # noqa: SIM115  (closed by Log.close)
        write(self, step, **values)

    with monkeypatch.context() as patched:
        patched.setattr(Log, "write", full)
        with pytest.raises(OSError, match=r"No space left on device: '.*log\.jsonl'") as caught:
            run(config, tmp_path / "full")
    assert caught.value.errno == errno.ENOSPC
    rest = run(config, tmp_path / "full")
    assert rest.losses == whole.losses[3:]
    losses = [[entry["loss"] for entry in read_log(tmp_path / name)] for name in ("whole", "full")]
    assert losses[0] == losses[1]


# ------------------------------------------------------------------------------------------------------- older versions
def test_a_run_from_before_a_field_was_added_goes_on_with_its_default(tmp_path: Path) -> None:
    whole = run(TINY, tmp_path / "whole")
    run(dataclasses.replace(TINY, iterations=3), tmp_path / "old")
    place = tmp_path / "old" / "checkpoints" / "00000003" / "training.json"
    data = json.loads(place.read_text())
    for name in ("times_options", "clip"):
        del data["extra"]["config"][name]
    place.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"config\.clip must be None, as in .*, got 0\.5"):
        run(dataclasses.replace(TINY, clip=0.5), tmp_path / "old")
    assert run(TINY, tmp_path / "old").losses == whole.losses[3:]


# ------------------------------------------------------------------------------------------------ clocks and time zones
@pytest.fixture
def zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "Pacific/Kiritimati")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def test_a_run_is_the_same_in_another_time_zone_and_by_a_clock_that_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    config = dataclasses.replace(TINY, iterations=6, save_every=3, keep=1)
    run(config, tmp_path / "here")
    request.getfixturevalue("zone")
    clock = iter(range(2_000_000_000, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    run(dataclasses.replace(config, iterations=3), tmp_path / "there")
    for path in (tmp_path / "there").rglob("*"):
        os.utime(path, (0, 0))
    run(config, tmp_path / "there")
    files = [
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*.safetensors")}
        for name in ("here", "there")
    ]
    assert len(files[0]) > 2
    assert files[0] == files[1]


# ---------------------------------------------------------------------------------------------------------------- wandb
def test_a_resumed_run_goes_on_in_its_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    began: list[dict[str, Any]] = []
    logged: list[tuple[int, float]] = []

    class Its:
        def log(self, values: dict[str, float], step: int) -> None:
            logged.append((step, values["loss"]))

        def finish(self) -> None:
            pass

    fake: Any = types.ModuleType("wandb")
    fake.init = lambda **given: began.append(given) or Its()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = dataclasses.replace(TINY, iterations=2, log_every=1, wandb="project")
    run(config, tmp_path / "a")
    run(dataclasses.replace(config, iterations=4), tmp_path / "a")
    run(config, tmp_path / "b")
    for path in (tmp_path / "b" / "checkpoints").iterdir():  # as one that was killed before its first checkpoint
        shutil.rmtree(path)
    run(config, tmp_path / "b")
    assert began.pop()["id"] not in [given["id"] for given in began]
    del logged[6:]
    assert [given["id"] for given in began[:2]] == [(tmp_path / "a" / "wandb_id").read_text()] * 2
    assert began[2]["id"] != began[0]["id"]
    assert all(given["resume"] == "allow" and given["project"] == "project" for given in began)
    assert [step for step, _ in logged] == [1, 2, 3, 4, 1, 2]
    assert torch.tensor([loss for _, loss in logged]).isfinite().all()
