"""Generators and discriminators: their formulas in torch's functions, what a logit sees, each example alone."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern.nn import (
    GANS,
    NETWORKS,
    Discriminator,
    DiscriminatorConfig,
    Generator,
    GeneratorConfig,
    gan_preset,
    stored,
)

CLASSES = torch.tensor([2, 0, 1])


def generator(**changes: Any) -> Generator:
    torch.manual_seed(0)
    made = Generator(
        GeneratorConfig(
            **{"image_size": 12, "latent_channels": 5, "channels": 4, "groups": 2, "embedding": 3, **changes}
        )
    )
    return shaken(made)


def discriminator(**changes: Any) -> Discriminator:
    torch.manual_seed(0)
    made = Discriminator(
        DiscriminatorConfig(**{"image_size": 12, "channels": 4, "groups": 2, "embedding": 3, **changes})
    )
    return shaken(made)


def shaken(network: Any) -> Any:
    """With biases and scales of norms that matter."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.mul_(5.0)
    return network


def numbers(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def given_of(config: Any) -> Any:
    if getattr(config, "cond_channels", 0):
        return numbers((3, config.cond_channels, *(config.size or (12, 12))), 5)
    return None if config.condition == "none" else CLASSES


# ---------------------------------------------------------------------------------------------------- the generator


def made_by_torch(network: Generator, z: Tensor, cond: Tensor | None) -> Tensor:
    """G(z) from its weights by torch's functions alone."""
    w, config = network.state_dict(), network.config
    vector = None
    if config.condition == "concatenation":
        z = torch.cat([z, torch.eye(config.classes)[cond]], 1)
    elif config.condition != "none":
        vector = w["embed.weight"][cond]
        z = torch.cat([z, vector], 1) if config.condition == "embedding" else z
    h = (z @ w["enter.weight"].T + w["enter.bias"]).reshape(len(z), -1, *config.start)
    for level in range(len(config.multipliers)):
        if config.norm == "group":
            groups = math.gcd(h.shape[1], config.groups)
            parts = h.reshape(len(h), groups, -1)
            parts = (parts - parts.mean(2, keepdim=True)) / (
                parts.var(2, keepdim=True, correction=0) + config.eps
            ).sqrt()
            h = parts.reshape(h.shape)
        elif config.norm == "batch":
            mean, var = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), keepdim=True, correction=0)
            h = (h - mean) / (var + config.eps).sqrt()
        if config.norm != "none":
            name = f"norms.{level}.norm"
            h = h * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]
        if config.condition == "modulation":
            assert vector is not None
            change = vector @ w[f"norms.{level}.modulate.weight"].T + w[f"norms.{level}.modulate.bias"]
            scale, shift = change[:, : h.shape[1], None, None], change[:, h.shape[1] :, None, None]
            h = h * (1.0 + scale) + shift
        h = h * torch.sigmoid(h) if config.activation == "silu" else h.clamp(min=0.0)
        weight, bias = w[f"doubles.{level}.conv.weight"], w[f"doubles.{level}.conv.bias"]
        if config.resample == "nearest":
            h = F.conv2d(h.repeat_interleave(2, 2).repeat_interleave(2, 3), weight, bias, padding=1)
        else:
            h = F.conv_transpose2d(h, weight, bias, stride=2, padding=1)
    return torch.tanh(h)


@pytest.mark.parametrize("resample", ["transposed", "nearest"])
@pytest.mark.parametrize("activation", ["silu", "relu"])
@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("condition", ["none", "concatenation", "embedding", "modulation"])
def test_the_generator_is_its_formula(resample: str, activation: str, norm: str, condition: str) -> None:
    if condition == "modulation" and norm == "none":
        pytest.skip("a scale and a shift of nothing")
    classes = 0 if condition == "none" else 3
    network = generator(
        resample=resample, activation=activation, norm=norm, condition=condition, classes=classes, out_channels=2
    ).train()
    z, cond = numbers((3, 5)), given_of(network.config)
    wanted = made_by_torch(network, z, cond)
    found = network(z, cond)
    assert found.shape == (3, 2, 12, 12)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=2e-5)
    assert float(found.detach().std()) > 0.01


@pytest.mark.parametrize(
    ("image_size", "multipliers", "start"),
    [(28, (1, 2), (7, 7)), (32, (1, 2, 4), (4, 4)), (8, (1,), (4, 4)), ((6, 20), (1,), (3, 10)), (2, (3,), (1, 1))],
)
def test_sizes_are_a_start_doubled(image_size: Any, multipliers: Any, start: tuple[int, int]) -> None:
    network = generator(image_size=image_size, multipliers=multipliers)
    assert network.config.start == start
    images = network(numbers((2, 5)))
    assert tuple(images.shape[1:]) == network.config.shape
    assert bool((images.abs() <= 1.0).all())


@pytest.mark.parametrize("norm", ["group", "none", "batch"])
def test_each_image_is_of_its_own_latents_but_with_batch_norm(norm: str) -> None:
    """In training mode, as two processes that share a batch need it; a class's embedding too."""
    network = generator(norm=norm, condition="embedding", classes=3).train()
    z = numbers((3, 5))
    whole = network(z, CLASSES)
    alone = torch.cat([network(z[j : j + 1], CLASSES[j : j + 1]) for j in range(3)])
    same = torch.allclose(whole, alone, rtol=1e-5, atol=1e-6)
    assert same == (norm != "batch")


# ------------------------------------------------------------------------------------------------- the discriminator


def judged_by_torch(network: Discriminator, x: Tensor, cond: Tensor | None) -> Tensor:
    """C(x) from its effective weights by torch's functions alone."""
    config = network.config
    plain: dict[str, Tensor] = {}
    for name, layer in [*((f"convs.{k}", layer) for k, layer in enumerate(network.convs)), ("leave", network.leave)]:
        plain[f"{name}.weight"], plain[f"{name}.bias"] = layer.weight.detach(), layer.bias.detach()  # type: ignore
    table = None if network.embed is None else network.embed.weight.detach()
    h = x
    if config.condition in ("embedding", "concatenation"):
        assert cond is not None
        beside = cond
        if not config.cond_channels:
            vector = torch.eye(config.classes)[cond] if table is None else table[cond]
            beside = vector[:, :, None, None] * torch.ones(1, 1, *x.shape[2:])
        h = torch.cat([x, beside], 1)
    for level in range(len(config.multipliers)):
        stride = 1 if config.form == "patch" and level == len(config.multipliers) - 1 else 2
        h = F.conv2d(h, plain[f"convs.{level}.weight"], plain[f"convs.{level}.bias"], stride, 1)
        if level and config.norm != "none":
            norm: Any = network.norms[level]
            if config.norm == "group":
                h = F.group_norm(h, math.gcd(h.shape[1], config.groups), norm.weight, norm.bias, config.eps)
            else:
                h = F.batch_norm(h, None, None, norm.weight, norm.bias, True, 0.0, config.eps)
        h = torch.where(h > 0, h, config.slope * h)
    if config.form == "dcgan":
        logits = h.reshape(len(h), -1) @ plain["leave.weight"].T[:, 0] + plain["leave.bias"]
        if config.condition == "projection":
            assert table is not None
            logits = logits + (table[cond] * h.sum((2, 3))).sum(1)
        return logits
    logits = F.conv2d(h, plain["leave.weight"], plain["leave.bias"], 1, 1)
    if config.condition == "projection":
        assert table is not None
        kernels = table[cond][:, :, None, None].expand(-1, -1, 4, 4)  # a convolution of each sample's own
        logits = logits + torch.cat([F.conv2d(h[j : j + 1], kernels[j : j + 1], padding=1) for j in range(len(h))])
    return logits


@pytest.mark.parametrize("form", ["dcgan", "patch"])
@pytest.mark.parametrize("norm", ["none", "group", "batch"])
@pytest.mark.parametrize("spectral", [True, False])
@pytest.mark.parametrize("condition", ["none", "projection", "embedding", "concatenation", "image"])
def test_the_discriminator_is_its_formula(form: str, norm: str, spectral: bool, condition: str) -> None:
    changes: dict[str, Any] = {"condition": condition, "classes": 0 if condition == "none" else 3}
    if condition == "image":
        changes = {"condition": "concatenation", "cond_channels": 2}
    network = discriminator(form=form, norm=norm, spectral_norm=spectral, in_channels=2, **changes)
    network.eval()  # no step of the power iteration; batch norm is asked for the batch's own moments
    for norm_of in network.norms:
        norm_of.train()
    x, cond = numbers((3, 2, 12, 12)), given_of(network.config)
    wanted = judged_by_torch(network, x, cond)
    found = network(x, cond)
    assert tuple(found.shape) == ((3,) if form == "dcgan" else (3, 1, *network.config.logits))
    torch.testing.assert_close(found.detach(), wanted.detach(), rtol=1e-4, atol=1e-4)
    if condition in ("projection", "embedding", "concatenation"):
        assert not torch.allclose(found, network(x, (CLASSES + 1) % 3))


@pytest.mark.parametrize("norm", ["none", "group", "batch"])
@pytest.mark.parametrize("form", ["dcgan", "patch"])
def test_each_logit_is_of_its_own_image_but_with_batch_norm(norm: str, form: str) -> None:
    """What makes two processes train like one: their gradients then are parts of the sum of one."""
    network = discriminator(norm=norm, form=form, condition="projection", classes=3, spectral_norm=False).train()
    x = numbers((3, 1, 12, 12))
    whole = network(x, CLASSES)
    alone = torch.cat([network(x[j : j + 1], CLASSES[j : j + 1]) for j in range(3)])
    assert torch.allclose(whole, alone, rtol=1e-5, atol=1e-6) == (norm != "batch")


@pytest.mark.parametrize(("multipliers", "patch"), [((1,), 7), ((1, 2), 16), ((1, 2, 2), 34)])
def test_a_logit_of_patches_sees_its_patch(multipliers: tuple[int, ...], patch: int) -> None:
    """By the gradient of one logit in the middle: pixels further away do nothing."""
    network = discriminator(form="patch", image_size=None, multipliers=multipliers, spectral_norm=False)
    x = numbers((1, 1, 96, 96)).requires_grad_()
    logits = network(x)
    (slope,) = torch.autograd.grad(logits[0, 0, logits.shape[2] // 2, logits.shape[3] // 2], x)
    rows = slope[0, 0].abs().sum(1).nonzero()[:, 0]
    assert int(rows[-1] - rows[0]) + 1 == network.config.patch == patch


def test_the_published_patches_are_70_pixels() -> None:
    config = DiscriminatorConfig(form="patch", image_size=256, in_channels=3, channels=64, multipliers=(1, 2, 4, 8))
    assert config.patch == 70
    assert config.logits == (30, 30)


def test_spectral_norm_makes_the_largest_singular_value_one() -> None:
    """Of every weight, by NumPy's decomposition, after some calls in training mode."""
    network = discriminator(condition="projection", classes=3).train()
    for _ in range(60):
        network(numbers((3, 1, 12, 12)), CLASSES)
    layers = [*network.convs, network.leave, network.embed]
    assert len(layers) == 4
    for layer in layers:
        weight = layer.weight.detach().flatten(1).numpy()  # type: ignore[union-attr,operator]
        assert np.linalg.svd(weight, compute_uv=False)[0] == pytest.approx(1.0, rel=1e-3)
    free = discriminator(spectral_norm=False)
    assert isinstance(free.convs[0].weight, nn.Parameter)


def test_power_iterations_look_at_weights_alone() -> None:
    """Processes that call as often with other images keep the same vectors."""
    first, second = discriminator().train(), discriminator().train()
    for seed in range(3):
        first(numbers((2, 1, 12, 12), seed))
        second(numbers((5, 1, 12, 12), 100 + seed))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


@pytest.mark.parametrize("form", ["dcgan", "patch"])
@pytest.mark.parametrize("norm", ["none", "group"])
def test_gradients_of_gradients(form: str, norm: str) -> None:
    """What a gradient penalty takes, by finite differences: group norm is torch's own, differentiable twice."""
    network = discriminator(form=form, norm=norm, image_size=8, condition="projection", classes=3).double().eval()
    x = numbers((2, 1, 8, 8)).double().requires_grad_()
    cond = torch.tensor([0, 2])
    assert torch.autograd.gradcheck(
        lambda x: network(x, cond).flatten(1).sum(1) if form == "patch" else network(x, cond), x
    )
    assert torch.autograd.gradgradcheck(lambda x: network(x, cond).sum(), x)


# --------------------------------------------------------------------------------------------- configurations, errors


def test_configurations_through_json_and_the_registry() -> None:
    first = GeneratorConfig(image_size=(6, 20), multipliers=[1], condition="modulation", classes=3)  # type: ignore[arg-type]
    second = DiscriminatorConfig(form="patch", image_size=None, condition="concatenation", cond_channels=2)
    assert first.multipliers == (1,)
    for config, name in ((first, "Generator"), (second, "Discriminator")):
        again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        network_class, config_class = NETWORKS[name]
        network = network_class(config)
        assert config_class is type(config)
        assert json.loads(json.dumps(stored.network_data(network)))["name"] == name
    with pytest.raises(ValueError, match=r"GeneratorConfig has the fields image_size.*, got 'size'"):
        GeneratorConfig.from_dict({"size": 3})


@pytest.mark.parametrize("name", GANS)
def test_presets_go_together(name: str) -> None:
    first, second = gan_preset(name)
    with torch.device("meta"):
        made, judge = Generator(first), Discriminator(second)
    cond = None if not first.classes else torch.zeros(2, dtype=torch.int64, device="meta")
    images = made(torch.zeros(2, made.latent_channels, device="meta"), cond)
    assert tuple(images.shape) == (2, *first.shape)
    assert tuple(judge(images, cond).shape) == (2,)


def test_the_published_generator_has_the_sizes_of_its_figure() -> None:
    """Figure 1 of Radford et al. 2015: 4 x 4 x 1024, 8 x 8 x 512, 16 x 16 x 256, 32 x 32 x 128, 64 x 64 x 3."""
    with torch.device("meta"):
        network = Generator(gan_preset("dcgan-64")[0])
    assert network.config.start == (4, 4)
    assert network.enter.out_features == 4 * 4 * 1024
    widths = [double.conv.weight.shape[1] for double in network.doubles]  # type: ignore[union-attr,index]
    assert widths == [512, 256, 128, 3]
    with pytest.raises(ValueError, match=r"name must be one of dcgan-digits, .*, got 'dcgan'"):
        gan_preset("dcgan")


@pytest.mark.parametrize(
    ("kind", "changes", "sentence"),
    [
        (GeneratorConfig, {"image_size": 30}, "image_size must be divisible by 4 for 2 levels, got 30"),
        (GeneratorConfig, {"image_size": (28, 29)}, r"image_size must be divisible by 4 for 2 levels, got \(28, 29\)"),
        (GeneratorConfig, {"latent_channels": 0}, "latent_channels must lie in 1..1048576, got 0"),
        (GeneratorConfig, {"channels": 2.5}, "channels must be an integer, got 2.5"),
        (
            GeneratorConfig,
            {"multipliers": ()},
            r"multipliers must be 1 to 12 numbers, each in 1..32768 for 32 channels",
        ),
        (GeneratorConfig, {"multipliers": (1, 0)}, "multipliers must be 1 to 12 numbers"),
        (GeneratorConfig, {"norm": "layer"}, "norm must be one of 'none', 'group', 'batch', got 'layer'"),
        (GeneratorConfig, {"eps": 0.0}, "eps must be positive and finite, got 0.0"),
        (GeneratorConfig, {"classes": 3}, "classes must be 0 where condition is 'none', got 3"),
        (
            GeneratorConfig,
            {"condition": "embedding"},
            "classes must lie in 1..1048576 where condition is 'embedding', got 0",
        ),
        (
            GeneratorConfig,
            {"condition": "modulation", "classes": 3, "norm": "none"},
            "norm must be 'group' or 'batch' where condition is 'modulation', got 'none'",
        ),
        (DiscriminatorConfig, {"image_size": 30}, "image_size must be divisible by 4 for 2 levels, got 30"),
        (DiscriminatorConfig, {"image_size": None}, "image_size must be given where form is 'dcgan', got None"),
        (
            DiscriminatorConfig,
            {"form": "patch", "image_size": 4},
            "image_size must leave a logit of each patch of 16 pixels, got 4",
        ),
        (DiscriminatorConfig, {"slope": -0.1}, r"slope must lie in \[0, 1\], got -0.1"),
        (
            DiscriminatorConfig,
            {"cond_channels": 2},
            "cond_channels must be 0 unless condition is 'concatenation' and classes is 0, got 2",
        ),
        (
            DiscriminatorConfig,
            {"condition": "projection"},
            "classes must lie in 1..1048576 where condition is 'projection', got 0",
        ),
        (DiscriminatorConfig, {"form": "stylegan"}, "form must be one of 'dcgan', 'patch', got 'stylegan'"),
    ],
)
def test_bad_configurations(kind: Any, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{kind.__name__}.{sentence}"):
        kind(**changes)
    with pytest.raises(ValueError, match=sentence):
        kind.from_dict({**dataclasses.asdict(kind()), **json.loads(json.dumps(changes))})


Z, X = numbers((3, 5)), numbers((3, 1, 12, 12))


@pytest.mark.parametrize(
    ("network", "given", "cond", "sentence"),
    [
        (generator, Z[:, :4], None, r"z must have shape \(B, 5\), got \(3, 4\)"),
        (generator, [1.0], None, r"z must have shape \(B, 5\), got list"),
        (generator, Z.double(), None, "z must have torch.float32, the dtype of the weights, got torch.float64"),
        (generator, Z, CLASSES, r"cond must be None for a network without condition, got torch.int64 \(3,\)"),
        (discriminator, X, CLASSES, r"cond must be None for a network without condition, got torch.int64 \(3,\)"),
        (discriminator, X[:, :, :8], None, r"x must have height and width \(12, 12\), got \(3, 1, 8, 12\)"),
        (discriminator, X[:, :, :10], None, "height and width of x must be divisible by 4"),
        (discriminator, X.expand(-1, 3, -1, -1), None, r"x must have shape \(B, 1, H, W\), got \(3, 3, 12, 12\)"),
    ],
)
def test_bad_input(network: Any, given: Any, cond: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        network()(given, cond)


@pytest.mark.parametrize("condition", ["projection", "embedding", "concatenation"])
def test_bad_classes(condition: str) -> None:
    judge = discriminator(condition=condition, classes=3)
    make = generator(condition="modulation" if condition == "projection" else condition, classes=3)
    for call in (lambda cond: judge(X, cond), lambda cond: make(Z, cond)):
        for cond, sentence in [
            (None, r"cond must be an integer tensor of shape \(3,\), got NoneType"),
            (CLASSES[:2], r"cond must be an integer tensor of shape \(3,\), got torch.int64 \(2,\)"),
            (CLASSES.float(), r"cond must be an integer tensor of shape \(3,\), got torch.float32 \(3,\)"),
            (CLASSES + 1, r"cond must hold classes in 0..2, got 3"),
        ]:
            with pytest.raises(ValueError, match=f"^{sentence}$"):
                call(cond)


def test_a_bad_image_beside_the_image() -> None:
    network = discriminator(form="patch", condition="concatenation", cond_channels=2, image_size=None)
    with pytest.raises(ValueError, match=r"^cond must be an image of shape \(3, 2, 12, 12\), got torch.float32 \(3, 1"):
        network(X, X)
    with pytest.raises(ValueError, match=r"^cond must be an image of shape \(3, 2, 12, 12\), got NoneType"):
        network(X)


def test_first_weights_are_narrow() -> None:
    """N(0, 0.02^2), as in DCGAN."""
    torch.manual_seed(3)
    network = Generator(GeneratorConfig(28))
    assert float(network.enter.weight.detach().std()) == pytest.approx(0.02, rel=0.02)
    assert not network.enter.bias.any()
