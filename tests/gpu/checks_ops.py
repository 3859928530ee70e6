"""Checks of single ops: the bits of the CPU, outputs in place and in given memory, gradients, errors, torch.compile."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu.calls import (
    DTYPES,
    LOSS,
    NOISING,
    OUTPUT_LAYOUTS,
    OUTPUTS,
    STEPS,
    Call,
    compare,
    group_norm_calls,
    lay,
    linear_rows_calls,
    loss_calls,
    noise_sum_calls,
    noise_terms,
    noising_calls,
    randn_calls,
    seeds_of,
    statistics_calls,
    variational_calls,
)
from gpu.harness import HOST, Target, assert_same
from gpu.step_calls import learned_calls, logprob_calls, mixed_row_calls, step_call, step_calls, step_operands
from helpers.op_cases import ROWS, SHAPES, table, values
from torch import Tensor

import diffkern
from diffkern import _C, ops

POISON = 0xA5


# --------------------------------------------------------------------------------------------------------------- bits
def check_randn(target: Target, dtype: torch.dtype) -> None:
    for call in randn_calls(dtype):
        compare(target, call)


def check_noise_sum(target: Target, dtype: torch.dtype) -> None:
    for call in noise_sum_calls(dtype):
        compare(target, call)


def check_noising(target: Target, dtype: torch.dtype, layout: str) -> None:
    for call in noising_calls(dtype, layout):
        compare(target, call)


def check_loss(target: Target, dtype: torch.dtype, layout: str) -> None:
    for call in loss_calls(dtype, layout):
        compare(target, call)


def check_variational(target: Target, dtype: torch.dtype, layout: str) -> None:
    for call in variational_calls(dtype, layout):
        compare(target, call)


def check_statistics(target: Target, dtype: torch.dtype, layout: str) -> None:
    for call in statistics_calls(dtype, layout):
        compare(target, call)


def check_group_norm(target: Target, dtype: torch.dtype, layout: str) -> None:
    for call in group_norm_calls(dtype, layout):
        compare(target, call)


def check_linear_rows(target: Target, dtype: torch.dtype, layout: str) -> None:
    for call in linear_rows_calls(dtype, layout):
        compare(target, call)


def check_step(target: Target, dtype: torch.dtype, layout: str) -> None:
    for call in step_calls(dtype, layout):
        compare(target, call)


def check_learned_step(target: Target, dtype: torch.dtype, layout: str) -> None:
    for call in learned_calls(dtype, layout):
        compare(target, call)


def check_step_logprob(target: Target, dtype: torch.dtype, layout: str) -> None:
    for call in logprob_calls(dtype, layout):
        compare(target, call)


def check_mixed_rows(target: Target, dtype: torch.dtype) -> None:
    for call in mixed_row_calls(dtype):
        compare(target, call)


def check_far_elements(target: Target, count: int) -> None:
    """The last elements of one sample of `count`, past 2^31 on a GPU: any int32 in the index arithmetic shows."""
    seed, quads = -7, 300
    x = ops.randn([1, count], torch.tensor([seed], device=target.device), 5, dtype=torch.bfloat16)
    first = count // 4 - quads + 1
    expected = np.frombuffer(_C.normals(seed % 2**64, 5, first, quads), dtype=np.float32)[: count - 4 * first]
    assert_same(target.fetch(x[0, 4 * first :]), torch.from_numpy(expected.copy()).bfloat16(), f"end of {count}")


def guarded(target: Target, shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> tuple[Tensor, Tensor]:
    """(memory as bytes, a tensor in the middle of it), all of it poison."""
    strides = lay(torch.empty(shape), layout).stride()
    last = sum(max(n - 1, 0) * s for n, s in zip(shape, strides, strict=True))
    size = dtype.itemsize
    memory = torch.full(((last + 1 + 64) * size,), POISON, dtype=torch.uint8, device=target.device)
    return memory, memory.view(dtype).as_strided(shape, strides, 33 if layout == "misaligned" else 32)


def check_written(target: Target, memory: Tensor, view: Tensor, expected: Tensor, what: str) -> None:
    """The view holds what is expected, and no byte beside it was written."""
    assert_same(target.fetch(view), expected, what)
    flat = target.fetch(memory)
    flat.view(view.dtype).as_strided(view.shape, view.stride(), view.storage_offset()).view(_int_of(view)).fill_(0)
    left = (flat != POISON).sum().item() - view.numel() * view.element_size()
    assert left == 0, f"{what}: {left} bytes beside the output were written"


def _int_of(t: Tensor) -> torch.dtype:
    return {8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()]


def out_calls(dtype: torch.dtype, layout: str) -> list[Call]:
    """One call of each op that has an out variant, with all outputs, for every shape."""
    calls = []
    for shape in SHAPES:
        seeds = seeds_of(shape[0])
        want: dict[str, Any] = {"want_x0": True, "want_s": True, "next_copies": 2, "next_dtype": torch.float16}
        noising = {
            "x0": lay(values(shape, 1, dtype), layout),
            "table": NOISING[1:2].clone(),
            "index": None,
            "seeds": seeds,
        }
        outputs = {"stream": 3, "noise": None, "want_target": True, "want_eps": True}
        operands = {**step_operands(shape, dtype, dtype, layout), "mask": lay(values(shape, 30).gt(0), layout)}
        what, last = f"{dtype} {shape} {layout}", len(STEPS) - 1
        calls += [
            Call("randn", {"size": list(shape), "seeds": seeds, "stream": 3, "dtype": dtype}, what),
            Call(
                "noise_sum",
                {"size": list(shape), "seeds": seeds, **noise_terms(3), "dtype": dtype},
                what,
                ("streams", "weights"),
            ),
            Call("noising", {**noising, **outputs}, what),
            step_call(what, operands, ("table",), row=last, seeds=seeds, **want),
            step_call(what, operands, index=torch.full((shape[0],), last), seeds=seeds, **want),
        ]
    return calls


def check_out(target: Target, dtype: torch.dtype, layout: str) -> None:
    """The out variants write the same bits into memory of any layout, and nothing beside it."""
    for call in out_calls(dtype, layout):
        expected, arguments = call.run(HOST), call.on(target)
        for flag in ("want_target", "want_eps", "want_x0", "want_s", "next_copies", "next_dtype", "size", "dtype"):
            arguments.pop(flag, None)
        for out_layout in OUTPUT_LAYOUTS:
            shapes = {name: (tuple(t.shape), t.dtype) for name, t in expected.items()}
            made = {name: guarded(target, *shapes[name], out_layout) for name in OUTPUTS[call.op]}
            views = {name: view for name, (_, view) in made.items()}
            getattr(torch.ops.diffkern, f"{call.op}_out")(**arguments, **views)
            for name, (memory, view) in made.items():
                check_written(target, memory, view, expected[name], f"{call}: {name} in {out_layout} memory")


def check_in_place(target: Target, dtype: torch.dtype, layout: str) -> None:
    """Outputs over inputs."""
    for shape in ((3, 4, 9, 13), (2, 1025), (2, 17, 7, 11)):
        seeds, what = seeds_of(shape[0]), f"{dtype} {shape} {layout}, in place"
        operands = {**step_operands(shape, dtype, dtype, layout), "mask": lay(values(shape, 30).gt(0), layout)}
        call = step_call(what, operands, ("table",), row=len(STEPS) - 1, seeds=seeds, want_x0=True, want_s=True)
        want, there = call.run(HOST), call.on(target)
        inputs = {name: there[name] for name in call.arguments if not name.startswith(("want", "next"))}
        ops.step_out(**inputs, out=there["x"], x0=there["h2"], s=there["m"])
        for name, over in (("out", "x"), ("x0", "h2"), ("s", "m")):
            assert_same(target.fetch(there[over]), want[name], f"{what}: {name} over {over}")
        x0 = lay(values(shape, 1, dtype), layout)
        expected = ops.noising(x0, NOISING[:1].clone(), seeds=seeds)[0]
        place = target.move(x0)
        ops.noising_out(place, target.move(NOISING[:1]), seeds=target.move(seeds), out=place)
        assert_same(target.fetch(place), expected, f"{what}: noising over x0")


# ---------------------------------------------------------------------------------------------------------- gradients
def check_gradients(target: Target, dtype: torch.dtype) -> None:
    """Backward is elementwise torch, one rounding an operation: the bits of the CPU."""
    shape, batch = (3, 4, 9, 11), 3
    seeds, index, up = seeds_of(batch), torch.tensor([2, 0, 1]), [values(shape, k, dtype) for k in range(40, 44)]
    row = {name: value for name, value in ROWS["everything"].items() if not name.startswith("known")}
    leaves = {
        k: t.requires_grad_() for k, t in step_operands(shape, dtype, dtype, "contiguous").items() if k != "known"
    }
    noise = values(shape, 20, dtype).requires_grad_()

    def gradients(there: Target) -> dict[str, tuple[Tensor, ...]]:
        mine, eps, s, i, g = there.move((leaves, noise, seeds, index, up))
        steps, noising, loss = there.move((table(row), NOISING, LOSS))
        names = list(mine)
        outs: Any = ops.step(**mine, table=steps, seeds=s, want_x0=True, want_s=True, next_copies=1)
        mixed: Any = ops.noising(mine["x"], noising, i, noise=eps, want_target=True, want_eps=True)
        value = ops.loss(mine["m"], mine["x"], loss, i, noise=eps)
        return {
            f"step ({', '.join(names)})": torch.autograd.grad(outs, list(mine.values()), g),
            "noising (x0, noise)": torch.autograd.grad(mixed, [mine["x"], eps], g[:3]),
            "loss (pred, x0, noise)": torch.autograd.grad(value, [mine["m"], mine["x"], eps]),
        }

    want = gradients(HOST)
    for name, got in gradients(target).items():
        for a, b in zip(got, want[name], strict=True):
            assert_same(target.fetch(a), b, f"gradient of {name}, {dtype}")


# ------------------------------------------------------------------------------------------------------------- errors
def check_index_outside(target: Target) -> None:
    """An index outside its table: NaN for that sample alone on a GPU, an error on the CPU."""
    shape, seeds = (3, 5, 29), seeds_of(3)
    for dtype in DTYPES:
        x, m = values(shape, 1, dtype), values(shape, 2, dtype)
        rows = table(ROWS["eps"], ROWS["x0 clip noise"], ROWS["euler"])
        for bad in (-1, 3, 5, 2**40, -(2**63)):
            kinds = [torch.int64] if abs(bad) > 2**31 else [torch.int64, torch.int32]
            for good, wrong in ((torch.tensor([1, 0, 2], dtype=k), torch.tensor([1, bad, 2], dtype=k)) for k in kinds):
                want: dict[str, Any] = {"want_x0": True, "want_s": True, "next_copies": 1}
                more = {"seeds": seeds, "stream": 1, "noise": None}
                calls = [
                    Call("noising", {"x0": x, "table": NOISING[:3], **more, "want_target": True, "want_eps": True}, ""),
                    Call(
                        "loss", {"pred": m, "x0": x, "table": LOSS[:3], **more, "reduction": 0, "want_grad": True}, ""
                    ),
                    step_call("", {"x": x, "m": m}, table=rows, seeds=seeds, **want),
                ]
                for call in calls:
                    _nan_where_wrong(target, call, good, wrong)


def _nan_where_wrong(target: Target, call: Call, good: Tensor, wrong: Tensor) -> None:
    faulty = Call(call.op, {**call.arguments, "index": wrong}, f"index {wrong.tolist()}")
    expected = Call(call.op, {**call.arguments, "index": good}, "").run(HOST)
    if not target.is_gpu:
        with pytest.raises(RuntimeError, match=rf"index must be in \[0, 3\), .* got {int(wrong[1])} for sample 1"):
            faulty.run(target)
        return
    for name, got in faulty.run(target).items():
        there = target.fetch(got)
        assert there[1].isnan().all(), f"{faulty}: {name} is not NaN"
        for b in (0, 2):
            assert_same(there[b], expected[name][b], f"{faulty}: {name} of sample {b}")


def check_operand_missing(target: Target) -> None:
    """An operand that a device row reads and nobody gave: NaN on a GPU, an error on the CPU."""
    operands = {**step_operands((2, 70), torch.float32, torch.bfloat16, "contiguous"), "seeds": seeds_of(2)}
    operands["mask"] = values((2, 70), 30).gt(0)
    want: dict[str, Any] = {"want_x0": True, "want_s": True, "next_copies": 2}
    for missing in ("x", "m2", "h0", "h1", "h2", "h3", "known", "seeds"):
        call = step_call(f"without {missing}", {**operands, missing: None}, index=torch.tensor(len(STEPS) - 1), **want)
        if not target.is_gpu:
            wanted = "m" if missing == "m2" else missing
            with pytest.raises(RuntimeError, match=rf"diffkern\.step: {wanted} .*must .*the row "):
                call.run(target)
            continue
        for name, got in call.run(target).items():
            assert target.fetch(got).isnan().all(), f"{call}: {name}"


def check_empty_batch(target: Target) -> None:
    """torch's answers for nothing: the mean is NaN, the sum 0."""
    for shape in ((0, 7), (2, 0), (0,)):
        for reduction in range(3):
            pred, x0, seeds = torch.empty(shape), torch.empty(shape), seeds_of(shape[0])
            arguments = {"pred": pred, "x0": x0, "table": LOSS[:1].clone(), "index": None, "seeds": seeds, "stream": 0}
            more = {"noise": None, "reduction": reduction, "want_grad": True}
            compare(target, Call("loss", {**arguments, **more}, f"{shape}, reduction {reduction}"))


def check_devices_do_not_mix(target: Target, other: torch.device) -> None:
    """Every operand on another device is refused with its name; nothing is copied in silence."""
    x, m, seeds = target.move((values((2, 9), 1), values((2, 9), 2), seeds_of(2)))
    noising, loss, steps = target.move((NOISING, LOSS, table(ROWS["eps noise"])))
    common = {"x0": x, "index": target.move(torch.tensor([0, 1])), "seeds": seeds}
    calls: dict[str, tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]] = {
        "randn": (lambda **a: ops.randn([2, 9], **a), {"seeds": seeds, "out": x}, ("seeds",)),
        "noise_sum": (lambda **a: ops.noise_sum_out(**noise_terms(3), **a), {"seeds": seeds, "out": x}, ("seeds",)),
        "noising": (ops.noising, {**common, "table": noising}, ("table", "index", "seeds")),
        "loss": (ops.loss, {**common, "pred": m, "table": loss}, ("pred", "table", "index", "seeds")),
        "step": (ops.step, {"x": x, "m": m, "table": steps, "seeds": seeds}, ("m", "seeds")),
    }
    for op, (function, arguments, names) in calls.items():
        for name in names:
            mixed = {**arguments, name: arguments[name].to(other)}
            with pytest.raises(
                RuntimeError, match=rf"diffkern\.{op}: {name} must be on the device of \w+ \(.*\), got "
            ):
                function(**mixed)
    steps_index = target.move(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"diffkern\.step: index must be on the device of"):
        ops.step(x, m, table=steps, index=steps_index.to(other), seeds=seeds)
    for wrong in ({"x": x.to(other), "m": m}, {"x": x, "m": m, "table": steps.to("meta")}):
        with pytest.raises(RuntimeError, match=r"diffkern\.step: \w+ must be on "):
            ops.step(**{"table": steps, "seeds": seeds, **wrong})


CHECKED = """
import torch
from diffkern import ops
x = torch.zeros(3, 5, device={device!r})
tables = {{n: torch.ones(2, n, dtype=torch.float64, device=x.device) for n in (3, 4, 21)}}
tables[21][:, 19:] = 0
seeds = ops.seeds(0, 3, device=x.device)
index = torch.tensor([1, 7, 0], device=x.device)
for call in (
    lambda i: ops.noising(x, tables[4], i, seeds=seeds),
    lambda i: ops.noising_out(x, tables[4], i, seeds=seeds, out=torch.empty_like(x)),
    lambda i: ops.loss(x, x, tables[3], i, seeds=seeds),
    lambda i: ops.step(x, x, x, x, x, x, x, table=tables[21], index=i, seeds=seeds),
    lambda i: ops.step_out(x, x, x, x, x, x, x, table=tables[21], index=i, seeds=seeds, out=torch.empty_like(x)),
):
    call(index.clamp(max=1))
    try:
        call(index)
    except RuntimeError as error:
        print(error)
    else:
        print("no error")
"""


def check_checked_mode(target: Target) -> None:
    """DIFFKERN_CHECK=1 raises for an index outside the table where a GPU would give NaN."""
    package = str(Path(diffkern.__file__).parent.parent)
    environment = {**os.environ, "DIFFKERN_CHECK": "1", "PYTHONPATH": package}
    code = CHECKED.format(device=str(target.device))
    with tempfile.TemporaryDirectory() as folder:  # not the source tree, which may hold another build
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=folder, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    sentences = done.stdout.splitlines()
    assert len(sentences) == 5
    for op, sentence in zip(("noising", "noising", "loss", "step", "step"), sentences, strict=True):
        assert sentence.startswith(f"diffkern.{op}: index must be in [0, 2), the rows of the table, got 7"), sentence
