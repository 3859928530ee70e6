"""torch.compile and torch.library.opcheck on CUDA tensors."""

from __future__ import annotations

from typing import Any

import pytest
from gpu import checks_compile as checks
from gpu.harness import Target

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    "options",
    [{"backend": "aot_eager"}, {"backend": "inductor"}, {"mode": "reduce-overhead"}],
    ids=["aot_eager", "inductor", "reduce-overhead"],
)
def test_one_graph_with_the_bits_of_the_cpu(gpu: Target, options: dict[str, Any]) -> None:
    checks.check_compile(gpu, **options)


def test_opcheck(gpu: Target) -> None:
    checks.check_opcheck(gpu)
