"""The UNet of diffusion models, by options.

The network of Ho et al. 2020, Nichol and Dhariwal 2021, Dhariwal and Nichol 2021, Song et al. 2021, Rombach et al.
2022, Karras et al. 2022 and of lectures 000 and 002 (sections on the UNet): blocks in pre-activation order that know
the time, attention at the low resolutions, skip connections from the way down to the way up. `UNetConfig` says which
network is meant, as plain data, and is what a checkpoint stores.

Nothing here depends on the noise schedule: the time is a number, an integer step or a real one, and the network
embeds it. Inside, tensors are channels_last.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from diffkern.nn.blocks import zeroed
from diffkern.nn.conditions import Known, as_mapping, expect
from diffkern.nn.embedded import lay_out, switch_attention
from diffkern.nn.encoder import Encoder, Level, Parts
from diffkern.nn.norm import GroupNormAct, count_groups
from diffkern.nn.rows import KnowsRows
from diffkern.nn.unet_config import UNetConfig


class UNet(Encoder, KnowsRows):
    """eps(x_t, t, condition), or whichever prediction the network is trained for.

    ``model(x, t)`` or ``model(x, t, cond)``: x float [B, C, H, W], H and W divisible by 2^(levels - 1); t [B] (or
    0-dim) of any dtype. cond: None; int64 [B], classes 0..classes (`null_class` = ``classes``, also meant by None, is
    the network without condition, which classifier-free guidance needs); or a dict of

        class            int64 [B]
        context          [B, T, context_channels]: tokens that transformer blocks attend to
        vector, ids      [B, vector_channels] and [B, ids]: extra vector and numbers (SDXL)
        image            [B, concat_channels, H, W]: concatenated to x
        augment          [B, augment_channels]: EDM's augmentation labels
        residuals        tensors that are added to the skips, one each (ControlNet), and
        middle_residual  one that is added to the middle

    Returns [B, predicted_channels, H, W] in the memory format of x. A wrong shape, dtype, device, key or class is a
    ValueError. ``model.run(x, model.known(t, cond, batch), cond)`` is the same in two parts, of which the first does
    not see x. `checkpointing`, an attribute: blocks run again in the backward pass and keep nothing inside.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        parts, widths, skips = Parts(config), config.widths, list(self.skip_channels)
        current = widths[-1]
        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            stages, count = [], config.block_counts[level] + 1
            for i in range(count):
                attends = level in config.attention_levels and (config.up_attention == "every" or i + 1 == count)
                stages.append(parts.stage(current + skips.pop(), level, attends))
                current = width
            self.up.append(Level(stages, parts.resample(current, "up") if level else None))
        self.norm = GroupNormAct(count_groups(current, config.groups, config.group_channels), current, config.eps)
        self.leave = zeroed(nn.Conv2d(current, config.predicted_channels, 3, padding=1), config.zero_init)
        switch_attention(self, config.attention)
        lay_out(self)

    def _levels(self) -> list[Any]:
        return [*self.up]

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        self._checked(x)
        return self.run(x, self.known(t, cond, x.shape[0]), cond)

    def _knowing(self) -> list[nn.Module]:
        parts = (self.time, self.fourier, self.classes, self.vector, self.augment)
        return [*(part for part in parts if part is not None), *self._modulations(), *self._context_layers()]

    def run(self, x: Tensor, known: Known, cond: Any = None) -> Tensor:
        """The prediction at x, given what `known` made of time and condition."""
        self._checked(x)
        given = as_mapping(cond)
        changes, contexts = iter(known.changes), iter(known.contexts)
        h, skips = self.encode(x, given, changes, contexts)
        skips = self._controlled(skips, given)
        if given.get("middle_residual") is not None:
            h = h + expect("middle_residual", given["middle_residual"], tuple(h.shape), x).to(h.dtype)
        for level in self._levels():
            for stage in level.blocks:
                h = self._run(stage, torch.cat([h, skips.pop()], dim=1), changes, contexts)
            if level.resample is not None:
                h = self._run(level.resample, h, changes, contexts)
        out: Tensor = self.leave(self.norm(h))
        return out if x.stride(1) == 1 and x.shape[1] > 1 else out.contiguous()

    @staticmethod
    def from_diffusers(
        path: str | os.PathLike[str],
        subfolder: str | None = None,
        *,
        variant: str | None = None,
        ids: int | None = None,
    ) -> UNet:
        """The network of a folder that diffusers wrote: `UNet2DModel`, `UNet2DConditionModel` (SD 1.x, 2.x, SDXL).

        Nothing is fetched: ``path`` has config.json and diffusion_pytorch_model.safetensors, or an index and its
        parts, or is a pipeline, whose ``subfolder`` is "unet" where none is given. ``variant``: "fp16" for the files of
        that name, which are also read where there are no others; the network takes their dtype. ``ids``: the numbers
        that go with SDXL's pooled text; None: 6, and 5 for its refiner. In eval mode, on the CPU.

        The times are those of training (0..999); their text embeddings are cond["context"], `text_embeds` and
        `time_ids` are cond["vector"] and cond["ids"]; what is concatenated to the latents (inpainting) is
        cond["image"].
        FileNotFoundError for a missing folder or file; ValueError, one sentence, for another class, an option that we
        have no network for, a file of pickles, and weights that do not fit.
        """
        from diffkern.nn.weights import diffusers  # only where weights of others are read

        return diffusers.from_folder(path, subfolder, variant=variant, ids=ids)

    def to_diffusers(self, path: str | os.PathLike[str], **fields: Any) -> None:
        """Write a folder that diffusers' `from_pretrained` reads: `UNet2DConditionModel` where there is a context.

        ``fields`` of its config.json, such as sample_size. ValueError in one sentence for an option that diffusers
        does not have; nothing is written then.
        """
        from diffkern.nn.weights import diffusers  # only where weights for others are written

        diffusers.to_folder(self, path, **fields)

    def _controlled(self, skips: list[Tensor], given: dict[str, Any]) -> list[Tensor]:
        """The skips, with the residuals of a control network added."""
        residuals = given.get("residuals")
        if residuals is None:
            return skips
        if not isinstance(residuals, list | tuple) or len(residuals) != len(skips):
            got = len(residuals) if isinstance(residuals, list | tuple) else type(residuals).__name__
            raise ValueError(f"cond['residuals'] must be a tuple of {len(skips)} tensors, one a skip, got {got}")
        return [
            skip + expect("residuals", residual, tuple(skip.shape), skip).to(skip.dtype)
            for skip, residual in zip(skips, residuals, strict=True)
        ]
