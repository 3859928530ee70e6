"""docs/metrics.md: its Python runs, with a classifier of few steps; its numbers of FID's bias."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lazy import needs

from diffkern import metrics

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"
pytestmark = needs("sklearn", "torch_fidelity", "safetensors", "matplotlib", "PIL")


@pytest.mark.full
def test_the_blocks_of_the_page_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metrics, "train_classifier", functools.partial(metrics.train_classifier, steps=20))
    monkeypatch.chdir(tmp_path)
    samples = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scope: dict[str, Any] = {"samples": samples, "asked": torch.arange(40) % 10}
    for block in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        exec(compile(block, str(PAGE), "exec"), scope)
    assert capsys.readouterr().out.startswith("FID  ")
    made = {path.name for path in (tmp_path / "runs" / "a").iterdir()}
    assert made == {"evaluation.json", "evaluation.png", "reference.safetensors"}


def test_the_bias_that_the_page_names_is_that_of_its_formula() -> None:
    text = " ".join(PAGE.read_text().split())
    found = re.search(
        r"it is \(D \+ D \(D \+ 1\) / 4\) / n: ([\d.]+) of 10,000 .* with 64 .*, and (\d+) with .* 2048", text
    )
    assert found is not None
    for value, dims in zip(found.groups(), (64, 2048), strict=True):
        assert float(value) == pytest.approx((dims + dims * (dims + 1) / 4) / 10_000, rel=0.05)
