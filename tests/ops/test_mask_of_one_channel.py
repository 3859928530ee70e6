"""A mask [B, 1, ...] is that of every channel of [B, C, ...]: the one operand that broadcasts, in one dimension."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.op_cases import EVERYTHING, LAYOUTS, arrange, native_draws, same_bits, table, values
from torch import Tensor

import diffkern
from diffkern import ops, reference

SHAPE = (2, 3, 5, 7)
SEEDS = ops.seeds(3, 2)
BLENDED = table({"a": 0.75, "known_s": 0.5, "known_n": 0.25, "known_stream": 5.0})
LEARNED = torch.cat([table({"p": 1.1, "q": -0.9, "b": 0.4, "g": 0.5, "known_s": 0.9}), torch.tensor([[0.3, 0.2]])], 1)
KINDS = ["bool", "uint8", "numbers"]


def mask_of(kind: str, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> Tensor:
    numbers = values((shape[0], 1, *shape[2:]), 9)
    if kind == "bool":
        return numbers > 0
    return (numbers > 0).to(torch.uint8) * 255 if kind == "uint8" else numbers.abs().clamp(max=1).to(dtype)


def whole(mask: Tensor, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return mask.expand(shape).contiguous()


def operands(shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Any:
    names = ("x", "h0", "h1", "h2", "h3", "known")
    found: dict[str, Any] = {name: values(shape, k, dtype, layout) for k, name in enumerate(names)}
    return found | {"m": values((2 * shape[0], *shape[1:]), 20, dtype, layout)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_step_and_its_variants(layout: str, kind: str) -> None:
    """The bits of the expanded mask, whatever the memory formats of the two."""
    given, mask = operands(layout=layout), mask_of(kind)
    more: dict[str, Any] = {"table": table(EVERYTHING), "seeds": SEEDS}
    want = ops.step(**given, **more, mask=whole(mask), want_x0=True, want_s=True, next_copies=2)
    for own in (mask, mask.movedim(1, -1).contiguous().movedim(-1, 1), arrange(mask, "sliced")):
        found = ops.step(**given, **more, mask=own, want_x0=True, want_s=True, next_copies=2)
        for a, b in zip(want, found, strict=True):
            assert a is not None
            assert b is not None
            assert same_bits(a, b)
        out = ops.step_out(**given, **more, mask=own, out=torch.empty(SHAPE))
        assert same_bits(out, want[0])


@pytest.mark.parametrize("kind", KINDS[::2])
def test_the_reference_means_the_same(kind: str) -> None:
    given, mask = operands(), mask_of(kind)
    more: dict[str, Any] = {"table": table(EVERYTHING), "seeds": SEEDS}
    with native_draws():
        want = reference.step(**given, **more, mask=mask)[0]
    torch.testing.assert_close(ops.step(**given, **more, mask=mask)[0].double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_learned_step_and_its_variant(kind: str) -> None:
    x, m, mask = values(SHAPE, 1), values((2, 6, 5, 7), 2), mask_of(kind)
    more: dict[str, Any] = {"table": LEARNED, "seeds": SEEDS, "known": values(SHAPE, 3)}
    want = ops.learned_step(x, m, **more, mask=whole(mask))[0]
    assert same_bits(ops.learned_step(x, m, **more, mask=mask)[0], want)
    assert same_bits(ops.learned_step_out(x, m, **more, mask=mask, out=torch.empty(SHAPE)), want)


@pytest.mark.parametrize("kind", ["bool", "numbers"])
def test_gradients(kind: str) -> None:
    """Of .75 x where the mask is 1 and of .5 known where it is 0: .75 and .5, by the shares of a mask between."""
    x, known, mask = values(SHAPE, 1).requires_grad_(), values(SHAPE, 2).requires_grad_(), mask_of(kind)
    out = ops.step(x, None, table=BLENDED, seeds=SEEDS, mask=mask, known=known)[0]
    g_x, g_known = torch.autograd.grad(out.sum(), (x, known))
    share = whole(mask).float()
    torch.testing.assert_close(g_x, 0.75 * share)
    torch.testing.assert_close(g_known, 0.5 * (1 - share))


def test_flat_states_and_states_of_one_channel() -> None:
    for shape in ((4, 6), (2, 1, 5)):
        x, mask = values(shape, 1), values((shape[0], 1, *shape[2:]), 2) > 0
        more: dict[str, Any] = {"table": BLENDED, "seeds": ops.seeds(0, shape[0]), "known": values(shape, 3)}
        want = ops.step(x, None, **more, mask=whole(mask, shape))[0]
        assert same_bits(ops.step(x, None, **more, mask=mask)[0], want)
    with pytest.raises(RuntimeError, match=r"mask must have the shape of x \[4\], got \[1\]"):
        ops.step(torch.ones(4), None, table=BLENDED, seeds=ops.seeds(0, 4), known=torch.ones(4), mask=torch.ones(1))


def test_the_output_may_not_overlap_it_in_part() -> None:
    x = values((1, 3, 4), 1)
    with pytest.raises(RuntimeError, match="out must not overlap mask in memory"):
        ops.step_out(x.clone(), None, table=BLENDED, seeds=SEEDS[:1], known=x.clone(), mask=x[:, :1], out=x)


def model(x: Tensor, t: Tensor) -> Tensor:
    return 0.1 * x


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", ["ddim", "learned"])
def test_sample(plan: str, kind: str) -> None:
    made = (
        diffkern.ddpm(diffkern.linear(), 4, variance="learned")
        if plan == "learned"
        else diffkern.ddim(diffkern.linear(), 4)
    )
    x, known, mask = values(SHAPE, 1), values(SHAPE, 2), mask_of(kind)
    own = (lambda x, t: torch.cat([0.1 * x, x], 1)) if plan == "learned" else model
    for start in (0, torch.tensor([0, 2])):
        given: dict[str, Any] = {"seeds": 0, "known": known, "start": start}
        want = diffkern.sample(own, x, made, **given, mask=whole(mask))
        assert same_bits(diffkern.sample(own, x, made, **given, mask=mask), want)
    x = x.contiguous(memory_format=torch.channels_last)
    assert same_bits(
        diffkern.sample(own, x, made, seeds=0, known=known, mask=mask),
        diffkern.sample(own, x, made, seeds=0, known=known, mask=whole(mask)),
    )


def test_predictor_corrector() -> None:
    x, known, mask = values(SHAPE, 1), values(SHAPE, 2), mask_of("bool")
    given: dict[str, Any] = {"seeds": 0, "known": known, "prediction": "eps"}
    want = diffkern.predictor_corrector(model, x, diffkern.vp(), 3, **given, mask=whole(mask))
    assert same_bits(diffkern.predictor_corrector(model, x, diffkern.vp(), 3, **given, mask=mask), want)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (
            torch.ones(1, 1, 5, 7),
            r"mask must be bool, .* of the shape of x \[2, 3, 5, 7\] or of one channel, got .*\[1, 1, 5, 7\]",
        ),
        (torch.ones(2, 5, 7), r"or of one channel, got torch\.float32 of shape \[2, 5, 7\]"),
        (torch.ones(2, 1, 1, 7), r"or of one channel, got torch\.float32 of shape \[2, 1, 1, 7\]"),
        (torch.full(SHAPE, 1.5), r"mask must lie in \[0, 1\], 1 where the state is kept .*, got 1\.5"),
        (torch.full((2, 1, 5, 7), -0.25), r"mask must lie in \[0, 1\], .*, got -0\.25"),
        (torch.full(SHAPE, float("nan")), r"mask must lie in \[0, 1\], .*, got nan"),
        (torch.full(SHAPE, 255.0), r"mask must lie in \[0, 1\], .*, got 255"),
    ],
)
def test_sample_says_what_a_mask_is(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        diffkern.sample(
            model, values(SHAPE, 1), diffkern.ddim(diffkern.linear(), 4), seeds=0, mask=mask, known=values(SHAPE, 2)
        )
