"""The calls whose results are compared between devices: every op over shapes, layouts, dtypes and its options."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gpu.harness import HOST, Target, assert_same, cycle
from helpers.op_cases import LAYOUTS, ROWS, SHAPES, arrange, table, values
from torch import Tensor

from diffkern import ops
from diffkern.plan import LEARNED_COLUMNS

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INPUT_LAYOUTS = (*LAYOUTS, "misaligned")
OUTPUT_LAYOUTS = ("contiguous", "channels_last", "permuted", "sliced", "misaligned")
# Past the 65535 blocks of a grid's second dimension, several blocks a sample, more blocks than the loss has lanes.
LARGE = [(65539, 3), (2, 3, 131, 127), (1, 1024 * 259 + 13)]
STREAMS = (0, 9, 1 << 40, 2**53 - 1)
OUTPUTS = {
    "randn": ("out",),
    "noise_sum": ("out",),
    "noising": ("out", "target", "eps"),
    "loss": ("value", "grad"),
    "variational": ("value", "means", "grad"),
    "step": ("out", "x0", "s", "next"),
    "quantile": ("value",),
    "dynamic_threshold": ("out",),
    "moments": ("means",),
    "group_norm_act": ("y", "mean", "rstd"),
    "group_norm_act_grad": ("d_x", "d_weight", "d_bias", "d_scale", "d_shift", "d_add"),
    "linear_rows": ("y",),
    "learned_step": ("out", "x0", "next"),
    "step_logprob": ("value", "grad", "grad2"),
}
NOISING = torch.tensor(
    [[0.9, 0.43, 0.43, -0.9], [0.2, 0.98, 0.98, -0.2], [1.0, 0.001, 0.0, 1.0], [0.3, 0.7, 1.0, 0.0], [0.5, 0, 2, 0]],
    dtype=torch.float64,
)
LOSS = torch.tensor(
    [[0.0, 1.0, 1.0], [1.0, 0.0, 0.7], [0.43, -0.9, 1.3], [-1.0, 1.0, 0.1], [0.3, 0.4, 25.0]], dtype=torch.float64
)
# KL and decoder, learned (r1) and fixed variance; columns: diffkern.ops.VARIATIONAL_COLUMNS.
BOUNDS = torch.tensor(
    [
        [0.3, -0.9, 0.7, 0.8, 3.0, 0.2, 0.1, 0.0, 0.004, 1.5, 0.5, 1.0],
        [0.1, 0.8, -0.6, 1.2, 0.0, 0.3, 0.15, 90.0, 0.004, 0.5, 0.25, 1.0],
        [0.0, 1.0, 0.5, math.inf, 2.0, 0.4, 0.05, 0.0, 0.004, 0.75, 0.7, 0.0],
        [1.0, 0.0, -0.1, math.inf, 2.0, 0.4, 0.05, 2.0, 0.004, 0.0, 0.7, 1.0],
        [0.0, 1.0, 0.5, 1.0, 2.0, 0.4, 0.3, 900.0, 0.004, 0.75, 0.7, 1.0],
    ],
    dtype=torch.float64,
)
STEPS = table(*ROWS.values())
# Learned range, clipped and with a known part; the log-variance itself; a fixed variance; the last row; no m but for v.
LEARNED_ROWS: tuple[dict[str, float], ...] = (
    {"p": 1.2, "q": -0.7, "clip": 1.0, "a": 0.3, "b": 0.6, "g": 1.0, "r0": -2.5, "r1": 0.8, "stream": 2.0**41 + 5},
    {"a": 1.0, "d": -0.3, "g": 0.5, "r1": 1.0, "stream": 7.0, "k": 0.7},
    {"p": 1.2, "q": -0.7, "b": 0.6, "d": 0.1, "g": 1.0, "r0": -1.5, "stream": 2.0**53 - 1},
    {"p": 1.2, "q": -0.7, "clip": 1.5, "a": 0.3, "b": 0.6, "r0": -2.5, "r1": 0.8},
    {"a": 1.0, "g": 1.0, "r0": -2.5, "r1": 0.8},
)
LEARNED = torch.tensor(
    [
        [{"clip": math.inf, "k": 1.0, "known_s": 0.8, "known_n": 0.6, **row}.get(n, 0.0) for n in LEARNED_COLUMNS]
        for row in LEARNED_ROWS
    ],
    dtype=torch.float64,
)
# Every row with noise that is not before the clip, and rows without.
DENSITIES = table(*({**row, "r": 0.0, "g": 0.3 if k % 5 else 0.0} for k, row in enumerate(ROWS.values())))
GUIDED = {name for name, row in ROWS.items() if row.get("w")}
LOGPROB_INPUTS = ("after", "x", "m", "m2", "h0", "h1", "h2", "h3")
STATES = ("x", "h0", "h1", "h2", "h3", "known")


@dataclass(frozen=True)
class Call:
    """One call of torch.ops.diffkern.<op> with these arguments, all on the CPU."""

    op: str
    arguments: dict[str, Any]
    what: str
    stays: tuple[str, ...] = ()
    """Arguments that stay on the CPU whatever the device: a table whose row is read on the host."""

    def on(self, target: Target) -> dict[str, Any]:
        """The arguments on the device."""
        there = target.move({name: a for name, a in self.arguments.items() if name not in self.stays})
        return {name: there.get(name, a) for name, a in self.arguments.items()}

    def run(self, target: Target) -> dict[str, Tensor]:
        """The results that were asked for, on the device."""
        returned = getattr(torch.ops.diffkern, self.op)(**self.on(target))
        results = returned if isinstance(returned, tuple) else (returned,)
        return {name: t for name, t in zip(OUTPUTS[self.op], results, strict=True) if t is not None}

    def __str__(self) -> str:
        return f"{self.op}, {self.what}"


def lay(x: Tensor, layout: str) -> Tensor:
    """`arrange`, and "misaligned": contiguous, one element past an aligned address."""
    if layout != "misaligned":
        return arrange(x, layout)
    buffer = x.new_zeros(x.numel() + 1)[1:].view(x.shape)
    return buffer.copy_(x)


def seeds_of(batch: int) -> Tensor:
    """Seeds of any sign, the extremes among them."""
    seeds = ops.seeds(17, batch)
    seeds[: min(batch, 3)] = torch.tensor([-1, 2**63 - 1, -(2**63)])[:batch]
    return seeds


def special(x: Tensor) -> Tensor:
    """x with zeros of both signs, infinities, NaN, subnormal and large numbers in it."""
    odd = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 3e-8, -1e-40, 60000.0, 1e30], dtype=torch.float64)
    pick = torch.randint(0, 40, x.shape, generator=torch.Generator().manual_seed(x.numel()))
    return torch.where(pick < len(odd), odd[pick.clamp(max=len(odd) - 1)].to(x.dtype), x)


def index_of(form: str, batch: int, rows: int) -> Tensor | None:
    """A row for each sample or one for all; "none" only where the table is made to fit."""
    some = torch.arange(batch) * 3 % rows
    forms: dict[str, Tensor | None] = {
        "each": some,
        "each int32": some.int(),
        "each strided": torch.stack([some, some]).t().reshape(-1)[::2],
        "each expanded": torch.tensor([2 % rows]).expand(batch),
        "one": torch.tensor(1 % rows),
        "one int32": torch.tensor(2 % rows, dtype=torch.int32),
        "none": None,
    }
    return forms[form]


INDEX_FORMS = ("each", "each int32", "none", "one", "each strided", "one int32", "each expanded")


def rows_for(form: str, rows: Tensor, batch: int) -> Tensor:
    """The table; without an index it has one row a sample, or one."""
    if form != "none":
        return rows
    return rows[torch.arange(batch) % len(rows)] if batch % 2 else rows[:1].clone()


# -------------------------------------------------------------------------------------------------------------- randn
def randn_calls(dtype: torch.dtype) -> Iterator[Call]:
    """Noise of every shape, on streams up to the last."""
    for shape, stream in zip([*SHAPES, *LARGE], cycle(*STREAMS), strict=False):
        seeds = seeds_of(shape[0])
        forms = {"": seeds, ", strided seeds": torch.stack([seeds, seeds]).t().reshape(-1)[::2]}
        if shape[0]:
            forms[", one seed for all"] = seeds[:1].expand(shape[0])
        for what, given in forms.items():
            arguments = {"size": list(shape), "seeds": given, "stream": stream, "dtype": dtype}
            yield Call("randn", arguments, f"{dtype} {shape}, stream {stream}{what}")


def noise_sum_calls(dtype: torch.dtype) -> Iterator[Call]:
    """Sums of none to the most terms, over every shape."""
    for shape, n in zip([*SHAPES, *LARGE], cycle(5, 1, 64, 0, 24), strict=False):
        arguments = {"size": list(shape), "seeds": seeds_of(shape[0]), **noise_terms(n), "dtype": dtype}
        yield Call("noise_sum", arguments, f"{dtype} {shape}, {n} terms", ("streams", "weights"))


def noise_terms(n: int) -> dict[str, Tensor]:
    """Streams and weights of noise_sum, which are read on the host."""
    generator = torch.Generator().manual_seed(n)
    return {
        "streams": torch.randint(0, 2**53, (n,), generator=generator),
        "weights": torch.randn(n, dtype=torch.float64, generator=generator),
    }


# ------------------------------------------------------------------------------------------------------------ noising
def noising_calls(dtype: torch.dtype, layout: str) -> Iterator[Call]:
    """Noise by address and as a tensor, every form of index, with and without target and eps."""
    forms, wants = cycle(*INDEX_FORMS), cycle((True, True), (False, False), (True, False), (False, True))
    for shape in [*SHAPES, *(LARGE if layout == "contiguous" else [])]:
        for source in ("address", "tensor", "permuted tensor", "address, special values"):
            x0, form, (want_target, want_eps) = values(shape, 1, dtype), next(forms), next(wants)
            if "special" in source:
                x0 = special(x0)
            by_address = source.startswith("address")
            noise = None if by_address else lay(values(shape, 2, dtype), "permuted" if "permuted" in source else layout)
            arguments = {
                "x0": lay(x0, layout),
                "table": rows_for(form, NOISING, shape[0]),
                "index": index_of(form, shape[0], len(NOISING)),
                "seeds": seeds_of(shape[0]) if by_address else None,
                "stream": 1 << 40,
                "noise": noise,
                "want_target": want_target,
                "want_eps": want_eps,
            }
            yield Call("noising", arguments, f"{dtype} {shape} {layout}, {source}, index {form}")


# --------------------------------------------------------------------------------------------------------------- loss
def loss_calls(dtype: torch.dtype, layout: str) -> Iterator[Call]:
    """Predictions of every dtype, the three reductions, with and without the gradient."""
    forms, reductions, grads = cycle(*INDEX_FORMS), cycle(0, 1, 2), cycle(True, True, False)
    pred_dtypes = cycle(dtype, *DTYPES)
    for shape in [*SHAPES, *(LARGE if layout == "contiguous" else [])]:
        for source in ("address", "tensor", "address", "permuted tensor"):
            form, reduction, pred_dtype = next(forms), next(reductions), next(pred_dtypes)
            noise = lay(values(shape, 2, dtype), "permuted" if "permuted" in source else layout)
            arguments = {
                "pred": lay(values(shape, 3, pred_dtype), layout),
                "x0": lay(values(shape, 1, dtype), layout),
                "table": rows_for(form, LOSS, shape[0]),
                "index": index_of(form, shape[0], len(LOSS)),
                "seeds": seeds_of(shape[0]) if source == "address" else None,
                "stream": 1 << 40,
                "noise": None if source == "address" else noise,
                "reduction": reduction,
                "want_grad": next(grads),
            }
            what = f"{dtype} {shape} {layout}, prediction {pred_dtype}, {source}, index {form}, reduction {reduction}"
            yield Call("loss", arguments, what)


def variational_calls(dtype: torch.dtype, layout: str) -> Iterator[Call]:
    """Learned and fixed variances, predictions of every dtype, the three reductions, with and without the gradient."""
    forms, reductions, grads = cycle(*INDEX_FORMS), cycle(0, 1, 2), cycle(True, True, False)
    pred_dtypes = cycle(dtype, *DTYPES)
    for shape in [*(s for s in SHAPES if len(s) > 1), *(LARGE if layout == "contiguous" else [])]:
        for learned in (True, False):
            form, reduction, pred_dtype = next(forms), next(reductions), next(pred_dtypes)
            table_ = BOUNDS * (torch.arange(12) != 6) if not learned else BOUNDS
            whole = (shape[0], 2 * shape[1], *shape[2:]) if learned else shape
            arguments = {
                "pred": lay(values(whole, 3, pred_dtype), layout),
                "x0": lay(values(shape, 1, dtype) / 2, layout),
                "table": rows_for(form, table_, shape[0]),
                "index": index_of(form, shape[0], len(BOUNDS)),
                "seeds": seeds_of(shape[0]),
                "stream": 1 << 40,
                "noise": None,
                "reduction": reduction,
                "want_grad": next(grads),
            }
            what = f"{dtype} {shape} {layout}, prediction {pred_dtype}, learned {learned}, reduction {reduction}"
            yield Call("variational", arguments, what)


def statistics_calls(dtype: torch.dtype, layout: str) -> Iterator[Call]:
    """Quantiles, thresholds and moments: samples of one block of threads and of many, special values among them."""
    many = [*LARGE, (3, 65536), (2, 3, 151, 149)] if layout == "contiguous" else [(2, 3, 151, 149)]
    qs, limits = cycle(0.995, 0.0, 0.5, 1.0, 0.31), cycle(1.5, math.inf, 1.0)
    for shape in [*(s for s in SHAPES if 0 not in s), *many]:
        for what in ("usual", "special values"):
            x = values(shape, 6, dtype) if what == "usual" else special(values(shape, 7, dtype))
            x, q, maximum = lay(x, layout), next(qs), next(limits)
            text = f"{dtype} {shape} {layout}, {what}"
            yield Call("quantile", {"x": x, "q": q}, f"{text}, q = {q}")
            yield Call("dynamic_threshold", {"x0": x, "q": q, "maximum": maximum}, f"{text}, q = {q} up to {maximum}")
            yield Call("moments", {"x": x}, text)


def group_norm_calls(dtype: torch.dtype, layout: str) -> Iterator[Call]:
    """Groups of one block of positions and of many; parameters of every dtype, and none; forward and gradient."""
    grown = [(2, 64, 8, 8), (1, 12, 67, 71), (3, 8, 2500), (2, 40)] if layout != "channels_last" else [(2, 64, 8, 8)]
    acts, kinds, given = cycle(0, 1), cycle(*DTYPES), cycle(True, True, False)
    for shape in [*grown, (2, 30, 37, 5), (1, 6, 3, 5, 4)]:
        if layout == "channels_last" and len(shape) != 4:
            continue
        kind, act, there = next(kinds), next(acts), next(given)
        x, up = lay(values(shape, 8, dtype) + 0.5, layout), lay(values(shape, 9, dtype), layout)
        of_channels = [values((1, shape[1]), 10 + k, kind)[0] if there or k else None for k in range(2)]
        of_samples = [values(shape[:2], 12 + k, kind) if there or not k else None for k in range(3)]
        parameters = dict(zip(("weight", "bias", "scale", "shift", "add"), [*of_channels, *of_samples], strict=True))
        what = f"{dtype} {shape} {layout}, parameters {kind}, all of them {there}, act {act}"
        yield Call("group_norm_act", {"x": x, "groups": 2, **parameters, "eps": 1e-5, "act": act}, what)
        _, mean, rstd = torch.ops.diffkern.group_norm_act(x, 2, *parameters.values(), 1e-5, act)
        operands = {"grad_out": up, "x": x, "mean": mean, "rstd": rstd, "groups": 2, **parameters, "act": act}
        yield Call("group_norm_act_grad", operands, what)


def linear_rows_calls(dtype: torch.dtype, layout: str) -> Iterator[Call]:
    """Blocks of rows and outputs, whole and in part; inputs beyond the lanes and fewer; with a bias and without."""
    for k, (rows, inputs, outputs) in enumerate([(1, 300, 70), (9, 16, 8), (33, 7, 3), (4, 1030, 40), (2, 1, 1)]):
        x, weight = lay(values((rows, inputs), 8, dtype), layout), lay(values((outputs, inputs), 9, dtype), layout)
        bias = values((1, outputs), 10, dtype)[0] if k % 2 else None
        for act in (0, 1):
            what = f"{dtype} {rows} x {inputs} x {outputs} {layout}, act {act}"
            yield Call("linear_rows", {"x": x, "weight": weight, "bias": bias, "act": act}, what)


def order_may_differ(call: Call) -> bool:
    """Whether CPU and GPU add a sample's squares in different orders: the GPU walks channels_last memory for any number
    of channels, the CPU up to 16 where it draws noise. The gradient, one element each, has the same bits.
    """
    if call.op not in ("loss", "variational") or call.arguments["seeds"] is None:
        return False
    x0 = call.arguments["x0"]
    return bool(x0.dim() >= 3 and x0.shape[1] > 16 and x0.stride(1) == 1)


# --------------------------------------------------------------------------------------------------------- comparing
def compare(target: Target, call: Call) -> None:
    """The same call on the device and on the CPU: the same outputs, strides and bits."""
    want, got = call.run(HOST), call.run(target)
    assert got.keys() == want.keys(), str(call)
    for name, expected in want.items():
        assert got[name].stride() == expected.stride(), f"{call}: strides of {name}"
        if name in ("value", "means") and order_may_differ(call):
            torch.testing.assert_close(target.fetch(got[name]), expected, rtol=1e-5, atol=0, msg=f"{call}: value")
        else:
            assert_same(target.fetch(got[name]), expected, f"{call}: {name}")
