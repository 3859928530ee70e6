"""What rounding alone may do to attention and its gradients, in any order of the sums: floors for tolerances.check.

The roundings of the formulas one after the other, to first order. With u the unit roundoff of the arithmetic (float32
for 16-bit operands), |a|_2 the root of a sum of squares and e the errors:

    S = scale q k^T      e(S) = summed(D, scale |q k|_2) + u (|S| + max|S|)           products; S - max rounds again
    lse                  |P e(S)|_2 + summed(M, 1) + u (4 + |lse| + max|S|)             log of a sum of M
    P = softmax(S)       e(P) / P = e(S) + 4 u, and |P e(S)|_2 for all of a row        exp and the division: 4 u
    O = P V              e(O) = |e(P) v|_2 + summed(M, |P v|_2)
    dP = g V^T           e(dP) = summed(D, |g v|_2)
    delta = g O^T        e(delta) = summed(D, |g o|_2) + |g e(O)|_2                    of the stored O
    dS = P (dP - delta)  e(dS) = P (e(dP) + e(delta)) + |dS| (e(P) / P + u)
    dq, dk, dv           scale dS k, scale dS^T q, P^T g: as O

Errors of different elements are as good as independent and add like the sides of a right angle; what a row has in
common (delta, the sum of its weights) adds up.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from helpers.tolerances import summed, unit_roundoff


class Floors(NamedTuple):
    """Errors of each element, in float64."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def attention_floors(q: Tensor, k: Tensor, v: Tensor, scale: float, grad: Tensor | None = None) -> Floors:
    """[B, H, N, D] operands and grad_out. In float64, where the reference rounds as well, those of both."""
    stored = q.dtype
    wide = stored if stored == torch.float64 else torch.float32
    u = unit_roundoff(wide)
    q, k, v = (t.detach().double() for t in (q, k, v))
    g = torch.zeros_like(q) if grad is None else grad.detach().double()
    dim, queries, keys = q.shape[-1], q.shape[-2], k.shape[-2]

    def norm(a: Tensor, b: Tensor) -> Tensor:
        """|a b|_2 of each sum of the product a b."""
        return (a.square() @ b.square()).sqrt()

    logits = q @ k.mT * scale
    known = logits.isfinite()  # a logit of -inf takes no part
    top = logits.abs().where(known, 0).amax(-1, keepdim=True)
    e_logits = summed(dim, abs(scale) * norm(q, k.mT), wide) + u * (logits.abs() + top)
    e_logits = e_logits.where(known, 0)
    p = torch.softmax(logits, -1)
    each = e_logits + 4 * u
    row = (p * e_logits).square().sum(-1, keepdim=True).sqrt()
    lse = torch.logsumexp(logits, -1, keepdim=True)
    e_lse = row + summed(keys, 1.0, wide) + u * (4 + lse.abs() + top)
    out = p @ v
    e_out = norm(p * each, v) + row * out.abs() + summed(keys, norm(p, v), wide)

    dp = g @ v.mT
    delta = (g * out).sum(-1, keepdim=True)
    ds = p * (dp - delta)
    e_dp = summed(dim, norm(g, v.mT), wide)
    e_stored = e_out + unit_roundoff(stored) * out.abs()
    e_delta = summed(dim, (g * out).square().sum(-1, keepdim=True).sqrt(), wide)
    e_delta = e_delta + (g * e_stored).square().sum(-1, keepdim=True).sqrt()
    e_ds = p * e_dp + ds.abs() * (each + u)
    common = p * e_delta + ds.abs() * row
    e_dq = norm(e_ds, k) + e_delta * (p @ k).abs() + row * (ds @ k).abs() + summed(keys, norm(ds, k), wide)
    e_dk = norm((e_ds + common).mT, q) + summed(queries, norm(ds.mT, q), wide)
    e_dv = norm((p * (each + row)).mT, g) + summed(queries, norm(p.mT, g), wide)
    both = 2**0.5 if stored == torch.float64 else 1
    return Floors(both * e_out, both * e_lse[..., 0], both * abs(scale) * e_dq, both * abs(scale) * e_dk, both * e_dv)
