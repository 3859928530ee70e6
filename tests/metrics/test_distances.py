"""FID and its relatives against what is known in closed form, scipy and torch-fidelity on the same features."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.lazy import Lazy, needs
from torch import Tensor

from diffkern.metrics import Features, Statistics, agreement, fid, fid_infinity, inception_score, kid, sfid

linalg = Lazy("scipy.linalg")
fidelity = Lazy("torch_fidelity")
pytestmark = needs("torch_fidelity", "scipy")


def normal(n: int, mean: Tensor, root: Tensor, seed: int = 0) -> Tensor:
    """n rows whose mean and unbiased covariance are exactly ``mean`` and root rootᵀ."""
    x = torch.randn(n, len(mean), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = x - x.mean(0)
    x = x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T
    return x @ root.T + mean


def test_fid_of_two_gaussians_is_their_distance() -> None:
    """Of diagonal covariances: sum (mean_a - mean_b)² + (sd_a - sd_b)²."""
    sd_a, sd_b = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([1.5, 0.5, 3.0]).double()
    mean = torch.tensor([0.0, 1.0, -2.0]).double()
    a, b = normal(20, torch.zeros(3).double(), sd_a.diag()), normal(30, mean, sd_b.diag(), 1)
    assert fid(a, b) == pytest.approx(5.0 + 0.25 + 2.25, rel=1e-9)
    assert fid(b, a) == pytest.approx(fid(a, b), rel=1e-9)
    assert fid(a, a) == pytest.approx(0.0, abs=1e-6)


def test_fid_of_any_gaussians_is_scipys() -> None:
    root_a = torch.tensor([[2.0, 0.0], [1.0, 0.5]]).double()
    root_b = torch.tensor([[0.3, 1.0], [-1.0, 2.0]]).double()
    mean = torch.tensor([1.0, -1.0]).double()
    a, b = root_a @ root_a.T, root_b @ root_b.T
    expected = 2.0 + np.trace((a + b).numpy() - 2.0 * np.real(linalg.sqrtm((a @ b).numpy())))
    found = fid(Statistics.of(normal(9, mean, root_a)), normal(9, 0 * mean, root_b, 1))
    assert found == pytest.approx(expected, rel=1e-8)


def test_sfid_is_the_fid_of_the_spatial_features() -> None:
    a, b = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)).double()
    real, fake = (Statistics.of(Features(torch.zeros(9, 1), spatial=x)) for x in (a, b))
    assert sfid(real, fake) == pytest.approx(fid(a, b), rel=1e-9)
    with pytest.raises(ValueError, match="must hold spatial features"):
        sfid(Statistics.of(a), Statistics.of(b))


def test_fid_has_a_bias_in_n_that_fid_infinity_takes_away() -> None:
    """n draws of the reference itself, N(0, I) in D dimensions: tr(S)/n of the mean, and of the covariance, whose root
    is I + E/2 to first order with E |E|² = D (D + 1) / n, D (D + 1) / 4n."""
    n, dims = 2000, 32
    draws = torch.randn(n, dims, generator=torch.Generator().manual_seed(3)).double()
    truth = Statistics.of(normal(100, torch.zeros(dims).double(), torch.eye(dims).double()))
    found = fid(truth, draws)
    assert found == pytest.approx((dims + dims * (dims + 1) / 4) / n, rel=0.1)
    assert abs(fid_infinity(truth, draws)) < 0.2 * found


def test_fid_infinity_of_a_line_in_one_over_n_is_its_intercept() -> None:
    """Two points: all rows, and a subset of known size; the line through both meets 1 / n = 0."""
    truth, draws = torch.randn(2, 30, 2, generator=torch.Generator().manual_seed(0)).double()
    chosen = np.random.default_rng(0).permutation(30)[:10]
    low, high = fid(truth, draws[chosen]), fid(truth, draws)
    expected = high - (low - high) / (1 / 10 - 1 / 30) * (1 / 30)
    found = fid_infinity(truth, Statistics.of(draws), points=2, smallest=10)
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert fid_infinity(truth, draws, points=2, smallest=10, seed=1) != found


def test_kid_of_whole_sets_is_the_unbiased_estimate() -> None:
    """Loops over the pairs, of Binkowski et al. 2018, eq. 4."""
    x, y = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(0)).double()
    y = y * 1.5 + 0.5

    def kernel(a: Tensor, b: Tensor) -> float:
        return float((a @ b / 3 + 1) ** 3)

    n = 7
    same = sum(kernel(s[i], s[j]) for s in (x, y) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    cross = sum(kernel(a, b) for a in x for b in y) / n**2
    found = kid(x, y, subsets=2)
    assert found.mean == pytest.approx(same - 2 * cross, rel=1e-9)
    assert found.std == pytest.approx(0.0, abs=1e-9)
    some = kid(x, y, subsets=18, subset_size=4)
    assert some.std > 0.0
    assert kid(x, y, subset_size=4) == some  # of 4 of 7: in 18 subsets each is drawn ten times


def test_inception_score_knows_its_two_ends() -> None:
    certain = 100.0 * torch.eye(5).repeat(20, 1)
    assert inception_score(certain, splits=1).mean == pytest.approx(5.0, rel=1e-6)
    assert inception_score(torch.ones(20, 5), splits=2) == pytest.approx((1.0, 0.0), abs=1e-6)
    half = torch.tensor([[math.log(3.0), 0.0], [0.0, math.log(3.0)]]).repeat(8, 1)  # p = 3/4, 1/4 and the other way
    expected = math.exp(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert inception_score(half, splits=1).mean == pytest.approx(expected, rel=1e-6)


def test_all_are_torch_fidelitys_of_the_same_features() -> None:
    real, fake = torch.randn(2, 60, 5, generator=torch.Generator().manual_seed(0))
    fake = 1.2 * fake + 0.1
    isc, kids = fidelity.metric_isc, fidelity.metric_kid
    to_statistics = fidelity.metric_fid.fid_features_to_statistics
    expected = fidelity.metric_fid.fid_statistics_to_metric(
        to_statistics(real.double()), to_statistics(fake.double()), False
    )
    assert fid(real, fake) == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
    expected = isc.isc_features_to_metric(fake)
    assert inception_score(fake).mean == pytest.approx(expected["inception_score_mean"], rel=1e-6)
    expected = kids.kid_features_to_metric(fake, real, kid_subset_size=50, rng_seed=2020, verbose=False)
    assert kid(real, fake, subsets=100, subset_size=50).mean == pytest.approx(
        expected["kernel_inception_distance_mean"], abs=1e-6
    )


def test_agreement_counts_the_largest_logit() -> None:
    logits = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 0.5], [4.0, 1.0]])
    assert agreement(logits, torch.tensor([1, 0, 0, 0])) == 0.75


def test_bad_input_is_named() -> None:
    x = torch.randn(5, 2)
    with pytest.raises(ValueError, match=r"real must be Statistics or features .*, got list"):
        fid([1.0], x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="of one size, got 2 and 3"):
        fid(x, torch.randn(5, 3))
    with pytest.raises(ValueError, match="one extractor to be compared, got 'a' and 'b'"):
        fid(Statistics.of(x, extractor="a"), Statistics.of(x, extractor="b"))
    with pytest.raises(ValueError, match=r"smallest lie in 2..4, got 15 and 5"):
        fid_infinity(x, x, smallest=5)
    with pytest.raises(ValueError, match=r"subset_size must lie in 2..5, got 6"):
        kid(x, x, subset_size=6)
    with pytest.raises(ValueError, match="subsets must be at least 1, got 0"):
        kid(x, x, subsets=0)
    with pytest.raises(ValueError, match="N at least splits = 10, got shape"):
        inception_score(x)
    with pytest.raises(ValueError, match=r"integers in 0..1, got \[0, 2\]"):
        agreement(x, torch.tensor([0, 0, 0, 2, 0]))
    with pytest.raises(ValueError, match=r"N at least 1, got shape .* and shape"):
        agreement(x, torch.zeros(4, dtype=torch.int64))
