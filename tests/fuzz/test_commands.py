"""Every command with arguments and files at random: it works, or one sentence and exit status 2; nothing is left."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.fuzzing import NO_SENTENCE, fuzz
from helpers.generate_cases import blobs
from helpers.lazy import needs
from hypothesis import strategies as st

from diffkern.__main__ import _commands, main
from diffkern.command import demo, evaluate
from diffkern.diffusion import Diffusion
from diffkern.generate import DEFAULT_STEPS
from diffkern.nn import Autoencoder, AutoencoderConfig, UNet, UNetConfig
from diffkern.samplers import SAMPLERS
from diffkern.schedules.makers import SCHEDULES, cosine

pytestmark = needs("safetensors", "PIL", "tqdm")

TINY = UNetConfig(channels=8, multipliers=(1,), blocks=1, attention_levels=(), heads=1, embedding=16)
JUNK = ["", "nan", "inf", "-1", "0", "1e999", "9" * 30, "9" * 5000, "0x10", "cat", "1,2", "é", "\x00", "[" * 200, "--"]
SMALL = ["1", "2", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("fuzz")
    for name in ("run", "changed"):
        Diffusion(UNet(TINY), cosine(10)).save_pretrained(where / name)
    small = AutoencoderConfig(8, 1, 8, (1, 2), 1, groups=4, middle_attention=False)
    Autoencoder(small).save_pretrained(where / "autoencoder")
    blobs(where / "data.npz")
    (where / "plan.json").write_text('{"diffkern_plan": 1, "name": "p", "rows": [{"a": 1.0}]}')
    (where / "text").write_text("no plan")
    return where


def run(arguments: list[str], folder: Path) -> None:
    """The command: its status, its one sentence, and no unfinished file."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.chdir(folder):
        try:
            status = main(arguments)
        except SystemExit as stop:  # of argparse
            status = 0 if stop.code == 2 else int(stop.code or 0)
    text = err.getvalue().strip()
    assert status in (0, 1, 2), arguments
    if status == 2:
        assert len(text.splitlines()) == 1, f"{arguments}: {text}"
        assert re.match(r"diffkern \w+: \S", text), f"{arguments}: {text}"
        assert not any(part in text for part in NO_SENTENCE), f"{arguments}: {text}"
    assert not list(folder.glob("*.part")), arguments


def words(*flags: str) -> st.SearchStrategy[list[str]]:
    """Some of the flags, each with a small number or junk."""
    pair = st.tuples(st.sampled_from(flags), st.sampled_from([*SMALL, *JUNK]))
    return st.lists(pair, max_size=4).map(lambda pairs: [f"{flag}={value}" for flag, value in pairs])


def test_every_command_is_here() -> None:
    assert set(_commands) == {"info", "train", "plan", "demo", "sample", "reconstruct", "evaluate"}


@fuzz(10, arguments=st.lists(st.sampled_from(["--json", *JUNK]), max_size=2))
def test_info(folder: Path, arguments: list[str]) -> None:
    run(["info", *arguments], folder)


LITERALS = ["3", "0.5", "-1", "nan", "inf", "'x'", "x", "[1, 2]", "(0.5,)", "{}", "None", "True", "1e999", "2**3"]
LITERALS += ["1j", "b'x'", "[" * 50 + "]" * 50, "(" * 300 + ")" * 300, "9" * 30, "lambda: 0", "__import__('os')", "*x"]
NAMES = ["steps", "eta", "clip", "sigmas", "timesteps", "spacing", "prediction", "order", "churn", "nonsense"]


@st.composite
def sources(draw: st.DrawFn) -> str:
    if draw(st.integers(0, 4)) == 0:
        return draw(st.sampled_from(["plan.json", "text", "none.json", ".", *JUNK]))
    schedule = draw(st.sampled_from([*SCHEDULES, "nonsense", "3"]))
    if draw(st.booleans()):
        schedule += f"({draw(st.sampled_from(['T', 'sigma_max', 'beta_end']))}={draw(st.sampled_from(LITERALS))})"
    options = [f"{n}={draw(st.sampled_from(LITERALS))}" for n in draw(st.lists(st.sampled_from(NAMES), max_size=2))]
    given = ", ".join([f"schedule={schedule}", "steps=3", *options])
    return f"{draw(st.sampled_from([*SAMPLERS, 'nonsense']))}({given})"


@fuzz(80, data=st.data())
def test_plan(folder: Path, data: st.DataObject) -> None:
    action = data.draw(st.sampled_from(["show", "make", "diff", "nonsense"]))
    arguments = [data.draw(sources()) for _ in range(2 if action == "diff" else 1)]
    if action in ("show", "make") and data.draw(st.booleans()):
        arguments.append(f"{data.draw(st.sampled_from(NAMES))}={data.draw(st.sampled_from(LITERALS))}")
    if action == "make" and data.draw(st.booleans()):
        arguments += ["-o", data.draw(st.sampled_from(["out.json", ".", "none/x.json", "", "x" * 300, "\x00"]))]
    if action == "diff":
        arguments += data.draw(words("--tolerance"))
    run(["plan", action, *arguments], folder)


FLAGS = ("--steps", "--eta", "--seed", "--classes", "--per-class", "--n", "--first", "--guidance", "--micro-batch")
CALLS = ["ddim(eta=1)", "heun(churn=2)", "ddim(", "ddim(steps=3)(", "euler(sigmas=3)", "ddim(schedule=edm)", "dpm (2)"]


@fuzz(40, data=st.data())
def test_sample(folder: Path, data: st.DataObject) -> None:
    runs = ["run", "run", "run", "run/model.safetensors", "text", "none", ".", "", "\x00"]
    arguments = ["--run", data.draw(st.sampled_from(runs)), "--steps=2", "--classes=1,2", "--scale=1", "--quiet"]
    arguments += ["--sampler", data.draw(st.sampled_from([*DEFAULT_STEPS, *CALLS, "nonsense"])), "--threads=1"]
    outs = [["--out", "x.png"], ["--out-dir", "all"], ["--out", "."], ["--out-dir", "text"], ["--out", "text/x.png"]]
    outs += [["--input", "data.npz"], ["--then", "run"], ["--text", "a"], ["--mask", "x.png"], ["--input", "text"]]
    outs += [["--shards", "shards"], ["--shards", "run"], ["--shards", "text"], ["--shards", ""]]
    run(["sample", *arguments, *data.draw(st.sampled_from(outs)), *data.draw(words(*FLAGS, "--scale"))], folder)


@fuzz(30, data=st.data())
def test_reconstruct(folder: Path, data: st.DataObject) -> None:
    runs = ["autoencoder", "autoencoder", "run", "text", "none", ".", "", "\x00"]
    images = data.draw(st.sampled_from(["data.npz", "data.npz", "text", "none", ""]))
    arguments = ["--run", data.draw(st.sampled_from(runs)), "--data", images, "--threads=1", "--quiet"]
    outs = [["--out", "x.png"], ["--out-dir", "all"], ["--out", "."], ["--out-dir", "text"], ["--out", "text/x.png"]]
    run(["reconstruct", *arguments, *data.draw(st.sampled_from(outs)), *data.draw(words("--n", "--scale"))], folder)


@fuzz(60, data=st.data())
def test_sample_of_a_model_that_was_changed(folder: Path, data: st.DataObject) -> None:
    from safetensors.torch import load_file, save_file

    values: dict[str, Any] = json.loads((folder / "run" / "config.json").read_text())
    junk = st.sampled_from([None, True, -1, 0, 3, 2**40, 10**400, 0.5, "x", [], [1], {}, {"a": [1]}, "cosine"])
    inside = values["network"]["config"] if data.draw(st.booleans()) else values
    inside[data.draw(st.sampled_from([*inside, "more"]))] = data.draw(junk)
    weights = load_file(folder / "run" / "model.safetensors")
    if data.draw(st.integers(0, 3)) == 0:
        name = data.draw(st.sampled_from([*weights, "more"]))
        weights[name] = data.draw(
            st.sampled_from([torch.zeros(0), torch.zeros(3, 3), torch.zeros(1, dtype=torch.int64)])
        )
    (folder / "changed" / "config.json").write_text(json.dumps(values))
    save_file(weights, folder / "changed" / "model.safetensors")
    run(["sample", "--run", "changed", "--steps=2", "--classes=1", "--scale=1", "--quiet", "--threads=1"], folder)


@fuzz(30, data=st.data())
def test_evaluate(folder: Path, data: st.DataObject) -> None:
    """Up to where sampling would begin."""
    flags = ("--n", "--limit", "--steps", "--seed", "--micro-batch", "--features", "--weights", "--images", "--out")
    sources = st.sampled_from(["data.npz", "data.npz", "data.npz", "text", "none", ".", "run", "", "\x00"])
    arguments = ["--run", data.draw(st.sampled_from(["run", "run", "text", "none"])), "--threads=1", "--quiet"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate._Evaluation, "run", lambda self: None)
        run(["evaluate", *arguments, "--data", data.draw(sources), *data.draw(words(*flags))], folder)


@fuzz(30, data=st.data())
def test_demo(folder: Path, data: st.DataObject) -> None:
    """Up to where the training would begin."""
    flags = ("--iterations", "--batch", "--per-class", "--guidance", "--seed", "--threads", "--device", "--out")
    arguments = data.draw(words(*flags))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "run_demo", lambda config: [])
        patch.setattr(torch, "set_num_threads", lambda n: None)
        run(["demo", *arguments], folder)
