"""The demo, small: data, measures, training, checkpoint, sampling from the command line, pictures, the whole job."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.lazy import needs
from helpers.suites import few
from torch import Tensor, nn

from diffkern import ops, schedules, streams
from diffkern.__main__ import main
from diffkern.command import demo as command
from diffkern.demo import MissingExtra, checkpoint, need
from diffkern.demo.checkpoint import Recipe
from diffkern.demo.data import Digits, load_digits
from diffkern.demo.evaluate import Judge, frechet_distance, train_judge
from diffkern.demo.generate import DEFAULT_STEPS, class_rows, generate, make_plan
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


@pytest.fixture(scope="module")
def model_file(digits: Digits, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a tiny network, a little trained, so that its output is not zero."""
    trained = train(digits, SCHEDULE, TINY, TrainConfig(iterations=10, batch=32, warmup=2), progress=False)
    path = tmp_path_factory.mktemp("checkpoint") / "model.safetensors"
    checkpoint.save(path, trained.model, Recipe(unet=TINY, timesteps=100, seed=5, micro_batch=4))
    return path


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


# ----------------------------------------------------------------------------------------------------------- checkpoint
def test_checkpoint_round_trip(model_file: Path, tmp_path: Path) -> None:
    model, recipe = checkpoint.load(model_file)
    assert recipe == Recipe(unet=TINY, timesteps=100, seed=5, micro_batch=4)
    again = tmp_path / "deep" / "again.safetensors"
    checkpoint.save(again, model, recipe)
    assert again.read_bytes() == model_file.read_bytes()
    assert [path.name for path in again.parent.iterdir()] == ["again.safetensors"]
    x, t, cond = torch.randn(3, 1, 8, 8), torch.tensor([0, 50, 99]), torch.tensor([1, 2, 10])
    assert torch.equal(checkpoint.load(again)[0](x, t, cond), model(x, t, cond))
    assert not model.training


def test_checkpoint_of_another_kind_is_one_sentence(model_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(FileNotFoundError, match=r"there is no checkpoint .*nothing"):
        checkpoint.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("not weights")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        checkpoint.load(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not a checkpoint of the diffkern demo"):
        checkpoint.load(tmp_path / "other.safetensors")
    wide = Recipe(unet=dataclasses.replace(TINY, channels=16), timesteps=100)
    text = json.dumps({"format": 1, **dataclasses.asdict(wide)})
    save_file(load_file(model_file), tmp_path / "wide.safetensors", metadata={"diffkern_demo": text})
    with pytest.raises(ValueError, match=r"does not fit this version of the diffkern demo: .*size mismatch") as caught:
        checkpoint.load(tmp_path / "wide.safetensors")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------------------- sampling
def test_plans_of_the_demo() -> None:
    schedule = schedules.cosine()
    for sampler, steps in DEFAULT_STEPS.items():
        plan = make_plan(sampler, schedule)
        assert len(plan.steps) == steps
        assert {row.clip for row in plan.rows} == {1.0}
    assert make_plan("ddim", schedule, 10).rows[0].time == 999
    assert make_plan("heun", schedule, 10).model_calls == 19
    assert make_plan("euler", schedule, 10).init_scale == pytest.approx(80.0)
    assert make_plan("euler", schedules.linear(50), 10).init_scale < 80.0  # a short schedule ends earlier
    assert not make_plan("ddim", schedule, 10, eta=1.0).deterministic
    with pytest.raises(ValueError, match=r"sampler must be one of ddpm, ddim, euler, .*, unipc, got 'dpm'"):
        make_plan("dpm", schedule)
    with pytest.raises(ValueError, match=r"sampler must be one of .*, got 'langevin'"):
        make_plan("langevin", schedule)
    with pytest.raises(ValueError, match="eta belongs to the sampler ddim, got it with heun"):
        make_plan("heun", schedule, eta=0.5)


class Elementwise(nn.Module):
    """A network whose bits cannot depend on the batch: every element by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.config = TINY
        self.null_class = TINY.classes
        self.weight = nn.Parameter(torch.tensor(0.25))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return x * self.weight + 0.01 * cond.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("sampler", DEFAULT_STEPS)
def test_noise_and_updates_do_not_know_the_micro_batch(sampler: str) -> None:
    model: UNet = Elementwise()  # type: ignore[assignment]
    plan = make_plan(sampler, SCHEDULE, 6)
    classes = torch.arange(7)
    whole = generate(model, plan, classes, seed=3, micro_batch=7, progress=False)
    assert whole.model_calls == plan.model_calls
    assert min(whole.model_seconds, whole.update_seconds) > 0
    for micro_batch in (1, 3):
        cut = generate(model, plan, classes, seed=3, micro_batch=micro_batch, progress=False)
        assert torch.equal(cut.images, whole.images)
    last = generate(model, plan, classes[5:], seed=3, first=5, progress=False)
    assert torch.equal(last.images, whole.images[5:])


def test_bad_jobs() -> None:
    model: UNet = Elementwise()  # type: ignore[assignment]
    plan = make_plan("ddim", SCHEDULE, 2)
    with pytest.raises(ValueError, match=r"classes must lie in 0\.\.9, got 10"):
        generate(model, plan, torch.tensor([1, 10]), progress=False)
    with pytest.raises(ValueError, match="at least one image"):
        generate(model, plan, torch.tensor([], dtype=torch.int64), progress=False)
    with pytest.raises(ValueError, match="micro_batch must be at least 1, got 0"):
        generate(model, plan, torch.tensor([1]), micro_batch=0, progress=False)


# --------------------------------------------------------------------------------------------------------- command line
def sample(model_file: Path, *arguments: object) -> int:
    return main(["sample", "--checkpoint", str(model_file), "--quiet", *map(str, arguments)])


@pytest.mark.parametrize("sampler", few(DEFAULT_STEPS, "ddpm", "dpmpp_2m"))
def test_sample_repeats_bit_for_bit(model_file: Path, tmp_path: Path, sampler: str) -> None:
    for name in ("a.png", "b.png"):
        assert sample(model_file, "--sampler", sampler, "--steps", 5, "--classes", "0-4", "--out", tmp_path / name) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    other = ("--sampler", sampler, "--steps", 5, "--classes", "0-4", "--seed", 6, "--out", tmp_path / "c.png")
    assert sample(model_file, "--threads", 1, *other) == 0
    assert (tmp_path / "c.png").read_bytes() != (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("sampler", ["ddpm", "heun"])
def test_micro_batch_of_one_gives_an_image_its_bits_in_every_job(
    model_file: Path, tmp_path: Path, sampler: str
) -> None:
    common = ("--sampler", sampler, "--steps", 4, "--micro-batch", 1)
    assert sample(model_file, *common, "--classes", "3,1,4,1,5", "--out-dir", tmp_path / "all") == 0
    names = ["00000_class3.png", "00001_class1.png", "00002_class4.png", "00003_class1.png", "00004_class5.png"]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == names
    assert sample(model_file, *common, "--classes", "3,1", "--out-dir", tmp_path / "two") == 0
    assert sample(model_file, *common, "--classes", 4, "--first", 2, "--out-dir", tmp_path / "one") == 0
    for folder, chosen in (("two", names[:2]), ("one", names[2:3])):
        assert sorted(path.name for path in (tmp_path / folder).iterdir()) == chosen
        for name in chosen:
            assert (tmp_path / folder / name).read_bytes() == (tmp_path / "all" / name).read_bytes()
    pictures_of_one = [(tmp_path / "all" / name).read_bytes() for name in (names[1], names[3])]
    assert pictures_of_one[0] != pictures_of_one[1], "the number of the image decides its noise, not its class"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sampler", "dpm"], "sampler must be one of ddpm, ddim, euler, heun, midpoint, rk4"),
        (["--classes", "0-12"], "--classes must lie in 0..9 and rise within a range, got '0-12'"),
        (["--classes", "cat"], "--classes must be like 3 or 0,1,7 or 0-9, got 'cat'"),
        (["--steps", "0"], "steps must be an integer"),
        (["--steps", "101", "--sampler", "ddim"], "steps must be an integer"),
        (["--sampler", "euler", "--steps", "0"], "steps must be an integer"),
        (["--sampler", "euler", "--eta", "1"], "eta belongs to the sampler ddim, got it with euler"),
        (["--micro-batch", "0"], "micro_batch must lie in 1..2**31 - 1, got 0"),
        (["--micro-batch", str(2**70)], "micro_batch must lie in 1..2**31 - 1, got 1180591620717411303424"),
        (["--per-class", "0"], "--per-class must be at least 1, got 0"),
        (["--per-class", str(10**9)], "--per-class must be at most 100000 (a job has 1000000 images), got 1000000000"),
        (["--first", "-1"], "--first must not be negative, got -1"),
        (["--first", str(2**70)], "--first must be at most 2**63 - 80, got 1180591620717411303424"),
        (["--first", str(2**63 - 79)], "--first must be at most 2**63 - 80, got 9223372036854775729"),
        (["--seed", str(2**64)], "seed must be an integer of 64 bits, got 18446744073709551616"),
        (["--steps", str(10**12), "--sampler", "heun"], "steps must be an integer in 1..100000, got 1000000000000"),
        (["--guidance", "nan"], "guidance must be finite, got nan"),
        (["--scale", "0"], "scale must lie in 1..182 for a picture of 80 images of 8 x 8, got 0"),
        (["--scale", "1000000"], "scale must lie in 1..182 for a picture of 80 images of 8 x 8, got 1000000"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--threads", str(10**10)], "--threads must be at most 1024, got 10000000000"),
        (["--classes", "9" * 5000], "--classes must be like 3 or 0,1,7 or 0-9, got '9999"),
        (["--device", "tpu"], "--device must be cpu or cuda, got 'tpu'"),
    ],
)
def test_bad_arguments_are_one_sentence(
    model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert sample(model_file, "--out", tmp_path / "no.png", *arguments) == 2
    printed = capsys.readouterr().err.strip()
    assert sentence in printed
    assert len(printed.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_bad_files_are_one_sentence(model_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sample(tmp_path / "none.safetensors") == 2
    assert "there is no checkpoint" in capsys.readouterr().err
    assert sample(model_file, "--out-dir", model_file) == 2
    assert "must be a folder, and is a file" in capsys.readouterr().err
    assert main(["demo", "--out", str(model_file)]) == 2
    assert "must be a folder, and is a file" in capsys.readouterr().err
    assert main(["demo", "--out", str(tmp_path / "demo"), "--iterations", "0"]) == 2
    assert "TrainConfig.iterations must be at least 1, got 0" in capsys.readouterr().err
    assert sample(model_file, "--out", tmp_path) == 2
    assert "must be a file, and is a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--guidance", "nan"], "guidance must be finite, got nan"),
        (["--seed", str(2**64)], "TrainConfig.seed must be an integer of 64 bits, got 18446744073709551616"),
        (["--batch", str(10**9)], "TrainConfig.batch must be at most 65536, got 1000000000"),
        (["--iterations", str(10**9)], "TrainConfig.iterations must be at most 100000000, got 1000000000"),
        (["--per-class", str(10**9)], "--per-class must be at most 100000"),
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the sentence is for machines without a GPU")
def test_cuda_where_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"--device cuda cannot be used: .+"):
        command.check_device("cuda")


def test_a_missing_package_is_named(
    model_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert sample(model_file) == 2
    printed = capsys.readouterr().err.strip()
    assert "this needs safetensors" in printed
    assert "pip install 'diffkern[demo]'" in printed
    assert len(printed.splitlines()) == 1
    with pytest.raises(MissingExtra, match="this needs nothing-like-it"):
        need("diffkern_no_such_module", "nothing-like-it")


@pytest.mark.parametrize(("text", "classes"), [("3", [3]), ("0,1,7", [0, 1, 7]), ("8-9, 0-2", [8, 9, 0, 1, 2])])
def test_classes_in_words(text: str, classes: list[int]) -> None:
    assert command.parse_classes(text, 10) == classes


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
    others = ["forward.png", "loss.png", "real.png", "trajectory.png", "model.safetensors", "results.json", "table.md"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(grids + others)
    assert (tmp_path / "table.md").read_text().strip() == markdown(lines)
    assert markdown(lines) in capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())
    assert [line["sampler"] for line in results["samplers"]] == [line.sampler for line in lines]
    assert results["images_per_sampler"] == 90
    # The other command draws the same grid again, from the checkpoint alone.
    again = tmp_path / "again.png"
    for sampler, steps in config.runs:
        arguments = ("--sampler", sampler, "--steps", steps, "--out", again)
        assert sample(tmp_path / "model.safetensors", *arguments) == 0
        assert again.read_bytes() == (tmp_path / f"{sampler}_{steps}.png").read_bytes()
