"""The model object under a default device, a transform of torch.func, torch.compile, and in several threads."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch import Tensor, nn

from diffkern import Diffusion, ops, schedules

SCHEDULES = [schedules.linear(), schedules.vp(), schedules.flow(), schedules.edm()]
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
X = torch.full((1, 1, 2, 2), 0.5)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return x * self.weight


class Slow(nn.Module):
    """Dropout, slow enough for threads to meet in it."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time.sleep(0.001)
        return 0.3 * self.dropout(x)


@each_schedule
def test_a_default_device_changes_nothing(schedule: schedules.Schedule) -> None:
    expected = Diffusion(Linear(), schedule).sample(X.shape, steps=4, seeds=0, x=X)
    fresh = Diffusion(Linear(), schedule)
    with torch.device("meta"):
        assert torch.equal(fresh.sample(X.shape, steps=4, seeds=0, x=X), expected)


@each_schedule
def test_the_first_loss_may_be_one_of_per_sample_gradients(schedule: schedules.Schedule) -> None:
    x, seeds = torch.rand(2, 3, 4, 4), ops.seeds(0, 2)
    diffusion = Diffusion(Linear(), schedule)

    def loss(x: Tensor, seed: Tensor) -> Tensor:
        return diffusion.loss(x[None], seeds=seed[None])

    found = torch.vmap(torch.func.grad(loss))(x, seeds)
    for i in range(2):
        leaf = x[i].clone().requires_grad_()
        loss(leaf, seeds[i]).backward()
        torch.testing.assert_close(found[i], leaf.grad)


def test_threads_that_sample_end_in_the_mode_that_was() -> None:
    diffusion = Diffusion(Slow(), schedules.linear()).train()
    expected = diffusion.sample((2, 1, 4, 4), "ddim", 6, seeds=0)
    equal: list[bool] = []

    def run() -> None:
        for _ in range(6):
            equal.append(torch.equal(diffusion.sample((2, 1, 4, 4), "ddim", 6, seeds=0), expected))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert equal == [True] * 12
    assert all(module.training for module in diffusion.modules())


def test_the_default_sampler_starts_where_there_is_no_signal() -> None:
    assert Diffusion(Linear(), schedules.cosine_vp(), "v").sample(X.shape, steps=4, seeds=0).isfinite().all()


@pytest.mark.full
@each_schedule
def test_sampling_is_one_graph(schedule: schedules.Schedule) -> None:
    diffusion = Diffusion(Linear(), schedule)
    plan = diffusion.plan(steps=4)
    torch._dynamo.reset()  # as a program's first graph: torch would take sizes for variables after others
    compiled = torch.compile(
        lambda x: diffusion.sample(x.shape, plan, seeds=3, x=x), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(X), diffusion.sample(X.shape, plan, seeds=3, x=X))
