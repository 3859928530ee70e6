"""Training on captions: the network's words are the data's, pictures show some, and what does not fit is said."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lazy import needs
from helpers.tiny_run import TINY, tiny_data
from torch import Tensor

import diffkern
from diffkern.data import open_images, retold
from diffkern.nn import TextConditioned, UNet
from diffkern.train import TrainConfig, fit, make_diffusion
from diffkern.train.captions import asked
from diffkern.train.degraded import picture
from diffkern.train.presets import PRESETS
from diffkern.vocabulary import Vocabulary

pytestmark = needs("yaml", "safetensors", "matplotlib", "PIL")

NETWORK = {**TINY.network_options, "attention_levels": [0], "transformer_depth": 1, "context_channels": 8}
TEXT = dataclasses.replace(
    TINY, network_options=NETWORK, text_options={"width": 8, "heads": 1, "depth": 1}, guidance=2.0, sample_n=20
)
WORDS = ("left", "middle", "right side")


def told(words: tuple[str, ...] = WORDS) -> tuple[Tensor, list[str]]:
    images, labels = tiny_data()
    return images, [words[label] for label in labels.tolist()]


def run(config: TrainConfig = TEXT, data: Any = None, out: Path | None = None, **options: Any) -> Any:
    return fit(None, told() if data is None else data, config, out=out, progress=False, **options)


def weights(diffusion: diffkern.Diffusion) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in diffusion.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_learns_the_words_of_its_data(tmp_path: Path) -> None:
    config = dataclasses.replace(TEXT, iterations=30, sample_every=30, validation=4, averages=())
    fitted = run(config, out=tmp_path)
    network = fitted.diffusion.model
    assert isinstance(network, TextConditioned)
    assert network.text.vocabulary == Vocabulary(("left", "middle", "right", "side"), 3)
    assert fitted.diffusion.drop == TEXT.drop
    assert sum(fitted.losses[-5:]) < 0.8 * sum(fitted.losses[:5])
    first = make_diffusion(config, (1, 8, 8), vocabulary=network.text.vocabulary)
    moved = [not p.equal(q) for p, q in zip(network.text.parameters(), first.model.text.parameters(), strict=True)]
    assert all(moved), "the encoder is trained too"
    assert (tmp_path / "samples" / "00000030.png").stat().st_size > 0
    loaded = diffkern.Diffusion.from_pretrained(tmp_path)
    assert loaded.model.config == network.config
    assert same(weights(loaded), weights(fitted.diffusion))
    tokens = loaded.model.tokens(["left", "right side"])
    assert loaded.sample(2, steps=2, seeds=0, cond=tokens, guidance=2.0).shape == (2, 1, 8, 8)


def test_it_goes_on_bit_for_bit(tmp_path: Path) -> None:
    config = dataclasses.replace(TEXT, iterations=6)
    whole = run(config, out=tmp_path / "whole")
    run(dataclasses.replace(config, iterations=3), out=tmp_path / "parts")
    parts = run(config, out=tmp_path / "parts")
    assert parts.losses == whole.losses[3:]
    assert same(weights(parts.diffusion), weights(whole.diffusion))
    small = run(dataclasses.replace(config, micro_batch=3))
    assert small.losses == pytest.approx(whole.losses, rel=1e-4)
    other = told(("middle", "left", "right side"))  # the same words of other pictures
    with pytest.raises(ValueError, match="data must be"):
        run(dataclasses.replace(config, iterations=8), other, tmp_path / "parts")


def test_a_network_reads_captions_in_its_own_words(tmp_path: Path) -> None:
    fitted = run(dataclasses.replace(TEXT, iterations=2), out=tmp_path)
    images = told()[0]
    some = images[:6], ["side middle"] * 6
    config = dataclasses.replace(TEXT, init=str(tmp_path), iterations=2)
    again = run(config, some)
    assert again.diffusion.model.config == fitted.diffusion.model.config
    # The same losses as with data whose words have its numbers.
    spoken = retold(open_images(some), fitted.diffusion.model.text.vocabulary)
    assert run(config, spoken).losses == again.losses
    with pytest.raises(
        ValueError, match="text must be of the 4 words of the vocabulary, got 'lfet' in 'lfet': did you m"
    ):
        run(config, (images[:6], ["lfet"] * 6))
    with pytest.raises(
        ValueError, match="data must have captions, which the network reads, got classes: open them with"
    ):
        run(config, tiny_data())
    assert run(config, images).step == 2, "without captions all are the empty text"


def test_what_does_not_fit_is_one_sentence() -> None:
    with pytest.raises(
        ValueError, match=r"TrainConfig.network must have a context for the captions of the data, got 'di"
    ):
        run(TINY)
    with pytest.raises(ValueError, match=r"TrainConfig.text_options has the fields words, length, .*, got 'wide'"):
        run(dataclasses.replace(TEXT, text_options={"wide": 8}))
    with pytest.raises(ValueError, match=r"TextEncoderConfig.heads does not fit: num_heads must divide the 8 channels"):
        run(dataclasses.replace(TEXT, text_options={"width": 8, "heads": 3}))
    with pytest.raises(
        ValueError, match=r"TrainConfig.network must need nothing but a context, got 'digits' with ids = 2"
    ):
        run(dataclasses.replace(TEXT, network_options={**NETWORK, "ids": 2}))
    classes = make_diffusion(TINY, (1, 8, 8), 3)
    with pytest.raises(ValueError, match=r"data must have classes, which the network is given, got captions \[20, 3\]"):
        fit(classes, told(), TINY, progress=False)
    plain = run(dataclasses.replace(TINY, labels=False))
    assert isinstance(plain.diffusion.model, UNet)


def test_pictures_have_the_captions_that_are_most_often_there() -> None:
    images = open_images(told(("b", "c", "a")))
    diffusion = make_diffusion(TEXT, images.shape, vocabulary=images.vocabulary)
    found = asked(diffusion, images, 16, torch.device("cpu"))
    assert (found.columns, found.names) == (8, ["b", "c"])  # 7 of each of the first two, 6 of the last
    assert found.cond is not None
    assert images.vocabulary is not None
    assert images.vocabulary.texts(found.cond) == ["b"] * 8 + ["c"] * 8
    few = asked(diffusion, images, 5, torch.device("cpu"))
    assert (few.columns, few.names, len(few.cond if few.cond is not None else ())) == (5, ["b"], 5)
    assert asked(diffusion, open_images(tiny_data(), labels=False), 4, torch.device("cpu")).cond is None
    classes = asked(make_diffusion(TINY, (1, 8, 8), 3), open_images(tiny_data()), 5, torch.device("cpu"))
    assert classes.cond is not None
    assert (classes.cond.tolist(), classes.columns, classes.names) == ([0, 1, 2, 0, 1], 3, [])


def test_pictures_of_inputs_have_their_own_captions() -> None:
    images = open_images(told(("b", "c", "a")))
    config = dataclasses.replace(TEXT, degradation="super_resolution", degradation_options={"factor": 2})
    diffusion = make_diffusion(config, images.shape, vocabulary=images.vocabulary)
    seen: list[torch.Tensor] = []
    diffusion.model.register_forward_pre_hook(lambda module, given: seen.append(given[2]["class"]))
    rows = picture(diffusion, diffusion.plan("ddim", 1), images, 10)
    assert [len(row) for row in rows] == [5, 5]
    assert images.labels is not None
    assert torch.equal(seen[0], images.labels[[0, 10]].repeat_interleave(3, 0))


def test_the_preset_makes_a_network_that_reads() -> None:
    config = PRESETS["digits-text"]
    vocabulary = Vocabulary.of(["seven, thick"])
    with torch.device("meta"):
        diffusion = make_diffusion(config, (1, 8, 8), vocabulary=vocabulary)
    assert isinstance(diffusion.model, TextConditioned)
    assert diffusion.drop == config.drop
    assert config.text


def test_captions_of_a_folder_are_asked_for(tmp_path: Path) -> None:
    from PIL import Image

    images, texts = told()
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text(text)
    config = dataclasses.replace(TEXT, iterations=2, text=True, cache=str(tmp_path / "cache"))
    fitted = run(config, str(tmp_path))
    assert fitted.losses == run(dataclasses.replace(TEXT, iterations=2)).losses
