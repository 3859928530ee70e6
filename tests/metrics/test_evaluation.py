"""All scores at once: against the functions they come from, for any batches and number of processes, in files."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import metric_cases
from helpers.lazy import needs
from helpers.metric_cases import Corners, Drawn
from torch import Tensor

import diffkern
from diffkern import metrics
from diffkern.metrics import Scores, Statistics, evaluate, reference_statistics

pytestmark = needs("torch_fidelity", "safetensors")


class Part(NamedTuple):
    first: int
    images: Tensor
    classes: Tensor | None


@pytest.fixture(scope="module")
def scores() -> Scores:
    return evaluate(Drawn(40, seed=1, shift=-0.1), Drawn(60), Corners())


def test_every_score_is_that_of_its_function(scores: Scores) -> None:
    fake, real = (Statistics.of(Corners()(of.images), of.labels) for of in (Drawn(40, seed=1, shift=-0.1), Drawn(60)))
    assert (scores.images, scores.reference, scores.compared, scores.data) == (40, 60, 40, "drawn 60 0 0.0")
    assert scores.fid == pytest.approx(metrics.fid(real, fake), rel=1e-12)
    assert scores.sfid == pytest.approx(metrics.sfid(real, fake), rel=1e-12)
    assert scores.fid_infinity == pytest.approx(metrics.fid_infinity(real, fake), rel=1e-9)
    assert (scores.kid, scores.kid_std) == pytest.approx(metrics.kid(real, fake), rel=1e-12)
    assert scores.inception_score == pytest.approx(metrics.inception_score(fake).mean, rel=1e-12)
    bright = metrics.precision_recall(real.features[1::2], fake.features[1::2])
    assert (scores.classes[1].name, scores.classes[1].images) == ("bright", 20)
    assert (scores.classes[1].precision, scores.classes[1].recall) == bright
    assert scores.agreement is None  # the network's classes are not those of the data


def test_a_set_has_perfect_precision_and_recall_against_itself() -> None:
    found = evaluate(Drawn(20), Drawn(20), Corners())
    assert (found.precision, found.recall) == (1.0, 1.0)
    assert found.fid == pytest.approx(0.0, abs=1e-9)


def test_batches_of_any_form_give_the_same_scores() -> None:
    fake, real = Drawn(22, seed=1), Drawn(30)
    x, labels = fake.images, fake.labels
    known = reference_statistics(real, Corners(), batch=4)
    forms: list[Any] = [
        [(x[:9], labels[:9]), (x[9:], labels[9:])],
        (Part(first, x[first : first + 5], labels[first : first + 5]) for first in range(0, 22, 5)),
    ]
    want = evaluate(x, real, Corners(), labels=labels)
    for form in forms:
        found = evaluate(form, known, Corners())
        numbers, expected = (
            {k: v for k, v in dataclasses.asdict(of).items() if isinstance(v, float)} for of in (found, want)
        )
        assert numbers == pytest.approx(expected, rel=1e-9, abs=1e-12)
        assert [c.images for c in found.classes] == [11, 11]
    assert evaluate([x], known, Corners()).classes == ()
    named = evaluate(x, known, Corners(), labels=labels, names=("night", "day"))
    assert [c.name for c in named.classes] == ["night", "day"]


def test_a_classifier_says_what_agrees() -> None:
    class Judge(metrics.Classifier):
        """Two classes, by the mean: right of what is not between."""

        def __init__(self) -> None:
            self.name, self.dims, self.device, self.accuracy = "judge", 1, torch.device("cpu"), 0.99

        def __call__(self, images: Tensor) -> metrics.Features:
            mean = images.flatten(1).mean(1, keepdim=True)
            return metrics.Features(mean, None, torch.cat([-mean, mean], 1))

    fake = Drawn(20, seed=1)
    asked = fake.labels.clone()
    asked[[0, 2, 5]] = 1 - asked[[0, 2, 5]]
    found = evaluate(fake.images, Drawn(20), Corners(), labels=asked, classifier=Judge())
    assert found.agreement == 17 / 20
    assert found.classifier_accuracy == 0.99
    by_class = {c.name: c.agreement for c in found.classes}
    assert by_class == {"dark": 8 / 9, "bright": 9 / 11}
    assert evaluate(fake.images, Drawn(20), Judge(), labels=asked).agreement == 17 / 20
    assert evaluate(fake.images, Drawn(20), Judge()).agreement is None


def test_the_share_of_each_class_is_that_of_the_largest_logits(tmp_path: Path) -> None:
    """Of all images, with labels and without: a class that a model never makes has none."""
    judge = metrics.train_classifier(Drawn(60), steps=30)
    data, only = Drawn(60), Drawn(40, seed=3)
    chosen = only.images[only.labels == 0]
    found = evaluate(chosen, data, judge, names=("dark", "bright"))
    want = torch.bincount(judge(chosen).logits.argmax(1), minlength=2).double() / len(chosen)
    assert [c.share for c in found.classes] == want.tolist()
    assert [(c.name, c.images, c.precision, c.agreement) for c in found.classes] == [
        ("dark", 0, None, None),
        ("bright", 0, None, None),
    ]
    assert found.table().splitlines()[-1].split() == ["bright", "-", "-", "-", "-", f"{want[1]:.3f}"]
    assert Scores.from_json(found.to_json()) == found
    old = json.loads(found.to_json())
    for c in old["classes"]:
        del c["share"]  # as files from before have it
    assert Scores.from_json(json.dumps(old)).classes[0].share is None
    labelled = evaluate(only, data, judge)
    assert sum(c.share or 0.0 for c in labelled.classes) == pytest.approx(1.0)
    assert labelled.classes[0].images == int((only.labels == 0).sum())


def test_scores_are_kept_as_json_and_shown_as_a_table(scores: Scores, tmp_path: Path) -> None:
    scores.save(tmp_path / "run" / "evaluation.json")
    text = (tmp_path / "run" / "evaluation.json").read_text()
    assert Scores.from_json(text) == scores
    lines = scores.table().splitlines()
    assert lines[0].split()[:2] == ["FID", f"{scores.fid:.4f}"]
    assert any("40 images are few" in line for line in lines)
    assert lines[-1].split()[:2] == ["bright", "20"]
    with pytest.raises(ValueError, match=r"scores\.fid must be a finite number, got 'low'"):
        Scores.from_json(json.dumps(json.loads(text) | {"fid": "low"}))


def test_reference_statistics_are_read_again_only_for_the_same_data_and_network(tmp_path: Path) -> None:
    class Counted(Drawn):
        read = 0

        def batch(self, indices: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor]:
            self.read += len(indices)
            return super().batch(indices)

    path, images = tmp_path / "reference.safetensors", Counted(12)
    first = reference_statistics(images, Corners(), path)
    assert images.read == 12
    assert torch.equal(reference_statistics(images, Corners(), path).features, first.features)
    assert images.read == 12
    images.fingerprint = "others"
    reference_statistics(images, Corners(), path)
    assert images.read == 24
    assert Statistics.load(path).data == "others"


def test_bad_input_is_named() -> None:
    real = Drawn(10)
    with pytest.raises(ValueError, match="images must be at least neighbours \\+ 2 = 5, got 4"):
        evaluate(Drawn(4), real, Corners())
    with pytest.raises(ValueError, match="reference must be at least neighbours"):
        evaluate(real, Drawn(3), Corners())
    with pytest.raises(ValueError, match="images must be a tensor, Images or batches of them, got str"):
        evaluate("folder", real, Corners())
    with pytest.raises(ValueError, match=r"images must be batches: .*, got a dict"):
        evaluate([{"images": real.images}], real, Corners())
    with pytest.raises(ValueError, match=r"labels must have shape \[10\], got \[3\]"):
        evaluate(real.images, real, Corners(), labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="reference must be of extractor 'corners@0', got 'other'"):
        evaluate(real, Statistics("other", keep=True), Corners())
    with pytest.raises(ValueError, match=r"reference must be Images or their Statistics, got str: .*open_images"):
        evaluate(real, "folder", Corners())  # type: ignore[arg-type]
    for call in (lambda: evaluate(real, real, "inception"), lambda: reference_statistics(real, "inception")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=r"extractor must be a function of images with name, .*, got str"):
            call()
    broken = real.images.clone()
    broken[2, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"images must be finite, got NaN or infinity in images\[2\]"):
        evaluate(broken, real, Corners())


@pytest.mark.long  # tests/command/test_sample.py has two processes of the command in CI
def test_two_processes_measure_what_one_measures(tmp_path: Path) -> None:
    """Uneven shares, each its own batches, and a rank without any; the reference's file is written once."""
    place = str(Path(diffkern.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": place, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, metric_cases.__file__, str(tmp_path / "meeting"), "2"]
    pipe = subprocess.PIPE
    ranks = [
        subprocess.Popen([*command, str(rank)], stdout=pipe, stderr=pipe, text=True, env=environment)
        for rank in range(2)
    ]
    outs = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outs
    first, second = (json.loads((tmp_path / f"meeting-{rank}.json").read_text()) for rank in range(2))
    assert first == second
    want = metric_cases.measured()
    scores = ("scores", "own batches", "one rank's batches")
    for name in scores:
        found, expected = (json.loads(of[name]) for of in (first, want))
        for key, value in expected.items():
            assert found[key] == (pytest.approx(value, rel=1e-9, abs=1e-8) if isinstance(value, float) else value), key
    rest = {name: value for name, value in want.items() if name not in scores}
    assert {name: first[name] for name in rest} == rest
