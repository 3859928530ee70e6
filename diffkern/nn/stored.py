"""Models in a folder: config.json says what they are, model.safetensors holds their weights; networks as plain data."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffkern import storage
from diffkern.parallel import bare, class_of
from diffkern.records import kind_of, of_kind, parse, shown

__all__ = ["Contents", "contents", "files", "fill", "network_data", "network_from", "read_config", "save"]

CONFIG, WEIGHTS, CHECKPOINTS = "config.json", "model.safetensors", "checkpoints"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Contents(NamedTuple):
    """Of a file of weights, before any is read."""

    shapes: dict[str, list[int]]
    """By name."""
    dtypes: set[str]
    """In the file's words."""

    def under(self, prefix: str) -> Contents:
        """Those whose names begin with it: of one of several networks in a file."""
        return Contents({name: shape for name, shape in self.shapes.items() if name.startswith(prefix)}, self.dtypes)

    @property
    def dtype(self) -> torch.dtype | None:
        """The one floating-point dtype of the weights; None where they have several or none."""
        found = self.dtypes & FLOATS.keys()
        return FLOATS[next(iter(found))] if len(found) == 1 else None


# --------------------------------------------------------------------------------------------------------- the folder


def save(
    module: nn.Module,
    config: Mapping[str, Any],
    folder: str | os.PathLike[str],
    weights: Mapping[str, Tensor] | None = None,
    average: str | None = None,
) -> None:
    """config.json, and the module's tensors by their names in it, each file whole or not at all.

    ``weights`` (by names of the module's) are written in the place of its own, into average-NAME.safetensors where an
    ``average`` is named. ValueError for weights of other names or shapes.
    """
    needed("safetensors.torch", "safetensors", "saving")
    folder = Path(folder)
    text = json.dumps(config, indent=1, allow_nan=False) + "\n"
    own = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
    for name, tensor in (weights or {}).items():
        if own.get(name) != list(tensor.shape):
            got = f"{list(tensor.shape)} for {name.removeprefix('model.')}"
            raise ValueError(f"weights must have names and shapes of the network's, got {got}")
    folder.mkdir(parents=True, exist_ok=True)
    with storage.whole(folder / CONFIG) as config_file, storage.whole(folder / _weights(average)) as file:
        torch.func.functional_call(_Writer(module), {f"module.{n}": t for n, t in (weights or {}).items()}, (file,))
        config_file.write_text(text)


class _Writer(nn.Module):
    """Writes the tensors of a module, with those that `torch.func.functional_call` puts in the place of others."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, file: Path) -> None:
        with storage.filling(file):
            importlib.import_module("safetensors.torch").save_model(self.module, str(file), metadata={"format": "pt"})


def files(path: str | os.PathLike[str], average: str | None, hub: Mapping[str, Any], writer: str) -> tuple[Path, Path]:
    """config.json and the weights: in a folder, in the newest checkpoint of a run's, or fetched from the hub.

    ``writer``: who writes them, for the error.
    """
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
                raise FileNotFoundError(f"there is no {file} in {folder}: {writer}.save_pretrained writes it")
        return folder / CONFIG, folder / name
    parts = str(path).split("/")
    if len(parts) != 2 or not all(parts) or folder.is_absolute() or parts[0].startswith("."):
        raise FileNotFoundError(f"there is no folder {path}, and it is no repository 'owner/name' of the hub")
    fetch = needed("huggingface_hub", "huggingface_hub", f"loading {path}, which is no folder here, from the hub")
    config, weights = (Path(fetch.hf_hub_download(str(path), file, **hub)) for file in (CONFIG, name))
    return config, weights


def _weights(average: str | None) -> str:
    return WEIGHTS if average is None else f"average-{average}.safetensors"


def read_config(path: Path, key: str, number: int, what: str) -> dict[str, Any]:
    """The JSON object in the file without its entry ``key``, the number of the format; ValueError for another."""
    data = parse(path.read_bytes(), "JSON", str(path))
    found = data.pop(key, None) if isinstance(data, dict) else data
    if type(found) is not int or found != number:
        raise ValueError(f"{path} must be the configuration of {what} with {key} = {number}, got {shown(found)}")
    assert isinstance(data, dict)
    return data


def contents(path: Path) -> Contents:
    """Names, shapes and dtypes in the file; ValueError for one that is no safetensors file."""
    safetensors = needed("safetensors", "safetensors", "loading")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            shapes = {name: list(entry.get_shape()) for name, entry in entries.items()}
            return Contents(shapes, {entry.get_dtype() for entry in entries.values()})
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file, got none ({error})") from error


def fill(module: nn.Module, path: Path) -> None:
    """Reads the file's tensors into the module; ValueError where names or shapes are others."""
    try:
        importlib.import_module("safetensors.torch").load_model(module, str(path))
    except RuntimeError as error:
        raise ValueError(f"{path} must fit the network, got {' '.join(str(error).split())[:300]}") from error


def needed(module: str, package: str, purpose: str) -> Any:
    """The module; ImportError in one sentence where it cannot be imported."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {package}, which cannot be imported ({error}): pip install {package}"
        ) from None


# --------------------------------------------------------------------------------------------- networks as plain data


def network_data(network: nn.Module) -> dict[str, Any]:
    """The network's class and configuration, or of one that is none of `diffkern.nn` which class it is."""
    known = _networks()
    network = bare(network)
    kind = class_of(network)
    name = kind.__name__
    if name in known and kind is known[name][0]:
        config = network.config
        stored = kind_of(config, {type(config).__name__: known[name][1]}, "network.config", "pass it as model=")
        return {"name": name, "config": stored}
    return {"given": f"{kind.__module__}.{kind.__qualname__}"}


def network_from(
    data: Any,
    stored: Contents,
    path: str,
    within: Callable[[nn.Module], nn.Module],
    name: str = "network",
) -> nn.Module:
    """The network of `network_data`, held against the tensors of the file before anything large is made.

    ``within`` is the module around it whose tensors the file has; of a file with several networks those of it alone.
    ``name`` is that of the entry, for errors: ValueError for data of no network, and where the tensors are others.
    """
    if isinstance(data, dict) and "given" in data:
        raise ValueError(
            f"model must be given, as {path} was saved with the network {data['given']!r:.200}, which is none of "
            f"diffkern.nn: from_pretrained(path, model=network)"
        )
    known, shapes = _networks(), stored.shapes
    kind = data.get("name") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in known:
        raise ValueError(f"{name}.name must be one of {', '.join(known)}, got {shown(kind)}")
    network_class, config_class = known[kind]
    config = of_kind(data.get("config"), {config_class.__name__: config_class}, f"{name}.config")
    for field, value in _fields(config):
        size = len(value) if isinstance(value, tuple) else value if field in ("blocks", "depth", "layers") else 0
        if size > len(shapes):
            raise ValueError(
                f"{name}.config.{field} must fit the {len(shapes)} tensors of the file, got {shown(value)}"
            )
    try:
        with torch.device("meta"):
            planned = {key: list(t.shape) for key, t in within(network_class(config)).state_dict().items()}
    except (RuntimeError, TypeError, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{name}.config in {path} must be that of a {kind}, got one that fails: {reason[:200]}"
        ) from None
    for key in sorted({*planned, *shapes}):
        if planned.get(key) != shapes.get(key):
            raise ValueError(
                f"the weights in {path} must be those of its {name}, got {shapes.get(key, 'nothing')} for {key}, "
                f"which has {planned.get(key, 'no place')}"
            )
    with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten: torch's generator stays as it is
        return network_class(config)


def _networks() -> dict[str, tuple[type[nn.Module], type]]:
    from diffkern.nn.networks import NETWORKS  # some of which are stored by this module

    return NETWORKS


def _fields(config: Any) -> Iterator[tuple[str, Any]]:
    """Of a configuration, and of that of a network inside."""
    yield from vars(config).items()
    if getattr(config, "inner", None) is not None:
        yield from _fields(config.inner)
