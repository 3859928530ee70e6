"""Checkpoints in a run's folder: all that training needs to go on bit for bit, in safetensors and JSON alone.

    RUN/checkpoints/00001000/
        config.json, model.safetensors      what `Diffusion.from_pretrained` opens: the first average's weights
        average-NAME.safetensors            the others in the same form; NAME "raw" are the weights that are trained
        optimizer.safetensors               NAME.exp_avg ... by the names of the network's parameters
        random.safetensors                  torch's generators, by process
        shards/                             in the place of "raw" and optimizer: parts, by process (``sharded``)
        training.json                       step, numbers of the optimizer, sizes of the files, and the caller's extra
    RUN/snapshots/00001000-0.050.safetensors    averages that outlive their checkpoint (`keep_every`)
    RUN/autoencoder/                    that of a model in latents, once; config.json has its hash

A checkpoint is written aside, flushed to the disk and renamed: whatever becomes of the process, the numbered folders
are whole. Nothing is unpickled. Tensors are stored whole and by name, so that a run goes on with another number of
processes and another sharding; every process must see the folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim import Optimizer

from diffkern import parallel, storage
from diffkern.extras import need
from diffkern.records import parse, shown
from diffkern.train import _format, _optimizer
from diffkern.train._contents import RAW, SHARDS, Group, fill, groups, names_of, random_state
from diffkern.train._format import FORMAT, KEY, TRAINING, Training, same
from diffkern.train.ema import Averages
from diffkern.train.sharded import write as write_shards

if TYPE_CHECKING:
    from diffkern.train.stepper import Trained

__all__ = ["Loaded", "load", "newest", "save", "steps"]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What `load` returns beside what it fills.

    step      the last step that was done
    world     number of processes of the job that wrote it
    random    whether torch's generators were put back, which takes the same number of processes
    extra     what the caller of `save` gave
    """

    step: int
    world: int
    random: bool
    extra: dict[str, Any]


def steps(folder: str | os.PathLike[str]) -> list[int]:
    """The steps of a run's checkpoints, from the oldest."""
    return [int(path.name) for path in storage.numbered(Path(folder) / "checkpoints")]


def newest(folder: str | os.PathLike[str]) -> Path | None:
    """The run's checkpoint of the highest step, None where there is none."""
    found = storage.numbered(Path(folder) / "checkpoints")
    return found[-1] if found else None


def save(
    folder: str | os.PathLike[str],
    step: int,
    *,
    diffusion: Trained,
    averages: Averages | None = None,
    optimizer: Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
    keep: int | None = None,
    keep_every: int | None = None,
    sharded: bool = False,
) -> Path:
    """Writes the checkpoint of a step into a run's folder, and returns its folder.

    ``diffusion`` is one, or another thing that is trained (`diffkern.train.stepper.Trained`: a `diffkern.GAN`, say).

    To be called by every process of the job; the first one writes. ``extra`` is the caller's, anything that JSON holds
    (configuration, position in the data, gradient scaler). Afterwards the oldest are removed, so that the newest
    ``keep`` are left, all of them if None; of steps that are multiples of ``keep_every`` the power functions' averages
    stay in RUN/snapshots, for `diffkern.train.synthesis`.

    ``sharded``: of a network in pieces (`diffkern.train.sharded`) every process writes its parts of weights and
    optimizer, all at once; averages are gathered by the first one all the same, one after the other. Otherwise it
    gathers everything, and has to hold weights and optimizer whole.

    OSError on every process, with what is the newest checkpoint, for a full disk or a folder that cannot be written;
    FileExistsError where the step has a checkpoint: nothing is overwritten. ValueError for an ``extra`` that JSON does
    not hold, and for an optimizer with parameters that are not the network's.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1 or None, got {keep}")
    path = Path(folder) / "checkpoints" / f"{step:08d}"
    parallel.reshard(diffusion.model)
    random = random_state()
    described = Training(
        step=step,
        world=parallel.world(),
        torch=torch.__version__,
        averages=() if averages is None else averages.names,
        averaged=0 if averages is None else averages.step,
        optimizer=None if optimizer is None else _optimizer.described(optimizer, names_of(diffusion)),
        files={},
        extra=dict(extra or {}),
    )
    try:
        json.dumps(described.extra, allow_nan=False)
    except (TypeError, ValueError) as wrong:
        raise ValueError(f"extra must be what JSON holds, got {shown(described.extra)} ({wrong})") from None
    contents = groups(diffusion, averages, optimizer, random, sharded)
    error: Exception | None = None
    try:
        if parallel.is_main() or sharded:
            with _begun(path, sharded) as unfinished:
                if sharded:
                    write_shards(next(contents)[1], unfinished / SHARDS)
                if parallel.is_main():
                    if hasattr(diffusion, "save_autoencoder"):  # of a model in latents, for all checkpoints
                        diffusion.save_autoencoder(folder)
                    _write(unfinished, described, diffusion, contents)
        if parallel.is_main():
            _tidy(Path(folder), described, keep, keep_every)
    except Exception as caught:
        error = caught
    for _ in contents:  # gathered by all processes together, also where the first one has stopped writing
        pass
    message = parallel.gathered(None if error is None else [getattr(error, "errno", None), _sentence(error, path)])[0]
    if message is None:
        return path
    number, sentence = message
    if number is None:
        raise error or RuntimeError(sentence)
    raise OSError(number, sentence, str(path)) from error


def _sentence(error: Exception, path: Path) -> str:
    if not isinstance(error, OSError):
        return " ".join(str(error).split())
    if isinstance(error, FileExistsError):
        return "the step has a checkpoint already, which is left as it is"
    with contextlib.suppress(OSError):
        if path.is_dir():
            return f"{error.strerror} (the checkpoint is whole, older ones could not be removed)"
        before = storage.numbered(path.parent)
        return f"{error.strerror} (no checkpoint written, the newest is {before[-1].name if before else 'none'})"
    return f"{error.strerror} (no checkpoint written)"


@contextlib.contextmanager
def _begun(path: Path, together: bool) -> Iterator[Path]:
    """The new folder, whole or not at all; ``together``: the first process makes it for all, who come here at once.

    What killed writers have left makes room first.
    """
    with contextlib.ExitStack() as stack:
        unfinished, error = None, None
        if parallel.is_main():
            try:
                for left in storage.unfinished_in(path.parent):
                    storage.remove(left)
                unfinished = stack.enter_context(storage.whole_folder(path))
            except OSError as caught:
                error = caught
        if together:
            found = parallel.gathered(None if unfinished is None else str(unfinished))[0]
            unfinished = None if found is None else Path(found)
        if unfinished is None:
            raise error or OSError(errno.EIO, os.strerror(errno.EIO), str(path))  # which the first process has to say
        yield unfinished


def _write(unfinished: Path, described: Training, diffusion: Trained, contents: Iterator[Group]) -> None:
    """Everything but the parts of other processes."""
    save_file = need("safetensors.torch", "safetensors", "train").save_file
    options: dict[str, Any] = {"autoencoder": False} if hasattr(diffusion, "save_autoencoder") else {}
    for name, tensors in contents:
        if name.endswith(".safetensors"):
            with storage.filling(unfinished):
                save_file(tensors, str(unfinished / name))
        else:
            diffusion.save_pretrained(unfinished, weights=tensors, average=name, **options)
    first = [*described.averages, RAW][0]
    storage.linked(unfinished / f"average-{first}.safetensors", unfinished / "model.safetensors")
    files = {str(file.relative_to(unfinished)): file.stat().st_size for file in sorted(unfinished.rglob("*.*"))}
    data = {KEY: FORMAT, **dataclasses.asdict(dataclasses.replace(described, files=files))}
    (unfinished / TRAINING).write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def _tidy(folder: Path, described: Training, keep: int | None, keep_every: int | None) -> None:
    """Snapshots of the checkpoints that are there, also those that a killed process has not made; then the removal."""
    every = storage.numbered(folder / "checkpoints")
    if keep_every is not None:
        (folder / "snapshots").mkdir(exist_ok=True)
        for path in every:
            for name in described.averages:
                source = path / f"average-{name}.safetensors"
                place = folder / "snapshots" / f"{path.name}-{name}.safetensors"
                kept = int(path.name) % keep_every == 0 and name != "plain"
                if kept and source.is_file() and not place.exists():
                    storage.linked(source, place)
    for path in [] if keep is None else every[:-keep]:
        storage.remove(path)


def load(
    path: str | os.PathLike[str],
    *,
    diffusion: Trained,
    averages: Averages | None = None,
    optimizer: Optimizer | None = None,
    expect: Mapping[str, Any] | None = None,
) -> Loaded:
    """Fills network, averages and optimizer with a checkpoint's, and torch's generators with their state.

    ``expect``: entries that ``extra`` must have, such as {"config": ..., "data": fingerprint}. Everything is compared
    before anything is changed: ValueError, in one sentence that names what differs, for a checkpoint of another
    network, schedule, optimizer, set of averages or of another ``expect``, and for a file that is missing, cut or of
    another kind. FileNotFoundError where there is no checkpoint.
    """
    path = Path(path)
    found = _format.read(path)
    parallel.reshard(diffusion.model)
    names = names_of(diffusion)
    same(parse((path / "config.json").read_bytes(), "JSON", str(path / "config.json")), diffusion.to_dict(), path)
    for key, value in (expect or {}).items():
        same(found.extra.get(key), value, path, key)
    same(found.averages, () if averages is None else averages.names, path, "averages")
    if optimizer is not None:
        same(_optimizer.identity(found.optimizer), _optimizer.identity(_optimizer.described(optimizer, names)), path)
    again = found.world == parallel.world()
    with torch.no_grad():
        fill(path, diffusion, averages, optimizer, found.optimizer or {}, again)
    if averages is not None:
        averages.step = found.averaged
    return Loaded(found.step, found.world, again, found.extra)
