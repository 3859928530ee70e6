"""What a replaced network lives through: LoRA, hooks, offloading, new weights, copies, files, compilation."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lazy import Lazy, needs
from helpers.op_counter import CountOps
from helpers.replaced_networks import NETWORKS, network
from torch import Tensor, nn

pytestmark = needs("diffusers")
diffusers, ours = Lazy("diffusers"), Lazy("diffkern.compat.diffusers")
resnet, attention = Lazy("diffusers.models.resnet"), Lazy("diffusers.models.attention")
LAST = torch.channels_last


def close(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-5 * b.abs().max())


def state(model: nn.Module) -> list[Any]:
    """Everything that restore has to bring back: objects, classes, processors, weights, where they lie."""
    parts: list[Any] = []
    for name, module in model.named_modules():
        parts += [name, id(module), type(module), sorted(module.__dict__), id(getattr(module, "processor", None))]
    for name, parameter in model.named_parameters():
        parts += [name, id(parameter), parameter.stride(), parameter.detach().flatten().tolist()]
    return parts


@pytest.mark.parametrize("name", NETWORKS)
@torch.no_grad()
def test_restore_brings_back_the_very_objects_and_bits(name: str) -> None:
    model, call = network(name)
    before, there = call(model, torch.float32), state(model)
    keys = list(model.state_dict())
    swapped = len(ours.replace(model).swapped)
    assert list(model.state_dict()) == keys
    assert all(p.is_contiguous(memory_format=LAST) for p in model.parameters() if p.dim() == 4)
    assert len(ours.restore(model).swapped) == swapped
    assert state(model) == there
    assert torch.equal(call(model, torch.float32), before)


def test_twice_is_once() -> None:
    model, _ = network("sd1")
    there = state(model)
    ours.replace(model)
    again = ours.replace(model)
    assert not again.swapped
    assert {swap.reason for swap in again} == {"it is diffkern's already"}
    ours.restore(model)
    assert state(model) == there
    assert not ours.restore(model)


def test_weights_that_were_channels_last_stay_so() -> None:
    model, _ = network("ddpm")
    model.to(memory_format=LAST)
    strides = [p.stride() for p in model.parameters()]
    ours.replace(model)
    ours.restore(model)
    assert [p.stride() for p in model.parameters()] == strides


class Lora(nn.Module):
    """A linear layer or 1 x 1 convolution with a low-rank update, as peft's stand in the layer's place."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer = base
        self.weight, self.bias = nn.Parameter(torch.full_like(base.weight, torch.nan)), base.bias  # not to be read
        rows, columns = base.weight.shape[:2]
        self.a, self.b = (nn.Parameter(torch.randn(n)) for n in ((2, columns), (rows, 2)))

    def forward(self, x: Tensor) -> Tensor:
        if self.base_layer.weight.dim() == 2:
            return self.base_layer(x) + 0.1 * x @ self.a.T @ self.b.T  # type: ignore[no-any-return]
        return self.base_layer(x) + 0.1 * torch.einsum("bchw,rc,or->bohw", x, self.a, self.b)  # type: ignore[no-any-return]


@pytest.mark.parametrize("first", [True, False], ids=["before replace", "after it"])
@torch.no_grad()
def test_layers_of_lora_are_called(first: bool) -> None:
    model, call = network("sd1")
    if not first:
        ours.replace(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            pointwise = isinstance(child, nn.Conv2d) and child.kernel_size == (1, 1)
            if (pointwise or isinstance(child, nn.Linear)) and not isinstance(module, Lora):
                setattr(module, name, Lora(child))
    if first:
        plain = copy.deepcopy(model)
        ours.replace(model)
    else:
        ours.restore(plain := copy.deepcopy(model))
    wanted = call(plain, torch.float32)
    assert torch.isfinite(wanted).all()
    assert close(call(model, torch.float32), wanted)
    parameters = [p for name, p in model.named_parameters() if name.endswith((".a", ".b"))]
    with torch.enable_grad():
        grads = torch.autograd.grad(call(model, torch.float32).sum(), parameters)
    assert all(torch.isfinite(g).all() and g.any() for g in grads)


@torch.no_grad()
def test_lora_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model, call = network("sd1")
    ours.replace(model)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "proj"]
    model.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
    ours.restore(plain := copy.deepcopy(model))
    assert close(call(model, torch.float32), call(plain, torch.float32))


@pytest.mark.parametrize("name", ["sd1", "dit"])
@torch.no_grad()
def test_hooks_of_every_layer_inside_are_called_and_see_what_they_saw(name: str) -> None:
    model, call = network(name)
    plain = copy.deepcopy(model)
    ours.replace(model)
    seen: list[dict[str, Tensor]] = []
    for network_ in (model, plain):
        outputs: dict[str, Tensor] = {}
        seen.append(outputs)
        for layer, module in network_.named_modules():
            keep = functools.partial(lambda n, store, m, args, out: store.__setitem__(n, out), layer, outputs)
            module.register_forward_hook(keep)
        call(network_, torch.float32)
    assert list(seen[0]) == list(seen[1])
    for layer, wanted in seen[1].items():
        if isinstance(wanted, Tensor):
            assert (seen[0][layer] - wanted).abs().max() < 2e-5 * wanted.abs().max() + 1e-6, layer


@torch.no_grad()
def test_a_hook_changes_what_a_norm_returns() -> None:
    model, call = network("ddpm")
    plain = copy.deepcopy(model)
    ours.replace(model)
    for network_ in (model, plain):
        network_.mid_block.resnets[0].norm1.register_forward_hook(lambda m, args, out: 2 * out)
    assert close(call(model, torch.float32), call(plain, torch.float32))


def offload(module: Any) -> None:
    """As accelerate's hooks: a forward on the object, and the weights elsewhere but while it runs."""
    old, weights = module.forward, {n: p.data for n, p in module.named_parameters(recurse=False)}

    def forward(*args: Any, **kwargs: Any) -> Any:
        for name, data in weights.items():
            getattr(module, name).data = data
        try:
            return old(*args, **kwargs)
        finally:
            away()

    def away() -> None:
        for name in weights:
            getattr(module, name).data = torch.full_like(weights[name], torch.nan)

    away()
    module._old_forward, module.forward = old, forward


@torch.no_grad()
def test_offloading_of_the_layers() -> None:
    model, call = network("sd1")
    wanted = call(model, torch.float32)
    ours.replace(model)
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            offload(module)
    assert close(call(model, torch.float32), wanted)


@torch.no_grad()
def test_offloading_of_a_block_before_leaves_it_alone() -> None:
    model, call = network("sd1")
    wanted = call(model, torch.float32)
    block = model.mid_block.resnets[0]
    offload(block)
    report = ours.replace(model)
    (kept,) = report.kept
    assert kept.layer == "mid_block.resnets.0"
    assert type(block) is resnet.ResnetBlock2D
    reason = "it has a forward of its own, as offloading hooks put there: call replace before them"
    assert f"UNet2DConditionModel: ResnetBlock2D kept: {reason} in 1 block" in str(report)
    assert "ResnetBlock2D -> diffkern's ResnetBlock2D in 7 blocks" in str(report)
    assert close(call(model, torch.float32), wanted)


@torch.no_grad()
def test_blocks_that_may_compute_anything_are_left_alone() -> None:
    class Mine(resnet.ResnetBlock2D):  # type: ignore[misc, name-defined]
        pass

    blocks = nn.ModuleList(
        [
            Mine(in_channels=8, groups=4),
            attention.BasicTransformerBlock(8, 1, 8, norm_type="ada_norm", num_embeds_ada_norm=4),
            resnet.ResnetBlockCondNorm2D(in_channels=8, groups=4),
        ]
    )
    reasons = {swap.before.rpartition(".")[2]: swap.reason for swap in ours.replace(blocks).kept}
    assert reasons["Mine"] == "Mine is not the class of diffusers or torch that is known here, and may compute anything"
    assert "norm_type ada_norm" in str(reasons["BasicTransformerBlock"])
    assert "ada_group" in str(reasons["ResnetBlockCondNorm2D"])


@torch.no_grad()
def test_weights_loaded_and_moved_later_are_used() -> None:
    model, call = network("sd1")
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.mul_(1.1)
    ours.replace(model)
    model.load_state_dict(other.state_dict())
    assert close(call(model, torch.float32), call(other, torch.float32))
    model.to(torch.float64)
    assert close(call(model, torch.float64), call(other.double(), torch.float64))


@torch.no_grad()
def test_copies_and_pickles_are_replaced_and_can_be_restored() -> None:
    model, call = network("ddpm")
    plain = call(model, torch.float32)
    ours.replace(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with CountOps(()) as count:
            assert close(call(other, torch.float32), plain)
        assert count.fused["group_norm_act"] > 0
        ours.restore(other)
        assert torch.equal(call(other, torch.float32), plain)
        assert all(p.is_contiguous() for p in other.parameters())
    assert type(model.mid_block.resnets[0]).__module__.startswith("diffkern")


@torch.no_grad()
def test_a_saved_network_loads_without_diffkern(tmp_path: Path) -> None:
    model, call = network("sd1")
    plain = call(model, torch.float32)
    ours.replace(model)
    model.save_pretrained(tmp_path)
    assert "diffkern" not in (tmp_path / "config.json").read_text()
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded) is diffusers.UNet2DConditionModel
    assert not [m for m in loaded.modules() if type(m).__module__.startswith("diffkern")]
    assert torch.equal(call(loaded.eval(), torch.float32), plain)


def test_checkpointing_has_equal_gradients() -> None:
    model, call = network("sd1")
    ours.replace(model)
    model.train()

    def gradients() -> list[Tensor]:
        return list(torch.autograd.grad(call(model, torch.float32).square().mean(), list(model.parameters())))

    plain = gradients()
    model.enable_gradient_checkpointing()
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_autocast_is_as_exact_as_before() -> None:
    model, call = network("sd1")
    exact = call(model, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        before = call(model, torch.float32)
        ours.replace(model)
        after = call(model, torch.float32)
    assert after.dtype == before.dtype
    assert (after.float() - exact).abs().mean() < 1.2 * (before.float() - exact).abs().mean()


@torch.no_grad()
def test_a_device_without_kernels_runs_on_diffusers_code() -> None:
    for name in ("sd1", "ddpm", "dit"):
        model, _ = network(name)
        ours.replace(model.to("meta"))
        with torch.device("meta"):
            x, t = torch.empty(2, model.config.in_channels, 8, 8), torch.empty(2, dtype=torch.long)
            more = {"sd1": (torch.empty(2, 7, 24),), "dit": (t,)}.get(name, ())
        shape = (2, model.config.out_channels, 8, 8)
        assert model(x, t, *more).sample.shape == shape


@pytest.mark.full
@pytest.mark.parametrize("name", ["sd1", "adm", "dit"])
@torch.no_grad()
def test_compiles_without_a_break(name: str) -> None:
    model, call = network(name)
    ours.replace(model)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    compiled = call(model, torch.float32)
    del model.forward
    assert close(compiled, call(model, torch.float32))


def test_accelerate_replaces_networks_where_it_is_asked() -> None:
    unet, _ = network("ddpm")
    pipe = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler())
    there = state(unet)
    assert not [s for s in ours.accelerate(pipe) if s.before.endswith(".ResnetBlock2D")]
    report = ours.accelerate(pipe, networks=True)
    blocks = [s for s in report.swapped if s.component == "unet"]
    assert {"mid_block.resnets.0", "conv_norm_out", "conv_out", "up_blocks.0.upsamplers.0"} <= {s.layer for s in blocks}
    ours.restore(pipe)
    assert state(unet) == there


def test_only_modules_are_taken() -> None:
    with pytest.raises(TypeError, match="model must be a network of diffusers, got int"):
        ours.replace(3)
    assert str(ours.replace(nn.Linear(1, 1))).startswith("nothing to swap: ")
