"""torch.compile of functions that call torch.func.grad and vmap over the ops: eager's values, or one sentence."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers.op_cases import table, values
from torch import Tensor

import diffkern
from diffkern import ops

STEPS = table({"a": 0.9, "d": 0.3})
VP = diffkern.vp()
SEEDS, TIMES = ops.seeds(0, 4), torch.tensor([0.2, 0.4, 0.6, 0.8])
IMAGE, HEADS = values((4, 3, 5), 1), values((4, 2, 5, 8), 2)
CALLS: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
    "noised": (lambda x, t, s: diffkern.noised(x, t, VP, seeds=s).sin().sum(), (IMAGE, TIMES, SEEDS)),
    "loss": (
        lambda x, t, s: diffkern.prediction_loss(x, 0.5 * x.detach(), t, VP, "v", seeds=s),
        (IMAGE, TIMES, SEEDS),
    ),
    "step": (lambda x, m: ops.step(x, m, table=STEPS, row=0)[0].sin().sum(), (IMAGE, 0.3 * IMAGE)),
    "group_norm_act": (lambda x, s: ops.group_norm_act(x, 1, scale=s).sin().sum(), (IMAGE, IMAGE[:, :, 0])),
    "attention": (lambda q, k: ops.attention(q, k, k).sin().sum(), (HEADS, 0.5 * HEADS)),
}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.full
@pytest.mark.parametrize("each_sample", [False, True])
@pytest.mark.parametrize("name", CALLS)
def test_eager_values_with_a_break_and_the_way_out_without(name: str, each_sample: bool) -> None:
    function, tensors = CALLS[name]
    slope = torch.func.grad(function)
    if each_sample:
        slope = torch.vmap(torch.func.grad(lambda *one: function(*(t[None] for t in one))))
    call = lambda *args: slope(*args)  # noqa: E731
    torch.testing.assert_close(torch.compile(call, backend="aot_eager")(*tensors), call(*tensors))
    torch._dynamo.reset()
    with pytest.raises(
        Exception, match=r"not for torch\.compile: compile the network .*, or take gradients by autograd"
    ):
        torch.compile(call, backend="aot_eager", fullgraph=True)(*tensors)


@pytest.mark.full
@pytest.mark.parametrize("name", CALLS)
def test_the_way_out_is_one(name: str) -> None:
    """Autograd around what is compiled."""
    function, tensors = CALLS[name]
    leaf = tensors[0].clone().requires_grad_()
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    (found,) = torch.autograd.grad(compiled(leaf, *tensors[1:]), leaf)
    torch.testing.assert_close(found, torch.func.grad(function)(*tensors))
