"""Images from images: the samples of a model with a degradation, and cascades of models that enlarge in turn."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from diffkern import ops, parallel
from diffkern.generate.images import MICRO_BATCH, Part, classes_of, cuts, generate, known_classes, reads
from diffkern.generate.recommended import recommended
from diffkern.integers import integer
from diffkern.names import SamplerName
from diffkern.plan import Plan
from diffkern.progress import progress_bar

if TYPE_CHECKING:
    from diffkern.diffusion import Diffusion

__all__ = ["cascade", "restore", "stage_seed"]

Chosen = SamplerName | Plan | Callable[..., Plan] | None


def restore(
    diffusion: Diffusion,
    inputs: Tensor,
    n: int = 1,
    sampler: Chosen = None,
    steps: int | None = None,
    *,
    seed: int = 0,
    classes: Tensor | Sequence[int] | None = None,
    guidance: float | None = None,
    without: Literal["class", "image", "both"] | None = None,
    augmentation: float = 0.0,
    project: bool = True,
    micro_batch: int = MICRO_BATCH,
    share: Callable[[int], range] = parallel.share,
    progress: bool | str = False,
    **options: Any,
) -> Iterator[Part]:
    """``n`` samples of each of the ``inputs`` [N, C', h, w] of a model with a degradation, a micro-batch at a time.

    Sample k of input i is image j = i n + k of the job; noise and updates are those of ``ops.seeds(seed, 1, j)``,
    whatever is made with it, as in `generate`. ``classes``: int64 [N], one an input. ``project``: the nearest image
    that is consistent with the input, where the degradation has one. ``without``, ``augmentation``: as in
    `Diffusion.sample`; the others as in `generate`.

    Raises ValueError, naming argument, rule and value, for what does not fit: at the call, but for what the model
    looks at with its first images (the size of the inputs, ``guidance``, ``without``, ``augmentation``).
    """
    n, seed = integer("n", n), integer("seed", seed, -(2**63), 2**64 - 1, "of 64 bits")
    micro_batch = integer("micro_batch", micro_batch, 1, 2**31 - 1, "in 1..2**31 - 1")
    _need_degradation(diffusion)
    if not isinstance(inputs, Tensor) or inputs.dim() != 4 or not len(inputs):
        got = list(inputs.shape) if isinstance(inputs, Tensor) else type(inputs).__name__
        raise ValueError(f"inputs must be images [N, C, H, W], at least one, got {got}")
    chosen = None if classes is None else classes_of(diffusion, classes, len(inputs), 0)
    plan = recommended(diffusion, sampler, steps, **options)
    parts = cuts(len(inputs) * n, 0, micro_batch)
    mine = [parts[i] for i in share(len(parts))]

    def made() -> Iterator[Part]:
        bar = progress_bar(progress, plan.name, sum(map(len, mine)), unit="image")
        with contextlib.nullcontext() if bar is None else contextlib.closing(bar):
            for numbers in mine:
                of = torch.arange(numbers.start, numbers.stop) // n
                asked = None if chosen is None else chosen[of]
                given = diffusion, plan, inputs[of], numbers, seed, asked, guidance, without, augmentation, project
                yield _restored(*given)
                if bar is not None:
                    bar.update(len(numbers))

    return made()


def cascade(
    models: Sequence[Diffusion],
    n: int,
    plans: Sequence[Plan] | None = None,
    *,
    seed: int = 0,
    first: int = 0,
    classes: Tensor | Sequence[int] | Literal["even"] | None = None,
    texts: str | Sequence[str] | None = None,
    guidance: float | None = None,
    augmentation: float = 0.0,
    project: bool = True,
    micro_batch: int = MICRO_BATCH,
    share: Callable[[int], range] = parallel.share,
    progress: bool | str = False,
) -> Iterator[Part]:
    """Images by the first of the ``models``, enlarged by the others in turn (Ho et al. 2021, arXiv 2106.15282).

    Classes go to every model that has them, texts to every one that reads, in its own words; ``augmentation``, the
    noise on what the next model is given, to every model that was trained with it, at most at its largest level. Image
    j of model k is image j of a job with the seed `stage_seed`, so it is the same in every cut of the job. ``plans``:
    one a model (`recommended` if None). The others as in `generate` and `restore`.

    Raises ValueError, at the call, for models that do not follow each other.
    """
    if len(models) < 2:
        raise ValueError(f"models must be at least two, the second of which enlarges, got {len(models)}")
    plans = [recommended(model) for model in models] if plans is None else list(plans)
    if len(plans) != len(models):
        raise ValueError(f"plans must be one for each of the {len(models)} models, got {len(plans)}")
    if not 0.0 <= augmentation < 1.0:
        raise ValueError(f"augmentation must lie in [0, 1), got {augmentation}")
    for k in range(1, len(models)):
        _check_follows(models[k - 1], models[k], k)
    base = generate(
        models[0],
        n,
        plans[0],
        seed=seed,
        first=first,
        classes=classes,
        texts=texts,
        guidance=guidance,
        micro_batch=micro_batch,
        share=share,
        progress=progress,
    )
    chosen = [classes_of(models[0], classes, n, first, texts)]
    for k, model in enumerate(models[1:], 1):
        known, given = known_classes(model), chosen[0]
        if reads(model):
            given = None if texts is None else classes_of(model, None, n, first, texts)
        elif known is None or given is None or given.ndim > 1:
            given = None
        elif int(given.max()) >= known:
            raise ValueError(f"classes must lie in 0..{known - 1} of model {k}, got {int(given.max())}")
        chosen.append(given)

    def made() -> Iterator[Part]:
        for part in base:
            images, numbers = part.images, range(part.first, part.first + len(part.images))
            for k, model in enumerate(models[1:], 1):
                of = slice(numbers.start - first, numbers.stop - first)
                asked = None if (given := chosen[k]) is None else given[of]
                level = 0.0 if model.degradation is None else min(augmentation, model.degradation.augmentation)
                weight = None if asked is None else guidance
                images = _restored(
                    model,
                    plans[k],
                    images.clamp(-1, 1),
                    numbers,
                    stage_seed(seed, k),
                    asked,
                    weight,
                    None,
                    level,
                    project,
                ).images
            yield part._replace(images=images)

    return made()


def stage_seed(seed: int, k: int) -> int:
    """The seed of model k's job in a cascade: that of the cascade for the first, others that share nothing with it."""
    return seed if k == 0 else int(ops.seeds(seed, 1, 2**63 - 1 - k)[0])


def _restored(
    diffusion: Diffusion,
    plan: Plan,
    inputs: Tensor,
    numbers: range,
    seed: int,
    classes: Tensor | None,
    guidance: float | None,
    without: Any,
    augmentation: float,
    project: bool,
) -> Part:
    device = next((p.device for p in diffusion.parameters()), torch.device("cpu"))
    inputs = inputs.to(device)
    images = diffusion.sample(
        len(numbers),
        plan,
        seeds=ops.seeds(seed, len(numbers), numbers.start).to(device),
        image=inputs,
        cond=None if classes is None else classes.to(device),
        guidance=guidance,
        augmentation=augmentation,
        without=without,
    )
    if project and diffusion.degradation is not None and diffusion.degradation.projects:
        images = diffusion.degradation.project(images, inputs)
    return Part(numbers.start, images, classes)


def _need_degradation(diffusion: Diffusion, name: str = "diffusion") -> None:
    if getattr(diffusion, "degradation", None) is None:
        raise ValueError(f"{name} must have a degradation, the images that it is given, got one without")


def _check_follows(before: Diffusion, after: Diffusion, k: int) -> None:
    """ValueError unless the images of a model are the inputs of the next."""
    _need_degradation(after, f"model {k}")
    assert after.degradation is not None
    images, whole = before.image_shape, after.image_shape
    if images is None or whole is None:
        raise ValueError(
            f"models must know the shapes of their images, got {images} and {whole} of models {k - 1}, {k}"
        )
    wanted = after.degradation.size(whole)
    if tuple(images) != wanted:
        raise ValueError(
            f"model {k} must take images {list(images)}, those of model {k - 1}, got one that takes {list(wanted)}"
        )
