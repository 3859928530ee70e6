"""The engine of the weight maps: names, rows, shapes, and files."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from helpers.lazy import Lazy
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern.nn.weights._keys import Key, fill, read_state, to_ours, to_theirs, unfilled
from diffkern.ops import spatial_attention

safetensors = Lazy("safetensors.torch")

KEYS = [
    Key("enter.weight", ("a.weight",)),
    Key("qkv.weight", ("b.weight",), axes=0, rows="legacy", heads=2),
    Key("qkv.bias", ("b.bias",), rows="legacy", heads=2),
    Key("kv.weight", ("to_k.weight", "to_v.weight")),
    Key("classes.weight", ("label.weight",), table="columns"),
    Key(None, ("filter",), value=torch.ones(1, 1, 2, 2) / 4),
]
SHAPES = {"enter.weight": (4, 3, 3, 3), "qkv.weight": (48, 16, 1), "qkv.bias": (48,), "kv.weight": (8, 5),
          "classes.weight": (4, 6)}  # fmt: skip


def theirs() -> dict[str, Tensor]:
    shapes = {"a.weight": (4, 3, 3, 3), "b.weight": (48, 16), "b.bias": (48,), "to_k.weight": (4, 5),
              "to_v.weight": (4, 5), "label.weight": (6, 3)}  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    found = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return {**found, "filter": torch.ones(1, 1, 2, 2) / 4}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_round_trip_brings_the_same_bits_back_both_ways() -> None:
    given = theirs()
    ours = to_ours(KEYS, given, SHAPES)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == SHAPES
    back = to_theirs(KEYS, ours)
    assert same(back, given)
    assert same(to_ours(KEYS, back, SHAPES), ours)


def test_what_no_row_moves_in_is_not_copied() -> None:
    given = theirs()
    ours = to_ours(KEYS, given, SHAPES)
    assert ours["enter.weight"].data_ptr() == given["a.weight"].data_ptr()
    back = to_theirs(KEYS, ours)
    assert back["to_v.weight"].untyped_storage().data_ptr() == ours["kv.weight"].untyped_storage().data_ptr()


def test_several_names_are_stacked_and_one_hot_columns_become_rows_with_none_last() -> None:
    given = theirs()
    ours = to_ours(KEYS, given, SHAPES)
    assert torch.equal(ours["kv.weight"], torch.cat([given["to_k.weight"], given["to_v.weight"]]))
    one_hot = F.one_hot(torch.tensor([2, 0]), 3).float()
    assert torch.equal(F.embedding(torch.tensor([2, 0]), ours["classes.weight"]), one_hot @ given["label.weight"].T)
    assert torch.equal(ours["classes.weight"][3], torch.zeros(6))


def test_a_table_of_rows_gets_one_more() -> None:
    key = [Key("classes.weight", ("label_emb.weight",), table="rows")]
    given = {"label_emb.weight": torch.arange(6.0).reshape(3, 2)}
    ours = to_ours(key, given, {"classes.weight": (4, 2)})["classes.weight"]
    assert ours.tolist() == [[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [0.0, 0.0]]
    assert same(to_theirs(key, {"classes.weight": ours}), given)


@pytest.mark.parametrize("rows", ["legacy", "edm"])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_with_their_rows_in_their_order_is_ours_in_the_new_one(rows: str, heads: int) -> None:
    weight, bias = torch.randn(3 * 24, 24, 1, 1) / 8, torch.randn(3 * 24)
    keys = [
        Key("qkv.weight", ("w",), axes=2, rows=rows, heads=heads),
        Key("qkv.bias", ("b",), rows=rows, heads=heads),
    ]
    ours = to_ours(keys, {"w": weight, "b": bias}, {"qkv.weight": (72, 24, 1), "qkv.bias": (72,)})
    x = torch.randn(2, 24, 3, 3)
    expected = spatial_attention(F.conv2d(x, weight, bias), heads, rows)
    got = spatial_attention(F.conv2d(x, ours["qkv.weight"][..., None], ours["qkv.bias"]), heads, "new")
    torch.testing.assert_close(got, expected)
    assert same(to_theirs(keys, ours), {"w": weight, "b": bias})


def test_every_unknown_missing_and_misshapen_name_is_listed_in_one_error() -> None:
    given = theirs()
    del given["to_v.weight"]
    given["b.bias"] = torch.zeros(47)
    given["filter"] = torch.zeros(1, 1, 2, 2)
    given["extra"] = torch.zeros(1)
    with pytest.raises(ValueError, match="got 4 differences") as error:
        to_ours(KEYS, given, SHAPES)
    for text in (
        "to_v.weight is missing",
        "b.bias must have shape [48], got [47]",
        "filter must be [0.25, 0.25, 0.25, 0.25], got other values",
        "extra is unknown",
    ):
        assert text in str(error.value)


def test_a_map_that_is_not_of_this_network_says_which_places_differ() -> None:
    shapes = {name: shape for name, shape in SHAPES.items() if name != "enter.weight"} | {"more": (1,)}
    with pytest.raises(ValueError, match="nothing there is more of our network") as error:
        to_ours(KEYS, theirs(), shapes)
    assert "a.weight has no place in our network (enter.weight)" in str(error.value)


def test_on_the_way_back_missing_names_and_a_trained_row_of_none_are_listed() -> None:
    ours = to_ours(KEYS, theirs(), SHAPES)
    del ours["kv.weight"]
    ours["classes.weight"][3] = 1.0
    ours["other"] = torch.zeros(1)
    with pytest.raises(ValueError, match=r"kv\.weight is missing; other is unknown; classes\.weight must end"):
        to_theirs(KEYS, ours)


# ------------------------------------------------------------------------------------------------------------- files


def test_both_kinds_of_files_are_read_whatever_their_names(tmp_path: Path) -> None:
    given = theirs()
    torch.save(given, tmp_path / "x.safetensors")
    torch.save(given, tmp_path / "old", _use_new_zipfile_serialization=False)
    safetensors.save_file(given, str(tmp_path / "x.pt"))
    for name in ("x.safetensors", "old", "x.pt"):
        assert same(read_state(tmp_path / name), given)


def test_truncated_files_are_one_sentence(tmp_path: Path) -> None:
    given = theirs()
    torch.save(given, tmp_path / "new")
    torch.save(given, tmp_path / "old", _use_new_zipfile_serialization=False)
    safetensors.save_file(given, str(tmp_path / "safe"))
    for name in ("new", "old", "safe"):
        whole = (tmp_path / name).read_bytes()
        for length in (0, 1, 5, 12, 200, len(whole) // 2, len(whole) - 1):
            (tmp_path / "part").write_bytes(whole[:length])
            with pytest.raises(ValueError, match=r"^weights must [^\n]*, got [^\n]*part[^\n]*$"):
                read_state(tmp_path / "part")


class Network:
    """Something that EDM's pickles hold."""


def test_files_of_other_things_are_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(40))
    with pytest.raises(ValueError, match=r"must be a whole safetensors or torch file, got .*image"):
        read_state(tmp_path / "image")
    torch.save({"ema": nn.Linear(1, 1)}, tmp_path / "objects")
    (tmp_path / "pickle").write_bytes(pickle.dumps({"ema": Network}))
    for name in ("objects", "pickle"):
        with pytest.raises(ValueError, match=r"must hold nothing but tensors.*save the state dict"):
            read_state(tmp_path / name)
    torch.save({"state_dict": theirs(), "step": 3}, tmp_path / "nested")
    with pytest.raises(ValueError, match=r"got 'state_dict' of type dict: give 'state_dict' of it"):
        read_state(tmp_path / "nested")
    with pytest.raises(FileNotFoundError):
        read_state(tmp_path / "none")


def test_a_network_is_filled_with_copies_in_the_dtype_of_the_weights() -> None:
    network = nn.Linear(3, 2)
    given = {"w": torch.randn(2, 3, dtype=torch.float64), "b": torch.randn(2, dtype=torch.float64)}
    fill(network, [Key("weight", ("w",)), Key("bias", ("b",))], given)
    assert torch.equal(network.weight, given["w"])
    given["w"].zero_()
    assert bool(network.weight.any())


def test_an_unfilled_network_costs_no_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with torch.device("meta"):
        network = unfilled(lambda: nn.Sequential(nn.Linear(3, 2), nn.GroupNorm(1, 2), nn.Embedding(3, 2)))
    assert {parameter.device.type for parameter in network.parameters()} == {"cpu"}
    assert torch.equal(torch.rand(3), expected)


def test_a_network_that_the_weights_do_not_fit_stays_as_it_was() -> None:
    network = nn.Linear(3, 2)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(ValueError, match="b is missing"):
        fill(network, [Key("weight", ("w",)), Key("bias", ("b",))], {"w": torch.ones(2, 3, dtype=torch.float64)})
    assert same(network.state_dict(), before)
