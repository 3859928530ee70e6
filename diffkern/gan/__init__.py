"""A generator with its discriminator: `GAN(generator, discriminator, "hinge")` trains, samples and is saved as one.

    gan = diffkern.GAN(Generator(g), Discriminator(d))            # g, d = diffkern.nn.gan_preset("dcgan-digits")
    gan.discriminator_loss(images, cond=labels, seeds=seeds).backward()
    gan.generator_loss(images, cond=labels, seeds=seeds).backward()
    samples = gan.sample(16, seeds=0, cond=classes)
    gan.save_pretrained("digits");  gan = diffkern.GAN.from_pretrained("digits")

The losses and penalties under it are in `diffkern.objectives.adversarial`. docs/adversarial.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from diffkern import ops, streams
from diffkern.checks import need_tensor, returned, unknown, unwrapped
from diffkern.draws import draw_seeds
from diffkern.gan import _files
from diffkern.integers import integer
from diffkern.modes import evaluating
from diffkern.names import AdversarialName, GradientPenalty, Reduction
from diffkern.objectives import adversarial
from diffkern.objectives.reduction import reduced
from diffkern.ops import Seeds, as_seeds
from diffkern.parallel import bare

__all__ = ["GAN", "Pair", "Terms"]

PENALTIES = get_args(GradientPenalty)


class Pair(nn.Module):
    """The two networks of a game, as one module that holds all that is trained."""

    def __init__(self, generator: nn.Module, discriminator: nn.Module) -> None:
        super().__init__()
        self.generator, self.discriminator = generator, discriminator


class Terms(NamedTuple):
    """What a step of one of the two networks is made of, one a sample [B]."""

    adversarial: Tensor
    """The loss of the logits alone."""
    penalty: Tensor | None
    """Of the discriminator's gradient, without its weight; None where there is none."""
    real: Tensor | None
    """Logits of real samples [B, ...], without a graph; None where they were not asked for."""
    fake: Tensor
    """Logits of generated samples [B, ...], without a graph."""


class GAN(nn.Module):
    """A generator and a discriminator that play against each other (Goodfellow et al. 2014, 1406.2661; lecture 000).

    - ``generator(z)``, or ``generator(z, cond)`` where a condition is given, makes images of z [B, latent_channels] of
      standard normals; ``discriminator(x)`` or ``(x, cond)`` returns logits [B, ...].
    - ``loss``: what both are trained by, a name of `diffkern.objectives.adversarial`.
    - ``penalty``: of the discriminator's gradient, times ``penalty_weight``: "gradient" (between real and generated
      samples, what "wasserstein" is made for), "r1", "r2", or "r1_r2", both.
    - ``latent_channels``, ``shape``: of z and of one image; those of a `diffkern.nn.Generator` if None.

    Everything is drawn by address from one seed a sample: the latents of the discriminator's step, those of the
    generator's, of samples, and where a penalty is taken, so that a step is the same in any split of its batch (with
    networks that treat each sample alone: no batch norm). Each of the two losses has gradients in its own network and
    none in the other, so that one optimizer may hold both. All parameters are those of ``model``, whose children are
    ``generator`` and ``discriminator``. Raises ValueError, naming argument, rule and value, for what does not fit.
    """

    null: None = None
    """There is no condition that means none."""

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        loss: AdversarialName = "non_saturating",
        *,
        penalty: GradientPenalty | None = None,
        penalty_weight: float = 10.0,
        latent_channels: int | None = None,
        shape: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("generator", generator), ("discriminator", discriminator)):
            if not isinstance(value, nn.Module):
                raise ValueError(f"{name} must be a torch.nn.Module, got {type(value).__name__}")
        if loss not in adversarial.ADVERSARIAL:
            raise ValueError(unknown("loss", loss, adversarial.ADVERSARIAL))
        if penalty is not None and penalty not in PENALTIES:
            raise ValueError(unknown("penalty", penalty, (*PENALTIES, "None")))
        number = isinstance(penalty_weight, int | float) and not isinstance(penalty_weight, bool)
        if not number or not 0.0 <= penalty_weight < float("inf"):
            raise ValueError(f"penalty_weight must be finite and not negative, got {penalty_weight!r}")
        self.model = Pair(generator, discriminator)
        self.loss_kind: AdversarialName = loss
        self.penalty, self.penalty_weight = penalty, float(penalty_weight)
        config = getattr(bare(generator), "config", None)
        self.latent_channels = _stated("latent_channels", latent_channels, getattr(config, "latent_channels", None))
        given = getattr(config, "shape", None) if shape is None else shape
        if not isinstance(given, Sequence | None):
            raise ValueError(f"shape must be (C, H, W), got {given!r}")
        self.shape = None if given is None else tuple(integer("shape", size) for size in given)
        self.classes = int(getattr(config, "classes", 0))
        self._check_alike()

    # ------------------------------------------------------------------------------------------------- the networks

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """Of one sample, as of a `diffkern.Diffusion`, whose images and states may differ: ``shape``."""
        return self.shape

    @property
    def generator(self) -> nn.Module:
        """The network that makes samples."""
        return self.model.generator

    @property
    def discriminator(self) -> nn.Module:
        """The network that tells real from generated."""
        return self.model.discriminator

    def generate(self, z: Tensor, cond: Any = None) -> Tensor:
        """G(z) of latents [B, latent_channels], in the network's mode, with gradients where torch records them."""
        found = unwrapped(self.generator(z) if cond is None else self.generator(z, cond), "generator")
        if self.shape is not None:
            returned(found, torch.Size((z.shape[0], *self.shape)), "generator")
        return found

    def judge(self, x: Tensor, cond: Any = None) -> Tensor:
        """The logits [B, ...] of samples, in the network's mode, with gradients where torch records them."""
        return unwrapped(self.discriminator(x) if cond is None else self.discriminator(x, cond), "discriminator")

    def latents(self, n: int, seeds: Seeds | None = None, *, stream: int = streams.INITIAL) -> Tensor:
        """z [n, latent_channels], standard normals by address, in the dtype and on the device of the generator.

        Sample j of an integer seed is the same in every split of the job; fresh seeds from torch's generator if None.
        """
        n = integer("n", n, 0)
        device, dtype = self._home()
        drawn = draw_seeds(n).to(device) if seeds is None else as_seeds(seeds, n, device)
        return ops.randn([n, self.latent_channels], drawn, stream, dtype=dtype)

    # --------------------------------------------------------------------------------------------------- training

    def forward(self, x0: Tensor, *, part: Literal["discriminator", "generator"], **options: Any) -> Tensor:
        """`discriminator_loss` or `generator_loss`, so that what wraps a module trains it."""
        if part not in ("discriminator", "generator"):
            raise ValueError(unknown("part", part, ("discriminator", "generator")))
        return self.discriminator_loss(x0, **options) if part == "discriminator" else self.generator_loss(x0, **options)

    def discriminator_loss(
        self, x0: Tensor, cond: Any = None, seeds: Seeds | None = None, *, reduction: Reduction = "mean"
    ) -> Tensor:
        """What the discriminator minimises for real samples x0 [B, ...] and as many generated ones, with the penalty.

        ``cond``: the samples' condition, which generated ones get too. ``seeds``: an integer or int64 [B], fresh ones
        from torch's generator if None. ``reduction`` "none" [B], "mean", "sum". No gradient in the generator.
        """
        terms = self.discriminator_terms(x0, cond, seeds)
        loss = terms.adversarial
        if terms.penalty is not None:
            loss = loss + self.penalty_weight * terms.penalty
        return reduced(loss, reduction)

    def discriminator_terms(self, x0: Tensor, cond: Any = None, seeds: Seeds | None = None) -> Terms:
        """The parts of `discriminator_loss`, and the logits: for a log and `CollapseWatch`."""
        seeds = _seeds(x0, seeds)
        with torch.no_grad():
            fake = self._made(x0, cond, seeds, streams.ADVERSARIAL)
        of_real, of_fake = self.judge(x0, cond), self.judge(fake, cond)
        loss = adversarial.discriminator_loss(of_real, of_fake, self.loss_kind, "none")
        return Terms(loss, self._penalty(x0, fake, cond, seeds), of_real.detach(), of_fake.detach())

    def generator_loss(
        self, x0: Tensor, cond: Any = None, seeds: Seeds | None = None, *, reduction: Reduction = "mean"
    ) -> Tensor:
        """What the generator minimises, for as many samples as x0 has; "relativistic" compares them with x0.

        Other latents than those of `discriminator_loss` with the same seeds; everything else as there. No gradient in
        the discriminator's parameters.
        """
        return reduced(self.generator_terms(x0, cond, seeds).adversarial, reduction)

    def generator_terms(self, x0: Tensor, cond: Any = None, seeds: Seeds | None = None) -> Terms:
        """The loss of `generator_loss` and the logits."""
        fake = self._made(x0, cond, _seeds(x0, seeds), streams.ADVERSARIAL + 1)
        of_real = None
        if self.loss_kind == "relativistic":
            with torch.no_grad():
                of_real = self.judge(x0, cond)
        with _without_gradients(self.discriminator):
            of_fake = self.judge(fake, cond)
        loss = adversarial.generator_loss(of_fake, self.loss_kind, of_real, "none")
        return Terms(loss, None, of_real, of_fake.detach())

    def _made(self, x0: Tensor, cond: Any, seeds: Tensor, stream: int) -> Tensor:
        fake = self.generate(self.latents(x0.shape[0], seeds, stream=stream), cond)
        if fake.shape != x0.shape:
            raise ValueError(
                f"x0 must have the shape of the generator's images, {list(fake.shape)}, got {list(x0.shape)}"
            )
        return fake.to(x0.dtype)

    def _penalty(self, real: Tensor, fake: Tensor, cond: Any, seeds: Tensor) -> Tensor | None:
        if self.penalty is None or self.penalty_weight == 0.0:
            return None

        def judge(x: Tensor) -> Tensor:
            return self.judge(x, cond)

        return adversarial.slope_penalty(self.penalty, judge, real, fake, seeds)

    # --------------------------------------------------------------------------------------------------- sampling

    @torch.no_grad()
    def sample(self, n: int, *, seeds: Seeds | None = None, cond: Any = None, z: Tensor | None = None) -> Tensor:
        """n samples [n, C, H, W] by one call of the generator, in evaluation mode, which is put back; no gradients.

        ``seeds``: an integer or int64 [n]; sample j of an integer is the same in every split of the job (`ops.seeds`
        with ``first``). None draws them from torch's generator. ``cond``: classes [n]. ``z``: latents of your own
        [n, latent_channels] in the place of drawn ones.
        """
        n = integer("n", n, 0)
        if z is None:
            z = self.latents(n, seeds)
        else:
            need_tensor("z", z)
            if tuple(z.shape) != (n, self.latent_channels):
                raise ValueError(f"z must have the shape [{n}, {self.latent_channels}], got {list(z.shape)}")
        with evaluating(self):
            return self.generate(z, cond)

    # ---------------------------------------------------------------------------------------------------- storing

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds: plain data, foreign networks by name alone."""
        return _files.described(self)

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        *,
        weights: Mapping[str, Tensor] | None = None,
        average: str | None = None,
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``, both networks, into a folder, each whole or not at all.

        ``weights`` are tensors to write for those of ``model`` that have their names ("generator.enter.weight"), such
        as an average; ``average`` names what then is ``average-NAME.safetensors``. Needs safetensors.
        """
        _files.save(self, folder, weights or {}, average)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        generator: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        average: str | None = None,
        **hub: Any,
    ) -> GAN:
        """What `save_pretrained` wrote, from a folder or a repository "owner/name" of the hub, in evaluation mode.

        The folder of a training run gives its newest checkpoint; ``average`` which of its weights. ``generator`` and
        ``discriminator`` where they are none of `diffkern.nn`. ``dtype`` is that of the file if None. Nothing that the
        file says is imported or run; ValueError in one sentence for a file that does not fit.
        """
        found = _files.load(cls, path, generator, discriminator, average=average, hub=hub)
        return found.to(device=device, dtype=dtype).eval()

    def extra_repr(self) -> str:
        """The loss and the penalty."""
        penalty = "" if self.penalty is None else f", penalty={self.penalty!r}, penalty_weight={self.penalty_weight:g}"
        return f"loss={self.loss_kind!r}{penalty}"

    # ---------------------------------------------------------------------------------------------------- helpers

    def _home(self) -> tuple[torch.device, torch.dtype]:
        """Where the generator is, and in which dtype its latents are."""
        for parameter in self.generator.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
        return torch.device("cpu"), torch.float32

    def _check_alike(self) -> None:
        """ValueError where the two networks of `diffkern.nn` are made for other images or other classes."""
        config = getattr(bare(self.discriminator), "config", None)
        channels, size = getattr(config, "in_channels", None), getattr(config, "size", None)
        stated = (channels, *size) if isinstance(channels, int) and isinstance(size, tuple) else None
        if self.shape is not None and stated not in (None, self.shape):
            raise ValueError(
                f"discriminator must be made for the generator's images, {list(self.shape)}, got one for "
                f"{list(stated or ())}"
            )
        classes = getattr(config, "classes", self.classes)
        if hasattr(bare(self.generator), "config") and classes != self.classes:
            raise ValueError(
                f"discriminator must know the classes of the generator, {self.classes}, got one of {classes}: both are "
                "given the condition"
            )


def _stated(name: str, given: int | None, own: int | None) -> int:
    if given is None and own is None:
        raise ValueError(f"{name} must be given for a generator that does not say it, got None")
    found = integer(name, own if given is None else given)
    if own is not None and found != own:
        raise ValueError(f"{name} must be that of the generator, {own}, got {found}")
    return found


def _seeds(x0: Tensor, seeds: Seeds | None) -> Tensor:
    need_tensor("x0", x0)
    batch = x0.shape[0]
    return draw_seeds(batch, device=x0.device) if seeds is None else as_seeds(seeds, batch, x0.device)


@contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    """What the module computes inside is a constant of its parameters; gradients in its inputs flow."""
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learned:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)
