"""Input that does not fit a UNet: a sentence that says what must be given, and never a crash."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.unet_cases import OPTIONS, awake, config, inputs
from torch import Tensor

from diffkern.nn import UNet

EVERYTHING = {**OPTIONS["transformer"], **OPTIONS["vector and numbers"], "classes": 5, "concat_channels": 2}


@pytest.fixture(scope="module")
def network() -> UNet:
    torch.manual_seed(0)
    return awake(config(**EVERYTHING, augment_channels=4))


@pytest.fixture
def given(network: UNet) -> tuple[Tensor, Tensor, dict[str, Any]]:
    x, t, cond = inputs(network.config)
    assert cond is not None
    return x, t, cond


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("context", torch.zeros(2, 5, 7), r"cond\['context'\] must have shape \(2, any, 6\), got \(2, 5, 7\)"),
        ("context", torch.zeros(3, 5, 6), r"cond\['context'\] must have shape \(2, any, 6\), got \(3, 5, 6\)"),
        ("context", None, r"cond\['context'\] must have shape \(2, any, 6\), got NoneType"),
        ("context", torch.zeros(2, 5, 6, device="meta"), r"cond\['context'\] must be on cpu, .*, got meta"),
        ("vector", torch.zeros(2, 8), r"cond\['vector'\] must have shape \(2, 7\), got \(2, 8\)"),
        (
            "context",
            torch.zeros(2, 5, 6, dtype=torch.complex64),
            r"cond\['context'\] must be real, got torch.complex64",
        ),
        ("vector", None, r"cond\['vector'\] must have shape \(2, 7\), got NoneType"),
        ("ids", torch.zeros(2, 3), r"cond\['ids'\] must have shape \(2, 2\), got \(2, 3\)"),
        ("image", torch.zeros(2, 2, 4, 4), r"cond\['image'\] must have shape \(2, 2, 8, 8\), got \(2, 2, 4, 4\)"),
        ("augment", torch.zeros(2, 3), r"cond\['augment'\] must have shape \(2, 4\), got \(2, 3\)"),
        ("class", torch.tensor([0, 6]), r"cond must hold classes in 0\.\.5 \(5 means none\), got 6"),
        ("class", torch.tensor([-1, 0]), r"cond must hold classes in 0\.\.5 \(5 means none\), got -1"),
        ("class", torch.tensor([2**62, 0]), r"cond must hold classes in 0\.\.5 .*, got 4611686018427387904"),
        ("class", torch.zeros(2), r"cond must be an integer tensor of shape \(2,\), got torch.float32 \(2,\)"),
        ("class", torch.zeros(3, dtype=torch.int64), r"cond must be an integer tensor of shape \(2,\), got .* \(3,\)"),
        ("class", torch.zeros(2, dtype=torch.int64, device="meta"), "cond must be on cpu, the device of .*, got meta"),
        ("class", torch.tensor([True, False]), r"cond must be an integer tensor of shape \(2,\), got torch.bool"),
        ("class", 3, r"cond must be an integer tensor of shape \(2,\), got int"),
        (
            "residuals",
            (torch.zeros(2, 8, 8, 8),),
            r"cond\['residuals'\] must be a tuple of 4 tensors, one a skip, got 1",
        ),
        ("residuals", torch.zeros(4), r"cond\['residuals'\] must be a tuple of 4 tensors, one a skip, got Tensor"),
        ("residuals", (torch.zeros(2, 8, 8, 9),) * 4, r"cond\['residuals'\] must have shape \(2, 8, 8, 8\), got"),
        ("middle_residual", torch.zeros(2, 8, 4, 4), r"cond\['middle_residual'\] must have shape \(2, 16, 4, 4\), got"),
        ("text", torch.zeros(2), "cond has the keys class, context, .*, got 'text'"),
    ],
)
def test_a_condition_that_does_not_fit_is_named(
    network: UNet, given: tuple[Tensor, Tensor, dict[str, Any]], key: str, value: Any, words: str
) -> None:
    x, t, cond = given
    with torch.no_grad(), pytest.raises(ValueError, match=words):
        network(x, t, {**cond, key: value})


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(2, 4, 8, 8), r"x must have shape \(B, 3, H, W\), got \(2, 4, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"x must have shape \(B, 3, H, W\), got \(3, 8, 8\)"),
        ([[1.0]], r"x must have shape \(B, 3, H, W\), got list"),
        (torch.zeros(2, 3, 8, 7), r"height and width of x must be divisible by 2, got \(2, 3, 8, 7\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int64), "x must be a floating-point tensor, got torch.int64"),
        (torch.zeros(2, 3, 8, 8).double(), "x must have torch.float32, the dtype of the weights, got torch.float64"),
        (torch.zeros(2, 3, 8, 8).bfloat16(), "x must have torch.float32, the dtype of the weights, got torch.bfloat16"),
        (torch.zeros(2, 3, 8, 8, device="meta"), "x must be on cpu, the device of the weights, got meta"),
    ],
)
def test_a_state_that_does_not_fit_is_named(
    network: UNet, given: tuple[Tensor, Tensor, dict[str, Any]], x: Any, words: str
) -> None:
    _, t, cond = given
    with torch.no_grad(), pytest.raises(ValueError, match=words):
        network(x, t, cond)


@pytest.mark.parametrize(
    ("t", "words"),
    [
        (torch.zeros(3), r"t must be 0-dim or have one time for each of the 2 samples, got \(3,\)"),
        (torch.zeros(2, 1), r"t must be 0-dim or have one time for each of the 2 samples, got \(2, 1\)"),
        (3, "t must be a tensor of times, got int"),
        (torch.zeros(2, device="meta"), "t must be on cpu, the device of the weights, got meta"),
        (torch.zeros(2, dtype=torch.complex64), "t must be real, got torch.complex64"),
    ],
)
def test_times_that_do_not_fit_are_named(
    network: UNet, given: tuple[Tensor, Tensor, dict[str, Any]], t: Any, words: str
) -> None:
    x, _, cond = given
    with torch.no_grad(), pytest.raises(ValueError, match=words):
        network(x, t, cond)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("class", "this network has no classes, but cond was given"),
        ("context", r"this network has no context, but cond\['context'\] was given"),
        ("vector", r"this network has no vector, but cond\['vector'\] was given"),
        ("ids", r"this network has no ids, but cond\['ids'\] was given"),
        ("augment", r"this network has no augmentation labels, but cond\['augment'\] was given"),
        ("image", r"this network takes no image, but cond\['image'\] was given"),
    ],
)
def test_a_condition_that_a_network_does_not_know_is_refused(
    given: tuple[Tensor, Tensor, dict[str, Any]], key: str, words: str
) -> None:
    x, t, cond = given
    with torch.no_grad(), pytest.raises(ValueError, match=words):
        UNet(config())(x, t, {key: cond[key]})


def test_a_class_outside_the_table_is_nan_where_values_are_not_read() -> None:
    network = awake(config(classes=5))
    x, t, _ = inputs(network.config)
    classes = torch.tensor([2, 77])
    with torch.no_grad():
        out = torch.vmap(lambda c: network(x[:1], t[:1], c[None])[0])(classes)
        torch.testing.assert_close(out[0], network(x[:1], t[:1], classes[:1])[0], rtol=1e-5, atol=1e-5)
    assert out[1].isnan().all()


def test_conditions_of_other_dtypes_are_converted(network: UNet, given: tuple[Tensor, Tensor, dict[str, Any]]) -> None:
    x, t, cond = given
    cond |= {"residuals": tuple(torch.randn(2, c, n, n) for c, n in ((8, 8), (8, 8), (8, 4), (16, 4)))}
    cond |= {"middle_residual": torch.randn(2, 16, 4, 4)}
    wide = {name: converted(value) for name, value in cond.items()}
    with torch.no_grad():
        torch.testing.assert_close(network(x, t.double(), wide), network(x, t, cond))


def converted(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(converted(part) for part in value)
    return value.double() if value.is_floating_point() else value.int()
