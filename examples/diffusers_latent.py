"""A pipeline of Stable Diffusion's shape before and after `accelerate`: UNet2DConditionModel with classifier-free
guidance in the latents of an AutoencoderKL whose middle has one attention head of 512 channels.

    python examples/diffusers_latent.py [--size 64] [--steps 20] [--batch 1] [--scheduler EulerDiscreteScheduler]

Random weights, and random vectors for the text encoder's: nothing is downloaded.
"""

from __future__ import annotations

import argparse
from typing import Any

import diffusers
import torch
from common import before_and_after, update_time
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from torch import Tensor

from diffkern.compat.diffusers import accelerate, restore


class LatentPipeline(DiffusionPipeline):
    """What StableDiffusionPipeline does after its text encoder."""

    def __init__(self, unet: UNet2DConditionModel, vae: AutoencoderKL, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, prompt: Tensor, negative: Tensor, steps: int, guidance: float = 7.5, seed: int = 0, size: int = 64
    ) -> Tensor:
        """Images about in [-1, 1], [B, 3, size, size], for embeddings [B, tokens, channels]."""
        generator = torch.Generator().manual_seed(seed)
        shape = (len(prompt), self.unet.config.in_channels, size // 8, size // 8)
        self.scheduler.set_timesteps(steps, device=self.device)
        latents = torch.randn(shape, generator=generator).to(self.device) * self.scheduler.init_noise_sigma
        context = torch.cat([negative, prompt])
        extra = {"generator": generator} if "generator" in self.scheduler.step.__code__.co_varnames else {}
        for t in self.progress_bar(self.scheduler.timesteps):
            shown = self.scheduler.scale_model_input(torch.cat([latents, latents]), t)
            u, c = self.unet(shown, t, encoder_hidden_states=context, return_dict=False)[0].chunk(2)
            latents = self.scheduler.step(u + guidance * (c - u), t, latents, return_dict=False, **extra)[0]
        return self.vae.decode(latents / self.vae.config.scaling_factor, return_dict=False)[0]


def make(scheduler: str = "EulerDiscreteScheduler", device: str = "cpu") -> LatentPipeline:
    """The pipeline with heads of 8 and 16 channels in the UNet and of 512 in the VAE."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        norm_num_groups=8,
        attention_head_dim=4,
        cross_attention_dim=32,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(32, 32, 64, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
    )
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    pipe = LatentPipeline(unet.eval(), vae.eval(), getattr(diffusers, scheduler)(**options))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def embeddings(batch: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """(prompt, negative prompt), [B, 7, 32] each: what the text encoder would give."""
    both = torch.randn(2, batch, 7, 32, generator=torch.Generator().manual_seed(2))
    return both[0].to(device), both[1].to(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--scheduler", default="EulerDiscreteScheduler")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    pipe = make(args.scheduler, args.device)
    prompt, negative = embeddings(args.batch, args.device)
    shape = (args.batch, 4, args.size // 8, args.size // 8)
    slow = update_time(pipe.scheduler, shape, args.steps, args.device)
    before_and_after(lambda: pipe(prompt, negative, args.steps, size=args.size), lambda: accelerate(pipe))
    fast = update_time(pipe.scheduler, shape, args.steps, args.device)
    print(f"sampler update of {shape}: {slow:.1f} us before, {fast:.1f} us after: {slow / fast:.1f} times faster")
    restore(pipe)


if __name__ == "__main__":
    main()
