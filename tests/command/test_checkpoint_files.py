"""Checkpoints of the demo that are not what they say, read and refused; and files that two writers or a full disk
meet."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lazy import needs
from torch import nn

from diffkern.__main__ import main
from diffkern.demo import checkpoint
from diffkern.demo.checkpoint import Recipe
from diffkern.nn import UNet, UNetConfig

pytestmark = needs("safetensors")

TINY = UNetConfig(channels=8, blocks=1, heads=2, embedding=16)
RECIPE = Recipe(unet=TINY, timesteps=10)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return {name: t.contiguous() for name, t in UNet(TINY).state_dict().items()}


def write(path: Path, weights: dict[str, torch.Tensor], metadata: str) -> Path:
    from safetensors.torch import save_file

    save_file(weights, path, metadata={"diffkern_demo": metadata})
    return path


def changed(**entries: Any) -> str:
    """The metadata of RECIPE with other entries; those of the network by ``unet_NAME``."""
    values: dict[str, Any] = {"format": 1, **dataclasses.asdict(RECIPE)}
    for name, value in entries.items():
        of, key = (values["unet"], name.removeprefix("unet_")) if name.startswith("unet_") else (values, name)
        of[key] = value
    return json.dumps(values)


BAD: dict[str, tuple[str, str]] = {
    "a list": ("[1, 2]", r"its metadata must be the JSON of a recipe of format 1, got '\[1, 2\]'"),
    "a number": ("7", r"its metadata must be the JSON of a recipe of format 1, got '7'"),
    "no JSON": ("{", r"its metadata must be the JSON of a recipe, got '\{'"),
    "deep": ("[" * 100_000, r"its metadata must be the JSON of a recipe, got .* \(nested too deeply\)"),
    "another format": (changed(format=2), "its metadata must be the JSON of a recipe of format 1"),
    "format true": (changed(format=True), "its metadata must be the JSON of a recipe of format 1"),
    "unknown name": (changed(colour=1), "Recipe has the fields unet, schedule, .*, got 'colour'"),
    "schedule": (changed(schedule="sine"), "schedule must be one of cosine, linear, got 'sine'"),
    "schedule's type": (changed(schedule=[1]), r"Recipe.schedule must be text, got \[1\]"),
    "timesteps": (changed(timesteps="10"), "Recipe.timesteps must be an integer, got '10'"),
    "timesteps true": (changed(timesteps=True), "Recipe.timesteps must be an integer, got True"),
    "timesteps huge": (changed(timesteps=10**12), r"timesteps must lie in 2\.\.1000000, got 1000000000000"),
    "prediction": (changed(prediction="noise"), "prediction must be one of .*, got 'noise'"),
    "guidance": (changed(guidance=None), "Recipe.guidance must be a finite number, got None"),
    "guidance huge": (changed(guidance=10**400), "Recipe.guidance must be a finite number, got 1000"),
    "guidance NaN": (changed(guidance=float("nan")), r"its metadata must be the JSON of a recipe.*NaN is no JSON"),
    "micro_batch": (changed(micro_batch=0), r"micro_batch must lie in 1\.\.2\*\*31 - 1, got 0"),
    "seed": (changed(seed=2**64), "seed must be an integer of 64 bits, got 18446744073709551616"),
    "training": (changed(training=3), "Recipe.training must be an object, got 3"),
    "network": (changed(unet=[]), r"Recipe.unet must be an object, got \[\]"),
    "network's name": (changed(unet_depth=3), "Recipe.unet has the fields image_size, .*, got 'depth'"),
    "network's type": (changed(unet_heads="2"), "Recipe.unet.heads must be an integer, got '2'"),
    "multipliers": (changed(unet_multipliers=[1, "2"]), r"Recipe.unet.multipliers\[1\] must be an integer, got '2'"),
    "many levels": (changed(unet_multipliers=[1] * 40, unet_image_size=2**39), "must be at most"),
    "modulation": (changed(unet_modulation=1), "Recipe.unet.modulation must be one of 'scale_shift', 'add', got 1"),
    "image_size": (changed(unet_image_size=2048), "unet.image_size must be one number, at most 1024, got 2048"),
    "embedding": (changed(unet_embedding=2**40), "UNetConfig.embedding must be at most 1048576, got 1099511627776"),
    "wide": (changed(unet_channels=512), r"size mismatch: Recipe.unet asks for .* of shape \[.*512.*the file has"),
    "blocks": (
        changed(unet_blocks=10**3),
        r"Recipe.unet asks for 4006 residual blocks, and the file has \d+ tensors",
    ),
    "few blocks": (changed(unet_blocks=2), r"size mismatch: Recipe.unet asks for .*, and the file has"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_recipe_that_is_none_is_one_sentence(
    weights: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, name: str
) -> None:
    """And nothing of the size that it asks for is made: modules with memory are refused here."""
    made = nn.Conv2d.__init__

    def on_meta(self: nn.Conv2d, *arguments: Any, **named: Any) -> None:
        made(self, *arguments, **named)
        assert self.weight.is_meta, "a module was built before the check"

    monkeypatch.setattr(nn.Conv2d, "__init__", on_meta)
    metadata, sentence = BAD[name]
    path = write(tmp_path / "model.safetensors", weights, metadata)
    assert main(["sample", "--checkpoint", str(path), "--quiet", "--out", str(tmp_path / "no.png")]) == 2
    printed = capsys.readouterr().err.strip()
    assert re.search(sentence, printed), printed
    assert printed.startswith("diffkern sample: ")
    assert len(printed.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_weights_of_half_precision_are_widened(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = write(tmp_path / "half", {name: t.bfloat16() for name, t in weights.items()}, changed())
    model, recipe = checkpoint.load(path)
    assert recipe == RECIPE
    assert {t.dtype for t in model.state_dict().values()} == {torch.float32}
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name].bfloat16().float())


def test_tensors_that_the_network_lacks_are_named(weights: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = write(tmp_path / "more", {**weights, "extra.weight": torch.zeros(2)}, changed())
    with pytest.raises(ValueError, match=r"asks for extra.weight of shape none, and the file has \[2\]"):
        checkpoint.load(path)


# ------------------------------------------------------------------------------------------------- writing the file
def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    model = UNet(TINY)
    checkpoint.save(path, model, RECIPE)
    before = path.read_bytes()
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, full_disk)
            with pytest.raises(OSError, match=r"No space left on device: '.*model.safetensors'"):
                checkpoint.save(path, model, dataclasses.replace(RECIPE, seed=1))
        assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"], call
        assert path.read_bytes() == before


def test_two_writers_leave_the_file_of_one(tmp_path: Path) -> None:
    """Whole, whichever came last; and none of theirs in between is left."""
    path, models = tmp_path / "model.safetensors", [UNet(TINY) for _ in range(2)]
    start = threading.Barrier(2)
    failed: list[BaseException] = []

    def writer(seed: int) -> None:
        try:
            start.wait()
            for _ in range(15):
                checkpoint.save(path, models[seed], dataclasses.replace(RECIPE, seed=seed))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=writer, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
    found, recipe = checkpoint.load(path)
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, models[recipe.seed].state_dict()[name])


@pytest.mark.parametrize("arguments", [("plan", "make", "ddim", "steps=3", "-o")], ids=["plan"])
def test_a_full_disk_leaves_the_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: tuple[str, ...]
) -> None:
    file = tmp_path / "plan.json"
    file.write_text("mine")
    monkeypatch.setattr(os, "fsync", full_disk)
    assert main([*arguments, str(file)]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("plan.json", "mine")]
