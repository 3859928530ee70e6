"""PTX of the other architectures, once each, and what all PTX must have: a rounding on every floating operation."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import ptxsim
import pytest
import torch
from ptx.calls.learned_step import ROWS as LEARNED_ROWS
from ptx.calls.learned_step import learned_step
from ptx.calls.loss import loss
from ptx.calls.noising import noising
from ptx.calls.randn import randn
from ptx.calls.step import ROWS, step, wanted
from ptx.calls.step_logprob import density
from ptx.harness import DTYPES, Cpu, Device, check

pytestmark = pytest.mark.full  # test_every_op.py has each op once

ARCHITECTURES = ("sm_75", "sm_80", "sm_120")


def test_sm_90_has_the_code_of_sm_80(device_of: Callable[[str], Device]) -> None:
    """Which is why the other files run sm_80 alone. Code of its own: sm_90 to ARCHITECTURES of conftest.py."""
    for older, newer in zip(device_of("sm_80").modules, device_of("sm_90").modules, strict=True):
        assert newer.text.replace(".target sm_90", ".target sm_80") == older.text


# Three quarters of a minute each: the oldest and the newest in CI.
@pytest.mark.parametrize("arch", ["sm_75", pytest.param("sm_80", marks=pytest.mark.long), "sm_120"])
def test_every_operation_carries_its_rounding(device_of: Callable[[str], Device], arch: str) -> None:
    for module in device_of(arch).modules:
        assert ptxsim.unrounded(module) == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_approximate_instructions(device_of: Callable[[str], Device], arch: str) -> None:
    for module in device_of(arch).modules:
        assert ".approx" not in module.text
        assert ".ftz" not in module.text


def spilled(text: str, arch: str, folder: Path) -> dict[str, int]:
    """Bytes by kernel that ptxas stores to local memory for want of registers, and loads again."""
    ptx = folder / "kernels.ptx"
    ptx.write_text(text)
    command = ["nvcc", "-cubin", f"-arch={arch}", "-Xptxas", "-v", str(ptx), "-o", str(folder / "kernels.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kernels = (done.stdout + done.stderr).split("Compiling entry function '")[1:]
    return {k.split("'", 1)[0]: sum(map(int, re.findall(r"(\d+) bytes spill", k))) for k in kernels}


def test_kernels_of_layers_keep_all_in_registers(device_of: Callable[[str], Device], tmp_path: Path) -> None:
    """ptxas for sm_90, which spills soonest; docs/gpu-report.md has every kernel on every architecture."""
    device = device_of("sm_80")
    for file, module in zip(device.files, device.modules, strict=True):
        if file.name in ("group_norm.cu", "group_norm_grad.cu", "linear_rows.cu"):
            found = spilled(module.text, "sm_90", tmp_path)
            assert len(found) == len(module.kernels)
            assert not any(found.values()), found


@pytest.mark.parametrize("arch", ["sm_75", "sm_120"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_architectures(device_of: Callable[[str], Device], cpu: Cpu, arch: str, dtype: torch.dtype) -> None:
    device = device_of(arch)
    for layout in ("contiguous", "channels_last", "misaligned", "strided"):
        shape = (4, 67)
        check(device, cpu, randn(layout, 2, shape, dtype))
        check(device, cpu, noising(layout, 2, shape, dtype, special=True))
        check(device, cpu, loss(layout, 2, shape, dtype, pred_dtype=torch.float16))
        outputs = wanted(dtype, torch.bfloat16, 2)
        call = step(layout, 2, shape, dtype, ROWS["everything"], mask_dtype=dtype, outputs=outputs, special=True)
        check(device, cpu, call)
        check(device, cpu, learned_step(layout, 2, shape, dtype, LEARNED_ROWS["masked"], mask_dtype=dtype))
        check(device, cpu, step(layout, 2, shape, dtype, ROWS["ddim"], m_dtype=torch.float32))
        check(device, cpu, density(layout, 2, shape, dtype, m_dtype=torch.float16, learned=layout != "strided"))
