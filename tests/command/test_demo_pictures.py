"""What the demo shows: pictures, grids, its table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.lazy import needs

from diffkern import pictures
from diffkern.demo.run import Line, markdown

pytestmark = needs("sklearn", "matplotlib", "PIL", "safetensors", "tqdm")


# ------------------------------------------------------------------------------------------------------------- pictures
def test_tiles_and_grids(tmp_path: Path) -> None:
    image = torch.full((1, 8, 8), -1.0)
    assert set(np.asarray(pictures.tile(image, ink=True)).reshape(-1).tolist()) == {255}
    image[0, 2:6, 2:6] = 1.0
    tile = np.asarray(pictures.tile(image, scale=4, ink=True))
    assert tile.shape == (40, 40)
    assert tile[20, 20] < 40
    assert tile[0, 0] == 255
    picture = pictures.class_grid(
        image.expand(6, 1, 8, 8), torch.arange(3).repeat(2), "words above", columns=3, ink=True
    )
    pictures.write(picture, tmp_path / "new" / "grid.png")
    assert (tmp_path / "new" / "grid.png").stat().st_size > 0
    assert picture.size[0] > 3 * 80
    assert picture.size[1] > 2 * 80
    with pytest.raises(ValueError, match=r"image must have shape \(1, H, W\)"):
        pictures.tile(torch.zeros(2, 8, 8))
    with pytest.raises(ValueError, match="at least one image"):
        pictures.grid([])


def test_table_reads_as_markdown() -> None:
    lines = [
        Line("real digits", None, None, None, 0.9889, 1.3, 0.905, 0.917),
        Line("heun", 15, 29, 3.24, 0.995, 2.345, 0.8, 1.0),
    ]
    rows = markdown(lines).splitlines()
    cells = [cell.strip() for cell in rows[-1].split("|")[1:-1]]
    assert cells == ["heun", "15", "29", "3.2", "0.995", "2.35", "0.800", "1.000"]
    assert len({len(row) for row in rows}) == 1


def test_colour_tiles_show_the_image_as_it_is() -> None:
    red = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1).expand(3, 8, 8)
    tile = np.asarray(pictures.tile(red, scale=2))
    assert tile.shape == (20, 20, 3)
    assert tile[10, 10].tolist() == [255, 0, 0]
    grey = np.asarray(pictures.tile(torch.full((1, 8, 8), 1.0), scale=1))
    assert grey[5, 5] == 255  # white is 1 where nothing says ink
    assert pictures.grid([red.expand(2, 3, 8, 8)], title="colour").mode == "RGB"
