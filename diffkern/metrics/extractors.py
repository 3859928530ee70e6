"""Published networks as extractors: Inception, torchvision's and timm's, their weights from a file on disk.

Nothing is ever downloaded, and nothing unpickled but tensors: where the file is not there, an error says which one it
is, where it is from, and where it goes.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern import checks
from diffkern.extras import MissingExtra, need
from diffkern.metrics.classifier import Classifier
from diffkern.metrics.features import Extractor, Features, quantised

__all__ = ["extractor", "inception_weights"]

_KINDS = ("inception", "torchvision:NAME", "timm:NAME", "classifier")
_SPATIAL = 7
"""Channels of Inception's 17 x 17 map in the spatial features: 2023 of them."""


def extractor(
    name: str, weights: str | os.PathLike[str] | None = None, device: torch.device | str = "cpu"
) -> Extractor:
    """The extractor of a name, with its ``weights`` from a file of tensors (.safetensors, or of torch.save).

    ``"inception"``           the InceptionV3 of published FIDs, as torch-fidelity has it: 2048 pooled features, 7
                              channels of mixed_6 as spatial ones, logits of 1008 classes; colour, or grey as colour
    ``"torchvision:NAME"``    a classifier of torchvision: what its last linear layer reads, and its logits
    ``"timm:NAME"``           the same of timm
    ``"classifier"``          `Classifier.load` of ``weights``

    Without ``weights`` the first two look where torch.hub keeps downloads. The ``name`` of the result ends in
    "@" and eight digits of the file's SHA-256.

    ValueError for another name, another file or another network's weights; FileNotFoundError, which says how to get
    the weights.
    """
    if not isinstance(name, str):
        raise ValueError(f"extractor must be one of {', '.join(_KINDS)}, got {type(name).__name__}")
    kind, _, model = name.partition(":")
    if kind == "classifier" and not model:
        if weights is None:
            raise ValueError("extractor 'classifier' must have weights=PATH of Classifier.save, got None")
        return Classifier.load(weights, device)
    if kind == "inception" and not model:
        return _Inception(inception_weights() if weights is None else Path(weights), device)
    if kind == "torchvision" and model:
        return _torchvision(model, weights, device)
    if kind == "timm" and model:
        return _timm(model, weights, device)
    raise ValueError(checks.unknown("extractor", name, _KINDS))


def inception_weights() -> Path:
    """Where the weights of "inception" are looked for: torch.hub's folder, as torch-fidelity itself keeps them."""
    return _hub(need("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity", "evaluate").URL_INCEPTION_V3)


class _Inception:
    def __init__(self, path: Path, device: torch.device | str) -> None:
        library = need("torch_fidelity.feature_extractor_inceptionv3", "torch-fidelity", "evaluate")
        state, digest = _read("inception", path, library.URL_INCEPTION_V3)
        own = io.BytesIO()  # the library unpickles what it is given: bytes made here, of tensors read without that
        torch.save(state, own)
        own.seek(0)
        layers = ["2048", "logits_unbiased"]
        with torch.random.fork_rng(devices=[]), _fitting("inception", path):
            network = library.FeatureExtractorInceptionV3("inception", layers, feature_extractor_weights_path=own)
        self.name, self.dims, self.device = f"inception@{digest}", 2048, torch.device(device)
        self._network = network.to(self.device)
        self._map = torch.empty(0)
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self._map = output[:, :_SPATIAL].flatten(1)

    def __call__(self, images: Tensor) -> Features:
        with torch.no_grad():
            pooled, logits = self._network(_colour(quantised(images)).to(self.device))
        spatial, self._map = self._map, torch.empty(0)
        return Features(pooled, spatial, logits)


class _Classifying:
    """A network whose last linear layer gives the logits: what that layer reads are the features."""

    def __init__(self, name: str, network: nn.Module, seen: dict[str, Any], device: torch.device | str) -> None:
        heads = [module for module in network.modules() if isinstance(module, nn.Linear)]
        if not heads:
            raise ValueError(f"extractor {name!r} must end in a linear layer, got a network without any")
        self.name, self.dims, self.device = name, heads[-1].in_features, torch.device(device)
        self._network = network.to(self.device).requires_grad_(False).eval()
        self._size, self._mode = seen["size"], seen["mode"]
        self._mean, self._std = (torch.tensor(seen[k], device=self.device).view(-1, 1, 1) for k in ("mean", "std"))
        self._pooled = torch.empty(0)
        heads[-1].register_forward_pre_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        self._pooled = inputs[0].flatten(1)

    def __call__(self, images: Tensor) -> Features:
        x = _colour(quantised(images)).to(self.device).float() / 255.0
        x = F.interpolate(x, self._size, mode=self._mode, antialias=True, align_corners=False).clamp(0.0, 1.0)
        with torch.no_grad():
            logits = self._network((x - self._mean) / self._std)
        pooled, self._pooled = self._pooled, torch.empty(0)
        return Features(pooled, None, logits)


def _torchvision(model: str, weights: str | os.PathLike[str] | None, device: torch.device | str) -> Extractor:
    library = need("torchvision.models", "torchvision", "evaluate")
    known = library.list_models(module=library)
    if model not in known:
        raise ValueError(checks.unknown("extractor 'torchvision:NAME': NAME", model, known))
    published = library.get_model_weights(model).DEFAULT
    path = _hub(published.url) if weights is None else Path(weights)
    state, digest = _read(f"torchvision:{model}", path, published.url)
    view = published.transforms()
    with torch.random.fork_rng(devices=[]), _fitting(f"torchvision:{model}", path):
        network = library.get_model(model, weights=None)
        network.load_state_dict(state)
    size = (view.crop_size[0], view.crop_size[0])
    seen = {"size": size, "mode": view.interpolation.value, "mean": view.mean, "std": view.std}
    return _Classifying(f"torchvision:{model}@{digest}", network, seen, device)


def _timm(model: str, weights: str | os.PathLike[str] | None, device: torch.device | str) -> Extractor:
    try:  # of no extra: who names one of its networks has it
        library, data = importlib.import_module("timm"), importlib.import_module("timm.data")
    except ImportError as error:
        raise MissingExtra(
            f"extractor 'timm:{model}' needs timm, which cannot be imported ({error}): pip install timm"
        ) from error
    if weights is None:
        raise FileNotFoundError(
            f"extractor 'timm:{model}' must have weights=PATH, got None: model.safetensors of "
            f"https://huggingface.co/timm/{model} for example"
        )
    path = Path(weights)
    state, digest = _read(f"timm:{model}", path, f"https://huggingface.co/timm/{model}")
    with torch.random.fork_rng(devices=[]), _fitting(f"timm:{model}", path):
        network = library.create_model(model, pretrained=False)
        network.load_state_dict(state)
    view = data.resolve_model_data_config(network)
    mode = view["interpolation"] if view["interpolation"] in ("bilinear", "bicubic") else "bilinear"
    seen = {"size": view["input_size"][1:], "mode": mode, "mean": view["mean"], "std": view["std"]}
    return _Classifying(f"timm:{model}@{digest}", network, seen, device)


def _hub(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]


def _read(name: str, path: Path, url: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of the file, and eight digits of its SHA-256."""
    if not path.is_file():
        raise FileNotFoundError(
            f"extractor {name!r} needs its weights in the file {path}, which is not there; they are never downloaded "
            f"unasked: curl -L --create-dirs -o {path} {url}"
        )
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    try:
        if path.suffix == ".safetensors":
            state = need("safetensors.torch", "safetensors", "evaluate").load_file(str(path))
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of either library, for whatever the file is
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"weights must be a file of tensors, got {path} ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(part, Tensor) for part in state.values()):
        raise ValueError(f"weights must be a file of tensors by name, got {path} with {type(state).__name__}")
    return state, digest.hexdigest()[:8]


@contextlib.contextmanager
def _fitting(name: str, path: Path) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise ValueError(
            f"weights must be those of {name!r}, got {path} ({' '.join(str(error).split())[:200]})"
        ) from error


def _colour(images: Tensor) -> Tensor:
    """Three channels of one or three."""
    if images.shape[1] not in (1, 3):
        raise ValueError(f"images must have 1 or 3 channels for a published network, got {images.shape[1]}")
    return images.expand(-1, 3, -1, -1)
