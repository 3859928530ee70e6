"""Images with captions: where they are read from, as tokens, in other words, and what does not fit."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffkern.data import Images, Retold, Stream, Subset, loader, open_images, retold, split
from diffkern.vocabulary import Vocabulary

TEXTS = ["seven, thick", "three", ""]


def picture(i: int) -> Image.Image:
    return Image.new("L", (4, 4), 10 * (i + 1))


def folder(path: Path, texts: list[str | None]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    for i, text in enumerate(texts):
        picture(i).save(path / f"{i}.png")
        if text is not None:
            (path / f"{i}.txt").write_text(text, encoding="utf-8")
    return path


def told(images: Images) -> list[str]:
    assert images.vocabulary is not None
    assert images.labels is not None
    assert images.classes is None
    return images.vocabulary.texts(images.labels)


def test_captions_lie_beside_pictures(tmp_path: Path) -> None:
    source = folder(tmp_path / "data", ["Seven,\n thick \n", "three", "﻿"])
    (source / "README.txt").write_text("of no picture")
    images = open_images(source, labels="text", cache=tmp_path / "cache")
    assert told(images) == TEXTS
    assert images.vocabulary == Vocabulary((",", "seven", "thick", "three"), 4)
    assert images.labels is not None
    assert images.labels.tolist() == [[1, 3, 2, 4], [1, 5, 0, 0], [1, 0, 0, 0]]
    x0, labels = images.batch(torch.tensor([1, 0]))
    assert labels is not None
    assert labels.tolist() == [[1, 5, 0, 0], [1, 3, 2, 4]]
    assert x0.shape == (2, 1, 4, 4)
    # Out of the cache; without captions they are images as ever.
    again = open_images(source, labels="text", cache=tmp_path / "cache")
    assert told(again) == TEXTS
    assert again.fingerprint == images.fingerprint
    plain = open_images(source, cache=tmp_path / "cache")
    assert (plain.labels, plain.vocabulary) == (None, None)
    assert told(open_images(source / "1.png", labels="text", cache=False)) == ["three"], "of a single picture too"
    assert plain.fingerprint != images.fingerprint
    # A caption that is written anew is read anew, and other words are other data.
    (source / "1.txt").write_text("three, thin")
    other = open_images(source, labels="text", cache=tmp_path / "cache")
    assert told(other) == ["seven, thick", "three, thin", ""]
    assert other.fingerprint != images.fingerprint


def test_captions_are_in_metadata(tmp_path: Path) -> None:
    source = folder(tmp_path / "data", [None, "not this one"])
    folder(source / "more", [None])
    lines = [{"file_name": "more/0.png", "text": "three"}, {"file_name": "./1.png", "text": "seven", "other": 3}]
    (source / "metadata.jsonl").write_text(
        "\n".join(map(json.dumps, [*lines, {"file_name": "0.png", "text": ""}])) + "\n\n"
    )
    images = open_images(source, labels="text", cache=False, limit=3)
    assert told(images) == ["", "seven", "three"]
    some = open_images(source, labels="text", cache=False, limit=2)
    assert len(told(some)) == 2
    for line, sentence in (
        ("{", "line 4 must be a line of JSON, got '{'"),
        ('{"file_name": "0.png"}', "line 4 must have a file_name and a text, got {'file_name': '0.png'}"),
        ("[3]", r"line 4 must have a file_name and a text, got \[3\]"),
    ):
        (source / "metadata.jsonl").write_text("\n".join([*map(json.dumps, lines), "", line]))
        with pytest.raises(ValueError, match=sentence):
            open_images(source, labels="text", cache=False)


def test_captions_of_some_pictures_are_one_sentence(tmp_path: Path) -> None:
    source = folder(tmp_path / "some", ["three", None, None])
    with pytest.raises(ValueError, match=r"^captions must belong to all images or to none, got 2 of 3 without: 1.png$"):
        open_images(source, labels="text", cache=False)
    with pytest.raises(ValueError, match=r"^labels must be in the source for labels='text', got images without$"):
        open_images(folder(tmp_path / "none", [None]), labels="text", cache=False)
    folder(tmp_path / "bytes", ["three"])
    (tmp_path / "bytes" / "0.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match=r"^captions must be text in UTF-8, got other bytes in .*0.txt$"):
        open_images(tmp_path / "bytes", labels="text", cache=False)
    (source / "bad.png").write_text("no image")
    (source / "bad.txt").write_text("three")
    for name in ("1", "2"):
        (source / f"{name}.txt").write_text("seven")
    images = open_images(source, labels="text", cache=False, skip_bad=True)
    assert told(images) == ["three", "seven", "seven"]


def test_captions_are_in_tar_shards(tmp_path: Path) -> None:
    pytest.importorskip("webdataset")
    with tarfile.open(tmp_path / "s.tar", "w") as file:
        for i, text in enumerate(TEXTS):
            data = io.BytesIO()
            picture(i).save(data, "png")
            for name, content in ((f"{i}.png", data.getvalue()), (f"{i}.txt", text.encode()), (f"{i}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
    for source in (tmp_path / "s.tar", tmp_path):
        assert told(open_images(source, labels="text", cache=tmp_path / "cache")) == TEXTS
    assert open_images(tmp_path / "s.tar", cache=tmp_path / "cache").classes == ("0", "1")


def test_captions_go_with_arrays(tmp_path: Path) -> None:
    arrays = np.zeros((3, 4, 4), np.uint8)
    assert told(open_images((arrays, TEXTS))) == TEXTS
    assert told(open_images(arrays, labels=TEXTS)) == TEXTS
    assert told(open_images((arrays, [3, 4, 5]), labels=TEXTS)) == TEXTS
    assert told(open_images((arrays, TEXTS), size=8, cache=False)) == TEXTS
    np.savez(tmp_path / "a.npz", images=arrays, texts=np.array(TEXTS))
    np.savez(tmp_path / "b.npz", images=arrays, texts=np.array(TEXTS), labels=np.arange(3))
    assert told(open_images(tmp_path / "a.npz")) == TEXTS
    assert told(open_images(tmp_path / "a.npz", size=8, cache=tmp_path / "cache")) == TEXTS
    assert open_images(tmp_path / "b.npz").classes == ("0", "1", "2")
    assert told(open_images(tmp_path / "b.npz", labels="text")) == TEXTS
    assert told(open_images(tmp_path, labels="text")) == TEXTS * 2
    assert open_images((arrays, TEXTS), labels=False).labels is None
    with pytest.raises(ValueError, match=r"^labels must be captions \[3\], one an image, got 2$"):
        open_images((arrays, TEXTS[:2]))
    with pytest.raises(ValueError, match=r"^labels must be in the source for labels='text', got images without$"):
        open_images((arrays, [1, 2, 3]), labels="text")


def test_captions_of_other_data_sets() -> None:
    items: list[Any] = [(picture(i), text) for i, text in enumerate(TEXTS)]
    assert told(open_images(items, labels="text")) == TEXTS
    assert open_images(items).labels is None
    assert told(open_images([{"image": p, "text": text} for p, text in items], labels="text")) == TEXTS


@pytest.mark.full
def test_captions_are_a_column(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = {"image": [picture(i) for i in range(3)], "caption": TEXTS}
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    data = datasets.Dataset.from_dict(rows, features)
    assert told(open_images(data, labels="caption", cache=tmp_path)) == TEXTS
    assert open_images(data, cache=tmp_path).labels is None


def test_parts_and_batches_have_their_captions() -> None:
    images = open_images((torch.zeros(9, 4, 4, dtype=torch.uint8), ["a", "b", "c"] * 3))
    training, held_out = split(images, 3)
    assert sorted(told(training) + told(held_out)) == sorted(["a", "b", "c"] * 3)
    assert training.vocabulary == images.vocabulary
    batches = next(loader(training, Stream(6, 0), batch=6, micro_batch=4, seed=0))
    found = [label for batch in batches if batch.labels is not None for label in batch.labels.tolist()]
    assert training.labels is not None
    assert sorted(found) == sorted(training.labels.tolist())
    assert isinstance(training, Subset)


def test_captions_are_told_in_other_words() -> None:
    images = open_images((torch.zeros(3, 4, 4, dtype=torch.uint8), TEXTS))
    words = Vocabulary.of(["three seven thick, thin"], 6)
    found = retold(images, words)
    assert told(found) == TEXTS
    assert found.vocabulary == words
    assert found.labels is not None
    assert found.labels.equal(words.tokens(TEXTS))
    assert (len(found), found.shape, found.fingerprint) == (3, images.shape, images.fingerprint)
    x0, labels = found.batch(torch.tensor([2, 0]))
    assert labels is not None
    assert labels.equal(words.tokens(["", "seven, thick"]))
    assert x0.equal(images.batch(torch.tensor([2, 0]))[0])
    assert images.vocabulary is not None
    assert retold(images, Vocabulary(images.vocabulary.words, images.vocabulary.length)) is images

    class Lengths:
        def tokens(self, texts: list[str]) -> torch.Tensor:
            return torch.tensor([[len(text)] for text in texts])

    of_lengths = retold(images, Lengths())
    assert of_lengths.labels is not None
    assert of_lengths.labels.tolist() == [[12], [5], [0]]
    assert of_lengths.vocabulary is None
    with pytest.raises(
        ValueError, match=r"^text must be of the 1 words of the vocabulary, got 'seven' in 'seven, thick'"
    ):
        retold(images, Vocabulary(("three",), 6))
    with pytest.raises(
        ValueError, match=r"^images must have captions to be retold, got none: open them with labels='tex"
    ):
        Retold(open_images((torch.zeros(2, 4, 4, dtype=torch.uint8), [0, 1])), words)


def test_a_class_of_ones_own_has_a_fingerprint_of_its_words() -> None:
    class Own(Images):
        shape = (1, 2, 2)

        def __init__(self, *words: str) -> None:
            self.vocabulary = Vocabulary(words, 2)
            self.labels = self.vocabulary.tokens(list(words))

        def __len__(self) -> int:
            return 2

        def batch(self, indices: Any, seeds: Any = None) -> Any:
            raise NotImplementedError

    assert Own("a", "b").fingerprint == Own("a", "b").fingerprint
    assert Own("a", "b").fingerprint != Own("a", "c").fingerprint


@pytest.mark.full
def test_digits_say_what_they_are() -> None:
    pytest.importorskip("sklearn")
    plain, images = open_images("digits"), open_images("digits-text")
    texts = told(images)
    every = torch.arange(len(plain))
    assert plain.labels is not None
    assert plain.batch(every)[0].equal(images.batch(every)[0])
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    assert [names.index(text.partition(",")[0]) for text in texts] == plain.labels.tolist()
    x0 = plain.batch(every)[0][:, 0].double()
    ink = (x0 + 1).sum((1, 2))
    for label in range(10):
        mine = [i for i in range(len(texts)) if plain.labels[i] == label]
        words = {word: [i for i in mine if word in texts[i]] for word in ("thin", "thick", "narrow", "wide")}
        assert all(len(found) == len(mine) // 3 for found in words.values())
        rest = [i for i in mine if "th" not in texts[i].partition(",")[2]]
        assert ink[words["thin"]].max() <= ink[rest].min()
        assert ink[rest].max() <= ink[words["thick"]].min()
    assert len(Counter(texts)) == 90
    assert open_images("digits-text", labels=False).labels is None
