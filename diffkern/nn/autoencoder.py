"""The autoencoder of latent diffusion: images to latents and back (Rombach and others 2022, arXiv 2112.10752).

Encoder and decoder are those of VQGAN (Esser and others 2020, arXiv 2012.09841): residual blocks, attention at the
lowest resolution, no skips between the two. The latents between are regularised by a Gaussian prior (Kingma and Welling
2013, arXiv 1312.6114; lecture 001), by a codebook (van den Oord and others 2017, arXiv 1711.00937) or by levels of each
channel (Mentzer and others 2023, arXiv 2309.15505). `AutoencoderConfig` says which. Inside, tensors are channels_last.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffkern import ops
from diffkern.integers import integer
from diffkern.modes import readable
from diffkern.names import Attention
from diffkern.nn import stored
from diffkern.nn.autoencoder_config import AutoencoderConfig
from diffkern.nn.autoencoder_parts import Decoder, Encoder
from diffkern.nn.blocks import Pointwise
from diffkern.nn.codebook import Codebook, statistics
from diffkern.nn.conditions import check_state, weight_of
from diffkern.nn.embedded import lay_out, switch_attention
from diffkern.nn.heads import check_attention
from diffkern.nn.posterior import Encoded, Posterior
from diffkern.nn.quantised import CodebookStatistics, FiniteScalars, Quantised
from diffkern.nn.scales import column, measured
from diffkern.nn.tiles import tiled

__all__ = ["Autoencoder"]

KEY, FORMAT = "diffkern_autoencoder", 1
"""Of config.json."""


class Autoencoder(nn.Module):
    """Images [B, C, H, W], usually in [-1, 1], to latents z [B, z_channels, H / f, W / f] and back.

    ``encode`` and ``decode`` are about z itself; ``latents`` and ``images`` about what diffusion is trained on,
    (z - shift) scale. ``model(x, seeds)`` returns (reconstruction, encoded), which is what a training loss needs.
    Arguments of another shape, dtype or device are a ValueError. Memory formats are kept: channels_last in,
    channels_last out.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        latent, z = config.latent_channels, config.z_channels
        moments = 2 if config.regularisation == "kl" else 1
        self.encoder = Encoder(config, moments * latent)
        self.quant_conv = Pointwise(moments * latent, moments * z) if config.quant_conv else nn.Identity()
        self.quantiser: Codebook | FiniteScalars | None = None
        if config.regularisation == "vq":
            self.quantiser = Codebook(config.codes, z, config.decay, config.restart_below)
        elif config.regularisation == "fsq":
            self.quantiser = FiniteScalars(config.fsq_levels)
        self.post_quant_conv = Pointwise(z, latent) if config.post_quant_conv else nn.Identity()
        self.decoder = Decoder(config)
        self.tile: int | None = None
        self.overlap = 0
        self.slices: int | None = None
        switch_attention(self, config.attention)
        lay_out(self)
        self.register_load_state_dict_post_hook(lay_out)

    # ------------------------------------------------------------------------------------------- what it is
    @property
    def factor(self) -> int:
        """f: a latent stands for f x f pixels."""
        return self.config.factor

    @property
    def scale(self) -> float | tuple[float, ...]:
        """What latents are multiplied by for diffusion, after the shift."""
        return self.config.scale

    @property
    def shift(self) -> float | tuple[float, ...]:
        """What is taken off latents for diffusion, before the scale."""
        return self.config.shift

    @property
    def last_layer(self) -> Tensor:
        """The weight of the decoder's last convolution, at which adversarial gradients are compared."""
        weight: Tensor = self.decoder.leave.weight
        return weight

    @property
    def checkpointing(self) -> bool:
        """Whether blocks keep nothing for the backward pass but their input, and run again in it (training alone)."""
        return self.decoder.checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        self.encoder.checkpointing = self.decoder.checkpointing = value

    def latent_shape(self, shape: Iterable[int]) -> tuple[int, ...]:
        """(..., z_channels, H / f, W / f) of images (..., C, H, W); ValueError for others."""
        *batch, channels, height, width = (0, 0, 0, *shape)
        f = self.factor
        if channels != self.config.in_channels or height % f or width % f or min(height, width) < 1:
            raise ValueError(
                f"shape must end in {self.config.in_channels} channels, height and width, both divisible by {f}, got "
                f"{tuple(shape)}"
            )
        return *batch[3:], self.config.z_channels, height // f, width // f

    def set_attention(self, attention: Attention) -> Autoencoder:
        """Switches attention and norms to diffkern's kernels or to torch's, as `UNet.set_attention`; itself."""
        check_attention("AutoencoderConfig.attention", attention)
        self.config = dataclasses.replace(self.config, attention=attention)
        switch_attention(self, attention)
        return self

    # ------------------------------------------------------------------------------------------- to latents and back
    def encode(self, x: Tensor, seeds: ops.Seeds | None = None) -> Posterior | Quantised | Encoded:
        """What the encoder says of images [B, C, H, W]: a `Posterior`, `Quantised` codes, or `Encoded` latents.

        ``seeds``, of the examples, go into `Quantised`, for `update_codebook`; nothing is drawn here.
        """
        check_state(x, self.config.in_channels, self.factor, weight_of(self))
        moments = self._parts(self._encoded, x, self.factor, 1)
        moments = moments if x.stride(1) == 1 and x.shape[1] > 1 else moments.contiguous()
        if isinstance(self.quantiser, nn.Module):
            found: Quantised = self.quantiser(moments, seeds)
            return found
        return Posterior.of(moments) if self.config.regularisation == "kl" else Encoded(moments)

    def decode(self, z: Tensor) -> Tensor:
        """Images of latents z [B, z_channels, h, w], as `encode` gives them; codes are not looked up again.

        float16 ends at 65504. The residual sums inside of SDXL's decoder are larger: infinities, which the next norm
        makes NaN, so that the image is black. bfloat16 has float32's range and decodes it, with 8 bits of every number.
        A float16 network with ``config.upcast`` therefore computes in float32, weights
        converted in every call, and returns float16; without, images that are not finite are a ValueError.
        """
        check_state(z, self.config.z_channels, 1, weight_of(self), "z")
        out = self._parts(self._decoded, z, 1, self.factor)
        return out if z.stride(1) == 1 and z.shape[1] > 1 else out.contiguous()

    def _encoded(self, x: Tensor) -> Tensor:
        return self._computed((self.encoder, self.quant_conv), x)

    def _decoded(self, z: Tensor) -> Tensor:
        out = self._computed((self.post_quant_conv, self.decoder), z)
        if out.dtype == torch.float16 and readable(out) and not bool(out.isfinite().all()):
            raise ValueError(
                "a float16 decoder must stay below 65504 inside, got images that are not finite: use "
                "autoencoder.to(torch.bfloat16), or a configuration with upcast=True"
            )
        return out

    def _computed(self, parts: tuple[nn.Module, ...], x: Tensor) -> Tensor:
        """The parts, one after the other, in the network's dtype, or in float32 where float16 may overflow."""
        widens = x.dtype == torch.float16 and self.config.upcast
        h = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        h = h.float() if widens else h
        for part in parts:
            if widens:
                weights = {name: t.float() for name, t in part.state_dict(keep_vars=True).items()}
                h = torch.func.functional_call(part, weights, (h,))
            else:
                h = part(h)
        return h.to(x.dtype)

    def latents(self, x: Tensor, seeds: ops.Seeds | None = None) -> Tensor:
        """(z - shift) scale of images: what diffusion is trained on, [B, z_channels, H / f, W / f].

        z of "kl": the mode, or with seeds a draw by address; of codes: what the encoder put out before they are looked
        up, as in LDM, where the decoder's side quantises.
        """
        z = self.encode(x).diffused(seeds)
        return (z - column(self.shift, z)) * column(self.scale, z)

    def images(self, latents: Tensor) -> Tensor:
        """The decoder's images of latents (z - shift) scale; z becomes codes first where there are any."""
        check_state(latents, self.config.z_channels, 1, weight_of(self), "latents")
        z = latents / column(self.scale, latents) + column(self.shift, latents)
        return self.decode(self.quantiser.snap(z) if self.quantiser is not None else z)

    def decode_indices(self, indices: Tensor) -> Tensor:
        """Images of codes by number, int64 [B, h, w]; ValueError for others, and for an autoencoder without codes."""
        if self.quantiser is None:
            raise ValueError('decode_indices must have codes, "vq" or "fsq", got ' + repr(self.config.regularisation))
        if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.dim() != 3:
            got = f"{indices.dtype} {list(indices.shape)}" if isinstance(indices, Tensor) else type(indices).__name__
            raise ValueError(f"indices must be int64 [B, h, w], got {got}")
        if readable(indices) and indices.numel():
            least, most = (int(end) for end in indices.aminmax())
            if least < 0 or most >= self.config.code_count:
                wrong = least if least < 0 else most
                raise ValueError(f"indices must lie in 0..{self.config.code_count - 1}, the codes, got {wrong}")
        return self.decode(self.quantiser.codes_of(indices, weight_of(self).dtype))

    def forward(self, x: Tensor, seeds: ops.Seeds | None = None) -> tuple[Tensor, Posterior | Quantised | Encoded]:
        """(reconstruction, what `encode` says): of "kl" through a draw by address, or without seeds the mode."""
        encoded = self.encode(x, seeds)
        return self.decode(encoded.point(seeds)), encoded

    # ------------------------------------------------------------------------------------------- large images
    def set_tiles(self, tile: int | None, overlap: int | None = None) -> Autoencoder:
        """From now on images larger than ``tile`` x ``tile`` pixels are encoded and decoded in tiles of that; itself.

        Neighbours share ``overlap`` pixels (None: a quarter of the tile), both divisible by f: in the middle half of it
        one fades into the other, so that there is no seam. What convolutions miss beyond the border of a tile is thus
        hardly seen; norms and attention are those of each tile, which makes the image differ smoothly from the one
        without tiles. Memory: the images, the latents, and what one tile of each sample needs. ``tile`` None: no tiles.
        ValueError for other sizes.
        """
        f = self.factor
        if tile is not None:
            tile = integer("tile", tile, 2 * f)
            overlap = tile // 4 // f * f if overlap is None else integer("overlap", overlap, 0)
            if tile % f or overlap % f or overlap > tile // 2:
                raise ValueError(
                    f"tile and overlap must be divisible by {f}, overlap at most half of tile, got {tile} and {overlap}"
                )
        self.tile, self.overlap = tile, overlap or 0
        return self

    def set_slices(self, slices: int | None) -> Autoencoder:
        """From now on at most so many images of a batch are encoded or decoded at a time (None: all); itself."""
        self.slices = None if slices is None else integer("slices", slices)
        return self

    def _parts(self, run: Any, x: Tensor, unit: int, made: int) -> Tensor:
        if self.slices is not None and len(x) > self.slices:
            return torch.cat([self._tiles(run, part, unit, made) for part in x.split(self.slices)])
        return self._tiles(run, x, unit, made)

    def _tiles(self, run: Any, x: Tensor, unit: int, made: int) -> Tensor:
        if self.tile is None or max(x.shape[2:]) * self.factor <= self.tile * unit:
            found: Tensor = run(x)
            return found
        return tiled(run, x, self.tile // self.factor, self.overlap // self.factor, unit, made)

    # ------------------------------------------------------------------------------------------- scale and codes
    @torch.no_grad()
    def measure_scale(
        self,
        images: Tensor | Iterable[Tensor],
        *,
        seeds: ops.Seeds | None = None,
        center: bool = True,
        channels: bool = False,
        batch: int = 16,
    ) -> tuple[float | tuple[float, ...], float | tuple[float, ...]]:
        """(scale, shift) that give the latents of these images mean 0 and standard deviation 1: 1 / std and mean.

        ``images`` [N, C, H, W], ``batch`` at a time, or batches of them; ``seeds``: of a tensor of images, for draws
        from "kl" instead of the modes. ``center`` False: shift 0 and 1 / (standard deviation), as LDM has it;
        ``channels``: numbers for each channel. Sums are float64. `set_scale` takes what this returns. ValueError for
        no images, and for latents that are all equal.
        """
        return measured(self, images, seeds, center, channels, batch)

    def set_scale(self, scale: float | tuple[float, ...], shift: float | tuple[float, ...] = 0.0) -> Autoencoder:
        """The numbers of (z - shift) scale, which the configuration keeps; itself. ValueError where they do not fit."""
        self.config = dataclasses.replace(self.config, scale=scale, shift=shift)
        return self

    def update_codebook(self, encoded: Any, seeds: ops.Seeds | None = None) -> int:
        """`Codebook.update` with what `encode` said of a batch: a training step calls it after the gradient's.

        Returns how many dead codes have started again; 0 where there is nothing to average. ValueError for what is not
        of codes, and for seeds that are not those of as many examples.
        """
        if not isinstance(self.quantiser, Codebook):
            return 0
        return self.quantiser.update(_quantised(encoded), seeds)

    def codebook_statistics(self, encoded: Any) -> CodebookStatistics:
        """Usage and perplexity of the codes of a batch, over all processes; ValueError without codes."""
        return statistics(_quantised(encoded), self.config.code_count)

    # ------------------------------------------------------------------------------------------- files
    def to_dict(self) -> dict[str, Any]:
        """What config.json of a saved autoencoder says: plain data."""
        return {KEY: FORMAT, "network": stored.network_data(self)}

    def save_pretrained(
        self,
        folder: str | os.PathLike[str],
        weights: Mapping[str, Tensor] | None = None,
        average: str | None = None,
    ) -> None:
        """config.json and model.safetensors into a folder, each whole or not at all.

        ``weights`` by name are written in the place of its own, into average-NAME.safetensors where an ``average`` is
        named. ValueError for weights of other names or shapes; ImportError without safetensors.
        """
        stored.save(self, self.to_dict(), folder, weights, average)

    @staticmethod
    def from_pretrained(
        path: str | os.PathLike[str], average: str | None = None, *, device: torch.device | str = "cpu", **hub: Any
    ) -> Autoencoder:
        """The autoencoder that `save_pretrained` wrote into a folder, in the dtype of its weights and in eval mode.

        ``average``: one of those in the folder instead of the weights. A path "owner/name" that is no folder is asked
        of the hub, with ``hub`` (revision, token ...) for huggingface_hub. FileNotFoundError for a missing folder or
        file; ValueError, one sentence, for another configuration, and for weights that do not fit it.
        """
        config_path, weights_path = stored.files(path, average, hub, "Autoencoder")
        data = stored.read_config(config_path, KEY, FORMAT, "an Autoencoder")
        found_in = stored.contents(weights_path)
        network = stored.network_from(data.get("network"), found_in, str(path), lambda network: network)
        if not isinstance(network, Autoencoder):
            raise ValueError(f"{config_path} must be the configuration of an Autoencoder, got {type(network).__name__}")
        if found_in.dtype is not None:
            network.to(found_in.dtype)
        stored.fill(network, weights_path)
        return network.eval().to(device)

    @staticmethod
    def from_diffusers(
        path: str | os.PathLike[str], subfolder: str | None = None, *, variant: str | None = None
    ) -> Autoencoder:
        """The network of a folder that diffusers wrote: `AutoencoderKL` (SD, SDXL, SD 3, FLUX) or `VQModel`.

        Nothing is fetched: ``path`` has config.json and diffusion_pytorch_model.safetensors, or an index and its
        parts, or is a pipeline, whose ``subfolder`` is "vae" where none is given (that of VQ pipelines is "vqvae").
        ``variant`` as of `UNet.from_diffusers`. In eval mode, on the CPU. scaling_factor, shift_factor, and means and
        deviations of the channels are its `scale` and `shift`; force_upcast is ``config.upcast``.
        FileNotFoundError for a missing folder or file; ValueError, one sentence, for another class, an option that we
        have no network for, a file of pickles, and weights that do not fit.
        """
        from diffkern.nn.weights import autoencoder  # only where weights of others are read

        return autoencoder.from_folder(path, subfolder, variant=variant)

    def to_diffusers(self, path: str | os.PathLike[str], **fields: Any) -> None:
        """Write a folder that diffusers' `from_pretrained` reads: `AutoencoderKL` of "kl", `VQModel` of "vq".

        ``fields`` of its config.json, such as sample_size. ValueError in one sentence for an option that diffusers
        does not have; nothing is written then.
        """
        from diffkern.nn.weights import autoencoder  # only where weights for others are written

        autoencoder.to_folder(self, path, **fields)


def _quantised(encoded: Any) -> Quantised:
    if not isinstance(encoded, Quantised):
        raise ValueError(f'encoded must be of an autoencoder with codes, "vq" or "fsq", got {type(encoded).__name__}')
    return encoded
