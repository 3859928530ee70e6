"""The autoencoder: shapes, the posterior, scales, tiles, numbers that overflow, files, graphs and sentences."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.autoencoder_cases import OPTIONS, config, images, model
from torch.nn import functional as F

from diffkern import ops, streams
from diffkern.nn import Autoencoder, AutoencoderConfig, Posterior, UNet, UNetConfig, freeze
from diffkern.nn.posterior import LOGVAR


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------------ shapes
@pytest.mark.parametrize("name", OPTIONS)
def test_images_go_to_latents_and_back(name: str) -> None:
    network = model(**OPTIONS[name])
    x = images()
    reconstruction, encoded = network(x, torch.arange(2))
    assert reconstruction.shape == x.shape
    assert reconstruction.is_contiguous()
    shape = network.latent_shape(x.shape)
    assert encoded.mode().shape == network.latents(x).shape == shape
    assert shape == (2, network.config.z_channels, 16 // network.factor, 12 // network.factor)
    network.set_scale(2.0, 0.25)
    torch.testing.assert_close(network.latents(x), (encoded.diffused() - 0.25) * 2.0)
    torch.testing.assert_close(network.images(network.latents(x)), network.decode(encoded.mode()), rtol=1e-4, atol=1e-5)
    reconstruction.square().mean().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None and p.requires_grad]
    assert without == (["quantiser.codes"] if "gradients" in name else [])
    assert network.last_layer is network.decoder.leave.weight


def test_channels_last_stays_and_says_the_same() -> None:
    network, x = model(), images()
    z = network.latents(x)
    last = x.to(memory_format=torch.channels_last)
    assert network.decode(z.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network.latents(last), z, rtol=0, atol=0)


def test_torchs_operators_say_the_same() -> None:
    network, x = model(attention_levels=(0, 1)), images()
    ours = network(x)[0]
    assert network.set_attention("torch").config.attention == "torch"
    torch.testing.assert_close(network(x)[0], ours, rtol=1e-4, atol=1e-5)


def test_checkpointed_blocks_have_the_same_gradients() -> None:
    network, x = model().train(), images()
    network(x)[0].square().mean().backward()
    expected = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    network.checkpointing = True
    network(x)[0].square().mean().backward()
    for p, grad in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=0)


def test_gradients_in_float64() -> None:
    network = model(channels=4, groups=2, middle_attention=False).double()
    x = images(1, 4, 4).double().requires_grad_()

    def value(x: torch.Tensor) -> torch.Tensor:
        reconstruction, encoded = network(x, 3)
        return reconstruction.square().mean() + encoded.kl().mean()

    assert torch.autograd.gradcheck(value, (x,), eps=1e-6, atol=1e-6)


# --------------------------------------------------------------------------------------------------------- posterior
def test_kl_is_that_of_gaussians_by_numpy() -> None:
    mean, logvar = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5) * 2.0
    posterior = Posterior(mean, logvar)
    m, s = mean.double().numpy(), np.exp(0.5 * logvar.double().numpy())
    expected = (np.log(1.0 / s) + (s**2 + m**2) / 2.0 - 0.5).reshape(3, -1).sum(axis=1)
    np.testing.assert_allclose(posterior.kl().numpy(), expected, rtol=1e-5)
    assert Posterior(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1)).kl().item() == 0.0


def test_logvar_is_clamped() -> None:
    moments = torch.tensor([1.0, 2.0, -100.0, 100.0]).view(1, 4, 1, 1)
    posterior = Posterior.of(moments)
    assert posterior.mean.flatten().tolist() == [1.0, 2.0]
    assert posterior.logvar.flatten().tolist() == list(LOGVAR)
    assert math.isclose(float(posterior.std.max()), math.exp(10.0), rel_tol=1e-6)


def test_samples_are_by_address_whatever_the_batch() -> None:
    network, x = model(), images(3)
    seeds = torch.tensor([5, -7, 2**40])
    with torch.no_grad():
        posterior = network.encode(x)
        z = posterior.sample(seeds)
        normal = ops.randn(posterior.mean.shape, seeds, streams.POSTERIOR)
        torch.testing.assert_close(z, posterior.mean + torch.exp(0.5 * posterior.logvar) * normal)
        one = Posterior(posterior.mean[1:2], posterior.logvar[1:2]).sample(seeds[1:2])
    assert torch.equal(one, z[1:2])
    assert torch.equal(posterior.sample(9), posterior.sample(ops.seeds(9, 3)))
    for wrong in (seeds[:2], seeds.double(), [1, 2, 3]):
        with pytest.raises(ValueError, match=r"^seeds must be an integer or int64 \[3\], got"):
            posterior.sample(wrong)
    state = torch.get_rng_state()
    network(x, seeds)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------------------------------- scale
@pytest.mark.parametrize("channels", [False, True])
@pytest.mark.parametrize("center", [False, True])
def test_measured_scale_gives_mean_zero_and_deviation_one(channels: bool, center: bool) -> None:
    network, x = model(), images(5)
    scale, shift = network.measure_scale(x, batch=2, center=center, channels=channels)
    with torch.no_grad():
        z = network.encode(x).mean.double().numpy()
    axes = (0, 2, 3) if channels else None
    np.testing.assert_allclose(scale, 1.0 / z.std(axis=axes), rtol=1e-5)
    np.testing.assert_allclose(shift, z.mean(axis=axes) if center else 0.0 * z.mean(axis=axes), rtol=1e-4, atol=1e-6)
    assert network.set_scale(scale, shift).config.scale == scale
    if center:
        with torch.no_grad():
            made = network.latents(x).double()
        assert abs(float(made.mean())) < 1e-5
        assert abs(float(made.std(correction=0)) - 1.0) < 1e-5
    parts = network.measure_scale([x[:1], x[1:]], center=center, channels=channels)
    np.testing.assert_allclose(parts, (scale, shift), rtol=1e-5, atol=1e-6)


def test_scale_of_draws_and_of_nothing() -> None:
    network, x = model(), images(4)
    modes, draws = network.measure_scale(x), network.measure_scale(x, seeds=3, batch=3)
    assert modes != draws
    np.testing.assert_allclose(network.measure_scale(x, seeds=ops.seeds(3, 4)), draws, rtol=1e-6)
    with pytest.raises(ValueError, match=r"^images must be at least one, got none$"):
        network.measure_scale(x[:0])
    with pytest.raises(ValueError, match=r"^seeds must go with a tensor of images, got batches of them$"):
        network.measure_scale([x], seeds=1)
    with torch.no_grad():
        network.quant_conv.weight.zero_()
        network.quant_conv.bias.zero_()
    with pytest.raises(ValueError, match=r"^the latents of images must differ and be finite, got standard deviations"):
        network.measure_scale(x)


# ------------------------------------------------------------------------------------------------------------- tiles
def smooth(height: int, width: int) -> torch.Tensor:
    """An image like the same everywhere, so that a tile's norms are those of the whole."""
    i, j = torch.meshgrid(torch.arange(height) * 1.0, torch.arange(width) * 1.0, indexing="ij")
    return torch.stack([torch.sin(i * 1.1), torch.cos(j * 1.3), torch.sin(i * 0.9 + j * 0.7)])[None]


def without_statistics(network: Autoencoder) -> Autoencoder:
    for part in network.modules():
        if isinstance(part, torch.nn.GroupNorm):
            part.forward = lambda x: F.silu(x * 0.7)  # type: ignore[method-assign]
    return network


@pytest.mark.parametrize(("tile", "overlap", "most"), [(48, 16, 0.05), (64, 32, 0.001)])
def test_what_convolutions_miss_beyond_a_tile_is_hardly_seen(tile: int, overlap: int, most: float) -> None:
    network = without_statistics(model(middle_attention=False))
    x = smooth(96, 80)
    with torch.no_grad():
        z = network.encode(x).mean
        whole = network.decode(z)
        network.set_tiles(tile, overlap)
        assert float((network.decode(z) - whole).abs().max()) < most * float(whole.std())
        assert float((network.encode(x).mean - z).abs().max()) < most * float(z.std())


def test_tiled_images_differ_little_and_have_no_seams() -> None:
    network = model()
    x = smooth(96, 80)
    with torch.no_grad():
        z = network.encode(x).mean
        whole = network.decode(z)
        network.set_tiles(64, 32)
        difference = network.decode(z) - whole
        latents = network.encode(x).mean - z
        network.set_tiles(64, 0)
        cut = network.decode(z) - whole
    scale = float(whole.std())
    assert 0.0 < float(difference.abs().max()) < 0.6 * scale
    assert float(difference.std()) < 0.1 * scale
    assert float(latents.std()) < 0.1 * float(z.std())
    # a seam is where neighbours on either side of a border differ as they do not without tiles
    borders = [float(part[:, :, 31:33].diff(dim=2).abs().max()) for part in (difference, cut)]
    assert borders[0] < 0.25 * borders[1]


def test_ramps_add_up_to_one() -> None:
    from diffkern.nn.tiles import starts, weights

    for size, tile, overlap, scale in ((20, 8, 2, 1), (9, 8, 4, 3), (7, 8, 0, 2), (16, 8, 0, 1), (33, 8, 3, 2)):
        total, begins = np.zeros(scale * size), starts(size, tile, overlap)
        assert begins[0] == 0
        assert begins[-1] + min(tile, size) == size
        for begin, weight in zip(begins, weights(size, tile, overlap, scale), strict=True):
            assert (weight >= 0).all()
            total[scale * begin : scale * begin + len(weight)] += weight.numpy()
        np.testing.assert_allclose(total, 1.0, rtol=1e-12)


def test_tiles_and_slices_of_what_is_small_change_nothing() -> None:
    network, x = model(), images(3)
    with torch.no_grad():
        whole = network(x)[0]
        network.set_tiles(16).set_slices(2)
        assert network.overlap == 4
        torch.testing.assert_close(network(x)[0], whole, rtol=1e-5, atol=1e-6)
        network.set_tiles(None).set_slices(None)
        assert torch.equal(network(x)[0], whole)


# --------------------------------------------------------------------------------------------------------- overflows
def loud() -> Autoencoder:
    """A decoder whose residual sums grow beyond 65504, as those of SDXL's do."""
    network = model(middle_attention=False)
    with torch.no_grad():
        network.decoder.middle[0].conv2.weight.mul_(1e5)
    return network.eval()


def test_bfloat16_decodes_where_float16_overflows() -> None:
    network = loud()
    z = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = network.decode(z)
        found = network.to(torch.bfloat16).decode(z.bfloat16())
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()
    assert float((found.float() - expected).abs().mean()) < 0.05 * float(expected.std())


def test_float16_is_computed_in_float32_or_says_what_happened() -> None:
    network = loud()
    z = torch.randn(2, 4, 8, 8).half()
    with torch.no_grad():
        expected = network.half().float().decode(z.float())
        found = network.half().decode(z)
        torch.testing.assert_close(found, expected.half())
        assert found.dtype == torch.float16
        low = Autoencoder(config(middle_attention=False, upcast=False)).half().eval()
        low.load_state_dict(network.state_dict())
        words = r"^a float16 decoder must stay below 65504 inside, got images that are not finite: use autoencoder\.to"
        with pytest.raises(ValueError, match=words):
            low.decode(z)


# ------------------------------------------------------------------------------------------------------------- files
@pytest.mark.parametrize("name", ["none", "kl", "vq", "vq by gradients", "fsq"])
def test_saved_and_loaded_with_the_same_bits(name: str, tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    network = model(**OPTIONS[name]).set_scale(3.0, 0.5)
    network.save_pretrained(tmp_path)
    state = torch.get_rng_state()
    again = Autoencoder.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.config == network.config
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads(json.dumps(network.to_dict()))
    assert not again.training
    with torch.no_grad():
        assert torch.equal(again(images())[0], network.eval()(images())[0])


def test_an_average_and_a_dtype_come_back(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    network = model().bfloat16()
    other = {name: tensor * 0.5 for name, tensor in network.named_parameters()}
    network.save_pretrained(tmp_path)
    network.save_pretrained(tmp_path, other, "half")
    again = Autoencoder.from_pretrained(tmp_path, "half")
    assert again.last_layer.dtype == torch.bfloat16
    assert torch.equal(again.last_layer, network.last_layer * 0.5)
    with pytest.raises(ValueError, match=r"^average must be one of those in .* \(half\), got 'third'$"):
        Autoencoder.from_pretrained(tmp_path, "third")


def test_another_networks_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("safetensors")
    from diffkern.nn import stored

    network = UNet(UNetConfig(channels=8, blocks=1, heads=1))
    stored.save(network, {"diffkern_autoencoder": 1, "network": stored.network_data(network)}, tmp_path)
    with pytest.raises(ValueError, match=r"config\.json must be the configuration of an Autoencoder, got UNet$"):
        Autoencoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(network.config.to_dict()))
    with pytest.raises(ValueError, match=r"must be the configuration of an Autoencoder with diffkern_autoencoder = 1"):
        Autoencoder.from_pretrained(tmp_path)


# ------------------------------------------------------------------------------------------------------------ graphs
def test_frozen_convolutions_have_the_same_bits() -> None:
    network = model(channels=32, groups=8).eval()
    x = images(1, 32, 32)
    with torch.no_grad():
        expected = network(x)[0]
        with freeze(network) as frozen:
            assert torch.equal(network(x)[0], expected)
            assert frozen.bytes > 0


@pytest.mark.full
@pytest.mark.parametrize("name", ["kl", "vq", "fsq"])
def test_compiled_whole(name: str) -> None:
    torch._dynamo.reset()
    network = model(**OPTIONS[name]).eval()
    x = images()
    with torch.no_grad():
        z = network.latents(x)
        run = torch.compile(network.images, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(run(z), network.images(z), rtol=1e-4, atol=1e-5)
        both = torch.compile(network, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(both(x, torch.arange(2))[0], network(x, torch.arange(2))[0], rtol=1e-4, atol=1e-5)


class _Decoding(torch.nn.Module):
    def __init__(self, network: Autoencoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.network.images(latents)


@pytest.mark.full
@pytest.mark.parametrize("attention", ["diffkern", "torch"])
def test_decoding_is_exported_for_any_batch(attention: Any) -> None:
    network = model(attention=attention).eval()
    with torch.no_grad():
        z = network.latents(images())
        program = torch.export.export(_Decoding(network), (z,), dynamic_shapes=({0: torch.export.Dim("batch")},))
        again = network.latents(images(3))
        torch.testing.assert_close(program.module()(again), network.images(again), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------- sentences
@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"channels": 0}, "channels must be at least 1, got 0"),
        ({"channels": 1 << 21}, "multipliers must be at most 16, each at most 0 for 2097152 channels"),
        ({"multipliers": ()}, r"multipliers must be positive integers, one a level, got \(\)"),
        ({"image_size": 17}, "image_size must be divisible by 2 for 2 levels, got 17"),
        ({"attention_levels": (2,)}, r"attention_levels must lie in \[0, 2\), got \(2,\)"),
        ({"channels": 6, "groups": 2}, "channels does not fit level 1: the channels of a head must be a multiple of 8"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\), got 1\.0"),
        ({"eps": 0.0}, r"eps must be positive and finite, got 0\.0"),
        ({"regularisation": "kld"}, "regularisation must be one of"),
        ({"decay": 1.0}, r"decay must lie in \[0, 1\), got 1\.0"),
        ({"restart_below": -0.1}, r"restart_below must lie in \[0, 1\), got -0\.1"),
        (
            {"regularisation": "fsq"},
            r'fsq_levels must be given for the regularisation "fsq" and for no other, got \(\)',
        ),
        ({"fsq_levels": (3,)}, r"fsq_levels must be given .*, got \(3,\) for 'kl'"),
        ({"regularisation": "fsq", "fsq_levels": (1, 3)}, r"fsq_levels must be at least 2 each, .*got \(1, 3\)"),
        (
            {"regularisation": "vq", "code_channels": 3, "quant_conv": False},
            "code_channels must give 4 channels, .* without the convolutions around the latents, got 3",
        ),
        ({"scale": 0.0}, r"scale must be positive, got 0\.0"),
        ({"shift": (1.0, 2.0)}, r"shift must be a number or one for each of the 4 channels of the latents, got"),
        ({"attention": "flash"}, "attention must be one of 'diffkern', 'torch', got 'flash'"),
        ({"blocks": True}, "blocks must be an integer, got True"),
    ],
)
def test_configurations_that_make_no_network(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"^AutoencoderConfig\.{words}"):
        config(**changes)


def test_a_configuration_is_plain_data() -> None:
    made = config(scale=(1.0, 2.0, 3.0, 4.0), image_size=(16, 8))
    assert AutoencoderConfig.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert made.shape == (3, 16, 8)
    with pytest.raises(ValueError, match=r"^AutoencoderConfig\.image_size must be given, got None$"):
        _ = config(image_size=None).shape


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.encode(torch.zeros(1, 4, 8, 8)), r"^x must have shape \(B, 3, H, W\), got \(1, 4, 8, 8\)$"),
        (lambda m: m.encode(torch.zeros(1, 3, 9, 8)), "^height and width of x must be divisible by 2, got"),
        (lambda m: m.decode(torch.zeros(1, 3, 8, 8)), r"^z must have shape \(B, 4, H, W\), got \(1, 3, 8, 8\)$"),
        (lambda m: m.decode(torch.zeros(1, 4, 8, 8).double()), "^z must have torch.float32, the dtype of the weights"),
        (lambda m: m.images(torch.zeros(4, 8, 8)), r"^latents must have shape \(B, 4, H, W\), got \(4, 8, 8\)$"),
        (lambda m: m.latent_shape((3, 9, 8)), r"^shape must end in 3 channels, height and width, both divisible by 2"),
        (lambda m: m.latent_shape((8,)), r"^shape must end in 3 channels, height and width, .*got \(8,\)$"),
        (lambda m: m.set_tiles(7), "^tile and overlap must be divisible by 2, overlap at most half of tile, got 7 and"),
        (lambda m: m.set_tiles(8, 6), "^tile and overlap must be divisible by 2, .* got 8 and 6$"),
        (lambda m: m.set_tiles(2), "^tile must be an integer of at least 4, got 2$"),
        (lambda m: m.set_slices(0), "^slices must be an integer of at least 1, got 0$"),
        (
            lambda m: m.set_attention("flash"),
            "^AutoencoderConfig.attention must be one of diffkern, torch, got 'flash'$",
        ),
        (lambda m: m.set_scale(-1.0), r"^AutoencoderConfig\.scale must be positive, got -1\.0$"),
        (lambda m: m.decode_indices(torch.zeros(1, 2, 2).long()), "^decode_indices must have codes, .* got 'kl'$"),
        (
            lambda m: m.codebook_statistics(m.encode(images())),
            "^encoded must be of an autoencoder with codes, .*Posterior$",
        ),
    ],
)
def test_arguments_that_do_not_fit(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call(model())
