"""Words as tokens, the encoder of a small vocabulary against NumPy, and networks that read as models of `Diffusion`."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import diffkern
from diffkern.nn import (
    DiTConfig,
    FlowNetwork,
    TextConditioned,
    TextConditionedConfig,
    TextEncoder,
    TextEncoderConfig,
    UNet,
    UNetConfig,
    Vocabulary,
)

WORDS = Vocabulary.of(["seven, thick", "three, thin", "zero"])
TEXTS = ["zero", "three, thin", ""]
SMALL = UNetConfig(
    image_size=4,
    channels=8,
    multipliers=(1,),
    blocks=1,
    attention_levels=(0,),
    middle_attention=False,
    classes=0,
    heads=1,
    transformer_depth=1,
    context_channels=12,
    zero_init=False,
)


def encoder(**options: Any) -> TextEncoder:
    torch.manual_seed(3)
    return TextEncoder(TextEncoderConfig.of(WORDS, **{"context_channels": 12, "width": 16, "heads": 2, **options}))


def model(**changes: Any) -> TextConditioned:
    torch.manual_seed(0)
    return TextConditioned.of(UNet(dataclasses.replace(SMALL, **changes)), encoder())


def images(n: int = 3) -> Tensor:
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(1))


# ------------------------------------------------------------------------------------------------------------- words


def test_texts_become_numbers_and_words_again() -> None:
    assert WORDS.words == (",", "seven", "thick", "thin", "three", "zero")
    assert (WORDS.length, WORDS.size) == (4, 8)
    found = WORDS.tokens(["Seven,THICK", "", "zero zero"])
    assert found.dtype == torch.int64
    assert found.tolist() == [[1, 3, 2, 4], [1, 0, 0, 0], [1, 7, 7, 0]]
    assert WORDS.texts(found) == ["seven, thick", "", "zero zero"]
    assert WORDS.null.tolist() == [1, 0, 0, 0]
    assert WORDS.tokens("zero").tolist() == [[1, 7, 0, 0]]
    assert Vocabulary.from_dict(json.loads(json.dumps(WORDS.to_dict()))) == WORDS
    assert Vocabulary.of([]).tokens([""]).tolist() == [[1]]
    with torch.device("meta"):
        assert WORDS.null.device.type == "cpu"


@pytest.mark.parametrize(
    ("texts", "sentence"),
    [
        ("sevn", "text must be of the 6 words of the vocabulary, got 'sevn' in 'sevn': did you mean 'seven'?"),
        (["zero", "zero."], "text must be of the 6 words of the vocabulary, got '.' in 'zero.'"),
        ("zero zero zero zero", "text must have at most 3 words, got 4 in 'zero zero zero zero'"),
        (["zero", 3], r"texts must be a text or a list of them, got ['zero', 3]"),
    ],
)
def test_a_text_that_is_none_of_the_words_is_one_sentence(texts: Any, sentence: str) -> None:
    with pytest.raises(ValueError) as found:  # noqa: PT011  (the sentence is looked at below)
        WORDS.tokens(texts)
    assert str(found.value) == sentence


@pytest.mark.parametrize(
    ("words", "length", "sentence"),
    [
        (("Seven",), 2, "Vocabulary.words must be single words in lower case, got 'Seven'"),
        (("a b",), 2, "Vocabulary.words must be single words in lower case, got 'a b'"),
        (("a", "b", "a"), 2, "Vocabulary.words must be different from each other, got 'a' twice"),
        (("a",), 0, "Vocabulary.length must lie in 1..4096, got 0"),
        ((3,), 2, "Vocabulary.words[0] must be text, got 3"),
    ],
)
def test_a_wrong_vocabulary_is_one_sentence(words: Any, length: int, sentence: str) -> None:
    with pytest.raises(ValueError) as found:  # noqa: PT011
        Vocabulary(words, length)
    assert str(found.value) == sentence


# ----------------------------------------------------------------------------------------------------------- encoder


def by_numpy(network: TextEncoder, tokens: list[int]) -> np.ndarray:
    """The context of one text without its padding, in float64."""
    weights = {name: p.detach().double().numpy() for name, p in network.named_parameters()}

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        return x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0.0)

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        scaled = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
        return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    h = weights["words.weight"][tokens] + weights["positions"][: len(tokens)]
    heads, wide = network.config.heads, network.config.width // network.config.heads
    for i in range(network.config.depth):
        q, k, v = np.split(linear(f"layers.{i}.qkv", norm(f"layers.{i}.norm1", h)), 3, axis=-1)
        seen = []
        for head in range(heads):
            mine = slice(head * wide, (head + 1) * wide)
            logits = q[:, mine] @ k[:, mine].T / math.sqrt(wide)
            shares = np.exp(logits - logits.max(-1, keepdims=True))
            seen.append(shares / shares.sum(-1, keepdims=True) @ v[:, mine])
        h = h + linear(f"layers.{i}.out1", np.concatenate(seen, -1))
        value, gate = np.split(linear(f"layers.{i}.ff_enter", norm(f"layers.{i}.norm3", h)), 2, axis=-1)
        gelu = 0.5 * gate * (1.0 + np.vectorize(math.erf)(gate / math.sqrt(2.0)))
        h = h + linear(f"layers.{i}.ff_leave", value * gelu)
    return linear("leave", norm("norm", h))


def test_the_context_is_that_of_a_transformer_over_the_words_alone() -> None:
    network = encoder()
    found = network(network.tokens(TEXTS))
    assert found.shape == (3, 4, 12)
    for row, tokens in zip(found, ([1, 7], [1, 6, 2, 5], [1]), strict=True):
        torch.testing.assert_close(row[: len(tokens)].detach().double(), torch.from_numpy(by_numpy(network, tokens)),
                                   rtol=1e-5, atol=1e-5)  # fmt: skip
        assert (row[len(tokens) :] == 0).all()


def test_padding_changes_nothing() -> None:
    network = encoder()
    tokens = network.tokens(["zero"])
    torch.testing.assert_close(network(tokens)[:, :2], network(tokens[:, :2]))
    assert torch.isfinite(network(torch.zeros(1, 4, dtype=torch.int64))).all()
    assert network.condition(tokens)["context"].equal(network(tokens))


def test_the_gradient_is_that_of_finite_differences() -> None:
    network = encoder(width=8, heads=1, depth=1, context_channels=2).double()
    tokens = network.tokens(["zero", "three, thin"])

    def found(positions: Tensor, words: Tensor) -> Tensor:
        return torch.func.functional_call(network, {"positions": positions, "words.weight": words}, (tokens,))

    start = [p.detach().clone().requires_grad_() for p in (network.positions, network.words.weight)]
    assert torch.autograd.gradcheck(found, start, fast_mode=True)


@pytest.mark.parametrize(
    ("tokens", "sentence"),
    [
        (torch.tensor([1, 2]), r"tokens must be int64 \[B, L\], got torch.int64 \[2\]"),
        (torch.tensor([[1.0]]), r"tokens must be int64 \[B, L\], got torch.float32 \[1, 1\]"),
        ([1], r"tokens must be int64 \[B, L\], got list"),
        (torch.tensor([[1, 8]]), "tokens must lie in 0..7, got 8"),
        (torch.tensor([[1, -1]]), "tokens must lie in 0..7, got -1"),
        (torch.ones(1, 5, dtype=torch.int64), r"tokens must be 1..4 a text, got \[1, 5\]"),
        (
            torch.ones(1, 2, dtype=torch.int64, device="meta"),
            "tokens must be on cpu, the device of the weights, got meta",
        ),
    ],
)
def test_tokens_that_do_not_fit_are_one_sentence(tokens: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        encoder()(tokens)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"width": 0}, "TextEncoderConfig.width must lie in 1..16384, got 0"),
        ({"depth": -1}, "TextEncoderConfig.depth must lie in 0..256, got -1"),
        ({"context_channels": 0}, "TextEncoderConfig.context_channels must lie in 1..16384, got 0"),
        ({"heads": 3}, "TextEncoderConfig.heads does not fit: num_heads must divide the 64 channels, got 3"),
        ({"dropout": 1.0}, r"TextEncoderConfig.dropout must lie in \[0, 1\), got 1.0"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        TextEncoderConfig.of(WORDS, **options)


# ------------------------------------------------------------------------------------------------- networks that read


def test_a_network_reads_what_the_encoder_says() -> None:
    network, x, t = model(), images(), torch.tensor([0.1, 0.5, 0.9])
    tokens = network.tokens(TEXTS)
    expected = network.network(x, t, {"context": network.text(tokens)})
    torch.testing.assert_close(network(x, t, tokens), expected)
    torch.testing.assert_close(network(x, t, {"tokens": tokens}), expected)
    torch.testing.assert_close(network(x, t), network(x, t, network.tokens([""] * 3)))
    assert network.null.equal(WORDS.null)
    assert not torch.allclose(network(x, t), expected)
    assert TextConditioned(network.config).config == network.config
    assert network.config.time_scale == SMALL.time_scale


@pytest.mark.parametrize(
    ("cond", "sentence"),
    [
        (torch.tensor([1, 2, 3]), r"cond must be tokens, int64 \[3, L\], got \[3\]"),
        (torch.ones(2, 4, dtype=torch.int64), r"cond must be tokens, int64 \[3, L\], got \[2, 4\]"),
        ("zero", r"cond must be tokens, int64 \[3, L\], got str"),
    ],
)
def test_a_condition_that_is_no_text_is_one_sentence(cond: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        model()(images(), torch.zeros(3), cond)


def test_a_network_that_cannot_read_is_one_sentence() -> None:
    for changes, sentence in (
        ({"classes": 3}, "TextConditionedConfig.network must have classes = 0, its condition being text, got 3"),
        ({"context_channels": 8}, "TextConditionedConfig.network must have context_channels = 12, those of the text"),
        ({"vector_channels": 5}, "TextConditionedConfig.network must have vector_channels = 0, those of the text"),
    ):
        with pytest.raises(ValueError, match=sentence):
            model(**changes)
    dit = {"kind": "DiTConfig", **DiTConfig(image_size=8, width=16, depth=1, heads=2, classes=0).to_dict()}
    with pytest.raises(ValueError, match=r"TextConditionedConfig.network must have context_channels = 12"):
        TextConditionedConfig(dit, model().config.text)
    with pytest.raises(ValueError, match="text must be one of TextEncoder, PretrainedText or its config, got str"):
        TextConditioned.of(UNet(SMALL), "three")
    with pytest.raises(ValueError, match="network must be one of"):
        FlowNetwork.of(model())
    with pytest.raises(ValueError, match=r"text.kind must be one of"):
        TextConditionedConfig(model().config.network, {"kind": "UNetConfig"})


@pytest.mark.parametrize("kind", ["eps", "flow"])
def test_diffusion_trains_guides_and_stores_it(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    network = model()
    schedule: Any = diffkern.cosine(20) if kind == "eps" else diffkern.flow()
    diffusion = diffkern.Diffusion(network, schedule, drop=0.5)
    assert diffusion.null is not None
    assert diffusion.null.equal(WORDS.null)
    assert diffusion.shape == (1, 4, 4)
    assert diffusion.time_scale == (1.0 if kind == "eps" else 1000.0)
    tokens = network.tokens(TEXTS)
    diffusion.loss(images(), cond=tokens, seeds=0).backward()
    assert all(p.grad is not None for p in network.parameters())
    # Where all conditions are lost, the loss is that of the empty text.
    lost = diffkern.Diffusion(network, schedule, drop=1 - 1e-12)
    empty = diffkern.Diffusion(network, schedule).loss(images(), cond=network.tokens([""] * 3), seeds=0)
    torch.testing.assert_close(lost.loss(images(), cond=tokens, seeds=0), empty)
    diffusion.save_pretrained(tmp_path)
    again = diffkern.Diffusion.from_pretrained(tmp_path)
    assert again.model.config == network.config
    options: dict[str, Any] = {"steps": 3, "seeds": 0, "guidance": 2.0}
    found = again.sample(3, cond=again.model.tokens(TEXTS), **options)
    assert found.equal(diffusion.sample(3, cond=tokens, **options))
    # Guidance is by the empty text.
    by_hand = diffusion.sample(3, cond=tokens, uncond=network.tokens([""] * 3), **options)
    assert found.equal(by_hand)


def test_what_a_network_calls_null_is_taken_where_it_is_tokens_alone() -> None:
    class Own(torch.nn.Module):
        def __init__(self, null: Any) -> None:
            super().__init__()
            self.null = null
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
            return x * self.scale

    schedule = diffkern.cosine(20)
    assert diffkern.Diffusion(Own(torch.nn.Parameter(torch.ones(3))), schedule).null is None
    assert diffkern.Diffusion(Own("none"), schedule).null is None
    found = diffkern.Diffusion(Own(torch.tensor([5, 0])), schedule).null
    assert found is not None
    assert found.tolist() == [5, 0]


def test_the_tokens_of_a_file_are_those_of_its_words(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    diffkern.Diffusion(model(), diffkern.cosine(20)).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    data["network"]["config"]["text"]["words"].append("more")
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"must be those of its network, got \[8, 16\] for model.text.words.weight"):
        diffkern.Diffusion.from_pretrained(tmp_path)


# ----------------------------------------------------------------------------------------------------- once in a run


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts were read in each call of an encoder."""
    calls: list[int] = []
    original = TextEncoder.condition

    def condition(self: TextEncoder, tokens: Tensor) -> dict[str, Tensor]:
        calls.append(len(tokens))
        return original(self, tokens)

    monkeypatch.setattr(TextEncoder, "condition", condition)
    return calls


def test_a_text_is_read_once_in_a_run(counted: list[int]) -> None:
    diffusion = diffkern.Diffusion(model().eval(), diffkern.cosine(20))
    tokens = diffusion.model.tokens(TEXTS)
    found = diffusion.sample(3, "ddim", steps=6, seeds=0, cond=tokens, guidance=2.0)
    assert counted == [6]
    counted.clear()
    hook = diffusion.model.text.register_forward_hook(lambda *_: None)
    assert diffusion.sample(3, "ddim", steps=6, seeds=0, cond=tokens, guidance=2.0).equal(found)
    assert counted == [6] * 6
    hook.remove()


def test_a_text_is_read_again_where_weights_or_tokens_change() -> None:
    diffusion = diffkern.Diffusion(model().eval(), diffkern.cosine(20))
    network: Any = diffusion.model
    tokens = network.tokens(TEXTS)

    rows = network.sampling_rows(torch.tensor([19, 9]), tokens, 3)
    x, t = images(), torch.tensor([9, 9, 9])
    torch.testing.assert_close(rows(1, x, t, tokens), network(x, t, tokens), rtol=0, atol=0)
    with torch.no_grad():
        network.text.positions.mul_(3.0)
    torch.testing.assert_close(rows(1, x, t, tokens), network(x, t, tokens), rtol=0, atol=0)
    given = tokens.clone()
    rows = network.sampling_rows(torch.tensor([19, 9]), given, 3)
    given.copy_(network.tokens([""] * 3))
    torch.testing.assert_close(rows(1, x, t, given), network(x, t), rtol=0, atol=0)
    other = network.tokens(["zero"] * 3)
    torch.testing.assert_close(rows(1, x, t, other), network(x, t, other), rtol=0, atol=0)
    for part in ("norm", "text"):  # a layer of the encoder, then all of it
        rows = network.sampling_rows(torch.tensor([19, 9]), other, 3)
        place = network if part == "text" else network.text
        setattr(place, part, encoder().eval() if part == "text" else torch.nn.Identity())
        torch.testing.assert_close(rows(1, x, t, other), network(x, t, other), rtol=0, atol=0)


def test_an_encoder_with_dropout_is_called_every_time() -> None:
    network = TextConditioned.of(UNet(SMALL), encoder(dropout=0.5))
    assert network.train().sampling_rows(torch.tensor([3, 2]), network.tokens(TEXTS), 3) is None
    assert network.eval().sampling_rows(torch.tensor([3, 2]), network.tokens(TEXTS), 3) is not None
    with torch.inference_mode():
        assert network.sampling_rows(torch.tensor([3, 2]), network.tokens(TEXTS), 3) is None


def test_switches_reach_both() -> None:
    network = model()
    network.checkpointing = True
    assert network.network.checkpointing
    assert network.checkpointing
    x, t, tokens = images(), torch.zeros(3), network.tokens(TEXTS)
    before = network(x, t, tokens)
    assert network.set_attention("torch").config.network["attention"] == "torch"
    torch.testing.assert_close(network(x, t, tokens), before, rtol=1e-4, atol=1e-4)
    pieces = network.pieces()
    assert pieces[-1] == [network.text]
    inside = {id(p) for piece in pieces for module in piece for p in module.parameters()}
    assert {id(p) for p in network.text.parameters()} <= inside
