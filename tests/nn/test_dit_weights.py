"""Weights of the authors' DiT and of diffusers' class: same numbers, both ways, and every fault listed."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import pytest
import torch
from helpers.dit_cases import awake, dit, inputs
from helpers.dit_original import Original
from torch import Tensor

from diffkern.nn import DiT
from diffkern.nn.weights import dit as weights

pytest.importorskip("safetensors")


def original(**changes: Any) -> Original:
    given = {"size": 8, "patch": 2, "channels": 3, "width": 16, "depth": 2, "heads": 2, "classes": 5, **changes}
    made: Original = awake(Original(**{"out_channels": 2 * given["channels"], **given}))
    return made


def theirs(**changes: Any) -> Any:
    """diffusers' network with random weights; ``shared``: every block has the first one's embedding."""
    diffusers = pytest.importorskip("diffusers")
    shared = changes.pop("shared", False)
    given = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 3, "num_layers": 2, "sample_size": 8}
    made = awake(diffusers.DiTTransformer2DModel(**{**given, "num_embeds_ada_norm": 5, **changes}))
    if shared:
        first, *others = made.transformer_blocks
        for block in others:
            block.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return made


def given(channels: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """The times small: their sinusoids are float32, and lose digits as they grow."""
    x, t, cond = inputs()
    return x[:, :channels].contiguous(), t // 30, cond


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# ------------------------------------------------------------------------------------------------- the authors' weights
@pytest.mark.parametrize("changes", [{}, {"patch": 4, "heads": 1, "depth": 1}, {"channels": 4, "out_channels": 4}])
def test_the_authors_network_is_ours(changes: dict[str, Any]) -> None:
    source = original(**changes)
    state = {name: tensor.float() for name, tensor in source.state_dict().items()}
    ours = weights.load(state, heads=changes.get("heads", 2))
    x, t, cond = given(changes.get("channels", 3))
    expected = source(x, t, cond)
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, t, cond).double(), expected, rtol=1e-5, atol=1e-5)
    same(weights.export(ours), state)


def test_a_published_width_says_its_heads_and_fields_come_first() -> None:
    state = {name: tensor.to("meta") for name, tensor in original(width=384, heads=6, depth=1).state_dict().items()}
    config = weights.original_config(state, attention="torch")
    assert (config.heads, config.width, config.attention, config.learned_variance) == (6, 384, "torch", True)


def test_faults_of_an_authors_checkpoint_are_listed() -> None:
    state = original().state_dict()
    with pytest.raises(ValueError, match="heads must be given, as 16 is no width of the paper's"):
        weights.load(state)
    del state["blocks.1.attn.proj.bias"]
    state["blocks.0.mlp.fc2.bias"] = torch.zeros(3, dtype=torch.float64)
    state["ema"] = torch.zeros(1, dtype=torch.float64)
    said = (
        r"3 differences: (?=.*blocks.1.attn.proj.bias is missing)(?=.*ema is unknown).*fc2.bias must have shape \[16\]"
    )
    with pytest.raises(ValueError, match=said):
        weights.load(state, heads=2)
    with pytest.raises(ValueError, match=r"with x_embedder.proj.weight, .*, got none of \['x_embedder.proj.weight'"):
        weights.load({"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"network must have classes, .*got classes=0, qkv_bias=False"):
        weights.export(dit(classes=0, qkv_bias=False))


# ------------------------------------------------------------------------------------------------------------ diffusers
@pytest.mark.parametrize(
    "changes",
    [
        {"shared": True, "out_channels": 6},
        {"attention_bias": False, "norm_eps": 0.1},
        {"patch_size": 4, "num_layers": 1},
    ],
)
def test_diffusers_network_is_ours_and_back(changes: dict[str, Any], tmp_path: pathlib.Path) -> None:
    source = theirs(**changes)
    source.save_pretrained(tmp_path / "theirs")
    ours = DiT.from_diffusers(tmp_path / "theirs")
    assert ours.config.own_embeddings is (changes.get("shared", False) is False and len(ours.blocks) > 1)
    x, t, cond = given()
    expected = source(x, timestep=t, class_labels=cond).sample
    assert expected.std() > 0.1
    torch.testing.assert_close(ours(x, t, cond), expected, rtol=1e-5, atol=1e-5)
    state, config = weights.export_diffusers(ours)
    same(state, source.state_dict())
    assert all(
        source.config[name] == value for name, value in config.items() if name not in ("_class_name", "out_channels")
    )
    ours.to_diffusers(tmp_path / "ours")
    again = type(source).from_pretrained(tmp_path / "ours").eval()
    assert torch.equal(again(x, timestep=t, class_labels=cond).sample, expected)


def test_other_sizes_are_those_of_diffusers_too() -> None:
    source = theirs()
    ours = weights.load_diffusers(source.state_dict(), source.config)
    x, t, cond = given()
    x = x.repeat(1, 1, 2, 2)
    expected = source(x, timestep=t, class_labels=cond).sample
    torch.testing.assert_close(ours(x, t, cond), expected, rtol=1e-5, atol=1e-5)


def test_a_pipeline_and_an_old_file_are_read(tmp_path: pathlib.Path) -> None:
    """As facebook/DiT-XL-2-256 has them: the class before it had its name, the positions among the weights."""
    from safetensors.torch import save_file

    source = theirs(shared=True)
    state = {**source.state_dict(), "pos_embed.pos_embed": source.pos_embed.pos_embed.clone()}
    config = {name: value for name, value in source.config.items() if not name.startswith("_") and name != "norm_eps"}
    config |= {"_class_name": "Transformer2DModel", "num_vector_embeds": None, "cross_attention_dim": None}
    folder = tmp_path / "transformer"
    folder.mkdir()
    (tmp_path / "model_index.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "diffusion_pytorch_model.safetensors")
    x, t, cond = given()
    found = DiT.from_diffusers(tmp_path)(x, t, cond)
    torch.testing.assert_close(found, source(x, timestep=t, class_labels=cond).sample, rtol=1e-5, atol=1e-5)


def test_faults_of_diffusers_weights_are_listed() -> None:
    source = theirs(shared=True)
    state = source.state_dict()
    del state["proj_out_2.bias"], state["transformer_blocks.1.attn1.to_k.weight"]
    state["pos_embed.proj.bias"] = torch.zeros(2)
    state["norm.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match="4 differences") as caught:
        weights.load_diffusers(state, source.config)
    for said in (
        "proj_out_2.bias is missing",
        "transformer_blocks.1.attn1.to_k.weight is missing",
        r"pos_embed.proj.bias must have shape \[16\], got \[2\]",
        "norm.weight is unknown",
    ):
        assert re.search(said, str(caught.value)), said


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"_class_name": "UNet2DModel"}, "_class_name must be DiTTransformer2DModel, got 'UNet2DModel'"),
        ({"norm_type": "layer_norm"}, "norm_type must be 'ada_norm_zero', as in the paper, got 'layer_norm'"),
        ({"activation_fn": "geglu"}, "activation_fn must be 'gelu-approximate'"),
        ({"norm_elementwise_affine": True}, "norm_elementwise_affine must be False"),
        ({"out_channels": 5}, "out_channels must be in_channels or twice that, 4 or 8, got 5"),
        ({"caption_channels": 3}, "config must have the names of DiTTransformer2DModel, got caption_channels"),
        ({"num_layers": "2"}, "DiTConfig.depth must be an integer, got '2'"),
        ({"_class_name": "Transformer2DModel", "cross_attention_dim": 8}, "cross_attention_dim must be None for a DiT"),
    ],
)
def test_options_without_a_dit_are_named(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        weights.diffusers_config(changes)


def test_what_diffusers_has_not_is_not_written() -> None:
    with pytest.raises(ValueError, match=r"network must be square, .* got mlp_ratio=2.0, time_channels=16, time_freq"):
        weights.export_diffusers(dit(mlp_ratio=2.0))
    with pytest.raises(ValueError, match="config must be an object, got 3"):
        weights.diffusers_config(3)  # type: ignore[arg-type]


def test_the_defaults_are_diffusers_own() -> None:
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        config = dict(diffusers.DiTTransformer2DModel(num_layers=1).config)
    assert weights.diffusers_config({"num_layers": 1}) == weights.diffusers_config(config)
