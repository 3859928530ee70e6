"""The model object inside of what wraps modules: DistributedDataParallel, torch.compile, copies."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.diffusion_cases import small_unet
from torch import nn

from diffkern import Diffusion, schedules

X0 = torch.linspace(-1.0, 1.0, 4 * 64).reshape(4, 1, 8, 8)
LABELS = torch.tensor([0, 1, 2, 0])


def made(schedule: schedules.Schedule | None = None) -> Diffusion:
    return Diffusion(small_unet(), schedule or schedules.cosine(20), "v", drop=0.5)


def gradients(module: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in module.parameters() if p.grad is not None]


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.full
def test_distributed_data_parallel_trains_it(group: None) -> None:
    plain, inside = made(), made()
    plain.loss(X0, cond=LABELS, seeds=0).backward()
    wrapped = nn.parallel.DistributedDataParallel(inside)
    wrapped(X0, cond=LABELS, seeds=0).backward()
    assert len(gradients(inside)) == len(gradients(plain)) > 0
    assert all(map(torch.equal, gradients(inside), gradients(plain)))
    network = Diffusion(nn.parallel.DistributedDataParallel(small_unet()), schedules.cosine(20), "v", drop=0.5)
    network.loss(X0, cond=LABELS, seeds=0).backward()
    assert all(map(torch.equal, gradients(network), gradients(plain)))
    assert torch.equal(network.sample(2, steps=2, seeds=0), plain.sample(2, steps=2, seeds=0))


def test_a_copy_and_a_pickle_are_the_same_model() -> None:
    diffusion = made()
    expected = diffusion.sample(1, steps=2, seeds=0)
    file = io.BytesIO()
    torch.save(diffusion, file)
    file.seek(0)
    for other in (copy.deepcopy(diffusion), torch.load(file, weights_only=False)):
        assert torch.equal(other.sample(1, steps=2, seeds=0), expected)
    other = made()
    other.model.load_state_dict(small_unet(seed=1).state_dict())
    other.load_state_dict(diffusion.state_dict())
    assert torch.equal(other.sample(1, steps=2, seeds=0), expected)


def test_to_moves_the_null_condition_too() -> None:
    diffusion = Diffusion(nn.Identity(), schedules.linear(4), null=torch.ones(2)).to(torch.float64)
    assert diffusion.null is not None
    assert diffusion.null.dtype == torch.float64
    assert diffusion.to("meta").null.is_meta  # type: ignore[union-attr]


@pytest.mark.full
@pytest.mark.parametrize("schedule", [schedules.cosine(20), schedules.vp(), schedules.flow()], ids=lambda s: s.name)
def test_the_loss_compiles_whole(schedule: schedules.Schedule) -> None:
    diffusion = made(schedule)
    expected = diffusion.loss(X0, cond=LABELS, seeds=torch.arange(4))
    compiled = torch.compile(diffusion, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X0, cond=LABELS, seeds=torch.arange(4)), expected)


@pytest.mark.full
@pytest.mark.parametrize("schedule", [schedules.cosine(20), schedules.flow()], ids=lambda s: s.name)
def test_the_loss_is_exported(schedule: schedules.Schedule) -> None:
    diffusion = made(schedule)
    given = {"cond": LABELS, "seeds": torch.arange(4)}
    exported = torch.export.export(diffusion, (X0,), given, strict=False).module()
    torch.testing.assert_close(exported(X0, **given), diffusion.loss(X0, **given))
