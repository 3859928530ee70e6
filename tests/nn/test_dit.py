"""The DiT: shapes, the paper's formula, what reaches which block, and input that does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.dit_cases import SMALL, awake, dit, inputs, small
from helpers.dit_original import positions, waves

from diffkern.nn import DiT
from diffkern.nn.dit import DiTBlock, grid_positions


# ---------------------------------------------------------------------------------------------------- the whole network
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_size": (4, 12), "patch": 4, "in_channels": 3, "learned_variance": True},
        {"image_size": 3, "patch": 1, "in_channels": 1, "depth": 1, "heads": 1},
        {"classes": 0, "embedding": 24, "mlp_ratio": 2.5, "qkv_bias": False, "time_channels": 6},
        {"own_embeddings": True, "time_scale": 1000.0, "attention": "torch", "dropout": 0.5},
    ],
)
def test_shape_and_silence_at_the_start(changes: dict[str, Any]) -> None:
    config = small(**changes)
    model = DiT(config)
    x, t, cond = inputs(2, config)
    given = cond if config.classes else None
    out = model(x, t, given)
    assert out.shape == (2, config.out_channels, *config.size)
    assert not out.any(), "the last linear layer starts at zero"
    assert awake(model)(x, t, given).std() > 0.01


def test_every_block_starts_as_the_identity() -> None:
    h, change = torch.randn(2, 16, 16), torch.zeros(2, 6 * 16)
    assert torch.equal(DiTBlock(SMALL)(h, change), h)
    assert not any(block.modulate.weight.any() or block.modulate.bias.any() for block in DiT(SMALL).blocks)


def test_time_and_class_reach_every_block_and_the_end() -> None:
    model = dit()
    x, t, cond = inputs()
    start = model.known(t, cond, 3).changes
    assert [tuple(change.shape) for change in start] == [(3, 96), (3, 96), (3, 32)]
    for times, classes in ((t.flip(0), cond), (t, cond.flip(0))):
        changed = model.known(times, classes, 3).changes
        assert all((b - a).abs().amax(1)[[0, 2]].min() > 1e-3 for a, b in zip(start, changed, strict=True))
        assert (model(x, times, classes) - model(x, t, cond)).abs().amax((1, 2, 3))[[0, 2]].min() > 1e-3
    assert torch.equal(model.run(x, model.known(t, cond, 3)), model(x, t, cond))


def test_with_embeddings_of_its_own_a_block_has_another_change() -> None:
    model = dit(own_embeddings=True)
    x, t, cond = inputs()
    before = model.known(t, cond, 3).changes
    with torch.no_grad():
        model.blocks[1].classes.weight[2].add_(1.0)
    after = model.known(t, cond, 3).changes
    assert [not torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, False]
    assert model(x, t, cond).shape == x.shape


def test_no_condition_is_the_null_class_and_a_dict_has_the_class() -> None:
    model = dit()
    x, t, cond = inputs()
    assert model.null_class == 5
    for none in (None, {}, torch.full((3,), 5), torch.full((3,), 5, dtype=torch.int32)):
        assert torch.equal(model(x, t, none), model(x, t))
    assert torch.equal(model(x, t, {"class": cond}), model(x, t, cond))
    assert not torch.equal(model(x, t), model(x, t, cond))


def test_times_of_any_dtype_and_one_for_all_and_their_scale() -> None:
    model, scaled = dit(), dit(time_scale=1000.0)
    x, _, cond = inputs()
    out = model(x, torch.full((3,), 500), cond)
    for t in (torch.tensor(500), torch.tensor([500.0]), torch.full((3,), 500.0, dtype=torch.float64)):
        torch.testing.assert_close(model(x, t, cond), out)
    torch.testing.assert_close(scaled(x, torch.full((3,), 0.5), cond), out)


def test_samples_do_not_see_each_other_and_the_result_has_the_layout_of_x() -> None:
    model = dit()
    x, t, cond = inputs()
    out = model(x, t, cond)
    for b in range(3):
        torch.testing.assert_close(model(x[b : b + 1], t[b : b + 1], cond[b : b + 1])[0], out[b])
    last = model(x.to(memory_format=torch.channels_last), t, cond)
    assert out.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, out)
    torch.testing.assert_close(model(x.mT.contiguous().mT, t, cond), out)


def test_other_sizes_share_out_the_coordinates_of_the_grid() -> None:
    model, other = dit(), dit(image_size=(24, 4))
    x, t, cond = inputs()
    x = x[..., :4].repeat(1, 1, 3, 1)
    other.positions.copy_(grid_positions(12, 2, 16, of=(4, 4)))
    assert torch.equal(model(x, t, cond), other(x, t, cond))


@pytest.mark.parametrize(("rows", "columns", "channels"), [(3, 2, 8), (1, 4, 4), (2, 2, 20)])
def test_positions_by_their_formula(rows: int, columns: int, channels: int) -> None:
    found = grid_positions(rows, columns, channels)
    torch.testing.assert_close(found[None].double(), positions(rows, columns, channels), rtol=0.0, atol=1e-7)
    finer = grid_positions(2 * rows, 4 * columns, channels, of=(rows, columns)).unflatten(0, (2 * rows, -1))
    assert torch.equal(finer[::2, ::4].flatten(0, 1), found)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_the_time_enters_by_its_sinusoids(shift: float) -> None:
    model = dit(time_freq_shift=shift, classes=0)
    _, t, _ = inputs()
    given = torch.nn.functional.silu(model.time(waves(t, 16, shift).float()))
    torch.testing.assert_close(model.known(t, None, 3).changes[-1], model.modulate(given), rtol=1e-4, atol=1e-4)


def test_nan_stays_in_its_sample_and_an_empty_batch_is_empty() -> None:
    model = dit()
    x, t, cond = inputs()
    out = model(x, t, cond)
    x[1, 0, 0, 0] = float("nan")
    found = model(x, t, cond)
    assert found[1].isnan().all()
    assert torch.equal(found[::2], out[::2])
    assert model(x[:0], t[:0], cond[:0]).shape == (0, 4, 8, 8)
    assert model(x[:0], t[:0]).shape == (0, 4, 8, 8)


def test_dropout_falls_in_training_alone() -> None:
    model = dit(dropout=0.5)
    x, t, cond = inputs()
    assert torch.equal(model(x, t, cond), dit()(x, t, cond))
    model.train()
    assert not torch.equal(model(x, t, cond), model(x, t, cond))


# ------------------------------------------------------------------------------------------------------------ bad input
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"x": torch.zeros(3, 3, 8, 8)}, r"x must have shape \(B, 4, H, W\), got \(3, 3, 8, 8\)"),
        ({"x": torch.zeros(4, 8, 8)}, r"x must have shape \(B, 4, H, W\), got \(4, 8, 8\)"),
        ({"x": torch.zeros(3, 4, 8, 7)}, r"must be divisible by 2, got \(3, 4, 8, 7\)"),
        ({"x": torch.zeros(3, 4, 0, 8)}, r"must be divisible by 2, got \(3, 4, 0, 8\)"),
        (
            {"x": torch.zeros(3, 4, 8, 8, dtype=torch.float64)},
            "x must have torch.float32, the dtype of the weights, got torch.float64",
        ),
        ({"x": torch.zeros(3, 4, 8, 8, device="meta")}, "x must be on cpu, the device of the weights, got meta"),
        ({"t": torch.zeros(2)}, r"one time for each of the 3 samples, got \(2,\)"),
        ({"t": torch.zeros(3, 1)}, r"one time for each of the 3 samples, got \(3, 1\)"),
        ({"t": torch.zeros(3, device="meta")}, "t must be on cpu, the device of the weights, got meta"),
        ({"cond": [1, 2, 3]}, "cond must be None, an integer tensor of classes or a dict of class.*, got list"),
        ({"cond": torch.zeros(3)}, r"cond must be an integer tensor of shape \(3,\), got torch.float32"),
        ({"cond": torch.zeros(3, dtype=torch.bool)}, r"cond must be an integer tensor of shape \(3,\), got torch.bool"),
        ({"cond": torch.zeros(2, dtype=torch.int64)}, r"cond must be an integer tensor of shape \(3,\), .* \(2,\)"),
        ({"cond": torch.tensor([0, 6, 1])}, "cond must hold classes in 0..5 .*, got 6"),
        ({"cond": torch.tensor([0, -1, 1])}, "cond must hold classes in 0..5 .*, got -1"),
        ({"cond": torch.zeros(3, dtype=torch.int64, device="meta")}, "cond must be on cpu, .* got meta"),
        ({"cond": {"context": torch.zeros(3, 2, 4)}}, "this network has no context, but cond\\['context'\\] was given"),
    ],
)
def test_bad_input_in_a_sentence(change: dict[str, Any], sentence: str) -> None:
    given = dict(zip(("x", "t", "cond"), inputs(), strict=True))
    with pytest.raises(ValueError, match=sentence):
        dit()(**{**given, **change})


def test_a_network_without_classes_takes_none() -> None:
    model = dit(classes=0)
    x, t, cond = inputs()
    assert model(x, t).shape == x.shape
    with pytest.raises(ValueError, match="this network has no classes, but cond was given"):
        model(x, t, cond)


def test_positions_need_four_parts() -> None:
    with pytest.raises(ValueError, match="channels must be divisible by 4, got 6"):
        grid_positions(2, 2, 6)
