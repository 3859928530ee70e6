"""patch on guided_diffusion itself: its UNet, loops and losses before and after."""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers import guided_diffusion_oracle as oracle
from helpers.guided_diffusion_patching import apart, cond_fn
from helpers.op_counter import EveryOp
from torch import Tensor

from diffkern.compat import guided_diffusion as ours
from diffkern.compat.guided_diffusion import patch, unpatch


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    unpatch()


@pytest.fixture
def original(monkeypatch: pytest.MonkeyPatch) -> Any:
    """guided_diffusion, imported as a user imports it but for its __init__."""
    if oracle.missing():
        pytest.skip("needs guided_diffusion (pip install --no-deps guided-diffusion-sdk)")
    package, loaded = ModuleType("guided_diffusion"), oracle.modules()
    package.__path__ = loaded.__path__
    monkeypatch.setitem(sys.modules, "guided_diffusion", package)
    for name in oracle.MODULES:
        setattr(package, name, getattr(loaded, name))
        monkeypatch.setitem(sys.modules, f"guided_diffusion.{name}", getattr(loaded, name))
    others = [f"guided_diffusion.{name}" for name in ("fp16_util", "logger", "unet", "script_util")]
    for name in others:
        monkeypatch.delitem(sys.modules, name, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("guided_diffusion.script_util")
    yield package
    unpatch()
    for name in others:
        sys.modules.pop(name, None)


def unet_and_diffusion(original: Any, **options: Any) -> tuple[Any, Any]:
    """The original's own making of a small UNet, its silent layers woken up, and of a diffusion."""
    arguments = original.script_util.model_and_diffusion_defaults() | {
        "image_size": 16,
        "num_channels": 32,
        "num_res_blocks": 1,
        "num_heads": 4,
        "attention_resolutions": "16,8",
        "channel_mult": "1,2",
        "diffusion_steps": 100,
        "timestep_respacing": "10",
        **options,
    }
    model, diffusion = original.script_util.create_model_and_diffusion(**arguments)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.eval(), diffusion


def original_run(diffusion: Any, loop: str, model: Any, **options: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return getattr(diffusion, loop)(model, (2, 3, 16, 16), device="cpu", **options), torch.rand(2)


def test_original_parts(original: Any) -> None:
    """Layers and helpers one by one, not patched."""
    for name in ("QKVAttention", "QKVAttentionLegacy"):
        for heads, dim, length in ((4, 8, 16), (1, 64, 49), (2, 40, 64), (8, 256, 4), (1, 512, 9)):
            qkv = torch.randn(2, 3 * heads * dim, length, generator=torch.Generator().manual_seed(5))
            want = getattr(original.unet, name)(heads)(qkv)
            assert apart(getattr(ours, name)(heads)(qkv), want) <= 2e-6
    t = torch.tensor([0.0, 17.25, 999.0])
    for dim in (32, 33):
        assert torch.equal(ours.timestep_embedding(t, dim), original.nn.timestep_embedding(t, dim))
    x = torch.randn(3, 2, 5)
    assert torch.equal(ours.mean_flat(x), original.nn.mean_flat(x))


@pytest.mark.parametrize("new_order", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_fp16": True}, {"num_heads": 16}], ids=str)
def test_original_unet(original: Any, new_order: bool, options: dict[str, Any]) -> None:
    """The same output before and after, for a network that exists; heads of 4 channels run on torch's attention."""
    model, _ = unet_and_diffusion(original, use_new_attention_order=new_order, learn_sigma=True, **options)
    if options.get("use_fp16"):
        model.convert_to_fp16()
    x, t = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(2)), torch.tensor([3, 77])
    with torch.no_grad():
        want = model(x, t)
        assert patch().replaced
        with EveryOp() as counted, warnings.catch_warnings():
            warnings.simplefilter("ignore" if options.get("num_heads") else "error")
            found = model(x, t)
    layers = sum(isinstance(m, original.unet.QKVAttention | original.unet.QKVAttentionLegacy) for m in model.modules())
    assert layers >= 5
    if not options.get("num_heads"):
        assert counted.counts["diffkern.spatial_attention"] == layers
    assert found.dtype == want.dtype
    assert apart(found, want) <= (2e-2 if options.get("use_fp16") else 2e-6)


DIFFUSIONS: list[dict[str, Any]] = [{}, {"learn_sigma": True}, {"predict_xstart": True, "rescale_timesteps": True}]


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"learn_sigma": True}, {"predict_xstart": True, "rescale_timesteps": True}], ids=str
)
@pytest.mark.parametrize("loop", ["p_sample_loop", "ddim_sample_loop"])
def test_original_loops(original: Any, loop: str, options: dict[str, Any], guided: bool) -> None:
    """Whole loops of the library, patched and not: the same images, and the generator where it was."""
    model, before = unet_and_diffusion(original, **options)
    more: dict[str, Any] = {"cond_fn": cond_fn, "model_kwargs": {}} if guided else {}
    more["noise"] = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    want, state = original_run(before, loop, model, **more)
    # A random network enlarges roundings: by what it makes of one in the start.
    moved, _ = original_run(before, loop, model, **more | {"noise": more["noise"] * (1 + 2**-23)})
    bound = max(2e-6 * before.num_timesteps, 2 * apart(moved, want))
    assert bound <= 1e-3
    patch()
    after = unet_and_diffusion(original, **options)[1]
    for diffusion in (before, after):
        found, state_found = original_run(diffusion, loop, model, **more)
        assert apart(found, want) <= bound
        assert torch.equal(state_found, state)
    unpatch()
    assert torch.equal(original_run(after, loop, model, **more)[0], want)


def test_original_report(original: Any) -> None:
    report = patch()
    assert report.package == "guided_diffusion"
    replaced = {change.name.removeprefix("guided_diffusion.") for change in report.replaced}
    methods = (
        "q_sample",
        "p_mean_variance",
        "p_sample",
        "p_sample_loop",
        "ddim_sample",
        "training_losses",
        "calc_bpd_loop",
    )
    assert {f"gaussian_diffusion.GaussianDiffusion.{name}" for name in methods} <= replaced
    assert {"unet.QKVAttention.forward", "unet.QKVAttentionLegacy.forward", "nn.timestep_embedding"} <= replaced
    assert all(change.reason == "diffkern has no method of this name" for change in report.kept)
    ddim = next(change for change in report if change.name.endswith("GaussianDiffusion.ddim_sample"))
    assert ddim.note == ("calls with cond_fn run on the original" if oracle.is_fork() else None)


def test_original_losses(original: Any) -> None:
    model, diffusion = unet_and_diffusion(original, learn_sigma=True, rescale_learned_sigmas=True)
    x, t = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1, torch.tensor([0, 4, 9])
    found = []
    for done in (lambda: None, patch):
        done()
        torch.manual_seed(1)
        terms = diffusion.training_losses(model, x, t)
        model.zero_grad()
        terms["loss"].mean().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found.append((terms, grads))
    (want, want_grads), (mine, grads) = found
    assert mine.keys() == want.keys() == {"loss", "mse", "vb"}
    for name in want:
        torch.testing.assert_close(mine[name], want[name], rtol=2e-5, atol=1e-6)
    assert apart(grads, want_grads) <= 1e-4
