"""conv3x3 under autograd, torch.func, vmap, autocast, torch.compile and torch.export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.op_cases import same_bits, values
from torch import Tensor

from diffkern import ops, reference

FORMS: dict[str, dict[str, Any]] = {"exact": {}, "fast": {"precision": "fast"}, "upsampled": {"upsample": True}}
forms = pytest.mark.parametrize("form", FORMS)


def operands() -> list[Tensor]:
    """Leaves: 2 images of 5 x 7 with 6 channels, 7 outputs."""
    shapes = (2, 6, 5, 7), (7, 6, 3, 3), (1, 7)
    x, weight, bias = (values(shape, k) / (1, 7, 1)[k] for k, shape in enumerate(shapes))
    return [t.requires_grad_() for t in (x, weight, bias[0].clone())]


def exactly(form: str) -> Callable[..., Tensor]:
    return lambda *t: reference.conv3x3(*t, upsample=form == "upsampled")


def close(found: Tensor, exact: Tensor, form: str = "exact", slack: float = 1.0) -> None:
    tolerance = slack * (5e-5 if form == "fast" else 2e-6)
    torch.testing.assert_close(
        found.double(), exact.double(), rtol=tolerance, atol=tolerance * float(exact.abs().max())
    )


@forms
def test_gradients_are_those_of_the_reference(form: str) -> None:
    given = operands()
    y = ops.conv3x3(*given, **FORMS[form])
    up = values(tuple(y.shape), 9)
    found = torch.autograd.grad(y, given, up)
    wide = [t.detach().double().requires_grad_() for t in given]
    exact = torch.autograd.grad(exactly(form)(*wide), wide, up.double())
    for f, e, t in zip(found, exact, given, strict=True):
        assert f.dtype == t.dtype
        close(f, e, form)
    with torch.no_grad():
        packed = ops.pack_conv3x3(given[1], **FORMS[form])
    again = torch.autograd.grad(ops.conv3x3(*given, packed=packed, **FORMS[form]), given, up)
    assert all(same_bits(a, f) for a, f in zip(again, found, strict=True))


@forms
def test_the_gradient_of_part_of_the_operands(form: str) -> None:
    given = operands()
    whole = torch.autograd.grad(ops.conv3x3(*given, **FORMS[form]).sin().sum(), given)
    for k in range(3):
        some = [t if j == k else t.detach() for j, t in enumerate(given)]
        close(torch.autograd.grad(ops.conv3x3(*some, **FORMS[form]).sin().sum(), some[k])[0], whole[k])
    x, weight, _ = given
    y = ops.conv3x3(x, weight, None, **FORMS[form])
    assert [t.shape for t in torch.autograd.grad(y.sum(), (x, weight))] == [x.shape, weight.shape]
    with torch.no_grad():
        assert not ops.conv3x3(*given, **FORMS[form]).requires_grad


@forms
def test_second_derivatives(form: str) -> None:
    """By autograd, and by torch.func of both x and weight."""

    def slope(function: Callable[..., Tensor], given: list[Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(*given).sin().sum(), given, create_graph=True)
        return torch.autograd.grad(sum(g.sin().sum() for g in first), given)

    ours = lambda *t: ops.conv3x3(*t, **FORMS[form])  # noqa: E731
    given = operands()
    exact = slope(exactly(form), [t.detach().double().requires_grad_() for t in given])
    for f, e in zip(slope(ours, given), exact, strict=True):
        close(f, e, form, 10)
    first = torch.func.grad(lambda *t: ours(*t).sin().sum(), (0, 1, 2))
    again = torch.func.grad(lambda *t: sum(g.sin().sum() for g in first(*t)), (0, 1, 2))
    for f, e in zip(again(*(t.detach() for t in given)), exact, strict=True):
        close(f, e, form, 10)


@forms
@pytest.mark.parametrize("shape", [(0, 3, 4, 5, 6), (2, 0, 4, 5, 6), (2, 3, 0, 5, 6), (2, 3, 4, 0, 6)], ids=str)
def test_gradients_of_nothing_are_zero(form: str, shape: tuple[int, ...]) -> None:
    batch, inputs, outputs, height, width = shape
    given = [torch.ones(batch, inputs, height, width), torch.ones(outputs, inputs, 3, 3), torch.ones(outputs)]
    y = ops.conv3x3(*(t.requires_grad_() for t in given), **FORMS[form])
    x, weight, bias = torch.autograd.grad(y.sum(), given)
    assert (x.shape, weight.shape) == (given[0].shape, given[1].shape)
    assert not x.any()
    assert not weight.any()
    assert bias.tolist() == [batch * y.shape[2] * y.shape[3]] * outputs


def test_autocast_does_not_touch_it() -> None:
    given = operands()
    want = ops.conv3x3(*given)
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.conv3x3(*given)
        found = torch.autograd.grad(got.sum(), given)
    assert same_bits(got, want)
    assert all(same_bits(f, w) for f, w in zip(found, torch.autograd.grad(want.sum(), given), strict=True))


@forms
def test_vmap_of_packed_weights(form: str) -> None:
    """A weight and its packed form in each call, wherever the batch stands; and weights packed there."""
    x, weight, bias = (t.detach() for t in operands())
    weights = torch.stack([weight, weight.flip(2), 2 * weight])
    pack = lambda w: ops.pack_conv3x3(w, **FORMS[form])  # noqa: E731
    packed = torch.stack([pack(w) for w in weights])
    assert same_bits(torch.vmap(pack)(weights), packed)
    run = lambda w, p, x=x: ops.conv3x3(x, w, bias, packed=p, **FORMS[form])  # noqa: E731
    want = torch.stack([run(w, None) for w in weights])
    assert same_bits(torch.vmap(run)(weights, packed), want)
    assert same_bits(torch.vmap(run, (-1, -1))(weights.movedim(0, -1), packed.movedim(0, -1)), want)
    images = torch.stack([x, -x])
    found = torch.vmap(lambda x: run(weight, packed[0], x))(images)
    assert same_bits(found, torch.stack([run(weight, None, x) for x in images]))


@forms
def test_fakes_have_the_strides_of_what_is_made(form: str) -> None:
    for batch, inputs, outputs, height, width in ((2, 3, 4, 5, 6), (1, 1, 1, 1, 1), (2, 3, 1, 1, 4), (1, 1, 65, 3, 1)):
        x, weight = torch.ones(batch, inputs, height, width), torch.ones(outputs, inputs, 3, 3)
        real, fake = (ops.conv3x3(x.to(device), weight.to(device), **FORMS[form]) for device in ("cpu", "meta"))
        assert (real.shape, real.stride(), real.dtype) == (fake.shape, fake.stride(), fake.dtype)


@pytest.mark.full
def test_compile_and_export() -> None:
    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ops.conv3x3(ops.conv3x3(x * 2, w, b), w.transpose(0, 1), upsample=True) + 1

    leaves = operands()
    compiled = torch.compile(function, fullgraph=True)(*leaves)
    want = function(*leaves)
    assert same_bits(compiled, want)
    for f, e in zip(torch.autograd.grad(compiled.sum(), leaves), torch.autograd.grad(want.sum(), leaves), strict=True):
        close(f, e)

    class Module(torch.nn.Module):
        def forward(self, x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return function(x, w, b)

    args = tuple(t.detach() for t in leaves)
    dynamic = {0: torch.export.Dim("batch", min=2, max=64)}
    exported = torch.export.export(Module(), args, dynamic_shapes=(dynamic, None, None))
    more = (values((5, 6, 5, 7), 5), *args[1:])
    assert same_bits(exported.module()(*more), function(*more))
