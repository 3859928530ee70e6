"""The one place that names noise streams.

Noise is an address (seed of the sample, stream, element): two uses of noise that must be independent differ in their
stream. A stream is ``purpose << 40`` plus a counter below 2**40 (the step of a sampler, a node of a Brownian path ...).
All streams stay below 2**53, so a stream is exact as a float64 entry of a plan's table.
"""

from __future__ import annotations

SHIFT = 40
"""Bits left for the counter inside one purpose."""

INITIAL = 0
"""The initial noise x_T of a sampler."""
TRAINING = 1 << SHIFT
"""The noise of forward noising, and of the loss that draws it again."""
STEP = 2 << SHIFT
"""``STEP + k``: the noise that row k of a plan adds."""
KNOWN = 3 << SHIFT
"""``KNOWN + k``: the noise that brings the known image to the level row k ends at (inpainting)."""
HUTCHINSON = 4 << SHIFT
"""Probe vectors of the stochastic trace estimate in log-likelihoods."""
BROWNIAN = 5 << SHIFT
"""Nodes of a Brownian path."""
DROPOUT = 6 << SHIFT
"""Which samples lose their condition in training (classifier-free guidance)."""
TIME = 7 << SHIFT
"""The random training time of a sample."""
DATA = 8 << SHIFT
"""Which of the given data points a sample is drawn from."""
DEQUANTISATION = 9 << SHIFT
"""The uniform noise that makes integers continuous, one normal an element, before their likelihood is taken."""
AUGMENTATION = 10 << SHIFT
"""``AUGMENTATION + k``: how a training image is flipped (0) and cropped (1)."""
POSTERIOR = 11 << SHIFT
"""The latents that are drawn from an autoencoder's posterior."""
CODEBOOK = 12 << SHIFT
"""``CODEBOOK + k``: which latents the codes that die at update k start again from."""
ADVERSARIAL = 15 << SHIFT
"""``ADVERSARIAL + k``: a generator's latents in the discriminator's step (0) and in its own (1), and the points between
real and generated samples where a gradient is penalised (2)."""
DEGRADATION = 20 << SHIFT
"""``DEGRADATION + k``: of what an image is degraded by, the noise's level (0), the noise (1), whether the input is left
out (2), and from 16 on the choices of a mask."""
USER = 1024 << SHIFT
"""First stream that diffkern never uses itself."""

LIMIT = 1 << 53
"""Streams are integers in [0, LIMIT)."""

NAMES: dict[str, int] = {
    "initial": INITIAL,
    "training": TRAINING,
    "step": STEP,
    "known": KNOWN,
    "hutchinson": HUTCHINSON,
    "brownian": BROWNIAN,
    "dropout": DROPOUT,
    "time": TIME,
    "data": DATA,
    "dequantisation": DEQUANTISATION,
    "augmentation": AUGMENTATION,
    "posterior": POSTERIOR,
    "codebook": CODEBOOK,
    "adversarial": ADVERSARIAL,
    "degradation": DEGRADATION,
}


def describe(stream: int) -> str:
    """A stream for people: ``describe(STEP + 3) == "step+3"``; streams from USER on are ``user+n``."""
    if not 0 <= stream < LIMIT:
        raise ValueError(f"stream must lie in [0, 2**53), got {stream}")
    if stream >= USER:
        return f"user+{stream - USER}"
    purpose, counter = stream >> SHIFT, stream & ((1 << SHIFT) - 1)
    names = {value >> SHIFT: name for name, value in NAMES.items()}
    name = names.get(purpose, f"purpose{purpose}")
    return f"{name}+{counter}" if counter else name
