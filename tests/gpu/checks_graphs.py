"""Checks of CUDA graphs: single ops and whole loops, recorded once and replayed with other contents."""

from __future__ import annotations

import math
from typing import Any

import torch
from gpu.calls import LOSS, NOISING, seeds_of
from gpu.harness import Target, assert_same
from gpu.models import COSINE, LINEAR, SHAPE, ExactModel
from helpers.op_cases import ROWS, table, values
from torch import Tensor

from diffkern import ops, samplers
from diffkern.sampling import initial, sample

# Two plans of one length for one captured loop.
LOOPS = (samplers.ddim(LINEAR, 8, eta=0.5, clip=1.0), samplers.ddim(COSINE, 8, eta=1.0, clip=0.5))


# ------------------------------------------------------------------------------------------------------------- graphs
def check_graph_of_step(target: Target, per_sample: bool) -> None:
    """Replay sees a changed table, index, seed and operand; nothing else is in the graph."""
    shape = (3, 5, 301)
    rows = table(ROWS["eps noise"], ROWS["x0 clip noise"], ROWS["euler noise"])
    index = torch.tensor([0, 1, 2]) if per_sample else torch.tensor(0)
    host: dict[str, Any] = {"x": values(shape, 1), "m": values(shape, 2).bfloat16()}
    host |= {"table": rows, "index": index, "seeds": seeds_of(3)}
    there = target.move(host)
    outs: dict[str, Any] = {n: torch.empty(shape, device=target.device) for n in ("out", "x0", "s")}
    outs["next"] = torch.empty((6, *shape[1:]), dtype=torch.bfloat16, device=target.device)
    replay = target.record(lambda: ops.step_out(**there, **outs))

    def expect(what: str) -> None:
        for tensor in outs.values():
            tensor.fill_(math.nan)
        replay()
        want = ops.step(**host, want_x0=True, want_s=True, next_copies=2)
        for (name, tensor), expected in zip(outs.items(), want, strict=True):
            assert expected is not None
            assert_same(target.fetch(tensor), expected, f"{name} after {what}")

    def change(name: str, value: Tensor) -> None:
        host[name] = value
        there[name].copy_(value)
        expect(f"a changed {name}")

    expect("capture")
    change("index", torch.tensor([2, 2, 0]) if per_sample else torch.tensor(2))
    change("seeds", seeds_of(3).flip(0) + 5)
    change("table", torch.where(torch.arange(rows.shape[1]) < 18, 0.5, 1.0) * rows)  # not the streams
    change("x", values(shape, 7))
    change("m", values(shape, 8).bfloat16())
    rows = host["table"].clone()
    rows[:, 19] = 2.0**41 + 77  # the stream is a column
    change("table", rows)


def check_graph_of_noising(target: Target, out: bool) -> None:
    """As for the step, with outputs in given memory or in the graph's own."""
    shape = (3, 5, 301)
    host: dict[str, Any] = {"x0": values(shape, 1), "table": NOISING, "index": torch.tensor([0, 1, 2])}
    host["seeds"] = seeds_of(3)
    there = target.move(host)
    found: dict[str, Any] = {name: torch.empty(shape, device=target.device) for name in ("out", "target", "eps")}

    def run() -> None:
        if out:
            ops.noising_out(**there, **found)
        else:
            results = ops.noising(**there, want_target=True, want_eps=True)
            found.update({name: t for name, t in zip(found, results, strict=True) if t is not None})

    replay = target.record(run)
    changes = {"index": torch.tensor([4, 0, 3]), "seeds": seeds_of(3).flip(0) + 5, "table": NOISING.flip(0)}
    for name, value in {"x0": host["x0"], **changes}.items():
        host[name] = value
        there[name].copy_(value)
        replay()
        want = ops.noising(**host, want_target=True, want_eps=True)
        for got, expected in zip(found.values(), want, strict=True):
            assert expected is not None
            assert_same(target.fetch(got), expected, f"noising after a changed {name}")


def check_graph_of_randn_and_loss(target: Target) -> None:
    """A changed seed in both, a changed prediction in the loss, whose workspace is in the graph's memory."""
    shape = (3, 5, 301)
    host = {"pred": values(shape, 2), "x0": values(shape, 1), "index": torch.tensor([0, 1, 2]), "seeds": seeds_of(3)}
    there, rows = target.move(host), target.move(LOSS)
    noise = torch.empty(shape, dtype=torch.bfloat16, device=target.device)
    found: dict[str, Tensor] = {}

    def run() -> None:
        ops.randn(shape, there["seeds"], 12, out=noise)
        found["made"] = ops.randn(shape, there["seeds"], 12, dtype=torch.float64)
        found["value"], grad = torch.ops.diffkern.loss(
            there["pred"], there["x0"], rows, there["index"], there["seeds"], 4, None, 1, True
        )
        assert grad is not None
        found["grad"] = grad

    replay = target.record(run)
    changes = {"seeds": seeds_of(3).flip(0) + 5, "pred": values(shape, 9), "index": torch.tensor([2, 2, 4])}
    for name, value in {"x0": host["x0"], **changes}.items():
        host[name] = value
        there[name].copy_(value)
        replay()
        operands = (host["pred"], host["x0"], LOSS, host["index"], host["seeds"], 4, None, 1, True)
        want = dict(zip(("value", "grad"), torch.ops.diffkern.loss(*operands), strict=True))
        want["made"] = ops.randn(shape, host["seeds"], 12, dtype=torch.float64)
        for key, expected in want.items():
            assert_same(target.fetch(found[key]), expected, f"{key} after a changed {name}")
        assert_same(target.fetch(noise), want["made"].bfloat16(), f"randn into memory after a changed {name}")


def check_graph_of_a_loop(target: Target, whole: bool) -> None:
    """DDIM with noise; the row index is in device memory and advances inside the graph of one step or of the loop.

    The second run has other seeds and another start, the third another plan of the same length.
    """
    steps, model = len(LOOPS[0].rows), ExactModel()
    rows = target.move(LOOPS[0].table)
    times = torch.zeros(steps, dtype=torch.int64, device=target.device)
    x = torch.zeros(SHAPE, device=target.device)
    seeds = torch.zeros(SHAPE[0], dtype=torch.int64, device=target.device)
    index = torch.zeros([], dtype=torch.int64, device=target.device)

    def one() -> None:
        t = times.index_select(0, index.view(1)).expand(SHAPE[0])
        ops.step_out(x, model(x, t), table=rows, index=index, seeds=seeds, out=x)
        index.add_(1)

    def everything() -> None:
        index.zero_()
        for _ in range(steps):
            one()

    replay = target.record(everything if whole else one)
    for plan, s in ((LOOPS[0], 1), (LOOPS[0], 2), (LOOPS[1], 3)):
        job = ops.seeds(s, SHAPE[0])
        start = initial(plan, SHAPE, job)
        x.copy_(start)
        seeds.copy_(job)
        rows.copy_(plan.table)
        times.copy_(torch.tensor([int(row.time) for row in plan.rows]))
        index.zero_()
        for _ in range(1 if whole else steps):
            replay()
        assert_same(target.fetch(x), sample(ExactModel(), start, plan, seeds=job), f"{plan.name} with seeds {s}")
        assert_same(target.fetch(index), torch.tensor(steps), "rows that the graph went through")
