"""`freeze`: packed weights of convolutions, which are never those of yesterday."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from helpers.lazy import Lazy
from torch import Tensor, nn

from diffkern import _load
from diffkern.nn import UNet, UNetConfig
from diffkern.nn import convolution as module
from diffkern.nn.convolution import convolve, freeze, is_ours

parametrize, prune = Lazy("torch.nn.utils.parametrize"), Lazy("torch.nn.utils.prune")
pytestmark = pytest.mark.skipif(_load.build_info().get("isa") == "scalar", reason="needs a processor with AVX2")
BYTES = 4 * 16 * 64 * 32
"""Of a packed layer of 32 inputs and 32 outputs: 16 products, outputs in panels of 64."""
BYTES_UPSAMPLED = 4 * 9 * 64 * 32
SHAPE = 32, 32, 3, 3


class Two(nn.Module):
    """[B, 32, H, W] to [B, 32, 2 H, 2 W]: a convolution, and one of the upsampled image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(32, 32, 3, padding=1) for _ in range(2))
        self.head = nn.Conv2d(32, 3, 3, padding=1)  # torch's

    def forward(self, x: Tensor) -> Tensor:
        return convolve(self.second, convolve(self.first, x), upsample=True)


@pytest.fixture
def network() -> Two:
    torch.manual_seed(0)
    return Two()


@pytest.fixture(scope="module")
def x() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 32, 8, 8)


def fresh(network: nn.Module, x: Tensor) -> Tensor:
    """What a copy of the network, which is not frozen, computes."""
    with torch.no_grad():
        out: Tensor = copy.deepcopy(network)(x)
    return out


def test_frozen_thawed_and_never_frozen_have_the_same_bits(network: Two, x: Tensor) -> None:
    wanted = fresh(network, x)
    frozen = freeze(network)
    assert frozen.bytes == 0, "packed when they are used"
    for _ in range(2):
        assert torch.equal(network(x), wanted)
        assert frozen.bytes == BYTES + BYTES_UPSAMPLED
    frozen.thaw()
    assert frozen.bytes == 0
    assert torch.equal(network(x), wanted)
    frozen.thaw()
    assert not module._frozen


def test_a_unet_is_packed_once(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    packs, pack = [], module.pack_conv3x3

    def counted(weight: Tensor, upsample: bool) -> Tensor:
        packs.append(weight.device.type)
        return pack(weight, upsample=upsample)

    monkeypatch.setattr(module, "pack_conv3x3", counted)
    torch.manual_seed(0)
    options: dict[str, Any] = {"channels": 32, "multipliers": (1, 1), "blocks": 1, "attention_levels": (), "classes": 0}
    unet = UNet(UNetConfig(image_size=16, heads=1, zero_init=False, **options)).eval()
    given = torch.randn(1, 1, 16, 16), torch.tensor([3])
    with torch.no_grad():
        wanted = unet(*given)
        with freeze(unet):
            assert torch.equal(unet(*given), wanted)
            count = packs.count("cpu")
            assert count >= 8
            assert torch.equal(unet(*given), wanted)
            assert packs.count("cpu") == count


# ----------------------------------------------------------------------------------- all the ways to change a weight
def optimised(network: Two, kind: Any, **options: Any) -> None:
    network(torch.ones(1, 32, 8, 8)).square().mean().backward()
    kind(network.parameters(), lr=0.1, **options).step()


def loaded(network: Two, assign: bool) -> None:
    network.load_state_dict({k: 2.0 * v for k, v in network.state_dict().items()}, assign=assign)


def added(network: Two) -> None:
    with torch.no_grad():
        network.first.weight.add_(1.0)


def added_in_inference_mode(network: Two) -> None:
    with torch.inference_mode():
        network.first.weight.add_(1.0)


def new_parameter(network: Two) -> None:
    network.second.weight = nn.Parameter(torch.randn(SHAPE))


def new_data(network: Two) -> None:
    network.first.weight.data = torch.randn(SHAPE)


def transposed_data(network: Two) -> None:
    network.first.weight.data = network.first.weight.data.transpose(0, 1)


def to_float64_and_back(network: Two) -> None:
    network.double()
    network.first.weight.data.mul_(2.0)
    network.float()


def to_channels_last(network: Two) -> None:
    network.to(memory_format=torch.channels_last)


def swapped(network: Two) -> None:
    network.first, network.second = network.second, network.first


def another_layer(network: Two) -> None:
    network.first = nn.Conv2d(32, 32, 3, padding=1)


def parametrised(network: Two) -> None:
    nn.utils.parametrizations.spectral_norm(network.first)


def parametrised_and_left(network: Two) -> None:
    nn.utils.parametrizations.weight_norm(network.first)
    with torch.no_grad():
        network.first.parametrizations.weight.original0.mul_(2.0)  # type: ignore[union-attr, operator]
    parametrize.remove_parametrizations(network.first, "weight")
    assert is_ours(network.first, torch.zeros(1, 32, 8, 8))


def pruned(network: Two) -> None:
    prune.l1_unstructured(network.first, "weight", 0.5)


def pruned_for_good(network: Two) -> None:
    pruned(network)
    prune.remove(network.first, "weight")
    assert is_ours(network.first, torch.zeros(1, 32, 8, 8))


def initialised(network: Two) -> None:
    network.first.reset_parameters()


def through_a_view(network: Two) -> None:
    network.first.weight.detach()[0].fill_(1.0)


def by_one_vector(network: Two) -> None:
    vector = nn.utils.parameters_to_vector(network.parameters())
    nn.utils.vector_to_parameters(2.0 * vector.detach(), network.parameters())


CHANGES: list[Callable[[Two], None]] = [
    added,
    added_in_inference_mode,
    new_parameter,
    new_data,
    transposed_data,
    to_float64_and_back,
    to_channels_last,
    swapped,
    another_layer,
    parametrised,
    parametrised_and_left,
    pruned,
    pruned_for_good,
    initialised,
    through_a_view,
    by_one_vector,
]
for _kind, _options in (("SGD", {"foreach": True}), ("Adam", {"foreach": False}), ("AdamW", {"fused": True})):
    CHANGES.append(
        lambda network, kind=_kind, options=_options: optimised(network, getattr(torch.optim, kind), **options)
    )  # type: ignore[misc]
CHANGES += [lambda network: loaded(network, False), lambda network: loaded(network, True)]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("<>"))
def test_a_changed_weight_is_packed_again(change: Callable[[Two], None], network: Two, x: Tensor) -> None:
    with freeze(network) as frozen:
        before = network(x)
        change(network)
        network.eval()  # spectral norm goes on in training
        after = network(x)
        assert change is to_channels_last or not torch.equal(after, before)
        forms = 2 if change is swapped else 1  # of each layer
        assert frozen.bytes <= forms * (BYTES + BYTES_UPSAMPLED), "what was packed before is let go"
    assert torch.equal(network(x), after), "packed in every call"


def test_weights_given_for_a_call_count_in_it_and_not_after(network: Two, x: Tensor) -> None:
    wanted, others = fresh(network, x), {k: 2.0 * v for k, v in network.state_dict().items()}
    with freeze(network):
        network(x)
        doubled = torch.func.functional_call(network, others, (x,))
        assert torch.equal(network(x), wanted)
    network.load_state_dict(others)
    assert torch.equal(doubled, network(x))


def test_what_is_written_through_data_is_seen_after_thawing(network: Two, x: Tensor) -> None:
    frozen = freeze(network)
    before = network(x)
    frozen.thaw()
    network.first.weight.data.copy_(torch.randn(SHAPE))
    with freeze(network):
        after = network(x)
        assert torch.equal(after, fresh(network, x))
    assert not torch.equal(after, before)


def test_weights_that_nobody_counts_writes_to_are_packed_in_every_call(x: Tensor) -> None:
    with torch.inference_mode():
        network = Two()
        with freeze(network) as frozen:
            for _ in range(2):
                network.first.weight.add_(1.0)
                out = network(x)
                assert frozen.bytes == 0
    with torch.no_grad():
        assert torch.equal(out, network(x))


def test_packing_in_inference_mode_serves_gradients_later(network: Two, x: Tensor) -> None:
    with freeze(network):
        with torch.inference_mode():
            first = network(x)
        out = network(x)
        out.sum().backward()
    assert torch.equal(first, out)
    assert network.first.weight.grad is not None


# ------------------------------------------------------------------------------------------------- copies and lifetime
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))], ids=["copy", "pickle"])
def test_copies_are_right_and_not_frozen(copied: Callable[[Two], Two], network: Two, x: Tensor) -> None:
    with freeze(network) as frozen:
        network(x)
        size, other = frozen.bytes, copied(network)
        assert other.first not in module._frozen
        added(other)
        assert torch.equal(other(x), fresh(other, x))
        assert frozen.bytes == size
        assert torch.equal(network(x), fresh(network, x))


def test_an_error_in_the_block_thaws(network: Two, x: Tensor) -> None:
    frozen = freeze(network)
    with pytest.raises(RuntimeError), frozen:
        network(x[:, :3])
    assert frozen.bytes == 0
    assert not module._frozen


def test_of_nested_and_overlapping_freezes_the_last_is_used(network: Two, x: Tensor) -> None:
    wanted = fresh(network, x)
    with freeze(network) as outer:
        network(x)
        with freeze(network.first) as inner:
            assert torch.equal(network(x), wanted)
            assert inner.bytes == BYTES
        assert inner.bytes == 0
        added(network)
        assert torch.equal(network(x), fresh(network, x))
        assert outer.bytes == BYTES + BYTES_UPSAMPLED, "holds on"
    outer, inner = freeze(network), freeze(network.first)
    outer.thaw()
    network(x)
    assert (outer.bytes, inner.bytes) == (0, BYTES)
    inner.thaw()
    assert not module._frozen


def test_nothing_keeps_a_network_or_its_packed_weights(x: Tensor) -> None:
    network = Two()
    frozen = freeze(network)
    network(x)
    kept = [weakref.ref(network.first), weakref.ref(network.first.weight)]
    kept += [weakref.ref(held.packed) for layers in frozen._packed._of.values() for held in layers.values()]
    assert len(kept) == 4
    network.second = nn.Conv2d(32, 32, 3, padding=1)
    assert frozen.bytes == BYTES, "the layer is gone, and its packed weight with it"
    del network
    gc.collect()
    assert [ref() for ref in kept] == [None] * 4
    assert frozen.bytes == 0
    assert not module._frozen


def test_a_weight_that_is_replaced_is_not_kept(network: Two, x: Tensor) -> None:
    with freeze(network):
        network(x)
        old = weakref.ref(network.first.weight)
        network.to("meta")
        new_parameter(network)
        network.first.weight = nn.Parameter(torch.randn(SHAPE))
        gc.collect()
        assert old() is None


def test_two_threads_compute_and_change_at_once(network: Two, x: Tensor) -> None:
    networks = [network, copy.deepcopy(network)]
    shared, wrong = Two(), []
    wanted = fresh(shared, x)

    def work(own: Two) -> None:
        for _ in range(20):
            with freeze(own):
                if not torch.equal(shared(x), wanted):
                    wrong.append("shared")
                added(own)
                if not torch.equal(own(x), fresh(own, x)):
                    wrong.append("own")

    with freeze(shared) as frozen:
        threads = [threading.Thread(target=work, args=(own,)) for own in networks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert frozen.bytes == BYTES + BYTES_UPSAMPLED
    assert not wrong
    assert not module._frozen


# ------------------------------------------------------------------------------------------------------------ memory
@pytest.mark.parametrize(
    ("memory", "held"), [(0, 0), (BYTES - 1, BYTES_UPSAMPLED), (BYTES, BYTES), (BYTES + BYTES_UPSAMPLED, None)]
)
def test_memory_is_kept_to(memory: int, held: int | None, network: Two, x: Tensor) -> None:
    wanted = fresh(network, x)
    with freeze(network, memory=np.int64(memory)) as frozen:  # type: ignore[arg-type]
        for _ in range(2):
            assert torch.equal(network(x), wanted)
            assert frozen.bytes == (memory if held is None else held)


def test_without_a_number_a_quarter_of_what_is_free() -> None:
    most = module.Packed().most
    assert 0.5 * module._free_memory() / 4 < most < 2 * module._free_memory() / 4


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"^network must be a torch\.nn\.Module, got int$"):
        freeze(3)  # type: ignore[arg-type]
    for wrong, got in ((-1, "-1"), (1.5, r"1\.5"), ("1", "'1'"), (True, "True")):
        with pytest.raises(ValueError, match=f"^memory must be an integer of at least 0, got {got}$"):
            freeze(nn.Identity(), memory=wrong)  # type: ignore[arg-type]
    assert freeze(nn.Identity()).bytes == 0
