"""A diffusion with a degradation: what its network is given in training and in sampling, guidance, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.diffusion_cases import small_unet
from torch import Tensor, nn

from diffkern import Diffusion, ddim, guidance, ops, sample, schedules
from diffkern.degradations import Degradation, Inpainting, SuperResolution
from diffkern.nn import Preconditioned, TextConditioned, TextEncoder, TextEncoderConfig, Vocabulary
from diffkern.objectives.losses import drop_condition, simple_loss

SCHEDULE = schedules.cosine(20)
X0 = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
CLASSES = torch.tensor([0, 2, 1, 0])
SEEDS = ops.seeds(5, 4)
TWICE = SuperResolution(2, augmentation=0.5, drop=0.3)


def network(degradation: Degradation, **fields: Any) -> nn.Module:
    """Times, classes and images all matter: blocks start as more than their skips."""
    second = 1 if degradation.augmentation else 0
    upsample = "bilinear" if degradation.resizes else None
    own = {"concat_channels": degradation.channels(1), "concat_upsample": upsample, "ids": second, "id_channels": 16}
    return small_unet(**{**own, "zero_init": False, **fields})


def made(degradation: Degradation = TWICE, **options: Any) -> Diffusion:
    return Diffusion(network(degradation), SCHEDULE, "v", degradation=degradation, drop=0.4, **options)


def test_the_loss_is_that_of_the_functions_under_it() -> None:
    diffusion = made()
    levels = TWICE.levels(SEEDS)
    image = TWICE.noised(TWICE.degrade(X0), levels, SEEDS)
    image = torch.where(TWICE.left_out(SEEDS).reshape(-1, 1, 1, 1), torch.zeros(()), image)
    null = torch.tensor(3)
    cond = {"class": drop_condition(CLASSES, null, 0.4, SEEDS), "image": image, "ids": 1000.0 * levels.float()[:, None]}
    t = torch.tensor([0, 7, 13, 19])
    expected = simple_loss(
        lambda x, t: diffusion.model(x, t, cond), X0, t, SCHEDULE, "v", seeds=SEEDS, reduction="none"
    )
    found = diffusion.train().loss(X0, t, cond=CLASSES, seeds=SEEDS, reduction="none")
    assert torch.equal(found, expected)
    given = diffusion.condition(X0, CLASSES, SEEDS)
    assert given.keys() == {"class", "image", "ids"}
    assert torch.equal(given["image"], image)
    whole = diffusion.eval().condition(X0, CLASSES, SEEDS)["image"]
    assert torch.equal(whole, TWICE.noised(TWICE.degrade(X0), levels, SEEDS)), "nothing is left out in evaluation"
    assert bool((whole != image).any())


def test_what_an_example_is_given_is_the_same_in_any_batch() -> None:
    diffusion = made(Inpainting("brush", 0.3, drop=0.5)).train()
    every = diffusion.condition(X0, CLASSES, SEEDS)
    one = diffusion.condition(X0[2:3], CLASSES[2:3], SEEDS[2:3])
    assert all(torch.equal(one[key], every[key][2:3]) for key in every)
    assert set(every) == {"class", "image"}


def test_samples_are_those_of_the_functions_under_it() -> None:
    diffusion, image = made(), TWICE.degrade(X0)
    plan = diffusion.plan("ddim", 3)
    cond = {"class": CLASSES, "image": TWICE.noised(image, torch.full((4,), 0.25), SEEDS)}
    cond["ids"] = torch.full((4, 1), 250.0)
    x = ops.randn(tuple(X0.shape), SEEDS)

    def model(x: Tensor, t: Tensor, cond: Any) -> Tensor:
        return diffusion.model.eval()(x, t, cond)

    expected = sample(model, x, plan, cond=cond)
    given = {"image": image, "seeds": SEEDS, "cond": CLASSES}
    assert torch.equal(diffusion.sample(4, plan, **given, augmentation=0.25), expected)
    none = {**cond, "class": torch.full((4,), 3)}
    uncond = {
        "class": none,
        "image": {**cond, "image": torch.zeros_like(image)},
        "both": {**none, "image": torch.zeros_like(image)},
    }
    for without, other in uncond.items():
        guided = guidance.classifier_free(model, cond, other, 2.0)
        expected = sample(guided, x, plan)
        found = diffusion.sample(4, plan, **given, augmentation=0.25, guidance=2.0, without=without)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    plain = diffusion.sample(4, plan, **given, augmentation=0.25, guidance=2.0)
    assert torch.equal(plain, diffusion.sample(4, plan, **given, augmentation=0.25, guidance=2.0, without="class"))


def test_a_sample_is_the_same_in_any_batch_and_of_any_size() -> None:
    diffusion, image = made(), TWICE.degrade(X0)
    every = diffusion.sample(4, "ddpm", 3, image=image, seeds=SEEDS, cond=CLASSES, augmentation=0.5, guidance=1.5)
    given = {"image": image[2:3], "seeds": SEEDS[2:3], "cond": CLASSES[2:3], "augmentation": 0.5, "guidance": 1.5}
    torch.testing.assert_close(diffusion.sample(1, "ddpm", 3, **given), every[2:3], rtol=1e-4, atol=1e-5)
    four = diffusion.sample(4, "ddim", 3, image=image[:1], seeds=SEEDS)
    assert torch.equal(four, diffusion.sample(4, "ddim", 3, image=image[:1].expand(4, -1, -1, -1), seeds=SEEDS))
    assert bool((four[0] != four[1]).any()), "several samples of one input"
    assert diffusion.sample(2, "ddim", 2, image=torch.zeros(1, 1, 6, 10), seeds=0).shape == (2, 1, 12, 20)
    assert bool((every != diffusion.sample(4, "ddpm", 3, seeds=SEEDS, cond=CLASSES, image=image)).any())


def test_without_classes_guidance_is_over_the_image() -> None:
    degradation = Inpainting(drop=0.2)
    diffusion = Diffusion(network(degradation, classes=0), SCHEDULE, "v", degradation=degradation)
    image = degradation.degrade(X0, SEEDS)
    plan = ddim(SCHEDULE, 3, prediction="v")
    found = diffusion.sample(4, plan, image=image, seeds=SEEDS, guidance=2.0)
    cond, none = {"image": image}, {"image": degradation.nothing(image)}
    guided = guidance.classifier_free(lambda x, t, c: diffusion.model.eval()(x, t, c), cond, none, 2.0)
    torch.testing.assert_close(found, sample(guided, ops.randn(tuple(X0.shape), SEEDS), plan), rtol=1e-4, atol=1e-5)


def test_a_network_in_a_formula_takes_the_image_of_the_one_inside(tmp_path: Path) -> None:
    degradation = SuperResolution(2, augmentation=0.5)
    wrapped = Preconditioned.of(network(degradation))
    diffusion = Diffusion(wrapped, schedules.edm(), "x0", degradation=degradation)
    image = degradation.degrade(X0)
    assert bool(torch.isfinite(diffusion.loss(X0, cond=CLASSES, seeds=0)))
    made = diffusion.sample(4, "heun", 2, image=image, seeds=0, cond=CLASSES)
    diffusion.save_pretrained(tmp_path)
    again = Diffusion.from_pretrained(tmp_path)
    assert torch.equal(again.sample(4, "heun", 2, image=image, seeds=0, cond=CLASSES), made)
    with pytest.raises(
        ValueError, match=r"model must have concat_channels = 1 for the image of SuperResolution, got 0"
    ):
        Diffusion(Preconditioned.of(small_unet()), schedules.edm(), "x0", degradation=degradation)


def test_text_goes_beside_an_image(tmp_path: Path) -> None:
    degradation = Inpainting(share=0.3, drop=0.2)
    words = Vocabulary.of(["a thick three", "seven"])
    encoder = TextEncoder(TextEncoderConfig.of(words, context_channels=12, width=16, heads=2))
    net = network(degradation, classes=0, context_channels=12, transformer_depth=1)
    diffusion = Diffusion(TextConditioned.of(net, encoder), SCHEDULE, "v", degradation=degradation, drop=0.1)
    tokens, image = diffusion.model.tokens(["three", "a thick seven", "seven", ""]), degradation.degrade(X0, SEEDS)
    assert bool(torch.isfinite(diffusion.train().loss(X0, cond=tokens, seeds=SEEDS)))
    given: dict[str, Any] = {"image": image, "seeds": SEEDS, "cond": tokens, "guidance": 2.0}
    plan = diffusion.plan("ddim", 3)
    made = diffusion.sample(4, plan, **given)
    model = diffusion.eval().model
    cond, uncond = ({"tokens": t, "image": image} for t in (tokens, model.null.expand(4, -1)))
    guided = guidance.classifier_free(lambda x, t, c: model(x, t, c), cond, uncond, 2.0)
    torch.testing.assert_close(made, sample(guided, ops.randn(tuple(X0.shape), SEEDS), plan), rtol=1e-4, atol=1e-5)
    assert bool((made != diffusion.sample(4, plan, **{**given, "cond": tokens.flip(0)})).any())
    diffusion.save_pretrained(tmp_path)
    assert torch.equal(Diffusion.from_pretrained(tmp_path).sample(4, plan, **given), made)


def test_a_network_of_ones_own_sees_class_and_image() -> None:
    class Seen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))
            self.conds: list[Any] = []

        def forward(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
            self.conds.append(cond)
            return self.scale * x

    net = Seen()
    diffusion = Diffusion(net, SCHEDULE, "v", degradation="deblurring", shape=(1, 8, 8))
    tokens = torch.arange(12).reshape(4, 3)
    diffusion.loss(X0, cond=tokens, seeds=0)
    diffusion.sample(4, "ddim", 1, image=X0, cond=tokens, uncond=tokens * 0, guidance=2.0, seeds=0)
    assert [sorted(cond) for cond in net.conds] == [["class", "image"]] * 2
    assert torch.equal(net.conds[1]["class"], torch.cat([tokens * 0, tokens]))
    assert torch.equal(net.conds[1]["image"], torch.cat([X0, X0]))


def test_files(tmp_path: Path) -> None:
    diffusion = made()
    diffusion.save_pretrained(tmp_path / "a")
    back = Diffusion.from_pretrained(tmp_path / "a")
    assert back.degradation == TWICE
    image = TWICE.degrade(X0)
    assert torch.equal(
        back.sample(4, steps=2, seeds=0, image=image), diffusion.sample(4, steps=2, seeds=0, image=image)
    )
    Diffusion(small_unet(), SCHEDULE, "v").save_pretrained(tmp_path / "b")
    text = (tmp_path / "b" / "config.json").read_text()
    assert "degradation" not in json.loads(text), "as before there were degradations"
    assert Diffusion.from_pretrained(tmp_path / "b").degradation is None
    place = tmp_path / "a" / "config.json"
    data = json.loads(place.read_text())
    data["degradation"]["factor"] = "two"
    place.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=r"degradation.factor must be an integer, got 'two'"):
        Diffusion.from_pretrained(tmp_path / "a")


def test_it_learns_to_use_its_input() -> None:
    """Images of one grey value each, which the input gives away: the error falls below that of any guess without."""
    degradation = SuperResolution(2)
    torch.manual_seed(0)
    net = network(degradation, classes=0, channels=8, groups=4, heads=1)
    diffusion = Diffusion(net, SCHEDULE, "x0", degradation=degradation)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=3e-3)
    for step in range(150):
        x0 = (torch.rand(16, 1, 1, 1, generator=torch.Generator().manual_seed(step)) * 2.0 - 1.0).expand(16, 1, 8, 8)
        loss = diffusion.loss(x0, seeds=step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x0 = torch.linspace(-0.9, 0.9, 8).reshape(8, 1, 1, 1).expand(8, 1, 8, 8)
    found = diffusion.sample(8, "ddim", 5, image=degradation.degrade(x0), seeds=0)
    assert float((found - x0).square().mean().sqrt()) < 0.15


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Diffusion(small_unet(), SCHEDULE, degradation=TWICE), r"model must have concat_channels = 1 for the"),
        (
            lambda: Diffusion(small_unet(concat_channels=1), SCHEDULE, degradation=SuperResolution(2)),
            r"model must have a concat_upsample for an image of another size, got none",
        ),
        (
            lambda: Diffusion(network(SuperResolution(2)), SCHEDULE, degradation=TWICE),
            r"model must have ids = 1, its second time, for an image with noise of its own, got 0",
        ),
        (lambda: Diffusion(small_unet(), SCHEDULE, degradation="blurring"), r"degradation must be one of super_res"),
        (lambda: Diffusion(network(TWICE), SCHEDULE, degradation=SuperResolution(3)), r"divisible by factor = 3, got"),
        (lambda: made().sample(4), r"image must be given, the inputs of SuperResolution, got NoneType"),
        (lambda: made().sample(4, image=X0[:3, :, :4, :4]), r"image must have the shape \[4, 1, 4, 4\], or 1 for all"),
        (
            lambda: made().sample([4, 1, 8, 8], image=X0),
            r"image must have the shape \[4, 1, 4, 4\], or 1 for all, got \[4, 1, 8, 8\]",
        ),
        (
            lambda: made().sample(1, image=torch.zeros(1, 1, 4, 4, dtype=torch.int64)),
            r"image must be floating point in",
        ),
        (
            lambda: made().sample(1, image=X0[:1, :, :4, :4], augmentation=0.6),
            r"augmentation must lie in \[0, 0.5\], the largest level of the training, got 0.6",
        ),
        (
            lambda: made().sample(1, image=X0[:1, :, :4, :4], cond=CLASSES[:1], guidance=2.0, without="text"),
            r"without must be one of class, image, both, got 'text'",
        ),
        (
            lambda: made(Inpainting()).sample(1, image=torch.zeros(1, 2, 8, 8), guidance=2.0),
            r"without='image' needs a model that was trained without its image as well, got",
        ),
        (
            lambda: Diffusion(small_unet(), SCHEDULE).sample(1, image=X0[:1]),
            r"image must be left out for a Diffusion without a degradation, got one",
        ),
        (
            lambda: made().sample(1, image=X0[:1, :, :4, :4], cond={"class": 1}),
            r"cond must be a tensor \[B, ...\] besi",
        ),
        (
            lambda: made().sample(1, image=X0[:1, :, :4, :4], cond=CLASSES),
            r"cond must have the shape \[1\], one an image, got \[4\]",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        call()
    assert "\n" not in str(error.value)


class Halved(nn.Module):
    """An autoencoder of images of 3 channels: latents of 4, the means of 2 x 2 of each and of all channels."""

    factor = 2

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def latents(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        small = nn.functional.avg_pool2d(x, 2) * self.scale
        return torch.cat([small, small.mean(1, keepdim=True)], 1)

    def images(self, z: Tensor) -> Tensor:
        return z[:, :3].repeat_interleave(2, 2).repeat_interleave(2, 3)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return 4, shape[1] // 2, shape[2] // 2


def test_inpainting_in_latents_is_the_form_of_nine_channels() -> None:
    inpainting = Inpainting("box", 0.3)
    net = small_unet(in_channels=4, out_channels=4, concat_channels=5, zero_init=False, classes=0)
    assert net.enter.weight.shape[1] == 9
    diffusion = Diffusion(net, SCHEDULE, "v", degradation=inpainting, autoencoder=Halved())
    x0 = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    given = diffusion.condition(x0, None, SEEDS)["image"]
    image = inpainting.degrade(x0, SEEDS)
    assert torch.equal(given[:, :1], nn.functional.max_pool2d(image[:, :1], 2))
    assert torch.equal(given[:, 1:], Halved().latents(image[:, 1:]).detach())
    assert bool(torch.isfinite(diffusion.loss(x0, seeds=0)))
    found = diffusion.sample(4, "ddim", 2, image=image, seeds=SEEDS)
    assert found.shape == x0.shape
    cond = {"image": given}
    plan = diffusion.plan("ddim", 2)
    expected = sample(lambda x, t, c: net.eval()(x, t, c), ops.randn((4, 4, 8, 8), SEEDS), plan, cond=cond)
    assert torch.equal(found, Halved().images(expected))
    with pytest.raises(ValueError, match=r"x0 must be images where they are degraded, got latents \[4, 4, 8, 8\]"):
        diffusion.loss(torch.zeros(4, 4, 8, 8))
    net = small_unet(in_channels=4, out_channels=4, concat_channels=4, classes=0)
    with pytest.raises(ValueError, match=r"model must have concat_channels = 5 for the image of Inpainting, got 4"):
        Diffusion(net, SCHEDULE, "v", degradation=inpainting, autoencoder=Halved())


def test_super_resolution_in_latents_sees_the_small_image() -> None:
    degradation = SuperResolution(2)
    fields = {"concat_channels": 3, "concat_upsample": "bilinear", "zero_init": False, "classes": 0}
    net = small_unet(in_channels=4, out_channels=4, **fields)
    diffusion = Diffusion(net, SCHEDULE, "v", degradation=degradation, autoencoder=Halved())
    x0 = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2.0 - 1.0
    assert torch.equal(diffusion.condition(x0)["image"], degradation.degrade(x0))
    assert diffusion.sample(2, "ddim", 2, image=torch.zeros(1, 3, 4, 8), seeds=0).shape == (2, 3, 8, 16)


@pytest.mark.full
@pytest.mark.parametrize(
    "degradation", [TWICE, SuperResolution(2, "bicubic"), Inpainting("brush"), Inpainting("box")], ids=repr
)
def test_the_loss_is_one_graph(degradation: Degradation) -> None:
    diffusion = made(degradation)
    expected = diffusion.loss(X0, cond=CLASSES, seeds=SEEDS)
    torch._dynamo.reset()  # as a program's first graph, and so that the next one is
    compiled = torch.compile(diffusion, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(X0, cond=CLASSES, seeds=SEEDS), expected, rtol=1e-5, atol=0.0)
    torch._dynamo.reset()
