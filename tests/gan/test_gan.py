"""`GAN`: its losses by hand, each in its own network alone, the same in any split, samples by address."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diffkern import GAN, ops, streams
from diffkern.nn import Discriminator, DiscriminatorConfig, Generator, GeneratorConfig
from diffkern.objectives.adversarial import ADVERSARIAL, discriminator_loss, generator_loss, r1_penalty, r2_penalty

MAKER = GeneratorConfig(8, 1, 5, 4, (1, 2), groups=2, condition="modulation", classes=3, embedding=3)
JUDGE = DiscriminatorConfig("dcgan", 8, 1, 4, (1, 2), condition="projection", classes=3)
X = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
CLASSES = torch.tensor([0, 1, 2, 2, 1, 0])
SEEDS = ops.seeds(11, 6)


def made(loss: Any = "non_saturating", judge: DiscriminatorConfig = JUDGE, **options: Any) -> GAN:
    torch.manual_seed(0)
    gan = GAN(Generator(MAKER), Discriminator(judge), loss, **options)
    with torch.no_grad():
        for parameter in gan.parameters():
            parameter.mul_(3.0)
    return gan.eval()  # no step of the power iteration, so that calls can be compared


def gradients(gan: GAN) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in gan.model.named_parameters()}


# -------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("loss", ADVERSARIAL)
def test_losses_are_those_of_the_networks_by_hand(loss: Any) -> None:
    gan = made(loss)
    z = [ops.randn([6, 5], SEEDS, streams.ADVERSARIAL + k) for k in (0, 1)]
    fake = [gan.generator(each, CLASSES) for each in z]
    real_logits = gan.discriminator(X, CLASSES)
    wanted = discriminator_loss(real_logits, gan.discriminator(fake[0], CLASSES), loss, "none")
    found = gan.discriminator_loss(X, CLASSES, SEEDS, reduction="none")
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(gan.discriminator_loss(X, CLASSES, SEEDS), wanted.mean())
    wanted = generator_loss(gan.discriminator(fake[1], CLASSES), loss, real_logits, "none")
    torch.testing.assert_close(gan.generator_loss(X, CLASSES, SEEDS, reduction="none"), wanted)
    torch.testing.assert_close(gan(X, part="generator", cond=CLASSES, seeds=SEEDS, reduction="sum"), wanted.sum())


@pytest.mark.parametrize("loss", ADVERSARIAL)
@pytest.mark.parametrize("penalty", [None, "gradient", "r1_r2"])
def test_each_loss_has_gradients_in_its_own_network_alone(loss: Any, penalty: Any) -> None:
    gan = made(loss, penalty=penalty)
    gan.discriminator_loss(X, CLASSES, SEEDS).backward()
    found = gradients(gan)
    assert all((g is None) == name.startswith("generator.") for name, g in found.items())
    assert any(bool(g.any()) for g in found.values() if g is not None)
    gan.zero_grad()
    gan.generator_loss(X, CLASSES, SEEDS).backward()
    found = gradients(gan)
    assert all((g is None) == name.startswith("discriminator.") for name, g in found.items())
    assert any(bool(g.any()) for g in found.values() if g is not None)
    assert all(p.requires_grad for p in gan.parameters())


def test_penalties_are_added_with_their_weight() -> None:
    plain = made()
    base = plain.discriminator_loss(X, CLASSES, SEEDS, reduction="none").detach()
    fake = plain.generator(ops.randn([6, 5], SEEDS, streams.ADVERSARIAL), CLASSES)

    def judge(x: Tensor) -> Tensor:
        found: Tensor = plain.discriminator(x, CLASSES)
        return found

    r1 = r1_penalty(judge, X, reduction="none").detach()
    r2 = r2_penalty(judge, fake, reduction="none").detach()
    for penalty, wanted in (("r1", r1), ("r2", r2), ("r1_r2", r1 + r2)):
        found = made(penalty=penalty, penalty_weight=3.0).discriminator_loss(X, CLASSES, SEEDS, reduction="none")
        torch.testing.assert_close(found.detach(), base + 3.0 * wanted)
    without = made(penalty="gradient", penalty_weight=0.0).discriminator_terms(X, CLASSES, SEEDS)
    assert without.penalty is None


def test_terms_are_the_parts_and_the_logits() -> None:
    gan = made(penalty="gradient")
    terms = gan.discriminator_terms(X, CLASSES, SEEDS)
    assert terms.penalty is not None
    assert terms.real is not None
    total = gan.discriminator_loss(X, CLASSES, SEEDS, reduction="none")
    torch.testing.assert_close(terms.adversarial + 10.0 * terms.penalty, total)
    torch.testing.assert_close(discriminator_loss(terms.real, terms.fake, gan.loss_kind, "none"), terms.adversarial)
    assert not terms.real.requires_grad
    assert not terms.fake.requires_grad
    assert gan.generator_terms(X, CLASSES, SEEDS).real is None


@pytest.mark.parametrize("form", ["dcgan", "patch"])
@pytest.mark.parametrize("penalty", [None, "gradient"])
def test_a_step_is_the_sum_of_its_parts(form: Any, penalty: Any) -> None:
    """Losses of every example and summed gradients, in two micro-batches or on two processes."""
    judge = dataclasses.replace(JUDGE, form=form, norm="group", groups=2)
    whole, cut = (made("hinge", judge, penalty=penalty).double() for _ in range(2))
    x0 = X.double()
    for part in ("discriminator", "generator"):
        losses = whole(x0, part=part, cond=CLASSES, seeds=SEEDS, reduction="none")  # type: ignore[arg-type]
        losses.sum().backward()
        found = []
        for some in (slice(0, 2), slice(2, 6)):
            options = {"cond": CLASSES[some], "seeds": SEEDS[some], "reduction": "none"}
            found.append(cut(x0[some], part=part, **options))  # type: ignore[arg-type]
            found[-1].sum().backward()
        torch.testing.assert_close(torch.cat(found), losses, rtol=1e-9, atol=1e-9)
    for name, gradient in gradients(whole).items():
        torch.testing.assert_close(gradients(cut)[name], gradient, rtol=1e-7, atol=1e-9)


class Line(nn.Module):
    """x = a + b z of one number, with which the game is solved by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.zeros(1))
        self.wide = nn.Parameter(torch.ones(1))

    def forward(self, z: Tensor) -> Tensor:
        return self.at + self.wide * z


@pytest.mark.parametrize(("loss", "penalty"), [("non_saturating", "r1"), ("wasserstein", "gradient"), ("hinge", "r1")])
def test_it_learns_where_the_data_are(loss: Any, penalty: Any) -> None:
    """Data N(2, 0.5): a line of normals moves there. Foreign networks, with what they do not say."""
    torch.manual_seed(1)
    judge = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    gan = GAN(Line(), judge, loss, penalty=penalty, penalty_weight=0.3, latent_channels=1, shape=(1,))
    optimizer = torch.optim.Adam(gan.parameters(), lr=0.02, betas=(0.5, 0.9))
    data = torch.Generator().manual_seed(2)
    for step in range(400):
        x0 = 2.0 + 0.5 * torch.randn(64, 1, generator=data)
        for part in ("discriminator", "generator"):
            optimizer.zero_grad()  # Adam leaves alone what has no gradient
            gan(x0, part=part, seeds=step).backward()  # type: ignore[arg-type]
            optimizer.step()
    samples = gan.sample(2000, seeds=0)
    assert float(samples.mean()) == pytest.approx(2.0, abs=0.35)
    assert 0.15 < float(samples.std()) < 1.0


# ------------------------------------------------------------------------------------------------------------ sampling


def test_a_sample_is_that_of_its_seed_in_any_split() -> None:
    gan = made()
    cond = torch.arange(9) % 3
    whole = gan.sample(9, seeds=4, cond=cond)
    assert whole.shape == (9, 1, 8, 8)
    assert not whole.requires_grad
    for first, n in ((0, 4), (4, 5), (7, 1)):
        part = gan.sample(n, seeds=ops.seeds(4, n, first), cond=cond[first : first + n])
        torch.testing.assert_close(part, whole[first : first + n], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gan.sample(9, z=gan.latents(9, 4), cond=cond), whole)
    assert not torch.equal(gan.sample(9, seeds=5, cond=cond), whole)
    assert torch.equal(gan.latents(9, 4), ops.randn([9, 5], ops.seeds(4, 9), streams.INITIAL))
    torch.manual_seed(3)
    fresh = gan.sample(2, cond=cond[:2])
    torch.manual_seed(3)
    assert torch.equal(gan.sample(2, cond=cond[:2]), fresh)


def test_sampling_is_in_evaluation_mode_and_puts_it_back() -> None:
    maker = dataclasses.replace(MAKER, norm="batch")
    torch.manual_seed(0)
    gan = GAN(Generator(maker), Discriminator(JUDGE)).train()
    gan.generator.norms[1].eval()  # type: ignore[union-attr,index]
    before = {name: tensor.clone() for name, tensor in gan.state_dict().items()}
    cond = torch.tensor([0, 1, 2])
    whole = gan.sample(3, seeds=0, cond=cond)
    alone = gan.sample(1, seeds=ops.seeds(0, 3)[1:2], cond=cond[1:2])
    torch.testing.assert_close(alone, whole[1:2], rtol=1e-5, atol=1e-6)
    assert gan.training
    assert not gan.generator.norms[1].training  # type: ignore[union-attr,index]
    assert all(torch.equal(tensor, gan.state_dict()[name]) for name, tensor in before.items())


def test_in_float64_and_under_autocast() -> None:
    gan = made().double()
    assert gan.sample(2, seeds=0, cond=CLASSES[:2]).dtype == torch.float64
    found = gan.discriminator_loss(X.double(), CLASSES, SEEDS)
    gan = made()
    torch.testing.assert_close(found.float(), gan.discriminator_loss(X, CLASSES, SEEDS), rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = gan.discriminator_loss(X, CLASSES, SEEDS)
        gan.generator_loss(X, CLASSES, SEEDS).backward()
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.detach(), found.float().detach(), rtol=0.05, atol=0.05)


# -------------------------------------------------------------------------------------------------------------- errors


def test_what_it_says_of_itself() -> None:
    gan = made("hinge", penalty="r1")
    assert gan.shape == (1, 8, 8)
    assert (gan.latent_channels, gan.classes, gan.null) == (5, 3, None)
    assert "loss='hinge', penalty='r1', penalty_weight=10" in repr(gan)
    assert [name for name, _ in gan.model.named_children()] == ["generator", "discriminator"]
    assert set(map(id, gan.parameters())) == set(map(id, gan.model.parameters()))
    assert copy.deepcopy(gan).sample(1, seeds=0, cond=CLASSES[:1]).equal(gan.sample(1, seeds=0, cond=CLASSES[:1]))


@pytest.mark.parametrize(
    ("arguments", "options", "sentence"),
    [
        ((lambda z: z, Discriminator(JUDGE)), {}, "generator must be a torch.nn.Module, got function"),
        ((Line(), None), {}, "discriminator must be a torch.nn.Module, got NoneType"),
        ((Line(), Line()), {}, "latent_channels must be given for a generator that does not say it, got None"),
        ((Line(), Line()), {"latent_channels": 0}, "latent_channels must be an integer of at least 1, got 0"),
        (
            (Generator(MAKER), Discriminator(JUDGE)),
            {"latent_channels": 4},
            "latent_channels must be that of the generator, 5, got 4",
        ),
        ((Line(), Line(), "wgan"), {}, "loss must be one of minimax, .*, got 'wgan'"),
        ((Line(), Line()), {"penalty": "r3"}, "penalty must be one of gradient, r1, r2, r1_r2, None, got 'r3'"),
        ((Line(), Line()), {"penalty_weight": "3"}, "penalty_weight must be finite and not negative, got '3'"),
        ((Line(), Line()), {"shape": 8, "latent_channels": 1}, r"shape must be \(C, H, W\), got 8"),
        ((Line(), Line()), {"penalty_weight": -1.0}, "penalty_weight must be finite and not negative, got -1.0"),
        (
            (Generator(MAKER), Discriminator(dataclasses.replace(JUDGE, image_size=12))),
            {},
            r"discriminator must be made for the generator's images, \[1, 8, 8\], got one for \[1, 12, 12\]",
        ),
        (
            (Generator(MAKER), Discriminator(dataclasses.replace(JUDGE, classes=4))),
            {},
            "discriminator must know the classes of the generator, 3, got one of 4",
        ),
    ],
)
def test_what_does_not_fit(arguments: Any, options: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        GAN(*arguments, **options)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda g: g.discriminator_loss(X[:, :, :4], CLASSES, 0), r"x0 must have the shape of the generator's images"),
        (
            lambda g: g.generator_loss(X[:, :, :4], CLASSES, 0),
            r"x0 must have the shape .*\[6, 1, 8, 8\], got \[6, 1, 4",
        ),
        (lambda g: g.discriminator_loss(X, CLASSES, SEEDS[:2]), r"seeds must be an integer or int64 \[6\]"),
        (lambda g: g.generator_loss(X, None, 0), r"cond must be an integer tensor of shape \(6,\), got NoneType"),
        (lambda g: g.discriminator_loss([X], CLASSES, 0), r"x0 must be a tensor \[B, ...\], got list"),
        (lambda g: g(X, part="both", cond=CLASSES), "part must be one of discriminator, generator, got 'both'"),
        (lambda g: g.generator_loss(X, CLASSES, 0, reduction="avg"), "reduction must be one of none, mean, sum, got"),
        (lambda g: g.sample(-1), "n must be an integer of at least 0, got -1"),
        (lambda g: g.sample(2, z=[[0.0] * 5] * 2), "z must be a tensor "),
        (lambda g: g.sample(2, z=torch.zeros(2, 4)), r"z must have the shape \[2, 5\], got \[2, 4\]"),
    ],
)
def test_bad_calls(call: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        call(made())


def test_a_generator_of_other_images_is_said() -> None:
    gan = GAN(Line(), Line(), latent_channels=1, shape=(2,))
    with pytest.raises(ValueError, match=r"^generator must return a tensor of shape \[3, 2\], got shape \[3, 1\]"):
        gan.sample(3, seeds=0)
