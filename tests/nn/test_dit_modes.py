"""The DiT where it is copied, stored, transformed, compiled and exported, and what its gradients keep."""

from __future__ import annotations

import copy
import pathlib
import pickle
from typing import Any

import pytest
import torch
from helpers.dit_cases import SMALL, dit, inputs
from torch import Tensor, nn

from diffkern import Diffusion, schedules
from diffkern.nn import DiT


def gradients(model: nn.Module, *given: Any) -> list[Tensor]:
    model.zero_grad()
    out = model(*given)
    out.square().sum().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-9


# ------------------------------------------------------------------------------------------------------------ gradients
def test_every_parameter_has_a_gradient_and_it_is_that_of_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = dit().train()
    found = gradients(model, *inputs())
    assert len(found) == 1 + len(list(model.parameters()))
    assert all(gradient.any() for gradient in found)
    monkeypatch.setattr("diffkern.nn.adaptive._lean", lambda *args: False)
    close(found, gradients(model.set_attention("torch"), *inputs()))


def test_checkpointing_keeps_the_gradients_and_less_than_half() -> None:
    model = dit().train()
    plain, kept = [], []
    for model.checkpointing in (False, True):
        size = [0]

        def pack(tensor: Tensor, size: list[int] = size) -> Tensor:
            size[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = model(*inputs())
        kept.append(size[0])
        out.square().sum().backward()
        plain.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*plain, strict=True))
    assert kept[1] < kept[0] / 2


def test_frozen_parts_have_no_gradient_and_leave_those_of_others() -> None:
    model = dit().train()
    _, *whole = gradients(model, *inputs())
    by_name = {name: g.clone() for (name, _), g in zip(model.named_parameters(), whole, strict=True)}
    for name, p in model.named_parameters():
        p.requires_grad_("qkv" in name)
    gradients(model, *inputs())
    for name, p in model.named_parameters():
        if "qkv" in name:
            assert p.grad is not None
            close([p.grad], [by_name[name]])


# --------------------------------------------------------------------------------------------- dtypes, transforms
def test_autocast_runs_in_bfloat16() -> None:
    model = dit().train()
    expected = gradients(model, *inputs())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*inputs())
    assert out.dtype == torch.bfloat16
    model.zero_grad()
    out.float().square().sum().backward()
    close([out.float()], expected[:1], 0.05)
    close([p.grad for p in model.parameters()], expected[1:], 0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_network_of_another_dtype(dtype: torch.dtype) -> None:
    x, t, cond = inputs()
    out = dit().to(dtype)(x.to(dtype), t, cond)
    assert out.dtype == dtype
    close([out.float()], [dit()(x, t, cond)], 0.05 if dtype == torch.bfloat16 else 1e-5)


def test_functional_call_and_gradients_of_each_sample() -> None:
    model = dit()
    x, t, cond = inputs()
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, parameters, (x[None], t[None], cond[None]))
        return out.square().sum()

    found = torch.vmap(torch.func.grad(loss), (None, 0, 0, 0))(parameters, x, t, cond)
    for b in range(3):
        _, *expected = gradients(model, x[b : b + 1], t[b : b + 1], cond[b : b + 1])
        close([found[name][b] for name in parameters], expected)


def test_vmap_over_networks() -> None:
    models = [dit(seed=seed) for seed in range(2)]
    parameters, buffers = torch.func.stack_module_state(models)
    x, t, cond = inputs()

    def call(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(models[0], (parameters, buffers), (x, t, cond))

    found = torch.vmap(call)(parameters, buffers)
    close([*found.detach()], [model(x, t, cond).detach() for model in models])


@pytest.mark.parametrize("grad", [False, True])
def test_vmap_over_times_alone_and_over_one_layer_alone(grad: bool) -> None:
    """What is mapped meets what is not in the middle of a block."""
    model = dit().requires_grad_(grad)
    x, t, cond = inputs()
    found = torch.vmap(lambda t, cond: model(x[:1], t[None], cond[None])[0])(t, cond)
    close([*found.detach()], [model(x[:1], t[b : b + 1], cond[b : b + 1])[0].detach() for b in range(3)])
    bias = torch.randn(2, 16)

    def call(bias: Tensor) -> Tensor:
        out: Tensor = torch.func.functional_call(model, {"blocks.0.mlp_leave.bias": bias}, (x, t, cond))
        return out

    close([*torch.vmap(call)(bias).detach()], [call(b).detach() for b in bias])


# -------------------------------------------------------------------------------------------------- copies and files
def test_copies_pickles_and_state_dicts_give_the_same_numbers() -> None:
    model = dit()
    given = inputs()
    out = model(*given)
    fresh = DiT(SMALL)
    fresh.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(other(*given), out)


def test_a_network_made_without_memory_takes_a_state_dict() -> None:
    model = dit()
    with torch.device("meta"):
        empty = DiT(SMALL)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(*inputs()), model(*inputs()))


@pytest.mark.parametrize("fields", [{}, {"image_size": (4, 8), "classes": 0, "own_embeddings": True}])
def test_diffusion_stores_it_and_builds_it_again(fields: dict[str, Any], tmp_path: pathlib.Path) -> None:
    model = dit(**fields)
    whole = Diffusion(model, schedules.linear(10))
    whole.save_pretrained(tmp_path)
    again = Diffusion.from_pretrained(tmp_path)
    assert isinstance(again.model, DiT)
    assert again.model.config == model.config
    x, t, cond = inputs(config=model.config)
    given = (x, t, cond) if model.config.classes else (x, t)
    assert torch.equal(again.model.eval()(*given), model(*given))


def test_the_other_attention_has_the_same_numbers() -> None:
    model = dit()
    out = model(*inputs())
    assert model.set_attention("torch").config.attention == "torch"
    torch.testing.assert_close(model(*inputs()), out)
    with pytest.raises(ValueError, match="attention must be one of diffkern, torch, got 'flash'"):
        model.set_attention("flash")  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------------- graphs
@pytest.mark.full
@pytest.mark.parametrize("size", [8, 4])
def test_compiled_whole_with_its_gradients(size: int) -> None:
    model = dit().train()
    given = [inputs()[0][..., :size], *inputs()[1:]]
    expected = gradients(model, *given)
    close(gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), *given), expected)


@pytest.mark.full
@pytest.mark.parametrize("attention", ["diffkern", "torch"])
def test_exported(attention: Any) -> None:
    model = dit().set_attention(attention)
    program = torch.export.export(model, inputs())
    torch.testing.assert_close(program.module()(*inputs()), model(*inputs()))


@pytest.mark.full
def test_onnx_with_the_attention_of_torch(tmp_path: pathlib.Path) -> None:
    onnx = pytest.importorskip("onnx", reason="pip install 'diffkern[onnx]'")
    pytest.importorskip("onnxscript", reason="pip install 'diffkern[onnx]'")
    from onnx.reference import ReferenceEvaluator

    model, file = dit(), tmp_path / "dit.onnx"
    given = inputs()
    expected = model(*given).detach()
    free: Any = {0: torch.export.Dim("batch")}
    torch.onnx.export(model.set_attention("torch"), given, file, dynamo=True, dynamic_shapes=(free, free, free))
    loaded = onnx.load(str(file))
    for batch in (3, 2):
        names = [value.name for value in loaded.graph.input]
        arrays = {name: x[:batch].numpy() for name, x in zip(names, given, strict=True)}
        found = torch.from_numpy(ReferenceEvaluator(loaded).run(None, arrays)[0])
        torch.testing.assert_close(found, expected[:batch], rtol=1e-5, atol=1e-5)
