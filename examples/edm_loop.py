"""EDM's sampler before and after: the same images from the same noise, one op a model call.

    python examples/edm_loop.py [--size 32] [--steps 18] [--batch 2] [--churn 40] [--device cpu]

    before: EDM's edm_sampler (here our transcription of the paper's algorithm 2: its code is not on PyPI)
    after:  from diffkern.compat.edm import edm_sampler

A tiny network with random weights: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkern.compat.edm import edm_sampler

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from helpers.edm_algorithm import algorithm_2


class Network(nn.Module):
    """A preconditioned denoiser as EDM's: float64 in, float32 inside and out."""

    sigma_min, sigma_max, sigma_data = 0.0, math.inf, 0.5

    def __init__(self, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)
        )

    def round_sigma(self, sigma: Any) -> Tensor:
        return torch.as_tensor(sigma)

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Any = None) -> Tensor:
        x, sigma = x.float(), sigma.float()
        total = sigma**2 + self.sigma_data**2
        out: Tensor = self.body(x / total.sqrt())
        return x * self.sigma_data**2 / total + out * sigma * self.sigma_data / total.sqrt()


class Given(Network):
    """A network that costs nothing."""

    def __init__(self, m: Tensor) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor, sigma: Tensor, class_labels: Any = None) -> Tensor:
        return self.m


@torch.no_grad()
def before(net: Network, latents: Tensor, randn_like: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
    return algorithm_2(net, latents, None, randn_like, **options)


@torch.no_grad()
def after(net: Network, latents: Tensor, randn_like: Callable[[Tensor], Tensor], **options: Any) -> Tensor:
    return edm_sampler(net, latents, None, randn_like, **options)


def sample(run: Callable[..., Tensor], shape: tuple[int, ...], steps: int, churn: float, device: str = "cpu") -> Tensor:
    torch.manual_seed(0)
    net = Network().to(device)
    torch.manual_seed(1)
    return run(net, torch.randn(shape, device=device), torch.randn_like, num_steps=steps, S_churn=churn)


def update_time(
    run: Callable[..., Tensor], shape: tuple[int, ...], steps: int, churn: float, device: str = "cpu"
) -> float:
    """Microseconds a model call when model and noise are free: the fastest of seven runs."""
    x, m, z = (torch.randn(shape, device=device, dtype=torch.float64) for _ in range(3))
    net, times = Given(m), []
    for _ in range(8):
        start = time.perf_counter()
        run(net, x, lambda x: z, num_steps=steps, S_churn=churn)
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e6 * min(times[1:]) / (2 * steps - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--churn", type=float, default=40.0)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    shape = (args.batch, 3, args.size, args.size)
    for churn in (0.0, args.churn):
        one, other = (sample(run, shape, args.steps, churn, args.device) for run in (before, after))
        slow, fast = (update_time(run, shape, args.steps, churn, args.device) for run in (before, after))
        print(
            f"S_churn {churn:g}: max difference {(one - other).abs().max().item():.1e}; update {slow:.1f} us before, "
            f"{fast:.1f} us after: {slow / fast:.1f} times faster"
        )


if __name__ == "__main__":
    main()
