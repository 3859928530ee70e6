"""Configurations of published UNets have the published numbers of parameters."""

from __future__ import annotations

import pytest
import torch
from helpers import edm_networks, guided_networks
from helpers.named_weights import Weights
from helpers.suites import few
from torch import nn

from diffkern.nn import PRESETS, UNet, UNetClassifier
from diffkern.nn.unet_presets import UNETS
from diffkern.nn.weights import guided_diffusion

# In millions: Nichol and Dhariwal 2021; Dhariwal and Nichol 2021, tables 4 and 11 to 13; Karras et al. 2022, table 7.
MILLIONS = {
    "iddpm-cifar10": 52.5,
    "iddpm-imagenet64": 121,
    "iddpm-imagenet64-classes": 273,
    "iddpm-lsun256": 114,
    "adm-imagenet64": 296,
    "adm-imagenet128": 422,
    "adm-imagenet256": 554,
    "adm-imagenet256-uncond": 553,
    "adm-imagenet512": 559,
    "adm-lsun256": 553,
    "adm-upsampler-64-256": 312,
    "adm-upsampler-128-512": 309,
    "edm-cifar10-ddpmpp": 55.7,
    "edm-cifar10-ncsnpp": 56.4,
    "edm-ffhq64-ddpmpp": 61.8,
    "edm-ffhq64-ncsnpp": 62.8,
    "edm-imagenet64": 295.9,
}


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("name", few(MILLIONS, "iddpm-cifar10", "adm-imagenet64", "edm-cifar10-ncsnpp"))
def test_a_published_network_has_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        found = parameters(UNet(PRESETS[name]))
    unit = 1e5 if isinstance(MILLIONS[name], float) else 1e6
    assert round(found / unit) == round(MILLIONS[name] * 1e6 / unit)


def test_every_published_unet_has_its_number() -> None:
    assert set(MILLIONS) == set(UNETS)


@pytest.mark.parametrize(("size", "depth", "millions"), few([(64, 4, 65), (128, 2, 43), (256, 2, 54)], "64-4-65"))
def test_a_published_classifier_has_the_published_number_of_parameters(size: int, depth: int, millions: int) -> None:
    with torch.device("meta"):
        network = UNetClassifier(guided_diffusion.classifier_config(image_size=size, classifier_depth=depth))
    assert round(parameters(network) / 1e6) == millions


def test_the_transcriptions_have_them_too_but_for_the_row_of_no_class() -> None:
    x, t, y = torch.empty(1, 3, 64, 64, device="meta"), torch.empty(1, device="meta"), torch.zeros(1, dtype=torch.int64)
    weights, one_hot = Weights(device="meta"), torch.empty(1, 1000, device="meta")
    given = {"img_resolution": 64, "out_channels": 3, "label_dim": 1000}
    edm_networks.dhariwal_unet(weights, given, x, t, one_hot)
    with torch.device("meta"):
        assert parameters(UNet(PRESETS["edm-imagenet64"])) == weights.count() + 4 * 192
    weights = Weights(device="meta")
    given = {"model_channels": 192, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3, "out_channels": 6,
             "attention_resolutions": (2, 4, 8), "num_head_channels": 64, "use_scale_shift_norm": True,
             "resblock_updown": True, "num_classes": 1000}  # fmt: skip
    guided_networks.unet(weights, given, x, t, y.to("meta"))
    with torch.device("meta"):
        assert parameters(UNet(PRESETS["adm-imagenet64"])) == weights.count() + 4 * 192
