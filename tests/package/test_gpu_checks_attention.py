"""The checks of attention on a GPU, without one: each passes on the CPU and fails where a result is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu import checks_attention as checks
from gpu.harness import HOST, Target
from helpers.attention_cases import FORMATS, LAYOUTS, inputs, qkv_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkern import ops

Check = Callable[[Target], None]
# Some of what a GPU gets: the same functions with fewer sizes.
CHECKS: dict[str, Check] = {
    "accuracy float32": lambda t: checks.check_attention(t, torch.float32, slice(0, 12, 3)),
    "accuracy float16": lambda t: checks.check_attention(t, torch.float16, slice(1, 12, 4)),
    "accuracy bfloat16": lambda t: checks.check_attention(t, torch.bfloat16, slice(2, 12, 4)),
    "spatial contiguous": lambda t: checks.check_spatial(t, torch.float32, "contiguous"),
    "spatial channels_last": lambda t: checks.check_spatial(t, torch.float16, "channels_last"),
    "batch": lambda t: checks.check_batch_and_repetition(t, torch.float32),
    "graphs": checks.check_graphs,
    "streams": checks.check_streams,
    "compile": lambda t: checks.check_compile(t, backend="aot_eager"),
}
OTHERS: dict[str, Check] = {
    "limits": checks.check_limits,
    "devices": lambda t: checks.check_devices_do_not_mix(t, torch.device("meta")),
    "opcheck": checks.check_opcheck,
}


@pytest.mark.parametrize("name", [*CHECKS, *OTHERS])
def test_passes_on_the_cpu(name: str) -> None:
    (CHECKS | OTHERS)[name](HOST)


class OneWrong(Target):
    """One number of every result is off by a tenth of the largest."""

    def fetch(self, t: Tensor) -> Tensor:
        result = super().fetch(t).contiguous()
        flat = result.view(-1)
        flat[flat.numel() // 2] += flat.abs().max() / 10
        return result


class Stale(Target):
    """Graphs do nothing when they are replayed."""

    def record(self, function: Callable[[], object]) -> Callable[[], None]:
        function()
        return lambda: None


@pytest.mark.parametrize("name", CHECKS)
def test_a_wrong_number_is_noticed(name: str) -> None:
    with pytest.raises(AssertionError, match=r"differ, first at|plain PyTorch"):
        CHECKS[name](OneWrong("cpu"))


def test_a_graph_that_does_nothing_is_noticed() -> None:
    with pytest.raises(AssertionError, match="differ, first at"):
        checks.check_graphs(Stale("cpu"))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_on_fake_cuda_tensors() -> None:
    """Shapes, strides and devices of a GPU's results, and no operand that was left behind."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for layout in LAYOUTS:
            q, k, v = (t.cuda() for t in inputs((2, 3, 9, 7, 16), torch.float16, (layout, "bnhd", layout)))
            out = ops.attention(q, k, v)
            assert out.is_cuda
            assert out.shape == q.shape
            with pytest.raises(
                RuntimeError, match=r"diffkern\.attention: v must be on the device of q \(cuda:0\), got cpu"
            ):
                ops.attention(q, k, v.cpu())
        for form in FORMATS:
            out = ops.spatial_attention(qkv_of((2, 96, 3, 4), torch.float16, form).cuda(), 2)
            assert out.is_cuda
            assert out.shape == (2, 32, 3, 4)
