"""Sums over the features of a set of images, from which its mean and covariance follow: batch by batch, for any number
of processes, and kept in a file."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffkern import checks, parallel, records, storage
from diffkern.extras import need
from diffkern.metrics.features import Features

__all__ = ["Statistics"]

_KEY, _FORMAT = "diffkern_statistics", 1
_KEPT = ("features", "logits", "labels")


@dataclasses.dataclass(frozen=True)
class _Head:
    """What a file says beside its tensors."""

    format: int
    count: int
    extractor: str
    data: str


class Statistics:
    """n, Σ x and Σ x xᵀ of features x, in float64: mean = Σ x / n, covariance = (Σ x xᵀ - n mean meanᵀ) / (n - 1).

    Sums, so that parts merge into the whole: `merge` two of them, `over_ranks` those of a job; nothing is an average
    of averages. The same of the spatial features, where the extractor gives them. ``keep``: also the features
    themselves, logits and labels, on the CPU, which KID, precision and recall, and FID's extrapolation need: 8 KiB an
    image of 2048 features.

    ``extractor``: its name; statistics of two extractors are never compared. ``data``: what the images are (a
    `fingerprint`), to know a file again.
    """

    def __init__(self, extractor: str = "", *, keep: bool = False, data: str = "") -> None:
        self.extractor, self.keep, self.data = extractor, keep, data
        self.count = 0
        self._sums: dict[str, Tensor] = {}  # "pooled.sum" [D], "pooled.products" [D, D]; "spatial. ..."
        self._kept: dict[str, list[Tensor]] = {}  # "features" [N, D], "logits" [N, L], "labels" [N]

    @classmethod
    def of(cls, features: Features | Tensor, labels: Tensor | None = None, extractor: str = "") -> Statistics:
        """Of features that are there already, kept."""
        made = cls(extractor, keep=True)
        made.update(features, labels)
        return made

    # ------------------------------------------------------------------------------------------------------ made
    def update(self, features: Features | Tensor, labels: Tensor | None = None) -> None:
        """Adds the features of a batch: `Features`, or pooled ones [B, D] alone; ``labels`` int64 [B] beside them.

        ValueError for features that are not finite, of another size than before, or with labels in one batch and none
        in another.
        """
        found = features if isinstance(features, Features) else Features(features)
        pooled = _matrix("features", found.pooled)
        parts = {"pooled": pooled, "spatial": found.spatial}
        new = {name: _matrix(name, part) for name, part in parts.items() if part is not None}
        kept = {"features": pooled, "logits": found.logits, "labels": labels} if self.keep else {}
        rows = {name: part.detach() for name, part in kept.items() if part is not None}
        for name, part in (new | rows).items():
            if len(part) != len(pooled):
                raise ValueError(f"{name} must be as many as the features, {len(pooled)}, got {len(part)}")
        if self.count:
            before, now = self._shapes(), {name: part.shape[1:] for name, part in (new | rows).items()}
            if before != now:
                raise ValueError(f"features must be as those before, {_listed(before)}, got {_listed(now)}")
        for name, part in new.items():
            x = part.detach().double()
            zeros = {f"{name}.sum": x.new_zeros(x.shape[1]), f"{name}.products": x.new_zeros(x.shape[1], x.shape[1])}
            self._sums = zeros | self._sums
            self._sums[f"{name}.sum"] += x.sum(0)
            self._sums[f"{name}.products"].addmm_(x.T, x)
        for name, part in rows.items():
            self._kept.setdefault(name, []).append(part.cpu())
        self.count += len(pooled)

    def merge(self, other: Statistics) -> None:
        """Adds those of other images: the same as if these had been updated with theirs."""
        self._need_same(other)
        if not other.count:
            return
        if self.count and (self._shapes() != other._shapes()):
            raise ValueError(
                f"other must have the features of these, {_listed(self._shapes())}, got {_listed(other._shapes())}"
            )
        for name, part in other._sums.items():
            mine = self._sums.get(name)
            self._sums[name] = part.clone() if mine is None else mine + part.to(mine.device)
        for name, parts in other._kept.items() if self.keep else ():
            self._kept.setdefault(name, []).extend(parts)
        self.count += other.count

    def over_ranks(self) -> Statistics:
        """Those of all processes of the job together, the same on each; what is kept follows the order of the ranks.

        Every rank must call it, also one that saw no image.
        """
        mine = {
            "count": self.count,
            "sums": {name: list(part.shape) for name, part in self._sums.items()},
            "kept": {
                name: [list(parts[0].shape[1:]), str(parts[0].dtype).removeprefix("torch.")]
                for name, parts in self._kept.items()
            },
        }
        every = parallel.gathered(mine)
        known = [described for described in every if described["count"]]
        if any((d["sums"], d["kept"]) != (known[0]["sums"], known[0]["kept"]) for d in known):
            raise ValueError(f"features must be alike on all ranks, got {records.shown([d['sums'] for d in known])}")
        whole = Statistics(self.extractor, keep=self.keep, data=self.data)
        whole.count = sum(described["count"] for described in every)
        if not known:
            return whole
        first = sum(described["count"] for described in every[: parallel.rank()])
        device = parallel.device()
        for name, shape in known[0]["sums"].items():
            part = self._sums.get(name)
            total = torch.zeros(shape, dtype=torch.float64, device=device)
            (whole._sums[name],) = parallel.summed(total if part is None else total.copy_(part))
        for name, (shape, dtype) in known[0]["kept"].items():  # every row is one rank's, the others add zeros
            rows = torch.zeros(whole.count, *shape, dtype=getattr(torch, dtype), device=device)
            if self.count:
                rows[first : first + self.count] = torch.cat(self._kept[name]).to(device)
            whole._kept[name] = [parallel.summed(rows)[0].cpu()]
        return whole

    # ------------------------------------------------------------------------------------------------------ read
    def moments(self, part: str = "pooled") -> tuple[Tensor, Tensor]:
        """Mean [D] and unbiased covariance [D, D] of the "pooled" or the "spatial" features, float64 on the CPU.

        ValueError for fewer than two images, or where the extractor gives no spatial features.
        """
        if self.count < 2:
            raise ValueError(f"statistics must be of at least 2 images, got {self.count}")
        if f"{part}.sum" not in self._sums:
            raise ValueError(f"statistics must hold {part} features, got none of extractor {self.extractor!r}")
        mean = self._sums[f"{part}.sum"].cpu() / self.count
        products = self._sums[f"{part}.products"].cpu()
        return mean, (products - self.count * torch.outer(mean, mean)) / (self.count - 1)

    def has(self, part: str) -> bool:
        """Whether there are "spatial" sums, or kept "features", "logits" or "labels"."""
        return f"{part}.sum" in self._sums or part in self._kept

    @property
    def features(self) -> Tensor:
        """Pooled features [N, D], as the extractor gave them, on the CPU; ValueError unless they were kept."""
        return self._whole("features")

    @property
    def logits(self) -> Tensor:
        """Logits [N, L], on the CPU; ValueError unless the extractor gives them and they were kept."""
        return self._whole("logits")

    @property
    def labels(self) -> Tensor:
        """Labels int64 [N], on the CPU; ValueError unless they were given and kept."""
        return self._whole("labels")

    def save(self, path: str | os.PathLike[str]) -> None:
        """One safetensors file, written whole or not at all: sums and what is kept; what it is of in its metadata."""
        safetensors = need("safetensors.torch", "safetensors", "evaluate")
        tensors = {name: part.cpu() for name, part in self._sums.items()}
        tensors |= {name: self._whole(name) for name in self._kept}
        head = json.dumps(dataclasses.asdict(_Head(_FORMAT, self.count, self.extractor, self.data)))
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        storage.write(path, safetensors.save(tensors, metadata={_KEY: head}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Statistics:
        """What `save` wrote; FileNotFoundError, or ValueError with one sentence for any other file."""
        safetensors = need("safetensors", "safetensors", "evaluate")
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there are no statistics {path}: Statistics.save writes them")
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                head = _head((file.metadata() or {}).get(_KEY), path)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        except safetensors.SafetensorError as error:
            raise ValueError(f"{path} must be a safetensors file, got none ({error})") from error
        if not _sound(tensors, head.count):
            raise ValueError(f"{path} must hold statistics of {head.count} images, got {_listed(tensors)}")
        kept = {name: [part] for name, part in tensors.items() if "." not in name}
        made = cls(head.extractor, keep=bool(kept), data=head.data)
        made.count, made._kept = head.count, kept
        made._sums = {name: part for name, part in tensors.items() if "." in name}
        return made

    # -------------------------------------------------------------------------------------------------------------
    def _whole(self, name: str) -> Tensor:
        parts = self._kept.get(name)
        if parts is None:
            hint = "" if self.keep else ": Statistics(..., keep=True) keeps them"
            raise ValueError(f"statistics must hold {name}, got none of extractor {self.extractor!r}{hint}")
        if len(parts) > 1:
            self._kept[name] = parts = [torch.cat(parts)]
        return parts[0]

    def _shapes(self) -> dict[str, Any]:
        sums = {name.removesuffix(".sum"): part.shape for name, part in self._sums.items() if name.endswith(".sum")}
        return sums | {name: parts[0].shape[1:] for name, parts in self._kept.items()}

    def _need_same(self, other: Statistics) -> None:
        if not isinstance(other, Statistics):
            raise ValueError(f"other must be Statistics, got {type(other).__name__}")
        if self.extractor != other.extractor:
            raise ValueError(
                f"statistics must be of one extractor to be compared, got {self.extractor!r} and {other.extractor!r}"
            )


def _head(text: str | None, path: Path) -> _Head:
    if text is None:
        raise ValueError(f"{path} must hold statistics, got a safetensors file without {_KEY!r}")
    head = records.record(_Head, records.parse(text, "the JSON of statistics", "its metadata"), "its metadata.")
    if head.format != _FORMAT:
        raise ValueError(f"{path} must have format {_FORMAT}, got {head.format}")
    return head


def _sound(tensors: dict[str, Tensor], count: int) -> bool:
    """Whether they are what `Statistics.save` writes: sums [D] with products [D, D], and kept rows."""
    kept = [part for name, part in tensors.items() if name in _KEPT]
    parts = [name for name in ("pooled", "spatial") if f"{name}.sum" in tensors]
    sums = [tensors[f"{name}.sum"] for name in parts]
    products = [tensors.get(f"{name}.products") for name in parts]
    return (
        "pooled" in parts
        and len(tensors) == len(kept) + 2 * len(parts)
        and all(part.dtype == torch.float64 and part.dim() == 1 for part in sums)
        and all(
            p is not None and p.dtype == s.dtype and p.shape == (len(s),) * 2
            for s, p in zip(sums, products, strict=True)
        )
        and all(part.dim() > 0 and len(part) == count for part in kept)
    )


def _matrix(name: str, value: object) -> Tensor:
    checks.need_tensor(name, value)
    assert isinstance(value, Tensor)
    if value.dim() != 2 or not value.is_floating_point():
        raise ValueError(
            f"{name} must be floats [B, D], got {str(value.dtype).removeprefix('torch.')} of {checks.got(value)}"
        )
    if not bool(torch.isfinite(value).all()):
        bad = int((~torch.isfinite(value)).any(1).nonzero()[0])
        raise ValueError(f"{name} must be finite, got NaN or infinity in {name}[{bad}]")
    return value


def _listed(shapes: Any) -> str:
    return ", ".join(f"{name} {list(getattr(shape, 'shape', shape))}" for name, shape in shapes.items())
