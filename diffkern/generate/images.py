"""Images by their numbers, one micro-batch after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from diffkern import ops, parallel, records
from diffkern.generate.recommended import planned
from diffkern.integers import integer
from diffkern.names import SamplerName
from diffkern.plan import Plan
from diffkern.progress import progress_bar

if TYPE_CHECKING:
    from diffkern.diffusion import Diffusion
    from diffkern.gan import GAN

__all__ = ["MICRO_BATCH", "Part", "classes_of", "cuts", "generate", "known_classes", "reads"]

MICRO_BATCH = 64


class Part(NamedTuple):
    """Some images of a job, which follow each other."""

    first: int
    """The number of the first."""
    images: Tensor
    """float32 [B, C, H, W], about in [-1, 1], on the model's device."""
    classes: Tensor | None
    """int64 [B], or tokens of texts int64 [B, L], on the CPU; None where the job has neither."""


def generate(
    diffusion: Diffusion | GAN,
    n: int,
    sampler: SamplerName | Plan | Callable[..., Plan] | None = None,
    steps: int | None = None,
    *,
    seed: int = 0,
    first: int = 0,
    classes: Tensor | Sequence[int] | Literal["even"] | None = None,
    texts: str | Sequence[str] | None = None,
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
    - ``classes``: int64 [n], "even" (j mod the network's number of classes), or None for no condition; of a network
      that reads texts tokens, int64 [n, L].
    - ``texts``: what such a network reads, in turn: image j has the text j mod their number.
    - ``guidance``: the weight of classifier-free guidance (arXiv 2207.12598), with classes or texts; of a model that
      learns its variance by a sampler that does not use it, ddim if none is named.
    - ``share``: which of the micro-batches this process makes: those of its rank in a job of torch.distributed, all of
      them elsewhere; ``range`` for all of them everywhere.

    A `diffkern.GAN` has no sampler: its generator is called once a micro-batch, by the same seeds, with classes where
    it knows any ("even" if none are given).

    Nothing is kept: memory does not grow with n. Raises ValueError, at the call and naming argument, rule and value,
    for what does not fit.
    """
    n = integer("n", n, 1)
    first = integer("first", first, 0, 2**63 - 1 - n, f"in 0..2**63 - 1 - {n}")
    micro_batch = integer("micro_batch", micro_batch, 1, 2**31 - 1, "in 1..2**31 - 1")
    seed = integer("seed", seed, -(2**63), 2**64 - 1, "of 64 bits")
    if diffusion.shape is None:
        raise ValueError("diffusion must know the shape of its images, got none: Diffusion(..., shape=(C, H, W))")
    if getattr(diffusion, "degradation", None) is not None:
        raise ValueError("diffusion must be one that is given no image, got one with a degradation: restore or cascade")
    if not hasattr(diffusion, "plan") and classes is None and known_classes(diffusion):
        classes = "even"  # a generator of classes makes no image without one
    chosen = classes_of(diffusion, classes, n, first, texts)
    if guidance is not None and chosen is None:
        what = "texts" if reads(diffusion) else "classes"
        raise ValueError(f"guidance must go with {what}, got guidance={guidance} without them")
    if sampler is None and guidance is not None and getattr(diffusion, "learned_variance", False):
        sampler = "ddim"
    plan = planned(diffusion, sampler, steps, guidance=guidance, **options)
    if plan is not None:
        _check_plan(plan, guidance)
    if not isinstance(progress, bool | str):
        progress_bar(progress, _name(plan), n)  # raises
    parts = cuts(n, first, micro_batch)
    return _parts(diffusion, plan, [parts[i] for i in share(len(parts))], seed, first, chosen, guidance, progress)


def _check_plan(plan: Plan, guidance: Any) -> None:
    """ValueError for a plan that does not start from noise, or that takes no guidance where there is one."""
    if guidance is not None and plan.learned_variance:
        raise ValueError(
            f"guidance must go with a sampler that learns no variance, such as ddim, got {plan.name}: "
            "diffkern.guidance.classifier_free has both"
        )
    if plan.init_scale == 0.0:
        raise ValueError(f"sampler must start from noise, got {plan.name}, which starts from data")
    if guidance is not None:
        plan.with_guidance(guidance)  # raises for what is no weight


def _name(plan: Plan | None) -> str:
    return "generator" if plan is None else plan.name


def _parts(
    diffusion: Diffusion | GAN,
    plan: Plan | None,
    parts: list[range],
    seed: int,
    first: int,
    classes: Tensor | None,
    guidance: Any,
    progress: bool | str,
) -> Iterator[Part]:
    device = next((p.device for p in diffusion.parameters()), torch.device("cpu"))
    one = len(parts) == 1  # whose steps are worth a bar
    words = "generator" if plan is None else f"{plan.name}, {len(plan.steps)} steps"
    label = progress if isinstance(progress, str) else progress and words
    bar = None if one else progress_bar(label, _name(plan), sum(map(len, parts)), unit="image")
    try:
        for numbers in parts:
            asked = None if classes is None else classes[numbers.start - first : numbers.stop - first]
            options: dict[str, Any] = {}
            if plan is not None:
                options = {"sampler": plan, "guidance": guidance, "progress": label if one else False}
            images = diffusion.sample(
                len(numbers),
                seeds=ops.seeds(seed, len(numbers), numbers.start).to(device),
                cond=None if asked is None else asked.to(device),
                **options,
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


def known_classes(diffusion: Diffusion | GAN) -> int | None:
    """How many classes the network has, whose embedding ends with that of none; None where it does not say."""
    own = getattr(diffusion, "classes", None)  # of a GAN, which has no class for none
    if isinstance(own, int):
        return own or None
    network = parallel.bare(diffusion.model)
    found = None if getattr(network, "classes", None) is None else getattr(network, "null_class", None)
    return found if isinstance(found, int) else None


def reads(diffusion: Diffusion | GAN) -> bool:
    """Whether the network is given texts, as tokens int64 [B, L]."""
    return diffusion.null is not None and diffusion.null.ndim == 1 and hasattr(parallel.bare(diffusion.model), "tokens")


def classes_of(
    diffusion: Diffusion | GAN,
    classes: Tensor | Sequence[int] | Literal["even"] | None,
    n: int,
    first: int,
    texts: str | Sequence[str] | None = None,
) -> Tensor | None:
    """The class of every image, int64 [n] on the CPU, or the tokens of its text, int64 [n, L]; see `generate`."""
    if texts is not None:
        if not reads(diffusion) or classes is not None or not texts:
            rule = (
                "left out with classes" if classes is not None else "a text or several, for a network that reads them"
            )
            raise ValueError(f"texts must be {rule}, got {records.shown(texts)}")
        network: Any = parallel.bare(diffusion.model)
        tokens: Tensor = network.tokens(texts).cpu()
        return tokens[(torch.arange(n) + first % len(tokens)) % len(tokens)]
    if classes is not None and reads(diffusion):
        return _tokens(diffusion, classes, n)
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


def _tokens(diffusion: Diffusion | GAN, tokens: Any, n: int) -> Tensor:
    assert diffusion.null is not None
    length = len(diffusion.null)
    found = None if isinstance(tokens, str) else torch.as_tensor(tokens).to("cpu")
    if found is None or found.dtype != torch.int64 or found.shape != (n, length):
        got = repr(tokens) if found is None else f"{found.dtype} {list(found.shape)}"
        raise ValueError(f"classes must be tokens int64 [{n}, {length}] for a network that reads texts, got {got}")
    return found
