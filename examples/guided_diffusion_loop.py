"""guided-diffusion's loops before and after: the same images from the same seed, one op a step.

    python examples/guided_diffusion_loop.py [--size 32] [--steps 25] [--batch 2] [--device cpu]

    before: from guided_diffusion.respace import SpacedDiffusion (not installed: our transcription of the papers)
    after:  from diffkern.compat.guided_diffusion import SpacedDiffusion

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

from diffkern.compat import guided_diffusion

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from helpers import guided_diffusion_oracle
from helpers.guided_diffusion_algorithms import Chain

LOOPS: dict[str, tuple[str, dict[str, Any]]] = {
    "p_sample": ("p_sample_loop", {}),
    "ddim_sample": ("ddim_sample_loop", {}),
    "ddim_sample, eta 1": ("ddim_sample_loop", {"eta": 1.0}),
}


class Network(nn.Module):
    """A noise predictor that learned its variance."""

    def __init__(self, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, width, 3, padding=1)
        self.outer = nn.Conv2d(width, 2 * channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        out: Tensor = self.outer(torch.sin(self.inner(x) + t.float().reshape(-1, 1, 1, 1) / 300))
        return out


class Given(Network):
    """A network that costs nothing."""

    def __init__(self, m: Tensor) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.m


class Transcribed:
    """The loops in plain torch, where guided_diffusion is not installed."""

    def __init__(self, after: Any) -> None:
        self.chain, self.times = Chain(after.betas, "EPSILON", "LEARNED_RANGE"), after.timestep_map

    def _loop(
        self, model: Any, shape: tuple[int, ...], step: Callable[..., tuple[Tensor, Tensor]], device: str
    ) -> Tensor:
        x = torch.randn(*shape, device=device)
        with torch.no_grad():
            for i in range(self.chain.T)[::-1]:
                t = torch.full((shape[0],), i, device=device)
                time = torch.full((shape[0],), self.times[i], device=device)
                m = model(x, time)
                x = step(lambda x, t, m=m: m, x, t, torch.randn_like(x))[0]
        return x

    def p_sample_loop(self, model: Any, shape: tuple[int, ...], device: str) -> Tensor:
        return self._loop(model, shape, self.chain.ddpm, device)

    def ddim_sample_loop(self, model: Any, shape: tuple[int, ...], device: str, eta: float = 0.0) -> Tensor:
        return self._loop(model, shape, lambda *args: self.chain.ddim(*args, eta=eta), device)


def diffusion(gd: Any, respace: Any, steps: int) -> Any:
    return respace.SpacedDiffusion(
        use_timesteps=respace.space_timesteps(1000, str(steps)),
        betas=gd.get_named_beta_schedule("linear", 1000),
        model_mean_type=gd.ModelMeanType.EPSILON,
        model_var_type=gd.ModelVarType.LEARNED_RANGE,
        loss_type=gd.LossType.RESCALED_MSE,
    )


def both(steps: int) -> tuple[Any, Any]:
    """(before, after)."""
    after = diffusion(guided_diffusion, guided_diffusion, steps)
    if guided_diffusion_oracle.missing():
        return Transcribed(after), after
    original = guided_diffusion_oracle.modules()
    return diffusion(original.gaussian_diffusion, original.respace, steps), after


def sample(d: Any, kind: str, shape: tuple[int, ...], device: str = "cpu") -> Tensor:
    torch.manual_seed(0)
    net = Network().to(device)
    name, options = LOOPS[kind]
    torch.manual_seed(1)
    return getattr(d, name)(net, shape, device=device, **options)


def update_time(d: Any, kind: str, shape: tuple[int, ...], steps: int, device: str = "cpu") -> float:
    """Microseconds a step when model and noise are free: the fastest of seven runs."""
    m = torch.randn(shape[0], 2 * shape[1], *shape[2:], device=device)
    z, net, times = torch.randn(shape, device=device), Given(m), []
    name, options = LOOPS[kind]

    def given(x: Tensor) -> Tensor:
        return z

    with mock.patch("torch.randn_like", given):
        for _ in range(8):
            start = time.perf_counter()
            getattr(d, name)(net, shape, device=device, **options)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return 1e6 * min(times[1:]) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    shape, pair = (args.batch, 3, args.size, args.size), both(args.steps)
    print("before:", "our transcription" if isinstance(pair[0], Transcribed) else "guided_diffusion as installed")
    for kind in LOOPS:
        one, other = (sample(d, kind, shape, args.device) for d in pair)
        slow, fast = (update_time(d, kind, shape, args.steps, args.device) for d in pair)
        print(
            f"{kind}: max difference {(one - other).abs().max().item():.1e}; update {slow:.1f} us before, "
            f"{fast:.1f} us after: {slow / fast:.1f} times faster"
        )


if __name__ == "__main__":
    main()
