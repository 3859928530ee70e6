"""Latents of images, encoded once: mapped from a folder of the cache, and sampled anew from their posterior each time.

    latents = encoded(images, encode, "hash of the autoencoder")
    z, labels = latents.batch(indices, seeds)

The autoencoder is a function here, ``encode(x0) -> (mean, std)``: of images [B, C, H, W] the mean and the standard
deviation of each latent, [B, c, h, w] each; std None where there is nothing to sample.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from diffkern import ops, parallel, records, streams
from diffkern.data._cache import folder_of, unwritable
from diffkern.data.images import Images, Retold, Subset, check_indices
from diffkern.data.stored import ArrayImages, received, sent
from diffkern.draws import uniform_by_address
from diffkern.progress import progress_bar

__all__ = ["Encode", "LatentImages", "encoded"]

FORMAT = 1
"""Of what is in a folder: another number, another folder."""
Encode = Callable[[Tensor], tuple[Tensor, Tensor | None]]


class LatentImages(Images):
    """Latents of images by index, with the images' labels and fingerprint.

    ``mean``, ``std``: float32 [sets, N, c, h, w], of the images and, where ``sets`` is 2, of the mirrored ones; std
    None: nothing to sample.
    """

    def __init__(self, images: Images, mean: np.ndarray, std: np.ndarray | None) -> None:
        channels, height, width = mean.shape[2:]
        for name in Images.__annotations__:  # what images say of themselves: labels, classes ...
            setattr(self, name, getattr(images, name))
        self.shape = (channels, height, width)
        self.mean, self.std = mean, std
        self.fingerprint = images.fingerprint

    def __len__(self) -> int:
        return int(self.mean.shape[1])

    def batch(self, indices: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """z = mean + std n with n by the address (seed, POSTERIOR), flipped as the images are; without seeds the mean.

        What the autoencoder gives of the augmented images with these seeds, to rounding.
        """
        check_indices(indices, seeds, len(self))
        chosen = np.zeros(len(indices), np.int64)
        if seeds is not None and len(seeds) and len(self.mean) > 1:
            chosen = (uniform_by_address(seeds, streams.AUGMENTATION) < 0.5).numpy().astype(np.int64)
        rows = chosen, indices.numpy()
        z = torch.from_numpy(np.array(self.mean[rows]))
        if seeds is not None and self.std is not None:
            std = torch.from_numpy(np.array(self.std[rows]))
            z = torch.addcmul(z, std, ops.randn(z.shape, seeds, streams.POSTERIOR, dtype=z.dtype))
        return z, None if self.labels is None else self.labels[indices]

    def __getstate__(self) -> dict[str, Any]:
        """For another process: of mapped files where they are."""
        return self.__dict__ | {"mean": sent(self.mean), "std": None if self.std is None else sent(self.std)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.mean = received(state["mean"])
        self.std = None if state["std"] is None else received(state["std"])


def encoded(
    images: Images,
    encode: Encode,
    autoencoder: str,
    *,
    cache: str | os.PathLike[str] | bool | None = None,
    batch: int = 64,
    progress: bool | str = False,
) -> LatentImages:
    """The latents of all images: from the cache, or encoded into it, ``batch`` images at a time.

    ``autoencoder``: what tells the one behind ``encode`` from others, its hash; with the images' fingerprint it is the
    name in the cache (``cache`` as for `open_images`). Random flips are kept as a second set of latents, and chosen by
    the address that flips the images. In a job of several processes each encodes its part, where all of them see the
    folder; otherwise the first of each machine encodes all. A process that is killed leaves nothing that is taken for
    whole. In memory, of every process, for ``cache=False`` and for images of a class without a fingerprint of its own.

    ValueError for images that are cropped at random, which have no latents that could be kept; OSError where the cache
    cannot be written.
    """
    others = [word for word in images.augmentation if word != "flip"]
    if others:
        raise ValueError(
            f"images must be augmented by flips alone for their latents to be kept, got {', '.join(others)}: encode "
            "them on the fly"
        )
    job = _Job(images, encode, autoencoder, batch, progress)
    folder = folder_of(cache) if _identified(images) else None
    if folder is None:
        return job.in_memory()
    place = folder / f"latents-{job.key()}"
    try:
        found = job.read(place)
        if not all(parallel.gathered(found is not None)):
            if parallel.world() == 1 or not _together(job, place):
                _alone(job, place)
            found = job.read(place)
    except OSError as error:
        raise unwritable(error, folder) from error
    assert found is not None
    return found


def _identified(images: Images) -> bool:
    """Whether the fingerprint is one of the images' content."""
    if isinstance(images, Subset | Retold):
        return _identified(images.images)
    plain: Any = Images.__dict__["fingerprint"]
    return bool(images.fingerprint != plain.func(images))


def _more(images: Images) -> list[str]:
    """What tells the images from others beside a fingerprint that is of some of their pixels alone."""
    while isinstance(images, Subset | Retold):
        images = images.images
    return [images.all_pixels()] if isinstance(images, ArrayImages) and images.partly else []


@dataclasses.dataclass(frozen=True)
class _About:
    """about.json."""

    data: str
    autoencoder: str
    sets: int
    count: int
    shape: tuple[int, ...]
    """Of one latent."""
    sampled: bool
    """Whether there are standard deviations."""

    def files(self) -> list[str]:
        return ["mean.bin", "std.bin"] if self.sampled else ["mean.bin"]

    def size(self) -> tuple[int, ...]:
        return (self.sets, self.count, *self.shape)


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is encoded by what."""

    images: Images
    encode: Encode
    autoencoder: str
    batch: int
    progress: bool | str

    @property
    def sets(self) -> int:
        return 1 + ("flip" in self.images.augmentation)

    def key(self) -> str:
        parts = [FORMAT, self.images.fingerprint, list(self.images.shape), self.autoencoder, self.sets]
        text = json.dumps([*parts, *_more(self.images)])
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def about(self) -> _About:
        """By the latents of the first image."""
        mean, std = self.encode(self.images.batch(torch.zeros(1, dtype=torch.int64))[0])
        shape = tuple(mean.shape[1:])
        return _About(
            self.images.fingerprint, self.autoencoder, self.sets, len(self.images), shape, sampled=std is not None
        )

    def parts(self, numbers: range) -> Iterator[tuple[int, int, list[np.ndarray]]]:
        """(set, first number, arrays) of the images of these numbers, a batch at a time."""
        progress = self.progress if parallel.is_main() else False
        bar = progress_bar(progress, "encoding images", self.sets * len(numbers), unit="image")
        with contextlib.nullcontext() if bar is None else contextlib.closing(bar):
            for first in range(numbers.start, numbers.stop, self.batch):
                chosen = torch.arange(first, min(first + self.batch, numbers.stop))
                x0 = self.images.batch(chosen)[0]
                for which in range(self.sets):
                    found = self.encode(x0.flip(-1) if which else x0)
                    yield which, first, [part.float().cpu().contiguous().numpy() for part in found if part is not None]
                    if bar is not None:
                        bar.update(len(chosen))

    def in_memory(self) -> LatentImages:
        about = self.about()
        arrays = [np.empty(about.size(), np.float32) for _ in about.files()]
        for which, first, found in self.parts(range(about.count)):
            for array, part in zip(arrays, found, strict=True):
                array[which, first : first + len(part)] = part
        return LatentImages(self.images, arrays[0], arrays[1] if about.sampled else None)

    def write(self, part: Path, about: _About, numbers: range) -> None:
        """The latents of these images into files that are there in full size."""
        row = int(np.prod(about.shape, dtype=np.int64)) * 4
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(part / name, "r+b")) for name in about.files()]
            for which, first, found in self.parts(numbers):
                for file, array in zip(files, found, strict=True):
                    file.seek((which * about.count + first) * row)
                    file.write(array.data)
            for file in files:
                file.flush()
                os.fsync(file.fileno())

    def read(self, place: Path) -> LatentImages | None:
        """What was encoded; None where nothing whole is, so that it is encoded anew."""
        try:
            about = records.record(_About, records.parse((place / "about.json").read_bytes()))
            wanted = (self.images.fingerprint, self.autoencoder, self.sets, len(self.images))
            if (about.data, about.autoencoder, about.sets, about.count) != wanted:
                return None
            arrays = [np.memmap(place / name, np.float32, "r", shape=about.size()) for name in about.files()]
            if any(
                (place / name).stat().st_size != array.nbytes for name, array in zip(about.files(), arrays, strict=True)
            ):
                return None
        except (OSError, ValueError):
            return None
        return LatentImages(self.images, arrays[0], arrays[1] if about.sampled else None)


def _part(place: Path) -> Path:
    return place.with_name(f"{place.name}.part")


def _begin(job: _Job, place: Path) -> _About:
    """Empty files of full size in the folder that is filled. The lock is held: what lies there is of a killed job."""
    about = job.about()
    for leftover in (_part(place), place):
        if leftover.exists():
            shutil.rmtree(leftover)
    _part(place).mkdir()
    for name in about.files():
        with open(_part(place) / name, "xb") as file:
            file.truncate(int(np.prod(about.size(), dtype=np.int64)) * 4)
    return about


def _end(place: Path, about: _About) -> None:
    """What is filled takes its name."""
    with open(_part(place) / "about.json", "xb") as file:
        file.write(json.dumps(dataclasses.asdict(about), indent=1).encode())
        file.flush()
        os.fsync(file.fileno())
    os.rename(_part(place), place)


def _alone(job: _Job, place: Path) -> None:
    """All of it, unless another process of this machine has done it meanwhile."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{place}.lock"):
        if job.read(place) is not None:
            return
        try:
            about = _begin(job, place)
            job.write(_part(place), about, range(about.count))
            _end(place, about)
        except BaseException:
            shutil.rmtree(_part(place), ignore_errors=True)
            raise


def _together(job: _Job, place: Path) -> bool:
    """By the processes of a job, each its share; False where they do not see one folder, and nothing is done."""
    with contextlib.ExitStack() as held:
        begun = parallel.by_main(lambda: _opened(job, place, held))
        if begun is None:  # another job has done it meanwhile
            return all(parallel.gathered(job.read(place) is not None))
        token, data = begun
        seen = all(parallel.gathered((_part(place) / token).is_file()))
        error: Exception | None = None
        about = records.record(_About, data)
        if seen:
            try:
                job.write(_part(place), about, parallel.share(about.count))
            except Exception as caught:
                error = caught
        wrong = [text for text in parallel.gathered(None if error is None else str(error)) if text is not None]
        parallel.by_main(lambda: _ended(place, about, token, whole=seen and not wrong))
        if error is not None:
            raise error
        if wrong:
            raise RuntimeError(f"another process could not encode its images: {wrong[0]}")
        return seen


def _ended(place: Path, about: _About, token: str, whole: bool) -> None:
    if whole:
        (_part(place) / token).unlink()
        _end(place, about)
    else:
        shutil.rmtree(_part(place), ignore_errors=True)


def _opened(job: _Job, place: Path, held: contextlib.ExitStack) -> list[Any] | None:
    """Of the main process, which holds the lock until ``held`` ends: a file's name, and what is begun."""
    place.parent.mkdir(parents=True, exist_ok=True)
    held.enter_context(FileLock(f"{place}.lock"))
    if job.read(place) is not None:
        return None
    about, token = _begin(job, place), secrets.token_hex(8)
    (_part(place) / token).touch()
    return [token, dataclasses.asdict(about)]
