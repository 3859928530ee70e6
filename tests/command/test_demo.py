"""The demo, small: data, measures, training, command line, the whole job."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.lazy import needs
from torch import Tensor

from diffkern import ops, schedules, streams
from diffkern.__main__ import main
from diffkern.command import demo as command
from diffkern.demo import MissingExtra, need
from diffkern.demo.data import Digits, load_digits
from diffkern.demo.evaluate import Judge, frechet_distance, train_judge
from diffkern.demo.generate import class_rows
from diffkern.demo.recipe import Recipe
from diffkern.demo.run import DemoConfig, markdown, run_demo
from diffkern.demo.train import TrainConfig, train
from diffkern.nn import UNet, UNetConfig
from diffkern.objectives import losses

pytestmark = needs("sklearn", "matplotlib", "PIL", "safetensors", "tqdm")

TINY = UNetConfig(channels=8, blocks=1, heads=2, embedding=16)
SCHEDULE = schedules.cosine(100)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny networks are fastest so, also while other jobs hold the other cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits() -> Digits:
    return load_digits()


@pytest.fixture(scope="module")
def judge(digits: Digits) -> Judge:
    return train_judge(digits, epochs=12, progress=False)


# ---------------------------------------------------------------------------------------------------- data and measures
def test_digits_are_scaled_split_and_repeatable(digits: Digits) -> None:
    assert digits.images.shape[1:] == (1, 8, 8)
    assert digits.images.dtype == torch.float32
    assert digits.labels.dtype == torch.int64
    assert (digits.images.min(), digits.images.max()) == (-1.0, 1.0)
    assert len(digits.images) + len(digits.held_out_images) == 1797
    assert digits.labels.bincount().min() > 130
    assert digits.held_out_labels.bincount().min() > 30
    again = load_digits()
    assert torch.equal(again.images, digits.images)
    assert torch.equal(again.held_out_labels, digits.held_out_labels)
    assert not torch.equal(load_digits(seed=1).images[:100], digits.images[:100])
    with pytest.raises(ValueError, match=r"held_out must lie in \(0, 1\), got 1.5"):
        load_digits(held_out=1.5)


def test_frechet_distance_in_closed_form() -> None:
    a, b = np.array([1.0, 4.0, 9.0]), np.array([4.0, 4.0, 1.0])
    expected = 3 * 0.5**2 + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()  # diagonal covariances
    zero, half = np.zeros(3), np.full(3, 0.5)
    assert frechet_distance(zero, np.diag(a), half, np.diag(b)) == pytest.approx(expected)
    turn = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]  # the same, seen from elsewhere
    turned = [turn @ np.diag(v) @ turn.T for v in (a, b)]
    assert frechet_distance(zero, turned[0], turn @ half, turned[1]) == pytest.approx(expected)
    assert frechet_distance(half, turned[0], half, turned[0]) == pytest.approx(0.0, abs=1e-9)


@pytest.mark.full
def test_judge_reads_real_digits_and_not_noise(digits: Digits, judge: Judge) -> None:
    real = judge.measure(digits.held_out_images, digits.held_out_labels)
    assert real.agreement > 0.95
    noise = judge.measure(torch.randn(200, 1, 8, 8), class_rows(10, 20))
    assert noise.agreement < 0.4
    assert real.frechet < 0.2 * noise.frechet
    assert judge.measure(digits.images, digits.labels).frechet == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(ValueError, match="equally many, at least 2, got 3 and 4"):
        judge.measure(torch.zeros(3, 1, 8, 8), torch.zeros(4, dtype=torch.int64))


# ------------------------------------------------------------------------------------------------------------- training
def test_training_lowers_the_loss_and_repeats(digits: Digits) -> None:
    config = TrainConfig(iterations=20, batch=32, warmup=2, learning_rate=5e-3)
    first, second = (train(digits, SCHEDULE, TINY, config, progress=False) for _ in range(2))
    assert len(first.losses) == 20
    assert np.mean(first.losses[-4:]) < 0.9 * np.mean(first.losses[:4])
    assert first.losses == second.losses
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not first.model.training
    other = train(digits, SCHEDULE, TINY, dataclasses.replace(config, seed=1), progress=False)
    assert other.losses != first.losses


def test_first_loss_is_that_of_the_noise_at_the_drawn_seeds(digits: Digits) -> None:
    """The network starts at zero, so the loss of the first iteration is mean eps^2: the fused noise, at these seeds."""
    config = TrainConfig(iterations=1, batch=16)
    generator = torch.Generator().manual_seed(config.seed)
    torch.randint(0, len(digits.images), (16,), generator=generator)
    seeds = losses.draw_seeds(16, generator)
    eps = ops.randn((16, 1, 8, 8), seeds, streams.TRAINING)
    trained = train(digits, SCHEDULE, TINY, config, progress=False)
    assert trained.losses[0] == pytest.approx(eps.double().square().mean().item(), rel=1e-6)


@pytest.mark.parametrize(("drop", "low", "high"), [(0.0, 0.0, 0.0), (0.5, 0.4, 0.6)])
def test_condition_is_dropped(
    digits: Digits, monkeypatch: pytest.MonkeyPatch, drop: float, low: float, high: float
) -> None:
    seen: list[Tensor] = []
    forward = UNet.forward

    def spy(self: UNet, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        assert cond is not None
        seen.append(cond)
        return forward(self, x, t, cond)

    monkeypatch.setattr(UNet, "forward", spy)
    train(digits, SCHEDULE, TINY, TrainConfig(iterations=5, batch=100, drop=drop), progress=False)
    share = (torch.cat(seen) == 10).float().mean().item()
    assert low <= share <= high


@pytest.mark.parametrize("changes", [{"iterations": 0}, {"learning_rate": -1.0}, {"ema": 1.0}, {"drop": -0.1}])
def test_bad_training_config(changes: dict[str, float]) -> None:
    name, value = next(iter(changes.items()))
    with pytest.raises(ValueError, match=rf"TrainConfig\.{name} must .*got {value}"):
        TrainConfig(**changes)  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- command line
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--guidance", "nan"], "guidance must be finite, got nan"),
        (["--seed", str(2**64)], "TrainConfig.seed must be an integer of 64 bits, got 18446744073709551616"),
        (["--batch", str(10**9)], "TrainConfig.batch must be at most 65536, got 1000000000"),
        (["--iterations", str(10**9)], "TrainConfig.iterations must be at most 100000000, got 1000000000"),
        (["--iterations", "0"], "TrainConfig.iterations must be at least 1, got 0"),
        (["--per-class", str(10**9)], "--per-class must be at most 1000000"),
        (["--out", __file__], "must be a folder, and is a file"),
    ],
)
def test_the_demo_refuses_before_it_trains(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    sentence: str,
) -> None:
    monkeypatch.setattr(command, "run_demo", lambda config: pytest.fail("it began"))
    assert main(["demo", "--out", str(tmp_path / "out"), *arguments]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named() -> None:
    with pytest.raises(MissingExtra, match=r"this needs nothing-like-it, .*pip install 'diffkern\[demo\]'"):
        need("diffkern_no_such_module", "nothing-like-it")


# -------------------------------------------------------------------------------------------------------- the whole job
def test_the_whole_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = DemoConfig(
        out=tmp_path,
        train=TrainConfig(iterations=8, batch=32, warmup=2),
        recipe=Recipe(unet=TINY, timesteps=50),
        per_class=9,
        judge_epochs=2,
        runs=(("ddpm", 5), ("ddim", 4), ("euler", 4), ("heun", 3)),
        progress=False,
    )
    lines = run_demo(config)
    assert [line.sampler for line in lines] == ["real digits", "ddpm", "ddim", "euler", "heun"]
    grids = [f"{sampler}_{steps}.png" for sampler, steps in config.runs]
    others = ["forward.png", "loss.png", "real.png", "trajectory.png", "config.json", "model.safetensors"]
    others += ["results.json", "table.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(grids + others)
    assert (tmp_path / "table.md").read_text().strip() == markdown(lines)
    assert markdown(lines) in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert [line["sampler"] for line in results["samplers"]] == [line.sampler for line in lines]
    assert results["images_per_sampler"] == 90
    # The command `sample` draws the same grid again, from the folder alone.
    again = tmp_path / "again.png"
    as_here = ["--guidance=1.5", "--micro-batch=80", "--ink", "--quiet"]
    for sampler, steps in config.runs:
        arguments = ["--run", tmp_path, "--sampler", sampler, "--steps", steps, "--out", again, *as_here]
        assert main(["sample", *map(str, arguments)]) == 0
        assert again.read_bytes() == (tmp_path / f"{sampler}_{steps}.png").read_bytes()
