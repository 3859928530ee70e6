"""Calls of group_norm_act and its gradient, through the CUDA launchers in the emulator and the CPU's kernels."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from helpers.core_headers import constant
from helpers.native_layout import CODES, MAX_DIMS
from ptx.harness import Cpu, Device, bits, empty, first_difference, values
from torch import Tensor

NAMES = ("weight", "bias", "scale", "shift", "add")
RUN, ROWS = constant("kNormRun"), constant("kNormRows")
FACTORS, SUMS = 5, constant("kNormSums")


@dataclass
class Norm:
    """One call: x [batch, *shape], C first in shape; parameters by name, absent where they are none."""

    layout: str
    batch: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    groups: int
    silu: bool = True
    parameters: dict[str, Tensor] | None = None
    special: bool = False

    @property
    def positions(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def last(self) -> bool:
        return self.layout.startswith("channels_last") or self.positions == 1

    @property
    def wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32


def parameters(batch: int, channels: int, dtype: torch.dtype, names: Sequence[str] = NAMES) -> dict[str, Tensor]:
    """Each with strides of its own."""
    each = values(21, 2, (channels,), dtype)
    each_sample = values(22, batch, (3 * channels,), dtype)
    found = {
        "weight": each[0],
        "bias": each.t().contiguous()[:, 1],
        **dict(zip(NAMES[2:], each_sample.chunk(3, 1), strict=True)),
    }
    return {name: found[name] for name in names}


def _view(t: Tensor | None) -> list[int]:
    strides = [] if t is None else [t.stride(0)]
    return [0] * (3 + MAX_DIMS) if t is None else [t.data_ptr(), CODES[t.dtype], *strides, *[0] * MAX_DIMS]


def _channels(t: Tensor | None) -> list[int]:
    if t is None:
        return [0] * 4
    return [t.data_ptr(), CODES[t.dtype], t.stride(0) if t.dim() == 2 else 0, t.stride(-1)]


def _run(lib: ctypes.CDLL, call: Norm, tensors: dict[str, Tensor], grad: bool) -> int:
    sizes = [call.batch, call.shape[0], call.positions, call.groups, int(call.last), int(call.silu)]
    words = [w for name in ("x", "dx" if grad else "y", "grad" if grad else "") for w in _view(tensors.get(name))]
    extra = [tensors[name].data_ptr() for name in ("mean", "rstd", "partials", "factors", "sums")]
    for prefix in ("", "d_"):
        for name in NAMES:
            extra += _channels(tensors.get(prefix + name) if grad or not prefix else None)
    lists = [(ctypes.c_int64 * len(part))(*part) for part in (sizes, words, extra)]
    function: Any = getattr(lib, "dk_group_norm_grad" if grad else "dk_group_norm")
    return int(function(lists[0], lists[1], None, None, ctypes.c_uint64(0), lists[2], (ctypes.c_double * 1)(1e-5)))


def tensors_of(call: Norm) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(inputs, results, workspace)."""
    blocks = -(-call.positions // (ROWS if call.last else RUN))
    given = {"x": values(1, call.batch, call.shape, call.dtype, call.layout, call.special)}
    given["grad"] = values(2, call.batch, call.shape, call.dtype, call.layout)
    given |= call.parameters or {}
    made = {name: empty(call.layout, call.batch, call.shape, call.dtype) for name in ("y", "dx")}
    made |= {name: torch.empty(call.batch, call.groups, dtype=call.wide) for name in ("mean", "rstd")}
    made |= {f"d_{name}": torch.empty(t.shape, dtype=t.dtype) for name, t in (call.parameters or {}).items()}
    work = {"partials": torch.empty(call.batch * blocks * call.shape[0] * 3, dtype=call.wide)}
    work["factors"] = torch.empty(call.batch * FACTORS * call.shape[0], dtype=call.wide)
    work["sums"] = torch.empty(call.batch * call.shape[0] * SUMS, dtype=torch.float64)
    return given, made, work


def on_cpu(cpu: Cpu, call: Norm) -> dict[str, Tensor]:
    given, made, work = tensors_of(call)
    for grad in (False, True):
        assert _run(cpu.lib, call, {**given, **made, **work}, grad) == 0
    return made


def on_device(device: Device, call: Norm) -> dict[str, Tensor]:
    """Forward, then backward; the launches of both are in `device.launches`."""
    given, made, work = tensors_of(call)
    before = {name: bits(t) for name, t in given.items()}
    launches = []
    for grad in (False, True):
        lib, host = device.library(), device.host
        inputs = {**given, **({"mean": made["mean"], "rstd": made["rstd"]} if grad else {})}
        outputs = {k: t for k, t in made.items() if k not in inputs and grad == (k == "dx" or k.startswith("d_"))}
        for name, t in inputs.items():
            host.register(t, name, readonly=True)
        for name, t in (*outputs.items(), *work.items()):
            host.register(t, name, init=False)
        try:
            status = _run(lib, call, {**given, **made, **work}, grad)
            launches += list(host.launches)
            host.check()
            assert status == 0, f"the launcher returned {status}"
            for name, t in outputs.items():
                assert host.unwritten(t) == 0, f"{name}: {host.unwritten(t)} bytes were not written"
        finally:
            host.release()
    for launch in launches:
        assert not launch.warnings, launch.warnings
        assert launch["local"]["bytes"] == 0, "a kernel uses local memory"
    assert all(torch.equal(bits(t), before[name]) for name, t in given.items())
    device.launches = launches
    return made


def in_memory(device: Device, call: Norm, tensors: dict[str, Tensor], grad: bool, **options: Any) -> None:
    """Forward or backward of tensors by name where they lie, for those too large for a record of each byte: what is
    written is not watched, and the first of those that share a memory stands for it."""
    lib, host = device.library(race_global=False, stats=False, **options), device.host
    for name, t in {t.untyped_storage().data_ptr(): (name, t) for name, t in reversed(tensors.items())}.values():
        host.register(t, name)
    try:
        status = _run(lib, call, tensors, grad)
        host.check()
        assert status == 0, f"the launcher returned {status}"
    finally:
        host.release()


def check_norm(device: Device, cpu: Cpu, call: Norm) -> dict[str, Tensor]:
    """The same bits from both; returns the device's."""
    expected, got = on_cpu(cpu, call), on_device(device, call)
    for name, value in expected.items():
        problem = first_difference(got[name], value)
        assert problem is None, f"{name} of {call.layout}, {call.batch} x {call.shape}: {problem} on the CPU"
    return got
