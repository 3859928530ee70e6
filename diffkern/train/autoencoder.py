"""Training an `Autoencoder`: reconstruction, perceptual and adversarial terms, and what regularises the latents.

Esser et al. 2021 (VQGAN, arXiv 2012.09841), Rombach et al. 2022 (LDM, arXiv 2112.10752); lecture 001 for the bound.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern import parallel
from diffkern.data import Batch, Images, Subset
from diffkern.metrics import psnr
from diffkern.nn import Posterior, Quantised
from diffkern.objectives.adversarial import (
    discriminator_loss,
    generator_loss,
    ratio_of_norms,
    slope_penalty,
    started,
)
from diffkern.train.checkpoint import newest
from diffkern.train.config import TrainConfig
from diffkern.train.ema import Averages
from diffkern.train.options import adversarial_options, autoencoder_options, check_unused
from diffkern.train.perceptual import perceptual
from diffkern.train.reconstruction import AutoencoderTraining, make_autoencoder
from diffkern.train.stepper import Iteration, Picture, in_mode
from diffkern.train.two_networks import Terms, TwoNetworks, each

__all__ = ["AutoencoderStepper"]

MEASURED = 1024
"""Images that the scale of the latents is measured on, at most."""
COLUMNS = 8
MOST = 160.0
"""Decibels, of images that are equal: about what float64 has."""


class _Forward(NamedTuple):
    """One micro-batch through the autoencoder, with its graph."""

    terms: dict[str, Tensor]
    """[B] each, without weights."""
    loss: Tensor
    """[B], without the adversarial term."""
    reconstruction: Tensor
    encoded: Any


class AutoencoderStepper(TwoNetworks):
    """An iteration: a step of the autoencoder, the codebook's averages, and from the start step on the discriminator's.

        loss = |x - r| or (x - r)^2, mean over the image, + perceptual_weight d(x, r)
               + kl_weight KL / numbers of the image    or    codebook_weight codebook + commitment_weight commitment
               + weight lambda generator_loss(C(r))     from ``start`` on

    lambda is `diffkern.objectives.adversarial.adaptive_weight` of the whole batch's gradients, whatever its cut. The
    discriminator sees the images and the reconstructions that the autoencoder's step was made with.
    """

    def __init__(self, trained: AutoencoderTraining, config: TrainConfig, device: torch.device) -> None:
        options = adversarial_options(config)
        options = dataclasses.replace(options, loss=options.loss or "hinge")
        self.autoencoder, self.terms = trained.autoencoder, autoencoder_options(config)
        super().__init__(trained, config, device, trained.autoencoder, trained.discriminator, options)

    @classmethod
    def make(cls, config: TrainConfig, images: Images, folder: Path | None) -> AutoencoderTraining:
        """Networks for the data, or what ``init`` says (of a run that goes on its own)."""
        check_unused(config)
        if config.init is not None:
            found = (None if folder is None else newest(folder)) or newest(config.init)  # a run's folder holds more
            made = AutoencoderTraining.begun(found or config.init, config, images.shape)
        else:
            made = make_autoencoder(config, images.shape)
        name, device = autoencoder_options(config).perceptual, parallel.device_of(config.device)
        distance = perceptual(name, images, folder, device)  # last, as it may take a while
        return AutoencoderTraining(made.autoencoder, made.discriminator, distance)

    @classmethod
    def check(cls, trained: AutoencoderTraining, config: TrainConfig, images: Images) -> None:
        """Images that the autoencoder takes, and settings that mean something."""
        check_unused(config)
        trained.autoencoder.latent_shape(images.shape)  # raises
        if trained.discriminator is None and adversarial_options(config).weight > 0.0:
            raise ValueError("TrainConfig.adversarial.weight must be 0 without a discriminator, got a positive one")
        if trained.perceptual is None and autoencoder_options(config).perceptual is not None:
            raise ValueError(
                "TrainConfig.autoencoder.perceptual must be left out for networks that are given: "
                "AutoencoderTraining(..., perceptual=)"
            )

    # ------------------------------------------------------------------------------------------------------ iteration

    def iterate(self, micro_batches: list[Batch], iteration: int, stop: bool = False) -> Iteration:
        """The autoencoder's step, then the discriminator's where it has started."""
        self.set_rates(iteration)
        self.power_step()
        weight = started(iteration, self.options.start, self.options.weight)
        against = self.discriminator is not None and weight > 0.0
        ratio, kept = self._ratio(micro_batches) if against else (0.0, {})
        made: list[_Forward] = []

        def terms(number: int, batch: Batch) -> Terms:
            forward = kept.get(number) or self._forward(batch, against)
            loss = forward.loss + (weight * ratio * forward.terms["adversarial"] if against else 0.0)
            made.append(_Forward({}, loss.detach(), forward.reconstruction.detach(), _detached(forward.encoded)))
            return {"loss": loss, **forward.terms}

        found, stopped = self.gradient(micro_batches, iteration, self.first_parameters, terms, stop)
        norm, finite = self.update(self.first_parameters)
        every = {name: float(values.mean()) for name, values in found.items() if name != "loss"}
        every |= self._codes(made, finite)
        warning, good = None, finite
        if against:
            critic, _ = self.gradient(
                micro_batches,
                iteration,
                self.critic_parameters,
                lambda number, batch: self._critic_terms(batch, made[number].reconstruction),
            )
            its_norm, finite = self.update(self.critic_parameters)
            every |= {name: float(values.mean()) for name, values in critic.items() if name != "loss"}
            every |= {"adaptive_weight": ratio, "discriminator_gradient_norm": its_norm}
            warning, good = self.watched(critic), good and finite
        self.count(good)
        return Iteration(found["loss"], norm, stopped, every, warning)

    def _forward(self, batch: Batch, against: bool) -> _Forward:
        x0, options = self.images(batch), self.terms
        seeds = batch.seeds.to(self.device)
        with self.autocast():
            r, encoded = self.autoencoder(x0, seeds)
            gap = r.float() - x0.float()
            pixels = (gap.abs() if options.reconstruction == "l1" else gap.square()).flatten(1).mean(1)
            terms, loss = {"reconstruction": pixels}, pixels
            if self.trained.perceptual is not None:
                terms["perceptual"] = self.trained.perceptual(x0, r)
                loss = loss + options.perceptual_weight * terms["perceptual"]
            if isinstance(encoded, Posterior):
                terms["kl"] = encoded.kl()
                loss = loss + options.kl_weight / x0[0].numel() * terms["kl"]
            elif isinstance(encoded, Quantised):
                terms["commitment"] = encoded.commitment
                loss = loss + options.commitment_weight * encoded.commitment
                if encoded.codebook.requires_grad:  # not of codes that are averages
                    terms["codebook"] = encoded.codebook
                    loss = loss + options.codebook_weight * encoded.codebook
            if against:
                assert self.discriminator is not None
                kind = self.options.loss or "hinge"
                real = self.discriminator(x0).detach() if kind == "relativistic" else None
                terms["adversarial"] = generator_loss(self.discriminator(r), kind, real, "none")
        return _Forward(terms, loss, r, encoded)

    def _ratio(self, micro_batches: list[Batch]) -> tuple[float, dict[int, _Forward]]:
        """lambda of the whole batch; the graph of a micro-batch that is the only one is kept, others are made again."""
        layer = self.autoencoder.last_layer
        found = [torch.zeros_like(layer), torch.zeros_like(layer)]
        kept: dict[int, _Forward] = {}
        for number, batch in enumerate(micro_batches):
            self.seed(batch)
            forward = self._forward(batch, True)
            for total, loss in zip(found, (forward.loss, forward.terms["adversarial"]), strict=True):
                total += torch.autograd.grad(loss.sum() / self.config.batch, layer, retain_graph=True)[0].detach()
            if len(micro_batches) == 1:
                kept[number] = forward
        parallel.summed(*found)
        return float(ratio_of_norms(found[0], found[1])), kept

    def _codes(self, made: list[_Forward], finite: bool) -> dict[str, float]:
        """The codebook's averages, and how much of it the batch uses."""
        every = [part.encoded for part in made]
        if not every or not isinstance(every[0], Quantised):
            return {}
        names = ("before", "latents", "indices", "commitment", "codebook", "seeds")
        whole = Quantised(*(torch.cat([getattr(part, name) for part in every]) for name in names))
        used = self.autoencoder.codebook_statistics(whole)
        found = {"code_usage": used.usage, "code_perplexity": used.perplexity}
        if finite and self.autoencoder.config.regularisation == "vq" and self.autoencoder.config.decay is not None:
            found["codes_restarted"] = float(self.autoencoder.update_codebook(whole))
        return found

    def _critic_terms(self, batch: Batch, reconstruction: Tensor) -> Terms:
        assert self.discriminator is not None
        x0, kind = self.images(batch), self.options.loss or "hinge"
        with self.autocast():
            real, fake = self.discriminator(x0), self.discriminator(reconstruction)
            loss = discriminator_loss(real, fake, kind, "none")
            terms = {"loss": loss, "discriminator_loss": loss}
            penalty, seeds = None, batch.seeds.to(self.device)
            if self.options.penalty is not None:
                fakes = reconstruction.to(x0.dtype)
                penalty = slope_penalty(self.options.penalty, self.discriminator, x0, fakes, seeds)
        if penalty is not None:
            terms |= {"loss": loss + self.options.penalty_weight * penalty, "penalty": penalty}
        return {**terms, "real_logit": each(real), "fake_logit": each(fake)}

    # ------------------------------------------------------------------------------------------------------- looked at

    def once(self, images: Images) -> None:
        """An image through the autoencoder, and the logits of an iteration."""
        x0, labels = images.batch(torch.zeros(1, dtype=torch.int64))
        batch = Batch(x0, labels, torch.zeros(1, dtype=torch.int64), 0)
        r = self._forward(batch, False).reconstruction
        if self.discriminator is not None:
            for image in (r, r, self.images(batch)):
                self.discriminator(image)

    @torch.no_grad()
    def validate(self, images: Images) -> dict[str, float | None]:
        """The mean of |x - r| and the mean of the images' PSNR, through the posterior's mode."""
        count, mine = len(images), parallel.share(len(images))
        sums = torch.zeros(2, dtype=torch.float64)
        for first in range(mine.start, mine.stop, 64):
            x0 = images.batch(torch.arange(first, min(first + 64, mine.stop)))[0].to(self.device)
            r = self._reconstructed(x0)
            gap = (r - x0).double().abs().flatten(1).mean(1).sum()
            sums += torch.stack([gap, psnr(r, x0).clamp(max=MOST).sum()]).cpu()
        gap, ratio = (parallel.summed(sums.to(self.device))[0] / count).tolist()
        return {"validation_loss": gap, "validation_psnr": ratio}

    def _reconstructed(self, x0: Tensor) -> Tensor:
        with torch.no_grad(), in_mode(self.autoencoder, training=False):
            r: Tensor = self.autoencoder(x0.to(self.first_parameters[0].dtype))[0]
        return r.float()

    def picture(self, images: Images, held_out: Images | None) -> Picture:
        """Rows of images, the reconstructions below each; of images kept apart where there are any."""
        source = images if held_out is None else held_out
        n = min(self.config.sample_n, len(source))
        x0 = source.batch(torch.arange(n) * len(source) // n)[0].to(self.device)
        r, columns = self._reconstructed(x0).cpu(), min(COLUMNS, n)
        rows = [row for pair in zip(x0.cpu().split(columns), r.split(columns), strict=True) for row in pair]
        return Picture(rows, "images, and below each its reconstruction")

    def finish(self, images: Images, folder: Path, averages: Averages) -> None:
        """The autoencoder of the first average with the scale of its latents, into the run's folder itself."""
        count = min(MEASURED, len(images))
        some = Subset(images, torch.arange(count) * len(images) // count)
        with averages.used(averages.names[0]) if averages.names else torch.no_grad():
            with in_mode(self.autoencoder, training=False):
                parts = (some.batch(part)[0].to(self.device) for part in torch.arange(count).split(64))
                scale, shift = self.autoencoder.measure_scale(parts)
            if parallel.is_main():
                before = self.autoencoder.scale, self.autoencoder.shift
                self.autoencoder.set_scale(scale, shift)
                self.autoencoder.save_pretrained(folder)
                self.autoencoder.set_scale(*before)


def _detached(encoded: Any) -> Any:
    """Without its graph."""
    if not isinstance(encoded, Quantised):
        return None
    values = {f.name: getattr(encoded, f.name) for f in dataclasses.fields(encoded)}
    return Quantised(**{name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()})
