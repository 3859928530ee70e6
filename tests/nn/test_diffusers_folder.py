"""Folders of diffusers: read without the net, written so that diffusers reads them, and files that are none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import diffusers_networks as networks
from helpers.diffusers_networks import TINY, theirs
from helpers.lazy import Lazy, needs
from helpers.suites import few
from helpers.unet_cases import awake, config

from diffkern.nn import UNet

diffusers, safetensors = Lazy("diffusers"), Lazy("safetensors.torch")
pytestmark = needs("diffusers", "safetensors")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SD 1.x-like network as diffusers' `save_pretrained` writes it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("sd")
    networks.build(TINY["sd 1"]).save_pretrained(folder)
    return folder


def copied(saved: Path, to: Path) -> Path:
    to.mkdir(parents=True, exist_ok=True)
    for file in saved.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def state_of(network: UNet) -> list[torch.Tensor]:
    return list(network.state_dict().values())


@pytest.mark.parametrize("name", few(TINY, "ddpm", "sdxl"))
def test_what_we_write_diffusers_reads(name: str, tmp_path: Path) -> None:
    original = networks.build(TINY[name])
    original.save_pretrained(tmp_path / "theirs")
    UNet.from_diffusers(tmp_path / "theirs").to_diffusers(tmp_path / "ours", sample_size=8)
    again = getattr(diffusers, TINY[name]["_class_name"]).from_pretrained(tmp_path / "ours")
    assert again.config.sample_size == 8
    x, t, cond = networks.inputs(TINY[name])
    with torch.no_grad():
        torch.testing.assert_close(theirs(again, x, t, cond), theirs(original, x, t, cond), rtol=1e-5, atol=1e-5)


def test_no_class_is_the_last_of_theirs_where_it_was_trained(tmp_path: Path) -> None:
    network = awake(config(classes=3, modulation="add", resample="conv"))
    network.to_diffusers(tmp_path)
    there = diffusers.UNet2DModel.from_pretrained(tmp_path)
    assert there.config.num_class_embeds == 4
    x, t = torch.randn(4, 3, 8, 8), torch.full((4,), 7.0)
    with torch.no_grad():
        expected = network(x, t, torch.tensor([0, 1, 2, network.null_class]))
        found = there(x, t, class_labels=torch.arange(4)).sample
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        again = UNet.from_diffusers(tmp_path)
        assert torch.equal(again(x, t, torch.arange(4)), expected)


def test_a_pipeline_is_read_at_its_unet(saved: Path, tmp_path: Path) -> None:
    copied(saved, tmp_path / "unet")
    (tmp_path / "model_index.json").write_text("{}")
    expected = state_of(UNet.from_diffusers(saved))
    for network in (UNet.from_diffusers(tmp_path), UNet.from_diffusers(str(tmp_path), subfolder="unet")):
        assert all(torch.equal(a, b) for a, b in zip(state_of(network), expected, strict=True))


def test_shards_are_put_together(saved: Path, tmp_path: Path) -> None:
    model = networks.diffusers.UNet2DConditionModel.from_pretrained(saved)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    expected = state_of(UNet.from_diffusers(saved))
    assert all(torch.equal(a, b) for a, b in zip(state_of(UNet.from_diffusers(tmp_path)), expected, strict=True))
    next(iter(tmp_path.glob("*-00002-*.safetensors"))).unlink()
    with pytest.raises(FileNotFoundError, match=r"there is no .*-00002-.* in .*index.json names"):
        UNet.from_diffusers(tmp_path)


def test_half_precision_files_give_a_network_of_their_dtype(saved: Path, tmp_path: Path) -> None:
    model = networks.diffusers.UNet2DConditionModel.from_pretrained(saved).to(torch.float16)
    model.save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "diffusion_pytorch_model.fp16.safetensors").is_file()
    network = UNet.from_diffusers(tmp_path)
    assert {tensor.dtype for tensor in network.parameters()} == {torch.float16}
    copied(saved, tmp_path)
    assert {tensor.dtype for tensor in UNet.from_diffusers(tmp_path).parameters()} == {torch.float32}
    assert next(UNet.from_diffusers(tmp_path, variant="fp16").parameters()).dtype == torch.float16


def test_the_generator_of_torch_stays_as_it_was(saved: Path) -> None:
    before = torch.get_rng_state()
    UNet.from_diffusers(saved)
    assert torch.equal(before, torch.get_rng_state())


def _without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _with(name: str, text: str) -> Any:
    return lambda folder: (folder / name).write_text(text)


def _pickled(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")


def _cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (_without("config.json"), FileNotFoundError, "there is no config.json in .*: diffusers' save_pretrained"),
        (_without(WEIGHTS), FileNotFoundError, f"there is no {WEIGHTS} in .*, nor an index"),
        (_with("config.json", "{"), ValueError, "config.json must be JSON, got"),
        (_with("config.json", "[]"), ValueError, r"config must be an object, got \[\]"),
        (
            _with("config.json", '{"_class_name": "DiTTransformer2DModel"}'),
            ValueError,
            "_class_name must be one of UNet2D",
        ),
        (
            _with("config.json", "{}"),
            ValueError,
            "_class_name must be one of UNet2DModel, UNet2DConditionModel, got None",
        ),
        (_pickled, ValueError, "must hold diffusion_pytorch_model.safetensors, got diffusion_pytorch_model.bin, which"),
        (_cut, ValueError, f"{WEIGHTS} must be a whole safetensors"),
    ],
)
def test_a_folder_that_is_none_is_refused_in_one_sentence(
    saved: Path, tmp_path: Path, change: Any, error: type[Exception], words: str
) -> None:
    change(copied(saved, tmp_path))
    with pytest.raises(error, match=words) as caught:
        UNet.from_diffusers(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{}", "must name the file of every weight in weight_map, got None"),
        ('{"weight_map": {"a": "../a.safetensors"}}', "beside it, got '../a.safetensors'"),
        ('{"weight_map": {"a": 3}}', "beside it, got 3"),
    ],
)
def test_an_index_that_is_none_is_refused(saved: Path, tmp_path: Path, index: str, words: str) -> None:
    copied(saved, tmp_path)
    (tmp_path / WEIGHTS).unlink()
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(ValueError, match=words):
        UNet.from_diffusers(tmp_path)


def test_no_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere: download it first"):
        UNet.from_diffusers(tmp_path / "nowhere")
