"""Packed weights of convolutions in a run of `diffkern.sample`: the same bits, never stale, let go after it."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.op_cases import same_bits
from torch import Tensor, nn

import diffkern
from diffkern import _load, guidance
from diffkern.nn import UNet, UNetConfig, convolution, freeze

pytestmark = pytest.mark.skipif(_load.build_info().get("isa") == "scalar", reason="needs a processor with AVX2")
PLAN = diffkern.ddim(diffkern.linear(), 4)
X = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))


def network(classes: int = 0) -> UNet:
    torch.manual_seed(0)
    options: dict[str, Any] = {"channels": 32, "multipliers": (1,), "blocks": 1, "attention_levels": (), "heads": 1}
    made = UNet(UNetConfig(image_size=16, in_channels=1, out_channels=1, classes=classes, **options))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.05)
    return made.eval()


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[Tensor]]:
    """Every weight that is packed and kept from here on."""
    made: list[weakref.ref[Tensor]] = []
    pack = convolution.pack_conv3x3

    def seen(weight: Tensor, upsample: bool) -> Tensor:
        packed = pack(weight, upsample=upsample)
        if weight.device.type != "meta":
            made.append(weakref.ref(packed))
        return packed

    monkeypatch.setattr(convolution, "pack_conv3x3", seen)
    return made


def sampled(model: Any, plan: Any = PLAN, **options: Any) -> Tensor:
    return diffkern.sample(model, X, plan, seeds=5, **options)


def alive(packs: list[weakref.ref[Tensor]]) -> int:
    gc.collect()
    return sum(ref() is not None for ref in packs)


def layers(model: UNet) -> int:
    """Convolutions that are ours."""
    return (
        sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) and m.out_channels >= 32 for m in model.modules()) - 1
    )


def test_every_weight_is_packed_once_a_run_and_let_go(packs: list[weakref.ref[Tensor]]) -> None:
    model, during = network(), []
    found = sampled(model, callback=lambda info: during.append(alive(packs)))
    assert layers(model) > 4
    assert during == [layers(model)] * len(PLAN.rows)
    assert len(packs) == layers(model)
    assert alive(packs) == 0
    assert convolution._used.get() is None
    assert same_bits(found, sampled(model, prepare=False))
    assert len(packs) == layers(model), "not without"


def test_short_runs_pack_nothing(packs: list[weakref.ref[Tensor]]) -> None:
    model, plan = network(), diffkern.ddim(diffkern.linear(), 3)
    assert same_bits(sampled(model, plan), sampled(model, plan, prepare=False))
    assert not packs


def test_a_frozen_network_is_not_packed_again(packs: list[weakref.ref[Tensor]]) -> None:
    model = network()
    with freeze(model):
        for plan in (PLAN, PLAN, diffkern.ddim(diffkern.linear(), 2)):
            sampled(model, plan)
    assert len(packs) == layers(model)


def test_conditions_and_runs_of_one_network_share(packs: list[weakref.ref[Tensor]]) -> None:
    model = network(classes=2)
    conditions = torch.tensor([0]), torch.tensor([2])
    guided = guidance.classifier_free(model, *conditions, 3.0, batched=False)
    found = sampled(guided)
    assert len(packs) == layers(model)
    assert same_bits(found, sampled(guided, prepare=False))

    def inner(info: Any) -> None:
        sampled(model, cond=conditions[0])

    packs.clear()
    sampled(model, cond=conditions[0], callback=inner)
    assert len(packs) == layers(model)
    assert alive(packs) == 0


def copied(model: UNet) -> None:
    with torch.no_grad():
        weight = model.middle[0].block.conv1.weight  # type: ignore[union-attr]
        weight.copy_(2.0 * weight)  # type: ignore[operator, arg-type]


def optimised(model: UNet, fused: bool = False) -> None:
    with torch.enable_grad():
        model(X, torch.tensor([3])).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0, fused=fused).step()


def fused(model: UNet) -> None:
    optimised(model, fused=True)


def replaced(model: UNet) -> None:
    torch.manual_seed(2)
    model.middle[0].block.conv1 = nn.Conv2d(32, 32, 3, padding=1)  # type: ignore[union-attr]


def loaded(model: UNet) -> None:
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [copied, optimised, fused, replaced, loaded], ids=lambda f: str(f.__name__))
def test_what_a_callback_changes_counts_from_the_next_step_on(change: Callable[[UNet], None]) -> None:
    found = []
    for prepare in (True, False):
        model = network()

        def callback(info: Any, model: UNet = model) -> None:
            if info["i"] == 1:
                change(model)

        found.append(sampled(model, callback=callback, prepare=prepare))
    assert same_bits(*found)
    assert not torch.equal(found[0], sampled(network()))


def test_another_thread_and_an_error_in_a_run_see_nothing(packs: list[weakref.ref[Tensor]]) -> None:
    model, seen = network(), []

    def callback(info: Any) -> None:
        seen.append(convolution._used.get())
        if info["i"] == 2:
            raise ZeroDivisionError

    def look(module: nn.Module, given: Any) -> None:
        thread = threading.Thread(target=lambda: seen.append(convolution._used.get()))
        thread.start()
        thread.join()

    model.middle[0].block.norm1.register_forward_pre_hook(look)  # type: ignore[union-attr]
    with pytest.raises(ZeroDivisionError):
        sampled(model, callback=callback)
    assert seen == [None] * 6
    assert convolution._used.get() is None
    assert len(packs) == layers(model)
    assert alive(packs) == 0
