"""A `Diffusion` in a folder: config.json says what it is, model.safetensors holds the weights."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffkern import storage
from diffkern.names import Prediction
from diffkern.objectives.time_sampling import TimeSampler, get_time_sampler
from diffkern.objectives.weightings import Weighting, get_weighting
from diffkern.parallel import bare, class_of
from diffkern.records import kind_of, of_kind, parse, record, shown
from diffkern.schedules.base import Schedule
from diffkern.schedules.predictions import with_predictions

if TYPE_CHECKING:
    from diffkern.diffusion import Diffusion

CONFIG, WEIGHTS, CHECKPOINTS = "config.json", "model.safetensors", "checkpoints"
KEY, FORMAT = "diffkern_diffusion", 1
PLACES = 9


@dataclasses.dataclass(frozen=True)
class _Null:
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class _Config:
    """What config.json holds beside the number of its format; parts of several kinds are read where they are used."""

    prediction: Prediction
    schedule: dict[str, Any]
    weight: dict[str, Any] | None
    target: Prediction | None
    times: dict[str, Any]
    drop: float
    null: _Null | None
    shape: tuple[int, ...] | None
    time_scale: float
    learned_variance: bool
    network: dict[str, Any]


class _Stored(nn.Module):
    """The tensors of a file, by their names there: ``model.`` and the network's own, and ``null``."""

    def __init__(self, model: nn.Module, null: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("null", null)

    def forward(self, file: Path) -> None:
        """Writes them, with those that `torch.func.functional_call` puts in the place of others."""
        with storage.filling(file):
            importlib.import_module("safetensors.torch").save_model(self, str(file), metadata={"format": "pt"})


def described(diffusion: Diffusion) -> dict[str, Any]:
    """See `Diffusion.to_dict`."""
    null = diffusion.null
    config = _Config(
        prediction=diffusion.prediction,
        schedule=_schedule_to(diffusion.schedule),
        weight=None if diffusion.weight is None else _named(diffusion.weight),
        target=diffusion.target,
        times=_named(diffusion.times),
        drop=diffusion.drop,
        null=None if null is None else _Null(tuple(null.shape), str(null.dtype).removeprefix("torch.")),
        shape=diffusion.shape,
        time_scale=diffusion.time_scale,
        learned_variance=diffusion.learned_variance,
        network=_network_to(bare(diffusion.model)),
    )
    return {KEY: FORMAT, **dataclasses.asdict(config)}


def save(
    diffusion: Diffusion, folder: str | os.PathLike[str], weights: Mapping[str, Tensor], average: str | None
) -> None:
    """See `Diffusion.save_pretrained`."""
    _needed("safetensors.torch", "safetensors", "saving")
    folder = Path(folder)
    text = json.dumps(described(diffusion), indent=1, allow_nan=False) + "\n"
    stored = _Stored(bare(diffusion.model), diffusion.null)
    given = {f"model.{name}": tensor for name, tensor in weights.items()}
    own = {name: list(tensor.shape) for name, tensor in stored.state_dict().items()}
    for name, tensor in given.items():
        if own.get(name) != list(tensor.shape):
            got = f"{list(tensor.shape)} for {name.removeprefix('model.')}"
            raise ValueError(f"weights must have names and shapes of the network's, got {got}")
    folder.mkdir(parents=True, exist_ok=True)
    with storage.whole(folder / CONFIG) as config, storage.whole(folder / _weights(average)) as file:
        torch.func.functional_call(stored, given, (file,))
        config.write_text(text)


def load(
    cls: type[Diffusion],
    path: str | os.PathLike[str],
    model: nn.Module | None,
    *,
    schedule: Schedule | None,
    weight: Any,
    times: Any,
    average: str | None,
    hub: dict[str, Any],
) -> Diffusion:
    """See `Diffusion.from_pretrained`."""
    safetensors = _needed("safetensors", "safetensors", "loading")
    config_path, weights_path = _found(path, average, hub)
    config = _config(config_path)
    try:
        with safetensors.safe_open(str(weights_path), framework="pt") as file:
            entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            shapes = {name: list(entry.get_shape()) for name, entry in entries.items()}
            dtypes = {entry.get_dtype() for entry in entries.values()}
    except safetensors.SafetensorError as error:
        raise ValueError(f"{weights_path} must be a safetensors file, got none ({error})") from error
    null = _place(config.null)
    ours = model is None
    if model is None:
        model = _network_from(config.network, shapes, null, str(path))
    found = cls(
        model,
        _schedule_from(config.schedule, schedule),
        config.prediction,
        weight=_given("weight", config.weight, weight, Weighting.from_dict, get_weighting),
        target=config.target,
        times=_given("times", config.times, times, TimeSampler.from_dict, get_time_sampler),
        drop=config.drop,
        null=null,
        shape=config.shape,
        time_scale=config.time_scale,
        learned_variance=config.learned_variance,
    )
    stored = _Stored(bare(model), found.null)
    if ours and len(dtypes & _FLOATS.keys()) == 1:
        model.to(_FLOATS[next(iter(dtypes & _FLOATS.keys()))])
    try:
        importlib.import_module("safetensors.torch").load_model(stored, str(weights_path))
    except RuntimeError as error:
        raise ValueError(f"{weights_path} must fit the network, got {' '.join(str(error).split())[:300]}") from error
    return found


_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


# ---------------------------------------------------------------------------------------------------------- the parts


def _named(value: Any) -> dict[str, Any]:
    """What the value is, or that it is made of functions or has a state, which have to be given again."""
    try:
        return value.to_dict()
    except ValueError:
        return {"given": type(value).__name__}


def _schedule_to(schedule: Schedule) -> dict[str, Any]:
    """The schedule; of one that is made of functions its values at some times, by which it is known again."""
    try:
        return schedule.to_dict()
    except ValueError:
        return {"given": schedule.name, "values": _values(schedule)}


def _values(schedule: Schedule) -> list[list[float]]:
    low, high = schedule.time_range
    t = torch.linspace(low, high, PLACES, dtype=torch.float64)
    return torch.stack([schedule.alpha(t), schedule.sigma(t)]).tolist()


def _schedule_from(data: Any, given: Schedule | None) -> Schedule:
    if not isinstance(data, dict) or "given" not in data:
        stored = Schedule.from_dict(data)
        if given is not None and given != stored:
            raise ValueError(f"schedule must be the one that the network was trained with, {stored!r}, got {given!r}")
        return stored
    if given is None:
        raise ValueError(
            f"schedule must be given, as {data['given']!r} is made of functions, which the file does not hold: "
            "from_pretrained(path, schedule=...)"
        )
    values = torch.tensor(data.get("values"), dtype=torch.float64)
    if values.shape != (2, PLACES) or not torch.allclose(torch.tensor(_values(given)).double(), values, 1e-6, 1e-9):
        raise ValueError(
            f"schedule must be the one that the network was trained with, {data['given']!r}, got {given.name!r} with "
            "other values"
        )
    return given


def _given(name: str, data: Any, given: Any, from_dict: Any, get: Any) -> Any:
    """What the caller gives, else what the file says."""
    if given is not None:
        return get(given)
    if isinstance(data, dict) and "given" in data:
        raise ValueError(
            f"{name} must be given, as the file only knows that it was {data['given']}: "
            f"from_pretrained(path, {name}=...)"
        )
    return None if data is None else from_dict(data)


def _networks() -> dict[str, tuple[type[nn.Module], type]]:
    from diffkern import nn as networks  # only where a network is stored or built

    return networks.NETWORKS


def _network_to(network: nn.Module) -> dict[str, Any]:
    known, kind = _networks(), class_of(network)
    name = kind.__name__
    if name in known and kind is known[name][0]:
        config = network.config
        stored = kind_of(config, {type(config).__name__: known[name][1]}, "network.config", "pass it as model=")
        return {"name": name, "config": stored}
    return {"given": f"{kind.__module__}.{kind.__qualname__}"}


def _network_from(data: Any, shapes: dict[str, list[int]], null: Tensor | None, path: str) -> nn.Module:
    """The network that the file describes, held against the tensors of the file before anything large is made."""
    if isinstance(data, dict) and "given" in data:
        raise ValueError(
            f"model must be given, as {path} was saved with the network {data['given']!r:.200}, which is none of "
            f"diffkern.nn: from_pretrained(path, model=network)"
        )
    known = _networks()
    name = data.get("name") if isinstance(data, dict) else None
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"network.name must be one of {', '.join(known)}, got {shown(name)}")
    network_class, config_class = known[name]
    config = of_kind(data.get("config"), {config_class.__name__: config_class}, "network.config")
    for field, value in _fields(config):
        size = len(value) if isinstance(value, tuple) else value if field in ("blocks", "depth", "layers") else 0
        if size > len(shapes):
            raise ValueError(
                f"network.config.{field} must fit the {len(shapes)} tensors of the file, got {shown(value)}"
            )
    try:
        with torch.device("meta"):
            planned = {key: list(t.shape) for key, t in _Stored(network_class(config), null).state_dict().items()}
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"network.config in {path} must be that of a {name}, got one that fails: {reason[:200]}"
        ) from None
    for key in sorted({*planned, *shapes}):
        if planned.get(key) != shapes.get(key):
            raise ValueError(
                f"the weights in {path} must be those of its network, got {shapes.get(key, 'nothing')} for {key}, "
                f"which has {planned.get(key, 'no place')}"
            )
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: torch's generator stays as it is
        return network_class(config)


def _fields(config: Any) -> Iterator[tuple[str, Any]]:
    """Of a configuration, and of that of a network inside."""
    yield from vars(config).items()
    if getattr(config, "inner", None) is not None:
        yield from _fields(config.inner)


def _place(null: _Null | None) -> Tensor | None:
    """A place for the condition that means none."""
    if null is None:
        return None
    kind = getattr(torch, null.dtype, None)
    ok = all(0 <= n < 2**24 for n in null.shape) and isinstance(kind, torch.dtype)
    if not ok or math.prod(null.shape) > 2**24:
        raise ValueError(f"null must have a shape and a dtype, got {shown(null.shape)} and {shown(null.dtype)}")
    return torch.zeros(null.shape, dtype=kind)


def _config(path: Path) -> _Config:
    data = parse(path.read_bytes(), "JSON", str(path))
    found = data.pop(KEY, None) if isinstance(data, dict) else data
    if type(found) is not int or found != FORMAT:
        got = shown(found)
        raise ValueError(f"{path} must be the configuration of a Diffusion with {KEY} = {FORMAT}, got {got}")
    config = record(_Config, with_predictions(data, "prediction", "target"), f"{path}: ")
    if not all(0 <= n < 2**24 for n in config.shape or ()):
        raise ValueError(f"{path}: shape must be a list of sizes, got {shown(config.shape)}")
    return config


def _weights(average: str | None) -> str:
    return WEIGHTS if average is None else f"average-{average}.safetensors"


def _found(path: str | os.PathLike[str], average: str | None, hub: dict[str, Any]) -> tuple[Path, Path]:
    """The two files: in a folder, in the newest checkpoint of a run's, or fetched from the hub."""
    folder, name = Path(path), _weights(average)
    if folder.is_dir():
        if hub:
            raise ValueError(f"{', '.join(hub)} must go with a repository of the hub, got the folder {folder}")
        checkpoints = storage.numbered(folder / CHECKPOINTS)
        if checkpoints and not (folder / CONFIG).is_file():
            folder = checkpoints[-1]
        there = [file.name[8:-12] for file in sorted(folder.glob("average-*.safetensors"))]
        if average is not None and not (folder / name).is_file():
            known = ", ".join(there) or "none"
            raise ValueError(f"average must be one of those in {folder} ({known}), got {average!r}")
        for file in (CONFIG, name):
            if not (folder / file).is_file():
                raise FileNotFoundError(f"there is no {file} in {folder}: Diffusion.save_pretrained writes it")
        return folder / CONFIG, folder / name
    parts = str(path).split("/")
    if len(parts) != 2 or not all(parts) or folder.is_absolute() or parts[0].startswith("."):
        raise FileNotFoundError(f"there is no folder {path}, and it is no repository 'owner/name' of the hub")
    fetch = _needed("huggingface_hub", "huggingface_hub", f"loading {path}, which is no folder here, from the hub")
    config, weights = (Path(fetch.hf_hub_download(str(path), file, **hub)) for file in (CONFIG, name))
    return config, weights


def _needed(module: str, package: str, purpose: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {package}, which cannot be imported ({error}): pip install {package}"
        ) from None
