"""A k-diffusion loop before and after one import: the same images from the same seed, one op a model call.

    python examples/k_diffusion_loop.py [--size 32] [--steps 20] [--batch 2] [--device cpu]

    before: import k_diffusion as K
    after:  from diffkern.compat import k_diffusion as K

A tiny network with random weights: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from diffkern.compat import k_diffusion

# k-diffusion's own samplers, which its __init__ does not give without CLIP, wandb and others.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from helpers import k_diffusion_oracle

SAMPLERS = ("sample_euler", "sample_heun", "sample_euler_ancestral", "sample_dpmpp_2m", "sample_dpmpp_2m_sde")


class Network(nn.Module):
    """eps(x, t), three convolutions."""

    def __init__(self, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels + 1, width, 3, padding=1)
        self.middle = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = (t / 1000).to(x.dtype)[:, None, None, None].expand(-1, 1, *x.shape[2:])
        h = torch.nn.functional.silu(self.first(torch.cat([x, time], 1)))
        out: Tensor = self.last(torch.nn.functional.silu(self.middle(h)))
        return out


def make(K: Any, device: str = "cpu") -> Any:
    """A wrapped network on Stable Diffusion's table of noise levels."""
    torch.manual_seed(0)
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    wrapper = K.external.DiscreteEpsDDPMDenoiser(Network(), (1 - betas).cumprod(0).float(), quantize=False)
    return wrapper.eval().requires_grad_(False).to(device)


def sample(K: Any, sampler: str, shape: tuple[int, ...], steps: int, device: str = "cpu") -> Tensor:
    """The loop as its users write it; ``K`` is one package or the other."""
    model = make(K, device)
    sigmas = model.get_sigmas(steps)
    torch.manual_seed(1)
    x = torch.randn(shape, device=device) * sigmas[0]
    options: dict[str, Any] = {"noise_sampler": lambda sigma, to: torch.randn_like(x)} if "sde" in sampler else {}
    out: Tensor = getattr(K.sampling, sampler)(model, x, sigmas, disable=True, **options)
    return out


def update_time(K: Any, sampler: str, shape: tuple[int, ...], steps: int, device: str = "cpu") -> float:
    """Microseconds of a step of the loop when model and noise are free: the fastest of seven runs."""
    x, m, z = (torch.randn(shape, device=device) for _ in range(3))
    sigmas = k_diffusion.get_sigmas_karras(steps, 0.03, 14.0, device=device)
    options: dict[str, Any] = {"noise_sampler": lambda sigma, to: z} if "sde" in sampler else {}

    def given(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return z

    def run() -> None:
        with mock.patch("torch.randn_like", given):
            getattr(K.sampling, sampler)(lambda x, sigma: m, x, sigmas, disable=True, **options)

    return fastest(run, device) / steps


def fastest(run: Callable[[], None], device: str) -> float:
    times = []
    for _ in range(8):
        start = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e6 * min(times[1:])  # the first makes the plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if k_diffusion_oracle.missing():
        sys.exit("the comparison needs the original: pip install k-diffusion torchsde torchdiffeq scipy einops")
    original = k_diffusion_oracle.modules()
    shape = (args.batch, 3, args.size, args.size)
    for sampler in SAMPLERS:
        before, after = (sample(K, sampler, shape, args.steps, args.device) for K in (original, k_diffusion))
        difference = float((before - after).abs().max() / before.abs().max())
        slow, fast = (update_time(K, sampler, shape, args.steps, args.device) for K in (original, k_diffusion))
        print(
            f"{sampler}: max difference {difference:.1e} of the largest value; update {slow:.1f} us before, "
            f"{fast:.1f} us after: {slow / fast:.1f} times faster"
        )


if __name__ == "__main__":
    main()
