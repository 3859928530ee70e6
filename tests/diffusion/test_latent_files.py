"""A diffusion in latents in a folder: its autoencoder beside it, once, known by its hash; old files without one."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.diffusion_cases import small_unet
from helpers.latent_cases import latent_diffusion, small_autoencoder, some_images
from torch import nn

from diffkern import Diffusion, schedules
from diffkern.diffusion.previews import Preview


def made(diffusion: Diffusion) -> torch.Tensor:
    return diffusion.sample(2, "ddim", steps=2, seeds=0)


def test_it_comes_back_with_its_autoencoder_and_its_previews(tmp_path: Path) -> None:
    diffusion = latent_diffusion()
    diffusion.fit_preview(some_images())
    diffusion.save_pretrained(tmp_path)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
    inside = {f"autoencoder/{name}" for name in ("config.json", "model.safetensors", "preview.json")}
    assert files == {"config.json", "model.safetensors"} | inside
    found = json.loads((tmp_path / "config.json").read_text())["autoencoder"]
    assert found == {"name": "Autoencoder", "hash": diffusion.autoencoder_hash()}
    again = Diffusion.from_pretrained(tmp_path)
    assert again.to_dict() == diffusion.to_dict()
    assert again.preview_map == diffusion.preview_map
    assert torch.equal(made(again), made(diffusion))
    assert not any(p.requires_grad for p in again.autoencoder.parameters())  # type: ignore[union-attr]
    again.save_pretrained(tmp_path)  # over itself
    half = Diffusion.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    with pytest.raises(
        ValueError, match=r"autoencoder must hold the diffusion's autoencoder, of the hash \w+, got \w+"
    ):
        half.save_pretrained(tmp_path)
    half.save_pretrained(tmp_path / "half")
    assert Diffusion.from_pretrained(tmp_path / "half").autoencoder_hash() == half.autoencoder_hash()


def test_without_one_the_file_is_that_of_earlier_versions(tmp_path: Path) -> None:
    diffusion = Diffusion(small_unet(), schedules.cosine(20), "v")
    assert "autoencoder" not in diffusion.to_dict()
    diffusion.save_pretrained(tmp_path)
    assert Diffusion.from_pretrained(tmp_path).autoencoder is None
    with pytest.raises(ValueError, match=r"autoencoder must be left out, as the model of .* is of images"):
        Diffusion.from_pretrained(tmp_path, autoencoder=small_autoencoder())


def test_a_checkpoint_finds_it_in_the_folder_of_its_run(tmp_path: Path) -> None:
    diffusion = latent_diffusion()
    checkpoint = tmp_path / "run" / "checkpoints" / "00000001"
    diffusion.save_pretrained(checkpoint, autoencoder=False)
    assert not (checkpoint / "autoencoder").exists()
    with pytest.raises(
        FileNotFoundError, match=r"there is no autoencoder in .* nor beside its run, of the model's hash"
    ):
        Diffusion.from_pretrained(checkpoint)
    given = Diffusion.from_pretrained(checkpoint, autoencoder=small_autoencoder())
    assert torch.equal(made(given), made(diffusion))
    diffusion.save_autoencoder(tmp_path / "run")
    for path in (checkpoint, tmp_path / "run"):
        assert torch.equal(made(Diffusion.from_pretrained(path)), made(diffusion))


def test_another_autoencoder_is_refused(tmp_path: Path) -> None:
    diffusion = latent_diffusion()
    diffusion.save_pretrained(tmp_path / "a")
    sentence = r"autoencoder must be the one that the network was trained with, of the hash \w+, got \w+"
    with pytest.raises(ValueError, match=sentence + r" \(given\)"):
        Diffusion.from_pretrained(tmp_path / "a", autoencoder=small_autoencoder(1))
    latent_diffusion(small_autoencoder(scale=1.0)).save_pretrained(tmp_path / "b")
    shutil.rmtree(tmp_path / "a" / "autoencoder")
    shutil.copytree(tmp_path / "b" / "autoencoder", tmp_path / "a" / "autoencoder")
    with pytest.raises(ValueError, match=sentence):
        Diffusion.from_pretrained(tmp_path / "a")


def test_the_hash_is_of_what_decides_numbers() -> None:
    def found(**fields: Any) -> str | None:
        return latent_diffusion(small_autoencoder(**fields)).autoencoder_hash()

    own = found()
    assert own == found() == found(attention="torch") == found(image_size=None)
    assert len({own, found(scale=1.25), found(shift=0.0), found(seed=1), found(eps=1e-5)}) == 5
    diffusion = latent_diffusion()
    assert diffusion.autoencoder_hash() == own
    assert diffusion.to(memory_format=torch.channels_last).autoencoder_hash() == own
    autoencoder: Any = diffusion.autoencoder
    with torch.no_grad():
        next(autoencoder.parameters()).add_(1e-3)
    assert diffusion.autoencoder_hash() != own
    assert latent_diffusion().to(torch.float64).autoencoder_hash() != own


class Own(nn.Module):
    """An autoencoder of a user's."""

    factor = 2

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def latents(self, x: torch.Tensor, seeds: Any = None) -> torch.Tensor:
        return nn.functional.avg_pool2d(x, 2).expand(-1, 2, -1, -1)[:, :2] * self.one

    def images(self, latents: torch.Tensor) -> torch.Tensor:
        return latents.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (2, shape[1] // 2, shape[2] // 2)


def test_one_of_ones_own_is_named_and_has_to_be_given(tmp_path: Path) -> None:
    diffusion = latent_diffusion(Own())
    diffusion.fit_preview(some_images(2, shape=(1, 16, 16)))
    diffusion.save_pretrained(tmp_path)
    assert not (tmp_path / "autoencoder").exists()
    with pytest.raises(FileNotFoundError, match=r"from_pretrained\(path, autoencoder=...\)"):
        Diffusion.from_pretrained(tmp_path)
    assert torch.equal(made(Diffusion.from_pretrained(tmp_path, autoencoder=Own())), made(diffusion))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "preview.json must be JSON"),
        ('{"weights": [[1.0, 2.0]]}', "bias must be given"),
        ('{"weights": [[1.0, 2.0]], "bias": [0.0, 1.0]}', "preview must have a row of weights and a bias"),
        ('{"weights": [["a"]], "bias": [0.0]}', r"weights\[0\]\[0\] must be a finite number"),
    ],
)
def test_a_map_of_previews_that_is_none_is_said(tmp_path: Path, text: str, sentence: str) -> None:
    latent_diffusion().save_pretrained(tmp_path)
    (tmp_path / "autoencoder" / "preview.json").write_text(text)
    with pytest.raises(ValueError, match=sentence):
        Diffusion.from_pretrained(tmp_path)


def test_a_map_is_read_as_it_was_written(tmp_path: Path) -> None:
    preview = Preview(((0.1, -1e-17), (1 / 3, 2.0)), (0.5, -7.0))
    preview.save(tmp_path / "preview.json")
    assert Preview.load(tmp_path / "preview.json") == preview


def test_a_repository_has_it_in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion, asked = latent_diffusion(), []
    diffusion.save_pretrained(tmp_path)
    (tmp_path / "autoencoder").rename(tmp_path / "elsewhere")  # as a cache that has not fetched it yet

    def hf_hub_download(repository: str, name: str, **options: Any) -> str:
        asked.append((repository, name, options))
        folder, _, file = name.rpartition("/")
        return str(tmp_path / ("elsewhere" if folder else "") / file)

    hub = types.SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)  # type: ignore[arg-type]
    back = Diffusion.from_pretrained("owner/digits", revision="main")
    assert torch.equal(made(back), made(diffusion))
    names = ("config.json", "model.safetensors", "autoencoder/config.json", "autoencoder/model.safetensors")
    assert asked == [("owner/digits", name, {"revision": "main"}) for name in names]
