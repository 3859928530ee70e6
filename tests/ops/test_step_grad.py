"""Gradients of the step: gradcheck in float64, against the reference in every dtype, and twice."""

from __future__ import annotations

import pytest
import torch
from helpers.op_cases import EVERYTHING, ROWS, native_draws, table, values
from helpers.tolerances import STATE_DTYPES, check
from torch import Tensor

from diffkern import ops, reference

SHAPE = (2, 3, 2)
# No clip here: at the limits the derivative jumps, and a finite difference would see both sides.
SMOOTH = {**EVERYTHING, "clip": 50.0}
SEEDS = ops.seeds(0, 2)


def leaves(*names: str, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    order = ("x", "m", "m2", "h0", "h1", "h2", "h3", "noise", "known")
    return {name: values(shape, order.index(name), dtype).requires_grad_() for name in names}


def run(names: list[str], tensors: tuple[Tensor, ...], **more: object) -> tuple[Tensor, ...]:
    given = dict(zip(names, tensors, strict=True))
    outs = ops.step(given.pop("x", None), given.pop("m", None), **given, **more)  # type: ignore[arg-type]
    return tuple(o for o in outs if o is not None)


CASES: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "eps": (("x", "m"), {"table": table(ROWS["eps"])}),
    "histories": (("h0", "h1", "h2", "h3", "x"), {"table": table(ROWS["history 4"])}),
    "everything": (
        ("x", "m", "m2", "h0", "h1", "h2", "h3", "known"),
        {"table": table(SMOOTH), "seeds": SEEDS, "mask": torch.tensor([[[True, False]] * 3] * 2)},
    ),
    "fractional mask": (
        ("x", "m", "known"),
        {
            "table": table({**ROWS["eps noise"], "known_s": 0.8, "known_n": 0.3, "known_stream": 3.0 * 2**40}),
            "seeds": SEEDS,
            "mask": values(SHAPE, 7, torch.float64).abs().clamp(max=1),
        },
    ),
    "noise tensor": (("x", "m", "noise"), {"table": table({**ROWS["noise before clip"], "g": 0.4, "clip": 30.0})}),
    "no x": (("m", "known"), {"table": table({"d": 0.5, "known_s": 0.3}), "mask": torch.zeros(SHAPE).bool()}),
    "row of each": (
        ("x", "m", "m2", "h0"),
        {
            "table": table(ROWS["eps guided"], ROWS["history 1"], ROWS["euler guided"]),
            "index": torch.tensor([2, 1]),
        },
    ),
    "one row by index": (("x", "m"), {"table": table(ROWS["eps"], ROWS["x0"]), "index": torch.tensor(1)}),
}


@pytest.mark.parametrize("case", CASES)
def test_gradcheck(case: str) -> None:
    names, more = CASES[case]
    tensors = leaves(*names)
    want = {"want_x0": True, "want_s": True, "next_copies": 2}

    def f(*inputs: Tensor) -> tuple[Tensor, ...]:
        return run([*tensors], inputs, **more, **want)

    assert torch.autograd.gradcheck(f, tuple(tensors.values()))
    assert torch.autograd.gradgradcheck(f, tuple(tensors.values()))


@pytest.mark.parametrize("copies", [0, 1, 2])
def test_gradcheck_with_a_doubled_batch(copies: int) -> None:
    x = values(SHAPE, 1, torch.float64).requires_grad_()
    both = values((4, *SHAPE[1:]), 2, torch.float64).requires_grad_()

    def f(x: Tensor, both: Tensor) -> tuple[Tensor, ...]:
        return run(["x", "m"], (x, both), table=table({**ROWS["eps guided"], "k": 0.7}), next_copies=copies)

    assert torch.autograd.gradcheck(f, (x, both))
    assert torch.autograd.gradgradcheck(f, (x, both))


def test_clip_passes_gradient_inside_only() -> None:
    x = torch.tensor([[0.2, -0.9, 1.4, -3.0]], dtype=torch.float64, requires_grad=True)
    out, x0, _, _ = ops.step(x, None, table=table({"p": 1.0, "b": 2.0, "a": 0.5, "clip": 1.0}), want_x0=True)
    assert x0 is not None
    assert torch.autograd.grad(out.sum() + x0.sum(), x)[0].tolist() == [[3.5, 3.5, 0.5, 0.5]]
    names = ["x", "m", "m2"]
    far = tuple(values(SHAPE, k, torch.float64).mul(4).requires_grad_() for k in (1, 2, 3))
    assert torch.autograd.gradcheck(
        lambda *t: run(names, t, table=table({**EVERYTHING, "e0": 0, "e1": 0, "e2": 0, "e3": 0}), seeds=SEEDS), far
    )


@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("state", STATE_DTYPES, ids=str)
def test_against_the_reference(state: torch.dtype, model: torch.dtype) -> None:
    """All inputs of the row that has everything; each gradient in the dtype of its input."""
    shape = (2, 3, 11, 7)
    state_names = ("x", "h0", "h1", "h2", "h3", "known")
    inputs = {**leaves(*state_names, shape=shape, dtype=state), **leaves("m", "m2", shape=shape, dtype=model)}
    more = {"table": table(SMOOTH), "seeds": SEEDS, "mask": values(shape, 9) > 0}
    up = [values(shape, 30 + k) for k in range(4)]

    def gradients(function: object, compute: torch.dtype | None) -> tuple[Tensor, ...]:
        if compute is None:
            outs = ops.step(**inputs, **more, want_x0=True, want_s=True, next_copies=1)  # type: ignore[arg-type]
        else:
            with native_draws():
                outs = reference.step(**used, **more, compute=compute)  # type: ignore[arg-type]
        total = sum((o.double() * u.double()).sum() for o, u in zip(outs, up, strict=True))
        return torch.autograd.grad(total, list((inputs if compute is None else used).values()))  # type: ignore[arg-type]

    used = {name: t.detach().double().requires_grad_() for name, t in inputs.items()}
    exact = gradients(reference.step, torch.float64)
    used = inputs
    plain = gradients(reference.step, torch.float64 if state == torch.float64 else torch.float32)
    for name, o, e, p in zip(inputs, gradients(ops.step, None), exact, plain, strict=True):
        assert o.dtype == inputs[name].dtype
        check(o, e, p, name, max(state, model, key=lambda dtype: torch.finfo(dtype).eps))


@pytest.mark.parametrize("kind", ["bytes", "bools", "numbers"])
def test_what_a_mask_lets_through(kind: str) -> None:
    """Integers and bools open where they are not 0: a byte of 255 is 1, not 255, forward and backward.

    x' = 0.5 x where open, 0.25 known where closed: the slopes, and the other's 0.
    """
    bits = torch.tensor([[0, 255, 1, 7], [255, 0, 0, 2]], dtype=torch.uint8)
    opens = (bits != 0).double()
    mask = {"bytes": bits, "bools": bits != 0, "numbers": opens.float()}[kind]
    x, known = (values((2, 4), k).requires_grad_() for k in (1, 2))
    right = 0.5 * opens * x.double() + 0.25 * (1 - opens) * known.double()
    out = ops.step(x, None, table=table({"a": 0.5, "known_s": 0.25}), mask=mask, known=known)[0]
    again = reference.step(x, None, table=table({"a": 0.5, "known_s": 0.25}), mask=mask, known=known)[0]
    for found in (out, again):
        torch.testing.assert_close(found.double(), right, rtol=1e-6, atol=1e-6)
        g_x, g_known = torch.autograd.grad(found.sum(), (x, known))
        torch.testing.assert_close(g_x.double(), 0.5 * opens, rtol=0, atol=0)
        torch.testing.assert_close(g_known.double(), 0.25 * (1 - opens), rtol=0, atol=0)


@pytest.mark.parametrize("index", [None, torch.tensor([1, 0])], ids=["row", "index"])
def test_noise_tensor_with_an_image_noised_by_address(index: Tensor | None) -> None:
    """Both sources in one row: `noise` is z, the seeds are those of the known image. x0 = x - 0.5 m inside the clip.

    x' = 0.5 x0 + 0.3 z where open: d/dx = 0.5, d/dm = -0.25, d/dz = 0.3; none outside the clip.
    """
    row = {"clip": 1.0, "p": 1.0, "q": -0.5, "b": 0.5, "g": 0.3, "known_s": 0.8, "known_n": 0.2, "stream": 5.0}
    rows = table({**row, "known_stream": 6.0}, {**row, "known_stream": 7.0})
    x = torch.tensor([[0.0, 0.2, 3.0, 0.1]] * 2, requires_grad=True)
    m, noise, known = torch.zeros(2, 4, requires_grad=True), *(values((2, 4), k).requires_grad_() for k in (1, 2))
    mask = torch.tensor([[True, False, True, True]] * 2)
    out = ops.step(x, m, table=rows, index=index, seeds=SEEDS, noise=noise, mask=mask, known=known)[0]
    g_x, g_m, g_noise, g_known = torch.autograd.grad(out.sum(), (x, m, noise, known))
    for found, right in ((g_x, [0.5, 0, 0, 0.5]), (g_m, [-0.25, 0, 0, -0.25]), (g_noise, [0.3, 0, 0.3, 0.3])):
        torch.testing.assert_close(found, torch.tensor([right] * 2))
    torch.testing.assert_close(g_known, torch.tensor([[0.0, 0.8, 0, 0]] * 2))


def test_sampling_can_be_differentiated_through() -> None:
    """Three steps of DDIM-like rows with a linear model: the gradient of the image with respect to the noise."""
    rows = table(*({**ROWS["eps"], "k": 1.0, "p": 1.0 + 0.1 * k} for k in range(3)))
    x = values((1, 5), 1, torch.float64).requires_grad_()

    def image(x: Tensor) -> Tensor:
        for k in range(3):
            x = ops.step(x, 0.3 * x + 0.1 * x.sin(), table=rows, row=k)[0]
        return x

    assert torch.autograd.gradcheck(image, (x,))


def test_without_gradients_the_plain_op_runs() -> None:
    x, m = values(SHAPE, 1), values(SHAPE, 2).requires_grad_()
    assert not ops.step(x, m.detach(), table=table(ROWS["eps"]))[0].requires_grad
    with torch.no_grad():
        assert not ops.step(x, m, table=table(ROWS["eps"]))[0].requires_grad
    assert ops.step(x, m, table=table(ROWS["eps"]))[0].requires_grad


def test_out_refuses_gradients_and_tells_autograd() -> None:
    x, m = values(SHAPE, 1), values(SHAPE, 2).requires_grad_()
    rows = table(ROWS["eps"])
    with pytest.raises(RuntimeError, match=r"diffkern\.step_out: not differentiable, and a tensor requires grad"):
        ops.step_out(x, m, table=rows, out=x)
    with pytest.raises(RuntimeError, match=r"diffkern\.noising_out: not differentiable, and a tensor requires grad"):
        ops.noising_out(m, torch.ones(1, 4).double(), seeds=SEEDS, out=x)
    with pytest.raises(RuntimeError, match=r"diffkern\.randn: not differentiable, and a tensor requires grad"):
        ops.randn(SHAPE, SEEDS, out=m)
    for write in (
        lambda t: ops.step_out(t, t, table=rows, out=t),
        lambda t: ops.noising_out(t, torch.ones(1, 4).double(), seeds=SEEDS, out=t),
        lambda t: ops.randn(SHAPE, SEEDS, out=t),
    ):
        kept = x.clone()
        product = (m * kept).sum()  # saves `kept`
        write(kept)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()
