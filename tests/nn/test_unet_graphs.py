"""A UNet as a graph (compiled whole, exported, ONNX) and in two processes."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from helpers.lazy import needs
from helpers.unet_cases import OPTIONS, awake, config, inputs
from torch import Tensor, nn

from diffkern.nn import UNet

pytestmark = pytest.mark.full
SHORT = {"multipliers": (1, 1), "attention_levels": (), "heads": 1}  # with attention in the middle alone
CASES: dict[str, dict[str, Any]] = {
    "adaptive group norm": SHORT,
    "transformer, classes": {**SHORT, **OPTIONS["transformer"], "classes": 5, "modulation": "add", "resample": "conv"},
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def gradients(network: nn.Module, run: Any, *given: Any) -> list[Tensor]:
    network.zero_grad()
    run(*given).square().mean().backward()
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in network.parameters()]


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES)
def test_compiled_whole_with_its_gradients(changes: dict[str, Any]) -> None:
    network = awake(config(**changes))
    given = inputs(network.config)
    run = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(*given), network(*given), rtol=1e-5, atol=1e-5)
    for one, expected in zip(gradients(network, run, *given), gradients(network, network, *given), strict=True):
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.long
def test_compiled_by_inductor_for_any_batch_and_size() -> None:
    network = awake(config(**SHORT))
    run = torch.compile(network, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, size in ((2, 8), (3, 12)):
            given = inputs(network.config, batch, size)
            torch.testing.assert_close(run(*given), network(*given), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "attention"), [("transformer, classes", "diffkern"), ("adaptive group norm", "torch")]
)
def test_exported_for_any_batch(name: str, attention: Any) -> None:
    network = awake(config(**CASES[name])).set_attention(attention)
    x, t, cond = inputs(network.config)
    batch = {0: torch.export.Dim("batch")}
    parts = None if cond is None else dict.fromkeys(cond, batch)
    program = torch.export.export(network, (x, t, cond), dynamic_shapes=(batch, batch, parts))
    again = inputs(network.config, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(*again), network(*again), rtol=1e-5, atol=1e-5)


@needs("onnx", "onnxscript")
def test_onnx_with_torchs_kernels(tmp_path: pathlib.Path) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    network = awake(config(**CASES["transformer, classes"]))
    x, t, cond = inputs(network.config)
    with torch.no_grad():
        expected = network(x, t, cond)
    network.set_attention("torch")
    torch.onnx.export(network, (x, t), tmp_path / "unet.onnx", kwargs={"cond": cond}, dynamo=True)
    model = onnx.load(str(tmp_path / "unet.onnx"))
    names = [value.name for value in model.graph.input]
    values = [part.numpy() for part in (x, t, *(cond or {}).values())]
    found = ReferenceEvaluator(model).run(None, dict(zip(names, values, strict=True)))[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------- two processes
def test_two_processes_have_the_gradients_of_one(tmp_path: pathlib.Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen([sys.executable, __file__, str(tmp_path), str(rank)], stderr=subprocess.PIPE, env=environment)
        for rank in (0, 1)
    ]
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors.decode()[-2000:]
    network, given = shared()
    expected = gradients(network, network, *given)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    for first, second, value in zip(*found, expected, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, value, rtol=1e-5, atol=1e-6 * float(value.abs().max() + 1))


def shared() -> tuple[UNet, tuple[Any, ...]]:
    """The network and the whole batch, the same in every process."""
    torch.manual_seed(0)
    network = awake(config(**CASES["transformer, classes"])).train()
    return network, inputs(network.config, batch=4)


def half(value: Any, rank: int) -> Any:
    if isinstance(value, dict):
        return {name: half(part, rank) for name, part in value.items()}
    return value[2 * rank : 2 * rank + 2]


def process(folder: pathlib.Path, rank: int) -> None:
    """One of the two: its half of the batch, gradients averaged over both."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    network, given = shared()
    parallel = nn.parallel.DistributedDataParallel(network)
    torch.save(gradients(network, parallel, *(half(value, rank) for value in given)), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    process(pathlib.Path(sys.argv[1]), int(sys.argv[2]))
