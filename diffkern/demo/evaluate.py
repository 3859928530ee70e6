"""How good the generated digits are, by a classifier of real ones: agreement with the class, and Frechet distance.

The classifier is a small convolutional network trained on the real digits in some seconds; its last hidden layer
gives the features. The Frechet distance is that of Heusel et al. 2017 (lecture 002) with these features in the place
of Inception's: numbers compare with each other inside this demo, not with published FIDs.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern.demo import need
from diffkern.demo.data import CLASSES, Digits

FEATURES = 64


class Classifier(nn.Module):
    """Images [B, 1, 8, 8] to logits [B, 10]; `features` gives the last hidden layer [B, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(64 * 16, FEATURES),
        )
        self.head = nn.Linear(FEATURES, CLASSES)

    def features(self, images: Tensor) -> Tensor:
        out: Tensor = self.body(images)
        return out

    def forward(self, images: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.features(images)))
        return out


@dataclasses.dataclass(frozen=True)
class Quality:
    """What is measured of a set of images: the share given the asked-for class, and the Frechet distance to the
    training images."""

    agreement: float
    frechet: float


class Judge:
    """The trained classifier with the feature statistics of the training images."""

    def __init__(self, classifier: Classifier, reference: Tensor) -> None:
        self.classifier = classifier.eval()
        self.mean, self.covariance = _moments(self._run(reference)[0])

    @torch.no_grad()
    def _run(self, images: Tensor) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Features float64 [N, 64] and predicted classes [N], in chunks."""
        features, classes = [], []
        for chunk in images.split(512):
            f = self.classifier.features(chunk)
            features.append(f.double().numpy())
            classes.append(self.classifier.head(F.relu(f)).argmax(dim=1).numpy())
        return np.concatenate(features), np.concatenate(classes)

    def measure(self, images: Tensor, labels: Tensor) -> Quality:
        """Quality of images float32 [N, 1, 8, 8] that were meant to show `labels` [N]; at least 2 images."""
        if len(images) != len(labels) or len(images) < 2:
            raise ValueError(f"images and labels must be equally many, at least 2, got {len(images)} and {len(labels)}")
        features, classes = self._run(images.clamp(-1.0, 1.0))
        agreement = float(np.mean(classes == labels.numpy()))
        return Quality(agreement, frechet_distance(self.mean, self.covariance, *_moments(features)))


def _moments(features: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return features.mean(axis=0), np.cov(features, rowvar=False)


def frechet_distance(
    mean_a: NDArray[np.float64],
    covariance_a: NDArray[np.float64],
    mean_b: NDArray[np.float64],
    covariance_b: NDArray[np.float64],
) -> float:
    """|mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)) of two normal distributions, in float64 (Heusel et al. 2017;
    lecture 002).

    The trace of (A B)^(1/2) is that of the symmetric (A^(1/2) B A^(1/2))^(1/2), so eigenvalues of symmetric matrices
    suffice.
    """
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ covariance_b @ root), 0.0, None)).sum()
    distance = ((mean_a - mean_b) ** 2).sum() + np.trace(covariance_a) + np.trace(covariance_b) - 2.0 * cross
    return max(0.0, float(distance))  # rounding can leave a few 1e-11 below zero where both are the same


def train_judge(digits: Digits, *, epochs: int = 30, seed: int = 0, progress: bool = True) -> Judge:
    """A classifier trained on the real digits, shifted by up to one pixel for robustness; about ten seconds on two
    cores."""
    tqdm = need("tqdm", "tqdm").tqdm
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Classifier()
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.02)
        batch = 64
        steps = -(-len(digits.images) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * steps)
        for _ in tqdm(range(epochs), desc="classifier", unit="epoch", disable=not progress):
            for chosen in torch.randperm(len(digits.images)).split(batch):
                images = digits.images[chosen]
                images = _shifted(images) + 0.05 * torch.randn_like(images)
                loss = F.cross_entropy(model(images), digits.labels[chosen], label_smoothing=0.05)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
    return Judge(model, digits.images)


def _shifted(images: Tensor) -> Tensor:
    """The batch moved by one of -1, 0, 1 pixels in each direction, background coming in."""
    down, right = (int(v) for v in torch.randint(-1, 2, (2,)))
    padded = F.pad(images, (1, 1, 1, 1), value=-1.0)
    height, width = images.shape[-2:]
    return padded[..., 1 + down : 1 + down + height, 1 + right : 1 + right + width]
