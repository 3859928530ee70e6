"""Memory traffic of contiguous aligned calls: the minimum, in 16-byte accesses, without bank conflicts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ptx.calls.randn import randn
from ptx.calls.step import ROWS, step
from ptx.calls.whole_tiles import BATCH, CASES, SHAPE, cases
from ptx.harness import DTYPES, Call, Device

pytestmark = pytest.mark.full  # test_every_op.py has each op once

# What one thread of a block reads for all of them: index, row, seed. Sectors of 32 bytes.
LOOKUP = 44


def tensors(call: Call) -> tuple[int, int]:
    """Bytes of the operands a kernel must read and of those it must write, each once."""
    size = call.batch * call.count
    reads = sum(size * t.element_size() for t in call.inputs.values())
    writes = sum(size * d.itemsize for d in call.outputs.values())
    return reads, writes


def check_traffic(call: Call, launch: dict[str, Any]) -> None:
    reads, writes = tensors(call)
    blocks = launch["grid"][0] * launch["grid"][1]
    lookups = blocks * LOOKUP if call.table is not None else 0
    warps = blocks * launch["block"][0] // 32
    if call.op in ("randn", "noise_sum", "step", "learned_step") and call.seeds is not None:
        lookups += warps  # the seed, read by each warp
    partials = {"loss": blocks, "variational": 2 * blocks, "step_logprob": blocks}.get(call.op, 0)
    # each byte once: sectors asked for by the warps = distinct sectors = the size of the tensors
    load, store, unique = launch["global_load"], launch["global_store"], launch["unique_sectors"]
    assert reads // 32 <= load["sectors"] <= reads // 32 + lookups
    assert writes // 32 <= store["sectors"] <= writes // 32 + partials
    assert (
        reads
        <= unique["read_bytes"]
        <= reads + 32 * (lookups if call.table is not None or call.seeds is not None else 0)
    )
    assert writes <= unique["write_bytes"] <= writes + 32 * partials
    # all of it 16 bytes at a time
    assert load["by_width"].get(16, {"accesses": 0})["accesses"] == reads // 16
    assert store["by_width"].get(16, {"accesses": 0})["accesses"] == writes // 16
    assert launch["shared"]["bank_conflicts"] == 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minimum(device: Device, dtype: torch.dtype, name: str) -> None:
    call = CASES[name]("contiguous", SHAPE, dtype)
    device.run(call)
    check_traffic(call, device.launches[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_channels_last_is_no_more(device: Device, dtype: torch.dtype) -> None:
    """Noise in channels_last goes through shared memory: global traffic is that of contiguous tensors."""
    for name, call in cases(dtype, "channels_last").items():
        if name == "step everything":
            continue
        device.run(call)
        launch = device.launches[0]
        reads, writes = tensors(call)
        for kind, size in (("global_load", reads), ("global_store", writes)):
            assert launch[kind]["by_width"].get(16, {"accesses": 0})["accesses"] == size // 16, name


def test_mixed_dtypes(device: Device) -> None:
    """A half precision model output beside a float32 state: 8-byte accesses of it, still each sector once."""
    call = step("contiguous", BATCH, SHAPE, torch.float32, ROWS["ddim"], m_dtype=torch.bfloat16)
    device.run(call)
    launch = device.launches[0]
    reads, writes = tensors(call)
    assert launch["global_load"]["sectors"] == reads // 32
    assert launch["global_store"]["sectors"] == writes // 32


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "misaligned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_noise_is_drawn_once(device: Device, dtype: torch.dtype, layout: str) -> None:
    """A quad takes two square roots, whatever the path."""
    channels = 4
    device.run(randn(layout, 1, (channels, 1024), dtype))
    stats = device.launches[0].stats
    drawn = sum(int(stats.thread_instr[i]) for i, ins in enumerate(stats.code) if ins.parts[0] == "sqrt") / 2
    quads = channels * 1024 / 4
    # a channel's run of elements may begin and end inside a quad of the tile
    assert quads <= drawn <= quads * (1 if layout != "channels_last" else 1.05)
