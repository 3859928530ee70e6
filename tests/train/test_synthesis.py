"""Averages of any width from those that were kept: the stored exactly, others nearly, none where they do not reach."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from helpers.training_cases import trained
from safetensors.torch import save_file
from torch import nn

from diffkern import Diffusion
from diffkern.train import checkpoint
from diffkern.train.ema import Averages, gamma_of
from diffkern.train.synthesis import Snapshot, inner_product, mix, snapshots, synthesize

WIDTHS, WANTED = (0.05, 0.1), (0.075, 0.15)
LAST, EVERY = 400, 25


@pytest.fixture(scope="module")
def walk() -> tuple[list[Snapshot], dict[tuple[int, float], torch.Tensor]]:
    """A walk of three weights: snapshots of two averages, and every average at every snapshot, also of other widths."""
    module = nn.Linear(3, 1, bias=False).double()
    averages = Averages(module, widths=(*WIDTHS, *WANTED))
    moves = torch.randn(LAST, 1, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kept, every = [], {}
    for step in range(1, LAST + 1):
        with torch.no_grad():
            module.weight.copy_(math.sqrt(step) + 0.1 * moves[:step].sum(0))
        averages.update(step)
        if step % EVERY == 0:
            for width in (*WIDTHS, *WANTED):
                average = averages.tensors(f"{width:.3f}")["weight"].clone()
                every[step, width] = average
                if width in WIDTHS:
                    kept.append(Snapshot(step, width, {"weight": average, "count": torch.tensor(step)}))
    return kept, every


@pytest.mark.parametrize(
    ("step", "width", "other_step", "other_width"), [(3, 0.1, 5, 0.2), (5, 0.2, 3, 0.05), (4, 0.1, 4, 0.1)]
)
def test_the_inner_product_is_the_integral(step: int, width: float, other_step: int, other_width: float) -> None:
    """Against the trapezoidal rule over the common steps."""
    gamma, other = gamma_of(width), gamma_of(other_width)
    tau = torch.linspace(0.0, float(min(step, other_step)), 200_001, dtype=torch.float64)
    p, q = ((g + 1.0) * tau**g / end ** (g + 1.0) for end, g in ((step, gamma), (other_step, other)))
    assert inner_product(step, gamma, other_step, other) == pytest.approx(torch.trapezoid(p * q, tau).item(), rel=1e-8)


@pytest.mark.parametrize("step", [LAST, 200])
@pytest.mark.parametrize("width", WANTED)
def test_another_width_is_nearly_that_of_training(
    walk: tuple[list[Snapshot], dict[tuple[int, float], torch.Tensor]], step: int, width: float
) -> None:
    """Ten times nearer than the stored averages of that step are."""
    kept, every = walk
    found = synthesize(kept, width, step)
    error = (found["weight"] - every[step, width]).abs().max()
    nearest = min((every[step, stored] - every[step, width]).abs().max() for stored in WIDTHS)
    assert nearest > 0.2
    assert error < 0.1 * nearest
    assert found["count"].item() == step  # no average: that of the newest


def test_a_width_that_was_kept_is_taken_as_it_is(
    walk: tuple[list[Snapshot], dict[tuple[int, float], torch.Tensor]],
) -> None:
    kept, every = walk
    assert torch.equal(synthesize(kept, 0.1)["weight"], every[LAST, 0.1])
    assert torch.equal(synthesize(kept, 0.05, 100)["weight"], every[100, 0.05])


def test_the_mix_has_the_least_error() -> None:
    """Of two profiles, against a search over both weights; the mix of a profile with itself is 1 and no error."""
    stored, width, step = [(90, 0.05), (100, 0.1)], 0.08, 100
    found = mix(stored, width, step)
    profiles = [(float(at), gamma_of(relative)) for at, relative in [*stored, (step, width)]]
    gram = torch.tensor([[inner_product(*a, *b) for b in profiles] for a in profiles], dtype=torch.float64)

    def error(first: float, second: float) -> float:
        v = torch.tensor([first, second, -1.0], dtype=torch.float64)
        return math.sqrt(v @ gram @ v / gram[2, 2])

    assert found.error == pytest.approx(error(*found.weights), rel=1e-6)
    first, second = found.weights
    assert all(error(first + d, second + e) > found.error for d in (-1e-3, 0.0, 1e-3) for e in (-1e-3, 1e-3))
    same = mix([(100, 0.1)], 0.1, 100)
    assert same.weights == pytest.approx((1.0,), rel=1e-12)
    assert same.error < 1e-7


def test_snapshots_that_do_not_reach_are_refused(
    walk: tuple[list[Snapshot], dict[tuple[int, float], torch.Tensor]], tmp_path: Path
) -> None:
    kept, _ = walk
    with pytest.raises(ValueError, match=r"mix to width 0.02 at step 400 with an error of at most 0.1, got .* from 32"):
        synthesize(kept, 0.02)
    with pytest.raises(ValueError, match="kept must have a snapshot, got none"):
        synthesize([], 0.1)
    with pytest.raises(ValueError, match="from 0 snapshots"):
        synthesize(kept, 0.1, 10)
    with pytest.raises(FileNotFoundError, match=r"there are no averages in .*snapshots: .* keep_every"):
        snapshots(tmp_path)
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match=r"cut.safetensors must be a safetensors file, got none"):
        synthesize([Snapshot(10, 0.1, tmp_path / "cut.safetensors")], 0.1)


def test_a_run_gives_a_diffusion_of_another_width(tmp_path: Path) -> None:
    """Through files: the same as through tensors, and what load_state_dict takes."""
    state = trained(decay=None)
    for step in (2, 4, 6):
        state.steps(step - 1, step)
        diffusion, averages, _ = state
        checkpoint.save(tmp_path, step, diffusion=diffusion, averages=averages, keep=1, keep_every=2)
    kept = snapshots(tmp_path)
    assert [snapshot[:2] for snapshot in kept] == [(s, w) for s in (2, 4, 6) for w in (0.05, 0.1)]
    found = synthesize(kept, 0.08)
    opened = Diffusion.from_pretrained(tmp_path)
    opened.load_state_dict(found)
    near = averages.tensors("0.100")["model.leave.bias"]
    assert torch.allclose(opened.model.leave.bias, near, atol=1e-3)
    save_file(found, tmp_path / "whole.safetensors")
    again = synthesize([Snapshot(6, 0.08, tmp_path / "whole.safetensors")], 0.08)
    assert all(torch.equal(again[name], found[name]) for name in found)
