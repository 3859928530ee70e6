"""Odd pictures: what people expect of transparency, 16 bits, CMYK, palettes, cameras held upright, and sizes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from diffkern.data import open_images

RED, WHITE, CYAN = [255, 0, 0], [255, 255, 255], [0, 255, 255]


def levels(path: Path, **options: object) -> list[object]:
    """The one picture in the folder as 0 .. 255, [C, H, W]."""
    images = open_images(path, cache=False, **options)  # type: ignore[arg-type]
    x0, _ = images.batch(torch.tensor([0]))
    return ((x0[0] + 1) * 127.5).round().int().tolist()


def row(*colours: list[int]) -> list[list[list[int]]]:
    """One row of pixels as [C, 1, W]."""
    return [[list(channel)] for channel in zip(*colours, strict=True)]


def of(mode: str, *pixels: object) -> Image.Image:
    """One row of pixels."""
    image = Image.new(mode, (len(pixels), 1))
    image.putdata(pixels)
    return image


def palette(transparent: bool) -> Callable[[Path], None]:
    def save(path: Path) -> None:
        image = of("P", 0, 1)
        image.putpalette([*RED, *CYAN])
        image.save(path, **({"transparency": 1} if transparent else {}))

    return save


def sixteen(path: Path) -> None:
    Image.fromarray(np.array([[0, 257, 25700, 65535, 128, 129]], np.uint16)).save(path)


def animation(path: Path) -> None:
    of("RGB", tuple(RED)).save(path, save_all=True, append_images=[of("RGB", tuple(CYAN))])


@pytest.mark.parametrize(
    ("name", "save", "expected"),
    [
        # 128/255 of red over white: 255 - 128 = 127 of green and blue.
        (
            "rgba.png",
            of("RGBA", (255, 0, 0, 255), (9, 9, 9, 0), (255, 0, 0, 128)).save,
            row(RED, WHITE, [255, 127, 127]),
        ),
        ("la.png", of("LA", (7, 255), (7, 0)).save, [[[7, 255]]]),
        ("sixteen.png", sixteen, [[[0, 1, 100, 255, 0, 1]]]),
        ("sixteen.tif", sixteen, [[[0, 1, 100, 255, 0, 1]]]),
        ("integers.tif", of("I", 0, 65535).save, [[[0, 255]]]),
        ("cmyk.tif", of("CMYK", (0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 255, 0)).save, row(WHITE, CYAN, RED)),
        ("palette.png", palette(False), row(RED, CYAN)),
        ("clear.png", palette(True), row(RED, WHITE)),
        ("bits.png", of("1", 0, 255).save, [[[0, 255]]]),
        ("two.gif", animation, row(RED)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_mode_becomes_grey_or_colours(
    tmp_path: Path, name: str, save: Callable[[Path], None], expected: object
) -> None:
    save(tmp_path / name)
    assert levels(tmp_path) == expected


def test_a_cmyk_jpeg_of_adobe_is_not_inverted(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=100)
    first = np.array(levels(tmp_path))[:, 0, 0]
    assert np.abs(first - CYAN).max() <= 2


def test_a_camera_held_upright_gives_an_upright_picture(tmp_path: Path) -> None:
    """Orientation 6: what is stored as rows is to be turned clockwise by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.array([[1, 2, 3], [4, 5, 6]], np.uint8)).save(tmp_path / "a.png", exif=exif)
    assert levels(tmp_path) == [[[4, 1], [5, 2], [6, 3]]]


@pytest.mark.parametrize(
    ("save", "reason"),
    [
        (of("F", 0.5).save, "has floating-point pixels, of which nothing says what is white"),
        (of("I", -1, 70000).save, "has integers of -1 to 70000, which are no 16 bits"),
    ],
)
def test_pictures_without_a_known_white_are_refused(tmp_path: Path, save: Callable[[Path], None], reason: str) -> None:
    save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=rf"^1 of 1 images cannot be read: a.tif \({reason}\)"):
        open_images(tmp_path, cache=False)


def test_grey_among_colours_has_three_channels_and_colours_made_grey_one(tmp_path: Path) -> None:
    of("L", 50).save(tmp_path / "a.png")
    of("RGB", (255, 0, 0)).save(tmp_path / "b.png")
    both = torch.tensor([0, 1])
    mixed = open_images(tmp_path, cache=False)
    x0, _ = mixed.batch(both)
    assert mixed.shape == (3, 1, 1)
    assert ((x0 + 1) * 127.5).round().flatten(1).tolist() == [[50, 50, 50], [255, 0, 0]]
    grey, _ = open_images(tmp_path, cache=False, channels=1).batch(both)
    # 0.299 of red (BT.601): 76.2
    assert ((grey + 1) * 127.5).round().flatten().tolist() == [50, 76]
    (tmp_path / "b.png").unlink()
    assert open_images(tmp_path, cache=False).shape == (1, 1, 1)
    assert open_images(tmp_path, cache=False, channels=3).shape == (3, 1, 1)


def test_resizing_averages_what_it_takes_together(tmp_path: Path) -> None:
    """A chequerboard of single pixels is grey at half its size; the ends of its range stay within it."""
    board = (np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "a.png")
    small = np.array(levels(tmp_path, size=8))
    assert small.shape == (1, 8, 8)
    assert np.abs(small[:, 2:-2, 2:-2] - 127.5).max() < 1
    assert small.min() >= 0


@pytest.mark.parametrize("size", [6, 20])
def test_pictures_arrays_and_floats_are_resized_alike_and_as_torch_does(tmp_path: Path, size: int) -> None:
    """Torch's antialiased bicubic of the same filter, in floating point: a level of rounding apart."""
    values = np.random.default_rng(0).integers(60, 196, (3, 9, 13), dtype=np.uint8)
    Image.fromarray(values.transpose(1, 2, 0)).save(tmp_path / "a.png")
    x = torch.from_numpy(values)[None].float() / 127.5 - 1
    width = round(13 * size / 9)
    theirs = functional.interpolate(x, (size, width), mode="bicubic", antialias=True)
    left = (width - size) // 2
    expected = theirs[..., left : left + size]
    picture, array, floats = (
        open_images(source, size=size, cache=False).batch(torch.tensor([0]))[0]
        for source in (tmp_path, values[None], x)
    )
    assert torch.equal(picture, array)
    for found, level in ((picture, 1.01), (floats, 0.02)):
        assert float((found - expected).abs().max()) <= level / 127.5
    random = open_images(x, size=size, crop="random", cache=False)
    cut, _ = random.batch(torch.zeros(20, dtype=torch.int64), torch.arange(20))
    windows = floats.new_tensor(np.lib.stride_tricks.sliding_window_view(theirs.numpy(), size, 3)[0]).permute(
        2, 0, 1, 3
    )
    nearest = (cut[:, None] - windows[None]).abs().amax((2, 3, 4)).amin(1)
    assert float(nearest.max()) <= 0.02 / 127.5
