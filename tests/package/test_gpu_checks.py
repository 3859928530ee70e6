"""The checks of tests/gpu without a GPU: each runs on the CPU, fails when a bit is wrong, and fits fake CUDA tensors.

The loops of `sample` and of training are also run on fake CUDA tensors, where every upload and every wait is seen.
"""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu import calls, checks_compile, checks_graphs, checks_ops, checks_runs
from gpu.calls import DTYPES, Call
from gpu.harness import HOST, Target, Traffic, counting_storages, difference, moved
from helpers.op_cases import values
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import diffkern
from diffkern import samplers, schedules

pytestmark = pytest.mark.full  # what they check is tested of the CPU elsewhere: here, that tests/gpu would see it

CUDA = torch.device("cuda", 0)
Check = Callable[[Target], None]


def check(function: Callable[..., None], *args: Any, **kwargs: Any) -> Check:
    return lambda target: function(target, *args, **kwargs)


# Compare results of a device with the CPU's; a part of the cases that a GPU gets.
COMPARISONS: dict[str, Check] = {
    "randn": check(checks_ops.check_randn, torch.bfloat16),
    "noise_sum": check(checks_ops.check_noise_sum, torch.float16),
    "mixed rows": check(checks_ops.check_mixed_rows, torch.float16),
    "far elements": check(checks_ops.check_far_elements, 100_003),
    "layout of sampling": check(checks_runs.check_layout_of_sampling),
    "graph of noising": check(checks_graphs.check_graph_of_noising, False),
    "graph of noising out": check(checks_graphs.check_graph_of_noising, True),
    "graph of step": check(checks_graphs.check_graph_of_step, False),
    "graph of step by sample": check(checks_graphs.check_graph_of_step, True),
    "graph of randn and loss": check(checks_graphs.check_graph_of_randn_and_loss),
    "graph of a loop": check(checks_graphs.check_graph_of_a_loop, False),
    "graph of a whole loop": check(checks_graphs.check_graph_of_a_loop, True),
    **{f"starts of {name}": check(checks_runs.check_starts, name) for name in ("heun", "ddpm learned")},
    "loop is lean": check(checks_runs.check_loop_is_lean, "heun edm", "guided"),
    **{f"gradients {dtype}": check(checks_ops.check_gradients, dtype) for dtype in DTYPES},
    **{f"sampling {name}": check(checks_runs.check_sampling, name, torch.float32) for name in checks_runs.PLANS},
    **{f"sampling in {dtype}": check(checks_runs.check_sampling, "heun edm", dtype) for dtype in DTYPES},
    **{f"side stream, {op}": check(checks_runs.check_side_stream, op) for op in checks_runs.STREAM_JOBS},
    **{f"no sync, {op}": check(checks_runs.check_no_sync, op) for op in checks_runs.STREAM_JOBS},
}
for k, layout in enumerate(calls.INPUT_LAYOUTS[1:]):  # contiguous has the large ones
    for name in (
        "noising",
        "loss",
        "variational",
        "statistics",
        "group_norm",
        "linear_rows",
        "step",
        "learned_step",
        "step_logprob",
        "out",
        "in_place",
    ):
        dtype = DTYPES[(k + len(name)) % 4]
        COMPARISONS[f"{name} {layout}"] = check(getattr(checks_ops, f"check_{name}"), dtype, layout)
del COMPARISONS["in_place expanded"]
OTHERS: dict[str, Check] = {
    "training": check(checks_runs.check_training),
    "training never waits": check(checks_runs.check_training_never_waits),
    "index outside": check(checks_ops.check_index_outside),
    "operand missing": check(checks_ops.check_operand_missing),
    "empty batch": check(checks_ops.check_empty_batch),
    "devices do not mix": check(checks_ops.check_devices_do_not_mix, torch.device("meta")),
    "checked mode": check(checks_ops.check_checked_mode),
    "compile": check(checks_compile.check_compile, backend="aot_eager"),
    "opcheck": check(checks_compile.check_opcheck, slice(1, 3)),
    "device guard": check(checks_runs.check_device_guard, HOST, "step"),
}
# No backward on fake CUDA tensors (its threads ask for the device); of the slow ones, one layout or less.
SLOW = ("gradients", "noising", "loss", "variational", "statistics", "step", "learned_step", "step_logprob", "out")
SLOW += ("starts",)  # read on the host
REHEARSED = [n for n in COMPARISONS if not n.startswith(SLOW)] + [f"{n} misaligned" for n in ("noising", "loss", "out")]
GRAPHS = [name for name in COMPARISONS if name.startswith("graph")]


@pytest.mark.parametrize("name", [*COMPARISONS, *OTHERS])
def test_passes_on_the_cpu(name: str) -> None:
    (COMPARISONS | OTHERS)[name](HOST)


def test_plans_are_of_every_sampler() -> None:
    assert {plan.name for plan in checks_runs.PLANS.values()} == set(samplers.SAMPLERS)


# ------------------------------------------------------------------------------------------------ checks that can fail
class OneBitOff(Target):
    """The lowest bit of one number of every result is wrong."""

    def fetch(self, t: Tensor) -> Tensor:
        result = super().fetch(t).contiguous()
        flat = result.view(-1)
        numbers = (~flat.isnan()).nonzero()
        if len(numbers):
            at = int(numbers[len(numbers) // 2])
            width = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}[t.element_size()]
            flat.view(width)[at] ^= 1
        return result


class Stale(Target):
    """Graphs do nothing when they are replayed."""

    def record(self, function: Callable[[], object]) -> Callable[[], None]:
        function()
        return lambda: None


@pytest.mark.parametrize("name", COMPARISONS)
def test_one_wrong_bit_is_noticed(name: str) -> None:
    with pytest.raises(AssertionError, match=r"differ, first at|bytes beside the output"):
        COMPARISONS[name](OneBitOff("cpu"))


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_that_does_nothing_is_noticed(name: str) -> None:
    with pytest.raises(AssertionError, match=r"differ, first at"):
        COMPARISONS[name](Stale("cpu"))


def test_an_allocation_in_the_loop_is_noticed() -> None:
    def leaky(x: Tensor, t: Tensor) -> Tensor:
        return x * 0.5

    with pytest.raises(AssertionError, match="allocations after each step"):
        checks_runs.check_loop_is_lean(HOST, "ddim", "plain", leaky)


def test_a_write_beside_the_output_is_noticed() -> None:
    for layout in calls.OUTPUT_LAYOUTS:
        shape = (2, 3, 5, 4)
        expected = values(shape, 1)
        memory, view = checks_ops.guarded(HOST, shape, torch.float32, layout)
        view.copy_(expected)
        checks_ops.check_written(HOST, memory, view, expected, layout)
        at = (view.storage_offset() - 1) * view.element_size()
        memory[at] ^= 1
        with pytest.raises(AssertionError, match="1 bytes beside the output"):
            checks_ops.check_written(HOST, memory, view, expected, layout)


class Pretender(Target):
    """Says that it is a GPU, for the branches that the CPU does not take."""

    is_gpu = True


@pytest.mark.parametrize("right", [True, False])
def test_nan_is_asked_for(monkeypatch: pytest.MonkeyPatch, right: bool) -> None:
    """The branches for a GPU of the two checks of NaN, with what a GPU would give, and with less."""
    run = Call.run

    def device(call: Call, target: Target) -> dict[str, Tensor]:
        if not target.is_gpu:
            return run(call, target)
        index, arguments = call.arguments["index"], dict(call.arguments)
        if index.dim():
            bad = (index < 0) | (index >= 3)
            results = run(Call(call.op, {**arguments, "index": torch.where(bad, 0, index)}, call.what), HOST)
        else:
            bad = torch.tensor([True, True])
            x = arguments["known"] if arguments["x"] is None else arguments["x"]
            results = {"out": x.clone(), "next": torch.cat([x, x])}
        for t in results.values():
            t[bad.repeat(len(t) // len(bad)) & torch.tensor(right)] = torch.nan
        return results

    monkeypatch.setattr(Call, "run", device)
    for function in (checks_ops.check_index_outside, checks_ops.check_operand_missing):
        if right:
            function(Pretender("cpu"))
        else:
            with pytest.raises(AssertionError):
                function(Pretender("cpu"))


# ------------------------------------------------------------------------------------------------------------- harness
def test_difference() -> None:
    x = torch.tensor([[1.0, -0.0, torch.nan, torch.inf]])
    assert difference(x, x.clone()) is None
    assert difference(x.t(), x.t().contiguous()) is None
    other_nan = (x.view(torch.int32) | torch.tensor([[0, 0, 1, 0]], dtype=torch.int32)).view(torch.float32)
    assert difference(x, other_nan) is None
    for k, value in enumerate((1.0 + 2**-23, 0.0, 1.0, torch.nan)):
        wrong = x.clone()
        wrong[0, k] = value
        assert (
            difference(wrong, x)
            == f"1 of 4 differ, first at (0, {k}): {wrong[0, k].item()} instead of {x[0, k].item()}"
        )
    assert difference(x.double(), x) == "torch.float64 [1, 4] instead of torch.float32 [1, 4]"
    assert difference(x[0], x) == "torch.float32 [4] instead of torch.float32 [1, 4]"
    assert difference(torch.tensor(3), torch.tensor(4)) == "1 of 1 differ, first at (): 3 instead of 4"


@pytest.mark.parametrize("layout", calls.INPUT_LAYOUTS)
def test_operands_are_moved_as_they_lie(layout: str) -> None:
    for shape in ((3, 4, 5, 6), (0, 3), (2, 1, 7), ()):
        t = values(shape, 1, torch.bfloat16)
        t = calls.lay(t, layout) if shape else t
        copy = moved(t, torch.device("cpu"))
        assert difference(copy, t) is None
        assert copy.stride() == t.stride()
        assert (copy.storage_offset() == t.storage_offset()) or 0 in shape
        assert copy.data_ptr() != t.data_ptr() or 0 in shape
    assert moved(torch.ones(2, requires_grad=True), torch.device("cpu")).requires_grad


def test_storages_are_counted() -> None:
    x = torch.ones(4)
    with counting_storages() as count:
        x.mul_(2).view(2, 2)[0].add_(1)
        assert count() == 0
        _ = (x + 1, torch.empty(3))
        assert count() == 2


# ----------------------------------------------------------------------------------------------- fake CUDA, real device
class Fake(Target):
    """Fake CUDA tensors: shapes and devices are right, there are no numbers, streams or graphs."""

    is_gpu = False

    def __init__(self) -> None:
        super().__init__(CUDA)

    def counting(self) -> AbstractContextManager[Callable[[], int]]:
        return nullcontext(lambda: 0)  # fakes have no addresses, by which the loop finds its buffers again


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Comparisons of numbers are left out."""

    def same_kind(got: Tensor, want: Tensor, *_: object, **__: object) -> None:
        assert (got.dtype, got.shape) == (want.dtype, want.shape)
        assert got.device == want.device

    for module in (calls, checks_compile, checks_graphs, checks_ops, checks_runs):
        monkeypatch.setattr(module, "assert_same", same_kind)
    monkeypatch.setattr(torch.testing, "assert_close", same_kind)
    monkeypatch.setattr(checks_ops, "check_written", lambda *_: None)
    for plan in (*checks_runs.PLANS.values(), *checks_graphs.LOOPS):
        assert not plan.table.is_meta  # made here, so that no fake table stays in a plan
    return Fake()


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", [*REHEARSED, "empty batch"])
def test_every_operand_is_on_the_device(fake: Fake, name: str) -> None:
    """A check that leaves a tensor on the CPU, or takes one from there, would fail on a GPU only: here it fails."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        (COMPARISONS | OTHERS)[name](fake)


def test_the_rehearsal_notices_a_forgotten_move(fake: Fake) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="must be on the device of"):
        diffkern.ops.noising(fake.move(values((2, 3), 1)), calls.NOISING[:1], seeds=fake.move(calls.seeds_of(2)))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", checks_runs.PLANS)
def test_sampling_uploads_before_the_loop_and_never_waits(fake: Fake, name: str) -> None:
    """Seeds and times go to the device once; a row travels with its launch. A read back would raise at once."""
    del fake
    with FakeTensorMode(allow_non_fake_inputs=True):
        for option in checks_runs.options():
            if not checks_runs.allowed(checks_runs.PLANS[name], option):
                continue
            given = Target(CUDA).move(checks_runs.options()[option])
            given.pop("trajectory", None)
            before, during = checks_runs.sampling_traffic(checks_runs.PLANS[name], CUDA, **given)
            assert [what for what, _ in before] == ["upload", "upload"]
            assert during == []


def test_traffic_is_seen() -> None:
    with FakeTensorMode(allow_non_fake_inputs=True), Traffic() as traffic:
        x = torch.ones(3, device="cuda")
        host = torch.ones(3)
        assert traffic.events == []
        _ = (x + 1, x.clone(), host.clone(), x.double())
        assert traffic.events == []
        host.to("cuda")
        x.cpu()
        x.copy_(host)
        assert [what for what, _ in traffic.events] == ["upload", "download", "upload"]
        with pytest.raises(Exception, match="local_scalar_dense"):
            float(x.sum())
        assert traffic.events[-1][0] == "wait"


class FixedTable(schedules.DiscreteSchedule):
    """Nothing is computed from its numbers later, as fakes have none. Equal to no other, as what it caches is fake."""

    def __init__(self, steps: int) -> None:
        super().__init__(schedules.linear(steps).alphas_cumprod)
        self.rows = super().coefficients("v", torch.arange(steps))

    def coefficients(self, prediction: str, t: object) -> Tensor:
        return self.rows

    def __hash__(self) -> int:
        return id(self)


TIMES: dict[str, tuple[Callable[[], Any], str, Callable[[], Tensor]]] = {
    "discrete": (functools.partial(FixedTable, 37), "v", lambda: torch.randint(0, 37, (3,), device="cuda")),
    "flow": (schedules.flow, "velocity", lambda: torch.rand(3, dtype=torch.float64, device="cuda")),
    "edm": (schedules.edm, "edm", lambda: torch.rand(3, dtype=torch.float64, device="cuda")),
}


@pytest.mark.parametrize("kind", TIMES)
def test_training_with_times_on_the_device_sends_nothing(kind: str) -> None:
    make, prediction, times = TIMES[kind]
    schedule = make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert checks_runs.training_traffic(schedule, prediction, times(), CUDA) == []


# ------------------------------------------------------------------------------------------------------- pytest --gpu
def run_pytest(root: Path, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """From another folder, so that the package under test is the one that this process has."""
    package = str(Path(diffkern.__file__).parent.parent)
    environment = {**os.environ, "PYTEST_ADDOPTS": "", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": package}
    where = ["-c", str(root / "pyproject.toml"), "--rootdir", str(root), str(root / "tests" / "gpu")]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", *options, *where],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )


def test_gpu_option_fails_without_a_gpu(root: Path, tmp_path: Path) -> None:
    done = run_pytest(root, tmp_path, "--gpu")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stdout.strip() == "ERROR: --gpu was given, and torch sees no CUDA GPU"


def test_without_the_option_and_a_gpu_all_are_skipped(root: Path, tmp_path: Path) -> None:
    done = run_pytest(root, tmp_path)
    assert done.returncode == 0, done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert " skipped" in last
    assert "passed" not in last
    reasons = {line.rpartition(": ")[2] for line in done.stdout.splitlines() if line.startswith("SKIPPED")}
    assert reasons == {"needs a CUDA GPU"}
