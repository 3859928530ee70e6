"""A large number of images in files of one size, for any number of processes, of which only the missing are made."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from diffkern import parallel, pictures, records, storage
from diffkern.generate.images import MICRO_BATCH, Part, classes_of, cuts, generate, known_classes
from diffkern.generate.recommended import planned
from diffkern.integers import integer
from diffkern.names import SamplerName
from diffkern.pixels import from_bytes
from diffkern.plan import Plan
from diffkern.progress import progress_bar

if TYPE_CHECKING:
    from diffkern.diffusion import Diffusion
    from diffkern.gan import GAN

__all__ = ["INDEX", "fingerprint", "read_shards", "write_shards"]

LOCK, PATIENCE = ".lock", 5.0
"""Seconds that a job waits for the end of another in its folder, which may just have been killed."""
INDEX, KEY, FORMAT = "index.json", "diffkern_shards", 1
IMAGES, CLASSES = "arr_0", "arr_1"
"""The arrays of a shard: uint8 [B, H, W, C] and int64 [B], named as in the archives of guided-diffusion's evaluator."""
SHARD = 1024


@dataclasses.dataclass(frozen=True)
class _Job:
    """What makes the images of a folder those and no others; in words what a hash says, for the reader."""

    model: str
    sampler: str
    steps: int
    plan: str
    seed: int
    first: int
    n: int
    shape: tuple[int, ...]
    classes: str | None
    guidance: float | None
    micro_batch: int
    shard: int
    device: str
    length: int | None = None
    """Tokens of a text; None: there are classes, or nothing."""

    def files(self) -> dict[str, range]:
        """The numbers of the images of each file."""
        return {f"shard-{part.start // self.shard:06d}.npz": part for part in cuts(self.n, self.first, self.shard)}


def write_shards(
    folder: str | os.PathLike[str],
    diffusion: Diffusion | GAN,
    n: int,
    sampler: SamplerName | Plan | Callable[..., Plan] | None = None,
    steps: int | None = None,
    *,
    seed: int = 0,
    first: int = 0,
    classes: Tensor | Sequence[int] | Literal["even"] | None = None,
    texts: str | Sequence[str] | None = None,
    guidance: float | None = None,
    micro_batch: int = MICRO_BATCH,
    shard: int | None = None,
    progress: bool | str = False,
    **options: Any,
) -> list[Path]:
    """The images of `generate` as bytes, in files of ``shard`` images each; the files of all of them.

    A shard is an uncompressed .npz of ``arr_0``, uint8 [B, H, W, C], and with classes ``arr_1``, int64 [B] (of texts
    their tokens, int64 [B, L]); index.json says what was asked for. In a job of torch.distributed every rank makes its
    part of the shards, which have the same bytes for every number of ranks. Each is written whole or not at all, so
    that a job that was ended at any moment is taken up by calling it again: what is there is kept, what is missing
    made; with a larger ``n`` the job grows, and a last file that was not full is made again. One job at a time writes
    into a folder. Memory does not grow with n.

    ``shard``: a multiple of ``micro_batch``, about 1024 if None. Raises ValueError for a folder that holds another job
    (another model, seed, plan, classes of the same images, a larger number ...) or other files, or that another job is
    writing to, and RuntimeError for images that are not finite; in every rank.
    """
    micro_batch = integer("micro_batch", micro_batch, 1, 2**31 - 1, "in 1..2**31 - 1")
    shard = -(-SHARD // micro_batch) * micro_batch if shard is None else integer("shard", shard, 1)
    if shard % micro_batch:
        raise ValueError(f"shard must be a multiple of micro_batch = {micro_batch}, got {shard}")
    plan = planned(diffusion, sampler, steps, guidance=guidance, **options)
    if plan is None and classes is None and known_classes(diffusion):
        classes = "even"
    common: dict[str, Any] = {"seed": seed, "guidance": guidance, "micro_batch": micro_batch}
    generate(diffusion, n, plan, first=first, classes=classes, texts=texts, **common)  # raises for what does not fit
    chosen = classes_of(diffusion, classes, n, first, texts)
    device = next((p.device.type for p in diffusion.parameters()), "cpu")

    def digest(count: int) -> str | None:
        return None if chosen is None else hashlib.sha256(chosen[:count].numpy().tobytes()).hexdigest()

    job = _Job(
        model=fingerprint(diffusion),
        sampler="generator" if plan is None else plan.name,
        steps=0 if plan is None else len(plan.steps),
        plan="" if plan is None else hashlib.sha256(plan.to_json().encode()).hexdigest(),
        seed=seed,
        first=first,
        n=n,
        shape=tuple(diffusion.image_shape or ()),
        classes=digest(n),
        guidance=None if guidance is None else float(guidance),
        micro_batch=micro_batch,
        shard=shard,
        device=device,
        length=None if chosen is None or chosen.ndim == 1 else chosen.shape[1],
    )
    files = job.files()
    with contextlib.ExitStack() as held:
        missing: list[str] = parallel.by_main(lambda: _missing(Path(folder), job, digest, held))
        mine = [missing[i] for i in parallel.share(len(missing))]
        bar = progress_bar(progress, job.sampler, sum(len(files[name]) for name in mine), unit="image")
        if bar is not None:
            held.callback(bar.close)
        for name in mine:
            numbers = files[name]
            asked = None if chosen is None else chosen[numbers.start - first : numbers.stop - first]
            made = []
            for part in generate(
                diffusion, len(numbers), plan, first=numbers.start, classes=asked, share=range, **common
            ):
                made.append(_bytes(part))
                if bar is not None:
                    bar.update(len(made[-1]))
            _write(Path(folder) / name, torch.cat(made), asked)
        parallel.barrier()
    return [Path(folder) / name for name in files]


def read_shards(
    folder: str | os.PathLike[str], micro_batch: int = 256, share: Callable[[int], range] = range
) -> Iterator[Part]:
    """The images of a folder of `write_shards` by their numbers, float32 [B, C, H, W] in [-1, 1], B at most
    ``micro_batch``; ``share``: of which of the files, those of this rank with `parallel.share`.

    ValueError where a shard is missing or no shard: the job has to be run to its end.
    """
    integer("micro_batch", micro_batch, 1)
    path = Path(folder)
    if not (path / INDEX).is_file():
        raise ValueError(f"{path} must be a folder of shards with its {INDEX}, got none: write_shards makes one")
    job = _read(path / INDEX)
    files = job.files()
    absent = [name for name, numbers in files.items() if not _is_shard(path / name, job, len(numbers))]
    if absent:
        raise ValueError(
            f"{path} must hold all {len(files)} shards of its job, got {len(files) - len(absent)} (without "
            f"{absent[0]}): run the job again, it makes what is missing"
        )
    names = list(files)
    return _parts(path, {names[i]: files[names[i]] for i in share(len(names))}, micro_batch)


def _parts(folder: Path, files: dict[str, range], micro_batch: int) -> Iterator[Part]:
    for name, numbers in files.items():
        with np.load(folder / name, allow_pickle=False) as arrays:
            count = len(numbers)  # what was there when reading began
            images = torch.from_numpy(arrays[IMAGES][:count])
            classes = torch.from_numpy(arrays[CLASSES][:count]) if CLASSES in arrays else None
        for i in range(0, count, micro_batch):
            x = from_bytes(images[i : i + micro_batch].movedim(-1, -3)).contiguous()
            yield Part(numbers.start + i, x, None if classes is None else classes[i : i + micro_batch])


def fingerprint(diffusion: Diffusion | GAN) -> str:
    """SHA-256 of what a model is: its ``to_dict``, and every tensor with its name."""
    found = hashlib.sha256(json.dumps(diffusion.to_dict()).encode())
    for name, tensor in diffusion.state_dict().items():
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _bytes(part: Part) -> Tensor:
    """`pictures.as_bytes`; RuntimeError for an image that is none."""
    bad = ~part.images.flatten(1).isfinite().all(dim=1)
    if bool(bad.any()):
        number = part.first + int(bad.nonzero()[0])
        raise RuntimeError(
            f"images must be finite, got NaN or infinity in image {number}: the network gives no numbers"
        )
    return pictures.as_bytes(part.images)


def _missing(folder: Path, job: _Job, digest: Callable[[int], str | None], held: contextlib.ExitStack) -> list[str]:
    """The files that are to be made, in a folder that is this job's afterwards, and its alone while its lock is
    ``held``; ``digest`` of its first classes."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} must be a folder, and is a file")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / INDEX).exists():
        names = sorted(path.name for path in folder.iterdir() if path.name != LOCK and not path.name.endswith(".part"))
        if names:
            raise ValueError(f"{folder} must be empty or hold the shards of this job, got {names[0]} without {INDEX}")
    try:
        held.enter_context(storage.locked(folder / LOCK, PATIENCE))
    except TimeoutError:
        raise ValueError(f"{folder} must be written to by one job at a time, and another is at it") from None
    if (folder / INDEX).exists():
        other = _read(folder / INDEX)
        before = dataclasses.replace(job, n=other.n, classes=digest(other.n)) if other.n < job.n else job
        for field in dataclasses.fields(job):
            asked, found = getattr(before, field.name), getattr(other, field.name)
            if asked != found:
                raise ValueError(
                    f"{folder} must be empty or hold the shards of this job, got those of another, whose {field.name} "
                    f"is {records.shown(found)} instead of {records.shown(asked)}"
                )
        if other.n < job.n:
            _write_index(folder, job)
    else:
        _write_index(folder, job)
    for left in folder.glob("*.part"):  # of a job that was ended while it wrote
        left.unlink(missing_ok=True)
    return [name for name, numbers in job.files().items() if not _is_shard(folder / name, job, len(numbers))]


def _write_index(folder: Path, job: _Job) -> None:
    storage.write(folder / INDEX, json.dumps({KEY: FORMAT, **dataclasses.asdict(job)}, indent=1) + "\n")


def _read(path: Path) -> _Job:
    data = records.parse(path.read_bytes(), "JSON", str(path))
    found = data.pop(KEY, None) if isinstance(data, dict) else None
    if type(found) is not int or found != FORMAT:
        raise ValueError(f"{path} must be the index of shards with {KEY} = {FORMAT}, got {records.shown(found)}")
    job = records.record(_Job, data, f"{path}: ")
    if not (len(job.shape) == 3 and min(*job.shape, job.n, job.shard) >= 1 and job.first >= 0):
        raise ValueError(f"{path}: n, shard and shape must be positive, got {job.n}, {job.shard} and {list(job.shape)}")
    return job


def _is_shard(path: Path, job: _Job, count: int) -> bool:
    """Whether the file is there and whole, by the archive's directory and the arrays' heads."""
    channels, height, width = job.shape
    want: dict[str, tuple[Any, ...]] = {f"{IMAGES}.npy": ((count, height, width, channels), np.dtype(np.uint8))}
    if job.classes is not None:
        want[f"{CLASSES}.npy"] = ((count,) if job.length is None else (count, job.length), np.dtype(np.int64))
    try:
        with zipfile.ZipFile(path) as archive:
            if set(archive.namelist()) != set(want):
                return False
            for name, (shape, dtype) in want.items():
                with archive.open(name) as array:
                    if np.lib.format.read_magic(array) != (1, 0):
                        return False
                    found, fortran, kind = np.lib.format.read_array_header_1_0(array)
                    if (found, fortran, kind) != (shape, False, dtype):
                        return False
    except (OSError, ValueError, zipfile.BadZipFile):
        return False
    return True


def _write(path: Path, images: Tensor, classes: Tensor | None) -> None:
    data = io.BytesIO()  # the names and their order alone: no date goes in, so equal images are equal files
    arrays = {IMAGES: images.numpy()} | ({} if classes is None else {CLASSES: classes.numpy()})
    np.savez(data, **arrays)  # type: ignore[arg-type]
    storage.write(path, data.getvalue())
