"""All scores of a set of images against a reference: `evaluate`."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkern import parallel, records, storage
from diffkern.metrics.classifier import Classifier, Labelled
from diffkern.metrics.distances import agreement, fid, fid_infinity, inception_score, kid, sfid
from diffkern.metrics.features import Extractor
from diffkern.metrics.neighbours import precision_recall, precision_recall_by_class
from diffkern.metrics.statistics import Statistics
from diffkern.progress import progress_bar

__all__ = ["ClassScores", "Scores", "evaluate", "reference_statistics"]


@dataclasses.dataclass(frozen=True)
class ClassScores:
    """Of the images of one class; None where there are too few, or no classifier."""

    name: str
    images: int
    precision: float | None
    recall: float | None
    agreement: float | None
    share: float | None = None
    """Of all images, those that the classifier gives this class, whatever was asked for."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """What `evaluate` measured; None for what the extractor or the data do not give."""

    extractor: str
    """Name of the network, with its weights: scores compare where it is the same."""
    data: str
    """Fingerprint of the reference images."""
    images: int
    reference: int
    compared: int
    """Of each, drawn at random for precision and recall, which need as many of both."""
    neighbours: int
    fid: float
    fid_infinity: float | None
    sfid: float | None
    kid: float
    kid_std: float
    precision: float
    recall: float
    inception_score: float | None
    inception_score_std: float | None
    agreement: float | None
    """Share of images that the classifier gives the class that was asked for."""
    classifier_accuracy: float | None
    """The same of real images that the classifier was not trained on: what agreement can be expected to reach."""
    classes: tuple[ClassScores, ...]

    def table(self) -> str:
        """The scores for a reader, one a line; below them the classes."""
        few = min(self.images, self.reference)
        rows: list[tuple[str, float | None, str]] = [
            ("FID", self.fid, f"of {self.images} images against {self.reference}; lower is better, 0 the same"),
            ("FID, n to infinity", self.fid_infinity, "extrapolated in 1 / n"),
            ("sFID", self.sfid, "of spatial features; lower is better"),
            ("KID x 1000", 1000 * self.kid, f"± {1000 * self.kid_std:.3g} over subsets; lower is better"),
            ("precision", self.precision, f"share of images among real ones, {self.compared} of each"),
            ("recall", self.recall, "share of real images among these"),
            ("inception score", self.inception_score, f"± {self.inception_score_std or 0:.3g}; higher is better"),
            ("agreement", self.agreement, "share that the classifier gives the class asked for"),
            ("  of real images", self.classifier_accuracy, "the classifier's accuracy"),
        ]
        lines = [f"{name:<20}{value:>10.4f}  {what}" for name, value, what in rows if value is not None]
        lines.append(f"{'features':<20}{'':>10}  {self.extractor}")
        if few < 10_000:
            lines.append(f"{'':<30}  {few} images are few: FID falls with their number, so compare at equal numbers")
        if self.classes:
            wide = max(5, *(len(c.name) for c in self.classes))
            head = f"{'class':<{wide}}  {'images':>7}  {'precision':>9}  {'recall':>7}  {'agreement':>9}"
            lines += ["", f"{head}  {'share':>7}" if self.classes[0].share is not None else head]
            for c in self.classes:
                shares = [f"{'-' if v is None else format(v, '.3f')}" for v in (c.precision, c.recall, c.agreement)]
                line = f"{c.name:<{wide}}  {c.images or '-':>7}  {shares[0]:>9}  {shares[1]:>7}  {shares[2]:>9}"
                lines.append(line if c.share is None else f"{line}  {c.share:>7.3f}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """All of it; `from_json` reads it."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> Scores:
        """Of `to_json`; ValueError naming the field for anything else."""
        return records.record(cls, records.parse(text, "the JSON of scores"), "scores.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """The JSON as a file, written whole or not at all."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        storage.write(path, self.to_json())


def reference_statistics(
    images: Labelled,
    extractor: Extractor,
    path: str | os.PathLike[str] | None = None,
    *,
    batch: int = 256,
    progress: bool | str = False,
) -> Statistics:
    """Statistics of all images, with their features and labels: by every rank of a job a part, the same on each.

    ``path``: where they are kept; read if they are there, of the same extractor and the same data (`fingerprint`),
    and else made and written.
    """
    _need_extractor(extractor)
    if not (hasattr(images, "batch") and hasattr(images, "__len__")):
        raise ValueError(
            f"reference must be Images or their Statistics, got {type(images).__name__}: diffkern.data.open_images "
            "makes Images of folders, files and tensors"
        )
    data = getattr(images, "fingerprint", "")
    if path is not None and Path(path).is_file():
        found = Statistics.load(path)
        if (found.extractor, found.data, found.count) == (extractor.name, data, len(images)) and found.keep:
            return found
    made = _measured(_batches(images, None, batch), extractor, None, data, len(images), "reference", progress)[0]
    if path is not None and parallel.is_main():
        made.save(path)
    parallel.barrier()
    return made


def evaluate(
    images: Tensor | Labelled | Iterable[Any],
    reference: Labelled | Statistics,
    extractor: Extractor,
    *,
    labels: Tensor | None = None,
    classifier: Classifier | None = None,
    names: Sequence[str] | None = None,
    neighbours: int = 3,
    batch: int = 256,
    seed: int = 0,
    progress: bool | str = False,
) -> Scores:
    """How good ``images`` are, measured by the ``extractor`` against ``reference`` images or their `Statistics`.

    ``images``: a tensor [N, C, H, W] in [-1, 1] with ``labels`` int64 [N] or none, `diffkern.data.Images`, or batches:
    tensors, pairs of (images, labels), or what has ``.images`` and ``.classes``, as the parts of `diffkern.generate`.
    In a job every rank gives its own batches, or the same tensor or Images, of which it measures its part; the scores
    are the same on all. Features stay in memory: 8 KiB an image of 2048.

    ``classifier``: whose classes agreement is measured by; the extractor itself where it is one. ``names`` of the
    classes; those of the reference images if None. ``neighbours``: k of precision and recall. ``seed``: of the random
    subsets.

    ValueError for fewer than ``neighbours`` + 2 images of either, and for images that are not finite.
    """
    _need_extractor(extractor)
    judge = extractor if classifier is None and isinstance(extractor, Classifier) else classifier
    if isinstance(reference, Statistics):
        made = reference
        if made.extractor != extractor.name:
            raise ValueError(f"reference must be of extractor {extractor.name!r}, got {made.extractor!r}")
    else:
        made = reference_statistics(reference, extractor, batch=batch, progress=progress)
        names = getattr(reference, "classes", None) if names is None else names
    found, judged = _measured(_batches(images, labels, batch), extractor, judge, "", _count(images), "images", progress)
    scores = (
        _scores(made, found, judged, judge, names, neighbours, seed, extractor.device) if parallel.is_main() else None
    )
    text = parallel.gathered(None if scores is None else scores.to_json())[0]
    return Scores.from_json(text)


def _scores(
    real: Statistics,
    fake: Statistics,
    judged: Statistics | None,
    judge: Classifier | None,
    names: Sequence[str] | None,
    k: int,
    seed: int,
    device: torch.device,
) -> Scores:
    for name, of in (("images", fake), ("reference", real)):
        if of.count < k + 2:
            raise ValueError(f"{name} must be at least neighbours + 2 = {k + 2}, got {of.count}")
    compared = min(real.count, fake.count)
    ours, theirs = real.features[_drawn(real.count, compared, seed)], fake.features[_drawn(fake.count, compared, seed)]
    precision, recall = precision_recall(ours.to(device), theirs.to(device), k)
    distance = kid(real, fake)
    score = inception_score(fake, splits=min(10, fake.count)) if fake.has("logits") else None
    shares = None if judged is None or judge is None else _shares(judged.logits)
    if judged is not None and not judged.has("labels"):
        judged = None
    return Scores(
        extractor=fake.extractor,
        data=real.data,
        images=fake.count,
        reference=real.count,
        compared=compared,
        neighbours=k,
        fid=fid(real, fake),
        fid_infinity=fid_infinity(real, fake, seed=seed) if fake.count >= 20 else None,
        sfid=sfid(real, fake) if real.has("spatial") and fake.has("spatial") else None,
        kid=distance.mean,
        kid_std=distance.std,
        precision=precision,
        recall=recall,
        inception_score=None if score is None else score.mean,
        inception_score_std=None if score is None else score.std,
        agreement=None if judged is None else agreement(judged.logits, judged.labels),
        classifier_accuracy=None if judged is None or judge is None else judge.accuracy,
        classes=_by_class(real, fake, judged, names, k, device, shares),
    )


def _by_class(
    real: Statistics,
    fake: Statistics,
    judged: Statistics | None,
    names: Sequence[str] | None,
    k: int,
    device: torch.device,
    covered: list[float] | None,
) -> tuple[ClassScores, ...]:
    """Where both have labels; of images without, what the classifier says."""
    if not (real.has("labels") and fake.has("labels")):
        known = names if names is not None else [str(label) for label in range(len(covered or ()))]
        rest = (0, None, None, None)
        return tuple(ClassScores(name, *rest, share=share) for name, share in zip(known, covered or (), strict=False))
    classes = len(names) if names is not None else int(torch.maximum(real.labels.max(), fake.labels.max())) + 1
    ours, theirs = real.features.to(device), fake.features.to(device)
    shares = precision_recall_by_class(ours, real.labels, theirs, fake.labels, classes, k)
    found = []
    for label, share in enumerate(shares):
        mine = fake.labels == label
        agreed = None if judged is None or not mine.any() else agreement(judged.logits[mine], judged.labels[mine])
        name = str(label) if names is None else names[label]
        precision, recall = (None, None) if share is None else share
        share_of = covered[label] if covered is not None and label < len(covered) else None
        found.append(ClassScores(name, int(mine.sum()), precision, recall, agreed, share_of))
    return tuple(found)


def _shares(logits: Tensor) -> list[float]:
    """Of all images, those that have their largest logit in each class: how many modes there are, and how even."""
    classes = torch.bincount(logits.argmax(1), minlength=logits.shape[1])
    return [count / len(logits) for count in classes.tolist()]


def _measured(
    batches: Iterator[tuple[Tensor, Tensor | None]],
    extractor: Extractor,
    judge: Classifier | None,
    data: str,
    count: int | None,
    name: str,
    progress: bool | str,
) -> tuple[Statistics, Statistics | None]:
    """Statistics of all ranks' batches, kept, and those of the ``judge`` where it is another network."""
    found = Statistics(extractor.name, keep=True, data=data)
    judged = None if judge is None or judge is extractor else Statistics(judge.name, keep=True)
    bar = progress_bar(progress if parallel.is_main() else False, name, count or 0, unit="image")
    for images, labels in batches:
        labels = labels if labels is None or labels.ndim == 1 else None  # captions are no classes
        found.update(extractor(images), labels)
        if judged is not None and judge is not None:
            judged.update(judge(images), labels)
        if bar is not None:
            bar.update(len(images) * parallel.world())
    if bar is not None:
        bar.close()
    found = found.over_ranks()
    return found, (found if judge is extractor else None) if judged is None else judged.over_ranks()


def _need_extractor(value: object) -> None:
    if not isinstance(value, Extractor):
        raise ValueError(
            "extractor must be a function of images with name, dims and device, as extractor('inception', ...) and "
            f"train_classifier(...) return, got {type(value).__name__}"
        )


def _count(images: Any) -> int | None:
    """How many images there are, where they say it; batches do not."""
    return len(images) if isinstance(images, Tensor) or hasattr(images, "batch") else None


def _batches(images: Any, labels: Tensor | None, batch: int) -> Iterator[tuple[Tensor, Tensor | None]]:
    """This rank's images, ``batch`` at a time where they are there by index."""
    if hasattr(images, "batch") and hasattr(images, "__len__"):
        mine = parallel.share(len(images))
        for indices in torch.arange(mine.start, mine.stop).split(batch) if mine else ():
            yield images.batch(indices)
    elif isinstance(images, Tensor):
        if labels is not None and labels.shape != images.shape[:1]:
            raise ValueError(f"labels must have shape [{len(images)}], got {list(labels.shape)}")
        mine = parallel.share(len(images))
        for i in range(mine.start, mine.stop, batch):
            chosen = slice(i, min(i + batch, mine.stop))
            yield images[chosen], None if labels is None else labels[chosen]
    elif isinstance(images, Iterable) and not isinstance(images, str | bytes | dict):
        for part in images:
            if isinstance(part, Tensor):
                yield part, None
            elif hasattr(part, "images") and hasattr(part, "classes"):
                yield part.images, part.classes
            elif isinstance(part, tuple | list) and len(part) == 2:
                yield part[0], part[1]
            else:
                raise ValueError(
                    "images must be batches: tensors, pairs of (images, labels) or parts with .images and .classes, "
                    f"got a {type(part).__name__}"
                )
    else:
        raise ValueError(f"images must be a tensor, Images or batches of them, got {type(images).__name__}")


def _drawn(count: int, n: int, seed: int) -> Tensor:
    """n of the numbers 0 .. count - 1 at random, in their order; all where n = count."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:n].sort().values
