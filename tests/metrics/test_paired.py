"""Measures of samples whose truth is known, against scikit-image and NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.lazy import Lazy
from torch import Tensor

from diffkern.degradations import Inpainting, SuperResolution
from diffkern.metrics import Features, consistency, feature_distance, paired_scores, paired_table, psnr, ssim

measures = Lazy("skimage.metrics")


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(shape, generator=generator) * 2.0 - 1.0
    return (truth + 0.3 * torch.randn(shape, generator=generator)).clamp(-1.0, 1.0), truth


@pytest.mark.parametrize("shape", [(3, 3, 16, 21), (2, 1, 11, 30), (2, 3, 12, 11)])
def test_psnr_and_ssim_are_scikit_images(shape: tuple[int, ...]) -> None:
    images, truth = pair(*shape)
    for i, (x, y) in enumerate(zip(images.double().numpy(), truth.double().numpy(), strict=True)):
        decibels = measures.peak_signal_noise_ratio(y, x, data_range=2.0)
        assert abs(float(psnr(images, truth)[i]) - decibels) < 1e-9
        options: dict[str, Any] = {"gaussian_weights": True, "use_sample_covariance": False}
        bright, other = (y + 1.0) / 2.0, (x + 1.0) / 2.0
        similar = measures.structural_similarity(bright, other, data_range=1.0, channel_axis=0, **options)
        assert abs(float(ssim(images, truth)[i]) - similar) < 1e-9


def test_of_small_images_the_window_is_smaller() -> None:
    images, truth = pair(2, 1, 8, 9)
    at = np.arange(7) - 3
    taps = np.exp(-0.5 * (at / 1.5) ** 2)
    window = np.outer(taps, taps) / taps.sum() ** 2
    for i in range(2):
        x, y = ((t[i, 0].double().numpy() + 1.0) / 2.0 for t in (images, truth))
        found = []
        for row in range(2):
            for column in range(3):
                a, b = (z[row : row + 7, column : column + 7] for z in (x, y))
                m, n = (window * a).sum(), (window * b).sum()
                v, w, c = (window * a * a).sum() - m * m, (window * b * b).sum() - n * n, (window * a * b).sum() - m * n
                found.append((2 * m * n + 1e-4) * (2 * c + 9e-4) / ((m * m + n * n + 1e-4) * (v + w + 9e-4)))
        assert abs(float(ssim(images, truth)[i]) - np.mean(found)) < 1e-9


def test_equal_images() -> None:
    _, truth = pair(2, 3, 16, 16)
    assert psnr(truth, truth).tolist() == [float("inf")] * 2
    torch.testing.assert_close(ssim(truth, truth), torch.ones(2, dtype=torch.float64))
    assert feature_distance(truth.flatten(1), truth.flatten(1)) == 0.0


def test_one_is_the_distance_of_two_images_at_random() -> None:
    features = torch.randn(4000, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3.0, 1, 1, 0.2])
    assert abs(feature_distance(features.roll(1, 0), features) - 1.0) < 0.03


def test_consistency_is_that_of_the_file_and_of_its_own_mask() -> None:
    images, truth = pair(2, 1, 8, 8)
    degradation = SuperResolution(2)
    inputs = degradation.degrade(truth)
    means = ((images.numpy() + 1.0) * 127.5).round().reshape(2, 4, 2, 4, 2).mean((2, 4))
    expected = np.abs(means - (inputs[:, 0].numpy() + 1.0) * 127.5).reshape(2, -1).max(1)
    np.testing.assert_allclose(consistency(images, inputs, degradation).numpy(), expected, atol=1e-4)
    assert float(consistency(degradation.project(images, inputs), inputs, degradation).max()) <= 2.0
    inpainting = Inpainting(share=0.5)
    inputs = inpainting.degrade(truth, 3)
    assert float(consistency(inpainting.project(images, inputs), inputs, inpainting).max()) <= 0.5 + 1e-4
    assert float(consistency(images, inputs, inpainting).max()) > 2.0


class _Pixels:
    name, dims, device = "pixels", 64, torch.device("cpu")

    def __call__(self, images: Tensor) -> Features:
        return Features(images.flatten(1), None, None)


def test_a_row_of_the_table_is_the_means() -> None:
    images, truth = pair(5, 1, 8, 8)
    degradation = SuperResolution(2)
    inputs = degradation.degrade(truth)
    row = paired_scores("samples", images, truth, inputs, degradation, _Pixels(), batch=2)
    assert abs(row.psnr - float(psnr(images, truth).mean())) < 1e-9
    assert abs(row.ssim - float(ssim(images, truth).mean())) < 1e-9
    assert row.feature_distance == feature_distance(images.flatten(1), truth.flatten(1))
    assert row.worst == float(consistency(images, inputs, degradation).max()) >= row.consistency
    plain = paired_scores("same", truth, truth, inputs, degradation)
    lines = paired_table([row, plain]).splitlines()
    assert lines[0].split() == ["PSNR", "SSIM", "features", "consistency", "worst"]
    assert lines[1].split()[:2] == ["samples", f"{row.psnr:.2f}"]
    assert lines[2].split()[:4] == ["same", "inf", "1.000", "-"]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda x: psnr(x, x[:1]),
            r"images must be floating point \[B, C, H, W\] of one shape with truth, got torch.fl",
        ),
        (lambda x: ssim(x.int(), x), r"images must be floating point .*got torch.int32 \[2, 1, 8, 8\]"),
        (
            lambda x: feature_distance(x.flatten(1)[:1], x.flatten(1)[:1]),
            r"features must be \[N, D\] .*N at least 2, got",
        ),
        (
            lambda x: paired_scores("a", x, x, x[:1], SuperResolution(2)),
            r"samples, truth and inputs must be as many, got 2, 2 and 1",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call(torch.zeros(2, 1, 8, 8))
