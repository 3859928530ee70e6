"""What an encoder says of an image: a Gaussian for each latent, or the latents themselves."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from diffkern import ops, streams

__all__ = ["LOGVAR", "Encoded", "Posterior"]

LOGVAR = (-30.0, 20.0)
"""What logvar is clamped to, as in LDM: a standard deviation is between 3e-7 and 2.2e4."""


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Latents z [B, C, h, w] without regularisation."""

    latents: Tensor

    def mode(self) -> Tensor:
        """z."""
        return self.latents

    def point(self, seeds: ops.Seeds | None = None) -> Tensor:
        """z, whatever the seeds."""
        return self.latents

    diffused = point


@dataclasses.dataclass(frozen=True)
class Posterior:
    """N(mean, exp(logvar)) of every latent: the q(z | x) of Kingma and Welling 2013 (arXiv 1312.6114).

    mean, logvar [B, C, h, w]; logvar lies in `LOGVAR`.
    """

    mean: Tensor
    logvar: Tensor

    @staticmethod
    def of(moments: Tensor) -> Posterior:
        """Of [B, 2 C, h, w], the mean's channels first; logvar is clamped."""
        mean, logvar = moments.chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(*LOGVAR))

    @property
    def std(self) -> Tensor:
        """exp(logvar / 2)."""
        return torch.exp(0.5 * self.logvar)

    def mode(self) -> Tensor:
        """The mean, which is the most likely z."""
        return self.mean

    def sample(self, seeds: ops.Seeds) -> Tensor:
        """z = mean + std n with normals n by address (stream POSTERIOR): seeds int64 [B], or an integer.

        A sample's z depends on its own seed alone. Differentiable in mean and logvar (the reparametrisation).
        ValueError for other seeds.
        """
        drawn = ops.as_seeds(seeds, len(self.mean), self.mean.device)
        with torch.no_grad():
            n = ops.randn(self.mean.shape, drawn, streams.POSTERIOR, dtype=self.mean.dtype)
        return torch.addcmul(self.mean, self.std, n)

    def point(self, seeds: ops.Seeds | None = None) -> Tensor:
        """The mode where there are no seeds, else a sample: what the decoder takes."""
        return self.mode() if seeds is None else self.sample(seeds)

    diffused = point

    def kl(self) -> Tensor:
        """[B]: KL(q(z | x) || N(0, 1)) = sum (mean^2 + exp(logvar) - 1 - logvar) / 2 over all latents, in nats.

        In float32 (float64 for float64). Kingma and Welling 2013, appendix B; lecture 001.
        """
        wide = torch.promote_types(self.mean.dtype, torch.float32)
        mean, logvar = self.mean.to(wide), self.logvar.to(wide)
        return 0.5 * (mean.square() + logvar.expm1() - logvar).flatten(1).sum(dim=1)
