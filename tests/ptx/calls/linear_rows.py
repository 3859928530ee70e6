"""Calls of linear_rows, through the CUDA launcher in the emulator and the CPU's kernel."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from helpers.native_layout import CODES
from ptx.harness import Cpu, Device, bits, first_difference, values
from torch import Tensor


@dataclass
class Linear:
    """One call; ``pad``: elements between rows; ``of``: rows that x has the first ``rows`` of, all of them if 0."""

    rows: int
    inputs: int
    outputs: int
    dtype: torch.dtype
    silu: bool = True
    bias: bool = True
    pad: int = 0
    special: bool = False
    of: int = 0


def _tensors(call: Linear) -> dict[str, Tensor]:
    wide = torch.float64 if call.dtype == torch.float64 else torch.float32
    made = {
        "x": values(1, call.of or call.rows, (call.inputs + call.pad,), call.dtype, special=call.special)[
            : call.rows, : call.inputs
        ],
        "weight": values(2, call.outputs, (call.inputs + call.pad,), call.dtype)[:, : call.inputs],
        "bias": values(3, call.outputs, (2,), call.dtype)[:, 1],
        "out": torch.empty(call.rows, call.outputs, dtype=call.dtype),
        "prepared": torch.empty(call.rows, call.inputs, dtype=wide),
    }
    return made if call.bias else {name: t for name, t in made.items() if name != "bias"}


def _run(lib: ctypes.CDLL, call: Linear, tensors: dict[str, Tensor], prepares: bool) -> int:
    sizes = [call.rows, call.inputs, call.outputs, CODES[call.dtype], int(call.silu)]
    words = [w for name in ("x", "weight", "out") for w in (tensors[name].data_ptr(), tensors[name].stride(0))]
    bias = tensors.get("bias")
    words += [0, 0] if bias is None else [bias.data_ptr(), bias.stride(0)]
    words.append(tensors["prepared"].data_ptr() if prepares else 0)
    lists = [(ctypes.c_int64 * len(part))(*part) for part in (sizes, words)]
    function: Any = lib.dk_linear_rows
    return int(function(lists[0], None, None, None, ctypes.c_uint64(0), lists[1], None))


def on_cpu(cpu: Cpu, call: Linear) -> Tensor:
    tensors = _tensors(call)
    assert _run(cpu.lib, call, tensors, call.silu or call.dtype in (torch.float16, torch.bfloat16)) == 0
    return tensors["out"]


def on_device(device: Device, call: Linear) -> Tensor:
    tensors, host = _tensors(call), device.host
    before = {name: bits(t) for name, t in tensors.items() if name not in ("out", "prepared")}
    lib = device.library()
    for name, t in tensors.items():
        host.register(t, name, **({"readonly": True} if name in before else {"init": False}))
    try:
        status = _run(lib, call, tensors, call.silu)
        device.launches = list(host.launches)
        host.check()
        assert status == 0, f"the launcher returned {status}"
        assert host.unwritten(tensors["out"]) == 0
    finally:
        host.release()
    for launch in device.launches:
        assert not launch.warnings, launch.warnings
        assert launch["local"]["bytes"] == 0, "a kernel uses local memory"
    assert all(torch.equal(bits(tensors[name]), value) for name, value in before.items())
    return tensors["out"]


def check_linear(device: Device, cpu: Cpu, call: Linear) -> Tensor:
    """The same bits from both; returns the device's."""
    expected, got = on_cpu(cpu, call), on_device(device, call)
    problem = first_difference(got, expected)
    assert problem is None, f"{call}: {problem} on the CPU"
    return got
