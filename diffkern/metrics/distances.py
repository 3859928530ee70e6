"""Numbers of two sets of features: FID and its relatives, inception score, agreement. The formulas are torch-fidelity's
wherever it has them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffkern import checks
from diffkern.extras import need
from diffkern.metrics.statistics import Statistics

__all__ = ["Estimate", "agreement", "fid", "fid_infinity", "inception_score", "kid", "sfid"]


class Estimate(NamedTuple):
    """A value with the standard deviation over the parts that it is the mean of."""

    mean: float
    std: float


def fid(real: Statistics | Tensor, fake: Statistics | Tensor) -> float:
    """Fréchet distance of two normal distributions with the mean and covariance of the features (or of tensors [N, D]):
    |mean_a - mean_b|² + tr(A + B - 2 (A B)^(1/2)), float64.

    Of n images it is too large by about c / n (`fid_infinity`): compare at equal n only. Published FIDs are those of
    the "inception" extractor, 50,000 generated images and the whole training set. Symmetric in its arguments.

    ValueError for fewer than 2 images, statistics of two extractors, or other sizes.
    Source: Heusel et al. 2017 (arXiv 1706.08500), section 2; lecture 002.
    """
    return _frechet(*_pair(real, fake), "pooled")


def sfid(real: Statistics, fake: Statistics) -> float:
    """`fid` of the spatial features: whether things are where they should be.

    ValueError also where the extractor gives none.
    Source: Nash et al. 2021 (arXiv 2103.03841), section 4; the features of Dhariwal and Nichol 2021 (arXiv 2105.05233).
    """
    return _frechet(*_pair(real, fake), "spatial")


def fid_infinity(
    real: Statistics | Tensor,
    fake: Statistics | Tensor,
    *,
    points: int = 15,
    smallest: int | None = None,
    seed: int = 0,
) -> float:
    """FID for infinitely many generated images: `fid` of ``points`` random subsets of them, n from ``smallest`` to all,
    by least squares as a + b / n; a. It can be a little below 0.

    ``smallest`` is a tenth of them if None, but where they are enough not below D, the number of features, under which
    the bias is no b / n. It takes away the bias that generators have in different amounts; that of the real images,
    which stay as many as they are, remains. ``fake`` statistics must have kept their features.
    Source: Chong and Forsyth 2020 (arXiv 1911.07023), section 3.
    """
    reference, whole = _pair(real, fake)
    features = whole.features
    half = max(2, len(features) // 2)
    least = min(half, max(len(features) // 10, features.shape[1])) if smallest is None else smallest
    if points < 2 or not 2 <= least < len(features):
        raise ValueError(
            f"points must be at least 2 and smallest lie in 2..{len(features) - 1}, got {points} and {least}"
        )
    random = np.random.default_rng(seed)
    counts = np.linspace(least, len(features), points).round().astype(np.int64)
    values = []
    for count in counts.tolist():
        chosen = torch.from_numpy(random.permutation(len(features))[:count])
        values.append(_frechet(reference, Statistics.of(features[chosen]), "pooled"))
    return float(np.polynomial.Polynomial.fit(1.0 / counts, values, 1).convert().coef[0])


def kid(
    real: Statistics | Tensor,
    fake: Statistics | Tensor,
    *,
    subsets: int | None = None,
    subset_size: int | None = None,
    seed: int = 2020,
) -> Estimate:
    """Kernel distance: the unbiased estimate of the squared MMD with the kernel (xᵀy / D + 1)³, averaged over
    ``subsets`` of ``subset_size`` images of each set: 1000, or as many as the smaller set has, and so many subsets that
    each image is drawn about ten times, at most 100.

    Unlike FID it has no bias in n; it can be a little below 0. Statistics must have kept their features.
    Source: Bińkowski et al. 2018 (arXiv 1801.01401), section 4.
    """
    a, b = _pair(real, fake)
    size = min(1000, a.count, b.count) if subset_size is None else subset_size
    if not 2 <= size <= min(a.count, b.count):
        raise ValueError(f"subset_size must lie in 2..{min(a.count, b.count)}, got {size}")
    if subsets is None:
        subsets = min(100, -(-10 * max(a.count, b.count) // size))
    if subsets < 1:
        raise ValueError(f"subsets must be at least 1, got {subsets}")
    library = need("torch_fidelity.metric_kid", "torch-fidelity", "evaluate")
    found = library.kid_features_to_metric(
        b.features.double(),
        a.features.double(),
        kid_subsets=subsets,
        kid_subset_size=size,
        rng_seed=seed,
        verbose=False,
    )
    return Estimate(found[library.KEY_METRIC_KID_MEAN], found[library.KEY_METRIC_KID_STD])


def inception_score(logits: Statistics | Tensor, *, splits: int = 10, seed: int = 2020) -> Estimate:
    """exp of the mean KL divergence of p(class | image) from p(class), by logits [N, L], over ``splits`` random parts.

    1 (all images alike to the network) to L (each certain, all classes equally often). Blind to a generator that
    repeats one image a class.
    Source: Salimans et al. 2016 (arXiv 1606.03498), section 4.
    """
    found = logits.logits if isinstance(logits, Statistics) else logits
    checks.need_tensor("logits", found)
    if found.dim() != 2 or not 1 <= splits <= len(found):
        raise ValueError(f"logits must be [N, L], N at least splits = {splits}, got {checks.got(found)}")
    library = need("torch_fidelity.metric_isc", "torch-fidelity", "evaluate")
    values = library.isc_features_to_metric(found.cpu(), splits=splits, rng_seed=seed)
    return Estimate(values[library.KEY_METRIC_ISC_MEAN], values[library.KEY_METRIC_ISC_STD])


def agreement(logits: Tensor, labels: Tensor) -> float:
    """The share of images [N] whose largest logit [N, L] is that of the class that was asked for, int64 [N]."""
    if logits.dim() != 2 or labels.shape != logits.shape[:1] or not len(logits):
        raise ValueError(
            f"logits must be [N, L] and labels [N], N at least 1, got {checks.got(logits)} and {checks.got(labels)}"
        )
    if labels.is_floating_point() or not bool(((labels >= 0) & (labels < logits.shape[1])).all()):
        raise ValueError(f"labels must be integers in 0..{logits.shape[1] - 1}, got {labels.unique().tolist()[:10]}")
    return (logits.argmax(1) == labels).double().mean().item()


def _frechet(real: Statistics, fake: Statistics, part: str) -> float:
    moments = [of.moments(part) for of in (real, fake)]
    if len({len(mean) for mean, _ in moments}) > 1:
        raise ValueError(f"features must be of one size, got {' and '.join(str(len(mean)) for mean, _ in moments)}")
    library = need("torch_fidelity.metric_fid", "torch-fidelity", "evaluate")
    a, b = ({"mu": mean.numpy(), "sigma": covariance.numpy()} for mean, covariance in moments)
    found: float = library.fid_statistics_to_metric(a, b, False)[library.KEY_METRIC_FID]
    return max(0.0, found)  # rounding can leave a little below zero where both are the same


def _pair(real: Statistics | Tensor, fake: Statistics | Tensor) -> tuple[Statistics, Statistics]:
    """Both as statistics of one extractor; of features given as tensors that is what the other says."""
    named = [of.extractor for of in (real, fake) if isinstance(of, Statistics)]
    if len(set(named)) > 1:
        raise ValueError(f"real and fake must be of one extractor to be compared, got {' and '.join(map(repr, named))}")
    found = []
    for name, of in (("real", real), ("fake", fake)):
        if not isinstance(of, Statistics | Tensor):
            raise ValueError(f"{name} must be Statistics or features [N, D], got {type(of).__name__}")
        found.append(Statistics.of(of, extractor="".join(named[:1])) if isinstance(of, Tensor) else of)
    return found[0], found[1]
