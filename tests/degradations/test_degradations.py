"""What is left of an image, by NumPy and scipy; that its seed alone decides it; projections against a solver."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage, optimize
from torch import Tensor

from diffkern import degradations
from diffkern.degradations import Colourisation, Deblurring, Degradation, Inpainting, SuperResolution
from diffkern.degradations._nearest import nearest_with_mean

EVERY: list[Degradation] = [
    SuperResolution(2),
    SuperResolution(4, augmentation=0.5),
    SuperResolution(2, "bicubic"),
    *(Inpainting(mask, share) for mask, share in (("box", 0.25), ("brush", 0.3), ("side", 0.5), ("pixels", 0.6))),
    Colourisation(drop=0.25),
    Deblurring(1.3),
]
SHAPE = (5, 3, 12, 20)
SEEDS = torch.tensor([3, -7, 2**40, 11, 12])
IDS = [repr(each) for each in EVERY]


def images(shape: Sequence[int] = SHAPE, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2.0 - 1.0


@pytest.mark.parametrize("degradation", EVERY, ids=IDS)
def test_shapes_batches_and_json(degradation: Degradation) -> None:
    x0 = images()
    y = degradation.degrade(x0, SEEDS)
    assert tuple(y.shape[1:]) == degradation.size(SHAPE[1:])
    assert degradation.channels(3) == y.shape[1]
    assert degradation.sample_shape(y.shape[1:]) == SHAPE[1:]
    assert degradation.shown(y).shape == x0.shape
    assert degradation.resizes == (y.shape[2:] != x0.shape[2:])
    for i in (0, 3):
        assert torch.equal(degradation.degrade(x0[i : i + 1], SEEDS[i : i + 1])[0], y[i]), "the same in any batch"
    laid = x0.contiguous(memory_format=torch.channels_last)
    assert torch.equal(degradation.degrade(laid, SEEDS), y)
    assert torch.equal(degradation.degrade_alike(x0, y), y)
    assert degradation.nothing(y).shape == y.shape
    assert degradations.from_dict(degradation.to_dict()) == degradation
    half = degradation.degrade(x0.bfloat16(), SEEDS)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), y, rtol=0.02, atol=0.02)


def test_area_is_the_mean_of_squares() -> None:
    x0 = images()
    expected = x0.numpy().reshape(5, 3, 3, 4, 5, 4).mean((3, 5))
    np.testing.assert_allclose(SuperResolution(4).degrade(x0).numpy(), expected, atol=1e-6)


def test_bicubic_is_pillows() -> None:
    x0 = images((1, 1, 24, 36))
    reduced = Image.fromarray(x0[0, 0].numpy()).resize((9, 6), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(SuperResolution(4, "bicubic").degrade(x0)[0, 0].numpy(), np.array(reduced), atol=1e-5)


def test_the_blur_is_scipys() -> None:
    x0 = images((2, 1, 17, 9))
    found = Deblurring(1.3).degrade(x0)
    for image, blurred in zip(x0[:, 0].numpy(), found[:, 0].numpy(), strict=True):
        expected = ndimage.gaussian_filter(image.astype(np.float64), 1.3, mode="nearest", truncate=4.0)
        np.testing.assert_allclose(blurred, expected, atol=1e-6)


def test_the_luma_is_pillows_grey() -> None:
    pixels = torch.randint(0, 256, (9, 7, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    grey = np.array(Image.fromarray(pixels.numpy()).convert("L"))
    luma = Colourisation().degrade(pixels.permute(2, 0, 1)[None] / 127.5 - 1.0)[0, 0]
    assert np.abs((luma.numpy() + 1.0) * 127.5 - grey).max() <= 1.0


@pytest.mark.parametrize(
    ("mask", "share"), [("box", 0.1), ("box", 0.5), ("brush", 0.2), ("side", 0.25), ("pixels", 0.7)]
)
def test_masks_hide_their_share_and_differ(mask: Any, share: float) -> None:
    hidden = Inpainting(mask, share).masks((40, 3, 24, 32), 0)
    shares = hidden.double().mean((1, 2))
    assert (shares - share).abs().max() < (0.06 if mask == "box" else 0.5 / (24 * 32) + 1e-9)
    assert len(hidden.flatten(1).unique(dim=0)) == 4 if mask == "side" else len(hidden.flatten(1).unique(dim=0)) > 30
    for one in hidden.numpy():
        if mask == "pixels":
            continue
        labels, parts = ndimage.label(one, np.ones((3, 3)))
        assert parts == 1, "one piece"
        if mask in ("box", "side"):
            rows, columns = np.nonzero(one.any(1))[0], np.nonzero(one.any(0))[0]
            assert one[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all(), "a rectangle"
        assert labels.shape == one.shape


def test_a_masked_image_has_its_mask_first_and_zeros() -> None:
    x0 = images()
    inpainting = Inpainting("pixels", 0.4)
    y, hidden = inpainting.degrade(x0, SEEDS), inpainting.masks(SHAPE, SEEDS)
    assert torch.equal(y[:, 0] != 0, hidden)
    assert torch.equal(y[:, 1:], torch.where(hidden[:, None], torch.zeros(()), x0))
    assert torch.equal(inpainting.masked(x0, hidden[:, None].float()), y)
    assert torch.equal(inpainting.nothing(y)[:, 0], torch.ones(5, 12, 20)), "all is hidden"
    noisy = inpainting.noised(y, torch.full((5,), 0.5), SEEDS)
    assert torch.equal(noisy[:, :1], y[:, :1]), "the mask has no noise"
    with pytest.raises(ValueError, match=r"mask must have the shape \[5, 12, 20\] of the images, got \[5, 20, 12\]"):
        inpainting.masked(x0, hidden.mT)


@pytest.mark.parametrize("degradation", [d for d in EVERY if d.projects], ids=repr)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_projected_sample_is_consistent_and_stays(degradation: Degradation, clip: float | None) -> None:
    y = degradation.degrade(images(), SEEDS)
    sample = images(seed=1) * 1.2
    made = degradation.project(sample, y, clip)
    bicubic = degradation == SuperResolution(2, "bicubic")
    error = float((degradation.degrade_alike(made, y) - y).abs().max())
    assert error <= (2.0 * 2.0 / 255.0 if bicubic and clip is not None else 1e-5)
    again = degradation.project(made, y, clip)
    torch.testing.assert_close(again, made, rtol=0.0, atol=4.0 * error + 1e-5)
    if clip is not None:
        assert float(made.abs().max()) <= clip
        seen = ((made + 1.0) * 127.5).round() / 127.5 - 1.0  # as a file has it
        left = float((degradation.degrade_alike(seen, y) - y).abs().max()) * 127.5
        assert left <= 2.0, "in units of 1/255"
    assert degradation.project(sample.bfloat16(), y).dtype == torch.bfloat16


@pytest.mark.parametrize("spread", [0.3, 1.5])
def test_the_nearest_point_is_that_of_a_solver(spread: float) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64) * spread
    weights = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)
    mean = torch.linspace(-0.9, 0.9, 6, dtype=torch.float64)
    found = nearest_with_mean(x, weights, mean, 1.0)
    for i in range(6):
        solved = optimize.minimize(
            lambda v, i=i: ((v - x[i].numpy()) ** 2).sum(),
            np.full(5, float(mean[i])),
            jac=lambda v, i=i: 2.0 * (v - x[i].numpy()),
            bounds=[(-1.0, 1.0)] * 5,
            constraints={"type": "eq", "fun": lambda v, i=i: v @ weights.numpy() - float(mean[i])},
            tol=1e-12,
        )
        np.testing.assert_allclose(found[i].numpy(), solved.x, atol=1e-5)
    outside = nearest_with_mean(x, weights, torch.full((6,), 2.0, dtype=torch.float64), 1.0)
    torch.testing.assert_close(outside, torch.ones_like(outside), msg="the nearest mean there is")


@pytest.mark.parametrize("side", [8, 28])
def test_black_and_white_is_reached_by_bicubic_too(side: int) -> None:
    """Where nearly all of an image lies at the ends of the range; and the nearest such image is found."""
    generator = torch.Generator().manual_seed(2)
    x0 = (torch.rand(8, 1, side, side, generator=generator) - 0.5).sign()
    degradation = SuperResolution(2, "bicubic")
    y, sample = degradation.degrade(x0), x0 + 0.5 * torch.randn(x0.shape, generator=generator)
    made = degradation.project(sample, y)
    assert float(made.abs().max()) <= 1.0
    assert float((degradation.degrade(made) - y).abs().max()) * 127.5 <= 1.5, "in units of 1/255"
    assert float((made - sample).square().mean()) <= float((x0 - sample).square().mean())


def test_without_a_range_the_enlarged_residual_is_added() -> None:
    x0, sample = images(), images(seed=1)
    y = SuperResolution(4).degrade(x0)
    residual = (y - SuperResolution(4).degrade(sample)).repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(SuperResolution(4).project(sample, y, None), sample + residual)


def test_the_noise_of_the_input() -> None:
    degradation = SuperResolution(2, augmentation=0.6, drop=0.25)
    seeds = torch.arange(4000)
    levels = degradation.levels(seeds)
    assert 0.0 <= float(levels.min()) < 0.01 < 0.59 < float(levels.max()) < 0.6
    assert abs(float(levels.mean()) - 0.3) < 0.01
    assert abs(float(degradation.left_out(seeds).double().mean()) - 0.25) < 0.02
    y = torch.full((4000, 1, 2, 2), 0.5)
    noisy = degradation.noised(y, torch.full((4000,), 0.8, dtype=torch.float64), seeds)
    assert abs(float(noisy.mean()) - 0.6 * 0.5) < 0.02, "sqrt(1 - s^2) y"
    assert abs(float(noisy.std()) - 0.8) < 0.02
    assert torch.equal(degradation.noised(y[7:9], torch.full((2,), 0.8), seeds[7:9]), noisy[7:9])
    assert torch.equal(degradation.noised(y, torch.zeros(4000), seeds), y)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: SuperResolution(1), r"SuperResolution.factor must be an integer in 2..64, got 1"),
        (lambda: SuperResolution(2, "nearest"), r"SuperResolution.filter must be one of 'area', 'bicubic', got 'near"),
        (lambda: SuperResolution(augmentation=1.0), r"SuperResolution.augmentation must lie in \[0, 1\), got 1.0"),
        (lambda: Inpainting(share=1.0), r"Inpainting.share must lie in \(0, 1\), got 1.0"),
        (lambda: Deblurring(0.0), r"Deblurring.sigma must lie in \(0, 100\], got 0.0"),
        (lambda: Colourisation(drop=-0.5), r"Colourisation.drop must lie in \[0, 1\), got -0.5"),
        (lambda: SuperResolution(5).degrade(images()), r"a width divisible by factor = 5, got \[3, 12, 20\]"),
        (lambda: SuperResolution(4, "bicubic").size((3, 4, 8)), r"sides of at least 2 factor = 8, got \[3, 4, 8\]"),
        (lambda: Colourisation().degrade(images((1, 1, 2, 2))), r"x0 must be floating point \[B, 3, H, W\], got"),
        (lambda: Colourisation().size((1, 2, 2)), r"images must have 3 channels to be given their colours, got 1"),
        (lambda: Deblurring().project(images(), images()), r"Deblurring must have a projection in closed form"),
        (lambda: SuperResolution().project(images(), images()), r"image must have the shape \[3, 3, 5\] of the sample"),
        (lambda: Inpainting().project(images(), images()), r"image must have the shape \[4, 12, 20\] of the sample"),
        (lambda: Colourisation().project(images(), images()), r"image must have the shape \[1, 12, 20\] of the sample"),
        (lambda: SuperResolution().degrade(torch.zeros(3, 4, 4)), r"x0 must be floating point \[B, C, H, W\], got"),
        (
            lambda: degradations.get_degradation("super_resolutions"),
            r"degradation must be one of super_resolution, .*mean 'sup",
        ),
        (lambda: degradations.get_degradation("deblurring", size=2), r"deblurring has the fields .*sigma.*got 'size'"),
        (lambda: degradations.get_degradation(Deblurring(), sigma=2.0), r"options must go with a name, got sigma"),
        (
            lambda: degradations.from_dict({"kind": "Noise"}),
            r"degradation.kind must be one of SuperResolution, .*'Noise'",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(make: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as error:
        make()
    assert "\n" not in str(error.value)


def test_names() -> None:
    assert degradations.get_degradation("super-resolution", factor=2) == SuperResolution(2)
    assert degradations.get_degradation("colorization") == Colourisation()
    same = Deblurring(1.0)
    assert degradations.get_degradation(same) is same
    with pytest.raises(dataclasses.FrozenInstanceError):
        same.sigma = 2.0  # type: ignore[misc]
