"""A learned codebook: the nearest code, codes that are averages of what falls to them, dead ones that start again."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from diffkern import ops, streams
from diffkern.nn.quantised import CodebookStatistics, Quantised, nearest, squared_error, straight_through
from diffkern.parallel import rank, summed, world

__all__ = ["Codebook", "statistics"]


class Codebook(nn.Module):
    """K codes of C channels (van den Oord and others 2017, arXiv 1711.00937; lecture 001).

    A latent becomes the nearest code; its gradient goes straight through. With a ``decay`` g the codes are averages,
    buffers that `update` changes (there, appendix A.1, and Razavi and others 2019):

        N_k <- g N_k + (1 - g) n_k         S_k <- g S_k + (1 - g) sum of the latents of code k
        e_k  = S_k / N_k                   n_k: how many latents fell to code k

    A code with N_k below ``restart_below`` times the mean of N is dead: it becomes a latent of the batch, with the mean
    count, so that it is not dead at once (Dhariwal and others 2020, arXiv 2005.00341). With decay None the codes are a
    parameter, which the gradient of `Quantised.codebook` trains. Averages of 16 bits would stand still: keep float32.
    """

    counts: Tensor
    sums: Tensor
    updates: Tensor

    def __init__(self, codes: int, channels: int, decay: float | None, restart_below: float) -> None:
        super().__init__()
        self.decay = decay
        self.restart_below = restart_below
        first = torch.empty(codes, channels).uniform_(-1.0 / codes, 1.0 / codes)
        if decay is None:
            self.codes = nn.Parameter(first)
        else:
            self.register_buffer("codes", first)
            self.register_buffer("counts", torch.ones(codes))
            self.register_buffer("sums", first.clone())
            self.register_buffer("updates", torch.zeros(1, dtype=torch.int64))

    def forward(self, z: Tensor, seeds: ops.Seeds | None = None) -> Quantised:
        indices = self._nearest(z)
        codes = self.codes_of(indices, z.dtype)
        return Quantised(
            before=z,
            latents=straight_through(codes, z),
            indices=indices,
            commitment=squared_error(z, codes.detach()),
            codebook=squared_error(z.detach(), codes),
            seeds=seeds,
        )

    def codes_of(self, indices: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """[B, C, h, w] of indices [B, h, w]."""
        return (
            nn.functional.embedding(indices, self.codes).permute(0, 3, 1, 2).contiguous().to(dtype or self.codes.dtype)
        )

    def snap(self, z: Tensor) -> Tensor:
        """The nearest codes of z, without a gradient."""
        return self.codes_of(self._nearest(z), z.dtype).detach()

    def _nearest(self, z: Tensor) -> Tensor:
        rows = z.permute(0, 2, 3, 1)
        return nearest(rows.flatten(0, 2), self.codes).view(rows.shape[:3])

    @torch.no_grad()
    def update(self, encoded: Quantised, seeds: ops.Seeds | None = None) -> int:
        """One step of the averages with a batch, over all processes; how many dead codes have started again.

        Latents of all processes are counted and summed in float64. The latents that dead codes become are drawn by
        address: (seed of the example, stream CODEBOOK + update, position), the smallest first, the lowest code first,
        so that two processes with the halves of a batch do as one with all of it. ``seeds``: of the examples; None:
        those of ``encoded``, and without any the numbers of the examples in the batch. Nothing where decay is None.
        """
        if self.decay is None:
            return 0
        own = encoded.seeds if seeds is None else seeds
        own = None if own is None else ops.as_seeds(own, len(encoded.indices), encoded.before.device)
        rows = encoded.before.detach().permute(0, 2, 3, 1).flatten(0, 2).to(torch.float64)
        falls = encoded.indices.flatten()
        n = torch.zeros(len(self.codes), dtype=torch.float64, device=rows.device).index_add_(
            0, falls, torch.ones_like(rows[:, 0])
        )
        total = torch.zeros(self.codes.shape, dtype=torch.float64, device=rows.device).index_add_(0, falls, rows)
        summed(n, total)
        counts = self.counts.double() * self.decay + n * (1.0 - self.decay)
        sums = self.sums.double() * self.decay + total * (1.0 - self.decay)
        mean = counts.mean()
        dead = (counts < self.restart_below * mean).nonzero()[:, 0]
        found = self._drawn(rows, len(dead), encoded, own)
        dead = dead[: len(found)]
        counts[dead] = mean
        sums[dead] = found * mean
        self.counts.copy_(counts)
        self.sums.copy_(sums)
        least = torch.finfo(torch.float32).tiny  # below it, as without restarts after long, a code stays where it is
        self.codes.copy_(torch.where(counts[:, None] < least, self.codes.double(), sums / counts[:, None]))
        self.updates += 1
        return len(dead)

    def _drawn(self, rows: Tensor, count: int, encoded: Quantised, seeds: Tensor | None) -> Tensor:
        """[n, C]: the latents of all processes with the n smallest draws, n = ``count`` or as many as there are."""
        if not count:
            return rows[:0]
        batch = len(encoded.indices)
        if seeds is None:
            seeds = torch.arange(rank() * batch, (rank() + 1) * batch, dtype=torch.int64, device=rows.device)
        draws = ops.randn(encoded.indices.shape, seeds, streams.CODEBOOK + int(self.updates)).flatten().double()
        order = draws.argsort(stable=True)[:count]
        every = torch.zeros(world(), count, 1 + rows.shape[1], dtype=torch.float64, device=rows.device)
        own = every[rank()]
        own[:, 0] = math.inf
        own[: len(order), 0], own[: len(order), 1:] = draws[order], rows[order]
        summed(every)
        flat = every.flatten(0, 1)
        chosen = flat[:, 0].argsort(stable=True)[:count]
        chosen = chosen[flat[chosen, 0] < math.inf]
        return flat[chosen, 1:]


def statistics(encoded: Quantised, codes: int) -> CodebookStatistics:
    """Usage and perplexity of the codes that a batch has, over all processes."""
    counts = torch.bincount(encoded.indices.flatten(), minlength=codes).double()
    summed(counts)
    shares = counts[counts > 0] / counts.sum()
    return CodebookStatistics(len(shares) / codes, float(torch.exp(-(shares * shares.log()).sum())))
