"""A diffusion that gives back what an image has lost: its network sees the degraded image beside the noisy one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from diffkern.checks import unknown
from diffkern.diffusion._rows import Network
from diffkern.diffusion.latents import InLatents, mask_of_latents
from diffkern.names import DegradationName
from diffkern.ops import Seeds, as_seeds
from diffkern.parallel import bare

if TYPE_CHECKING:
    from diffkern.degradations import Degradation

__all__ = ["Restores", "Without"]

Without = Literal["class", "image", "both"]
"""What the unconditional half of guidance is without."""
SECOND_TIME = 1000.0
"""The level of the input's noise is given as this many steps, the range that sinusoids are made for."""


class Restores(InLatents):
    """What a `Diffusion` has of its degradation. Without one nothing is added to a condition."""

    degradation: Degradation | None
    null: Tensor | None
    model: nn.Module

    def _restore(self, degradation: DegradationName | Degradation | None) -> None:
        """Takes the degradation; ValueError for a network that does not take its image."""
        from diffkern.degradations import get_degradation  # so that the chain of imports stays short

        self.degradation = None if degradation is None else get_degradation(degradation)
        shape, config = self.image_shape, _config_of(self.model)
        if self.degradation is None:
            return
        if shape is not None and len(shape) == 3:
            self.degradation.size(shape)  # raises where it cannot be of these images
        if config is None:
            return
        if shape is not None:
            wanted = self.degradation.concatenated(shape, None if self.autoencoder is None else self.shape)
        else:
            wanted = self.degradation.channels(getattr(config, "in_channels", 1))
        found = getattr(config, "concat_channels", 0)
        if found != wanted:
            raise ValueError(
                f"model must have concat_channels = {wanted} for the image of {type(self.degradation).__name__}, got "
                f"{found}"
            )
        resizes = self.degradation.resizes and not self._encodes()
        if resizes and getattr(config, "concat_upsample", None) is None:
            raise ValueError("model must have a concat_upsample for an image of another size, got none")
        if self.degradation.augmentation > 0.0 and getattr(config, "ids", 0) != 1:
            raise ValueError(
                f"model must have ids = 1, its second time, for an image with noise of its own, got "
                f"{getattr(config, 'ids', 0)}"
            )

    # ---------------------------------------------------------------------------------------------------- training

    def condition(self, x0: Tensor, cond: Any = None, seeds: Seeds = 0) -> Any:
        """What the network is given with clean samples x0 in training: ``cond``, and the degraded image beside it.

        {"class": cond, "image": y, "ids": s}: y the input of x0 by the examples' ``seeds``, with the noise that its
        ``augmentation`` asks for, s its level times 1000 [B, 1], given where the network has a place for it; in
        training mode without y (`Degradation.nothing`) as often as its ``drop`` says. Without a degradation ``cond``.
        """
        degradation = self.degradation
        if degradation is None:
            return cond
        if self.autoencoder is not None and self._are_latents(x0, None):
            raise ValueError(f"x0 must be images where they are degraded, got latents {list(x0.shape)}")
        seeds = as_seeds(seeds, x0.shape[0], x0.device)
        image, levels = degradation.degrade(x0, seeds), None
        if degradation.augmentation > 0.0:
            levels = degradation.levels(seeds)
            image = degradation.noised(image, levels, seeds)
        if degradation.drop > 0.0 and self.training:
            left_out = degradation.left_out(seeds).reshape(-1, 1, 1, 1)
            image = torch.where(left_out, degradation.nothing(image), image)
        return self._given(self._seen(image, x0.dtype), cond, levels)

    def _given(self, image: Tensor, cond: Any, levels: Tensor | None) -> dict[str, Any]:
        """A condition by its parts."""
        found = dict(cond) if isinstance(cond, Mapping) else {} if cond is None else {"class": cond}
        found["image"] = image
        if levels is not None or getattr(_config_of(self.model), "ids", 0) == 1:
            s = image.new_zeros(len(image)) if levels is None else levels
            found["ids"] = (SECOND_TIME * s).to(torch.float32).reshape(-1, 1)
        return found

    def _encodes(self) -> bool:
        """Whether the network sees the input's latents."""
        shape = self.image_shape
        if self.autoencoder is None or self.degradation is None or shape is None:
            return False
        return self.degradation.encoded(shape, self.shape)

    def _seen(self, image: Tensor, dtype: torch.dtype) -> Tensor:
        """The input as the network sees it: in latents those of the input as an image of the sample's size, after the
        mask where there is one (the nine channels of Stable Diffusion's inpainting, with x_t)."""
        degradation = self.degradation
        if degradation is None or not self._encodes():
            return image
        with torch.no_grad():
            known = self.encode(degradation.shown(image).to(dtype), latents=False)
        if not degradation.has_mask:
            return known
        return torch.cat([mask_of_latents(image[:, :1], tuple(known.shape), dtype).to(known.dtype), known], 1)

    # ---------------------------------------------------------------------------------------------------- sampling

    def _own_shape(self, image: Tensor | None) -> tuple[int, ...] | None:
        """The shape of one sample, of an input of any size."""
        if self.degradation is None or image is None or image.dim() != 4:
            return self.shape
        shape = self.degradation.sample_shape(image.shape[1:])
        return shape if self.autoencoder is None else self._latent_shape(shape)

    def _conditioned(
        self,
        network: Network,
        image: Tensor | None,
        shape: Sequence[int],
        seeds: Tensor,
        *,
        cond: Any,
        uncond: Any,
        guided: bool,
        augmentation: float,
        without: Without | None,
        dtype: torch.dtype,
    ) -> tuple[Network, Any, Any]:
        """(network, cond, uncond) that `diffkern.sample` is called with: with a degradation, conditions are codes that
        the network turns into dicts, so that guidance in one op a step is there as ever."""
        degradation = self.degradation
        if degradation is None:
            for name, value in (("image", image), ("without", without), ("augmentation", augmentation or None)):
                if value is not None:
                    raise ValueError(f"{name} must be left out for a Diffusion without a degradation, got one")
            return network, cond, self._uncond(cond) if guided and uncond is None else uncond
        images = self._checked(image, shape, seeds.device)
        if not 0.0 <= augmentation <= degradation.augmentation:
            raise ValueError(
                f"augmentation must lie in [0, {degradation.augmentation}], the largest level of the training, got "
                f"{augmentation}"
            )
        levels, noisy = None, images
        if degradation.augmentation > 0.0:
            levels = torch.full((len(images),), augmentation, dtype=torch.float64, device=seeds.device)
            noisy = degradation.noised(images, levels, seeds) if augmentation > 0.0 else images
        codes = _Codes(self, self._seen(noisy, dtype), self._seen(degradation.nothing(images), dtype), levels, cond)
        full = codes.code(cond, True)
        if guided:
            without = without or ("image" if cond is None else "class")
            if without not in ("class", "image", "both"):
                raise ValueError(unknown("without", without, ("class", "image", "both")))
            if without != "class" and degradation.drop == 0.0:
                raise ValueError(
                    f"without={without!r} needs a model that was trained without its image as well, got a degradation "
                    "with drop = 0"
                )
            if uncond is None:
                uncond = cond if without == "image" else self._uncond(cond)
            uncond = codes.code(uncond, without == "class")
        network.condition = codes
        return network, full, uncond

    def _checked(self, image: Tensor | None, shape: Sequence[int], device: torch.device) -> Tensor:
        """The inputs of all samples, float32 or wider, on the device."""
        degradation = self.degradation
        assert degradation is not None
        if not isinstance(image, Tensor):
            raise ValueError(
                f"image must be given, the inputs of {type(degradation).__name__}, got {type(image).__name__}"
            )
        whole = tuple(shape[1:])
        if self.autoencoder is not None:
            whole = (degradation.sample_shape(image.shape[1:])[0], *(n * self._factor for n in shape[2:]))
        size = degradation.size(whole)
        if image.dim() != 4 or tuple(image.shape[1:]) != size or image.shape[0] not in (1, shape[0]):
            raise ValueError(f"image must have the shape {[shape[0], *size]}, or 1 for all, got {list(image.shape)}")
        if not image.is_floating_point():
            raise ValueError(f"image must be floating point in about [-1, 1], got {image.dtype}")
        wide = torch.promote_types(image.dtype, torch.float32)
        return image.to(device, wide).expand(shape[0], *size)

    @property
    def _factor(self) -> int:
        autoencoder: Any = self.autoencoder
        return int(autoencoder.factor)

    def _uncond(self, cond: Any) -> Tensor:
        if not isinstance(cond, Tensor) or self.null is None:
            got = f"cond = {type(cond).__name__}" + (" and no null" if self.null is None else "")
            raise ValueError(f"guidance needs cond as a tensor, and uncond or Diffusion(..., null=), got {got}")
        return self.null.to(cond.device, cond.dtype).expand(cond.shape)


def _config_of(model: nn.Module) -> Any:
    """That of the network which takes the image: inside, of one that stands in a formula (`nn.Preconditioned` ...)."""
    config = getattr(bare(model), "config", None)
    return getattr(config, "inner", config)


class _Codes:
    """Conditions of a run as one tensor [B, L + 1], which `diffkern.sample` puts together and takes apart.

    In a row is the class, or whatever tensor the condition is, and whether the image is seen.
    """

    def __init__(self, diffusion: Restores, image: Tensor, nothing: Tensor, levels: Tensor | None, cond: Any) -> None:
        if cond is not None and not isinstance(cond, Tensor):
            raise ValueError(f"cond must be a tensor [B, ...] beside an image, got {type(cond).__name__}")
        self.diffusion, self.image, self.nothing, self.levels = diffusion, image, nothing, levels
        self.tail = None if cond is None else cond.shape[1:]
        self._known: dict[int, tuple[Tensor, dict[str, Any]]] = {}

    def code(self, cond: Any, seen: bool) -> Tensor:
        """Of one condition, and of whether the image is seen."""
        batch, device = len(self.image), self.image.device
        if cond is None:
            return torch.full((batch, 1), int(seen), dtype=torch.int64, device=device)
        if not isinstance(cond, Tensor) or cond.shape != (batch, *(self.tail or ())):
            got = list(cond.shape) if isinstance(cond, Tensor) else type(cond).__name__
            raise ValueError(f"cond must have the shape {[batch, *(self.tail or ())]}, one an image, got {got}")
        flat = cond.to(device).reshape(batch, -1)
        return torch.cat([flat, flat.new_full((batch, 1), int(seen))], 1)

    def __call__(self, code: Tensor) -> dict[str, Any]:
        """What the network is given; the same object for the same code, which `Prepared` looks for."""
        found = self._known.get(id(code))
        if found is None or found[0] is not code:
            self._known[id(code)] = found = (code, self._made(code))
        return found[1]

    def _made(self, code: Tensor) -> dict[str, Any]:
        copies = len(code) // max(1, len(self.image))
        seen = (code[:, -1] != 0).reshape(-1, 1, 1, 1)
        image, nothing = (t.repeat(copies, 1, 1, 1) for t in (self.image, self.nothing))
        cond = None if self.tail is None else code[:, :-1].reshape(-1, *self.tail)
        levels = None if self.levels is None else self.levels.repeat(copies)
        return self.diffusion._given(torch.where(seen, image, nothing), cond, levels)
