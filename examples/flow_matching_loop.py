"""A flow_matching loop before and after one import: the same states from the same noise, one op a model call.

    python examples/flow_matching_loop.py [--size 32] [--steps 20] [--batch 2] [--device cpu]

    before: from flow_matching.solver import ODESolver
    after:  from diffkern.compat.flow_matching.solver import ODESolver

A tiny network with random weights: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import importlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from helpers.flow_matching_oracle import missing

METHODS = {"euler": 1, "midpoint": 2, "rk4": 4}
"""Model calls a step."""


class Network(nn.Module):
    """u(x, t), two convolutions."""

    def __init__(self, channels: int = 3, width: int = 16) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels + 1, width, 3, padding=1)
        self.last = nn.Conv2d(width, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = t.expand(x.shape[0], 1, *x.shape[2:])
        out: Tensor = self.last(torch.nn.functional.silu(self.first(torch.cat([x, time], 1))))
        return out


def packages() -> dict[str, str]:
    return {"before": "flow_matching", "after": "diffkern.compat.flow_matching"}


def sample(package: str, method: str, shape: tuple[int, ...], steps: int, device: str = "cpu") -> Tensor:
    """The loop as its users write it."""
    solver = importlib.import_module(f"{package}.solver")
    torch.manual_seed(0)
    network = Network().eval().requires_grad_(False).to(device)
    x = torch.randn(shape, device=device)
    out: Tensor = solver.ODESolver(network).sample(x, 1.0 / steps, method=method)
    return out


def batch(package: str, shape: tuple[int, ...], device: str = "cpu") -> Callable[[], Any]:
    """Makes the states and velocities of a training batch."""
    path = importlib.import_module(f"{package}.path").CondOTProbPath()
    torch.manual_seed(1)
    x_0, x_1 = torch.randn(shape, device=device), torch.rand(shape, device=device)
    t = torch.rand(shape[0], device=device)
    return lambda: path.sample(x_0=x_0, x_1=x_1, t=t)


def update_time(package: str, method: str, shape: tuple[int, ...], steps: int, device: str = "cpu") -> float:
    """Microseconds of the solver a model call when the model is free."""
    solver = importlib.import_module(f"{package}.solver")
    x, m = (torch.randn(shape, device=device) for _ in range(2))
    run = lambda: solver.ODESolver(lambda x, t: m).sample(x, 1.0 / steps, method=method)  # noqa: E731
    return fastest(run, device) / (steps * METHODS[method])


def fastest(run: Callable[[], Any], device: str) -> float:
    times = []
    for _ in range(8):
        start = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 1e6 * min(times[1:])  # the first makes the grid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if missing():
        sys.exit("the comparison needs the original: pip install flow_matching torchdiffeq")
    shape = (args.batch, 3, args.size, args.size)
    for method in METHODS:
        results = {
            when: sample(package, method, shape, args.steps, args.device) for when, package in packages().items()
        }
        times = {
            when: update_time(package, method, shape, args.steps, args.device) for when, package in packages().items()
        }
        report(method, results, times)
    makers = {when: batch(package, shape, args.device) for when, package in packages().items()}
    results = {when: torch.cat([make().x_t, make().dx_t]) for when, make in makers.items()}
    report("CondOTProbPath.sample", results, {when: fastest(make, args.device) for when, make in makers.items()})


def report(what: str, results: dict[str, Tensor], times: dict[str, float]) -> None:
    difference = float((results["before"] - results["after"]).abs().max() / results["before"].abs().max())
    slow, fast = times["before"], times["after"]
    print(
        f"{what}: max difference {difference:.1e} of the largest value; {slow:.1f} us before, {fast:.1f} us after: "
        f"{slow / fast:.1f} times faster"
    )


if __name__ == "__main__":
    main()
