"""Checkpoints in a run's folder: all that training needs to go on bit for bit, in safetensors and JSON alone.

    RUN/checkpoints/00001000/
        config.json, model.safetensors      what `Diffusion.from_pretrained` opens: the first average's weights
        average-NAME.safetensors            the others in the same form; NAME "raw" are the weights that are trained
        optimizer.safetensors               NAME.exp_avg ... by the names of the network's parameters
        random.safetensors                  torch's generators, by process
        training.json                       step, numbers of the optimizer, sizes of the files, and the caller's extra
    RUN/snapshots/00001000-0.050.safetensors    averages that outlive their checkpoint (`keep_every`)

A checkpoint is written aside, flushed to the disk and renamed: whatever becomes of the process, the numbered folders
are whole. Nothing is unpickled. Tensors are stored whole and by name, so that a run goes on with another number of
processes and another sharding; every process must see the folder.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from diffkern import parallel, storage
from diffkern.diffusion import Diffusion
from diffkern.extras import need
from diffkern.records import parse, record, shown
from diffkern.train import _optimizer
from diffkern.train._optimizer import placed
from diffkern.train.ema import Averages

__all__ = ["Loaded", "load", "newest", "save", "steps"]

KEY, FORMAT = "diffkern_training", 1
TRAINING, OPTIMIZER, RANDOM = "training.json", "optimizer.safetensors", "random.safetensors"
RAW = "raw"

Group = tuple[str, dict[str, Tensor]]


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


@dataclasses.dataclass(frozen=True)
class _Training:
    """What training.json holds beside the number of its format."""

    step: int
    world: int
    torch: str
    averages: tuple[str, ...]
    averaged: int
    """The step of the averages' last update."""
    optimizer: dict[str, Any] | None
    files: dict[str, Any]
    extra: dict[str, Any]


def steps(folder: str | os.PathLike[str]) -> list[int]:
    """The steps of a run's checkpoints, from the oldest."""
    return [int(path.name) for path in storage.numbered(Path(folder) / "checkpoints")]


def newest(folder: str | os.PathLike[str]) -> Path | None:
    """The run's checkpoint of the highest step, None where there is none."""
    found = storage.numbered(Path(folder) / "checkpoints")
    return found[-1] if found else None


# --------------------------------------------------------------------------------------------------------------- save


def save(
    folder: str | os.PathLike[str],
    step: int,
    *,
    diffusion: Diffusion,
    averages: Averages | None = None,
    optimizer: Optimizer | None = None,
    extra: Mapping[str, Any] | None = None,
    keep: int | None = None,
    keep_every: int | None = None,
) -> Path:
    """Writes the checkpoint of a step into a run's folder, and returns its folder.

    To be called by every process of the job; the first one writes. ``extra`` is the caller's, anything that JSON holds
    (configuration, position in the data, gradient scaler). Afterwards the oldest are removed, so that the newest
    ``keep`` are left, all of them if None; of steps that are multiples of ``keep_every`` the power functions' averages
    stay in RUN/snapshots, for `diffkern.train.synthesis`.

    OSError on every process, with what is the newest checkpoint, for a full disk or a folder that cannot be written;
    FileExistsError where the step has a checkpoint: nothing is overwritten. ValueError for an ``extra`` that JSON does
    not hold, and for an optimizer with parameters that are not the network's.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep must be at least 1 or None, got {keep}")
    path = Path(folder) / "checkpoints" / f"{step:08d}"
    random = _random_state()
    described = _Training(
        step=step,
        world=parallel.world(),
        torch=torch.__version__,
        averages=() if averages is None else averages.names,
        averaged=0 if averages is None else averages.step,
        optimizer=None if optimizer is None else _optimizer.described(optimizer, _names(diffusion)),
        files={},
        extra=dict(extra or {}),
    )
    try:
        json.dumps(described.extra, allow_nan=False)
    except (TypeError, ValueError) as wrong:
        raise ValueError(f"extra must be what JSON holds, got {shown(described.extra)} ({wrong})") from None
    groups = _groups(diffusion, averages, optimizer, random)
    error: Exception | None = None
    if parallel.is_main():
        try:
            _write(path, described, diffusion, groups)
            _tidy(Path(folder), described, keep, keep_every)
        except Exception as caught:
            error = caught
    for _ in groups:  # gathered by all processes together, also where the first one has stopped writing
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


def _write(path: Path, described: _Training, diffusion: Diffusion, groups: Iterator[Group]) -> None:
    """The folder, whole or not at all. What killed writers have left makes room first."""
    save_file = need("safetensors.torch", "safetensors", "train").save_file
    for left in storage.unfinished_in(path.parent):
        storage.remove(left)
    with storage.whole_folder(path) as unfinished:
        for name, tensors in groups:
            if name.endswith(".safetensors"):
                with storage.filling(path):
                    save_file(tensors, str(unfinished / name))
            else:
                diffusion.save_pretrained(unfinished, weights=tensors, average=name)
        first = [*described.averages, RAW][0]
        storage.linked(unfinished / f"average-{first}.safetensors", unfinished / "model.safetensors")
        files = {file.name: file.stat().st_size for file in sorted(unfinished.iterdir())}
        data = {KEY: FORMAT, **dataclasses.asdict(dataclasses.replace(described, files=files))}
        (unfinished / TRAINING).write_text(json.dumps(data, indent=1, allow_nan=False) + "\n")


def _tidy(folder: Path, described: _Training, keep: int | None, keep_every: int | None) -> None:
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


def _groups(
    diffusion: Diffusion, averages: Averages | None, optimizer: Optimizer | None, random: dict[str, Tensor]
) -> Iterator[Group]:
    """What goes into one file each, by its name or an average's: whole tensors on the CPU of the first process."""
    names = _names(diffusion)
    network = parallel.bare(diffusion.model)
    yield RAW, _whole({name: p.detach() for name, p in network.named_parameters()})
    for average in () if averages is None else averages.names:
        assert averages is not None
        yield average, _whole({names[id(p)]: tensor for p, tensor in averages.pairs(average)})
    if optimizer is not None:
        yield OPTIMIZER, _whole(_optimizer.moments(optimizer, names))
    yield RANDOM, random


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gathered from the processes that share them (FSDP2), one at a time; kept by the first process."""
    found = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        if parallel.is_main():
            found[name] = full.cpu().contiguous()
    return found


def _names(diffusion: Diffusion) -> dict[int, str]:
    return {id(p): name for name, p in parallel.bare(diffusion.model).named_parameters()}


# ------------------------------------------------------------------------------------------------------------- random


def _random_state() -> dict[str, Tensor]:
    """The state of torch's generators, of every process, by its rank."""
    own = {"cpu": torch.get_rng_state().tolist()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        own["cuda"] = torch.cuda.get_rng_state().tolist()
    every = parallel.gathered(own)
    return {
        f"{kind}.{rank}": torch.tensor(state, dtype=torch.uint8)
        for rank, states in enumerate(every)
        for kind, state in states.items()
    }


# --------------------------------------------------------------------------------------------------------------- load


def load(
    path: str | os.PathLike[str],
    *,
    diffusion: Diffusion,
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
    found = _training(path)
    names = _names(diffusion)
    _same(parse((path / "config.json").read_bytes(), "JSON", str(path / "config.json")), diffusion.to_dict(), path)
    for key, value in (expect or {}).items():
        _same(found.extra.get(key), value, path, key)
    _same(found.averages, () if averages is None else averages.names, path, "averages")
    if optimizer is not None:
        _same(_optimizer.identity(found.optimizer), _optimizer.identity(_optimizer.described(optimizer, names)), path)

    state = parallel.bare(diffusion.model).state_dict(keep_vars=True)
    raw = {f"model.{name}": t.detach() for name, t in state.items() if isinstance(t, Tensor)}
    fills = {RAW: raw if diffusion.null is None else {**raw, "null": diffusion.null}}
    for average in () if averages is None else averages.names:
        assert averages is not None
        fills[average] = {f"model.{names[id(p)]}": tensor for p, tensor in averages.pairs(average)}
    with contextlib.ExitStack() as opened, torch.no_grad():
        files = {name: opened.enter_context(_opened(path / f"average-{name}.safetensors")) for name in fills}
        moments = opened.enter_context(_opened(path / OPTIMIZER)) if optimizer is not None else None
        random = opened.enter_context(_opened(path / RANDOM))
        for name, targets in fills.items():
            _check(files[name], targets, path / f"average-{name}.safetensors", whole=name == RAW)
        for name, targets in fills.items():
            kept = files[name].metadata() or {}
            for key, target in targets.items():
                placed(files[name].get_tensor(kept.get(key, key)), target)
        if optimizer is not None:
            _optimizer.restore(optimizer, found.optimizer or {}, moments, names)
        if averages is not None:
            averages.step = found.averaged
        again = found.world == parallel.world()
        if again:
            _restore_random(random)
    return Loaded(found.step, found.world, again, found.extra)


def _training(path: Path) -> _Training:
    """training.json, whose list of files is compared with the folder's."""
    place = path / TRAINING
    if not place.is_file():
        raise FileNotFoundError(f"there is no {TRAINING} in {path}, so that training cannot go on from it")
    data = parse(place.read_bytes(), "JSON", str(place))
    number = data.pop(KEY, None) if isinstance(data, dict) else data
    if type(number) is not int or number != FORMAT:
        raise ValueError(f"{place} must be of a checkpoint with {KEY} = {FORMAT}, got {shown(number)}")
    found = record(_Training, data, f"{place}: ")
    for name, size in found.files.items():
        file = path / str(name)
        got = file.stat().st_size if file.is_file() else None
        if got != size:
            raise ValueError(
                f"{file} must have {shown(size)} bytes, got {'no such file' if got is None else got}: the checkpoint "
                f"is damaged, and without the folder {path} training goes on from the one before"
            )
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    safetensors = need("safetensors", "safetensors", "train")
    try:
        file = safetensors.safe_open(str(path), framework="pt")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a safetensors file, got none ({error})") from error
    with file:
        yield file


def _check(file: Any, targets: Mapping[str, Tensor], path: Path, whole: bool) -> None:
    """Every target has a tensor of its shape, and a ``whole`` file no other."""
    kept = file.metadata() or {}
    stored = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    for name in sorted({*targets, *(stored if whole else ())}):
        got = stored.get(kept.get(name, name))
        want = list(targets[name].shape) if name in targets else None
        if got != want:
            raise ValueError(
                f"the tensors in {path} must be those of the network, got {got or 'nothing'} for {name}, which has "
                f"{want or 'no place'}"
            )


def _same(found: Any, wanted: Any, path: Path, name: str = "") -> None:
    """ValueError that names the first place where plain data differ."""
    if isinstance(found, Mapping) and isinstance(wanted, Mapping):
        for key in (*found, *(key for key in wanted if key not in found)):
            _same(found.get(key), wanted.get(key), path, f"{name}.{key}" if name else str(key))
    elif isinstance(found, list | tuple) and isinstance(wanted, list | tuple) and len(found) == len(wanted):
        for i, (here, there) in enumerate(zip(found, wanted, strict=True)):
            _same(here, there, path, f"{name}[{i}]")
    elif found != wanted:
        raise ValueError(f"{name} must be {shown(found)}, as in {path}, got {shown(wanted)}")


def _restore_random(file: Any) -> None:
    own = f".{parallel.rank()}"
    for key in file.keys():  # noqa: SIM118  (not a mapping)
        if key == f"cpu{own}":
            torch.set_rng_state(file.get_tensor(key))
        elif key == f"cuda{own}" and torch.cuda.is_available():
            torch.cuda.set_rng_state(file.get_tensor(key))
