"""What `save_pretrained` writes is what `from_pretrained` gives; a file that does not fit is refused."""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.diffusion_cases import Exact, small_unet
from safetensors.torch import load_file, save_file
from torch import nn

from diffkern import Diffusion, schedules, storage
from diffkern.objectives import time_sampling, weightings

SCHEDULE = schedules.cosine(20)


def made(**options: Any) -> Diffusion:
    return Diffusion(small_unet(), SCHEDULE, "v", **options)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    made().save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def changed(folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    path = folder / "config.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    return folder


def refused(sentence: str, path: Path | str, *args: Any, **options: Any) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=sentence) as error:
        Diffusion.from_pretrained(path, *args, **options)
    assert "\n" not in str(error.value)


def test_all_that_it_holds_comes_back(tmp_path: Path) -> None:
    diffusion = made(
        weight=weightings.MinSNR(3.0), target="x0", times=time_sampling.LogitNormal(-0.5), drop=0.25, time_scale=2.0
    )
    diffusion.save_pretrained(tmp_path / "a" / "b")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["config.json", "model.safetensors"]
    assert len({path.stat().st_mode for path in (tmp_path / "a" / "b").iterdir()}) == 1, "who reads one reads both"
    before = torch.get_rng_state()
    back = Diffusion.from_pretrained(tmp_path / "a" / "b")
    assert torch.equal(torch.get_rng_state(), before), "torch's generator stays where it was"
    assert not back.training
    names = (
        "schedule",
        "prediction",
        "weight",
        "target",
        "times",
        "drop",
        "time_scale",
        "shape",
        "null",
        "learned_variance",
    )
    assert {name: getattr(back, name) for name in names} == {name: getattr(diffusion, name) for name in names}
    assert back.model.config == diffusion.model.config
    x0 = torch.linspace(-1.0, 1.0, 64).reshape(1, 1, 8, 8)
    assert torch.equal(back.loss(x0, seeds=0), diffusion.eval().loss(x0, seeds=0))
    assert torch.equal(back.sample(2, steps=3, seeds=0), diffusion.sample(2, steps=3, seeds=0))


def test_the_networks_own_weights_are_in_the_file_by_name(saved: Path) -> None:
    weights = load_file(saved / "model.safetensors")
    net = small_unet(seed=1)
    net.load_state_dict({name.removeprefix("model."): t for name, t in weights.items() if name.startswith("model.")})
    assert torch.equal(net.enter.weight, small_unet().enter.weight)
    assert int(weights["null"]) == 3


def test_sixteen_bits_stay_sixteen_bits(tmp_path: Path) -> None:
    made().to(torch.bfloat16).save_pretrained(tmp_path)
    back = Diffusion.from_pretrained(tmp_path)
    assert back.model.enter.weight.dtype == torch.bfloat16
    assert Diffusion.from_pretrained(tmp_path, dtype=torch.float32).model.enter.weight.dtype == torch.float32


def test_a_network_of_the_users_is_given_again_and_nothing_is_imported(tmp_path: Path) -> None:
    net = Exact(SCHEDULE, "v")
    nn.init.ones_(net.nothing)
    Diffusion(net, SCHEDULE, "v", null=torch.tensor([1.0, 2.0]), shape=(3,)).save_pretrained(tmp_path)
    refused(r"model must be given, as .* 'helpers.diffusion_cases.Exact', .*: from_pretrained\(path, model=", tmp_path)
    back = Diffusion.from_pretrained(tmp_path, model=Exact(SCHEDULE, "v"))
    assert float(back.model.nothing) == 1.0
    assert back.null.tolist() == [1.0, 2.0]
    assert back.shape == (3,)
    refused("must fit the network, got", tmp_path, model=nn.Linear(2, 2))
    evil = changed(tmp_path, lambda data: data.update(network={"name": "os.system", "config": {}}))
    refused("network.name must be one of UNet.*, got 'os.system'", evil)


def test_tied_weights_and_wrapped_networks_are_saved_as_the_network(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.second = nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

    net = Tied()
    Diffusion(torch.compile(net), SCHEDULE, "v").save_pretrained(tmp_path)
    back = Diffusion.from_pretrained(tmp_path, model=Tied())
    assert back.model.second.weight is back.model.first.weight
    assert torch.equal(back.model.first.weight, net.first.weight)


def test_a_path_of_functions_is_given_again_and_known_by_its_values(tmp_path: Path) -> None:
    def path(power: float) -> schedules.Schedule:
        return schedules.path(lambda t: t**power, lambda t: 1 - t, name="mine")

    Diffusion(small_unet(), path(1.0), weight=lambda log_snr, prediction: log_snr.exp()).save_pretrained(tmp_path)
    refused(r"schedule must be given, as 'mine' is made of functions.*from_pretrained\(path, schedule=", tmp_path)
    refused("schedule must be the one that the network was trained with, 'mine'", tmp_path, schedule=path(1.5))
    refused(r"weight must be given, .* was Custom: from_pretrained\(path, weight=", tmp_path, schedule=path(1.0))
    back = Diffusion.from_pretrained(tmp_path, schedule=path(1.0), weight="snr")
    assert back.weight == weightings.WEIGHTINGS["snr"]


def test_another_schedule_than_that_of_the_file_is_refused(saved: Path) -> None:
    refused("schedule must be the one that the network was trained with", saved, schedule=schedules.linear(20))
    assert Diffusion.from_pretrained(saved, schedule=schedules.cosine(20)).schedule == SCHEDULE


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda data: data.clear(), "must be the configuration of a Diffusion with diffkern_diffusion = 1, got None"),
        (lambda data: data.update(diffkern_diffusion=2), "with diffkern_diffusion = 1, got 2"),
        (lambda data: data.pop("schedule"), "schedule must be given, got none"),
        (lambda data: data.update(prediction=3), "prediction must be .*, got 3"),
        (lambda data: data.update(prediction="w"), "prediction must be one of 'eps', 'x0', .*, got 'w'"),
        (lambda data: data.update(time_scale="1"), "time_scale must be .*, got '1'"),
        (lambda data: data.update(drop=float("nan")), "must be JSON, got .*NaN is no JSON number"),
        (lambda data: data.update(drop=1), r"drop must lie in \[0, 1\), got 1"),
        (lambda data: data.update(learned_variance=1), "learned_variance must be true or false, got 1"),
        (lambda data: data.update(times=None), "times must be an object, got None"),
        (lambda data: data.update(tmies=None), "config.json has the fields prediction, schedule, .*, got 'tmies'"),
        (lambda data: data.update(shape=[1, -8]), "shape must be a list of sizes"),
        (lambda data: data.update(null={"shape": [10**9], "dtype": "float32"}), "null must have a shape and a dtype"),
        (lambda data: data.update(null={"shape": [], "dtype": "load"}), "null must have a shape and a dtype"),
        (lambda data: data["network"]["config"].update(channels="16"), "network.config.channels must be an integer"),
        (lambda data: data["network"]["config"].update(channels=24), "weights in .* must be those of its network"),
        (lambda data: data["network"]["config"].update(embedding=2**20), "weights in .* must be|one that fails"),
        (lambda data: data["network"]["config"].update(channels=2**30), "UNetConfig.channels must be at most 1048576"),
        (lambda data: data["network"]["config"].update(heads=0), "UNetConfig.heads must be at least 1"),
        (lambda data: data["network"]["config"].update(blocks=10**3), "network.config.blocks must fit .* got 1000"),
        (lambda data: data["network"]["config"].update(classes=10**6), "weights in .* must be those of its network"),
        (lambda data: data["network"]["config"].update(colour=1), "has the fields image_size"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused_by_its_field(copy: Path, change: Any, sentence: str) -> None:
    refused(sentence, changed(copy, change))


def test_broken_files_are_refused(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(b"not tensors")
    refused("must be a safetensors file", copy)
    (copy / "model.safetensors").unlink()
    refused("there is no model.safetensors in", copy)
    (copy / "config.json").write_text("[" * 100_000)
    (copy / "model.safetensors").write_bytes(b"")
    refused("must be JSON, got .*nested too deeply", copy)
    (copy / "config.json").unlink()
    refused("there is no config.json in .*: Diffusion.save_pretrained writes it", copy)
    refused("there is no folder .*, and it is no repository 'owner/name'", copy / "nowhere")


def test_a_missing_tensor_is_named(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    weights.pop("model.enter.bias")
    save_file(weights, copy / "model.safetensors")
    refused(re.escape("got nothing for model.enter.bias, which has [16]"), copy)


@pytest.mark.parametrize("failing", ["model.safetensors", "config.json"])
def test_a_save_that_fails_leaves_what_was_there(copy: Path, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    written = []

    def open_for_sync(path: str, *args: Any) -> Any:
        written.append(str(path))
        if Path(path).name.startswith(failing) and "rb" in args:
            raise OSError(errno.ENOSPC, "no space left on device")
        return open(path, *args)

    monkeypatch.setattr(storage, "open", open_for_sync, raising=False)
    with pytest.raises(OSError, match=f"no space left on device: .*{failing}'"):
        Diffusion(small_unet(seed=2), SCHEDULE, "eps").save_pretrained(copy)
    assert [Path(path).name.split(".")[0] for path in written] == ["config", "model", "model", "config"][: len(written)]
    after = {path.name: path.read_bytes() for path in copy.iterdir()}
    assert after.keys() == before.keys()
    assert after["config.json"] == before["config.json"]
    if failing == "model.safetensors":
        assert after == before


def test_a_repository_is_fetched_by_huggingface_hub(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def hf_hub_download(repository: str, name: str, **options: Any) -> str:
        asked.append((repository, name, options))
        return str(saved / name)

    hub = types.SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)  # type: ignore[arg-type]
    back = Diffusion.from_pretrained("owner/digits", revision="main")
    assert back.schedule == SCHEDULE
    names = ("config.json", "model.safetensors")
    assert asked == [("owner/digits", name, {"revision": "main"}) for name in names]
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # type: ignore[arg-type]
    with pytest.raises(ImportError, match=r"from the hub needs huggingface_hub, .*: pip install huggingface_hub"):
        Diffusion.from_pretrained("owner/digits")
    refused("revision must go with a repository of the hub", saved, revision="main")
