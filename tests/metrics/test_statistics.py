"""Sums over features: merged, in files, and what they refuse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.lazy import needs

from diffkern.metrics import Features, Statistics

pytestmark = needs("safetensors", "torch_fidelity")


def features(n: int, dims: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, dims, generator=torch.Generator().manual_seed(seed))


def made(n: int, seed: int = 0) -> tuple[Features, torch.Tensor]:
    return Features(features(n, 3, seed), features(n, 4, seed + 1), features(n, 5, seed + 2)), torch.arange(n) % 5


def test_mean_and_covariance_are_numpys() -> None:
    x = features(50) * torch.tensor([1.0, 2.0, 3.0]) + 5.0
    found = Statistics()
    for part in x.split(7):
        found.update(part)
    mean, covariance = found.moments()
    np.testing.assert_allclose(mean, x.double().numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(x.double().numpy(), rowvar=False), rtol=1e-11, atol=1e-11)


def test_parts_merge_into_the_whole_exactly() -> None:
    """Of whole numbers sums have no rounding: any other way than sums would show."""
    x = torch.randint(-9, 9, (40, 3), generator=torch.Generator().manual_seed(0)).double()
    whole, parts = Statistics.of(x), Statistics(keep=True)
    for part in x.split([1, 0, 26, 13]):
        piece = Statistics(keep=True)
        piece.update(part)
        parts.merge(piece)
    assert parts.count == 40
    for mine, theirs in zip(parts.moments(), whole.moments(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(parts.features, x)


def test_one_process_is_a_job_of_its_own() -> None:
    found, labels = made(6)
    mine = Statistics.of(found, labels)
    whole = mine.over_ranks()
    assert torch.equal(whole.moments("spatial")[1], mine.moments("spatial")[1])
    assert torch.equal(whole.logits, mine.logits)
    assert Statistics().over_ranks().count == 0


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    found, labels = made(6)
    before = Statistics("net@1", keep=True, data="abc")
    before.update(found, labels)
    before.update(found, labels)
    before.save(tmp_path / "new" / "reference.safetensors")
    after = Statistics.load(tmp_path / "new" / "reference.safetensors")
    assert (after.extractor, after.data, after.count, after.keep) == ("net@1", "abc", 12, True)
    for part in ("pooled", "spatial"):
        assert all(torch.equal(a, b) for a, b in zip(after.moments(part), before.moments(part), strict=True))
    for name in ("features", "logits", "labels"):
        assert torch.equal(getattr(after, name), getattr(before, name))
    after.merge(before)  # a loaded one goes on
    assert after.count == 24


def test_other_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(FileNotFoundError, match=r"there are no statistics .*none"):
        Statistics.load(tmp_path / "none")
    (tmp_path / "text").write_text("not one")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        Statistics.load(tmp_path / "text")
    save_file({"x": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="must hold statistics, got a safetensors file without 'diffkern_statistics'"):
        Statistics.load(tmp_path / "weights")
    whole = Statistics.of(*made(3))
    whole.save(tmp_path / "whole")
    text = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(text[:-8])
    with pytest.raises(ValueError, match="must be a safetensors file"):
        Statistics.load(tmp_path / "cut")


@pytest.mark.parametrize(
    "change",
    [
        {"features": torch.zeros(2, 3)},
        {"pooled.sum": None},
        {"pooled.products": torch.zeros(3, 2).double()},
        {"spatial.products": None},
        {"pooled.sum": torch.zeros(3)},
        {"other": torch.zeros(3)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_file_that_does_not_hold_together_is_refused(change: dict[str, torch.Tensor | None], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    Statistics.of(*made(3)).save(tmp_path / "whole")
    tensors = {name: part for name, part in (load_file(tmp_path / "whole") | change).items() if part is not None}
    head = '{"format": 1, "count": 3, "extractor": "", "data": ""}'
    save_file(tensors, tmp_path / "changed", metadata={"diffkern_statistics": head})
    with pytest.raises(ValueError, match=r"changed must hold statistics of 3 images, got .*\["):
        Statistics.load(tmp_path / "changed")


def test_what_does_not_fit_is_named() -> None:
    found = Statistics("a")
    with pytest.raises(ValueError, match="at least 2 images, got 0"):
        found.moments()
    with pytest.raises(ValueError, match=r"features must be finite, got NaN or infinity in features\[1\]"):
        found.update(torch.tensor([[1.0], [float("nan")]]))
    with pytest.raises(ValueError, match=r"features must be floats \[B, D\], got int64 of shape \[2, 2\]"):
        found.update(torch.ones(2, 2, dtype=torch.int64))
    found.update(features(4))
    with pytest.raises(ValueError, match=r"as those before, pooled \[3\], got pooled \[2\]"):
        found.update(features(4, 2))
    with pytest.raises(ValueError, match=r"must hold features, got none of extractor 'a': Statistics\(..., keep=True"):
        _ = found.features
    with pytest.raises(ValueError, match="must hold spatial features, got none of extractor 'a'"):
        found.moments("spatial")
    with pytest.raises(ValueError, match="of one extractor to be compared, got 'a' and 'b'"):
        found.merge(Statistics("b"))
    kept = Statistics(keep=True)
    with pytest.raises(ValueError, match="labels must be as many as the features, 4, got 3"):
        kept.update(features(4), torch.zeros(3, dtype=torch.int64))
    kept.update(features(4), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"labels \[\], got pooled \[3\], features \[3\]$"):
        kept.update(features(4))
