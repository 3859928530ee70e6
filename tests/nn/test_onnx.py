"""A UNet goes through torch.onnx.export, and ONNX's own evaluator gives its numbers."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import pytest
import torch

from diffkern.nn import SpatialCrossAttention, UNet, UNetConfig

onnx = pytest.importorskip("onnx", reason="pip install 'diffkern[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'diffkern[onnx]'")
pytestmark = pytest.mark.full


def network() -> UNet:
    torch.manual_seed(0)
    model = UNet(UNetConfig(channels=8, blocks=1, heads=2, embedding=16)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def batch(size: int) -> tuple[torch.Tensor, ...]:
    return torch.randn(size, 1, 8, 8), torch.linspace(3.0, 800.0, size), torch.arange(size) % 11


def evaluated(path: pathlib.Path, *inputs: torch.Tensor) -> torch.Tensor:
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(str(path))
    names = [value.name for value in model.graph.input]
    given = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
    return torch.from_numpy(ReferenceEvaluator(model).run(None, given)[0])


def test_a_unet_and_any_batch(tmp_path: pathlib.Path) -> None:
    model, file = network().set_attention("torch"), tmp_path / "unet.onnx"
    free: Any = {0: torch.export.Dim("batch")}
    torch.onnx.export(model, batch(2), file, dynamo=True, dynamic_shapes=(free, free, free))
    for size in (2, 5):
        x, t, cond = batch(size)
        expected = network()(x, t, cond)  # by diffkern's kernels
        torch.testing.assert_close(evaluated(file, x, t, cond), expected, rtol=1e-5, atol=1e-5)


def test_the_documented_example(root: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last code of docs/attention.md, with a smaller network."""
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", (root / "docs" / "attention.md").read_text(), re.S)[-1]
    assert code.count("UNetConfig()") == 1
    names: dict[str, Any] = {}
    exec(code.replace("UNetConfig()", "UNetConfig(channels=8, blocks=1, heads=2, embedding=16)"), names)
    x, t, cond = batch(3)
    assert evaluated(tmp_path / "unet.onnx", x, t, cond).shape == names["network"](x, t, cond).shape


def test_cross_attention(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    block, file = SpatialCrossAttention(32, 24, 2).eval(), tmp_path / "block.onnx"
    torch.nn.init.normal_(block.proj_out.weight)
    x, context = torch.randn(2, 32, 4, 5), torch.randn(2, 7, 24)
    expected = block(x, context)
    block.attention = "torch"
    torch.onnx.export(block, (x, context), file, dynamo=True)
    torch.testing.assert_close(evaluated(file, x, context), expected, rtol=1e-5, atol=1e-5)


def test_the_way_out_is_said() -> None:
    said = r'attention must be "torch" in a network that is exported to ONNX, .*got "diffkern": call set_attention'
    with pytest.raises(Exception, match=said):
        torch.onnx.export(network(), batch(2), dynamo=True)
    block = SpatialCrossAttention(32, 24, 2).eval()
    with pytest.raises(Exception, match=said):
        torch.onnx.export(block, (torch.randn(2, 32, 4, 5), torch.randn(2, 7, 24)), dynamo=True)
    assert torch.export.export(network(), batch(2)) is not None  # torch.export itself takes diffkern's ops
