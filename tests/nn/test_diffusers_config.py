"""config.json of diffusers' UNets as a `UNetConfig`: every field of theirs, and values that we have no network for."""

from __future__ import annotations

import dataclasses
import inspect
import json
from typing import Any

import pytest
from helpers.diffusers_networks import CONDITIONAL, PLAIN, TINY
from helpers.lazy import Lazy, needs

from diffkern.nn import UNetConfig
from diffkern.nn.weights import diffusers as weights
from diffkern.nn.weights.diffusers_config import CLASSES

diffusers = Lazy("diffusers")


@needs("diffusers")
@pytest.mark.parametrize("name", CLASSES)
def test_every_field_of_diffusers_is_known_with_its_default(name: str) -> None:
    signature = inspect.signature(getattr(diffusers, name).__init__).parameters
    theirs = {field: parameter.default for field, parameter in signature.items() if field != "self"}
    assert {field.name: field.default for field in dataclasses.fields(CLASSES[name])} == theirs


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        (PLAIN, {"center_input_sample": True}, "center_input_sample must be one of False, got True"),
        (PLAIN, {"time_embedding_type": "fourier"}, "time_embedding_type must be one of 'positional', got 'fourier'"),
        (PLAIN, {"act_fn": "gelu"}, "act_fn must be one of 'silu', 'swish', got 'gelu'"),
        (PLAIN, {"mid_block_type": None}, "mid_block_type must be one of 'UNetMidBlock2D', got None"),
        (PLAIN, {"mid_block_scale_factor": 1.4}, "mid_block_scale_factor must be 1, got 1.4"),
        (PLAIN, {"downsample_padding": 2}, "downsample_padding must be one of 0, 1, got 2"),
        (PLAIN, {"class_embed_type": "timestep"}, "class_embed_type must be null, got 'timestep'"),
        (PLAIN, {"norm_num_groups": 3}, r"norm_num_groups must be a divisor of block_out_channels \(8, 16\), got 3"),
        (PLAIN, {"norm_num_groups": None}, "norm_num_groups must be an integer, got None"),
        (PLAIN, {"attention_head_dim": 5}, "attention_head_dim must be a number that gives 16 channels .*, got 5"),
        (PLAIN, {"attn_norm_num_groups": 2}, "attn_norm_num_groups must be norm_num_groups, 4, got 2"),
        (PLAIN, {"resnet_time_scale_shift": "spatial"}, "must be one of 'default', 'scale_shift', got 'spatial'"),
        (
            PLAIN,
            {"resnet_time_scale_shift": "scale_shift"},
            "attn_norm_num_groups must be norm_.*, got None",
        ),
        (
            PLAIN,
            {"down_block_types": ["DownBlock2D"] * 2},
            "up_block_types must be with attention at .*, got",
        ),
        (
            PLAIN,
            {"down_block_types": ["AttnSkipDownBlock2D"] * 2},
            r"down_block_types\[0\] must be one of .*, got 'Attn",
        ),
        (PLAIN, {"down_block_types": ["DownBlock2D"]}, r"down_block_types must be one value a level, 2, got"),
        (
            PLAIN,
            {"down_block_types": ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]},
            "down_block_types must be of blocks",
        ),
        (PLAIN, {"block_out_channels": [0, 8]}, r"block_out_channels must be positive, .*, got \(0, 8\)"),
        (PLAIN, {"in_channels": "3"}, "UNet2DModel.in_channels must be an integer, got '3'"),
        (PLAIN, {"cross_attention_dim": 8}, "UNet2DModel has the fields .*, got 'cross_attention_dim'"),
        (
            CONDITIONAL,
            {"mid_block_type": "UNetMidBlock2D"},
            "mid_block_type must be one of 'UNetMidBlock2DCrossAttn', got",
        ),
        (CONDITIONAL, {"only_cross_attention": True}, "only_cross_attention must be one of False, got True"),
        (CONDITIONAL, {"dual_cross_attention": True}, "dual_cross_attention must be one of False, got True"),
        (CONDITIONAL, {"encoder_hid_dim": 8}, "encoder_hid_dim must be null, got 8"),
        (CONDITIONAL, {"time_cond_proj_dim": 256}, "time_cond_proj_dim must be null, got 256"),
        (CONDITIONAL, {"timestep_post_act": "silu"}, "timestep_post_act must be null, got 'silu'"),
        (CONDITIONAL, {"attention_type": "gated"}, "attention_type must be one of 'default', got 'gated'"),
        (CONDITIONAL, {"conv_in_kernel": 1}, "conv_in_kernel must be one of 3, got 1"),
        (CONDITIONAL, {"resnet_out_scale_factor": 2.0}, "resnet_out_scale_factor must be 1, got 2.0"),
        (CONDITIONAL, {"addition_embed_type": "image"}, "addition_embed_type must be one of 'text_time' or null, got"),
        (
            CONDITIONAL,
            {"addition_embed_type": "text_time"},
            "projection_class_embeddings_input_dim must be given .*, got None",
        ),
        (CONDITIONAL, {"class_embed_type": "identity"}, "class_embed_type must be one of 'projection' or null, got"),
        (
            CONDITIONAL,
            {"transformer_layers_per_block": [[1], [1]]},
            r"transformer_layers_per_block\[0\] must be an integer",
        ),
        (CONDITIONAL, {"transformer_layers_per_block": 0}, "transformer_layers_per_block must be at least 1 .*, got 0"),
        (CONDITIONAL, {"cross_attention_dim": [8, 12]}, r"cross_attention_dim must be positive and .*, got \(8, 12\)"),
        (
            CONDITIONAL,
            {"attention_head_dim": [2, 1]},
            r"attention_head_dim must be one number of heads, .*, got \(2, 1\)",
        ),
        (CONDITIONAL, {"attention_head_dim": 5}, "attention_head_dim must be a number that gives 16 .*, got 5"),
        (
            CONDITIONAL,
            {"_class_name": "UNet3DConditionModel"},
            "_class_name must be one of .*, got 'UNet3DConditionModel'",
        ),
    ],
)
def test_a_value_that_we_have_no_network_for_is_named(name: str, changes: dict[str, Any], words: str) -> None:
    tiny = TINY["ddpm" if name == PLAIN else "sd 1"]
    with pytest.raises(ValueError, match=words) as caught:
        weights.config_from({**tiny, **changes})
    assert "\n" not in str(caught.value)


def test_what_says_nothing_about_the_function_is_passed_over() -> None:
    plain = weights.config_from(TINY["sd 1"])
    averaged = {"decay": 0.999, "optimization_step": 3, "_name_or_path": "x", "_diffusers_version": "0.6.0"}
    assert weights.config_from({**TINY["sd 1"], **averaged}) == plain
    old = {"down_block_types": ["CrossAttnDownBlock2D", "UNetResDownBlock2D"], "upcast_attention": True}
    assert weights.config_from({**TINY["sd 1"], **old}) == plain


@pytest.mark.parametrize(("size", "ours"), [(64, 64), ([8, 6], (8, 6)), (9, None), (None, None)])
def test_a_size_that_the_levels_do_not_divide_is_left_out(size: Any, ours: Any) -> None:
    assert weights.config_from({**TINY["ddpm"], "sample_size": size}).image_size == ours


def test_widths_that_are_no_multiples_of_the_first_keep_its_embedding() -> None:
    config = weights.config_from({**TINY["ddpm"], "block_out_channels": [16, 24]})
    assert config.widths == (16, 24)
    assert (config.embedding_width, config.sinusoids) == (64, 16)


@pytest.mark.parametrize(("total", "ids", "vector"), [(2816, None, 1280), (2560, None, 1280), (2816, 5, 1536)])
def test_numbers_beside_the_pooled_text(total: int, ids: int | None, vector: int) -> None:
    """SDXL: 1280 and six sinusoids of 256; its refiner: five."""
    text_time = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    given = {**TINY["sd 1"], **text_time, "projection_class_embeddings_input_dim": total}
    config = weights.config_from(given, ids)
    assert config.vector_channels == vector
    assert config.vector_channels + 256 * config.ids == total


@pytest.mark.parametrize("config", TINY.values(), ids=TINY)
def test_a_config_written_back_is_the_same_network(config: dict[str, Any]) -> None:
    ours = weights.config_from(config)
    written = json.loads(json.dumps(weights.config_to(ours)))
    assert written["_class_name"] == config["_class_name"]
    assert weights.config_from(written) == ours


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"block": "convnext"},
            "UNetConfig.block must be 'residual' for a network of diffusers' UNet2DModel, got 'conv",
        ),
        ({"time_embedding": "fourier"}, "time_embedding must be 'sinusoidal' for .*, got 'fourier'"),
        ({"time_scale": 1000.0}, "time_scale must be 1.0 for .*, got 1000.0"),
        ({"class_place": "before"}, "class_place must be 'after' for .*, got 'before'"),
        ({"residual_scale": 0.5}, "residual_scale must be 1.0 for .*, got 0.5"),
        ({"resample": "pool"}, "resample must be 'conv' for .*, got 'pool'"),
        ({"filter": (1.0, 3.0, 3.0, 1.0)}, r"filter must be None for .*, got \(1.0, 3.0, 3.0, 1.0\)"),
        ({"vector_channels": 5}, "vector_channels must be 0 for .*, got 5"),
        ({"blocks": (1, 2)}, r"blocks must be \(1, 1\) for .*, got \(1, 2\)"),
        ({"up_attention": "last"}, "up_attention must be 'every' for .*, got 'last'"),
        ({"attention_eps": 1e-6}, "attention_eps must be 1e-05 for .*, got 1e-06"),
        ({"transformer_depth": 1}, r"transformer_depth must be \(0,\) for .*, got \(1,\)"),
        ({"context_channels": 8, "transformer_depth": 1}, "resample must be 'conv' for .*UNet2DConditionModel, got"),
        (
            {"context_channels": 8, "transformer_depth": 1, "resample": "conv"},
            "attention_eps must be 1e-06 for .*UNet2DConditionModel, got 1e-05",
        ),
    ],
)
def test_an_option_that_diffusers_lacks_is_named(changes: dict[str, Any], words: str) -> None:
    config = UNetConfig(**{"channels": 16, "blocks": 1, "heads": 2, **changes})
    with pytest.raises(ValueError, match=words) as caught:
        weights.config_to(config)
    assert "\n" not in str(caught.value)


def test_what_idle_options_say_does_not_matter() -> None:
    config = UNetConfig(
        channels=16, heads=2, classes=0, fourier_scale=3.0, class_place="before", concat_upsample="nearest"
    )
    assert weights.config_from(weights.config_to(config)).fourier_scale == 16.0
