"""A classifier of the data themselves, trained in seconds on two cores: features where no published network fits or
none is on disk.

Its distances compare with each other on one data set, not with published FIDs.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern import records, storage
from diffkern.extras import need
from diffkern.metrics.features import Features, quantised
from diffkern.pixels import from_bytes
from diffkern.progress import progress_bar

__all__ = ["Classifier", "Labelled", "train_classifier"]

_FORMAT = 1
_SPATIAL = 7
"""Channels of the middle map in the spatial features, as in those of Inception."""
_BATCH = 64
_STEPS = 700
_SOME = 10_000
"""Images that the scale of the features is measured on, at most."""


class Labelled(Protocol):
    """What is asked of the images that a classifier is trained on: `diffkern.data.Images` has it."""

    @property
    def labels(self) -> Tensor | None: ...
    def __len__(self) -> int: ...
    def batch(self, indices: Tensor, /) -> tuple[Tensor, Tensor | None]: ...


@dataclasses.dataclass(frozen=True)
class _Config:
    """What is beside the weights in a file."""

    format: int
    name: str
    shape: tuple[int, ...]
    classes: int
    features: int
    accuracy: float


class _Network(nn.Module):
    """Images [B, C, H, W] to Features; halved until a side is at most 8, so that its cost hardly grows with them."""

    def __init__(self, shape: tuple[int, ...], classes: int, features: int) -> None:
        super().__init__()
        channels, height, width = shape
        step = 1 if max(height, width) <= 14 else 2
        wide = 32 // step
        self.first = nn.Sequential(
            *_layer(channels, wide, 2 * step + 1, step), *_layer(wide, 32), nn.MaxPool2d(2, ceil_mode=True)
        )
        side = [math.ceil(math.ceil(n / step) / 2) for n in (height, width)]
        body = _layer(32, 64)
        while max(side) > 8:
            body += [nn.MaxPool2d(2, ceil_mode=True), *_layer(64, 64)]
            side = [math.ceil(n / 2) for n in side]
        self.body = nn.Sequential(*body, nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * math.prod(side), features))
        self.head = nn.Linear(features, classes)
        self.centre = nn.Buffer(torch.zeros(features))
        self.scale = nn.Buffer(torch.ones(()))

    def forward(self, images: Tensor) -> Features:
        middle = self.first(images)
        last = self.body(middle)
        pooled = (last - self.centre) * self.scale
        return Features(pooled, middle[:, :_SPATIAL].flatten(1), self.head(F.relu(last)))

    def standardise(self, pooled: Tensor) -> None:
        """From now on the features, of which ``pooled`` [N, D] are some, have mean 0 and a mean variance of 1."""
        self.centre.copy_(pooled.mean(0))
        self.scale.copy_(pooled.var(0).mean().rsqrt())


def _layer(inputs: int, outputs: int, kernel: int = 3, step: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, stride=step, bias=False)
    return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]


class Classifier:
    """An `Extractor` trained by `train_classifier`; logits are those of the classes of the data.

    Pooled features have the mean 0 and the mean variance 1 over its training images, so that a FID of D is as far as
    these are spread out.

    ``accuracy``: of the images that it was not trained on.
    """

    def __init__(self, network: nn.Module, config: _Config, device: torch.device | str = "cpu") -> None:
        self._config, self.device = config, torch.device(device)
        self.network = network.to(self.device).to(memory_format=torch.channels_last).requires_grad_(False).eval()
        self.name, self.dims, self.accuracy = config.name, config.features, config.accuracy

    def __call__(self, images: Tensor) -> Features:
        if tuple(images.shape[1:]) != self._config.shape:
            raise ValueError(
                f"images must have shape [B, {', '.join(map(str, self._config.shape))}], as those that the "
                f"classifier was trained on, got {list(images.shape)}"
            )
        with torch.no_grad():
            found: Features = self.network(_floats(images).to(self.device))
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """``path``.safetensors with the weights and ``path``.json with what they are, each whole or not at all."""
        safetensors = need("safetensors.torch", "safetensors", "evaluate")
        weights, described = _places(path)
        weights.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: part.cpu().contiguous() for name, part in self.network.state_dict().items()}
        with storage.whole(described) as text:  # takes its place last
            text.write_text(json.dumps(dataclasses.asdict(self._config), indent=1) + "\n")
            storage.write(weights, safetensors.save(tensors))

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> Classifier:
        """What `save` wrote; FileNotFoundError, or ValueError with one sentence for other files."""
        safetensors = need("safetensors.torch", "safetensors", "evaluate")
        weights, described = _places(path)
        for place in (weights, described):
            if not place.is_file():
                raise FileNotFoundError(f"there is no classifier {place}: Classifier.save writes one")
        config = records.record(_Config, records.parse(described.read_bytes(), "JSON", str(described)), "classifier.")
        if config.format != _FORMAT or len(config.shape) != 3 or not all(1 <= n <= 4096 for n in config.shape):
            raise ValueError(f"{described} must be of format {_FORMAT} with a shape [C, H, W], got {config}")
        try:
            with torch.device("meta"):
                network = _Network(config.shape, config.classes, config.features)
            network.load_state_dict(safetensors.load(weights.read_bytes()), assign=True)
        except Exception as error:
            raise ValueError(
                f"{weights} must hold the weights that {described} describes, got {' '.join(str(error).split())[:300]}"
            ) from error
        return cls(network, config, device)


def train_classifier(
    images: Labelled,
    *,
    steps: int | None = None,
    features: int = 64,
    held_out: float = 0.1,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool | str = False,
) -> Classifier:
    """A small convolutional network trained on labelled images but a share ``held_out``, which tells its accuracy.

    About ten seconds on two cores for images of 8 x 8 to 32 x 32: ``steps`` of 64 images, 30 epochs but at most 700 if
    None. Turned, scaled and shifted a little, with a little noise, smoothed labels. A function of the images and the
    ``seed`` alone, on one machine with one number of threads. ``features``: D.

    ValueError where there are no labels, captions, or fewer than two classes or 20 images.
    """
    if images.labels is None:
        raise ValueError("images must have labels for a classifier, got none: give the extractor another network")
    labels = images.labels.cpu()
    if labels.ndim != 1:
        raise ValueError(f"images must have one class each for a classifier, got captions, labels {list(labels.shape)}")
    classes = int(labels.max()) + 1 if len(labels) else 0
    if len(images) < 20 or len(labels.unique()) < 2:
        raise ValueError(f"images must be at least 20, of at least 2 classes, got {len(images)} of {classes}")
    if not 0.0 < held_out < 1.0:
        raise ValueError(f"held_out must lie in (0, 1), got {held_out}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        order = torch.randperm(len(images))
        aside = max(1, round(held_out * len(images)))
        kept, chosen = order[:aside], order[aside:]
        steps = min(_STEPS, 30 * math.ceil(len(chosen) / _BATCH)) if steps is None else steps
        shape = tuple(images.batch(order[:1])[0].shape[1:])
        network = _Network(shape, classes, features).to(device).to(memory_format=torch.channels_last)
        _fit(network, images, labels, chosen, steps, progress)
    network.eval()
    logits = _seen(network, images, kept)[1]
    right = int((logits.argmax(1) == labels[kept]).sum())
    network.standardise(_seen(network, images, chosen[:_SOME])[0].to(device))
    name = f"classifier of {classes} classes@{_digest(network)}"
    return Classifier(network, _Config(_FORMAT, name, shape, classes, features, right / aside), device)


def _fit(
    network: nn.Module, images: Labelled, labels: Tensor, chosen: Tensor, steps: int, progress: bool | str
) -> None:
    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    bar = progress_bar(progress, "classifier", steps)
    batches: list[Tensor] = []
    network.train()
    for _ in range(steps):
        batches = batches or list(chosen[torch.randperm(len(chosen))].split(_BATCH))
        indices = batches.pop()
        x = _moved(_floats(images.batch(indices)[0]))
        x = (x + 0.05 * torch.randn_like(x)).to(device)
        loss = F.cross_entropy(network(x).logits, labels[indices].to(device), label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if bar is not None:
            bar.update()
    if bar is not None:
        bar.close()


def _seen(network: nn.Module, images: Labelled, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features and logits of some of the images."""
    device = next(network.parameters()).device
    found = []
    for part in indices.split(256):
        with torch.no_grad():
            pooled, _, logits = network(_floats(images.batch(part)[0]).to(device))
        found.append((pooled.cpu(), logits.cpu()))
    pooled, logits = (torch.cat(parts) for parts in zip(*found, strict=True))
    return pooled, logits


def _moved(images: Tensor) -> Tensor:
    """Each image turned by up to 0.2 rad, scaled by up to exp(0.1) and shifted by up to a fourteenth of its side, at
    least a pixel; its border repeated."""
    side = min(images.shape[-2:])
    turn, scale, right, down = torch.rand(4, len(images)) * 2.0 - 1.0
    turn, scale = 0.2 * turn, torch.exp(0.1 * scale)
    shift = 2.0 * max(1, side // 14) / side  # in units of half a side
    along, across = scale * turn.cos(), scale * turn.sin()
    rows = [torch.stack([along, -across, shift * right], 1), torch.stack([across, along, shift * down], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _floats(images: Tensor) -> Tensor:
    return from_bytes(quantised(images))


def _digest(network: nn.Module) -> str:
    import hashlib

    found = hashlib.sha256()
    for part in network.state_dict().values():
        found.update(part.cpu().contiguous().numpy().tobytes())
    return found.hexdigest()[:8]


def _places(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    base = Path(path)
    return base.with_name(f"{base.name}.safetensors"), base.with_name(f"{base.name}.json")
