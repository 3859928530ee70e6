"""A diffusion in the latents of an autoencoder: loss, sampling, image to image, inpainting, likelihood, previews."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from helpers.diffusion_cases import small_unet
from helpers.latent_cases import IMAGE, LATENT, latent_diffusion, small_autoencoder, some_images
from torch import Tensor, nn

from diffkern import Diffusion, ddim, ops, schedules, streams
from diffkern.diffusion.previews import Preview, fit_preview


class Halves(nn.Module):
    """A stand-in with what a diffusion asks of an autoencoder alone: the mean of 2 x 2, and repetition."""

    factor = 2

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def latents(self, x: Tensor, seeds: Any = None) -> Tensor:
        return nn.functional.avg_pool2d(x, 2) * self.one

    def images(self, latents: Tensor) -> Tensor:
        return latents.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0], shape[1] // 2, shape[2] // 2)


def of_halves() -> Diffusion:
    """Three channels on both sides: shapes alone tell images from latents."""
    network = small_unet(channels=8, groups=4, heads=1, embedding=16, multipliers=(1, 1), in_channels=3, out_channels=3)
    return Diffusion(network, schedules.cosine(20), "v", autoencoder=Halves())


# ------------------------------------------------------------------------------------------------------------- frozen


def test_the_autoencoder_is_frozen_whatever_is_switched() -> None:
    diffusion = latent_diffusion()
    autoencoder = diffusion.autoencoder
    assert autoencoder is not None
    for switched in (diffusion.train(), diffusion.requires_grad_(True)):
        assert switched is diffusion
        assert not any(inside.training for inside in autoencoder.modules())
        assert not any(p.requires_grad for p in autoencoder.parameters())
    assert diffusion.model.training
    assert all(p.requires_grad for p in diffusion.model.parameters())
    before = copy.deepcopy(autoencoder.state_dict())
    optimizer = torch.optim.AdamW(diffusion.parameters(), lr=0.1, weight_decay=0.1)
    diffusion.loss(some_images(), seeds=0, cond=torch.tensor([0, 1, 2, 0])).backward()
    optimizer.step()
    for name, tensor in autoencoder.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    diffusion.model.requires_grad_(False)
    diffusion.to(torch.float64)
    assert next(autoencoder.parameters()).dtype == torch.float64


def test_the_state_dict_is_that_of_the_network_and_loads_strictly() -> None:
    diffusion, other = latent_diffusion(), latent_diffusion()
    state = diffusion.state_dict()
    assert {name.partition(".")[0] for name in state} == {"model", "null"}
    with torch.no_grad():
        for p in other.model.parameters():
            p.add_(1.0)
    assert other.load_state_dict(state).missing_keys == []
    assert all(torch.equal(t, state[name]) for name, t in other.state_dict().items())
    del state["null"]
    with pytest.raises(RuntimeError, match="null"):
        other.load_state_dict(state)
    wrapped = nn.ModuleDict({"inside": diffusion})
    assert not [name for name in wrapped.state_dict() if "autoencoder" in name]
    wrapped.load_state_dict(wrapped.state_dict())
    assert not [name for name in copy.deepcopy(diffusion).state_dict() if "autoencoder" in name]


def test_a_diffusion_without_one_is_as_ever() -> None:
    diffusion = Diffusion(small_unet(), schedules.cosine(20), "v")
    x = some_images(2, shape=(1, 8, 8))
    assert diffusion.image_shape == diffusion.shape == (1, 8, 8)
    assert diffusion.encode(x) is x
    assert diffusion.decode(x) is x
    assert diffusion.autoencoder_hash() is None
    assert torch.equal(diffusion.preview(3.0 * x), (3.0 * x).clamp(-1, 1))
    with pytest.raises(ValueError, match="fit_preview needs a Diffusion with an autoencoder, got one without"):
        diffusion.fit_preview(x)


# --------------------------------------------------------------------------------------------------------------- loss


def test_the_loss_of_images_is_that_of_their_latents_by_address() -> None:
    diffusion, x0, seeds = latent_diffusion(), some_images(), ops.seeds(3, 4)
    autoencoder: Any = diffusion.autoencoder
    posterior = autoencoder.encode(x0)
    n = ops.randn([4, *LATENT], seeds, streams.POSTERIOR)
    latents = (posterior.mean + torch.exp(0.5 * posterior.logvar) * n - 0.25) * 1.5  # its shift and its scale
    torch.testing.assert_close(diffusion.encode(x0, seeds), latents, rtol=1e-5, atol=1e-6)
    assert (diffusion.encode(x0, seeds) - diffusion.encode(x0)).abs().max() > 0.01
    losses = diffusion.loss(x0, seeds=seeds, reduction="none")
    plain = Diffusion(diffusion.model, diffusion.schedule, "v")
    expected = plain.loss(diffusion.encode(x0, seeds), seeds=seeds, reduction="none")
    assert torch.equal(losses, expected)
    assert torch.equal(losses, diffusion.loss(diffusion.encode(x0, seeds), seeds=seeds, reduction="none"))
    alone = torch.cat([diffusion.loss(x0[i : i + 1], seeds=seeds[i : i + 1], reduction="none") for i in range(4)])
    torch.testing.assert_close(losses, alone, rtol=1e-4, atol=1e-5)


def test_the_encoder_is_not_under_autocast_and_takes_no_gradient() -> None:
    diffusion, x0 = latent_diffusion(), some_images()
    expected = diffusion.encode(x0)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(diffusion.encode(x0), expected)
    x0.requires_grad_(True)
    diffusion.loss(x0, seeds=0).backward()
    assert x0.grad is None


def test_where_both_have_as_many_channels_the_shape_says_which() -> None:
    diffusion = of_halves()
    assert (diffusion.shape, diffusion.image_shape) == ((3, 8, 8), (3, 16, 16))
    images, latents = some_images(2, shape=(3, 16, 16)), some_images(2, shape=(3, 8, 8))
    assert torch.equal(diffusion.encode(images), nn.functional.avg_pool2d(images, 2))
    assert diffusion.encode(latents) is latents
    large = some_images(2, shape=(3, 32, 32))
    with pytest.raises(ValueError, match=r"x0 must be images \[B, 3, H, W\] or latents .* got \[2, 3, 32, 32\]"):
        diffusion.encode(large)
    assert diffusion.encode(large, latents=True) is large
    assert diffusion.encode(large, latents=False).shape == (2, 3, 16, 16)
    assert torch.isfinite(diffusion.loss(latents, seeds=0, latents=True))


def test_the_range_that_is_looked_at_is_that_of_the_latents() -> None:
    loud = latent_diffusion(small_autoencoder(scale=100.0))
    with pytest.warns(UserWarning, match="root mean square"):
        loud.loss(some_images(), seeds=0)
    with pytest.raises(ValueError, match="x0 must be floating point"):
        latent_diffusion().loss(torch.zeros(2, *IMAGE, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("autoencoder", "fields", "sentence"),
    [
        (nn.Linear(1, 1), {}, "autoencoder must be a diffkern.nn.Autoencoder or a .* got Linear without latents"),
        ("folder", {}, "autoencoder must be a diffkern.nn.Autoencoder or a module .* got str"),
        (None, {"in_channels": 3}, r"model must take latents of the shape \[2, 8, 8\], .* got \[3, 8, 8\]"),
    ],
)
def test_what_is_no_autoencoder_of_the_network_is_refused(autoencoder: Any, fields: Any, sentence: str) -> None:
    network = small_unet(**{"channels": 8, "groups": 4, "heads": 1, "in_channels": 2, **fields})
    with pytest.raises(ValueError, match=sentence):
        Diffusion(network, schedules.cosine(20), "v", autoencoder=autoencoder or small_autoencoder())


# ----------------------------------------------------------------------------------------------------------- sampling


def test_samples_are_decoded_unless_latents_are_asked_for() -> None:
    diffusion = latent_diffusion()
    autoencoder: Any = diffusion.autoencoder
    latents = diffusion.sample(3, "ddim", steps=3, seeds=5, decode=False)
    assert latents.shape == (3, *LATENT)
    images = diffusion.sample(3, "ddim", steps=3, seeds=5)
    assert torch.equal(images, autoencoder.images(latents))
    seen: list[Tensor] = []
    found = diffusion.sample(
        3, "ddim", steps=3, seeds=5, trajectory=True, callback=lambda info: seen.append(info["x"].clone())
    )
    assert found.trajectory is not None
    assert found.trajectory.shape == (4, 3, *LATENT)
    assert torch.equal(found.x, images)
    assert torch.equal(seen[-1], latents)
    assert torch.equal(found.trajectory[-1], latents)
    larger = diffusion.sample((2, 2, 12, 8), "ddim", steps=2, seeds=0)
    assert larger.shape == (2, 1, 24, 16)
    guided = diffusion.sample(2, "ddim", steps=2, seeds=0, cond=torch.tensor([0, 1]), guidance=2.0)
    assert guided.shape == (2, *IMAGE)
    assert diffusion.sample(2, "ddim", steps=2, seeds=0, dtype=torch.float64).dtype == torch.float64


def test_large_images_are_decoded_in_tiles_as_the_autoencoder_is_set() -> None:
    diffusion = latent_diffusion()
    autoencoder: Any = diffusion.autoencoder
    latents = diffusion.sample((1, 2, 24, 24), "ddim", steps=2, seeds=0, decode=False)
    whole = diffusion.decode(latents)
    autoencoder.set_tiles(32, 8)
    tiled = diffusion.sample((1, 2, 24, 24), "ddim", steps=2, seeds=0)
    assert torch.equal(tiled, diffusion.decode(latents))
    assert tiled.shape == whole.shape == (1, 1, 48, 48)
    assert not torch.equal(tiled, whole)


def test_image_to_image_starts_from_encoded_images() -> None:
    diffusion, x0 = latent_diffusion(), some_images(2)
    common: dict[str, Any] = {"sampler": "ddim", "steps": 4, "seeds": 1, "start": 2, "decode": False}
    latents = diffusion.encode(x0)
    assert torch.equal(diffusion.sample(2, x0=x0, **common), diffusion.sample(2, x0=latents, **common))
    end = diffusion.sample(2, x0=x0, **{**common, "start": 3})
    assert (end - latents).abs().mean() < (diffusion.sample(2, **{**common, "start": 0}) - latents).abs().mean()


@pytest.mark.parametrize("kind", [torch.float32, torch.bool, torch.uint8])
def test_inpainting_brings_known_and_mask_to_the_latents(kind: torch.dtype) -> None:
    diffusion, known = latent_diffusion(), some_images(2)
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, :, 5, 7] = 1.0  # one pixel, so its place
    mask[1, :, 3:9, 2:12] = 1.0
    expected = np.zeros((2, 1, 8, 8))
    for b, y, x in np.argwhere(mask[:, 0].numpy() > 0):
        expected[b, 0, y // 2, x // 2] = 1.0
    given = mask.to(kind) if kind != torch.uint8 else (mask * 255).to(kind)
    small = torch.from_numpy(expected).float()
    common: dict[str, Any] = {"sampler": "ddim", "steps": 4, "seeds": 1, "decode": False}
    found = diffusion.sample(2, mask=given, known=known, **common)
    latents = diffusion.encode(known)
    assert torch.equal(found, diffusion.sample(2, mask=small, known=latents, **common))
    kept = small.expand_as(found) == 0
    torch.testing.assert_close(found[kept], latents[kept], rtol=1e-5, atol=1e-5)
    assert (found - latents)[~kept].abs().max() > 0.01
    whole = given.expand(2, 1, 16, 16)
    assert torch.equal(found, diffusion.sample(2, mask=whole, known=known, **common))


def test_a_soft_mask_of_colours_is_its_largest_value_and_a_wrong_size_is_refused() -> None:
    diffusion, known = of_halves(), some_images(1, shape=(3, 16, 16))
    mask = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    blocks = mask.numpy().reshape(3, 8, 2, 8, 2).max((0, 2, 4))
    common: dict[str, Any] = {"sampler": "ddim", "steps": 2, "seeds": 1, "decode": False}
    found = diffusion.sample(1, mask=mask, known=known, **common)
    small = torch.from_numpy(blocks)[None, None]
    assert torch.equal(found, diffusion.sample(1, mask=small, known=diffusion.encode(known), **common))
    with pytest.raises(
        ValueError, match=r"mask must have the size of the images or of the latents, .* \[1, 1, 12, 16\]"
    ):
        diffusion.sample(1, mask=torch.ones(1, 1, 12, 16), known=known, **common)


def test_likelihoods_are_of_latents() -> None:
    diffusion = Diffusion(latent_diffusion().model, schedules.vp(), "v", autoencoder=small_autoencoder())
    x0 = some_images(1)
    options: dict[str, Any] = {"solver": "euler", "steps": 2, "seeds": 0}
    found = diffusion.log_likelihood(x0, **options)
    assert torch.equal(found.nats, diffusion.log_likelihood(diffusion.encode(x0), **options).nats)


# ----------------------------------------------------------------------------------------------------------- previews


def test_a_preview_is_the_linear_map_of_least_squares() -> None:
    autoencoder, images = small_autoencoder(), some_images(12)
    preview = fit_preview(autoencoder, images)
    with torch.no_grad():
        z = autoencoder.latents(images).double().numpy()
    small = images.double().numpy().reshape(12, 1, 8, 2, 8, 2).mean((3, 5))
    rows = np.concatenate([z.transpose(0, 2, 3, 1).reshape(-1, 2), np.ones((12 * 64, 1))], 1)
    solved = np.linalg.solve(rows.T @ rows, rows.T @ small.reshape(-1, 1))
    np.testing.assert_allclose(np.array(preview.weights)[0], solved[:2, 0], rtol=1e-6)
    np.testing.assert_allclose(preview.bias, solved[2], rtol=1e-6)
    shown = preview(torch.from_numpy(z).float()).numpy()
    expected = np.clip((rows @ solved).reshape(12, 8, 8, 1).transpose(0, 3, 1, 2), -1, 1)
    np.testing.assert_allclose(shown, expected, rtol=1e-4, atol=1e-5)


def test_a_preview_recovers_a_linear_decoder_and_serves_as_a_callback() -> None:
    diffusion, images = of_halves(), 0.9 * some_images(3, shape=(3, 16, 16))
    with pytest.raises(ValueError, match="preview needs a map that was fitted, got none"):
        diffusion.preview(torch.zeros(1, 3, 8, 8))
    diffusion.fit_preview(images)
    latents = nn.functional.avg_pool2d(images, 2)
    torch.testing.assert_close(diffusion.preview(latents), latents, rtol=0, atol=1e-5)
    frames: list[Tensor] = []
    diffusion.sample(
        2,
        "ddim",
        steps=3,
        seeds=0,
        callback=lambda info: frames.append(diffusion.preview(info)),  # type: ignore[arg-type]
    )
    assert [frame.shape for frame in frames] == [(2, 3, 8, 8)] * 3
    last = diffusion.sample(2, "ddim", steps=3, seeds=0, decode=False)
    torch.testing.assert_close(frames[-1], last.clamp(-1, 1), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match=r"latents must be \[B, 3, h, w\], got \[2, 4, 8, 8\]"):
        diffusion.preview(torch.zeros(2, 4, 8, 8))


def test_a_map_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="preview must have a row of weights and a bias for each channel"):
        Preview(((1.0, 2.0), (1.0,)), (0.0, 0.0))
    with pytest.raises(ValueError, match="preview must have finite weights"):
        Preview(((float("inf"),),), (0.0,))


def test_other_samplers_and_plans_run_in_latents() -> None:
    diffusion = latent_diffusion()
    plan = ddim(diffusion.schedule, 3, prediction="v")
    assert torch.equal(diffusion.sample(1, plan, seeds=0), diffusion.sample(1, "ddim", steps=3, seeds=0))
    assert diffusion.sample(1, "dpmpp_2m", steps=3, seeds=0).shape == (1, *IMAGE)


@pytest.mark.full
def test_the_loss_of_images_is_one_graph() -> None:
    diffusion, x0 = latent_diffusion().eval(), some_images()
    compiled = torch.compile(diffusion, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x0, seeds=ops.seeds(0, 4)), diffusion.loss(x0, seeds=ops.seeds(0, 4)))


def test_a_preview_of_no_images_and_of_no_numbers_is_refused() -> None:
    x = some_images(2)
    with pytest.raises(ValueError, match="images must be at least one, got none"):
        fit_preview(small_autoencoder(), x[:0])
    with pytest.raises(ValueError, match="images must be finite, and their latents too, got others"):
        fit_preview(small_autoencoder(), x * float("nan"))
