"""score_sde's predictor-corrector sampler before and after: the same images from the same seed, one op an update.

    python examples/score_sde_loop.py [--size 32] [--steps 50] [--batch 2]

    before: import sampling, sde_lib (here our transcription of the paper: score_sde_pytorch is not on PyPI)
    after:  from diffkern.compat.score_sde import sampling, sde_lib

A tiny network with random weights: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkern.compat.score_sde import sampling, sde_lib

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from helpers.score_sde_algorithms import Process, pc_sample

RUNS = (
    ("vp", "euler_maruyama", "none"),
    ("vp", "ancestral_sampling", "none"),
    ("subvp", "reverse_diffusion", "langevin"),
    ("ve", "reverse_diffusion", "langevin"),
    ("ve", "reverse_diffusion", "ald"),
)
BOUNDS = {"vp": (0.1, 20.0), "subvp": (0.1, 20.0), "ve": (0.01, 50.0)}
SDES: dict[str, Any] = {"vp": sde_lib.VPSDE, "subvp": sde_lib.subVPSDE, "ve": sde_lib.VESDE}


class Network(nn.Module):
    """A network of eps for VP and sub-VP, of the score for VE."""

    def __init__(self, kind: str, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.kind = kind
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)
        )

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        if self.kind != "ve":
            out: Tensor = 0.8 * x + 0.2 * self.body(x)
            return out
        sigma = labels.to(x.dtype)[:, None, None, None]
        total = 1.0 + sigma**2
        score: Tensor = (0.2 * self.body(x / total.sqrt()) - x / total.sqrt()) / total.sqrt()
        return score


class Given(Network):
    """A network that costs nothing."""

    def __init__(self, kind: str, m: Tensor) -> None:
        super().__init__(kind)
        self.m = m

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.m


def before(net: Network, run: tuple[str, str, str], shape: tuple[int, ...], steps: int) -> Tensor:
    kind, predictor, corrector = run
    return pc_sample(Process(kind, *BOUNDS[kind], steps), net, shape, predictor, corrector, 0.16)


def after(net: Network, run: tuple[str, str, str], shape: tuple[int, ...], steps: int) -> Tensor:
    kind, predictor, corrector = run
    sampler = sampling.get_pc_sampler(
        SDES[kind](*BOUNDS[kind], steps),
        shape,
        sampling.get_predictor(predictor),
        sampling.get_corrector(corrector),
        lambda x: x,
        0.16,
        continuous=True,
        device="cpu",
    )
    return sampler(net)[0]


def sample(function: Callable[..., Tensor], run: tuple[str, str, str], shape: tuple[int, ...], steps: int) -> Tensor:
    torch.manual_seed(0)
    net = Network(run[0])
    torch.manual_seed(1)
    return function(net, run, shape, steps)


def update_time(
    function: Callable[..., Tensor], run: tuple[str, str, str], shape: tuple[int, ...], steps: int
) -> float:
    """Microseconds a step when the network is free, its noise included: the fastest of four runs."""
    net, times = Given(run[0], torch.randn(shape)), []
    for _ in range(5):
        start = time.perf_counter()
        function(net, run, shape, steps)
        times.append(time.perf_counter() - start)
    return 1e6 * min(times[1:]) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args()
    shape = (args.batch, 3, args.size, args.size)
    for run in RUNS:
        one, other = (sample(function, run, shape, args.steps) for function in (before, after))
        slow, fast = (update_time(function, run, shape, args.steps) for function in (before, after))
        error = (one - other).abs().max().item() / one.abs().max().item()
        print(
            f"{', '.join(run)}: max difference {error:.1e} of the largest element; update with noise {slow:.1f} us "
            f"before, {fast:.1f} us after: {slow / fast:.1f} times faster"
        )


if __name__ == "__main__":
    main()
