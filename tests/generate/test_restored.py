"""Samples of given inputs and cascades: the same for every cut of a job, classes handed on, consistent."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.diffusion_cases import small_unet
from torch import Tensor

from diffkern import Diffusion, ops, schedules
from diffkern.degradations import Degradation, Inpainting, SuperResolution
from diffkern.generate import Part, cascade, generate, recommended, restore, stage_seed
from diffkern.nn import TextConditioned, TextEncoderConfig, Vocabulary

SCHEDULE = schedules.cosine(20)
TWICE = SuperResolution(2, augmentation=0.5)


def model(degradation: Degradation | None = None, size: int = 8, **fields: Any) -> Diffusion:
    own: dict[str, Any] = {"image_size": size, "channels": 8, "groups": 4, "heads": 1, "zero_init": False}
    if degradation is not None:
        own |= {"concat_channels": degradation.channels(1), "concat_upsample": "bilinear"}
        own |= {"ids": 1, "id_channels": 16} if degradation.augmentation else {}
    return Diffusion(small_unet(**own, **fields), SCHEDULE, "v", degradation=degradation).requires_grad_(False)


BASE, NEXT, LAST = model(size=4), model(TWICE, 8), model(SuperResolution(2), 16, classes=0)
PLANS = [recommended(each, "ddim", 2) for each in (BASE, NEXT, LAST)]
INPUTS = torch.rand(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0


def joined(parts: Any) -> Tensor:
    found = list(parts)
    assert [part.first for part in found] == sorted(part.first for part in found)
    return torch.cat([part.images for part in found])


def test_an_image_is_a_function_of_its_number_and_input() -> None:
    given: dict[str, Any] = {"seed": 3, "classes": [0, 2, 1], "guidance": 1.5, "augmentation": 0.25}
    every = joined(restore(NEXT, INPUTS, 2, PLANS[1], micro_batch=1, **given))
    assert every.shape == (6, 1, 8, 8)
    torch.testing.assert_close(joined(restore(NEXT, INPUTS, 2, PLANS[1], micro_batch=4, **given)), every)
    seeds, which = ops.seeds(3, 1, 5), slice(2, 3)
    alone = NEXT.sample(
        1,
        PLANS[1],
        seeds=seeds,
        image=INPUTS[which],
        cond=torch.tensor([1]),
        guidance=1.5,
        augmentation=0.25,
    )
    assert torch.equal(TWICE.project(alone, INPUTS[which])[0], every[5]), "sample 1 of input 2 is image 5"
    torch.testing.assert_close(TWICE.degrade(every), INPUTS.repeat_interleave(2, 0), rtol=0.0, atol=1e-5)
    plain = joined(restore(NEXT, INPUTS, 2, PLANS[1], project=False, micro_batch=1, **given))
    assert torch.equal(plain[5], alone[0])
    shares: list[Callable[[int], range]] = [lambda n: range(0, n, 2), lambda n: range(1, n, 2)]
    halves = [list(restore(NEXT, INPUTS, 2, PLANS[1], micro_batch=2, share=share, **given)) for share in shares]
    assert sorted(part.first for half in halves for part in half) == [0, 2, 4]


def test_a_cascade_is_its_models_one_after_the_other() -> None:
    classes = torch.tensor([0, 1, 2, 0, 1])
    parts = list(cascade([BASE, NEXT, LAST], 5, PLANS, seed=7, classes=classes, guidance=2.0, augmentation=0.9))
    base = joined(generate(BASE, 5, PLANS[0], seed=7, classes=classes, guidance=2.0)).clamp(-1, 1)
    given: dict[str, Any] = {"classes": classes, "guidance": 2.0, "augmentation": 0.5}
    middle = joined(restore(NEXT, base, 1, PLANS[1], seed=stage_seed(7, 1), **given))
    last = joined(restore(LAST, middle.clamp(-1, 1), 1, PLANS[2], seed=stage_seed(7, 2)))
    assert torch.equal(joined(parts), last), "the second has no more than its own noise, the third has no classes"
    assert last.shape == (5, 1, 16, 16)
    assert isinstance(parts[0], Part)
    assert parts[0].classes is not None
    assert torch.equal(parts[0].classes, classes)
    torch.testing.assert_close(SuperResolution(4).degrade(last), base, rtol=0.0, atol=1e-4)
    later = joined(cascade([BASE, NEXT], 2, PLANS[:2], seed=7, first=3, classes=classes[3:], micro_batch=1))
    every = joined(cascade([BASE, NEXT], 5, PLANS[:2], seed=7, classes=classes, micro_batch=1))
    assert torch.equal(later, every[3:])
    assert len({stage_seed(7, k) for k in range(4)} | {stage_seed(8, k) for k in range(4)}) == 8
    assert stage_seed(7, 0) == 7


def reader(degradation: Degradation | None, size: int, *words: str) -> Diffusion:
    """A model of texts of these words."""
    own: dict[str, Any] = {"image_size": size, "channels": 8, "groups": 4, "heads": 1, "zero_init": False, "classes": 0}
    own |= {} if degradation is None else {"concat_channels": 1, "concat_upsample": "bilinear"}
    network = small_unet(**own, attention_levels=(0,), transformer_depth=1, context_channels=8)
    text = TextEncoderConfig.of(Vocabulary.of(words), context_channels=8, width=8, heads=1)
    made = Diffusion(TextConditioned.of(network, text), SCHEDULE, "v", degradation=degradation)
    return made.requires_grad_(False)


def test_texts_go_through_a_cascade_in_the_words_of_each_model() -> None:
    models = [reader(None, 4, "a b"), reader(SuperResolution(2), 8, "zero a b c"), model(SuperResolution(2), 16)]
    texts = ["b", "a b"]
    parts = list(cascade(models, 3, PLANS, seed=7, texts=texts, guidance=2.0, project=False))
    base = joined(generate(models[0], 3, PLANS[0], seed=7, texts=texts, guidance=2.0)).clamp(-1, 1)
    tokens: Any = models[1].model
    asked = tokens.tokens(["b", "a b", "b"])
    given: dict[str, Any] = {"classes": asked, "guidance": 2.0, "project": False}
    middle = joined(restore(models[1], base, 1, PLANS[1], seed=stage_seed(7, 1), **given)).clamp(-1, 1)
    last = joined(restore(models[2], middle, 1, PLANS[2], seed=stage_seed(7, 2), project=False))
    assert torch.equal(joined(parts), last), "the third, of classes, is given none"
    with pytest.raises(ValueError, match=r"text must be of the 4 words of the vocabulary, got 'd' in 'd'"):
        cascade([reader(None, 4, "d"), models[1]], 1, PLANS[:2], texts="d")


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: restore(BASE, INPUTS),
            r"diffusion must have a degradation, the images that it is given, got one with",
        ),
        (lambda: generate(NEXT, 2), r"diffusion must be one that is given no image, got one with a degradation"),
        (lambda: cascade([NEXT, LAST], 2), r"diffusion must be one that is given no image, got one with a degradation"),
        (lambda: restore(NEXT, INPUTS[0]), r"inputs must be images \[N, C, H, W\], at least one, got \[1, 4, 4\]"),
        (lambda: restore(NEXT, INPUTS, 0), r"n must be an integer of at least 1, got 0"),
        (
            lambda: restore(NEXT, INPUTS, classes=[0]),
            r"classes must be int64 \[3\], one an image, got torch.int64 \[1\]",
        ),
        (lambda: cascade([BASE], 1), r"models must be at least two, the second of which enlarges, got 1"),
        (
            lambda: cascade([BASE, BASE], 1),
            r"model 1 must have a degradation, the images that it is given, got one with",
        ),
        (lambda: cascade([BASE, NEXT], 1, PLANS), r"plans must be one for each of the 2 models, got 3"),
        (
            lambda: cascade([BASE, LAST], 1),
            r"model 1 must take images \[1, 4, 4\], those of model 0, got one that takes \[1, 8, 8\]",
        ),
        (lambda: cascade([BASE, model(Inpainting(), 4)], 1), r"got one that takes \[2, 4, 4\]"),
        (lambda: cascade([BASE, NEXT], 1, augmentation=1.0), r"augmentation must lie in \[0, 1\), got 1.0"),
        (
            lambda: cascade([BASE, model(TWICE, 8, classes=2)], 3, classes="even"),
            r"classes must lie in 0..1 of model 1, got 2",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
