"""Folders of images: names, classes, sizes, what cannot be read, and the cache."""

from __future__ import annotations

import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffkern.data import Images, open_images
from diffkern.data.stored import ArrayImages, RaggedImages


def paint(path: Path, grey: int | tuple[int, int, int], size: tuple[int, int] = (4, 4)) -> None:
    """A file of one colour, width x height, without loss."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(grey, int) else "RGB", size, grey).save(path)


def greys(images: Images) -> list[int]:
    """The first pixel of every image, 0 .. 255."""
    x0, _ = images.batch(torch.arange(len(images)))
    return ((x0[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures of two classes."""
    for name, grey in (("b/2.png", 30), ("a/10.png", 20), ("a/1.png", 10)):
        paint(tmp_path / "data" / name, grey)
    return tmp_path / "data"


def opened(folder: Path, **options: Any) -> Images:
    """With its cache beside the data."""
    return open_images(folder, **{"cache": folder.parent / "cache"} | options)


def test_subfolders_are_classes_in_the_order_of_their_names(folder: Path) -> None:
    images = opened(folder)
    assert (len(images), images.shape, images.classes, images.skipped) == (3, (1, 4, 4), ("a", "b"), 0)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 0, 1]
    assert greys(images) == [10, 20, 30]
    x0, labels = images.batch(torch.tensor([2, 0]))
    assert labels is not None
    assert labels.tolist() == [1, 0]
    assert torch.equal(x0[0], torch.full((1, 4, 4), 30 / 127.5 - 1))


def test_one_picture_is_a_source_without_a_label(folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "of" / "its own" / "a.PNG"
    place.parent.mkdir(parents=True)
    paint(place, 77, (6, 5))
    images = open_images(str(place), cache=False)
    assert (len(images), images.shape, images.labels) == (1, (1, 5, 6), None)
    assert greys(images) == [77]
    assert open_images(place, size=4, channels=3, cache=False).shape == (3, 4, 4)
    with pytest.raises(ValueError, match=r"no.png: no such file"):
        open_images(str(tmp_path / "no.png"), cache=False)


def test_progress_is_shown_when_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opened(folder, progress="pictures", cache=False)
    assert "pictures" in (shown := capsys.readouterr().err)
    assert "3/3" in shown
    opened(folder, cache=False)
    assert capsys.readouterr().err == ""


def test_an_image_beside_the_subfolders_leaves_no_classes(folder: Path) -> None:
    paint(folder / "c.png", 40)
    images = opened(folder)
    assert images.classes is images.labels is None
    assert greys(images) == [10, 20, 30, 40]


def test_what_is_no_image_by_its_name_is_not_looked_at(folder: Path) -> None:
    for name in ("notes.txt", ".hidden.png", "a/._1.png", "__MACOSX/1.png", ".git/1.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"no image")
    (folder / "b" / "LAST.PNG").write_bytes((folder / "a" / "1.png").read_bytes())
    (folder / "a" / "up").symlink_to(folder)
    assert greys(opened(folder)) == [10, 20, 30, 10]
    assert greys(opened(folder, labels=False)) == [10, 20, 30, 10]


def test_sizes_are_one_or_made_one(folder: Path) -> None:
    paint(folder / "b" / "3.png", 40, (8, 6))
    with pytest.raises(
        ValueError, match=r"^size must be given where images are of several, got None: a/1.png is 4 x 4, "
    ):
        opened(folder)
    images = opened(folder, size=2)
    assert images.shape == (1, 2, 2)
    assert greys(images) == [10, 20, 30, 40]


def test_what_cannot_be_read_is_named_at_once_or_skipped_and_counted(folder: Path) -> None:
    whole = (folder / "a" / "1.png").read_bytes()
    (folder / "a" / "2.png").write_bytes(b"no image")
    (folder / "b" / "1.png").write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "b" / "3.png")
    (folder / "b" / "3.png").write_bytes((folder / "b" / "3.png").read_bytes()[:2000])  # a download that broke off
    assert len(whole) < 2000
    sentence = r"^3 of 6 images cannot be read: a/2.png \(no image\), b/1.png \(no image\), b/3.png \(.+\); skip_bad="
    for _ in range(2):
        with pytest.raises(ValueError, match=sentence):
            opened(folder)
        images = opened(folder, skip_bad=True)  # and the cache that this made is refused as well, next time round
        assert (len(images), images.skipped, greys(images)) == (3, 3, [10, 20, 30])
        assert images.labels is not None
        assert images.labels.tolist() == [0, 0, 1]


def test_of_many_that_cannot_be_read_ten_are_named(tmp_path: Path) -> None:
    for i in range(12):
        (tmp_path / f"{i:02}.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^12 of 12 .*09.jpg \(no image\), \.\.\.; skip_bad"):
        open_images(tmp_path, cache=False)
    with pytest.raises(ValueError, match=r"^source must have an image that can be read, got 12 that cannot: 00.jpg"):
        open_images(tmp_path, cache=False, skip_bad=True)


def test_one_image_is_a_data_set_and_none_is_not(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=r"^source must be a folder with images \(png, .*\), got .*data with none$"):
        opened(tmp_path / "data")
    paint(tmp_path / "data" / "1.bmp", (1, 2, 3))
    images = opened(tmp_path / "data")
    assert (len(images), images.shape) == (1, (3, 4, 4))
    with pytest.raises(ValueError, match=r"^source must be a folder, .*, got .*nowhere: no such file$"):
        open_images(tmp_path / "nowhere")
    (tmp_path / "data" / "1.txt").touch()
    with pytest.raises(ValueError, match=r"^source must be a folder, .*1.txt: none of these$"):
        open_images(tmp_path / "data" / "1.txt")


def test_a_limit_takes_some_of_all_classes_and_the_same_ones_each_time(tmp_path: Path) -> None:
    for i in range(40):
        paint(tmp_path / "data" / "ab"[i // 20] / f"{i:02}.png", i)
    images = opened(tmp_path / "data", limit=12)
    found = greys(images)
    assert len(found) == 12
    assert found == sorted(found) == greys(opened(tmp_path / "data", limit=12))
    assert images.labels is not None
    assert set(images.labels.tolist()) == {0, 1}
    assert len(opened(tmp_path / "data", limit=100)) == 40
    assert opened(tmp_path / "data", limit=1).classes == ("a", "b")
    given = opened(tmp_path / "data", limit=12, labels=torch.arange(40))
    assert given.labels is not None
    assert given.labels.tolist() == greys(given) == found


# ------------------------------------------------------------------------------------------------------------ crops


def test_a_centre_crop_is_the_middle_and_a_random_one_goes_by_the_seed(tmp_path: Path) -> None:
    """A ramp of 4 x 12: the window's first column says where it lies."""
    ramp = np.broadcast_to(np.arange(12, dtype=np.uint8), (4, 12))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "wide.png")
    Image.fromarray(np.ascontiguousarray(ramp.T)).save(tmp_path / "high.png")
    fixed = open_images(tmp_path, size=4, cache=False)
    assert isinstance(fixed, ArrayImages)
    moving = open_images(tmp_path, size=4, crop="random", flip=True, cache=False)
    assert isinstance(moving, RaggedImages)
    both = torch.tensor([0, 1])
    assert torch.equal(fixed.batch(both)[0], moving.batch(both)[0])
    assert torch.equal(fixed.batch(both, both)[0], fixed.batch(both)[0])
    assert greys(fixed) == [4, 4]
    wide = torch.ones(900, dtype=torch.int64)
    x0, _ = moving.batch(wide, torch.arange(900))
    rows = ((x0[:, 0, 0] + 1) * 127.5).round().int()
    assert torch.equal(rows.diff(dim=1).abs(), torch.ones(900, 3, dtype=torch.int32))
    flipped = rows[:, 0] > rows[:, 1]
    places = torch.bincount(rows.amin(1), minlength=9)
    # 9 places, 100 of each expected: chi-square of 8 degrees, 0.9999 quantile 31.8; flips: 450 +- 4 of 15.
    assert float(((places - 100.0) ** 2 / 100).sum()) < 31.8
    assert abs(int(flipped.sum()) - 450) < 60
    again, _ = moving.batch(wide[:5], torch.arange(5, 10))
    assert torch.equal(again, x0[5:10])


# ------------------------------------------------------------------------------------------------------------ cache


def test_what_was_resized_once_is_mapped_from_then_on(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(folder, size=2)
    assert isinstance(first, ArrayImages)
    assert isinstance(first.pixels, np.memmap)
    monkeypatch.setattr(Image, "open", None)  # a second decoding would call it
    again = opened(folder, size=2)
    assert greys(again) == greys(first) == greys(pickle.loads(pickle.dumps(again)))
    assert again.fingerprint == first.fingerprint
    assert again.classes == ("a", "b")
    assert len(pickle.dumps(again)) < 4000
    with pytest.raises(ValueError, match=r"^3 of 3 images cannot be read"):
        opened(folder, size=3)


def test_a_changed_file_is_read_anew(folder: Path) -> None:
    before = opened(folder)
    paint(folder / "a" / "1.png", 99)
    os.utime(folder / "a" / "1.png", ns=(1, 1))
    after = opened(folder)
    assert greys(after) == [99, 20, 30]
    assert after.fingerprint != before.fingerprint


def test_the_fingerprint_is_of_pixels_labels_and_options_wherever_they_lie(folder: Path) -> None:
    found = opened(folder).fingerprint
    shutil.copytree(folder, folder.parent / "copy", copy_function=shutil.copyfile)
    assert open_images(folder.parent / "copy", cache=False).fingerprint == found
    others = [
        opened(folder, flip=True),
        opened(folder, size=2),
        opened(folder, channels=3),
        opened(folder, labels=False),
    ]
    assert len({found, *(images.fingerprint for images in others)}) == 5


def test_a_cache_that_a_killed_process_left_or_that_was_cut_is_built_anew(folder: Path) -> None:
    opened(folder)
    (place,) = [path for path in (folder.parent / "cache").iterdir() if path.is_dir()]
    for damage in ("pixels.bin", "about.json", "labels.bin"):
        file = place / damage
        file.write_bytes(file.read_bytes()[:-3])
        place.with_name(f"{place.name}.part").mkdir()
        assert greys(opened(folder)) == [10, 20, 30]
    assert [path.name for path in place.parent.iterdir() if path.is_dir()] == [place.name]


def test_those_who_ask_at_once_wait_for_one_to_build(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, calls = Image.open, []

    def slow(file: Any) -> Any:
        calls.append(file)
        time.sleep(0.02)
        return decode(file)

    monkeypatch.setattr(Image, "open", slow)
    with ThreadPoolExecutor(3) as pool:
        found = [task.result() for task in [pool.submit(opened, folder) for _ in range(3)]]
    assert [greys(images) for images in found] == [[10, 20, 30]] * 3
    assert len(calls) == 3


def test_a_cache_that_cannot_be_written_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder.parent / "file").write_bytes(b"")
    sentence = "^.*cache must be a folder that can be written and has room, got .*: give another, or False"
    with pytest.raises(OSError, match=sentence):
        opened(folder, cache=folder.parent / "file" / "cache")

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device at .*give another, or False"):
        opened(folder)
    assert not [path for path in (folder.parent / "cache").iterdir() if path.is_dir()]


def test_the_users_own_cache_is_where_the_system_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.parent / "mine"))
    open_images(folder)
    assert len(list((folder.parent / "mine" / "diffkern" / "images").glob("*/pixels.bin"))) == 1
