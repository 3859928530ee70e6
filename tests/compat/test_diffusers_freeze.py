"""A pipeline whose networks are replaced and frozen: the same images, whatever comes meanwhile."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from helpers.lazy import Lazy, needs
from torch import Tensor, nn

from diffkern import _load
from diffkern.nn import convolution, freeze

pytestmark = [
    needs("diffusers"),
    pytest.mark.skipif(_load.build_info().get("isa") == "scalar", reason="needs a processor with AVX2"),
]
diffusers, ours = Lazy("diffusers"), Lazy("diffkern.compat.diffusers")


def pipeline() -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 32),
        norm_num_groups=8,
        layers_per_block=1,
        add_attention=False,
        **blocks,
    )
    pipe = diffusers.DDIMPipeline(unet.eval(), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    made = pipe(batch_size=1, generator=generator, num_inference_steps=3, output_type="np").images
    return torch.from_numpy(made)


@pytest.fixture
def pipe() -> Any:
    made = pipeline()
    ours.accelerate(made, networks=True)
    return made


def test_images_have_the_same_bits_frozen_or_not(pipe: Any) -> None:
    wanted = images(pipe)
    with freeze(pipe.unet) as frozen:
        assert torch.equal(images(pipe), wanted)
        size = frozen.bytes
        assert size > 8 * 4 * 16 * 64 * 32, "eight layers and more"
        assert torch.equal(images(pipe), wanted)
        assert frozen.bytes == size
    assert torch.equal(images(pipe), wanted)
    assert (wanted - images(pipeline())).abs().max() < 1e-4


def test_a_replaced_network_may_be_frozen_before_and_restored_meanwhile() -> None:
    pipe = pipeline()
    original = images(pipe)
    with freeze(pipe.unet) as frozen:
        assert torch.equal(images(pipe), original)
        assert frozen.bytes == 0, "diffusers' own code"
        ours.replace(pipe.unet)
        replaced = images(pipe)
        assert frozen.bytes > 0
        ours.restore(pipe.unet)
        assert torch.equal(images(pipe), original)
        ours.replace(pipe.unet)
        assert torch.equal(images(pipe), replaced)


class Lora(nn.Conv2d):
    """A convolution with a low-rank update, as peft's in the layer's place."""

    def __init__(self, base: nn.Conv2d) -> None:
        super().__init__(base.in_channels, base.out_channels, 3, padding=1)
        self.weight, self.bias = base.weight, base.bias
        self.a, self.b = nn.Conv2d(base.in_channels, 2, 3, padding=1), nn.Conv2d(2, base.out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x) + self.b(self.a(x))
        return out


def with_lora(unet: Any) -> None:
    torch.manual_seed(2)
    for block in [unet.mid_block.resnets[0], unet.up_blocks[0].resnets[0]]:
        block.conv1, block.conv2 = Lora(block.conv1), Lora(block.conv2)
    unet.up_blocks[0].upsamplers[0].conv = Lora(unet.up_blocks[0].upsamplers[0].conv)


def test_lora_that_comes_while_frozen_is_called_and_leaves_again(pipe: Any) -> None:
    before, other = images(pipe), copy.deepcopy(pipe.unet)
    with freeze(pipe.unet):
        images(pipe)
        layers = dict(pipe.unet.named_modules())
        with_lora(pipe.unet)
        after = images(pipe)
        for name, layer in pipe.unet.named_modules():
            if isinstance(layer, Lora):
                pipe.unet.set_submodule(name, layers[name])
        assert torch.equal(images(pipe), before)
    with_lora(other)
    pipe.unet = other
    assert torch.equal(after, images(pipe))
    assert not torch.equal(after, before)


def test_lora_fused_into_the_weights_counts(pipe: Any) -> None:
    """Put in their place it is seen; added through ``.data``, as peft does, after thawing."""
    before, conv = images(pipe), pipe.unet.mid_block.resnets[0].conv1
    with freeze(pipe.unet):
        images(pipe)
        conv.weight.data = 1.5 * conv.weight.data
        after = images(pipe)
    assert torch.equal(after, images(pipe))
    assert not torch.equal(after, before)
    conv.weight.data += 0.1
    with freeze(pipe.unet):
        merged = images(pipe)
    assert torch.equal(merged, images(pipe))
    assert not torch.equal(merged, after)


def away(module: Any) -> dict[str, Tensor]:
    """As accelerate's hooks: the weights elsewhere; returns what they were."""
    there = {name: p.data for name, p in module.named_parameters(recurse=False)}
    for name, data in there.items():
        getattr(module, name).data = torch.full_like(data, float("nan"))
    return there


def test_offloaded_between_calls(pipe: Any) -> None:
    """The weights come back in other memory, and the packed ones do not keep those that went."""
    with freeze(pipe.unet) as frozen:
        before = images(pipe)
        size = frozen.bytes
        for factor in (1.0, 1.25):
            for module in pipe.unet.modules():
                kept = away(module)
                for name, data in kept.items():
                    getattr(module, name).data = factor * data
            after = images(pipe)
            assert torch.equal(after, before) == (factor == 1.0)
            assert frozen.bytes == size
    assert torch.equal(after, images(pipe))


def test_hooks_of_accelerate(pipe: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    before = images(pipe)
    with freeze(pipe.unet):
        images(pipe)
        accelerate.cpu_offload(pipe.unet, torch.device("cpu"))
        assert (images(pipe) - before).abs().max() < 1e-4
        accelerate.hooks.remove_hook_from_submodules(pipe.unet)  # leaves each a forward of its own
        assert (images(pipe) - before).abs().max() < 1e-4


def test_copies_of_a_frozen_network_are_not(pipe: Any) -> None:
    wanted = images(pipe)
    with freeze(pipe.unet):
        images(pipe)
        pipe.unet, kept = copy.deepcopy(pipe.unet), pipe.unet
        assert pipe.unet.mid_block.resnets[0].conv1 not in convolution._frozen
        assert kept.mid_block.resnets[0].conv1 in convolution._frozen
        assert torch.equal(images(pipe), wanted)
