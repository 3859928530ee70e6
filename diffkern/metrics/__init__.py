"""How good a set of images is, by features of a network: distances, precision and recall, agreement."""

from __future__ import annotations

from diffkern.metrics.classifier import Classifier, train_classifier
from diffkern.metrics.distances import Estimate, agreement, fid, fid_infinity, inception_score, kid, sfid
from diffkern.metrics.features import Extractor, Features, quantised
from diffkern.metrics.neighbours import PrecisionRecall, nearest, precision_recall, precision_recall_by_class
from diffkern.metrics.statistics import Statistics

__all__ = [
    "Classifier",
    "Estimate",
    "Extractor",
    "Features",
    "PrecisionRecall",
    "Statistics",
    "agreement",
    "fid",
    "fid_infinity",
    "inception_score",
    "kid",
    "nearest",
    "precision_recall",
    "precision_recall_by_class",
    "quantised",
    "sfid",
    "train_classifier",
]
