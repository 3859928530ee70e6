"""The training loop: what a run leaves, that it goes on bit for bit, and what it says where it cannot."""

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
from diffkern.data import Batch
from diffkern.train import TrainConfig, fit, make_diffusion
from diffkern.train.log import read_log
from diffkern.train.steps import DiffusionStepper, prepare

pytestmark = needs("yaml", "safetensors", "matplotlib", "PIL")


def weights(diffusion: diffkern.Diffusion) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in diffusion.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def run(config: TrainConfig, out: Path | None = None, **options: Any) -> Any:
    return fit(None, tiny_data(), config, out=out, progress=False, **options)


def test_a_run_learns_and_leaves_what_is_needed_to_go_on(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, iterations=30, sample_every=30, validation=4, learning_rate=1e-2)
    fitted = run(config, tmp_path)
    assert fitted.step == 30
    assert not fitted.stopped
    assert sum(fitted.losses[-5:]) < 0.7 * sum(fitted.losses[:5])
    entries = read_log(tmp_path)
    assert [entry["step"] for entry in entries if "loss" in entry] == [5, 10, 15, 20, 25, 30]
    assert entries[0]["loss"] == pytest.approx(sum(fitted.losses[:5]) / 5)
    assert 0.0 <= entries[0]["data_share"] <= 1.0
    assert entries[-1]["validation_loss"] > 0.0
    assert entries[-1]["bits_per_dim"] > 0.0
    assert TrainConfig.load(tmp_path / "config.yaml") == config
    assert (tmp_path / "samples" / "00000030.png").stat().st_size > 0
    assert (tmp_path / "loss.png").stat().st_size > 0
    loaded = diffkern.Diffusion.from_pretrained(tmp_path)
    with fitted.averages.used(fitted.averages.names[0]):
        assert same(weights(loaded), weights(fitted.diffusion))


def test_a_resumed_run_has_the_bits_of_one_that_was_never_stopped(tmp_path: Path) -> None:
    whole = run(dataclasses.replace(TINY, iterations=9), tmp_path / "whole")
    part = dataclasses.replace(TINY, iterations=9, save_every=4)
    stop_at(4, part, tmp_path / "parts")
    rest = run(part, tmp_path / "parts")
    assert rest.losses == whole.losses[4:]
    assert same(weights(rest.diffusion), weights(whole.diffusion))
    for name in whole.averages.names:
        assert all(
            torch.equal(a, b)
            for (_, a), (_, b) in zip(whole.averages.pairs(name), rest.averages.pairs(name), strict=True)
        )
    logs = [
        [(e["step"], e["loss"], e["gradient_norm"]) for e in read_log(tmp_path / name)] for name in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


def stop_at(step: int, config: TrainConfig, out: Path) -> None:
    """The run, killed after the step's checkpoint was written and one more step was done."""

    class Killed(Exception):
        pass

    def kill(done: int, loss: float) -> None:
        if done == step + 1:
            raise Killed

    with pytest.raises(Killed):
        run(config, out, callback=kill)


def test_a_signal_ends_the_step_saves_and_returns(tmp_path: Path) -> None:
    def ask(step: int, loss: float) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    fitted = run(TINY, tmp_path, callback=ask)
    assert fitted.stopped
    assert fitted.step == 3
    assert signal.getsignal(signal.SIGTERM) is before
    assert run(TINY, tmp_path).losses == run(TINY).losses[3:]


def test_micro_batches_add_up_to_the_gradient_of_the_batch() -> None:
    """For any cut, to rounding; the losses of the examples do not depend on the cut."""
    found = {}
    for micro_batch in (8, 3, 1):
        config = dataclasses.replace(TINY, micro_batch=micro_batch, iterations=1)
        stepper, batches = first_step(config)
        losses, stopped = stepper.gradient(batches, 0)
        assert not stopped
        found[micro_batch] = losses, [p.grad.clone() for p in stepper.parameters]
    assert [len(b) for b in (found[8][0], found[3][0])] == [8, 8]
    for cut in (3, 1):
        torch.testing.assert_close(found[cut][0], found[8][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found[cut][1], found[8][1], rtol=1e-4, atol=1e-6)


def first_step(config: TrainConfig, network: nn.Module | None = None) -> tuple[DiffusionStepper, list[Batch]]:
    from diffkern.data import Stream, loader, open_images

    images = open_images(tiny_data())
    diffusion = make_diffusion(config, images.shape, 3, network)
    prepare(diffusion, config, torch.device("cpu"))
    with torch.no_grad():
        for p in diffusion.parameters():  # a network that starts at zero would have gradients of zero
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    batches = loader(images, Stream(len(images), 0), batch=config.batch, seed=0, micro_batch=config.micro_batch)
    return DiffusionStepper(diffusion, config, torch.device("cpu")), next(batches)


def test_the_gradient_is_clipped_to_its_norm() -> None:
    stepper, batches = first_step(dataclasses.replace(TINY, clip=1e-3))
    stepper.gradient(batches, 0)
    before = torch.cat([p.grad.flatten() for p in stepper.parameters]).double().norm()
    assert stepper.step(1e-3) == pytest.approx(float(before), rel=1e-5)
    after = torch.cat([p.grad.flatten() for p in stepper.parameters]).double().norm()
    assert float(after) == pytest.approx(1e-3, rel=1e-4)
    assert stepper.optimizer.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("objective", ["x0", "v", "edm", "flow", "ncsn", "hybrid"])
def test_every_objective_trains(objective: Any) -> None:
    losses = run(dataclasses.replace(TINY, objective=objective, schedule=None, iterations=2)).losses
    assert all(0.0 < loss < 1e4 for loss in losses)


def test_importance_sampling_of_times_is_kept_over_a_resumption(tmp_path: Path) -> None:
    config = dataclasses.replace(
        TINY, times="loss_second_moment", schedule_options={"T": 4}, iterations=12, save_every=10
    )
    whole = run(config).losses
    stop_at(10, config, tmp_path)
    assert run(config, tmp_path).losses == whole[10:]


def test_a_gradient_that_is_not_finite_changes_nothing_and_ends_the_run_in_the_end(tmp_path: Path) -> None:
    network = TinyNetwork()
    config = dataclasses.replace(TINY, bad_steps=2, labels=False)
    diffusion = make_diffusion(config, (1, 8, 8), 0, network)

    def spoil(step: int, loss: float) -> None:
        if step == 1:
            network.factor = float("nan")
            spoil.before = weights(diffusion)  # type: ignore[attr-defined]

    with pytest.raises(RuntimeError, match=r"3 steps in a row had a gradient that is not finite, the last of them it"):
        fit(diffusion, tiny_data(), config, out=tmp_path, progress=False, callback=spoil)
    assert same(weights(diffusion), spoil.before)  # type: ignore[attr-defined]
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "bad_batch_3_0.safetensors")
    assert kept["x0.0"].shape == (8, 1, 8, 8)
    assert torch.equal(kept["seeds.0"], diffkern.seeds(TINY.seed, 8, 24))


def test_scaled_float16_leaves_out_steps_that_overflow() -> None:
    network = TinyNetwork()
    config = dataclasses.replace(TINY, precision="float16", labels=False, iterations=3)
    diffusion = make_diffusion(config, (1, 8, 8), 0, network)
    network.factor = 3e4  # the scaled loss of the first steps is beyond 65504
    before = weights(diffusion)
    fitted = fit(diffusion, tiny_data(), config, progress=False)
    assert all(loss > 0.0 for loss in fitted.losses)
    assert same(weights(diffusion), before)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"precision": "bfloat16"}, r"config.precision must be 'float32', as in .*, got 'bfloat16'"),
        ({"batch": 4}, r"config.batch must be 8, as in .*00000004, got 4"),
        ({"objective": "v"}, r"prediction must be 'eps', as in .*, got 'v'"),
        ({"learning_rate": 1.0}, r"config.learning_rate must be 0.01, as in .*, got 1.0"),
        ({"limit": 10}, r"(config.limit|data) must be"),
    ],
)
def test_a_run_of_another_kind_is_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    run(dataclasses.replace(TINY, iterations=4), tmp_path)
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.safetensors"))
    with pytest.raises(ValueError, match=sentence):
        run(dataclasses.replace(TINY, **change), tmp_path)
    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*.safetensors")) == before


def test_other_data_are_refused_and_other_cuts_are_not(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, iterations=4)
    run(config, tmp_path)
    more = dataclasses.replace(config, iterations=6)
    x0, labels = tiny_data()
    with pytest.raises(ValueError, match=r"data must be .*, as in"):
        fit(None, (x0.flip(0), labels), more, out=tmp_path, progress=False)
    cut = run(dataclasses.replace(more, micro_batch=4), tmp_path)
    torch.testing.assert_close(cut.losses, run(more).losses[4:], rtol=1e-4, atol=1e-5)
