"""How good a set of images is, by features of a network: distances, precision and recall, agreement.

    classifier = train_classifier(images)                # or extractor("inception"), extractor("torchvision:resnet50")
    scores = evaluate(samples, images, classifier)       # samples: a tensor, Images, or batches
    print(scores.table())

Samples whose truth is known, of models that give back what an image has lost: `psnr`, `ssim`, `feature_distance`,
`consistency` with their input, and all of them by `paired_scores`.

`Statistics` are the sums that distances are made of: batch by batch, over all processes of a job, kept in files.
"""

from __future__ import annotations

from diffkern.metrics.classifier import Classifier, train_classifier
from diffkern.metrics.distances import Estimate, agreement, fid, fid_infinity, inception_score, kid, sfid
from diffkern.metrics.evaluation import ClassScores, Scores, evaluate, reference_statistics
from diffkern.metrics.extractors import extractor, inception_weights
from diffkern.metrics.features import Extractor, Features, quantised
from diffkern.metrics.neighbours import PrecisionRecall, nearest, precision_recall, precision_recall_by_class
from diffkern.metrics.paired import (
    PairedScores,
    consistency,
    feature_distance,
    paired_scores,
    paired_table,
    psnr,
    ssim,
)
from diffkern.metrics.pictures import neighbour_grid, picture
from diffkern.metrics.statistics import Statistics

__all__ = [
    "ClassScores",
    "Classifier",
    "Estimate",
    "Extractor",
    "Features",
    "PairedScores",
    "PrecisionRecall",
    "Scores",
    "Statistics",
    "agreement",
    "consistency",
    "evaluate",
    "extractor",
    "feature_distance",
    "fid",
    "fid_infinity",
    "inception_score",
    "inception_weights",
    "kid",
    "nearest",
    "neighbour_grid",
    "paired_scores",
    "paired_table",
    "picture",
    "precision_recall",
    "precision_recall_by_class",
    "psnr",
    "quantised",
    "reference_statistics",
    "sfid",
    "ssim",
    "train_classifier",
]
