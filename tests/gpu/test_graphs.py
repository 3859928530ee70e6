"""CUDA graphs: captured once, replayed with another table, seed, index or operand, never captured again."""

from __future__ import annotations

import pytest
import torch
from gpu import checks_graphs as checks
from gpu.harness import Target, assert_same
from helpers.op_cases import ROWS, table, values

from diffkern import ops

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("per_sample", [False, True], ids=["one row", "a row a sample"])
def test_step(gpu: Target, per_sample: bool) -> None:
    checks.check_graph_of_step(gpu, per_sample)


@pytest.mark.parametrize("out", [False, True], ids=["memory of the graph", "given memory"])
def test_noising(gpu: Target, out: bool) -> None:
    checks.check_graph_of_noising(gpu, out)


def test_randn_and_loss(gpu: Target) -> None:
    checks.check_graph_of_randn_and_loss(gpu)


@pytest.mark.parametrize("whole", [False, True], ids=["step by step", "whole loop"])
def test_sampling_loop(gpu: Target, whole: bool) -> None:
    checks.check_graph_of_a_loop(gpu, whole)


def test_a_row_of_a_cpu_table_is_part_of_the_graph(gpu: Target) -> None:
    """It travels in the launch's arguments: fixed at capture, so a table that shall change lives on the device."""
    rows, (x, m) = table(ROWS["euler"]), gpu.move((values((2, 9), 1), values((2, 9), 2)))
    out = torch.empty_like(x)
    expected = ops.step(x, m, table=rows)[0]
    replay = gpu.record(lambda: ops.step_out(x, m, table=rows, out=out))
    rows.fill_(0.25)
    replay()
    assert_same(gpu.fetch(out), gpu.fetch(expected), "the row at capture")
