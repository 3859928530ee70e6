"""The UNet and its blocks: shapes, what reaches which block, the formulas of the parts, and input that does not fit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from diffkern.nn import ResBlock, SpatialSelfAttention, UNet, UNetConfig, sinusoidal_embedding
from diffkern.nn.blocks import Resample
from diffkern.nn.norm import count_groups
from diffkern.nn.unet_config import Modulation

SMALL = UNetConfig(channels=8, blocks=1, heads=2, embedding=16)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    """The same weights every time; one thread, which is fastest for tiny networks, also where other jobs are busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def awake(model: UNet) -> UNet:
    """The model with its zero weights replaced, so that its output depends on everything."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def inputs(batch: int = 4, config: UNetConfig = SMALL) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = torch.randn(batch, *config.shape)
    return x, torch.randint(0, 1000, (batch,)), torch.randint(0, max(config.classes, 1), (batch,))


# ---------------------------------------------------------------------------------------------------- the whole network
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"modulation": "add"},
        {"image_size": 16, "multipliers": (1, 2, 2), "attention_levels": (1, 2)},
        {"multipliers": (1,), "attention_levels": (), "heads": 1},
        {"in_channels": 3, "out_channels": 6, "blocks": 2, "attention_levels": (0, 1), "heads": 1},
        {"dropout": 0.1, "time_scale": 1000.0},
    ],
)
def test_shape_and_silence_at_the_start(changes: dict[str, object]) -> None:
    config = UNetConfig(**{**SMALL.to_dict(), **changes})  # type: ignore[arg-type]
    model = UNet(config)
    x, t, cond = inputs(config=config)
    out = model(x, t, cond)
    assert out.shape == (4, config.out_channels, *config.shape[1:])
    assert not out.any(), "the last convolution starts at zero"
    assert awake(model)(x, t, cond).std() > 0


def test_output_depends_on_time_and_class() -> None:
    model = awake(UNet(SMALL))
    x, t, cond = inputs()
    out = model(x, t, cond)
    assert (model(x, t + 100, cond) - out).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    assert (model(x, t, (cond + 1) % 10) - out).abs().amax(dim=(1, 2, 3)).min() > 1e-4


@pytest.mark.parametrize("modulation", ["scale_shift", "add"])
def test_time_reaches_every_residual_block(modulation: Modulation) -> None:
    model = awake(UNet(UNetConfig(**{**SMALL.to_dict(), "modulation": modulation})))
    model(*inputs()).square().sum().backward()
    blocks = [module for module in model.modules() if isinstance(module, ResBlock)]
    assert len(blocks) == 2 + 1 + 2 + 4 + 1  # down, to half, middle, up, to twice
    for block in blocks:
        assert block.modulate.weight.grad is not None
        assert block.modulate.weight.grad.abs().max() > 0


def test_no_condition_is_the_null_class() -> None:
    model = awake(UNet(SMALL))
    x, t, cond = inputs()
    null = torch.full((4,), model.null_class)
    assert model.null_class == 10
    assert torch.equal(model(x, t), model(x, t, null))
    assert not torch.equal(model(x, t), model(x, t, cond))


def test_a_network_without_classes() -> None:
    model = awake(UNet(UNetConfig(**{**SMALL.to_dict(), "classes": 0})))
    x, t, cond = inputs()
    assert model(x, t).shape == x.shape
    with pytest.raises(ValueError, match="no classes"):
        model(x, t, cond)


def test_times_of_any_dtype_and_one_for_all() -> None:
    model = awake(UNet(SMALL))
    x, _, cond = inputs()
    out = model(x, torch.full((4,), 500), cond)
    for t in (torch.tensor(500), torch.tensor([500.0] * 4), torch.full((4,), 500.0, dtype=torch.float64)):
        torch.testing.assert_close(model(x, t, cond), out)


def test_time_scale_multiplies_the_time() -> None:
    model = awake(UNet(SMALL))
    scaled = UNet(UNetConfig(**{**SMALL.to_dict(), "time_scale": 1000.0})).eval()
    scaled.load_state_dict(model.state_dict())
    x, _, cond = inputs()
    torch.testing.assert_close(scaled(x, torch.full((4,), 0.25), cond), model(x, torch.full((4,), 250), cond))


def test_samples_do_not_see_each_other_and_layout_does_not_matter() -> None:
    model = awake(UNet(SMALL))
    x, t, cond = inputs()
    out = model(x, t, cond)
    for b in range(4):
        torch.testing.assert_close(model(x[b : b + 1], t[b : b + 1], cond[b : b + 1])[0], out[b])
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(x, t, cond), out, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ its parts
def test_sinusoidal_embedding_formula() -> None:
    t = torch.tensor([0, 1, 999])
    out = sinusoidal_embedding(t, 6, max_period=100.0)
    assert out.shape == (3, 6)
    assert out.dtype == torch.float32
    for b, time in enumerate([0.0, 1.0, 999.0]):
        for i in range(3):
            angle = time * 100.0 ** (-i / 3)
            assert out[b, i].item() == pytest.approx(math.cos(angle), abs=2e-4)
            assert out[b, 3 + i].item() == pytest.approx(math.sin(angle), abs=2e-4)
    with pytest.raises(ValueError, match="even"):
        sinusoidal_embedding(t, 5)


@pytest.mark.parametrize(("resample", "size"), [("none", 8), ("down", 4), ("up", 16)])
def test_residual_block_starts_as_its_skip(resample: Resample, size: int) -> None:
    block = ResBlock(8, 8, 16, resample=resample)
    x = torch.randn(2, 8, 8, 8)
    out = block(x, torch.randn(2, 16))  # the change: scale and shift of 8 channels
    assert out.shape == (2, 8, size, size)
    if resample == "none":
        assert torch.equal(out, x)
    elif resample == "down":
        torch.testing.assert_close(out, x.reshape(2, 8, 4, 2, 4, 2).mean(dim=(3, 5)))
    else:
        assert torch.equal(out, x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3))


@pytest.mark.parametrize("modulation", ["scale_shift", "add"])
def test_residual_block_formula(modulation: Modulation) -> None:
    block = ResBlock(8, 12, 16, modulation=modulation)
    torch.nn.init.normal_(block.conv2.weight)
    x, embedding = torch.randn(2, 8, 8, 8), torch.randn(2, 16)
    h = block.conv1(F.silu(F.group_norm(x, 8, block.norm1.weight, block.norm1.bias)))
    given = block.modulate(F.silu(embedding))
    change = given.reshape(2, -1, 1, 1)
    if modulation == "scale_shift":
        h = (1 + change[:, :12]) * F.group_norm(h, 6) + change[:, 12:]
    else:
        h = F.group_norm(h + change, 6)
    torch.testing.assert_close(block(x, given), block.conv2(F.silu(h)) + block.skip(x))


def test_attention_follows_the_middle_and_its_levels() -> None:
    model = UNet(UNetConfig(**{**SMALL.to_dict(), "attention_levels": (0, 1), "heads": 1, "blocks": 2}))
    found = [m for m in model.modules() if isinstance(m, SpatialSelfAttention)]
    assert [m.channels for m in found] == [8, 8, 16, 16, 16, 16, 16, 16, 8, 8, 8]
    assert {m.num_heads for m in found} == {1}
    assert {m.norm.num_groups for m in found} == {8}


@pytest.mark.parametrize(
    ("channels", "most", "least", "groups"), [(8, 8, 1, 8), (12, 8, 1, 6), (96, 32, 4, 24), (7, 8, 1, 7), (13, 8, 1, 1)]
)
def test_groups_divide_the_channels(channels: int, most: int, least: int, groups: int) -> None:
    assert count_groups(channels, most, least) == groups


# ------------------------------------------------------------------------------------------ configuration and bad input
def test_config_through_json() -> None:
    config = UNetConfig(channels=48, multipliers=(1, 2), modulation="add")
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match=r"UNetConfig has the fields .*channels.*, got 'depth'"):
        UNetConfig.from_dict({"depth": 3})


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"image_size": 9}, "divisible by 2 for 2 levels, got 9"),
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"multipliers": ()}, "multipliers must be positive"),
        ({"attention_levels": (2,)}, r"attention_levels must lie in \[0, 2\)"),
        ({"heads": 16}, r"heads does not fit level 1: the channels of a head .*, got 4 \(64 channels in 16 heads\)"),
        ({"heads": 3}, "heads does not fit level 1: num_heads must divide the 64 channels, got 3"),
        ({"attention_levels": (0,), "heads": 8}, r"heads does not fit level 0: .*, got 4 \(32 channels in 8 heads\)"),
        ({"modulation": "film"}, "modulation must be one of scale_shift, add, got 'film'"),
        ({"classes": -1}, "classes must not be negative"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1.0"),
        ({"time_channels": 15}, "time_channels must be even, got 15"),
    ],
)
def test_bad_config(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        UNetConfig(**changes)  # type: ignore[arg-type]


def test_bad_input() -> None:
    model = UNet(SMALL)
    x, t, cond = inputs()
    with pytest.raises(ValueError, match=r"height and width of x must be divisible by 2, got \(4, 1, 8, 3\)"):
        model(x[..., :3], t, cond)
    with pytest.raises(ValueError, match=r"one time for each of the 4 samples, got \(3,\)"):
        model(x, t[:3], cond)
    with pytest.raises(ValueError, match=r"cond must be an integer tensor of shape \(4,\)"):
        model(x, t, cond.float())


def test_weights_are_channels_last_however_they_were_loaded() -> None:
    model = UNet(SMALL)
    plain = {name: tensor.contiguous() for name, tensor in awake(UNet(SMALL)).state_dict().items()}
    for assign in (False, True):
        model.load_state_dict(plain, assign=assign)
        weight = model.down[0].blocks[0].block.conv1.weight  # type: ignore[union-attr, index]
        assert weight.is_contiguous(memory_format=torch.channels_last), assign
        assert torch.equal(weight, plain["down.0.blocks.0.block.conv1.weight"])
