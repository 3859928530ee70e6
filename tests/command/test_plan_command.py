"""`python -m diffkern plan show | diff | make`: sources, what is printed, exit statuses, sentences."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest

from diffkern import samplers, schedules
from diffkern.__main__ import main
from diffkern.command.plan import differences, read
from diffkern.plan import Plan

LINEAR = schedules.linear()


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    status = main(["plan", *arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.mark.parametrize(("source", "plan"), [
    ("ddim", samplers.ddim(LINEAR)),
    ("ddim(steps=5, eta=0.5)", samplers.ddim(LINEAR, 5, eta=0.5)),
    ("ddpm(schedule=cosine(T=20), variance='beta')", samplers.ddpm(schedules.cosine(T=20), variance="beta")),
    ("heun(schedule=edm(sigma_max=40.0), steps=4)", samplers.heun(schedules.edm(sigma_max=40.0), 4)),
    ("euler(schedule=vp, steps=4, spacing=karras)", samplers.euler(schedules.vp(), 4, spacing="karras")),
    ("euler(schedule=vp, steps=4, clip=1)", samplers.euler(schedules.vp(), 4, clip=1)),
    ("dpmpp_2m(timesteps=[900, 500, 3])", samplers.dpmpp_2m(LINEAR, timesteps=[900, 500, 3])),
    ("heun(schedule=edm, steps=4, churn=2, churn_range=(0, inf))", samplers.heun(schedules.edm(), 4, churn=2)),
    ("repaint(steps=9, jump_length=2, jump_n_sample=3)", samplers.repaint(LINEAR, 9, 2, 3)),
    ("langevin(steps=2, t=400, step_size=1e-3)", samplers.langevin(LINEAR, 2, t=400, step_size=1e-3)),
    ("flow_sde(schedule=flow, steps=3, sigma_t=0.5)", samplers.flow_sde(schedules.flow(), 3, sigma_t=0.5)),
])  # fmt: skip
def test_a_source_is_the_samplers_plan(source, plan):
    assert read(source) == plan


def test_show(capsys):
    assert run(capsys, "show", "ddim", "schedule=cosine", "steps=3", "eta=0.5") == (
        0, f"{samplers.ddim(schedules.cosine(), 3, eta=0.5)}\n", "",
    )  # fmt: skip
    assert run(capsys, "show", "ddim(steps=3)", "eta=1")[1] == f"{samplers.ddim(LINEAR, 3, eta=1)}\n"


def test_make_and_files(capsys, tmp_path: Path, monkeypatch):
    plan = samplers.unipc(schedules.edm(), 5)
    status, text, _ = run(capsys, "make", "unipc", "schedule=edm", "steps=5")
    assert status == 0
    assert Plan.from_json(text) == plan
    file = tmp_path / "plan.json"
    assert run(capsys, "make", "unipc(schedule=edm, steps=5)", "-o", str(file)) == (0, "", "")
    assert read(str(file)) == plan
    assert run(capsys, "show", str(file))[1] == f"{plan}\n"
    other = tmp_path / "no-suffix"
    other.write_text(plan.to_json())
    assert read(str(other)) == plan
    monkeypatch.setattr("sys.stdin", io.StringIO(plan.to_json()))
    assert run(capsys, "diff", "-", str(file)) == (0, "", "")


def test_diff(capsys, tmp_path: Path):
    assert run(capsys, "diff", "ddim(steps=3)", "ddim(steps=3, eta=0)") == (0, "", "")
    status, text, _ = run(capsys, "diff", "ddim(steps=3)", "ddim(steps=3, eta=1)")
    assert status == 1
    lines = text.splitlines()
    assert [line.split(":")[0] for line in lines] == ["row 0", "row 1"]
    assert all(" g 0.0 | " in line for line in lines)
    assert "known_s" not in text
    one = samplers.ddim(LINEAR, 3, eta=0.5)
    (tmp_path / "one.json").write_text(one.to_json())
    status, text, _ = run(
        capsys, "diff", str(tmp_path / "one.json"), "ddim(steps=3, eta=0.5000001)", "--tolerance", "1e-5"
    )
    assert (status, text) == (0, "")
    assert run(capsys, "diff", str(tmp_path / "one.json"), "ddim(steps=3, eta=0.5000001)")[0] == 1


def test_differences_of_every_kind():
    plan = samplers.heun(schedules.edm(), 3)
    assert differences(plan, plan) == []
    fewer = samplers.heun(schedules.edm(), 2)
    assert "rows: 5 | 3" in differences(plan, fewer)
    saves = replace(plan, rows=(*plan.rows[:-1], replace(plan.rows[-1], saves=((0, "x"),), stream=7, time=1.0)))
    assert differences(plan, saves) == [
        f"row 4: stream {plan.rows[-1].stream} | 7, time {plan.rows[-1].time!r} | 1.0, saves none | h0=x"
    ]
    near = replace(plan, init_scale=plan.init_scale * (1 + 1e-7))
    assert differences(plan, near) == [f"init_scale: {plan.init_scale} | {near.init_scale}"]
    assert differences(plan, near, 1e-6) == []


@pytest.mark.parametrize(("arguments", "words"), [
    (["show", "ddimm"], "sampler must be one of ddpm, ddim, .*, got 'ddimm'"),
    (["show", "ddim", "steps"], "an argument must be name=value, got 'steps'"),
    (["show", "ddim(steps=3)", "steps=4"], "steps must be given once, got it twice for ddim"),
    (["show", "ddim(3)"], r"a sampler's arguments must be named, as in ddim\(steps=20\), got 'ddim\(3\)'"),
    (["show", "ddim", "steps=0"], "steps must be .* got 0"),
    (["show", "ddim", "stepz=3"], "ddim does not take these arguments: .*unexpected keyword argument 'stepz'"),
    (["show", "ddim", "schedule=lin"], "schedule must be one of linear, .*, got 'lin'"),
    (["show", "ddim", "schedule=cosine(S=3)"], "cosine does not take these arguments: .*'S'"),
    (["show", "ddim", "steps=2*3"], r"steps must be a number, text or list, got 'steps=2\*3'"),
    (["show", "ddim", "steps=("], r"a plan must be a file or a sampler with its arguments, .* got 'steps=\('"),
    (["show", "ddim +"], "a plan must be a file or a sampler with its arguments"),
    (["show", "1 + 2"], "a plan must be a file or a sampler with its arguments"),
    (["show", "ddim(**{})"], r"arguments must be named one by one, got \*\* in"),
    (["show", "none.json"],
     r"source must be a file of a plan's JSON, - for stdin, or a sampler such as ddim\(steps=20\), got 'none.json' \("),
    (["make", "none.json"], "source must be a file of a plan's JSON, .* got 'none.json'"),
    (["diff", "none.json", "ddim"], "one must be a file of a plan's JSON, .* got 'none.json'"),
    (["diff", "ddim", "none.json"], "two must be a file of a plan's JSON, .* got 'none.json'"),
    (["make", "ddim", "-o", "none/plan.json"], "--output must be a file that can be written, got 'none/plan.json'"),
    (["show", "none.json", "steps=3"], "arguments belong to a sampler, got steps=3 for the file none.json"),
    (["diff", "ddim", "ddim", "--tolerance", "-1"], r"--tolerance must be a number >= 0, got -1\.0"),
    (["show", "ddim", f"steps={'(' * 5000}1{')' * 5000}"], r"a plan must be a file or a sampler .* got 'steps=\(\(\("),
    (["show", f"ddim(steps={'[' * 90}1{']' * 90})"], r"steps must be an integer in 1..1000 .*, got \[\[\["),
    (["show", "ddim", f"timesteps={'-' * 3000}1"], "a plan must be a file or a sampler|timesteps must be a number"),
    (["show", "ddim", "steps=1000000000"], "steps must be at most 1000000, got 1000000000"),
    (["show", "ddim", "schedule=linear(T=10000000000)"], "T must be at most 1000000, got 10000000000"),
    (["show", "ddim", f"steps={'9' * 5000}"], "a plan must be a file or a sampler"),
    (["diff", "-", "-"], "only one of the two plans can be read from stdin"),
])  # fmt: skip
def test_bad_input(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert re.search(words, err), err


def test_a_file_that_is_no_plan(capsys, tmp_path: Path):
    file = tmp_path / "plan.json"
    file.write_text('{"diffkern_plan": 9}')
    status, _, err = run(capsys, "show", str(file))
    assert status == 2
    assert "text must be the JSON of a plan with diffkern_plan = 1, got 9" in err
    file.write_text("[" * 100_000)
    status, _, err = run(capsys, "show", str(file))
    assert status == 2
    assert re.search(r"text must be the JSON of a plan, got .* \(nested too deeply\)$", err.strip())
    file.write_bytes(b"\xff\xfe\x00")
    status, _, err = run(capsys, "show", str(file))
    assert status == 2
    assert re.search(r"source must be a file of a plan's JSON, .*plan.json' \(not text\)", err)


def test_a_sampler_may_be_longer_than_a_file_name():
    times = list(range(999, 599, -1))
    assert read(f"ddim(timesteps={times})") == samplers.ddim(LINEAR, timesteps=times)


def test_no_action_is_a_usage_error(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["plan"])
    assert stop.value.code == 2
    assert "ACTION" in capsys.readouterr().err
