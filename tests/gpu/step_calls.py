"""The calls of the ops of a step: step, learned_step, step_logprob."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from gpu.calls import (
    DENSITIES,
    DTYPES,
    GUIDED,
    INPUT_LAYOUTS,
    LARGE,
    LEARNED,
    LOGPROB_INPUTS,
    STATES,
    STEPS,
    Call,
    index_of,
    lay,
    seeds_of,
    special,
)
from gpu.harness import cycle
from helpers.op_cases import ROWS, SHAPES, values
from torch import Tensor


# --------------------------------------------------------------------------------------------------------------- step
def step_operands(shape: tuple[int, ...], dtype: torch.dtype, model: torch.dtype, layout: str) -> dict[str, Tensor]:
    """All state operands and two predictions, with different values."""
    made = {name: lay(values(shape, k, dtype), layout) for k, name in enumerate(STATES)}
    return {**made, **{name: lay(values(shape, k, model), layout) for k, name in ((11, "m"), (12, "m2"))}}


def step_call(what: str, operands: dict[str, Any], stays: tuple[str, ...] = (), **more: Any) -> Call:
    """A call of `step` with everything that is not named absent."""
    absent = dict.fromkeys(("x", "m", "m2", "h0", "h1", "h2", "h3"))
    rest = {"row": 0, "index": None, "seeds": None, "noise": None, "mask": None, "known": None}
    want = {"want_x0": False, "want_s": False, "next_copies": 0, "next_dtype": None}
    return Call("step", {**absent, **rest, **want, "table": STEPS, **operands, **more}, what, stays)


def step_calls(dtype: torch.dtype, layout: str) -> Iterator[Call]:
    """Every row: from a table on the host, one on the device, and through an index; masks, guidance, outputs."""
    sources = cycle("host", "device", "one", "one int32", "each", "each int32", "each strided")
    masks, models = cycle(None, torch.bool, None, torch.uint8, dtype), cycle(*DTYPES)
    wants = cycle((True, True, 1), (False, False, 0), (True, False, 2), (False, True, 2))
    following, shapes, noises = cycle(None, *DTYPES), cycle(*SHAPES), cycle(False, True, False, False)
    for k, (name, row) in enumerate(ROWS.items()):
        for _ in range(9):  # coprime to the lengths of most cycles
            shape, source, mask, model = next(shapes), next(sources), next(masks), next(models)
            operands: dict[str, Any] = step_operands(shape, dtype, model, layout)
            batch, by_tensor = shape[0], next(noises) and not row.get("known_n")
            if name not in GUIDED:
                del operands["m2"]
            elif batch % 2:
                second = operands.pop("m2")
                operands["m"] = lay(torch.cat([operands["m"], second]), layout)
            if mask is None:
                del operands["known"]
            else:
                weights = values(shape, 30).mul(2).clamp(0, 1)
                operands["mask"] = lay(weights.to(mask) if mask.is_floating_point else weights.gt(0).to(mask), layout)
            want_x0, want_s, copies = next(wants)
            index = None if source in ("host", "device") else index_of(source, batch, len(STEPS))
            if index is not None:
                index.fill_(k)
            yield step_call(
                f"{name}, {dtype} {shape} {layout}, model {model}, table {source}, mask {mask}",
                operands,
                ("table",) if source == "host" else (),
                row=k,
                index=index,
                seeds=None if by_tensor else seeds_of(batch),
                noise=lay(values(shape, 20, dtype), layout) if by_tensor else None,
                want_x0=want_x0,
                want_s=want_s,
                next_copies=copies,
                next_dtype=next(following),
            )


def mixed_row_calls(dtype: torch.dtype) -> Iterator[Call]:
    """Every sample at a row of its own, rows of all kinds in one launch; then special values, and a large batch."""
    batch = len(STEPS)
    for layout in INPUT_LAYOUTS:
        for shape in ((batch, 3, 41), (batch, 4, 16, 17)):
            operands: dict[str, Any] = step_operands(shape, dtype, torch.float16, layout)
            operands["mask"] = lay(values(shape, 30).gt(0), layout)
            order = torch.randperm(batch, generator=torch.Generator().manual_seed(3))
            want: dict[str, Any] = {"want_x0": True, "want_s": True, "next_copies": 2, "next_dtype": torch.bfloat16}
            what = f"a row of each, {dtype} {shape} {layout}"
            yield step_call(what, operands, index=order, seeds=seeds_of(batch), **want)
    for large in LARGE:
        operands = {name: special(values(large, k, dtype)) for k, name in enumerate(("x", "m"))}
        row = list(ROWS).index("noise before clip")
        for stays in ((), ("table",)):
            yield step_call(f"special values, {dtype} {large}", operands, stays, row=row, seeds=seeds_of(large[0]))


def learned_calls(dtype: torch.dtype, layout: str) -> Iterator[Call]:
    """The step with a learned variance: every row from every source, masks, outputs, special values."""
    sources = cycle("host", "device", "one", "each", "each int32", "each strided", "one int32")
    masks, models, noises = cycle(None, torch.bool, None, dtype, torch.uint8), cycle(*DTYPES), cycle(False, False, True)
    wants = cycle((True, 1), (False, 0), (True, 2), (False, 2))
    for k, shape in enumerate([*(s for s in SHAPES if len(s) > 1), *(LARGE if layout == "contiguous" else [])]):
        for row in range(len(LEARNED)):
            source, mask, model, by_tensor = next(sources), next(masks), next(models), next(noises)
            want_x0, copies = next(wants)
            x, m = values(shape, 1, dtype), values((shape[0], 2 * shape[1], *shape[2:]), 2, model)
            weights = values(shape, 30).mul(2).clamp(0, 1)
            if mask is not None:
                weights = weights.to(mask) if mask.is_floating_point else weights.gt(0).to(mask)
            index = None if source in ("host", "device") else index_of(source, shape[0], len(LEARNED))
            by_tensor = by_tensor and mask is None  # a known part draws noise of its own
            arguments = {
                "x": lay(special(x) if k % 3 == 0 else x, layout),
                "m": lay(special(m) if k % 3 == 0 else m, layout),
                "table": LEARNED,
                "row": row,
                "index": index,
                "seeds": None if by_tensor else seeds_of(shape[0]),
                "noise": lay(values(shape, 20, dtype), layout) if by_tensor else None,
                "mask": None if mask is None else lay(weights, layout),
                "known": None if mask is None else lay(values(shape, 21, dtype), layout),
                "want_x0": want_x0,
                "next_copies": copies,
                "next_dtype": None,
            }
            what = f"{dtype} {shape} {layout}, row {row}, model {model}, table {source}, mask {mask}"
            yield Call("learned_step", arguments, what, ("table",) if source == "host" else ())


def logprob_calls(dtype: torch.dtype, layout: str) -> Iterator[Call]:
    """The log-density of a step: rows of every kind from every source, guidance, learned variances, special values."""
    sources = cycle("host", "device", "one", "each", "each int32", "each strided", "one int32")
    models, grads, forms = cycle(*DTYPES), cycle(True, True, False), cycle("m2", "doubled", "learned")
    for k, shape in enumerate([*SHAPES, *(LARGE if layout == "contiguous" else [])]):
        for turn in range(6):
            form, source, model, batch = next(forms), next(sources), next(models), shape[0]
            if form == "learned" and len(shape) < 2:
                form = "m2"
            rows = LEARNED if form == "learned" else DENSITIES
            row = (7 * k + turn) % len(rows)
            index = None if source in ("host", "device") else index_of(source, batch, len(rows))
            given = {name: values(shape, 40 + j, dtype) for j, name in enumerate(LOGPROB_INPUTS) if name[0] != "m"}
            wide = (2 * batch, *shape[1:]) if form == "doubled" else shape
            if form == "learned":
                wide = (batch, 2 * shape[1], *shape[2:])
            given |= {"m": values(wide, 50, model), "m2": values(shape, 51, model)}
            if turn == 3:
                given = {name: special(t) for name, t in given.items()}
            if form != "m2":
                del given["m2"]
            arguments = {
                **{name: None if name not in given else lay(given[name], layout) for name in LOGPROB_INPUTS},
                "table": rows,
                "row": row,
                "index": index,
                "want_grad": next(grads),
            }
            what = f"{dtype} {shape} {layout}, {form}, row {row}, model {model}, table {source}"
            yield Call("step_logprob", arguments, what, ("table",) if source == "host" else ())
