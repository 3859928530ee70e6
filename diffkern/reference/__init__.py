"""The native ops once more in plain torch: slow, obvious, and what every kernel is compared with.

Same arguments as `diffkern.ops`. Arithmetic happens in `compute` (float64 by default), so that a kernel's error can be
measured against it; results are returned in `compute` unless a dtype is named. Noise is exact where it is integer
(Philox) and float64 from there on: the kernels' float32 normals are within a few ulp of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffkern.checks import opened
from diffkern.names import Reduction
from diffkern.plan import COLUMNS
from diffkern.reference._layers import attention, conv3x3, group_norm_act, linear_rows, spatial_attention

__all__ = [
    "attention",
    "conv3x3",
    "dynamic_threshold",
    "group_norm_act",
    "learned_step",
    "linear_rows",
    "loss",
    "moments",
    "noise_sum",
    "noising",
    "normal",
    "philox",
    "quantile",
    "randn",
    "spatial_attention",
    "step",
    "step_logprob",
    "variational",
]

_MASK = np.uint64(0xFFFFFFFF)


def philox(seed: int, stream: int, q: np.ndarray) -> np.ndarray:
    """Philox4x32-10 (Salmon et al. 2011): uint32 [len(q), 4] for the 64-bit counters q under the 64-bit key `seed`."""
    q = np.asarray(q, dtype=np.uint64)
    key = [np.uint64(seed % 2**64) & _MASK, np.uint64(seed % 2**64) >> np.uint64(32)]
    c0, c1 = q & _MASK, q >> np.uint64(32)
    c2 = np.full_like(q, np.uint64(stream % 2**64) & _MASK)
    c3 = np.full_like(q, np.uint64(stream % 2**64) >> np.uint64(32))
    for _ in range(10):
        a, b = np.uint64(0xD2511F53) * c0, np.uint64(0xCD9E8D57) * c2
        c0, c1, c2, c3 = (b >> np.uint64(32)) ^ c1 ^ key[0], b & _MASK, (a >> np.uint64(32)) ^ c3 ^ key[1], a & _MASK
        key = [(key[0] + np.uint64(0x9E3779B9)) & _MASK, (key[1] + np.uint64(0xBB67AE85)) & _MASK]
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def normal(words: np.ndarray) -> np.ndarray:
    """Box and Muller (1958) in float64 on the float32 u and t of design: pairs (r0, r1), (r2, r3) -> 4 normals."""
    even, odd = words[:, 0::2], words[:, 1::2]
    u = (even.astype(np.float32).astype(np.float64) * 2.0**-32 + 2.0**-33).astype(np.float32).astype(np.float64)
    k = (odd + np.uint32(2**29)) >> np.uint32(30)
    fraction = (odd - (k << np.uint32(30))).astype(np.uint32).view(np.int32)
    t = fraction.astype(np.float32) * np.float32(2 * math.pi * 2.0**-32)
    angle = t.astype(np.float64) + k * (math.pi / 2)
    radius = np.sqrt(-2 * np.log(u))
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2).reshape(len(words), 4)


def randn(shape: Sequence[int], seeds: Tensor, stream: int = 0, *, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normals by address, one sample after the other."""
    count = math.prod(shape[1:])
    quads = np.arange((count + 3) // 4)
    samples = [normal(philox(int(s), stream, quads)).reshape(-1)[:count] for s in seeds.tolist()]
    values = np.stack(samples) if samples else np.zeros((0, count))
    return torch.from_numpy(values).reshape(tuple(shape)).to(dtype)


def noise_sum(
    size: Sequence[int], seeds: Tensor, streams: Tensor, weights: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """sum_j weights[j] randn(size, seeds, streams[j])."""
    total = torch.zeros(tuple(size), dtype=torch.float64)
    for stream, weight in zip(streams.tolist(), weights.tolist(), strict=True):
        total = total + weight * randn(size, seeds, stream)
    return total.to(dtype)


def _gather(table: Tensor, index: Tensor | None, batch: int, dims: int, compute: torch.dtype) -> tuple[Tensor, ...]:
    rows = table if index is None else table[index.reshape(-1).long()]
    rows = rows.expand(batch, -1).to(compute)
    return tuple(column.reshape(batch, *(1,) * (dims - 1)) for column in rows.unbind(1))


def _noise(like: Tensor, seeds: Tensor | None, stream: int, noise: Tensor | None, compute: torch.dtype) -> Tensor:
    if noise is not None:
        return noise.to(compute)
    assert seeds is not None
    return randn(like.shape, seeds, stream, dtype=compute)


def noising(
    x0: Tensor,
    table: Tensor,
    index: Tensor | None = None,
    *,
    seeds: Tensor | None = None,
    stream: int = 0,
    noise: Tensor | None = None,
    compute: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """x_t = s x0 + n eps, target = u x0 + v eps, and eps."""
    s, n, u, v = _gather(table, index, x0.shape[0], x0.dim(), compute)
    eps, x = _noise(x0, seeds, stream, noise, compute), x0.to(compute)
    return s * x + n * eps, u * x + v * eps, eps


def loss(
    pred: Tensor,
    x0: Tensor,
    table: Tensor,
    index: Tensor | None = None,
    *,
    seeds: Tensor | None = None,
    stream: int = 0,
    noise: Tensor | None = None,
    reduction: Reduction = "mean",
    compute: torch.dtype = torch.float64,
) -> Tensor:
    """weight mean (pred - (u x0 + v eps))^2 per sample, then none, mean or sum over the batch. Differentiable."""
    u, v, weight = _gather(table, index, x0.shape[0], x0.dim(), compute)
    target = u * x0.to(compute) + v * _noise(x0, seeds, stream, noise, compute)
    squares = (pred.to(compute) - target) ** 2
    losses = weight.flatten() * squares.reshape(len(squares), math.prod(squares.shape[1:])).mean(1)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def _bin_nats(x0: Tensor, e: Tensor, inv_std: Tensor, bin: Tensor) -> Tensor:
    """-ln P(bin of x0) under N(x0 + e, 1 / inv_std^2), the outermost bins of [-1, 1] open."""
    near, far = (e.abs() - bin) * inv_std, (e.abs() + bin) * inv_std  # edges, from the mean outwards
    log_near, log_far = torch.special.log_ndtr(-near), torch.special.log_ndtr(-far)
    between = log_near + torch.log(-torch.expm1(log_far - log_near))
    first = torch.special.log_ndtr((bin - e) * inv_std)
    last = torch.special.log_ndtr((bin + e) * inv_std)
    return -torch.where(x0 < bin - 1, first, torch.where(x0 > 1 - bin, last, between))


def variational(
    pred: Tensor,
    x0: Tensor,
    table: Tensor,
    index: Tensor | None = None,
    *,
    seeds: Tensor | None = None,
    stream: int = 0,
    noise: Tensor | None = None,
    reduction: Reduction = "mean",
    compute: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Squared error, KL or decoder term by their definitions. Differentiable."""
    columns = _gather(table, index, x0.shape[0], x0.dim(), compute)
    u, v, q, clip, k2, r0, r1, inv_std, bin, w_squares, w_bound, w_mean = columns
    m, x = pred.to(compute), x0.to(compute)
    w = torch.zeros_like(x)
    if m.shape != x.shape:
        m, w = m.chunk(2, dim=1)
    d = m - (u * x + v * _noise(x0, seeds, stream, noise, compute))
    stopped = w_mean * d + (1 - w_mean) * d.detach()
    e = torch.minimum(torch.maximum(x + q * stopped, -clip), clip) - x
    r = r0 + r1 * w
    kl = 0.5 * (torch.expm1(-r) + r + k2 * e**2 * torch.exp(-r))
    decodes = (inv_std > 0).expand(x.shape)
    nats = _bin_nats(x, e, torch.where(decodes, inv_std, 1.0) * torch.exp(-r / 2), bin)
    bits = torch.where(decodes, nats, kl) / math.log(2)
    means = torch.stack([part.reshape(len(part), -1).mean(1) for part in (d**2, bits)], dim=1)
    weights = torch.stack([w_squares.flatten(), w_bound.flatten()], dim=1)
    losses = torch.where(weights == 0, 0.0, weights * means).sum(1)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum(), means


def step(
    x: Tensor | None,
    m: Tensor | None,
    m2: Tensor | None = None,
    h0: Tensor | None = None,
    h1: Tensor | None = None,
    h2: Tensor | None = None,
    h3: Tensor | None = None,
    *,
    table: Tensor,
    row: int = 0,
    index: Tensor | None = None,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    compute: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x', x0, s and k x', sample by sample and term by term. Differentiable."""
    histories = (h0, h1, h2, h3)
    like = next(t for t in (x, *histories, noise, known, m) if t is not None)
    batch = like.shape[0]
    results = []
    for b in range(batch):
        number = row if index is None else int(index.reshape(-1)[b if index.dim() else 0])
        c = dict(zip(COLUMNS, table[number].tolist(), strict=True))

        def draw(stream: float, b: int = b) -> Tensor:
            assert seeds is not None
            return randn([1, *like.shape[1:]], seeds[b : b + 1], int(stream), dtype=compute)[0]

        def term(coefficient: float, tensor: Tensor | None, b: int = b) -> Tensor | float:
            if coefficient == 0:
                return 0.0
            assert tensor is not None
            return coefficient * tensor[b].to(compute)

        zero = torch.zeros(like.shape[1:], dtype=compute)
        model = zero
        if m is not None:
            model = m[b].to(compute)
            if c["w"] != 0:
                cond = m[b + batch] if m2 is None else m2[b]
                model = model + c["w"] * (cond.to(compute) - model)
        z = zero
        if c["r"] != 0 or c["g"] != 0:
            z = noise[b].to(compute) if noise is not None else draw(c["stream"])
        x0 = term(c["p"], x) + c["q"] * model + c["r"] * z + zero
        x0 = x0.clamp(-c["clip"], c["clip"])
        new = term(c["a"], x) + c["b"] * x0 + c["d"] * model + c["g"] * z
        for k, h in enumerate(histories):
            new = new + term(c[f"e{k}"], h)
        s = term(c["A"], x) + c["B"] * x0 + c["D"] * model + zero
        if mask is not None:
            kn = term(c["known_s"], known) + (c["known_n"] * draw(c["known_stream"]) if c["known_n"] != 0 else zero)
            open_ = opened(mask[b], compute)
            blend = open_ * new + (1 - open_) * kn
            new = torch.where(open_ == 1, new, torch.where(open_ == 0, kn, blend))
        results.append((new, x0, s, c["k"] * new))
    out, clean, slope, scaled = (torch.stack(part) for part in zip(*results, strict=True))
    return out, clean, slope, scaled


def learned_step(
    x: Tensor,
    m: Tensor | None,
    *,
    table: Tensor,
    row: int = 0,
    index: Tensor | None = None,
    seeds: Tensor | None = None,
    noise: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    compute: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor, Tensor]:
    """x', x0 and k x': `step` with the noise of every element scaled by exp((r0 + r1 v) / 2) beforehand."""
    rows = [row] * len(x) if index is None else index.reshape(-1).expand(len(x)).tolist()
    mean, v = (None, None) if m is None else (part.to(compute) for part in m.chunk(2, dim=1))
    scaled = torch.zeros(x.shape, dtype=compute)
    for b, number in enumerate(rows):
        c = dict(zip((*COLUMNS, "r0", "r1"), table[number].tolist(), strict=True))
        if c["g"] == 0:
            continue
        if noise is not None:
            z = noise[b].to(compute)
        else:
            assert seeds is not None
            z = randn([1, *x.shape[1:]], seeds[b : b + 1], int(c["stream"]), dtype=compute)[0]
        log_variance = torch.full_like(z, c["r0"]) + (0.0 if c["r1"] == 0 or v is None else c["r1"] * v[b])
        scaled[b] = torch.exp(0.5 * log_variance) * z
    plain = table[:, : len(COLUMNS)]
    given = {"seeds": seeds, "noise": scaled, "mask": mask, "known": known}
    out, x0, _, following = step(x, mean, table=plain, row=row, index=index, **given, compute=compute)
    return out, x0, following


def step_logprob(
    after: Tensor,
    x: Tensor | None,
    m: Tensor | None,
    m2: Tensor | None = None,
    h0: Tensor | None = None,
    h1: Tensor | None = None,
    h2: Tensor | None = None,
    h3: Tensor | None = None,
    *,
    table: Tensor,
    row: int = 0,
    index: Tensor | None = None,
    compute: torch.dtype = torch.float64,
) -> Tensor:
    """ln N(after; mean, std^2) of `step` without its noise, summed over each sample; 0 where g = 0. Differentiable."""
    silent, g_column = table[:, : len(COLUMNS)].clone(), COLUMNS.index("g")
    silent[:, g_column] = 0
    variance = None
    if table.shape[1] > len(COLUMNS):
        assert m is not None
        m, variance = m.chunk(2, dim=1)
    mean = step(x, m, m2, h0, h1, h2, h3, table=silent, row=row, index=index, noise=after, compute=compute)[0]
    rows = table[row : row + 1] if index is None else table
    columns = _gather(rows, index, after.shape[0], after.dim(), compute)
    g = columns[g_column].abs()
    std = torch.where(g > 0, g, 1.0).expand(after.shape)
    if variance is not None:
        r0, r1 = columns[len(COLUMNS) :]
        std = std * torch.exp((r0 + r1 * variance.to(compute)) / 2)
    nats = 0.5 * ((after.to(compute) - mean) / std) ** 2 + torch.log(std) + 0.5 * math.log(2 * math.pi)
    return torch.where(g.flatten() > 0, -nats.reshape(len(nats), math.prod(nats.shape[1:])).sum(1), 0.0)


def _rows(x: Tensor, compute: torch.dtype) -> Tensor:
    return x.to(compute).reshape(x.shape[0], math.prod(x.shape[1:]))


def quantile(x: Tensor, q: float, *, compute: torch.dtype = torch.float64) -> Tensor:
    """The q-quantile of |x| of each sample: sorted, then linear between the ranks around q (n - 1)."""
    values = _rows(x, compute).abs().sort(1)[0]
    # q is given in the dtype of the result, and the rank is float64: as in torch.quantile.
    rank = (q if x.dtype == torch.float64 else float(np.float32(q))) * (values.shape[1] - 1)
    lower, upper = values[:, math.floor(rank)], values[:, math.ceil(rank)]
    between = lower + (rank - math.floor(rank)) * (upper - lower)
    return torch.where(values.isnan().any(1), math.nan, between)


def dynamic_threshold(
    x0: Tensor, q: float = 0.995, maximum: float = math.inf, *, compute: torch.dtype = torch.float64
) -> Tensor:
    """clamp(x0, -s, s) / s, where s = clamp(quantile(x0, q), 1, maximum)."""
    s = quantile(x0, q, compute=compute).clamp(1, maximum).reshape(-1, *(1,) * (x0.dim() - 1))
    return torch.clamp(x0.to(compute), -s, s) / s


def moments(x: Tensor, *, compute: torch.dtype = torch.float64) -> Tensor:
    """Mean and unbiased standard deviation of each sample, [B, 2]."""
    values = _rows(x, compute)
    mean = values.mean(1)
    return torch.stack([mean, ((values - mean[:, None]).square().sum(1) / max(values.shape[1] - 1, 0)).sqrt()], 1)
