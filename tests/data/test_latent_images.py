"""Latents encoded once: what they are, where they are kept, who encodes them, and what a killed process leaves."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import encoding_process
from helpers.encoding_process import Encode, pixels
from torch import Tensor

import diffkern
from diffkern import ops, streams
from diffkern.data import Images, Retold, Stream, Subset, loader, open_images
from diffkern.data.latents import LatentImages, encoded
from diffkern.vocabulary import Vocabulary


def mean_of(x0: Tensor) -> np.ndarray:
    """The means of 2 x 2, in NumPy."""
    n, c, h, w = x0.shape
    return x0.numpy().reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5))


def test_a_batch_is_the_posterior_sampled_by_address(tmp_path: Path) -> None:
    images = open_images((pixels(), torch.arange(11) % 3))
    latents = encoded(images, Encode(), "a", cache=tmp_path)
    assert (len(latents), latents.shape, latents.classes) == (11, (1, 2, 2), images.classes)
    assert latents.fingerprint == images.fingerprint
    indices = torch.tensor([7, 0, 7, 10])
    x0, labels = images.batch(indices)
    mean = mean_of(x0)
    z, found = latents.batch(indices)
    assert found is not None
    assert labels is not None
    assert torch.equal(found, labels)
    np.testing.assert_allclose(z.numpy(), mean, rtol=1e-5, atol=1e-6)
    seeds = ops.seeds(5, 4)
    n = ops.randn([4, 1, 2, 2], seeds, streams.POSTERIOR).numpy()
    drawn, _ = latents.batch(indices, seeds)
    np.testing.assert_allclose(drawn.numpy(), mean + 0.1 * np.abs(mean) * n, rtol=1e-5, atol=1e-6)
    assert not torch.equal(drawn[0], drawn[2])
    assert torch.equal(latents.batch(indices[1:2], seeds[1:2])[0], drawn[1:2])


def test_flips_are_a_second_set_by_the_address_that_flips_images(tmp_path: Path) -> None:
    images = open_images(pixels(), flip=True)
    latents = encoded(images, lambda x0: (Encode()(x0)[0], None), "a", cache=tmp_path)
    assert latents.std is None
    seeds, indices = ops.seeds(1, 11), torch.arange(11)
    flipped = mean_of(images.batch(indices, seeds)[0])
    assert not np.allclose(flipped, mean_of(images.batch(indices)[0]))
    np.testing.assert_allclose(latents.batch(indices, seeds)[0].numpy(), flipped, rtol=1e-5, atol=1e-6)
    some = Subset(latents, torch.tensor([3, 4]))
    assert torch.equal(some.batch(torch.tensor([1]), seeds[4:5])[0], latents.batch(indices[4:5], seeds[4:5])[0])


def test_what_is_cropped_at_random_is_refused(tmp_path: Path) -> None:
    images = open_images(torch.zeros(2, 1, 4, 6, dtype=torch.uint8), size=4, crop="random", cache=tmp_path)
    assert images.augmentation == ("crop",)
    for each in (images, Subset(images, torch.tensor([0]))):
        with pytest.raises(
            ValueError, match=r"images must be augmented by flips alone .* got crop: encode them on the fl"
        ):
            encoded(each, Encode(), "a", cache=tmp_path)


def test_they_are_encoded_once_for_each_set_of_images_and_autoencoder(tmp_path: Path) -> None:
    def count(source: Any, name: str = "a", **options: Any) -> int:
        encode = Encode()
        encoded(open_images(source, **options), encode, name, cache=tmp_path, batch=3)
        return encode.seen

    assert count(pixels()) == 11 + 1  # the first twice: to know the latents' shape
    assert count(pixels()) == 0
    assert count(pixels(), "b") == 12
    assert count(pixels(), flip=True) == 23
    assert count(pixels(12)) == 13
    assert count(pixels()) == count(pixels(), flip=True) == 0
    folders = [path for path in tmp_path.iterdir() if path.is_dir()]
    assert len(folders) == 4
    about = json.loads((folders[0] / "about.json").read_bytes())
    assert about["autoencoder"] in ("a", "b")
    assert about["data"]


def test_they_are_mapped_also_in_another_process(tmp_path: Path) -> None:
    latents = encoded(open_images(pixels()), Encode(), "a", cache=tmp_path)
    assert isinstance(latents.mean, np.memmap)
    sent = pickle.dumps(latents)
    assert len(sent) < 5000
    again: LatentImages = pickle.loads(sent)
    seeds = ops.seeds(0, 2)
    assert torch.equal(again.batch(torch.arange(2), seeds)[0], latents.batch(torch.arange(2), seeds)[0])
    batches = loader(latents, Stream(11), batch=4, seed=0, end=8)
    assert [tuple(batch.x0.shape) for (batch,) in batches] == [(4, 1, 2, 2)] * 2


class Nameless(Images):
    """Images of a class that says nothing of its content."""

    def __init__(self, value: float) -> None:
        self.shape, self.value = (1, 4, 4), value

    def __len__(self) -> int:
        return 3

    def batch(self, indices: Tensor, seeds: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return torch.full((len(indices), 1, 4, 4), self.value), None


@pytest.mark.parametrize("subset", [False, True])
def test_images_without_a_fingerprint_of_their_content_are_not_kept(tmp_path: Path, subset: bool) -> None:
    for value in (0.25, 0.5):
        images: Images = Nameless(value)
        images = Subset(images, torch.tensor([0, 2])) if subset else images
        latents = encoded(images, Encode(), "a", cache=tmp_path)
        assert latents.batch(torch.tensor([1]))[0].unique().tolist() == [value]
    assert list(tmp_path.iterdir()) == []
    kept = encoded(open_images(pixels()), Encode(), "a", cache=False)
    assert not isinstance(kept.mean, np.memmap)


def test_nor_are_those_whose_captions_are_told_anew(tmp_path: Path) -> None:
    words = Vocabulary(("three", "thick"), 3)
    for value in (0.25, 0.5):
        images = Nameless(value)
        images.vocabulary, images.labels = words, words.tokens(["three", "thick", "three"])
        told = Retold(images, Vocabulary(("thick", "three"), 4))
        latents = encoded(told, Encode(), "a", cache=tmp_path)
        assert latents.batch(torch.tensor([1]))[0].unique().tolist() == [value]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("subset", [False, True])
def test_one_image_of_many_that_is_another_has_other_latents(tmp_path: Path, subset: bool) -> None:
    """Also one that the fingerprint of a large array does not look at."""
    images = np.zeros((5000, 4, 4, 1), np.uint8)
    for value in (0, 255):
        images[11] = value
        found: Images = open_images(images.copy())
        found = Subset(found, torch.tensor([3, 11])) if subset else found
        latents = encoded(found, Encode(), "a", cache=tmp_path, batch=2500)
        assert latents.batch(torch.tensor([1 if subset else 11]))[0].unique().tolist() == [value / 127.5 - 1.0]
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2


@pytest.mark.parametrize("damage", ["cut", "about", "part", "other"])
def test_what_is_not_whole_is_encoded_anew(tmp_path: Path, damage: str) -> None:
    images = open_images(pixels())
    first = encoded(images, Encode(), "a", cache=tmp_path)
    (folder,) = [path for path in tmp_path.iterdir() if path.is_dir()]
    if damage == "cut":
        os.truncate(folder / "std.bin", 8)
    elif damage == "about":
        (folder / "about.json").write_text("{")
    elif damage == "other":
        about = json.loads((folder / "about.json").read_text())
        (folder / "about.json").write_text(json.dumps({**about, "autoencoder": "b"}))
    else:
        folder.rename(folder.with_name(folder.name + ".part"))
    encode = Encode()
    again = encoded(images, encode, "a", cache=tmp_path)
    assert encode.seen == 12
    assert np.array_equal(again.mean, first.mean)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [folder.name]


def test_an_error_while_encoding_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no more"):
        encoded(open_images(pixels()), Encode(fails=True), "a", cache=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cache must be a folder that can be written and has room, got"):
        encoded(open_images(pixels()), Encode(), "a", cache=tmp_path / "file")


# ------------------------------------------------------------------------------------------------ several processes


def start(world: int, **options: Any) -> subprocess.Popen[str]:
    place = str(Path(diffkern.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": place, "OMP_NUM_THREADS": "1"}
    launcher = [] if world == 1 else ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    call = [sys.executable, *launcher, encoding_process.__file__, json.dumps(options)]
    return subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> list[list[Any]]:
    out, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    found: list[list[Any]] = json.loads(out.splitlines()[-1])
    return found


@pytest.mark.full
def test_a_killed_process_leaves_nothing_that_is_taken_for_whole(tmp_path: Path) -> None:
    process = start(1, cache=str(tmp_path), pause=0.2)
    begun = time.monotonic()
    while not list(tmp_path.glob("*.part/mean.bin")) and time.monotonic() - begun < 60:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not list(tmp_path.glob("latents-*/about.json"))
    encode = Encode()
    latents = encoded(open_images(pixels(), flip=True), encode, "a", cache=tmp_path)
    assert encode.seen == 23
    np.testing.assert_allclose(
        latents.batch(torch.arange(11))[0].numpy(),
        mean_of(open_images(pixels()).batch(torch.arange(11))[0]),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.full
def test_processes_encode_their_shares_and_find_the_same(tmp_path: Path) -> None:
    alone = encoded(open_images(pixels(), flip=True), Encode(), "a", cache=False)
    total = float(torch.from_numpy(alone.mean).double().sum())
    (first, second) = finish(start(2, cache=str(tmp_path)))
    assert [first[0], second[0]] == [1 + 2 * 5, 2 * 6]
    assert first[1] == second[1] == total
    again = encoded(open_images(pixels(), flip=True), Encode(), "a", cache=tmp_path)
    assert np.array_equal(again.mean, alone.mean)
    assert len(list(tmp_path.glob("latents-*/*"))) == 3  # about, mean, std


@pytest.mark.full
def test_processes_that_see_no_common_folder_encode_all(tmp_path: Path) -> None:
    every = finish(start(2, cache=str(tmp_path), own=True))
    assert every[0][1] == every[1][1] != 0.0
    assert every[1][0] == 23


@pytest.mark.full
def test_an_error_of_one_process_is_said_by_all(tmp_path: Path) -> None:
    first, second = finish(start(2, cache=str(tmp_path), fails=True))
    assert second[2] == "no more"
    assert first[2] == "another process could not encode its images: no more"
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
