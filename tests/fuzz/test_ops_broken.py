"""Calls of every op with one or two arguments that are wrong: one sentence of its own, or an answer that is right.

No crash, no other library's error, no NaN out of finite numbers, and nothing written beside the outputs; after a
refusal, nothing written at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.fuzz_calls import CALLS, Call, run
from helpers.fuzzing import check_refusal, fuzz, guarded
from hypothesis import strategies as st
from torch import Tensor

from diffkern import ops

INTEGERS = [-1, 2, 2**31, 2**53, 2**63 - 1, -(2**63), 2**63, 2**70]
NUMBERS = [*INTEGERS, 0.5, 1e300, math.nan, math.inf]
WORDS = ["bad", "", "Mean"]
KINDS = [torch.int32, torch.complex64, torch.bool, torch.float8_e5m2]


def int_min(t: Tensor) -> Tensor:
    return torch.full_like(t, torch.iinfo(t.dtype).min) if not t.is_floating_point() and t.dtype != torch.bool else t


TENSORS: dict[str, Callable[[Tensor], Any]] = {
    "int32": lambda t: t.to(torch.int32),
    "int16": lambda t: t.to(torch.int16),
    "complex": lambda t: t.to(torch.complex64),
    "bool": lambda t: t.bool(),
    "uint8": lambda t: t.to(torch.uint8),
    "float8": lambda t: t.float().to(torch.float8_e4m3fn),
    "double": lambda t: t.double(),
    "half": lambda t: t.half(),
    "one fewer": lambda t: t[:-1] if t.dim() else t,
    "one more": lambda t: torch.cat([t, t[:1]]) if t.dim() else t[None],
    "no samples": lambda t: t[:0] if t.dim() else t,
    "no elements": lambda t: t[..., :0] if t.dim() else t,
    "another axis": lambda t: t[None],
    "axis at the end": lambda t: t[..., None],
    "flat": lambda t: t.reshape(-1),
    "transposed": lambda t: t.transpose(0, -1) if t.dim() > 1 else t,
    "reversed memory": lambda t: t.contiguous().flip(0) if t.dim() else t,
    "expanded": lambda t: t[:1].expand(t.shape) if t.dim() else t,
    "all at one place": lambda t: torch.zeros(1, dtype=t.dtype).expand((2,) * t.dim()) if t.dim() < 7 else t,
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse() if t.dim() and t.dtype != torch.uint8 else t,
    "wants a gradient": lambda t: t.detach().clone().requires_grad_() if t.is_floating_point() else t,
    "huge numbers": lambda t: t * 1e30 if t.is_floating_point() else t + 2**30,
    "smallest integers": int_min,
    "many axes": lambda t: t.reshape(t.shape + (1,) * 30),
}
"""What may become of a tensor."""


def harmless(value: Any) -> bool:
    """All elements finite: then no result may be NaN."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_meta or not value.numel():
        return True
    return not value.is_floating_point() or bool((value.detach().double().abs() < 1e4).all())


def broken(draw: Callable[..., Any], call: Call, outs: dict[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    """The arguments with one or two of them wrong, and what was done."""
    given: dict[str, Any] = {**call.given, **outs}
    done = []
    for _ in range(draw(st.integers(1, 2))):
        key = draw(st.sampled_from(sorted(given)))
        value = given[key]
        if isinstance(value, Tensor):
            how = draw(st.sampled_from(sorted(TENSORS)))
            if value.is_meta or value.layout != torch.strided or value.is_complex() or value.dtype.itemsize < 2:
                continue
            given[key] = TENSORS[how](value)
        elif isinstance(value, torch.dtype):
            given[key] = how = draw(st.sampled_from(KINDS))
        elif isinstance(value, str):
            given[key] = how = draw(st.sampled_from(WORDS))
        elif isinstance(value, tuple):  # sizes; none that could be allocated
            at = draw(st.integers(0, len(value) - 1))
            how = draw(st.sampled_from([-1, 2**62, 0, -(2**63)]))
            given[key] = (*value[:at], how, *value[at + 1 :])
        elif value is not None and key != "n":
            given[key] = how = draw(st.sampled_from(NUMBERS if isinstance(value, float) else INTEGERS))
        else:
            continue
        done.append(f"{key}: {how}")
    return given, done


def attempt(name: str, call: Call, given: dict[str, Any], made: dict[str, Any], done: list[str]) -> None:
    """The call: refused in a sentence, and then nothing written; or an answer, and nothing written beside it."""
    outs = {key: given.pop(key) for key in made}
    try:
        found = run(name, given, outs)
    except Exception as error:
        check_refusal(error, getattr(ops, name), f"{name}, {done}")
        for key, (out, kept) in made.items():
            assert kept(), f"{name} wrote beside {key} of a call that it refused ({done})"
            assert bool((out == -7.0).all()), f"{name} wrote into {key} of a call that it refused ({done})"
        return
    for key, (_, kept) in made.items():
        assert kept(), f"{name} wrote beside {key} ({done})"
    if all(map(harmless, given.values())) and not outs and name != "moments":  # of one number, a deviation is NaN
        for result in found:
            if isinstance(result, Tensor) and not result.is_meta and result.numel():
                assert not bool(result.isnan().any()), f"{name} made NaN of finite numbers ({done})"


@pytest.mark.parametrize("name", CALLS)
@fuzz(40, data=st.data())
def test_a_broken_call_is_refused_in_one_sentence(name: str, data: st.DataObject) -> None:
    call = data.draw(CALLS[name])
    layout = data.draw(st.sampled_from(["contiguous", "permuted", "sliced"]))
    made = {key: guarded(shape, dtype, layout) for key, (shape, dtype) in call.outs.items()}
    given, done = broken(data.draw, call, {key: out.fill_(-7.0) for key, (out, _) in made.items()})
    attempt(name, call, given, made, done)


OTHERS = [None, 0.5, math.nan, "x", [1], 1j, torch.zeros(()), np.zeros((2, 3)), {}, object(), True]
"""What is no tensor, or none of a batch."""


@pytest.mark.parametrize("name", [name for name in CALLS if not name.startswith(("bound_step", "seeds"))])
@fuzz(25, data=st.data())
def test_what_is_no_tensor_is_refused_in_one_sentence(name: str, data: st.DataObject) -> None:
    call = data.draw(CALLS[name])
    made = {key: guarded(shape, dtype, "contiguous") for key, (shape, dtype) in call.outs.items()}
    given: dict[str, Any] = {**call.given, **{key: out.fill_(-7.0) for key, (out, _) in made.items()}}
    tensors = sorted(key for key, value in given.items() if isinstance(value, Tensor))
    key, other = data.draw(st.sampled_from(tensors)), data.draw(st.sampled_from(OTHERS))
    given[key] = other
    attempt(name, call, given, made, [f"{key}: {other!r}"])
