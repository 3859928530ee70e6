"""A checkpoint goes on bit for bit; a folder that is full, cut or another run's is one sentence, and stays as it is."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training_cases import Trained, trained
from safetensors.torch import load_file

from diffkern import Diffusion, schedules, storage
from diffkern.train import checkpoint
from diffkern.train.ema import Averages

CONFIG = {"config": {"lr": 1e-3, "widths": [0.05, 0.1]}, "data": "ab12"}


def saved(run: Path, step: int, of: Trained, **options: Any) -> Path:
    diffusion, averages, optimizer = of
    return checkpoint.save(run, step, diffusion=diffusion, averages=averages, optimizer=optimizer, **options)


def loaded(path: Path, into: Trained, **options: Any) -> checkpoint.Loaded:
    diffusion, averages, optimizer = into
    return checkpoint.load(path, diffusion=diffusion, averages=averages, optimizer=optimizer, **options)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trained]:
    """A run saved at step 3, and what was saved."""
    run = tmp_path_factory.mktemp("run")
    state = trained()
    state.steps(1, 3)
    torch.manual_seed(7)
    saved(run, 3, state, extra=CONFIG)
    return run, state


@pytest.fixture
def run(before: tuple[Path, Trained], tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(before[0], tmp_path / "run"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    straight, again = trained(), trained(seed=1)
    straight.steps(1, 2)
    saved(tmp_path, 2, straight, extra=CONFIG)
    drawn = torch.rand(3)
    path = checkpoint.newest(tmp_path)
    assert path is not None
    torch.manual_seed(0)
    found = loaded(path, again, expect=CONFIG)
    assert found == checkpoint.Loaded(step=2, world=1, random=True, extra=CONFIG)
    assert torch.equal(torch.rand(3), drawn)  # torch's generator goes on as well
    assert straight.steps(3, 5) == again.steps(3, 5)
    for a, b in zip(straight.tensors(), again.tensors(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "options",
    [{"name": "SGD", "momentum": 0.9}, {"name": "AdamW", "foreach": True, "betas": (0.8, 0.9)}, {"name": "NAdam"}],
    ids=lambda options: options["name"],
)
def test_any_optimizer_comes_back_with_its_options(tmp_path: Path, options: dict[str, Any]) -> None:
    kind = getattr(torch.optim, options["name"])
    given = {key: value for key, value in options.items() if key != "name"}
    first, second = (
        state._replace(optimizer=kind(state.diffusion.parameters(), lr=0.01, **given))
        for state in (trained(), trained(1))
    )
    first.steps(1, 1)
    first.optimizer.param_groups[0]["lr"] = 0.0025  # as a schedule does
    loaded(saved(tmp_path, 1, first), second)
    assert second.optimizer.state_dict()["param_groups"] == first.optimizer.state_dict()["param_groups"]
    assert first.steps(2, 3) == second.steps(2, 3)


def test_a_run_opens_as_a_diffusion_with_the_average_that_is_asked_for(before: tuple[Path, Trained]) -> None:
    run, state = before
    for average, tensors in {
        None: state.averages.tensors("0.050"),
        "0.050": state.averages.tensors("0.050"),
        "0.100": state.averages.tensors("0.100"),
        "plain": state.averages.tensors("plain"),
        "raw": state.diffusion.state_dict(),
    }.items():
        found = Diffusion.from_pretrained(run, average=average).state_dict()
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in found)
    assert not torch.equal(*(Diffusion.from_pretrained(run, average=a).model.leave.weight for a in ("raw", "plain")))
    sentence = r"average must be one of those in .*00000003 \(0.050, 0.100, plain, raw\), got '0.2'"
    with pytest.raises(ValueError, match=sentence):
        Diffusion.from_pretrained(run, average="0.2")
    assert Diffusion.from_pretrained(run / "checkpoints" / "00000003").shape == state.diffusion.shape


def test_the_newest_are_kept_and_averages_of_some_steps_outlive_them(tmp_path: Path) -> None:
    state = trained(decay=None)
    for step in range(2, 9, 2):
        state.steps(step, step)
        saved(tmp_path, step, state, keep=2, keep_every=4)
    assert checkpoint.steps(tmp_path) == [6, 8]
    assert checkpoint.newest(tmp_path) == tmp_path / "checkpoints" / "00000008"
    names = [f"{step:08d}-{name}.safetensors" for step in (4, 8) for name in ("0.050", "0.100")]
    assert sorted(os.listdir(tmp_path / "snapshots")) == names
    assert load_file(tmp_path / "snapshots" / names[2]).keys() == state.diffusion.state_dict().keys() | {"null"}


def test_without_averages_and_optimizer_the_weights_are_the_checkpoint(tmp_path: Path) -> None:
    diffusion, other = trained().diffusion, trained(1).diffusion
    path = checkpoint.save(tmp_path, 0, diffusion=diffusion)
    assert checkpoint.load(path, diffusion=other).step == 0
    assert torch.equal(diffusion.model.leave.weight, other.model.leave.weight)
    assert torch.equal(Diffusion.from_pretrained(tmp_path).model.leave.weight, diffusion.model.leave.weight)


def test_weights_of_other_names_are_not_saved_as_the_networks(tmp_path: Path) -> None:
    diffusion = trained().diffusion
    for weights in ({"gone": torch.zeros(3)}, {"leave.bias": torch.zeros(3)}):
        with pytest.raises(ValueError, match=r"weights must have names and shapes of the network's, got \[3\] for "):
            diffusion.save_pretrained(tmp_path / "none", weights=weights)
    assert not (tmp_path / "none").exists()


# ------------------------------------------------------------------------------------------------------ another run's


def test_a_checkpoint_of_another_run_is_named_by_what_differs_and_changes_nothing(before: tuple[Path, Trained]) -> None:
    path = checkpoint.newest(before[0])
    assert path is not None
    state = trained(1)
    kept = [tensor.clone() for tensor in state.tensors()]
    other = {"config": {"lr": 1e-3, "widths": [0.05, 0.2]}, "data": "ab12"}
    cases: list[tuple[str, Trained, dict[str, Any]]] = [
        (r"config.widths\[1\] must be 0.1, as in .*00000003, got 0.2", state, {"expect": other}),
        ("data must be 'ab12', as in .*, got 'cd34'", state, {"expect": {"data": "cd34"}}),
        ("network.config.blocks must be 1, as in .*, got 2", trained(blocks=2), {}),
        ("averages must be .*'plain'.*, as in .*, got", trained(decay=None), {}),
        (
            "optimizer.kind must be 'AdamW', as in .*, got 'SGD'",
            state._replace(optimizer=torch.optim.SGD(state.diffusion.parameters())),
            {},
        ),
        (
            r"optimizer.parameters\[0\] must be .*, as in .*, got",
            state._replace(optimizer=torch.optim.AdamW(state.diffusion.model.leave.parameters())),
            {},
        ),
        (
            "schedule.* must be .*, as in .*, got",
            state._replace(diffusion=Diffusion(state.diffusion.model, schedules.linear(20), "v")),
            {},
        ),
    ]
    for sentence, into, options in cases:
        with pytest.raises(ValueError, match=sentence) as error:
            loaded(path, into, **options)
        assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(kept, state.tensors(), strict=True))


def test_a_damaged_checkpoint_is_named_and_changes_nothing(run: Path) -> None:
    path = run / "checkpoints" / "00000003"
    state = trained(1)
    kept = [tensor.clone() for tensor in state.tensors()]

    def refused(sentence: str) -> None:
        with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
            loaded(path, state)
        assert "\n" not in str(error.value)

    optimizer = path / "optimizer.safetensors"
    whole = optimizer.read_bytes()
    optimizer.write_bytes(whole[:-1000])
    refused(rf"optimizer.safetensors must have {len(whole)} bytes, got {len(whole) - 1000}: the checkpoint is damaged")
    optimizer.write_bytes(b"\xff" * len(whole))
    refused("optimizer.safetensors must be a safetensors file, got none")
    optimizer.unlink()
    refused(rf"optimizer.safetensors must have {len(whole)} bytes, got no such file: .* without the folder")
    training = path / "training.json"
    text = training.read_text()
    training.write_text(text[:100])
    refused("training.json must be JSON, got")
    training.write_text(text.replace('"diffkern_training": 1', '"diffkern_training": 2'))
    refused("training.json must be of a checkpoint with diffkern_training = 1, got 2")
    training.write_text(text.replace('"step": 3', '"step": "3"'))
    refused("training.json: step must be an integer, got '3'")
    training.unlink()
    refused("there is no training.json in")
    assert all(torch.equal(a, b) for a, b in zip(kept, state.tensors(), strict=True))


# ---------------------------------------------------------------------------------------------------------- the disk


def test_a_disk_that_is_full_leaves_the_run_as_it_was(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept, state = contents(run), trained()

    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(storage, "flushed", full)
    sentence = r"No space left on device \(no checkpoint written, the newest is 00000003\): '.*00000004'"
    with pytest.raises(OSError, match=sentence) as error:
        saved(run, 4, state, keep=1)
    assert error.value.errno == errno.ENOSPC
    assert contents(run) == kept
    assert os.listdir(run / "checkpoints") == ["00000003"]


def test_safetensors_errors_of_the_disk_are_the_systems(tmp_path: Path) -> None:
    from safetensors import SafetensorError

    with pytest.raises(OSError, match="No space left on device: 'here'") as error, storage.filling("here"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert error.value.errno == errno.ENOSPC
    with pytest.raises(SafetensorError), storage.filling("here"):
        raise SafetensorError("Error while serializing: another")


def test_a_step_that_has_a_checkpoint_is_not_written_again(run: Path) -> None:
    kept = contents(run)
    with pytest.raises(FileExistsError, match=r"the step has a checkpoint already, which is left as it is: .*00000003"):
        saved(run, 3, trained())
    assert contents(run) == kept


def test_what_killed_writers_left_is_removed_by_the_next(run: Path) -> None:
    left = run / "checkpoints" / ".00000004.0123456789abcdef.part"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"cut")
    assert checkpoint.steps(run) == [3]
    saved(run, 4, trained())
    assert sorted(os.listdir(run / "checkpoints")) == ["00000003", "00000004"]


def test_a_snapshot_that_a_killed_writer_did_not_make_is_made_by_the_next(run: Path) -> None:
    state = trained()
    saved(run, 4, state, keep=1, keep_every=3)
    assert {name[:8] for name in os.listdir(run / "snapshots")} == {"00000003"}


def test_hard_links_are_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, place: Path) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM), str(source))

    monkeypatch.setattr(os, "link", refuse)
    diffusion = trained().diffusion
    path = checkpoint.save(tmp_path, 1, diffusion=diffusion)
    assert (path / "model.safetensors").read_bytes() == (path / "average-raw.safetensors").read_bytes()


def test_what_cannot_be_stored_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    state = trained()
    foreign = torch.optim.SGD([*state.diffusion.parameters(), torch.nn.Parameter(torch.zeros(5))])
    cases: Iterator[tuple[str, dict[str, Any]]] = iter(
        [
            ("keep must be at least 1 or None, got 0", {"keep": 0}),
            ("extra must be what JSON holds, got .*nan", {"extra": {"loss": float("nan")}}),
            ("extra must be what JSON holds, got", {"extra": {"config": object()}}),
            (
                r"optimizer must hold parameters of the network alone, got another, of shape \[5\]",
                {"optimizer": foreign},
            ),
        ]
    )
    for sentence, options in cases:
        with pytest.raises(ValueError, match=sentence):
            checkpoint.save(tmp_path / "run", 1, diffusion=state.diffusion, **options)
    assert not (tmp_path / "run").exists()


def test_the_parts_are_plain_files(before: tuple[Path, Trained]) -> None:
    """Names by the network's parameters, sizes listed, no pickle: what other programs read."""
    run, state = before
    path = run / "checkpoints" / "00000003"
    data = json.loads((path / "training.json").read_text())
    assert data["step"] == 3
    assert data["extra"] == CONFIG
    assert data["files"] == {f.name: f.stat().st_size for f in path.iterdir() if f.name != "training.json"}
    moments = load_file(path / "optimizer.safetensors")
    own = {
        f"{n}.{key}" for n, _ in state.diffusion.model.named_parameters() for key in ("step", "exp_avg", "exp_avg_sq")
    }
    assert {name for name in own if "classes" not in name} <= moments.keys() <= own
    assert all(re.fullmatch(r".*\.(json|safetensors)", name) for name in os.listdir(path))


def test_a_checkpoint_has_the_bytes_of_six_networks(before: tuple[Path, Trained]) -> None:
    """Weights, two moments, three averages: 4 P (3 + 3); AdamW has a number a tensor, a network one for "no class"."""
    run, state = before
    parameters = list(state.diffusion.parameters())
    stepped = len(state.optimizer.state)
    silent = sum(p.numel() for p in parameters if p not in state.optimizer.state)
    total = 0
    for path in {
        file.stat().st_ino: file for file in (run / "checkpoints" / "00000003").glob("*.safetensors")
    }.values():
        if path.name != "random.safetensors":
            total += path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    want = 4 * (6 * sum(p.numel() for p in parameters) - 2 * silent + stepped) + 4 * 8
    assert total == want


def test_averages_of_the_network_alone_are_the_same_file(tmp_path: Path) -> None:
    state = trained()
    averages = Averages(state.diffusion.model, widths=(0.05,))
    with torch.no_grad():
        state.diffusion.model.leave.bias.fill_(2.0)
    averages.update(1)
    path = checkpoint.save(tmp_path, 1, diffusion=state.diffusion, averages=averages)
    other = trained(1).diffusion
    again = Averages(other.model, widths=(0.05,))
    checkpoint.load(path, diffusion=other, averages=again)
    assert again.step == 1
    assert torch.equal(again.tensors("0.050")["leave.bias"], torch.full_like(other.model.leave.bias, 2.0))
