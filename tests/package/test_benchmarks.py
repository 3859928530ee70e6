"""The benchmarks' own code: timing, reports and, on small shapes, every kind of case against the reference."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

# At the end: the package under test stays the installed one.
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

pytest.importorskip("benchmarks")

from benchmarks import (
    attention_cases,
    brownian_case,
    cases,
    compat_cases,
    conv3x3_case,
    drop_in_cases,
    flow_matching_cases,
    guided_diffusion_cases,
    machine,
    report,
    run,
    score_sde_cases,
    timing,
    torchcfm_cases,
)

TINY = (2, 3, 8, 8)


# ------------------------------------------------------------------------------------------------------ timing
def test_stats() -> None:
    stats = timing.Stats.of([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (stats.median, stats.minimum, stats.p20, stats.p80, stats.count) == (3.5, 1.0, 2.0, 5.0, 6)
    assert stats.spread == pytest.approx(3 / 3.5)
    assert timing.Stats.of([2.0]).p80 == 2.0
    with pytest.raises(ValueError, match="at least one"):
        timing.Stats.of([])


def test_wall_timer_counts_calls_and_synchronises() -> None:
    log: list[str] = []
    ticks = iter([1_000, 5_000])
    timer = timing.wall_timer(lambda: log.append("sync"), lambda: next(ticks))
    assert timer(lambda: log.append("call"), 4) == pytest.approx(1e-6)
    assert log == ["sync", *["call"] * 4, "sync"]


def test_cuda_timer_flushes_before_every_call() -> None:
    log: list[str] = []

    class Event:
        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: Any) -> float:
            return 3.0  # milliseconds

    timer = timing.cuda_timer(lambda: log.append("flush"), lambda: log.append("sync"), Event)
    assert timer(lambda: log.append("call"), 2) == pytest.approx(3e-3)
    assert log == [*["flush", "event", "call", "event"] * 2, "sync"]


def test_calibrate() -> None:
    def timer(fn: Callable[[], object], calls: int) -> float:
        return 1e-4

    assert timing.calibrate(lambda: None, timer, 0.002) == 20
    assert timing.calibrate(lambda: None, lambda fn, calls: 1.0, 0.002) == 1
    assert timing.calibrate(lambda: None, lambda fn, calls: 0.0, 0.002, most=50) == 50


def test_interleave_takes_turns_in_both_directions_and_keeps_to_its_budget() -> None:
    order: list[str] = []
    now = iter(range(100))

    def timer(fn: Callable[[], object], calls: int) -> float:
        name = str(fn())
        order.append(name)
        return {"a": 1.0, "b": 3.0}[name]

    fns = {"a": lambda: "a", "b": lambda: "b"}
    measured = timing.interleave(fns, timer, rounds=50, budget_seconds=3.5, least_rounds=2, clock=lambda: next(now))
    assert order[2:] == list("abbaabbaab")  # the first two calibrate
    assert measured.samples == {"a": [1.0] * 5, "b": [3.0] * 5}
    assert timing.ratio(measured, "b", "a").median == 3.0
    assert measured.stats("b").count == 5
    with pytest.raises(ValueError, match="rounds"):
        timing.interleave(fns, timer, rounds=0)


def test_share_of_others(tmp_path: Path) -> None:
    assert timing._others((0.0, 2, 10.0, 1.0), (10.0, 2, 26.0, 11.0)) == pytest.approx(0.3)
    assert timing._others((0.0, 2, 10.0, 1.0), (10.0, 2, 12.0, 11.0)) == 0.0
    assert timing._others(None, None) is None
    stat = tmp_path / "stat"
    assert timing._cpu_seconds(stat) is None
    stat.write_text("cpu 100 0 50 900 0 0 0 50 0 0\ncpu0 1 1 1 1\ncpu1 1 1 1 1\nintr 1\n")
    seconds = timing._cpu_seconds(stat)
    assert seconds is not None
    assert seconds[1] == 2


# ------------------------------------------------------------------------------------------------------- report
def _result(name: str = "ddim", ratios: tuple[float, ...] = (12.0,), target: float | None = 10.0) -> report.Result:
    def stats(value: float) -> timing.Stats:
        return timing.Stats(value, value * 0.9, value * 0.95, value * 1.1, 9)

    baselines = tuple(
        report.BaselineResult(who, stats(1e-3 * r), stats(r), target, "", r, 0.0)
        for who, r in zip(("diffusers", "torch.compile"), ratios, strict=False)
    )
    missing = report.BaselineResult("eager", None, None, None, "not asked for")
    shape = (1, 4, 64, 64)
    check = {"what": "ours", "error": 1e-7, "tolerance": 1e-6, "ok": True}
    return report.Result(
        name, "DDIM step", shape, "float32", 1_000_000, 900.0, (check,), True, stats(1e-3), stats(5e-4), 0.25,
        (*baselines, missing), 0.0,
    )  # fmt: skip


def test_result() -> None:
    result = _result(ratios=(12.0, 3.0))
    assert [b.met for b in result.baselines] == [True, False, None]
    assert result.rate == pytest.approx(1e9)
    assert result.floor == pytest.approx(0.5)
    assert result.goal_met is False
    assert result.missed == ["ddim: 3.00x of torch.compile, target 10x", "ddim: 1000.0 us, goal 900 us"]


def test_texts() -> None:
    wrong = report.Result(
        "ddpm", "DDPM step", (1,), "float32", 4, None,
        ({"what": "ours", "error": 1.0, "tolerance": 1e-6, "ok": False},), False,
    )  # fmt: skip
    broken = report.Result("heun", "heun", (), "", 0, None, (), False, error="RuntimeError: no")
    results = [_result(), wrong, broken]
    facts = {"processor": "a machine", "torch": "2.14"}
    text = report.markdown(results, facts)
    assert "- processor: a machine" in text
    assert "**12.00x** [11.40, 13.20]" in text
    assert "differs from the reference" in text
    assert "RuntimeError: no" in text
    assert len({line.count("|") for line in text.splitlines() if line.startswith("|")}) == 1
    rows = list(csv.reader(report.to_csv(results).splitlines()))
    assert len({len(row) for row in rows}) == 1
    assert len(rows) == 1 + 2 + 1 + 1
    data = json.loads(report.to_json(results, facts))
    assert data["environment"] == facts
    assert data["results"][0]["baselines"][0]["ratio"]["median"] == 12.0
    assert "12.00x of diffusers" in report.summary(results[0])
    assert "25% of the cores" in report.summary(results[0])
    assert "NOT TIMED" in report.summary(wrong)
    assert "FAILED" in report.summary(broken)


def test_write(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    facts = machine.environment("cpu")
    assert {"date", "processor", "cores", "isa", "torch", "diffusers", "python", "diffkern"} <= set(facts)
    written = report.write([_result(), _result("guided", (0.4, 80.0), None)], facts, tmp_path / "deep" / "er")
    assert [path.name for path in written] == ["table.md", "results.csv", "results.json", "ratios.png"]
    assert written[-1].read_bytes().startswith(b"\x89PNG")
    assert len(report.write([], facts, tmp_path)) == 3  # nothing to draw
    products = dataclasses.replace(_result("attention"), flops=10**9, gemm=2e12)
    written = report.write([_result(), products], facts, tmp_path / "both")
    assert [path.name for path in written[3:]] == ["ratios.png", "attention.png"]
    assert "0.50 of the products" in report.markdown([products], {})
    assert "1000 GFLOP/s, 0.50 of the products" in report.summary(products)


# ---------------------------------------------------------------------------------------------------------- run
def test_choose() -> None:
    assert run.choose([], ["a", "b"]) == ["a", "b"]
    assert run.choose(["b*", "a"], ["a", "b", "bc"]) == ["a", "b", "bc"]
    with pytest.raises(ValueError, match="'z' matches none"):
        run.choose(["z"], ["a", "b"])


def test_measure_divides_by_the_steps_and_checks_first() -> None:
    log: list[str] = []
    passing = cases.Check("ours", 0.0, 0.0)

    def check() -> list[cases.Check]:
        log.append("check")
        return [passing]

    baselines = (cases.Baseline("slow", lambda: None, 2.0), cases.Baseline("gone", None, 2.0, "why"))
    case = cases.Case("n", "t", (1,), torch.float32, lambda: None, baselines, check, 80, steps=10)

    def fake(contestants: dict[str, Any], timer: Any, **options: Any) -> timing.Measured:
        times = {"diffkern": [1.0, 2.0], "copy": [0.1, 0.1], "slow": [4.0, 6.0]}
        assert set(contestants) == set(times)
        return timing.Measured(times, dict.fromkeys(times, 1), 0.0)

    checked = run.check(case)
    assert log == ["check"]
    result = run.measure(case, timing.wall_timer(), checked, run=fake)
    assert result.passed
    assert result.ours is not None
    assert result.ours.median == pytest.approx(0.15)
    slow, gone = result.baselines
    assert slow.ratio is not None
    assert slow.ratio.median == 3.5
    assert slow.ratio_of_minima == 4.0
    assert slow.met
    assert gone.stats is None
    assert not cases.Check("ours", math.nan, 1.0).passed


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run.main(["--list"]) == 0
    assert capsys.readouterr().out.split() == list(cases.CASES)
    assert run.main(["--cases", "no-such-case"]) == 2
    assert "matches none" in capsys.readouterr().err
    monkeypatch.setattr(run, "alone", lambda work, *arguments: work(*arguments))
    monkeypatch.setattr(run, "_facts", lambda options: {"processor": "p"})
    tiny = {"randn-small": lambda setting: cases.randn("randn-small", setting, TINY), "broken": lambda setting: 1 / 0}
    monkeypatch.setattr(run, "CASES", tiny)
    monkeypatch.setattr(run, "choose", lambda patterns: list(tiny))
    threads = str(torch.get_num_threads())
    assert run.main(["--seconds", "0.01", "--threads", threads, "--no-compile", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "[1/2] randn-small" in printed.out
    assert "ZeroDivisionError" in printed.out
    assert "broken" in printed.err
    assert (tmp_path / "results.json").exists()


# -------------------------------------------------------------------------------------------------------- cases
KINDS: dict[str, tuple[Callable[..., cases.Case], dict[str, Any]]] = {
    "randn": (cases.randn, {}),
    "noise-sum": (brownian_case.noise_sum, {}),
    "brownian": (brownian_case.increments, {}),
    "noising": (cases.noising, {}),
    "noising-v": (cases.noising, {"target": True}),
    "noising-bf16": (cases.noising, {"dtype": torch.bfloat16}),
    "loss-v": (cases.loss, {"prediction": "v"}),
    "loss-eps-stored": (cases.loss, {"prediction": "eps", "stored": True}),
    "ddim": (cases.step, {"kind": "ddim", "want_x0": True, "add": 1.3}),
    "ddim-channels-last": (cases.step, {"kind": "ddim", "channels_last": True}),
    "ddpm": (cases.step, {"kind": "ddpm"}),
    "learned-step": (cases.learned, {}),
    "logprob": (cases.logprob, {}),
    "logprob-grad": (cases.logprob, {"gradient": True}),
    "guided": (cases.guided, {}),
    "heun": (cases.heun, {}),
    "ddim-loop": (cases.loop, {"kind": "ddim"}),
    "ddpm-loop": (cases.loop, {"kind": "ddpm"}),
    "diffusers-dpmpp-2m-sde": (
        drop_in_cases.drop_in,
        {"kind": "DPMSolverMultistepScheduler", "steps": 4, "algorithm_type": "sde-dpmsolver++"},
    ),
    "diffusers-heun": (drop_in_cases.drop_in, {"kind": "HeunDiscreteScheduler", "steps": 4}),
    "diffusers-repaint": (drop_in_cases.drop_in, {"kind": "RePaintScheduler", "steps": 4}),
    "diffusers-score-sde-ve": (drop_in_cases.drop_in, {"kind": "ScoreSdeVeScheduler", "steps": 4}),
    "k-diffusion-heun": (compat_cases.k_loop, {"kind": "heun"}),
    "k-diffusion-dpmpp-sde": (compat_cases.k_loop, {"kind": "dpmpp_sde"}),
    "edm-loop-churn": (compat_cases.edm_loop, {"churn": 40.0}),
    "score-sde-langevin": (
        score_sde_cases.pc_loop,
        {"kind": "subvp", "predictor": "reverse_diffusion", "corrector": "langevin"},
    ),
    "flow-matching-rk4": (flow_matching_cases.loop, {"method": "rk4"}),
    "flow-matching-path": (flow_matching_cases.path, {"scheduler": "VPScheduler"}),
    "guided-diffusion-ddim": (guided_diffusion_cases.step, {"kind": "ddim_sample"}),
    "guided-diffusion-p-learned": (guided_diffusion_cases.step, {"variance": "LEARNED_RANGE", "drawn": True}),
    "guided-diffusion-losses": (guided_diffusion_cases.losses, {}),
    "torchcfm-bridge": (torchcfm_cases.matcher, {"kind": "bridge"}),
    "torchcfm-target-given": (torchcfm_cases.matcher, {"kind": "target", "given": True}),
    "conv3x3": (conv3x3_case.conv3x3, {}),
    "conv3x3-upsampled": (conv3x3_case.conv3x3, {"packed": False, "upsample": True}),
    "conv3x3-fast": (conv3x3_case.conv3x3, {"fast": True}),
    "attention": (attention_cases.attention, {}),
    "attention-grad-bf16": (attention_cases.attention, {"grad": True, "dtype": torch.bfloat16}),
    "attention-nchw-f16": (attention_cases.spatial, {"dtype": torch.float16}),
    "attention-nchw-grad": (attention_cases.spatial, {"grad": True}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_case_agrees_with_the_reference_and_its_baselines(kind: str) -> None:
    build, options = KINDS[kind]
    if build in (cases.step, cases.learned, cases.guided, cases.heun, cases.loop, drop_in_cases.drop_in):
        pytest.importorskip("diffusers")
    case = build(kind, cases.Setting(compiled=False), TINY, **options)
    with torch.set_grad_enabled(case.grad):
        for check in case.check():
            assert check.passed, check
        for baseline in case.baselines:
            if baseline.fn is not None:
                baseline.fn()
    assert case.bytes > 0


def test_floor_counts_each_operand_once() -> None:
    setting, tensor = cases.Setting(compiled=False), 4 * math.prod(TINY)
    assert cases.randn("r", setting, TINY).bytes == tensor
    assert cases.noising("n", setting, TINY, target=True).bytes == 3 * tensor
    assert cases.loss("l", setting, TINY, "eps").bytes == 2 * tensor
    assert cases.loss("l", setting, TINY, "v", stored=True).bytes == 4 * tensor


def test_attention_counts_its_products_and_has_targets() -> None:
    setting = cases.Setting(compiled=False)
    assert attention_cases.attention("a", setting, TINY).flops == 4 * 2 * 3 * 8 * 8 * 8
    assert attention_cases.spatial("a", setting, TINY, grad=True).flops == 14 * 2 * 3 * 8 * 8 * 8
    options = [{**options, "build": build} for build, options in attention_cases.TABLE.values()]
    assert {o["shape"] for o in options} == {
        *((1, 8, 4096, 40), (1, 5, 4096, 64), (2, 8, 1024, 64), (1, 20, 1024, 64)),
        *((4, 4, 256, 64), (16, 1, 256, 256), (1, 1, 4096, 512)),
    }
    case = attention_cases.spatial("a", setting, TINY, goals=attention_cases.LARGE_GOALS)
    assert [b.target for b in case.baselines] == [6.0, 2.0, 2.0]
    wrong = attention_cases._checks(
        {"ours": lambda q, k, v: 1.01 * q}, lambda q, k, v: q, (torch.ones(1, 1, 4, 8),) * 3, torch.ones(1, 1, 4, 8),
        torch.arange(4), False,
    )  # fmt: skip
    assert [c.passed for c in wrong] == [False]


def test_rate_of_bare_products() -> None:
    rate = run.gemm_rate("float32", 1, 0.02)
    assert rate is not None
    assert rate > 1e8
    assert run.gemm_rate("float64", 1, 0.02) is None


def test_targets_are_for_the_cpu() -> None:
    assert cases.Setting("cuda").cpu is False
    assert cases.cpu_target(4.0, cases.Setting("cuda")) is None
    assert cases.cpu_target(4.0, cases.Setting()) == 4.0
