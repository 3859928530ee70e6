"""diffusers' autoencoders read and written: the same images, the same bits back, published shapes, sentences."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.autoencoder_cases import TINY, build, images, model
from helpers.lazy import Lazy, needs

from diffkern.nn import Autoencoder, Posterior, Quantised, preset
from diffkern.nn.weights import autoencoder as weights

diffusers = Lazy("diffusers")
pytestmark = needs("diffusers", "safetensors")


@pytest.mark.parametrize("name", TINY)
def test_a_folder_of_diffusers_gives_its_images(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs: Any = build(TINY[name])
    theirs.save_pretrained(tmp_path)
    ours = Autoencoder.from_diffusers(tmp_path)
    assert not ours.training
    x = images()
    with torch.no_grad():
        encoded = ours.encode(x)
        if isinstance(encoded, Posterior):
            there = theirs.encode(x).latent_dist
            torch.testing.assert_close(encoded.mean, there.mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(encoded.logvar, there.logvar, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(encoded.kl(), there.kl(), rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(
                ours.decode(encoded.mean), theirs.decode(there.mean).sample, rtol=1e-5, atol=1e-5
            )
        else:
            assert isinstance(encoded, Quantised)
            before = theirs.encode(x).latents
            torch.testing.assert_close(encoded.before, before, rtol=1e-5, atol=1e-5)
            image = theirs.decode(before).sample
            torch.testing.assert_close(ours.decode(encoded.latents), image, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(ours.images(ours.latents(x)), image, rtol=1e-5, atol=1e-5)
            codes, _, (_, _, indices) = theirs.quantize(before)
            assert torch.equal(encoded.indices.flatten(), indices)
            torch.testing.assert_close(encoded.latents, codes, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TINY)
def test_what_we_write_diffusers_reads_with_the_same_bits(name: str, tmp_path: Path) -> None:
    theirs: Any = build(TINY[name])
    theirs.save_pretrained(tmp_path / "theirs")
    Autoencoder.from_diffusers(tmp_path / "theirs").to_diffusers(tmp_path / "ours")
    again = getattr(diffusers, TINY[name]["_class_name"]).from_pretrained(tmp_path / "ours")
    state = again.state_dict()
    assert state.keys() == theirs.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in theirs.state_dict().items())
    ours = Autoencoder.from_diffusers(tmp_path / "theirs").config
    assert Autoencoder.from_diffusers(tmp_path / "ours").config == ours


def test_the_numbers_around_diffusion() -> None:
    ours = weights.config_from(TINY["kl, 16 channels and a shift"])
    assert (ours.scale, ours.shift, ours.upcast, ours.z_channels) == (1.5305, 0.0609, False, 16)
    each = weights.config_from(TINY["kl, three levels with attention"])
    assert each.scale == (0.5, 0.25, 1.0, 0.5 / 1.5)
    assert each.shift == (0.1, -0.2, 0.3, 0.0)


def test_codes_that_are_averages_begin_with_those_of_a_file() -> None:
    network = model(regularisation="vq", codes=12, code_channels=5, latent_channels=3)
    theirs = build(TINY["vq"])
    weights.load(network, theirs.state_dict())
    codes = theirs.state_dict()["quantize.embedding.weight"]
    assert torch.equal(network.quantiser.codes, codes)
    assert torch.equal(network.quantiser.sums, codes)
    assert network.quantiser.counts.tolist() == [1.0] * 12
    assert weights.export(network).keys() == theirs.state_dict().keys()


def test_attention_of_old_files() -> None:
    theirs = build(TINY["kl"])
    state = theirs.state_dict()
    old = {}
    for name, tensor in state.items():
        for new, was in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{was}.")
        old[name] = tensor[..., None, None] if "attentions" in name and tensor.dim() == 2 else tensor
    assert old.keys() != state.keys()
    network = Autoencoder(weights.config_from(TINY["kl"]))
    weights.load(network, old)
    assert all(torch.equal(tensor, state[name]) for name, tensor in weights.export(network).items())


def test_a_pipeline_is_read_at_its_vae(tmp_path: Path) -> None:
    build(TINY["kl"]).save_pretrained(tmp_path / "vae")  # type: ignore[operator]
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    assert Autoencoder.from_diffusers(tmp_path).config == Autoencoder.from_diffusers(tmp_path / "vae").config


PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {  # config.json of the repositories, and parameters of diffusers'
    "sd-vae": ({"sample_size": 512, "scaling_factor": 0.18215}, 83653863),
    "sdxl-vae": ({"sample_size": 1024, "scaling_factor": 0.13025}, 83653863),
    "sd3-vae": (
        {
            "sample_size": 1024,
            "latent_channels": 16,
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        83819683,
    ),
    "flux-vae": (
        {
            "sample_size": 1024,
            "latent_channels": 16,
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        },
        83819683,
    ),
    "vq-f4": (
        {
            "_class_name": "VQModel",
            "sample_size": 256,
            "block_out_channels": [128, 256, 512],
            "latent_channels": 3,
            "num_vq_embeddings": 8192,
            "vq_embed_dim": 3,
            "scaling_factor": 1.0,
        },
        55322782,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes_on_the_meta_device(name: str) -> None:
    changes, parameters = PUBLISHED[name]
    fields = {
        "_class_name": "AutoencoderKL",
        "block_out_channels": [128, 256, 512, 512],
        "layers_per_block": 2,
        **changes,
    }
    levels = len(fields["block_out_channels"])
    fields |= {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }
    settings = weights.config_from(fields)
    assert settings == preset(name)
    with torch.device("meta"):
        theirs, ours = build(fields), Autoencoder(settings)
    state = weights.export(ours)
    there = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == there
    assert sum(tensor.numel() for tensor in state.values()) == parameters
    assert ours.latent_shape(settings.shape) == (settings.z_channels, *(n // ours.factor for n in settings.size))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"_class_name": "AutoencoderTiny"},
            "^_class_name must be one of AutoencoderKL, VQModel, got 'AutoencoderTiny'$",
        ),
        ({"act_fn": "relu"}, r"^AutoencoderKL\.act_fn must be one of 'silu', 'swish', got 'relu'$"),
        ({"out_channels": 4}, r"^AutoencoderKL\.out_channels must be in_channels, 3, got 4$"),
        (
            {"norm_num_groups": 3},
            r"^AutoencoderKL\.norm_num_groups must be a divisor of block_out_channels \(8, 16\), got 3$",
        ),
        (
            {"down_block_types": ["DownEncoderBlock2D"]},
            r"^AutoencoderKL\.down_block_types must be one value a level, 2, got",
        ),
        (
            {"up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"]},
            r"^AutoencoderKL\.up_block_types must be with attention at the levels where down_block_types have it",
        ),
        ({"latents_mean": [0.0] * 4}, r"^AutoencoderKL\.latents_std must be given where the other one is, got None$"),
        ({"latents_mean": [0.0], "latents_std": [0.0]}, r"^AutoencoderKL\.latents_std must be positive, got"),
        ({"unheard": 1}, "AutoencoderKL has the fields .*, got 'unheard'$"),
    ],
)
def test_configurations_that_are_none_of_ours(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        weights.config_from({**TINY["kl"], **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"regularisation": "none"}, r'^AutoencoderConfig\.regularisation must be "kl" or "vq", got \'none\'$'),
        ({"eps": 1e-5}, r"^AutoencoderConfig\.eps must be 1e-06 for diffusers' AutoencoderKL, got 1e-05$"),
        ({"groups": 32}, r"^AutoencoderConfig\.groups must be a divisor of the channels \(8, 16\) for diffusers'"),
        ({"regularisation": "vq", "shift": 0.5}, r"^AutoencoderConfig\.shift must be 0 for a VQModel, got 0\.5$"),
        (
            {"regularisation": "vq", "quant_conv": False},
            r"^AutoencoderConfig\.quant_conv must be True for a VQModel, got False$",
        ),
    ],
)
def test_networks_that_diffusers_does_not_have(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        model(**changes).to_diffusers(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_weights_that_do_not_fit_are_named() -> None:
    state = build(TINY["kl"]).state_dict()
    state["decoder.conv_in.bias"] = state["decoder.conv_in.bias"][1:]
    del state["quant_conv.bias"]
    network = Autoencoder(weights.config_from(TINY["kl"]))
    with pytest.raises(
        ValueError, match=r"2 differences: .*quant_conv\.bias is missing.*decoder\.conv_in\.bias must have"
    ):
        weights.load(network, state)
