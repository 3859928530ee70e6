"""Images by their numbers, one micro-batch after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffkern import ops, parallel
from diffkern.generate.recommended import recommended
from diffkern.integers import integer
from diffkern.names import SamplerName
from diffkern.plan import Plan
from diffkern.progress import progress_bar

if TYPE_CHECKING:
    from diffkern.diffusion import Diffusion

__all__ = ["MICRO_BATCH", "Part", "classes_of", "cuts", "generate", "known_classes"]

MICRO_BATCH = 64


class Part(NamedTuple):
    """Some images of a job, which follow each other."""

    first: int
    """The number of the first."""
    images: Tensor
    """float32 [B, C, H, W], about in [-1, 1], on the model's device."""
    classes: Tensor | None
    """int64 [B] on the CPU; None where the job has no classes."""


def generate(
    diffusion: Diffusion,
    n: int,
    sampler: SamplerName | Plan | Callable[..., Plan] | None = None,
    steps: int | None = None,
    *,
    seed: int = 0,
    first: int = 0,
    classes: Tensor | Sequence[int] | Literal["even"] | None = None,
    guidance: float | Sequence[float] | None = None,
    micro_batch: int = MICRO_BATCH,
    share: Callable[[int], range] = parallel.share,
    progress: bool | str = False,
    **options: Any,
) -> Iterator[Part]:
    """The images first, ..., first + n - 1 of the job with this ``seed``, a micro-batch at a time.

    Image j starts from the noise of ``ops.seeds(seed, 1, j)`` and is sampled together with the others of its
    micro-batch, floor(j / micro_batch). Noise and updates do not know the micro-batch, a network's convolutions may, in
    the last bits; so an image has the same bits in every job and in every cut of it at multiples of ``micro_batch``,
    and with ``micro_batch=1`` in every cut.

    - ``sampler``, ``steps``, ``options``: as `recommended` takes them.
    - ``classes``: int64 [n], "even" (j mod the network's number of classes), or None for no condition.
    - ``guidance``: the weight of classifier-free guidance (arXiv 2207.12598), with classes; of a model that learns its
      variance by a sampler that does not use it, ddim if none is named.
    - ``share``: which of the micro-batches this process makes: those of its rank in a job of torch.distributed, all of
      them elsewhere; ``range`` for all of them everywhere.

    Nothing is kept: memory does not grow with n. Raises ValueError, at the call and naming argument, rule and value,
    for what does not fit.
    """
    n = integer("n", n, 1)
    first = integer("first", first, 0, 2**63 - 1 - n, f"in 0..2**63 - 1 - {n}")
    micro_batch = integer("micro_batch", micro_batch, 1, 2**31 - 1, "in 1..2**31 - 1")
    seed = integer("seed", seed, -(2**63), 2**64 - 1, "of 64 bits")
    shape = diffusion.shape
    if shape is None:
        raise ValueError("diffusion must know the shape of its images, got none: Diffusion(..., shape=(C, H, W))")
    chosen = classes_of(diffusion, classes, n, first)
    if guidance is not None and chosen is None:
        raise ValueError(f"guidance must go with classes, got guidance={guidance} without them")
    if sampler is None and guidance is not None and diffusion.learned_variance:
        sampler = "ddim"
    plan = recommended(diffusion, sampler, steps, **options)
    if guidance is not None and plan.learned_variance:
        raise ValueError(
            f"guidance must go with a sampler that learns no variance, such as ddim, got {plan.name}: "
            "diffkern.guidance.classifier_free has both"
        )
    if plan.init_scale == 0.0:
        raise ValueError(f"sampler must start from noise, got {plan.name}, which starts from data")
    if not isinstance(progress, bool | str):
        progress_bar(progress, plan.name, n)  # raises
    if guidance is not None:
        plan.with_guidance(guidance)  # raises for what is no weight
    parts = cuts(n, first, micro_batch)
    return _parts(diffusion, plan, [parts[i] for i in share(len(parts))], seed, first, chosen, guidance, progress)


def _parts(
    diffusion: Diffusion,
    plan: Plan,
    parts: list[range],
    seed: int,
    first: int,
    classes: Tensor | None,
    guidance: Any,
    progress: bool | str,
) -> Iterator[Part]:
    device = next((p.device for p in diffusion.parameters()), torch.device("cpu"))
    one = len(parts) == 1  # whose steps are worth a bar
    label = progress if isinstance(progress, str) else progress and f"{plan.name}, {len(plan.steps)} steps"
    bar = None if one else progress_bar(label, plan.name, sum(map(len, parts)), unit="image")
    try:
        for numbers in parts:
            asked = None if classes is None else classes[numbers.start - first : numbers.stop - first]
            images = diffusion.sample(
                len(numbers),
                plan,
                seeds=ops.seeds(seed, len(numbers), numbers.start).to(device),
                cond=None if asked is None else asked.to(device),
                guidance=guidance,
                progress=label if one else False,
            )
            yield Part(numbers.start, images, asked)
            if bar is not None:
                bar.update(len(numbers))
    finally:
        if bar is not None:
            bar.close()


def cuts(n: int, first: int, size: int) -> list[range]:
    """The numbers first, ..., first + n - 1 cut at the multiples of ``size``."""
    starts = [first, *range((first // size + 1) * size, first + n, size)]
    return [range(a, b) for a, b in zip(starts, [*starts[1:], first + n], strict=True)]


def known_classes(diffusion: Diffusion) -> int | None:
    """How many classes the network has, whose embedding ends with that of none; None where it does not say."""
    network = parallel.bare(diffusion.model)
    found = None if getattr(network, "classes", None) is None else getattr(network, "null_class", None)
    return found if isinstance(found, int) else None


def classes_of(
    diffusion: Diffusion, classes: Tensor | Sequence[int] | Literal["even"] | None, n: int, first: int
) -> Tensor | None:
    """The class of every image, int64 [n] on the CPU; see `generate`."""
    known = known_classes(diffusion)
    if classes is None:
        return None
    if isinstance(classes, str):
        if classes != "even":
            raise ValueError(f"classes must be int64 [n], 'even' or None, got {classes!r}")
        if known is None:
            raise ValueError("classes must be None or int64 [n] where the network does not say how many, got 'even'")
        return (torch.arange(n) + first % known) % known
    chosen = torch.as_tensor(classes).to("cpu")
    if chosen.dtype != torch.int64 or chosen.shape != (n,):
        raise ValueError(f"classes must be int64 [{n}], one an image, got {chosen.dtype} {list(chosen.shape)}")
    wrong = chosen[(chosen < 0) | (chosen >= known)] if known is not None else chosen[:0]
    if len(wrong):
        raise ValueError(f"classes must lie in 0..{known - 1 if known else 0}, got {wrong[0].item()}")
    return chosen
