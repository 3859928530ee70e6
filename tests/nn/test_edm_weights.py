"""Weights of EDM's networks: the same output as theirs, and the same bits back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import edm_networks
from helpers.lazy import Lazy
from helpers.named_weights import Weights
from torch import Tensor
from torch.nn import functional as F

from diffkern.nn import UNet
from diffkern.nn.weights import edm

safetensors = Lazy("safetensors.torch")

T = torch.tensor([-1.2, 0.4])
TINY: dict[str, Any] = {"img_resolution": 16, "in_channels": 3, "out_channels": 3, "model_channels": 16,
                        "channel_mult": [2, 2, 2], "num_blocks": 1, "attn_resolutions": [8]}  # fmt: skip
NCSN: dict[str, Any] = {"embedding_type": "fourier", "encoder_type": "residual", "channel_mult_noise": 2,
                        "resample_filter": [1, 3, 3, 1]}  # fmt: skip
SONG: dict[str, dict[str, Any]] = {
    "ddpmpp": {"augment_dim": 9},
    "ddpmpp-classes": {"label_dim": 5, "channel_mult": [1, 2], "num_blocks": 2},
    "ncsnpp": {**NCSN, "augment_dim": 9},
    "ncsnpp-classes": {**NCSN, "label_dim": 5, "channel_mult": [2, 4]},
}
DHARIWAL: dict[str, dict[str, Any]] = {
    "plain": {"model_channels": 64, "channel_mult": [1, 1]},
    "classes": {"model_channels": 64, "channel_mult": [1, 2], "label_dim": 5, "augment_dim": 3},
}


def image() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def labels(given: dict[str, Any]) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Classes as indices, none among them, as one-hot vectors, and augmentation labels."""
    classes, one_hot, augment = None, None, None
    if given.get("label_dim"):
        classes = torch.tensor([3, given["label_dim"]])
        one_hot = F.one_hot(classes, given["label_dim"] + 1)[:, :-1].float()
    if given.get("augment_dim"):
        augment = torch.randn(2, given["augment_dim"], generator=torch.Generator().manual_seed(1))
    return classes, one_hot, augment


def check(network: UNet, weights: Weights, expected: Tensor, given: dict[str, Any]) -> None:
    classes, _, augment = labels(given)
    found = network(image(), T, {"class": classes, "augment": augment})
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    back = edm.export(network)
    assert back.keys() == weights.state.keys()
    assert all(torch.equal(back[name], weights.state[name]) for name in back)


@pytest.mark.parametrize("name", SONG)
def test_a_song_unet_gives_the_same_and_comes_back(name: str) -> None:
    given = {**TINY, **SONG[name]}
    weights, (_, one_hot, augment) = Weights(), labels(given)
    expected = edm_networks.song_unet(weights, given, image(), T, one_hot, augment)
    check(edm.load_song_unet(weights.state, **given), weights, expected, given)


@pytest.mark.parametrize("name", DHARIWAL)
def test_a_dhariwal_unet_gives_the_same_and_comes_back(name: str) -> None:
    given = {**TINY, **DHARIWAL[name]}
    weights, (_, one_hot, augment) = Weights(), labels(given)
    expected = edm_networks.dhariwal_unet(weights, given, image(), T, one_hot, augment)
    check(edm.load_dhariwal_unet(weights.state, **given), weights, expected, given)


def test_no_augmentation_label_is_one_of_zeros() -> None:
    given = {**TINY, "augment_dim": 9}
    weights = Weights()
    expected = edm_networks.song_unet(weights, given, image(), T, None)
    found = edm.load_song_unet(weights.state, **given)(image(), T)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_state_dict_of_the_preconditioner_is_taken_with_its_arguments() -> None:
    weights = Weights()
    edm_networks.song_unet(weights, TINY, image(), T, None)
    whole = {f"model.{name}": tensor for name, tensor in weights.state.items()}
    for more in ({}, {"u": torch.zeros(1001)}):  # that of iDDPM keeps its levels
        network = edm.load_song_unet(whole | more, **TINY, use_fp16=True, sigma_data=0.5, model_type="SongUNet")
        assert all(torch.equal(tensor, weights.state[name]) for name, tensor in edm.export(network).items())


def test_the_state_dict_is_what_files_take(tmp_path: Path) -> None:
    network = UNet(edm.song_unet_config(**TINY))
    safetensors.save_file(edm.export(network), str(tmp_path / "song.safetensors"))  # nothing shares its memory
    again = edm.load_song_unet(tmp_path / "song.safetensors", **TINY)
    state = network.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())


def test_the_channels_may_be_the_preconditioners() -> None:
    config = edm.song_unet_config(img_resolution=8, img_channels=2, channel_mult=[1], attn_resolutions=[])
    assert (config.in_channels, config.out_channels) == (2, 2)
    assert edm.dhariwal_unet_config(img_resolution=8, img_channels=2, out_channels=4).out_channels == 4


def test_another_filter_than_the_arguments_say_is_named() -> None:
    weights = Weights()
    edm_networks.song_unet(weights, TINY, image(), T, None)
    with pytest.raises(ValueError, match=r"enc\.8x8_down\.conv0\.resample_filter must have shape \[1, 1, 4, 4\]"):
        edm.load_song_unet(weights.state, **{**TINY, "resample_filter": [1, 3, 3, 1]})


def test_wrong_arguments_are_one_sentence() -> None:
    for name, value in (("encoder_type", "skip"), ("decoder_type", "skip"), ("embedding_type", "other")):
        with pytest.raises(ValueError, match=f"{name} must be .*, got '{value}'"):
            edm.song_unet_config(img_resolution=32, **{name: value})
    with pytest.raises(TypeError, match="did you mean 'label_dropout'"):
        edm.dhariwal_unet_config(img_resolution=32, label_dropouts=0.1)


def test_a_network_that_edm_does_not_have_is_not_exported() -> None:
    config = edm.song_unet_config(**TINY)
    for change, text in (
        ({"eps": 1e-5}, r"UNetConfig\.eps must be 1e-06 for a network of EDM, got 1e-05"),
        ({"class_bias": False, "classes": 3}, r"UNetConfig\.class_scale must be 1\.73.*, got 1\.0"),
        ({"image_size": None}, r"UNetConfig\.image_size must be a number, .*, got None"),
    ):
        with pytest.raises(ValueError, match=text):
            edm.export(UNet(dataclasses.replace(config, **change)))
