"""What must not touch a run: validation, pictures, logs; and what a run must not touch: where it was called from."""

from __future__ import annotations

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lazy import needs
from helpers.tiny_run import TINY, TinyNetwork, tiny_data
from torch import Tensor, nn

import diffkern
from diffkern.data import open_images
from diffkern.objectives.variational import bits_per_dim
from diffkern.train import TrainConfig, fit, make_diffusion
from diffkern.train.log import read_log
from diffkern.train.signals import Stop
from diffkern.train.validation import validate

pytestmark = needs("yaml", "safetensors", "matplotlib", "PIL")


def run(config: TrainConfig, out: Path | None = None, diffusion: diffkern.Diffusion | None = None) -> Any:
    return fit(diffusion, tiny_data(), config, out=out, progress=False)


class Normalised(nn.Module):
    """A network with statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return out


def test_validation_pictures_logs_and_checkpoints_change_no_bit(tmp_path: Path) -> None:
    """Also of a network whose statistics a forward pass in training mode changes."""
    found = []
    busy = {"validate_every": 1, "sample_every": 2, "log_every": 1, "save_every": 1, "snapshot_every": 2}
    for out, changes in ((None, {}), (tmp_path, busy)):
        torch.manual_seed(0)
        diffusion = diffkern.Diffusion(Normalised(), diffkern.cosine(), shape=(1, 8, 8))
        fitted = run(dataclasses.replace(TINY, validation=4, labels=False, **changes), out, diffusion)
        found.append((fitted.losses, [value.clone() for value in fitted.diffusion.state_dict().values()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_generators_threads_and_modes_are_left_as_they_were() -> None:
    diffusion = make_diffusion(TINY, (1, 8, 8), 3).eval()
    diffusion.model.get_submodule("out_conv" if hasattr(diffusion.model, "out_conv") else "").train()
    modes = [module.training for module in diffusion.modules()]
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    run(dataclasses.replace(TINY, threads=threads + 1, iterations=1, validation=4), diffusion=diffusion)
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in diffusion.modules()] == modes


def test_weights_of_float64_are_trained_in_it() -> None:
    double = run(TINY, diffusion=make_diffusion(TINY, (1, 8, 8), 3).double())
    assert all(p.dtype == torch.float64 for p in double.diffusion.parameters())
    torch.testing.assert_close(double.losses, run(TINY).losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("objective", ["eps", "hybrid"])
def test_validation_estimates_the_whole_bound(objective: Any) -> None:
    """Over many draws the mean of the estimates is that of the bound of all times, to four standard errors."""
    config = dataclasses.replace(TINY, objective=objective, schedule_options={"T": 6}, labels=False)
    images, diffusion = open_images(tiny_data(), labels=False), make_diffusion(config, (1, 8, 8))
    found = torch.tensor([validate(diffusion, images, seed=seed).bits_per_dim for seed in range(40)])
    x0, variance = (
        images.batch(torch.arange(20))[0].repeat(8, 1, 1, 1),
        "learned" if objective == "hybrid" else "beta_tilde",
    )
    whole = bits_per_dim(diffusion.network, x0, diffusion.schedule, seeds=1, variance=variance).total  # type: ignore[arg-type]
    error = float((found.var() / len(found) + whole.var() / len(whole)).sqrt())
    assert error < 0.05 * float(whole.mean())
    assert abs(float(found.mean() - whole.mean())) < 4.0 * error


def test_what_is_not_finite_is_null_in_the_log_and_the_run_goes_on(tmp_path: Path) -> None:
    network = TinyNetwork()
    config = dataclasses.replace(TINY, labels=False, validation=4, validate_every=2, log_every=1)
    diffusion = make_diffusion(config, (1, 8, 8), 0, network)

    def spoil(step: int, loss: float) -> None:
        network.factor = float("nan") if step == 1 else 1.0

    fit(diffusion, tiny_data(), config, out=tmp_path, progress=False, callback=spoil)
    second, validated = [entry for entry in read_log(tmp_path) if entry["step"] == 2]
    assert second["loss"] is second["gradient_norm"] is None
    assert validated["validation_loss"] is None
    assert second["skipped"] == 1
    more = make_diffusion(config, (1, 8, 8), 0, TinyNetwork())
    assert run(dataclasses.replace(config, iterations=6), tmp_path, more).step == 6


def test_pictures_are_of_the_images_shape_and_of_no_more_steps_than_a_table_has(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, iterations=1, sample_every=1, sample_n=3, sample_steps=20)
    diffusion = diffkern.Diffusion(TinyNetwork(), diffkern.cosine(T=4))  # says no shape
    run(config, tmp_path, diffusion)
    assert (tmp_path / "samples" / "00000001.png").exists()
    hybrid = dataclasses.replace(config, objective="hybrid", guidance=2.0, schedule_options={"T": 4})
    run(hybrid, tmp_path / "hybrid")  # by a sampler that takes guidance
    with pytest.raises(ValueError, match=r"TrainConfig.sampler must be one without a learned variance for guidance"):
        run(dataclasses.replace(hybrid, sampler="ddpm"), tmp_path / "other")


def test_images_and_labels_that_the_network_does_not_have_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data must have images of the diffusion's shape \[3, 8, 8\], got \[1, 8, 8\]"
    ):
        run(TINY, diffusion=make_diffusion(TINY, (3, 8, 8), 3))
    with pytest.raises(ValueError, match=r"data must have labels below 2, the network's, got 2"):
        run(TINY, diffusion=make_diffusion(TINY, (1, 8, 8), 2))
    with pytest.raises(ValueError, match=r"data must have other labels than the diffusion's null, got 0"):
        run(TINY, diffusion=diffkern.Diffusion(TinyNetwork(), diffkern.cosine(), null=0))


def test_a_run_does_not_go_back(tmp_path: Path) -> None:
    run(TINY, tmp_path)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ValueError, match=r"TrainConfig.iterations must be at least the 5 that the run in .* got 3"):
        run(dataclasses.replace(TINY, iterations=3), tmp_path)
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_run_begins_from_another_ones_network_and_goes_on_without_it(tmp_path: Path) -> None:
    first = run(dataclasses.replace(TINY, objective="v", averages=()), tmp_path / "first")
    config = dataclasses.replace(TINY, init=str(tmp_path / "first"), network="adm-64", iterations=2)
    config = dataclasses.replace(config, network=TINY.network, network_options={})
    second = run(config, tmp_path / "second")
    assert second.diffusion.prediction == "v"
    assert second.losses[0] == run(config, diffusion=first.diffusion).losses[0]
    (tmp_path / "first").rename(tmp_path / "moved")
    assert run(dataclasses.replace(config, iterations=3), tmp_path / "second").step == 3


def test_only_the_second_interrupt_ends_at_once() -> None:
    with Stop() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
