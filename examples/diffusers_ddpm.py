"""diffusers' DDPMPipeline before and after `accelerate`: the same images from the same seed, one op a step.

    python examples/diffusers_ddpm.py [--size 32] [--steps 20] [--batch 2] [--device cpu]

A UNet2DModel with random weights: nothing is downloaded.
"""

from __future__ import annotations

import argparse

import torch
from common import before_and_after, update_time
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from torch import Tensor

from diffkern.compat.diffusers import accelerate, restore


def make(size: int, device: str = "cpu") -> DDPMPipeline:
    """A pipeline with a tiny UNet: attention with heads of 8 channels, as UNet2DModel has by default."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=size,
        block_out_channels=(32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    pipe = DDPMPipeline(unet.eval(), DDPMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def sample(pipe: DDPMPipeline, batch: int, steps: int) -> Tensor:
    """Images in [0, 1], [B, H, W, C], always from the same seed."""
    generator = torch.Generator().manual_seed(1)
    found = pipe(batch_size=batch, generator=generator, num_inference_steps=steps, output_type="np")
    return torch.from_numpy(found.images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    pipe = make(args.size, args.device)
    shape = (args.batch, 3, args.size, args.size)
    slow = update_time(pipe.scheduler, shape, args.steps, args.device)
    before_and_after(lambda: sample(pipe, args.batch, args.steps), lambda: accelerate(pipe))
    fast = update_time(pipe.scheduler, shape, args.steps, args.device)
    print(f"sampler update of {shape}: {slow:.1f} us before, {fast:.1f} us after: {slow / fast:.1f} times faster")
    restore(pipe)


if __name__ == "__main__":
    main()
