"""Training a `diffkern.GAN`: in every iteration the discriminator's steps, then one of the generator.

Goodfellow et al. 2014 (arXiv 1406.2661), algorithm 1; lecture 000.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkern import ops, parallel, records
from diffkern.checks import unknown
from diffkern.data import Batch, Images
from diffkern.gan import GAN
from diffkern.nn import GANS, Discriminator, DiscriminatorConfig, Generator, GeneratorConfig, gan_preset
from diffkern.train.checkpoint import newest
from diffkern.train.config import TrainConfig
from diffkern.train.options import adversarial_options, check_unused, network_values
from diffkern.train.stepper import Iteration, Picture, in_mode
from diffkern.train.two_networks import Terms, TwoNetworks, each

__all__ = ["AdversarialStepper", "make_gan"]

PICTURE_SEED = 0
VALIDATION_SEED = 0x76616C


class AdversarialStepper(TwoNetworks):
    """An iteration: ``d_steps`` of the discriminator, one of the generator, all on the same images.

    Latents and the points of a penalty are functions of the examples' seeds, of step k of the discriminator of these
    plus k. The loss of an iteration is the generator's.
    """

    def __init__(self, gan: GAN, config: TrainConfig, device: torch.device) -> None:
        self.gan = gan
        super().__init__(gan, config, device, gan.generator, gan.discriminator, adversarial_options(config))

    @classmethod
    def make(cls, config: TrainConfig, images: Images, folder: Path | None) -> GAN:
        """A GAN for the data, or what ``init`` says (of a run that goes on its own)."""
        if config.init is not None:
            found = (None if folder is None else newest(folder)) or newest(config.init)
            return GAN.from_pretrained(found or config.init)
        classes = images.classes if config.labels and images.labels is not None else None
        return make_gan(config, images.shape, 0 if classes is None else len(classes))

    @classmethod
    def check(cls, trained: GAN, config: TrainConfig, images: Images) -> None:
        """Images of the generator's shape, labels that both networks have, and settings that mean something."""
        check_unused(config)
        if trained.shape not in (None, images.shape):
            raise ValueError(
                f"data must have images of the generator's shape {list(trained.shape or ())}, got {list(images.shape)}"
            )
        options = adversarial_options(config)
        for name, asked, has in (
            ("loss", options.loss, trained.loss_kind),
            ("penalty", options.penalty, trained.penalty),
        ):
            if asked not in (None, has):
                raise ValueError(
                    f"TrainConfig.adversarial.{name} must be the GAN's, {has!r}, or left out, got {asked!r}"
                )
        if not trained.classes:
            return
        if images.labels is None:
            raise ValueError(f"data must have labels for a GAN of {trained.classes} classes, got none")
        wrong = images.labels[images.labels >= trained.classes]
        if len(wrong):
            raise ValueError(f"data must have labels below {trained.classes}, the GAN's, got {int(wrong[0])}")

    def iterate(self, micro_batches: list[Batch], iteration: int, stop: bool = False) -> Iteration:
        """The discriminator's steps, then the generator's."""
        self.set_rates(iteration)
        self.power_step()
        stopped, good, sums = False, True, dict[str, float]()
        for k in range(self.options.d_steps):
            found, asked = self.gradient(
                micro_batches, iteration, self.critic_parameters, functools.partial(self._critic_terms, k), stop
            )
            norm, finite = self.update(self.critic_parameters)
            stopped, good = stopped or asked, good and finite
            for name, values in {**found, "discriminator_gradient_norm": torch.tensor(norm)}.items():
                if name != "loss":
                    sums[name] = sums.get(name, 0.0) + float(values.mean()) / self.options.d_steps
        warning = self.watched(found)
        made, _ = self.gradient(micro_batches, iteration, self.first_parameters, self._first_terms)
        norm, finite = self.update(self.first_parameters)
        self.count(good and finite)
        losses = made["loss"]
        return Iteration(losses, norm, stopped, {"generator_loss": float(losses.mean()), **sums}, warning)

    def _critic_terms(self, step: int, number: int, batch: Batch) -> Terms:
        x0, cond, seeds = self._examples(batch)
        with self.autocast():
            found = self.gan.discriminator_terms(x0, cond, seeds + step)
        terms = {"loss": found.adversarial, "discriminator_loss": found.adversarial}
        if found.penalty is not None:
            terms |= {"loss": found.adversarial + self.gan.penalty_weight * found.penalty, "penalty": found.penalty}
        assert found.real is not None
        return {**terms, "real_logit": each(found.real), "fake_logit": each(found.fake)}

    def _first_terms(self, number: int, batch: Batch) -> Terms:
        with self.autocast():
            return {"loss": self.gan.generator_loss(*self._examples(batch), reduction="none")}

    def _examples(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor]:
        cond = batch.labels.to(self.device) if self.gan.classes and batch.labels is not None else None
        return self.images(batch), cond, batch.seeds.to(self.device)

    # ------------------------------------------------------------------------------------------------------- looked at

    def once(self, images: Images) -> None:
        """A generated image, and the logits that an iteration is made of."""
        batch = images.batch(torch.zeros(1, dtype=torch.int64))
        x0, cond, seeds = self._examples(Batch(*batch, torch.zeros(1, dtype=torch.int64), 0))
        fake = self.gan.generate(self.gan.latents(1, seeds), cond)
        for x in [x0, fake] * self.options.d_steps + [fake]:
            self.gan.judge(x, cond)

    @torch.no_grad()
    def validate(self, images: Images) -> dict[str, float | None]:
        """The discriminator's loss, and its mean logit, of images that it has not seen, against generated ones."""
        count, sums = len(images), torch.zeros(2, dtype=torch.float64)
        seeds, mine = ops.seeds(VALIDATION_SEED, count), parallel.share(count)
        with in_mode(self.gan, training=False):
            for first in range(mine.start, mine.stop, 64):
                chosen = torch.arange(first, min(first + 64, mine.stop))
                x0, labels = images.batch(chosen)
                found = self.gan.discriminator_terms(*self._examples(Batch(x0, labels, seeds[chosen], first)))
                assert found.real is not None
                sums += torch.stack([found.adversarial.double().sum(), each(found.real).double().sum()]).cpu()
        loss, logit = (parallel.summed(sums.to(self.device))[0] / count).tolist()
        return {"validation_loss": loss, "validation_logit": logit}

    def picture(self, images: Images, held_out: Images | None) -> Picture:
        """Generated images, of the classes in turn."""
        n, known = self.config.sample_n, self.gan.classes
        cond = torch.arange(n, device=self.device) % known if known else None
        made = self.gan.sample(n, seeds=PICTURE_SEED, cond=cond)
        return Picture(list(made.cpu().split(min(16, known) if known else 8)), f"{n} images of the generator")


def make_gan(config: TrainConfig, shape: tuple[int, int, int], classes: int = 0) -> GAN:
    """The GAN that the configuration trains on images [C, H, W] of so many classes, with its first weights.

    ``config.network`` is a name in `diffkern.nn.GANS` (or that of another objective's default: networks of
    no preset), ``network_options`` are fields of the generator's configuration, ``adversarial["discriminator"]`` of the
    discriminator's. Weights come from ``config.seed`` alone. ValueError for names and fields that there are not.
    """
    options = adversarial_options(config)
    if config.network != TrainConfig.network and config.network not in GANS:
        raise ValueError(unknown("TrainConfig.network of the objective 'gan'", config.network, list(GANS)))
    bases: tuple[Any, Any] = (GeneratorConfig(), DiscriminatorConfig())
    if config.network != TrainConfig.network:
        bases = gan_preset(config.network)
    channels, height, width = shape
    size = height if height == width else (height, width)
    options_of = config.network_options, options.discriminator
    made: list[Any] = []
    for base, entry, given in zip(bases, ("network_options", "adversarial.discriminator"), options_of, strict=True):
        generates = isinstance(base, GeneratorConfig)
        values = base.to_dict() | {"image_size": size, "classes": classes}
        values["out_channels" if generates else "in_channels"] = channels
        if not classes or base.condition == "none":
            values["condition"] = "none" if not classes else "modulation" if generates else "projection"
        kind: Any = type(base)
        made.append(records.record(kind, network_values(entry, values, given, kind.__name__), f"{kind.__name__}."))
    with torch.random.fork_rng(devices=[]):  # the first weights come from torch's own generator
        torch.manual_seed(config.seed)
        return GAN(
            Generator(made[0]),
            Discriminator(made[1]),
            loss=options.loss or "non_saturating",
            penalty=options.penalty,
            penalty_weight=options.penalty_weight,
        )
