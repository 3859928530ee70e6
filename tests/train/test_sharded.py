"""Networks that FSDP2 has cut, on 2 and 4 processes, beside one process with the whole network; their checkpoints."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.diffusion_cases import small_unet
from helpers.training_cases import TINY
from torch import nn

from diffkern.nn import DiT, DiTConfig, UNet
from diffkern.train.sharded import pieces_of, shard

full = pytest.mark.full


@pytest.fixture(scope="module")
def found(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program of the jobs has seen."""
    program = [sys.executable, str(root / "tests/helpers/sharded_jobs.py"), str(tmp_path_factory.mktemp("jobs"))]
    paths = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(root / "tests")]).strip(os.pathsep)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(program, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@full
def test_two_processes_with_parts_train_what_one_trains_with_the_whole(found: dict[str, Any]) -> None:
    assert found["two"]["losses"] == pytest.approx(found["want"][:3], abs=1e-6)
    assert found["two"]["unet"] == pytest.approx(found["want_unet"], abs=1e-6)
    assert found["two"]["images"] == pytest.approx(found["want_images"], abs=1e-5)
    assert found["two"]["pieces"] == 3  # the modulation, the block, the rest


@full
def test_averages_of_parts_are_used_and_put_back(found: dict[str, Any]) -> None:
    """Also where FSDP2 has kept the weights of a call without gradients."""
    own, averaged, again = found["two"]["held_out"]
    assert [own, averaged, again] == pytest.approx(found["want_held_out"], abs=1e-6)
    assert own == again
    assert abs(own - averaged) > 1e-3


@full
def test_a_checkpoint_goes_on_at_another_number_of_processes(found: dict[str, Any]) -> None:
    """Whole: from two on one. In parts: from two on four, and from four on one."""
    want = found["want"]
    assert found["four"]["losses"] == pytest.approx(want[3:5], abs=1e-6)
    assert (found["four"]["world"], found["four"]["random"]) == (2, False)
    assert found["last"]["whole"]["losses"] == pytest.approx(want[3:], abs=1e-6)
    assert found["last"]["parts"]["losses"] == pytest.approx(want[5:], abs=1e-6)
    assert [found["last"][name]["step"] for name in ("whole", "parts")] == [3, 5]


@full
def test_averages_are_whole_files_that_open_as_a_diffusion(found: dict[str, Any]) -> None:
    assert [found["last"][name]["averages"] for name in ("whole", "parts")] == [0.0, 0.0]
    assert {"shards", "rest.safetensors"} <= set(found["last"]["parts"]["files"])
    assert not {"shards", "rest.safetensors"} & set(found["last"]["whole"]["files"])


@full
def test_every_process_is_told_of_a_full_disk_of_any(found: dict[str, Any]) -> None:
    assert len(found["two"]["full"]) == 2
    for second, first, left in found["two"]["full"]:
        for number, sentence in (second, first):
            assert number == errno.ENOSPC
            assert "No space left on device (no checkpoint written, the newest is none)" in sentence
        assert left == ["00000002"]


def test_the_pieces_are_every_block_and_what_runs_before_them() -> None:
    with torch.device("meta"):
        dit = DiT(DiTConfig(image_size=8, patch=4, width=16, depth=3, heads=2))
    assert pieces_of(dit) == [[block.modulate for block in dit.blocks], *([block] for block in dit.blocks)]
    unet = small_unet(**TINY)
    early, *blocks = pieces_of(unet)
    assert isinstance(unet, UNet)
    assert early == unet._modulations()[: len(early)]
    assert len(blocks) == len(early)


def test_pieces_of_other_networks_are_those_that_they_name() -> None:
    class Block(nn.Linear):
        pass

    network: Any = nn.Sequential(Block(2, 2), nn.Linear(2, 2), Block(2, 2))
    assert pieces_of(network) == []
    network._no_split_modules = ["Block"]
    assert pieces_of(network) == [[network[0]], [network[2]]]


def test_a_network_is_cut_in_a_job_alone() -> None:
    with pytest.raises(RuntimeError, match=r"shard needs a job of torch.distributed \(torchrun, .*\), got none"):
        shard(nn.Linear(2, 2))
