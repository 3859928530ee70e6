"""A diffusion in the latents of an autoencoder: what goes in as images and comes out as images, and what it sees."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import Self

from diffkern.checks import need_tensor, opened
from diffkern.diffusion import _fit
from diffkern.diffusion.previews import Preview, fit_preview
from diffkern.ops import Seeds
from diffkern.parallel import class_of
from diffkern.sampling.options import Sampled

__all__ = ["InLatents", "hash_of", "mask_of_latents"]

NAME = "autoencoder."
SILENT = {"attention", "dropout", "image_size", "upcast"}
"""Of an autoencoder's configuration what the hash leaves out."""


class InLatents(nn.Module):
    """What a `Diffusion` has of its autoencoder. Without one images and latents are the same.

    The autoencoder is frozen: its parameters take no gradient, it stays in evaluation mode, and it is no part of
    ``state_dict``, as its weights belong to a folder of their own.
    """

    autoencoder: nn.Module | None
    shape: tuple[int, ...] | None
    preview_map: Preview | None

    def _hold(self, autoencoder: nn.Module | None, model: nn.Module, shape: Sequence[int] | None) -> None:
        """Takes the autoencoder, and the shape of what the network sees."""
        self.autoencoder, self.preview_map = autoencoder, None
        self.shape = _fit.shape_of(model, shape)
        if autoencoder is None:
            return
        missing = [name for name in ("latents", "images", "latent_shape", "factor") if not hasattr(autoencoder, name)]
        if not isinstance(autoencoder, nn.Module) or missing:
            raise ValueError(
                "autoencoder must be a diffkern.nn.Autoencoder or a module with latents(x, seeds), images(latents), "
                f"latent_shape(shape) and factor, got {type(autoencoder).__name__}"
                + (f" without {missing[0]}" if isinstance(autoencoder, nn.Module) else "")
            )
        if self.shape is None:
            size = _size(autoencoder)
            self.shape = None if size is None else self._latent_shape((_channels(autoencoder), *size))
        else:
            whole = self.image_shape
            assert whole is not None
            if self._latent_shape(whole) != self.shape:
                raise ValueError(
                    f"model must take latents of the shape {list(self._latent_shape(whole))}, the autoencoder's of "
                    f"images of {list(whole)}, got {list(self.shape)}"
                )
        autoencoder.requires_grad_(False).eval()
        self.register_state_dict_post_hook(_left_out)
        self.register_load_state_dict_post_hook(_not_missed)

    def train(self, mode: bool = True) -> Self:
        """torch's, but for the autoencoder, which stays in evaluation mode."""
        super().train(mode)
        if self.autoencoder is not None:
            self.autoencoder.eval()
        return self

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """torch's, but for the autoencoder, which stays frozen."""
        super().requires_grad_(requires_grad)
        if self.autoencoder is not None:
            self.autoencoder.requires_grad_(False)
        return self

    # ------------------------------------------------------------------------------------------- images and latents

    @property
    def image_shape(self) -> tuple[int, ...] | None:
        """Of one image: that of what the network sees, or where there is an autoencoder of what it decodes that to."""
        if self.autoencoder is None or self.shape is None:
            return self.shape
        factor: Any = self.autoencoder.factor
        return (_channels(self.autoencoder), *(side * int(factor) for side in self.shape[1:]))

    def encode(self, images: Tensor, seeds: Seeds | None = None, *, latents: bool | None = None) -> Tensor:
        """The latents of images [B, C, H, W], scaled as the network sees them; latents are returned as they are.

        ``seeds``, an integer or int64 [B]: the posterior is sampled by address; None: its mode. ``latents`` says which
        of both is given; None: what the shape says, the images' where it is both. Without an autoencoder nothing is
        done. Not under autocast: encoders overflow in 16 bits that their weights are not made for.
        """
        need_tensor("images", images)
        if self.autoencoder is None or self._are_latents(images, latents):
            return images
        encoder: Any = self.autoencoder
        home = next(self.autoencoder.parameters(), images)
        with torch.autocast(home.device.type, enabled=False):
            found: Tensor = encoder.latents(images.to(home.device, home.dtype), seeds)
        return found.to(images.dtype)

    def decode(self, latents: Tensor) -> Tensor:
        """The images of latents [B, c, h, w], about in [-1, 1], in the dtype of the latents; without an autoencoder the
        latents."""
        need_tensor("latents", latents)
        if self.autoencoder is None:
            return latents
        decoder: Any = self.autoencoder
        home = next(self.autoencoder.parameters(), latents)
        with torch.autocast(home.device.type, enabled=False):
            found: Tensor = decoder.images(latents.to(home.device, home.dtype))
        return found.to(latents.dtype)

    def autoencoder_hash(self) -> str | None:
        """What tells the autoencoder from others, 32 hexadecimal digits of its configuration and weights; None without.

        The same on every device and in every memory format; another in another dtype.
        """
        return None if self.autoencoder is None else hash_of(self.autoencoder)

    def _are_latents(self, x: Tensor, said: bool | None) -> bool:
        """Whether x are latents: as it is said, or by channels, or where these are the same by the whole shape."""
        if said is not None:
            return said
        assert self.autoencoder is not None
        shape, whole = self.shape, self.image_shape
        channels = _channels(self.autoencoder)
        factor: Any = self.autoencoder.factor
        own = self._latent_shape((channels, int(factor), int(factor)))[0]
        if x.ndim == 4 and channels != own and x.shape[1] in (channels, own):
            return x.shape[1] == own
        if tuple(x.shape[1:]) in (shape, whole):
            return tuple(x.shape[1:]) != whole
        raise ValueError(
            f"x0 must be images [B, {channels}, H, W] or latents [B, {own}, h, w], of the shapes {whole} or {shape} "
            f"unless latents=True or latents=False says which, got {list(x.shape)}"
        )

    def _latent_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        autoencoder: Any = self.autoencoder
        return tuple(autoencoder.latent_shape(shape))

    # --------------------------------------------------------------------------------------------------- sampling

    def _brought(self, given: dict[str, Any], shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
        """Of the arguments of `sample` those that may be images, as latents: x0, known and mask."""
        if self.autoencoder is None:
            return given
        found = dict(given)
        for name in ("x0", "known"):
            if isinstance(found.get(name), Tensor):
                found[name] = self.encode(found[name])
        if isinstance(found.get("mask"), Tensor):
            found["mask"] = mask_of_latents(found["mask"], shape, dtype)
        return found

    def _decoded(self, found: Tensor | Sampled, decode: bool) -> Tensor | Sampled:
        """What `sample` returns: of a `Sampled` the final state alone becomes images."""
        if self.autoencoder is None or not decode:
            return found
        return self.decode(found) if isinstance(found, Tensor) else found._replace(x=self.decode(found.x))

    # --------------------------------------------------------------------------------------------------- previews

    def fit_preview(self, images: Any) -> Preview:
        """`previews.fit_preview` with this autoencoder; the map is kept with the model, in its folder too."""
        if self.autoencoder is None:
            raise ValueError("fit_preview needs a Diffusion with an autoencoder, got one without")
        self.preview_map = fit_preview(self.autoencoder, images)
        return self.preview_map

    def preview(self, latents: Tensor | Mapping[str, Any]) -> Tensor:
        """Latents [B, c, h, w] as pictures of their size, float32 [B, C, h, w] in [-1, 1], without the decoder.

        Also of what a callback of `sample` is given (`StepInfo`), of which the estimate of x0 is shown. Without an
        autoencoder what is given, in [-1, 1]. ValueError as long as `fit_preview` has found no map.
        """
        shown: Any = latents
        if isinstance(latents, Mapping):
            shown = latents["x"] if latents.get("x0") is None else latents["x0"]
        need_tensor("latents", shown)
        if self.autoencoder is None:
            found: Tensor = shown.detach().float().clamp(-1.0, 1.0)
            return found
        if self.preview_map is None:
            raise ValueError("preview needs a map that was fitted, got none: diffusion.fit_preview(images)")
        return self.preview_map(shown)


def mask_of_latents(mask: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A mask of images [B, 1 or C, H, W] on the grid of latents of the shape [B, c, h, w]: [B, 1, h, w].

    The largest value of each place's pixels and channels, so that a place which holds any pixel that is to be made (1)
    is made as a whole, and nothing of what lies in a hole is taken as known. One that is on that grid is left as it is.
    """
    if len(shape) != 4 or mask.ndim != 4 or mask.shape[2:] == shape[2:]:
        return mask
    factors = [(large // small, large % small) for large, small in zip(mask.shape[2:], shape[2:], strict=True)]
    if any(whole < 1 or rest for whole, rest in factors):
        raise ValueError(
            f"mask must have the size of the images or of the latents, a multiple of {list(shape[2:])}, "
            f"got {list(mask.shape)}"
        )
    largest = opened(mask, torch.float32).amax(1, keepdim=True)
    found = F.max_pool2d(largest, (factors[0][0], factors[1][0]))
    return found.to(dtype) if mask.is_floating_point() else found > 0


def hash_of(autoencoder: nn.Module) -> str:
    """See `InLatents.autoencoder_hash`; of the configuration all but what changes no number."""
    state = {name: t for name, t in autoencoder.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    to_dict: Any = getattr(getattr(autoencoder, "config", None), "to_dict", dict)
    told = {name: value for name, value in to_dict().items() if name not in SILENT}
    config = json.dumps([class_of(autoencoder).__name__, told], sort_keys=True)
    key = (config, tuple((name, t.data_ptr(), t._version, t.dtype, t.device) for name, t in state.items()))
    kept = autoencoder.__dict__.get("_diffkern_hash")
    if kept is not None and kept[0] == key:
        return str(kept[1])
    found = hashlib.blake2b(config.encode(), digest_size=16)
    for name, tensor in state.items():
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    autoencoder.__dict__["_diffkern_hash"] = (key, found.hexdigest())
    return found.hexdigest()


def _left_out(module: nn.Module, state: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    for name in [name for name in state if name.startswith(prefix + NAME)]:
        del state[name]


def _not_missed(module: nn.Module, keys: Any) -> None:
    autoencoder: Any = module.autoencoder
    own = tuple(NAME + name for name in autoencoder.state_dict())
    keys.missing_keys[:] = [name for name in keys.missing_keys if not name.endswith(own)]


def _channels(autoencoder: nn.Module) -> int:
    """Of its images."""
    config: Any = getattr(autoencoder, "config", None)
    return int(getattr(config, "in_channels", 3))


def _size(autoencoder: nn.Module) -> tuple[int, int] | None:
    """Height and width of its images, where it says them."""
    size: Any = getattr(getattr(autoencoder, "config", None), "image_size", None)
    return (size, size) if isinstance(size, int) else tuple(size) if size is not None else None
