"""The Brownian path: exact law, one path whatever is asked for, and what is refused."""

from __future__ import annotations

import itertools
import math
import random
import re
from fractions import Fraction

import pytest
import torch
from helpers.op_cases import same_bits

from diffkern import brownian, ops, streams

UNITS = 2**brownian.LEVELS


def weights_of(s: float, t: float, *, normalised: bool = False) -> dict[int, float]:
    """Node -> weight of W(t) - W(s)."""
    chosen, weights = brownian.increment(s, t, normalised=normalised)
    assert chosen.dtype == torch.int64
    assert weights.dtype == torch.float64
    nodes = (chosen - streams.BROWNIAN).tolist()
    assert len(set(nodes)) == len(nodes)
    assert len(nodes) <= 2 * brownian.LEVELS
    assert all(0 <= node < 2**streams.SHIFT for node in nodes)
    return dict(zip(nodes, weights.tolist(), strict=True))


def product(a: dict[int, float], b: dict[int, float]) -> Fraction:
    """Covariance of two increments, without rounding: a weight is a whole number times 2^(level/2 - LEVELS)."""
    total = Fraction(0)
    for node in a.keys() & b.keys():
        scale = math.sqrt(1 << max(node.bit_length() - 1, 0)) / UNITS
        whole = [round(w[node] / scale) for w in (a, b)]
        assert all(math.isclose(w[node], n * scale, rel_tol=1e-15) for w, n in zip((a, b), whole, strict=True))
        total += Fraction(whole[0] * whole[1] * (1 << max(node.bit_length() - 1, 0)), UNITS * UNITS)
    return total


def times(n: int) -> list[float]:
    """Random lattice times, ends, dyadic ones and neighbours among them."""
    source = random.Random(7)
    chosen = {0, 1, UNITS // 2, UNITS // 2 + 1, UNITS // 2 - 1, UNITS // 3, UNITS - 1, UNITS}
    while len(chosen) < n:
        chosen.add(source.randrange(UNITS >> source.randrange(brownian.LEVELS)))
    return [j / UNITS for j in sorted(chosen)]


def test_covariance_is_exact() -> None:
    """Cov(W(s), W(t)) = min(s, t), in rational numbers."""
    points = [t for t in times(40) if t > 0]
    whole = {t: weights_of(0.0, t) for t in points}
    for s, t in itertools.combinations_with_replacement(points, 2):
        assert product(whole[s], whole[t]) == Fraction(min(s, t))


def test_increments_over_disjoint_intervals_are_independent() -> None:
    points = times(24)
    steps = list(itertools.pairwise(points))
    found = [weights_of(s, t) for s, t in steps]
    for i, j in itertools.combinations(range(len(steps)), 2):
        assert product(found[i], found[j]) == 0
    for (s, t), w in zip(steps, found, strict=True):
        assert product(w, w) == Fraction(t) - Fraction(s)


def test_increments_add_up() -> None:
    """W(t) - W(s) + W(u) - W(t) = W(u) - W(s): the weights to float64's rounding, the noise to that of its sums."""
    source = random.Random(3)
    shape, seeds = (3, 5, 7), ops.seeds(4, 3)
    for _ in range(30):
        s, t, u = sorted(source.randrange(UNITS + 1) / UNITS for _ in range(3))
        if not s < t < u:
            continue
        first, second, whole = weights_of(s, t), weights_of(t, u), weights_of(s, u)
        for node in first.keys() | second.keys() | whole.keys():
            parts = first.get(node, 0.0), second.get(node, 0.0)
            assert math.isclose(sum(parts), whole.get(node, 0.0), rel_tol=0, abs_tol=4e-16 * max(map(abs, parts)))
        for dtype, rounding in ((torch.float32, 1e-6), (torch.float64, 1e-15)):
            a, b, c = (
                brownian.noise(shape, seeds, *ends, normalised=False, dtype=dtype) for ends in ((s, t), (t, u), (s, u))
            )
            torch.testing.assert_close(a + b, c, rtol=0, atol=5 * rounding)


def test_same_path_whatever_the_steps() -> None:
    """Sums over n, 2n, 4n ... steps and over uneven ones meet at every common time."""
    shape, seeds = (2, 33), ops.seeds(1, 2)

    def walk(points: list[float]) -> dict[float, torch.Tensor]:
        value, found = torch.zeros(shape, dtype=torch.float64), {}
        for s, t in itertools.pairwise(points):
            value = value + brownian.noise(shape, seeds, s, t, normalised=False, dtype=torch.float64)
            found[t] = value
        return found

    uneven = [0.0, 0.125, 0.13, 0.2501, 0.375, 0.5, 0.5001, 0.75, 0.8, 1.0]
    walks = [walk([i / n for i in range(n + 1)]) for n in (4, 8, 16, 128)] + [walk(uneven)]
    for t in (0.25, 0.5, 0.75, 1.0):
        at = [w[t] for w in walks if t in w]
        assert len(at) >= 4
        for other in at[1:]:
            torch.testing.assert_close(other, at[0], rtol=0, atol=1e-14)
    assert same_bits(walks[0][1.0], walk([i / 4 for i in range(5)])[1.0])


def test_the_whole_path_is_one_normal() -> None:
    assert weights_of(0.0, 1.0) == {0: 1.0}
    assert weights_of(0.0, 0.5) == {0: 0.5, 1: 0.5}
    assert weights_of(0.5, 1.0) == {0: 0.5, 1: -0.5}
    assert same_bits(
        brownian.noise((2, 9), ops.seeds(0, 2), 0.0, 1.0), ops.randn((2, 9), ops.seeds(0, 2), streams.BROWNIAN)
    )
    # Any change here changes every path anybody has drawn.
    assert weights_of(0.25, 0.375) == pytest.approx({0: 0.125, 1: 0.125, 2: -math.sqrt(2) / 8, 5: 0.25}, rel=1e-15)


def test_normalised() -> None:
    source = random.Random(5)
    for _ in range(200):
        s, t = sorted((source.random() ** 3, source.random()))
        plain, unit = weights_of(s, t), weights_of(s, t, normalised=True)
        length = (round(t * UNITS) - round(s * UNITS)) / UNITS
        assert sum(w * w for w in unit.values()) == pytest.approx(1.0, rel=1e-14)
        assert unit == pytest.approx({k: w / math.sqrt(length) for k, w in plain.items()}, rel=1e-14)
    shortest = weights_of(1 / UNITS, 2 / UNITS, normalised=True)
    assert sum(w * w for w in shortest.values()) == pytest.approx(1.0, rel=1e-14)


def test_times_are_rounded_to_the_lattice() -> None:
    step = 1 / UNITS
    for s, t in ((0.3, 0.7), (0.1, 0.10001)):
        s, t = round(s * UNITS) / UNITS, round(t * UNITS) / UNITS
        near = weights_of(s + 0.4 * step, t - 0.4 * step)
        assert near == weights_of(s, t)


def test_batch_does_not_matter() -> None:
    shape, seeds = (5, 3, 11, 13), ops.seeds(8, 5)
    whole = brownian.noise(shape, seeds, 0.21, 0.65)
    for b in range(5):
        assert same_bits(brownian.noise((1, *shape[1:]), seeds[b : b + 1], 0.21, 0.65), whole[b : b + 1])
    order = torch.tensor([3, 1, 4, 0, 2])
    assert same_bits(brownian.noise(shape, seeds[order], 0.21, 0.65), whole[order])


def test_moments() -> None:
    """Mean, variance, fourth moment and covariances of drawn increments, 2 10^5 paths, within 5 deviations."""
    n = 200_000
    seeds = ops.seeds(17, 20)
    points = [0.0, 0.1, 0.37, 0.5, 0.50001, 0.9, 1.0]
    walks = torch.stack(
        [
            brownian.noise((20, n // 20), seeds, s, t, dtype=torch.float64).flatten()
            for s, t in itertools.pairwise(points)
        ]
    )
    bound = 5 / math.sqrt(n)
    assert float(walks.mean(1).abs().max()) < bound
    assert float((walks.square().mean(1) - 1).abs().max()) < bound * math.sqrt(2)
    assert float((walks.pow(4).mean(1) - 3).abs().max()) < bound * math.sqrt(96)
    between = walks @ walks.T / n - torch.diag(walks.square().mean(1))
    assert float(between.abs().max()) < bound
    squares = walks.square() - 1  # Gaussian and uncorrelated is independent: the squares are uncorrelated as well
    between = squares @ squares.T / n - torch.diag(squares.square().mean(1))
    assert float(between.abs().max()) < bound * 2
    # The path itself, at two times that share most of their nodes.
    w = [brownian.noise((20, n // 20), seeds, 0.0, t, normalised=False).double().flatten() for t in (0.3, 0.31)]
    assert float((w[0] * w[1]).mean()) == pytest.approx(0.3, abs=bound * math.sqrt(0.3 * 0.31 + 0.09))


def test_elements_and_samples_have_paths_of_their_own() -> None:
    z = brownian.noise((40, 500), ops.seeds(3, 40), 0.3, 0.4).double()
    assert float(((z @ z.T / 500).fill_diagonal_(0)).abs().max()) < 6 / math.sqrt(500)
    assert float((z[:, 1:] * z[:, :-1]).mean().abs()) < 5 / math.sqrt(z.numel())


def test_position() -> None:
    at = [brownian.position(a, s) for a, s in ((0, 1), (1e-4, 1), (1, 80), (1, 1), (1, 0.002), (1, 0))]
    assert at == sorted(at)
    assert (at[0], at[3], at[-1]) == (0.0, 0.5, 1.0)
    assert brownian.position(0.6, 0.8) == brownian.position(3.0, 4.0) or math.isclose(
        brownian.position(0.6, 0.8), brownian.position(3.0, 4.0), rel_tol=1e-15
    )


@pytest.mark.parametrize(
    ("s", "t", "sentence"),
    [
        (-0.1, 0.5, "s must lie in [0, 1], got -0.1"),
        (0.1, 1.5, "t must lie in [0, 1], got 1.5"),
        (math.nan, 0.5, "s must lie in [0, 1], got nan"),
        (0.1, math.nan, "t must lie in [0, 1], got nan"),
        (0.5, 0.5, "s must lie before t by 2^-20 at least, got s = 0.5 and t = 0.5"),
        (0.7, 0.5, "s must lie before t by 2^-20 at least, got s = 0.7 and t = 0.5"),
        (0.5, 0.5 + 2.0**-22, "s must lie before t by 2^-20 at least"),
    ],
)
def test_bad_times(s: float, t: float, sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        brownian.increment(s, t)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        brownian.noise((2, 3), ops.seeds(0, 2), s, t)


@pytest.mark.parametrize("level", [(-1.0, 1.0), (1.0, -1.0), (0.0, 0.0), (math.inf, 1.0), (1.0, math.nan)])
def test_bad_levels(level: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="alpha and sigma must be finite, not negative and not both 0, got"):
        brownian.position(*level)


def test_terms_are_kept_on_the_host_for_everybody():
    with torch.inference_mode(), torch.device("meta"):
        streams_of, weights = brownian.increment(0.111, 0.2345)
    assert streams_of.device.type == weights.device.type == "cpu"
    assert not weights.is_inference()
