"""No op allocates more than its outputs, and the loss a partial sum a block beside them."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.memory import SLACK, allocated, size
from helpers.op_cases import EVERYTHING, LAYOUTS, ROWS, arrange, same_bits, table, values

from diffkern import _C, ops

SHAPE = (4, 3, 64, 65)
COUNT = math.prod(SHAPE)
BLOCK = _C.layout()["ordered_sum"]["block"]
SEEDS = ops.seeds(0, 4)
LEARNED = torch.tensor(
    [
        [
            {"a": 0.6, "q": -0.7, "b": 0.4, "clip": 1.5, "g": 1.0, "r1": 0.3}.get(name, 0.0)
            for name in ops.LEARNED_COLUMNS
        ]
    ],
    dtype=torch.float64,
)
NOISING = torch.tensor([[0.9, 0.43, 0.43, -0.9]], dtype=torch.float64)
LOSS = torch.tensor([[0.43, -0.9, 1.0]], dtype=torch.float64)


def test_the_measure_works() -> None:
    used, _ = allocated(lambda: torch.ones(1000, 1000) + 1.0)
    assert used >= 2 * 4_000_000


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_outputs_only(layout: str, dtype: torch.dtype) -> None:
    x, m, m2 = (values(SHAPE, k, dtype, layout) for k in range(3))
    both = values((SHAPE[0], 2 * SHAPE[1], *SHAPE[2:]), 4, dtype, layout)
    calls: dict[str, Callable[[], object]] = {
        "randn": lambda: ops.randn(SHAPE, SEEDS, dtype=dtype),
        "noising": lambda: ops.noising(x, NOISING, seeds=SEEDS),
        "noising 3": lambda: ops.noising(x, NOISING, seeds=SEEDS, want_target=True, want_eps=True),
        "step": lambda: ops.step(x, m, table=table(ROWS["eps"])),
        "learned step": lambda: ops.learned_step(*(x, both), table=LEARNED, seeds=SEEDS, want_x0=True, next_copies=2),
        "step all": lambda: ops.step(
            *(x, m, m2, x, x, m, m),
            **{
                "table": TABLE,
                "seeds": SEEDS,
                "mask": x,
                "known": m,
                "want_x0": True,
                "want_s": True,
                "next_copies": 2,
            },
        ),
    }
    for name, call in calls.items():
        used, result = allocated(call)
        assert size(result) <= used <= size(result) + SLACK, name


TABLE = table(EVERYTHING)
EPS = table(ROWS["eps noise"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_variants_allocate_nothing(layout: str) -> None:
    x, m = values(SHAPE, 1, layout=layout), values(SHAPE, 2, torch.bfloat16, layout)
    both = values((SHAPE[0], 2 * SHAPE[1], *SHAPE[2:]), 3, layout=layout)
    outs = [arrange(torch.zeros(SHAPE), "contiguous" if layout == "expanded" else layout).clone() for _ in range(4)]
    calls: dict[str, Callable[[], object]] = {
        "randn": lambda: ops.randn(SHAPE, SEEDS, out=outs[0]),
        "noising": lambda: ops.noising_out(x, NOISING, seeds=SEEDS, out=outs[0], target=outs[1], eps=outs[2]),
        "learned step": lambda: ops.learned_step_out(
            x, both, table=LEARNED, seeds=SEEDS, out=outs[0], x0=outs[1], next=outs[3]
        ),
        "step": lambda: ops.step_out(x, m, table=EPS, seeds=SEEDS, out=outs[0], x0=outs[1], s=outs[2], next=outs[3]),
    }
    for name, call in calls.items():
        assert allocated(call)[0] <= SLACK, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 1023), (2, 1025), (1, 64), (2, 3, 5, 7), (1, 1087)], ids=str)
def test_nothing_is_written_outside(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Outputs at odd places of a larger buffer: what lies before, between and behind them stays as it was."""
    count, batch = math.prod(shape), shape[0]
    x, m, seeds = values(shape, 1, dtype), values(shape, 2, dtype), ops.seeds(0, batch)
    both = torch.cat([m, m], 1)
    for gap in (1, 5, 64):
        for layout in ("contiguous", "channels_last"):
            if layout == "channels_last" and len(shape) != 4:
                continue
            buffer = torch.full((4 * (count + gap) + gap,), -7.0, dtype=dtype)
            starts = [gap + k * (count + gap) for k in range(4)]
            strides = arrange(torch.empty(shape), layout).stride()
            outs = [buffer.as_strided(shape, strides, start) for start in starts]
            kept = torch.ones_like(buffer, dtype=torch.bool)
            for start in starts:
                kept[start : start + count] = False
            ops.randn(shape, seeds, out=outs[0])
            ops.noising_out(x, NOISING, seeds=seeds, out=outs[0], target=outs[1], eps=outs[2])
            ops.learned_step_out(x, both, table=LEARNED, seeds=seeds, out=outs[0], x0=outs[1], next=outs[3])
            ops.step_out(x, m, table=EPS, seeds=seeds, out=outs[0], x0=outs[1], s=outs[2], next=outs[3])
            assert bool((buffer[kept] == -7.0).all())
            assert same_bits(outs[0], ops.step(x, m, table=EPS, seeds=seeds)[0])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
def test_loss_needs_a_number_a_block(layout: str, gradient: bool) -> None:
    pred, x0 = values(SHAPE, 1, layout=layout).requires_grad_(gradient), values(SHAPE, 2, layout=layout)
    used, _ = allocated(lambda: ops.loss(pred, x0, LOSS, seeds=SEEDS))
    blocks = SHAPE[0] * math.ceil(COUNT / SHAPE[0] / BLOCK)
    assert used <= 4 * blocks + SLACK + (4 * COUNT if gradient else 0)


@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
def test_the_bound_needs_two_numbers_a_block(gradient: bool) -> None:
    """Inputs and outputs only: no x_t, no target, no means, no variance."""
    x0 = values(SHAPE, 2)
    pred = values((SHAPE[0], 2 * SHAPE[1], *SHAPE[2:]), 1).requires_grad_(gradient)
    rows = torch.tensor([[0.1, 0.9, -0.5, 1.2, 2.0, 0.3, 0.3, 0.0, 0.004, 1.0, 0.1, 1.0]], dtype=torch.float64)
    used, _ = allocated(lambda: ops.variational(pred, x0, rows, seeds=SEEDS))
    blocks = SHAPE[0] * math.ceil(COUNT / SHAPE[0] / BLOCK)
    assert used <= 8 * blocks + SLACK + (8 * COUNT if gradient else 0)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("gradient", [False, True], ids=["value", "gradient"])
def test_the_log_density_needs_a_number_a_block(gradient: bool, learned: bool) -> None:
    """Inputs and outputs only: no mean, no standard deviations."""
    after, x, copies = values(SHAPE, 2), values(SHAPE, 3), 2 if learned else 1
    m = values((SHAPE[0], copies * SHAPE[1], *SHAPE[2:]), 1).requires_grad_(gradient)
    rows = torch.cat([EPS, torch.tensor([[-0.4, 0.3]], dtype=torch.float64)], 1) if learned else EPS
    used, _ = allocated(lambda: ops.step_logprob(after, x, m, table=rows))
    blocks = SHAPE[0] * math.ceil(COUNT / SHAPE[0] / BLOCK)
    assert used <= 4 * blocks + SLACK + (4 * copies * COUNT if gradient else 0)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_need_little(layout: str) -> None:
    """No copy and no sort: counters only, 16 KiB for every 65536 elements of a sample that has more than that."""
    x, large = values(SHAPE, 1, layout=layout), values((2, 3, 256, 257), 1, layout=layout)
    out = torch.zeros(SHAPE)
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "quantile": (lambda: ops.quantile(x, 0.5), 0),
        "threshold": (lambda: ops.dynamic_threshold(x), x.numel() * 4),
        "threshold out": (lambda: ops.dynamic_threshold_out(x, out=out), 0),
        "moments": (lambda: ops.moments(x), 0),
        "quantile of many": (lambda: ops.quantile(large, 0.5), 2 * 4 * 16384),
    }
    for name, (call, most) in calls.items():
        assert allocated(call)[0] <= most + SLACK, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_group_norm_needs_some_numbers_a_channel(layout: str, dtype: torch.dtype) -> None:
    """y, and the gradient of x: no normalised tensor, none of float32. A block leaves 2 numbers a channel."""
    shape, wide = (2, 24, 33, 32), 8 if dtype == torch.float64 else 4
    x, up = (arrange(values(shape, k, dtype), layout).requires_grad_(k == 1) for k in (1, 2))
    scale = values(shape[:2], 3, dtype).requires_grad_()
    blocks, per_sample = math.ceil(33 * 32 / (64 if layout == "channels_last" else 1024)), 2 * 24
    work = per_sample * (2 * blocks * wide + 5 * wide + 5 * 8)
    used, y = allocated(lambda: ops.group_norm_act(x, 4, scale=scale))
    assert used <= size(y) + work + SLACK
    assert isinstance(y, torch.Tensor)
    used, grads = allocated(lambda: torch.autograd.grad(y, (x, scale), up, retain_graph=True))
    assert used <= size(grads) + work + SLACK


def test_loss_backward_allocates_nothing_for_a_plain_loss() -> None:
    """`loss.backward()` hands out the gradient that the forward pass made."""
    pred = values(SHAPE, 1).requires_grad_()
    loss = ops.loss(pred, values(SHAPE, 2), LOSS, seeds=SEEDS)
    used, _ = allocated(lambda: torch.autograd.grad(loss, pred, retain_graph=True))
    assert used <= SLACK


def test_backward_of_a_sum_of_log_densities_allocates_nothing() -> None:
    m = values(SHAPE, 1).requires_grad_()
    total = ops.step_logprob(values(SHAPE, 2), values(SHAPE, 3), m, table=EPS).sum()
    used, _ = allocated(lambda: torch.autograd.grad(total, m, retain_graph=True))
    assert used <= SLACK
