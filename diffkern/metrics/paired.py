"""How near images are to those that they should be: PSNR, SSIM, a distance of features; and to their inputs.

For models that give back what an image has lost (`diffkern.degradations`), whose truth is known.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from diffkern.checks import need_tensor
from diffkern.metrics.features import Extractor

if TYPE_CHECKING:
    from diffkern.degradations import Degradation

__all__ = ["PairedScores", "consistency", "feature_distance", "paired_scores", "paired_table", "psnr", "ssim"]

WINDOW, SIGMA, K1, K2 = 11, 1.5, 0.01, 0.03
"""Of SSIM: Wang et al. 2004, section III."""


def psnr(images: Tensor, truth: Tensor) -> Tensor:
    """10 log10(L^2 / mean |x - y|^2) of images [B, C, H, W] in [-1, 1], L = 2, in dB: float64 [B]; inf if equal."""
    x, y = _pair(images, truth)
    return 10.0 * torch.log10(4.0 / (x - y).square().flatten(1).mean(1))


def ssim(images: Tensor, truth: Tensor) -> Tensor:
    """The structural similarity of images [B, C, H, W] in [-1, 1], float64 [B], 1 if equal.

        (2 m_x m_y + C1)(2 s_xy + C2) / ((m_x^2 + m_y^2 + C1)(s_x^2 + s_y^2 + C2)), C_i = (K_i L)^2, L = 1

    of brightness in [0, 1] (the ratio of means has no meaning for values that may be negative), with means and
    covariances under a Gaussian window of 11 x 11, sigma 1.5, averaged over the places where it lies inside, and over
    channels: Wang et al. 2004; scikit-image with gaussian_weights and without sample covariance. Of images with a side
    below 11 the window is the largest odd one that fits.
    """
    x, y = (0.5 * z + 0.5 for z in _pair(images, truth))
    size = min(WINDOW, *(side - 1 + side % 2 for side in x.shape[2:]))
    at = torch.arange(size, dtype=torch.float64, device=x.device) - size // 2
    taps = torch.exp(-0.5 * (at / SIGMA).square())
    taps = taps / taps.sum()

    def mean(z: Tensor) -> Tensor:
        """Under the window, [B C, 1, H - size + 1, W - size + 1]."""
        flat = z.reshape(-1, 1, *z.shape[2:])
        return F.conv2d(F.conv2d(flat, taps.reshape(1, 1, -1, 1)), taps.reshape(1, 1, 1, -1))

    c1, c2 = K1**2, K2**2
    m_x, m_y = mean(x), mean(y)
    s_xx, s_yy, s_xy = mean(x * x) - m_x * m_x, mean(y * y) - m_y * m_y, mean(x * y) - m_x * m_y
    found = (2.0 * m_x * m_y + c1) * (2.0 * s_xy + c2) / ((m_x * m_x + m_y * m_y + c1) * (s_xx + s_yy + c2))
    return found.reshape(len(x), -1).mean(1)


def feature_distance(features: Tensor, truth: Tensor) -> float:
    """mean |f_i - g_i|^2 / (2 sum of the variances of g), of pooled features [N, D] of images and of their truth.

    0: the same features; 1: as far from each other as two of the true images are on average.
    """
    if features.shape != truth.shape or features.dim() != 2 or len(features) < 2:
        raise ValueError(
            f"features must be [N, D] of images and of their truth, N at least 2, got {list(features.shape)} and "
            f"{list(truth.shape)}"
        )
    f, g = features.double(), truth.double()
    return float((f - g).square().sum(1).mean() / (2.0 * g.var(0).sum()))


def consistency(samples: Tensor, inputs: Tensor, degradation: Degradation) -> Tensor:
    """The largest difference between what is left of each sample and its input, in steps of 1/255: float64 [B].

    Samples are seen as a file has them, in 256 values.
    """
    seen = (samples.detach().double().clamp(-1.0, 1.0) * 127.5 + 127.5).round() / 127.5 - 1.0
    left = degradation.degrade_alike(seen, inputs.to(seen)) - inputs.to(seen)
    return left.abs().flatten(1).amax(1) * 127.5


@dataclasses.dataclass(frozen=True)
class PairedScores:
    """Means over the images of one kind, for a table; ``consistency`` is the mean of each image's largest difference
    and ``worst`` the largest of all."""

    name: str
    images: int
    psnr: float
    ssim: float
    feature_distance: float | None
    consistency: float
    worst: float


def paired_scores(
    name: str,
    samples: Tensor,
    truth: Tensor,
    inputs: Tensor,
    degradation: Degradation,
    extractor: Extractor | None = None,
    *,
    batch: int = 64,
) -> PairedScores:
    """All of them, of samples [N, C, H, W], clamped to [-1, 1], whose ``inputs`` were made of the ``truth``."""
    if not len(samples) == len(truth) == len(inputs):
        raise ValueError(
            f"samples, truth and inputs must be as many, got {len(samples)}, {len(truth)} and {len(inputs)}"
        )
    samples = samples.clamp(-1.0, 1.0)
    parts = [slice(i, i + batch) for i in range(0, len(samples), batch)]

    def every(of: Callable[[slice], Tensor]) -> Tensor:
        return torch.cat([of(part).cpu() for part in parts])

    distance = None
    if extractor is not None and len(samples) > 1:
        ours = every(lambda part: extractor(samples[part]).pooled)
        distance = feature_distance(ours, every(lambda part: extractor(truth[part]).pooled))
    left = every(lambda part: consistency(samples[part], inputs[part], degradation))
    return PairedScores(
        name,
        len(samples),
        float(every(lambda part: psnr(samples[part], truth[part])).mean()),
        float(every(lambda part: ssim(samples[part], truth[part])).mean()),
        distance,
        float(left.mean()),
        float(left.max()),
    )


def paired_table(rows: list[PairedScores]) -> str:
    """The scores as text, a line each."""
    wide = max(len("images"), *(len(row.name) for row in rows))
    lines = [f"{'':<{wide}}  {'PSNR':>7}  {'SSIM':>6}  {'features':>8}  {'consistency':>11}  {'worst':>7}"]
    for row in rows:
        features = "-" if row.feature_distance is None else f"{row.feature_distance:.4f}"
        decibels = "inf" if math.isinf(row.psnr) else f"{row.psnr:.2f}"
        lines.append(
            f"{row.name:<{wide}}  {decibels:>7}  {row.ssim:>6.3f}  {features:>8}  {row.consistency:>11.3f}  "
            f"{row.worst:>7.3f}"
        )
    lines.append(f"{rows[0].images} images; consistency in steps of 1/255: the mean of each image's largest difference")
    return "\n".join(lines)


def _pair(images: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """In float64; ValueError unless both are images of one shape."""
    for name, value in (("images", images), ("truth", truth)):
        need_tensor(name, value)
        if value.dim() != 4 or value.shape != truth.shape or not value.is_floating_point():
            raise ValueError(
                f"{name} must be floating point [B, C, H, W] of one shape with truth, got {value.dtype} "
                f"{list(value.shape)} and {list(truth.shape)}"
            )
    return images.detach().double(), truth.detach().double()
