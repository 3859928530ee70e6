"""How different two images look: distances between features of a network, for the loss of an autoencoder.

A perceptual distance is any function (x, y) of images [B, C, H, W] in [-1, 1] to [B], differentiable in y (Johnson et
al. 2016, arXiv 1603.08155; Zhang et al. 2018, arXiv 1801.03924). A network of one's own: `FeatureDistance`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkern import parallel
from diffkern.checks import unknown
from diffkern.data import Images
from diffkern.metrics import Classifier, train_classifier
from diffkern.nn.stored import needed

__all__ = ["PERCEPTUAL", "FeatureDistance", "Perceptual", "perceptual"]

Perceptual = Callable[[Tensor, Tensor], Tensor]

PERCEPTUAL = ("classifier", "lpips")
"""Names that ``TrainConfig.autoencoder["perceptual"]`` takes."""


class FeatureDistance:
    """The sum over the outputs of a network of mean (f(x) - f(y))^2, [B].

    ``features(images)`` gives a tensor [B, ...], or several; a module is frozen and evaluated, and moved to the images'
    device.
    """

    def __init__(self, features: Callable[[Tensor], Tensor | Iterable[Tensor]]) -> None:
        if isinstance(features, nn.Module):
            features.requires_grad_(False).eval()
        self.features = features

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Of images [B, C, H, W] each."""
        if isinstance(self.features, nn.Module):
            self.features.to(x.device)
        with torch.no_grad():
            wanted = _outputs(self.features(x))
        found = _outputs(self.features(y))
        parts = [
            (one.float() - other.float()).square().flatten(1).mean(1) for one, other in zip(wanted, found, strict=True)
        ]
        return torch.stack(parts).sum(0)


def _outputs(found: Tensor | Iterable[Tensor]) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [part for part in found if part is not None]


def perceptual(name: str | None, images: Images, folder: Path | None, device: torch.device) -> Perceptual | None:
    """The distance of a name in `PERCEPTUAL`; None: none.

    "classifier": two layers of `diffkern.metrics.train_classifier` of the data, whose labels it needs; trained once,
    and kept in the run's folder. "lpips": of the package of this name, with its weights on disk. ValueError in one
    sentence for what is missing.
    """
    if name is None:
        return None
    if name == "classifier":
        return FeatureDistance(_Seen(_classifier(images, folder, device).network))
    if name == "lpips":
        return _lpips(device)
    raise ValueError(unknown("TrainConfig.autoencoder.perceptual", name, PERCEPTUAL))


class _Seen(nn.Module):
    """The classifier's map in its middle, and its last features."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> list[Tensor]:
        found = self.network(images.float())
        return [found.spatial, found.pooled]


def _classifier(images: Images, folder: Path | None, device: torch.device) -> Classifier:
    if images.labels is None:
        raise ValueError("TrainConfig.autoencoder.perceptual 'classifier' needs data with labels, got none")
    if folder is None:
        return train_classifier(images, device=device)
    place = folder / f"classifier-{images.fingerprint[:12]}"
    if parallel.is_main() and not place.with_name(place.name + ".json").is_file():
        train_classifier(images, device=device).save(place)
    parallel.barrier()
    return Classifier.load(place, device)


def _lpips(device: torch.device) -> Perceptual:
    purpose = "TrainConfig.autoencoder.perceptual 'lpips'"
    library = needed("lpips", "lpips", purpose)
    published = needed("torchvision.models", "torchvision", purpose).VGG16_Weights.DEFAULT.url
    path = Path(torch.hub.get_dir()) / "checkpoints" / published.rpartition("/")[2]
    if not path.is_file():
        raise ValueError(f"{purpose} needs VGG's weights in {path}, got none there")
    network: Any = library.LPIPS(net="vgg", verbose=False).requires_grad_(False).eval().to(device)

    def distance(x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = network(*(_coloured(part) for part in (x, y)))
        return found.flatten()

    return distance


def _coloured(images: Tensor) -> Tensor:
    return images.float().expand(-1, 3, -1, -1) if images.shape[1] == 1 else images.float()
