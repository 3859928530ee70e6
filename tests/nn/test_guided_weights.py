"""Weights of guided-diffusion and improved-diffusion: the same output as theirs, and the same bits back."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import guided_networks
from helpers.guided_networks_oracle import original
from helpers.lazy import Lazy
from helpers.named_weights import Weights
from torch import Tensor

from diffkern.nn import UNet
from diffkern.nn.weights import guided_diffusion

safetensors = Lazy("safetensors.torch")

T = torch.tensor([3.0, 700.0])
Y = torch.tensor([4, 0])
TINY: dict[str, Any] = {"num_channels": 32, "num_res_blocks": 1, "learn_sigma": True}
# By the flags of the published networks, at tiny widths.
FLAGS: dict[str, dict[str, Any]] = {
    "64": {"image_size": 64, "attention_resolutions": "32,16,8", "num_head_channels": 16, "resblock_updown": True,
           "use_new_attention_order": True, "class_cond": True, "num_classes": 5},
    "128": {"image_size": 128, "attention_resolutions": "32,16,8", "num_heads": 4, "resblock_updown": True,
            "class_cond": True, "num_classes": 5},
    "256": {"image_size": 256, "attention_resolutions": "32,16,8", "num_head_channels": 16, "resblock_updown": True},
    "512": {
        "image_size": 512,
        "attention_resolutions": "128",
        "num_head_channels": 16,
        "resblock_updown": True,
        "num_channels": 64,
        "channel_mult": "0.5,1,1",
    },
    "defaults": {},
}  # fmt: skip
IMPROVED: dict[str, dict[str, Any]] = {
    "cifar10": {"image_size": 32, "dropout": 0.3, "diffusion_steps": 4000, "noise_schedule": "cosine"},
    "imagenet64": {"image_size": 64, "diffusion_steps": 4000, "class_cond": True, "num_classes": 5},
    "lsun": {"image_size": 256, "num_heads": 1, "use_scale_shift_norm": False, "attention_resolutions": "16"},
}


def arguments(
    image_size: int = 64,
    num_channels: int = 32,
    num_res_blocks: int = 1,
    attention_resolutions: str = "16,8",
    use_scale_shift_norm: bool = True,
    learn_sigma: bool = False,
    class_cond: bool = False,
    num_classes: int = 1000,
    num_heads: int = 4,
    channel_mult: str = "",
    **others: Any,
) -> dict[str, Any]:
    """The constructor's arguments that the flags stand for, as `create_model` makes them of them."""
    levels = {256: (1, 1, 2, 2, 4, 4), 128: (1, 1, 2, 3, 4), 64: (1, 2, 3, 4), 32: (1, 2, 2, 2)}
    kept = {name: others[name] for name in guided_networks.DEFAULTS if name in others}
    return {
        "image_size": image_size,
        "in_channels": 3,
        "model_channels": num_channels,
        "out_channels": 6 if learn_sigma else 3,
        "num_res_blocks": num_res_blocks,
        "attention_resolutions": [image_size // int(side) for side in attention_resolutions.split(",")],
        "channel_mult": [float(m) for m in channel_mult.split(",")] if channel_mult else levels[image_size],
        "num_classes": num_classes if class_cond else None,
        "num_heads": num_heads,
        "use_scale_shift_norm": use_scale_shift_norm,
        **kept,
    }


def image(side: int, seed: int = 0) -> Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def side_of(flags: dict[str, Any]) -> int:
    """The smallest that all levels divide, or twice it: the networks are convolutions."""
    return 32 if flags.get("image_size") == 256 else 16


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", FLAGS)
def test_a_network_of_guided_diffusion_gives_the_same_and_comes_back(name: str) -> None:
    flags = {**TINY, **FLAGS[name]}
    weights, x = Weights(), image(side_of(flags))
    y = Y if flags.get("class_cond") else None
    expected = guided_networks.unet(weights, arguments(**flags), x, T, y)
    network = guided_diffusion.load(weights.state, **flags)
    torch.testing.assert_close(network(x, T, y), expected, rtol=1e-5, atol=1e-5)
    back = guided_diffusion.export(network, use_new_attention_order=flags.get("use_new_attention_order", False))
    assert same_bits(back, weights.state)


@pytest.mark.parametrize("name", IMPROVED)
def test_a_network_of_improved_diffusion_gives_the_same_at_whole_steps(name: str) -> None:
    flags = {**TINY, **IMPROVED[name]}
    weights, x = Weights(), image(side_of(flags))
    y = Y if flags.get("class_cond") else None
    scaled = T * 1000 / flags.get("diffusion_steps", 1000)  # as its SpacedDiffusion does
    expected = guided_networks.unet(weights, arguments(**flags), x, scaled, y)
    network = guided_diffusion.load_improved(weights.state, **flags)
    torch.testing.assert_close(network(x, T, y), expected, rtol=1e-5, atol=1e-5)
    assert same_bits(guided_diffusion.export(network), weights.state)


def test_an_upsampler_gives_the_same_and_comes_back() -> None:
    flags = {**TINY, "attention_resolutions": "32,16", "resblock_updown": True, "class_cond": True, "num_classes": 5}
    weights, x, low = Weights(), image(32), image(8, seed=1)
    given = arguments(image_size=256, **flags)
    expected = guided_networks.super_resolution(weights, given, x, T, low, Y)
    network = guided_diffusion.load_upsampler(weights.state, large_size=256, small_size=64, **flags)
    torch.testing.assert_close(network(x, T, {"class": Y, "image": low}), expected, rtol=1e-5, atol=1e-5)
    assert same_bits(guided_diffusion.export(network), weights.state)


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_a_classifier_gives_the_same_and_comes_back(pool: str) -> None:
    flags = {"image_size": 64, "classifier_width": 32, "classifier_depth": 1, "classifier_pool": pool,
             "classifier_attention_resolutions": "16,8", "num_classes": 7, "num_head_channels": 16}  # fmt: skip
    given = {**arguments(image_size=64, attention_resolutions="16,8", num_head_channels=16), "resblock_updown": True,
             "out_channels": 7, "pool": pool}  # fmt: skip
    weights, x = Weights(), image(64 if pool == "attention" else 16)
    expected = guided_networks.encoder(weights, given, x, T)
    network = guided_diffusion.load_classifier(weights.state, **flags)
    torch.testing.assert_close(network(x, T), expected, rtol=1e-5, atol=1e-5)
    assert same_bits(guided_diffusion.export(network), weights.state)


def test_a_checkpoint_is_read_from_a_file_and_written_to_one(tmp_path: Path) -> None:
    weights = Weights()
    guided_networks.unet(weights, arguments(**TINY, image_size=32), image(8), T)
    torch.save(weights.state, tmp_path / "model.pt")
    network = guided_diffusion.load(tmp_path / "model.pt", **TINY, image_size=32)
    safetensors.save_file(guided_diffusion.export(network), str(tmp_path / "model.safetensors"))
    again = guided_diffusion.load(tmp_path / "model.safetensors", **TINY, image_size=32)
    assert same_bits(again.state_dict(), network.state_dict())


def test_weights_of_other_flags_are_named() -> None:
    weights = Weights()
    guided_networks.unet(weights, arguments(**TINY, image_size=32), image(8), T)
    with pytest.raises(ValueError, match=r"input_blocks\.2\.0\.op\.weight is unknown") as error:
        guided_diffusion.load(weights.state, **TINY, image_size=32, resblock_updown=True)
    assert "input_blocks.2.0.in_layers.0.weight is missing" in str(error.value)


def test_wrong_flags_are_one_sentence() -> None:
    for flags, text in (
        ({"image_size": 48}, r"image_size must be one of .*, got 48"),
        ({"num_heads_upsample": 2}, r"num_heads_upsample must be -1 or num_heads, 4, got 2"),
        ({"channel_mult": "1,x"}, r"channel_mult must be numbers with commas between, got '1,x'"),
        ({"attention_resolutions": "0"}, r"attention_resolutions must be positive, got '0'"),
    ):
        with pytest.raises(ValueError, match=text):
            guided_diffusion.unet_config(**flags)
    with pytest.raises(TypeError, match="did you mean 'use_checkpoint'"):
        guided_diffusion.unet_config(use_checkpoints=True)
    with pytest.raises(TypeError, match="large_size and small_size, got image_size"):
        guided_diffusion.upsampler_config(image_size=64)
    with pytest.raises(ValueError, match="improved-diffusion has neither"):
        guided_diffusion.improved_unet_config(resblock_updown=True)


def test_a_network_that_guided_diffusion_does_not_have_is_not_exported() -> None:
    config = guided_diffusion.unet_config(**TINY, image_size=32)
    for change, text in (
        ({"eps": 1e-6}, r"UNetConfig\.eps must be 1e-05 for a network of guided-diffusion, got 1e-06"),
        ({"vector_channels": 4}, r"UNetConfig\.vector_channels must be 0 .*, got 4"),
        ({"blocks": (1, 1, 2, 1)}, r"UNetConfig\.blocks must be \(1, 1, 1, 1\) .*, got \(1, 1, 2, 1\)"),
    ):
        with pytest.raises(ValueError, match=text):
            guided_diffusion.export(UNet(dataclasses.replace(config, **change)))
    same = dataclasses.replace(config, multipliers=(1, 2, 2, 2), embedding=128, time_channels=32, dropout=0.5)
    assert "out.2.weight" in guided_diffusion.export(UNet(same))


# -------------------------------------------------------------------------------- the transcription, and the original

CASES: list[dict[str, Any]] = [
    {},
    {"conv_resample": False, "num_heads": 2, "num_heads_upsample": 4},
    {"resblock_updown": True, "num_head_channels": 16, "use_new_attention_order": True, "num_classes": 5,
     "use_scale_shift_norm": True},
    {"model_channels": 64, "channel_mult": (0.5, 1)},
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_the_transcribed_unet_is_the_original(case: dict[str, Any]) -> None:
    given = {"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 1,
             "attention_resolutions": (2,), "channel_mult": (1, 2), **case}  # fmt: skip
    weights, x, y = Weights(), image(8), Y if "num_classes" in case else None
    expected = guided_networks.unet(weights, given, x, T, y)
    model = original().UNetModel(**given)
    model.load_state_dict(weights.state)
    torch.testing.assert_close(model(x, T, y), expected, rtol=1e-5, atol=1e-5)


def test_the_transcribed_upsampler_is_the_original() -> None:
    given = {"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 6, "num_res_blocks": 1,
             "attention_resolutions": (), "channel_mult": (1, 2)}  # fmt: skip
    weights, x, low = Weights(), image(8), image(4)
    expected = guided_networks.super_resolution(weights, given, x, T, low)
    model = original().SuperResModel(**given)
    model.load_state_dict(weights.state)
    torch.testing.assert_close(model(x, T, low_res=low), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
def test_the_transcribed_encoder_is_the_original(pool: str) -> None:
    given = {"image_size": 8, "in_channels": 3, "model_channels": 32, "out_channels": 7, "num_res_blocks": 1,
             "attention_resolutions": (2,), "channel_mult": (1, 2), "num_head_channels": 16, "pool": pool}  # fmt: skip
    weights, x = Weights(), image(8)
    expected = guided_networks.encoder(weights, given, x, T)
    model = original().EncoderUNetModel(**given)
    model.load_state_dict(weights.state)
    torch.testing.assert_close(model(x, T), expected, rtol=1e-5, atol=1e-5)
