"""Degradations in latents: images are degraded, the input is encoded, a mask comes to the latents' grid."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.diffusion_cases import small_unet
from helpers.latent_cases import TINY, small_autoencoder, some_images
from helpers.tiny_run import TINY as RUN
from torch.nn import functional as F

from diffkern import Diffusion, ops, schedules
from diffkern.degradations import Colourisation, Deblurring, Degradation, Inpainting, SuperResolution
from diffkern.nn import PRESETS, Autoencoder, UNet, UNetConfig
from diffkern.train import fit, make_diffusion

SEEDS = ops.seeds(2, 3)
X0 = some_images(3)
NINE = {"in_channels": 4, "out_channels": 4, "concat_channels": 5}


def made(degradation: Degradation, autoencoder: Autoencoder | None = None, **fields: Any) -> Diffusion:
    config = {**TINY, "out_channels": 2, "zero_init": False, **fields}
    encoder = small_autoencoder() if autoencoder is None else autoencoder
    return Diffusion(small_unet(**config), schedules.cosine(20), "v", autoencoder=encoder, degradation=degradation)


def test_inpainting_has_the_nine_channels_of_stable_diffusion() -> None:
    """x_t, the mask, and the latents of the image whose hidden pixels are 0."""
    autoencoder = small_autoencoder(in_channels=3, latent_channels=4)
    degradation = Inpainting("brush", 0.1)
    diffusion = made(degradation, autoencoder, **NINE)
    first = next(p for p in diffusion.model.parameters() if p.ndim == 4)
    assert first.shape[1] == 9
    x0 = some_images(3, shape=(3, 16, 16))
    hidden = degradation.masks(x0.shape, SEEDS)
    image = diffusion.eval().condition(x0, None, SEEDS)["image"]
    assert image.shape == (3, 5, 8, 8)
    small = hidden.reshape(3, 8, 2, 8, 2).any(4).any(2)
    assert torch.equal(image[:, 0], small.float())
    assert bool(small.float().mean() > hidden.float().mean())
    latents = autoencoder.latents(x0.masked_fill(hidden[:, None], 0.0))
    torch.testing.assert_close(image[:, 1:], latents, rtol=1e-5, atol=1e-6)


def test_the_loss_is_of_latents_beside_the_input() -> None:
    diffusion = made(Inpainting("box", 0.3), concat_channels=3).eval()
    t = torch.tensor([1, 9, 17])
    found = diffusion.loss(X0, t, seeds=SEEDS, reduction="none")
    image = diffusion.condition(X0, None, SEEDS)["image"]
    plain = Diffusion(diffusion.model, diffusion.schedule, "v")
    network = plain.model.forward
    expected = []
    for i in range(3):
        plain.model.forward = lambda x, t, i=i: network(x, t, {"image": image[i : i + 1]})  # type: ignore[method-assign]
        latents = diffusion.encode(X0[i : i + 1], SEEDS[i : i + 1])
        expected.append(plain.loss(latents, t[i : i + 1], seeds=SEEDS[i : i + 1]))
    plain.model.forward = network  # type: ignore[method-assign]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"x0 must be images where they are degraded, got latents \[3, 2, 8, 8\]"):
        diffusion.loss(diffusion.encode(X0), seeds=SEEDS)


@pytest.mark.parametrize(
    ("degradation", "channels", "upsample"),
    [
        (Deblurring(1.0), 2, None),
        (SuperResolution(2), 1, "bilinear"),  # as large as the latents: seen as it is
        (SuperResolution(4), 1, "bilinear"),
    ],
    ids=["deblurring", "twice", "four times"],
)
def test_inputs_are_encoded_unless_they_are_no_larger_than_latents(
    degradation: Degradation, channels: int, upsample: str | None
) -> None:
    diffusion = made(degradation, concat_channels=channels, concat_upsample=upsample).eval()
    y = degradation.degrade(X0, SEEDS)
    seen = diffusion.condition(X0, None, SEEDS)["image"]
    expected = y if upsample else diffusion.encode(y)
    torch.testing.assert_close(seen, expected)
    samples = diffusion.sample(3, "ddim", steps=2, seeds=SEEDS, image=y)
    assert samples.shape == X0.shape
    other = diffusion.sample(3, "ddim", steps=2, seeds=SEEDS, image=-y)
    assert not torch.allclose(samples, other)
    one = diffusion.sample(1, "ddim", steps=2, seeds=SEEDS[1:2], image=y[1:2])
    torch.testing.assert_close(one, samples[1:2], rtol=1e-4, atol=1e-5)


def test_a_small_factor_and_grey_images_are_brought_to_the_image_and_encoded() -> None:
    eight = small_autoencoder(in_channels=3, multipliers=(1, 1, 1))
    x0 = some_images(2, shape=(3, 16, 16))
    for degradation in (SuperResolution(2), Colourisation()):
        y = degradation.degrade(x0, SEEDS[:2])
        large = F.interpolate(y, (16, 16)) if y.shape[1] == 3 else y.expand(-1, 3, -1, -1)
        diffusion = made(degradation, eight, concat_channels=2).eval()
        torch.testing.assert_close(diffusion.condition(x0, None, SEEDS[:2])["image"], eight.latents(large))
        assert diffusion.sample(2, "ddim", steps=2, seeds=0, image=y).shape == x0.shape


def test_a_network_without_the_place_is_refused() -> None:
    with pytest.raises(ValueError, match="model must have concat_channels = 3 for the image of Inpainting, got 2"):
        made(Inpainting(), concat_channels=2)
    with pytest.raises(ValueError, match="model must have concat_channels = 2 for the image of Deblurring, got 0"):
        made(Deblurring())


@pytest.mark.full
@pytest.mark.parametrize("name", ["inpainting", "super_resolution", "deblurring"])
def test_a_run_trains_draws_and_comes_back(tmp_path: Path, name: Any) -> None:
    small_autoencoder().save_pretrained(tmp_path / "autoencoder")
    options: dict[str, Any] = {"latents": str(tmp_path / "autoencoder"), "degradation": name, "cache": str(tmp_path)}
    config = dataclasses.replace(RUN, **options, iterations=2, sample_every=2, sample_n=10, validation=2)
    images = ((X0.repeat(3, 1, 1, 1) + 1) * 127.5).to(torch.uint8)
    fitted = fit(None, images, config, out=tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "samples" / "00000002.png").is_file()
    found = Diffusion.from_pretrained(tmp_path / "run")
    assert found.degradation == fitted.diffusion.degradation
    assert found.degradation is not None
    y = found.degradation.degrade(X0, SEEDS)
    assert found.sample(3, "ddim", steps=2, seeds=0, image=y).shape == X0.shape


def test_a_diffusion_of_latents_that_is_given_images_takes_its_network_from_both() -> None:
    config = dataclasses.replace(RUN, degradation="inpainting")
    diffusion = make_diffusion(config, (1, 16, 16), autoencoder=small_autoencoder())
    network: Any = diffusion.model.config
    assert (network.in_channels, network.concat_channels) == (2, 3)
    assert diffusion.image_shape == (1, 16, 16)


@pytest.mark.full
@pytest.mark.parametrize(("network", "vae", "size"), [("sd-1", "sd-vae", 512), ("sdxl", "sdxl-vae", 1024)])
def test_published_shapes_fit_together(network: str, vae: str, size: int) -> None:
    """The nine channels of Stable Diffusion's inpainting, without weights."""
    config, encoder = PRESETS[network], PRESETS[vae]
    assert isinstance(config, UNetConfig)
    with torch.device("meta"):
        unet, autoencoder = UNet(dataclasses.replace(config, concat_channels=5)), Autoencoder(encoder)  # type: ignore[arg-type]
    diffusion = Diffusion(unet, schedules.linear(), "eps", autoencoder=autoencoder, degradation=Inpainting())
    assert diffusion.image_shape == (3, size, size)
    assert diffusion.shape == (4, size // 8, size // 8)
    assert next(p for p in unet.parameters() if p.ndim == 4).shape[1] == 9
