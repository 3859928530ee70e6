"""What adversarial losses are minimised by, for densities that are known, and where their gradients vanish."""

from __future__ import annotations

from typing import NamedTuple, get_args

import torch
from torch import Tensor

from diffkern.checks import need_tensor, unknown
from diffkern.modes import readable
from diffkern.names import AdversarialName


def optimal_discriminator(p: Tensor, q: Tensor) -> Tensor:
    """D*(x) = p(x) / (p(x) + q(x)) of densities of data and generator at the same points (arXiv 1406.2661, prop. 1).

    It maximises E_p log D + E_q log(1 - D), whose value is then -2 log 2 + 2 JSD(p, q): `jensen_shannon` (theorem 1
    there; lecture 000 has the game). p and q are of one shape, not negative; 1/2 where both are 0 and any D is as good.
    """
    p, q = _densities(p, q)
    total = p + q
    return torch.where(total > 0, p / torch.where(total > 0, total, 1.0), 0.5)


def optimal_logits(p: Tensor, q: Tensor, kind: AdversarialName = "non_saturating") -> Tensor:
    """The C(x) that minimises `discriminator_loss` in expectation, of densities p of data and q of the generator.

    | kind | C* | the least value | at p = q |
    |---|---|---|---|
    | minimax, non_saturating | log(p / q) | 2 log 2 - 2 JSD(p, q) | 2 log 2 |
    | hinge | sign(p - q) | 2 integral of min(p, q) = 2 - integral of abs(p - q) | 2 |
    | least_squares | p / (p + q) | integral of p q / (p + q) / 2 | 1/4 |
    | relativistic | log(p / q), and a constant | at most log 2 | log 2 |

    None for `wasserstein` (ValueError): without a bound on its slope C(G) - C(x) has no least value; with |grad C| <= 1
    it is minus the distance of Kantorovich and Rubinstein (arXiv 1701.07875). Infinite where one of p and q is 0; where
    both are, 0 (1/2 for least squares). Shapes as for `optimal_discriminator`.
    """
    if kind == "least_squares":
        return optimal_discriminator(p, q)
    p, q = _densities(p, q)
    if kind in ("minimax", "non_saturating", "relativistic"):
        return torch.where((p > 0) | (q > 0), p.log() - q.log(), 0.0)
    if kind == "hinge":
        return torch.sign(p - q)
    if kind == "wasserstein":
        raise ValueError(
            "kind must be one with an optimum without further conditions, got 'wasserstein', whose discriminator has a "
            "bounded slope"
        )
    raise ValueError(unknown("kind", kind, get_args(AdversarialName)))


def jensen_shannon(p: Tensor, q: Tensor, weights: Tensor) -> Tensor:
    """JSD(p, q) = KL(p, m)/2 + KL(q, m)/2 with m = (p + q)/2 in nats, by quadrature: a number in [0, log 2].

    p, q: densities at points; `weights` the points' quadrature weights, of the same shape or one number for all.
    """
    p, q = _densities(p, q)
    m = 0.5 * (p + q)
    return 0.5 * ((torch.xlogy(p, p) + torch.xlogy(q, q) - torch.xlogy(p + q, m)) * weights).sum()


class Saturation(NamedTuple):
    """Curves over a generated sample's logit, each of its shape."""

    D: Tensor
    """sigmoid of the logit: how real the discriminator takes the sample for."""
    minimax: Tensor
    """d/dC log(1 - D) = -D: no gradient where the discriminator is sure (D near 0)."""
    non_saturating: Tensor
    """d/dC -log D = -(1 - D): the strongest there."""


def saturation(logits: Tensor) -> Saturation:
    """How hard the two generator losses of a binary discriminator pull at a sample, by its logit C (lecture 000).

    log(1 - D(G(z))) saturates at the beginning of the training, when D(G(z)) is near 0 (arXiv 1406.2661, section 3);
    both pull in the same direction, and equally where D = 1/2. docs/adversarial.md has the picture.
    """
    need_tensor("logits", logits)
    D = torch.sigmoid(logits)
    return Saturation(D, -D, -torch.sigmoid(-logits))


def _densities(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    for name, value in (("p", p), ("q", q)):
        need_tensor(name, value)
        if readable(value) and not bool((value >= 0).all()):
            raise ValueError(f"{name} must be a density, not negative, got {float(value.min())}")
    if p.shape != q.shape:
        raise ValueError(f"q must have the shape of p, {list(p.shape)}, got {list(q.shape)}")
    return p, q
