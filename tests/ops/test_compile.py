"""torch.compile, torch.export and meta tensors: one graph, no recompilation for another row, dynamic batches."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.attention_cases import FORMATS, qkv_of
from helpers.attention_cases import inputs as attention_inputs
from helpers.lazy import Lazy
from helpers.op_cases import ROWS, arrange, same_bits, table, values
from helpers.suites import few
from torch import Tensor

from diffkern import ops

dynamo = Lazy("torch._dynamo.utils")

NOISING = torch.tensor([[0.9, 0.43, 0.43, -0.9], [0.2, 0.98, 0.98, -0.2]], dtype=torch.float64)
LOSS = torch.cat([NOISING[:, 2:], torch.ones(2, 1, dtype=torch.float64)], 1)
PLAN = table(*({**ROWS["x0 clip noise"], "a": 0.5 + 0.01 * k, "stream": 2.0**41 + k} for k in range(20)))


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    dynamo.counters.clear()
    yield
    torch._dynamo.reset()


def everything(x0: Tensor, pred: Tensor, index: Tensor, seeds: Tensor, row: int) -> tuple[Tensor, ...]:
    """All four ops and the out variants in one graph, with torch ops between them."""
    x_t, target, eps = ops.noising(x0, NOISING, index, seeds=seeds, want_target=True, want_eps=True)
    assert target is not None
    assert eps is not None
    loss = ops.loss(pred * 1.5, x0, LOSS, index, seeds=seeds)
    x, clean, slope, following = ops.step(
        x_t, pred + target, table=PLAN, row=row, seeds=seeds, want_x0=True, want_s=True, next_copies=2
    )
    assert clean is not None
    assert slope is not None
    assert following is not None
    buffer = torch.zeros_like(x)
    ops.step_out(x, clean, table=PLAN, row=row, seeds=seeds, out=buffer)
    z = ops.randn(x0.shape, seeds, 3)
    ops.noising_out(buffer, NOISING, index, seeds=seeds, out=buffer)
    ops.randn(x0.shape, seeds, 4, out=z)
    return loss, x, clean, slope, following, buffer, z + eps


def inputs(batch: int) -> tuple[Tensor, ...]:
    shape = (batch, 3, 8, 9)
    return values(shape, 1), values(shape, 2), torch.arange(batch) % 2, ops.seeds(0, batch)


@pytest.mark.parametrize("backend", few(["aot_eager", "inductor"], "aot_eager"))
def test_one_graph_for_all_rows_and_batches(backend: str) -> None:
    compiled = torch.compile(everything, fullgraph=True, backend=backend, dynamic=None)
    with torch.no_grad():
        for row in (0, 1, 2, 3, 5, 8, 13, 19):
            for got, expected in zip(compiled(*inputs(4), row), everything(*inputs(4), row), strict=True):
                torch.testing.assert_close(got, expected)
        # Row 0 is specialised, row 1 makes the number symbolic, no later one compiles again.
        graphs = dynamo.counters["stats"]["unique_graphs"]
        assert graphs <= 2
        for row in range(20):
            compiled(*inputs(4), row)
        assert dynamo.counters["stats"]["unique_graphs"] == graphs
        for batch in (5, 6, 9):
            for got, expected in zip(compiled(*inputs(batch), 7), everything(*inputs(batch), 7), strict=True):
                torch.testing.assert_close(got, expected)
        assert dynamo.counters["stats"]["unique_graphs"] <= graphs + 1
        assert not dynamo.counters["graph_break"]


def test_gradients_through_a_compiled_graph() -> None:
    def train(x0: Tensor, weight: Tensor, index: Tensor, seeds: Tensor) -> Tensor:
        x_t = ops.noising(x0, NOISING, index, seeds=seeds)[0]
        return ops.loss(x_t * weight, x0, LOSS, index, seeds=seeds)

    def sample(x0: Tensor, weight: Tensor, index: Tensor, seeds: Tensor) -> Tensor:
        return ops.step(x0, x0 * weight, table=PLAN, row=2, seeds=seeds)[0].square().mean()

    x0, _, index, seeds = inputs(4)
    for function in (train, sample):
        weight = torch.full((3, 8, 9), 0.3, requires_grad=True)
        (expected,) = torch.autograd.grad(function(x0, weight, index, seeds), weight)
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        (got,) = torch.autograd.grad(compiled(x0, weight, index, seeds), weight)
        torch.testing.assert_close(got, expected)


def test_compiled_out_keeps_the_bits() -> None:
    x, m, _, seeds = inputs(2)

    def step(x: Tensor, m: Tensor, out: Tensor, row: int) -> Tensor:
        return ops.step_out(x, m, table=PLAN, row=row, seeds=seeds, out=out)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for row in range(4):
            a, b = torch.zeros_like(x), torch.zeros_like(x)
            step(x, m, a, row)
            compiled(x, m, b, row)
            assert same_bits(a, b)


def test_export() -> None:
    class Sampler(torch.nn.Module):
        def forward(self, x: Tensor, m: Tensor, index: Tensor, seeds: Tensor) -> Tensor:
            x_t = ops.noising(x, NOISING, index, seeds=seeds)[0]
            loss = ops.loss(m, x, LOSS, index, seeds=seeds)
            return ops.step(x_t, m, table=PLAN, row=3, seeds=seeds)[0] + loss + ops.randn(x.shape, seeds)

    batch = torch.export.Dim("batch", min=2, max=64)
    shapes = ({0: batch}, {0: batch}, {0: batch}, {0: batch})
    with torch.no_grad():
        program = torch.export.export(Sampler(), inputs(4), dynamic_shapes=shapes)
        for n in (4, 7):
            torch.testing.assert_close(program.module()(*inputs(n)), Sampler()(*inputs(n)))
    names = {str(node.target) for node in program.graph.nodes}
    assert {f"diffkern.{op}.default" for op in ("noising", "loss", "randn")} <= names


def test_meta_tensors_have_shapes_only() -> None:
    x, m, index, seeds = (t.to("meta") for t in inputs(4))
    x_t, target, _ = ops.noising(x, NOISING.to("meta"), index, seeds=seeds, want_target=True)
    assert x_t.is_meta
    assert target is not None
    out, x0, _, following = ops.step(x, m.half(), table=PLAN, row=1, seeds=seeds, want_x0=True, next_copies=2)
    assert out.shape == x.shape
    assert x0 is not None
    assert following is not None
    assert (following.shape, following.dtype) == ((8, 3, 8, 9), torch.float16)
    assert ops.loss(m, x, LOSS.to("meta"), index, seeds=seeds).shape == ()
    assert ops.randn((4, 2), seeds).is_meta


# ----------------------------------------------------------------------------------------------------------- attention
def attend(qkv: Tensor, text: Tensor) -> Tensor:
    """Self- and cross-attention of an image in one graph, with torch ops around them."""
    image = ops.spatial_attention(qkv * 1.5, 2)
    q = image.flatten(2).unflatten(1, (2, -1)).transpose(-1, -2)
    k, v = text.unflatten(-1, (2, 2, -1)).permute(2, 0, 3, 1, 4)
    return ops.attention(q, k, v).transpose(-1, -2).reshape(image.shape) + image


@pytest.mark.parametrize("form", few(FORMATS, "channels_last"))
@pytest.mark.parametrize("backend", few(["aot_eager", "inductor"], "aot_eager"))
def test_attention_in_one_graph_for_all_sizes(backend: str, form: str) -> None:
    """No graph a batch or size: the second size makes them symbolic, no later one compiles again; gradients too."""
    compiled = torch.compile(attend, fullgraph=True, backend=backend)
    graphs = []
    for batch, side, tokens in ((2, 4, 7), (3, 5, 9), (4, 6, 11), (5, 9, 20), (2, 8, 77)):
        given = [qkv_of((batch, 96, side, side + 1), form=form), values((batch, tokens, 64), 3)]
        results = []
        for function in (compiled, attend):
            leaves = [t.clone().requires_grad_() for t in given]
            out = function(*leaves)
            results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        graphs.append(dynamo.counters["stats"]["unique_graphs"])
    assert graphs[1] <= 2
    assert graphs[-1] == graphs[1], graphs
    assert not dynamo.counters["graph_break"]


@pytest.mark.parametrize("form", few(["contiguous", "channels_last"], "channels_last"))
def test_group_norm_in_one_graph_for_all_sizes(form: str) -> None:
    def function(x: Tensor, scale: Tensor, add: Tensor) -> Tensor:
        return ops.group_norm_act(2 * x, 2, scale=scale, shift=scale, add=add) + x

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    graphs = []
    for batch, side in ((2, 4), (3, 5), (4, 6), (2, 8)):
        given = [arrange(values((batch, 8, side, side + 1), 1), form), *(values((batch, 8), k) for k in (2, 3))]
        results = []
        for f in (compiled, function):
            leaves = [t.clone().requires_grad_() for t in given]
            out = f(*leaves)
            assert out.stride() == given[0].stride()
            results.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
        assert all(same_bits(got, expected) for got, expected in zip(*results, strict=True))
        graphs.append(dynamo.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[1] <= 2, graphs


@pytest.mark.full
def test_compiled_attention_keeps_the_bits() -> None:
    q, k, v = attention_inputs((2, 3, 33, 21, 16), layouts=("bhdn", "bnhd", "bhnd"))
    compiled = torch.compile(ops.attention, fullgraph=True, backend="inductor")
    with torch.no_grad():
        out = compiled(q, k, v)
        assert same_bits(out, ops.attention(q, k, v))
        assert out.stride() == ops.attention(q, k, v).stride()


def test_attention_under_autocast_in_a_graph() -> None:
    qkv = qkv_of((2, 96, 4, 5))
    compiled = torch.compile(ops.spatial_attention, fullgraph=True, backend="aot_eager")
    assert compiled(qkv, 2).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        out = compiled(qkv, 2)
        assert out.dtype == torch.bfloat16
        assert same_bits(out, ops.spatial_attention(qkv, 2))


def test_export_of_attention() -> None:
    class Network(torch.nn.Module):
        def forward(self, qkv: Tensor, text: Tensor) -> Tensor:
            return attend(qkv, text)

    def given(batch: int, side: int, tokens: int) -> tuple[Tensor, Tensor]:
        return qkv_of((batch, 96, side, side)), values((batch, tokens, 64), 3)

    batch, side, tokens = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "side", "tokens"))
    shapes = ({0: batch, 2: side, 3: side}, {0: batch, 1: tokens})
    program = torch.export.export(Network(), given(3, 4, 7), dynamic_shapes=shapes)
    for sizes in ((3, 4, 7), (2, 9, 30)):
        torch.testing.assert_close(program.module()(*given(*sizes)), attend(*given(*sizes)))
    names = {str(node.target) for node in program.graph.nodes}
    assert {"diffkern.attention.default", "diffkern.spatial_attention.default"} <= names


def test_meta_attention() -> None:
    q, k, v = (t.to("meta") for t in attention_inputs((2, 3, 9, 7, 16), layouts=("bhdn", "bhnd", "bhnd")))
    out = ops.attention(q, k, v)
    assert out.is_meta
    assert out.transpose(2, 3).is_contiguous()
    assert ops.spatial_attention(qkv_of((2, 96, 4, 5), torch.bfloat16).to("meta"), 2).shape == (2, 32, 4, 5)
