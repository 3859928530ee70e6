"""What the networks of the UNet family share: time and conditions as one vector, switches, checkpoints."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffkern.names import Attention
from diffkern.nn.attention import AttentionPool, SpatialCrossAttention, SpatialSelfAttention
from diffkern.nn.conditions import as_mapping, check_times, embed_classes, expect, weight_of
from diffkern.nn.embeddings import FourierEmbedding, sinusoidal_embedding
from diffkern.nn.heads import check_attention
from diffkern.nn.norm import GroupNormAct
from diffkern.nn.rows import perceptron, project
from diffkern.nn.transformer import TransformerBlock
from diffkern.nn.unet_config import UNetConfig

_SWITCHED = AttentionPool, GroupNormAct, SpatialCrossAttention, SpatialSelfAttention, TransformerBlock


def switch_attention(network: nn.Module, attention: Attention) -> None:
    """Every block of attention and every norm inside to the kernels of "diffkern" or of "torch"."""
    for module in network.modules():
        if isinstance(module, _SWITCHED):
            module.attention = attention


def lay_out(network: nn.Module, *_: Any) -> None:
    """Convolutions' weights as channels_last, as activations are: otherwise each is laid out anew in every call.

    Their state dict has this layout, too: `safetensors.torch.save_file` wants ``tensor.contiguous()`` of it.
    """
    network.to(memory_format=torch.channels_last)


class Embedded(nn.Module):
    """What the networks of the family share: the embedding of time and conditions, its way into blocks, switches."""

    time: nn.Sequential
    classes: nn.Embedding | None

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = config
        width, sinusoids = config.embedding_width, config.sinusoids
        fourier = config.time_embedding == "fourier"
        self.fourier = (
            FourierEmbedding(sinusoids, config.fourier_scale, sin_first=config.time_sin_first) if fourier else None
        )
        self.time = nn.Sequential(nn.Linear(sinusoids, width), nn.SiLU(), nn.Linear(width, width))
        places = width if config.class_place == "after" else sinusoids
        self.classes = nn.Embedding(config.classes + 1, places) if config.classes else None
        biased = config.classes and config.class_bias
        self.class_bias = nn.Parameter(torch.zeros(places)) if biased else None
        extra = config.vector_channels + config.ids * config.id_channels
        self.vector = nn.Sequential(nn.Linear(extra, width), nn.SiLU(), nn.Linear(width, width)) if extra else None
        self.augment = nn.Linear(config.augment_channels, sinusoids, bias=False) if config.augment_channels else None
        self.register_load_state_dict_post_hook(lay_out)  # for load_state_dict(..., assign=True)
        self.checkpointing = False
        """Whether blocks keep nothing for the backward pass but their input, and run again in it (training alone)."""

    @property
    def null_class(self) -> int:
        """The class index that means "no condition"."""
        return self.config.classes

    def set_attention(self, attention: Attention) -> Any:
        """Switches every attention block and norm to diffkern's kernels or to torch's, same weights; the network.

        ``attention``: "diffkern", or "torch", which `torch.onnx.export` needs; equal within rounding. The config
        follows. ValueError for another.
        """
        check_attention("UNetConfig.attention", attention)
        self.config = dataclasses.replace(self.config, attention=attention)
        switch_attention(self, attention)
        return self

    def embed(self, t: Tensor, cond: Any, batch: int) -> Tensor:
        """[B, E]: the embedding of the time plus those of the class and of the extra vector."""
        config, given = self.config, as_mapping(cond)
        weight = weight_of(self)
        t = check_times(t, batch, weight).to(torch.float32)
        if self.fourier is not None:
            sinusoids = self.fourier(t * config.time_scale)
        else:
            sinusoids = self._sinusoids(t * config.time_scale, config.sinusoids)
        before = sinusoids.to(weight.dtype)
        classes = self._class(given, batch, weight)
        if config.class_place == "before" and classes is not None:
            before = before + classes
        augment = given.get("augment")
        if augment is not None and self.augment is None:
            raise ValueError("this network has no augmentation labels, but cond['augment'] was given")
        if self.augment is not None and augment is not None:
            labels = expect("augment", augment, (batch, config.augment_channels), weight)
            before = before + project(self.augment, labels.to(weight.dtype))
        embedding = perceptron(self.time, before).expand(batch, -1)
        if config.class_place == "after" and classes is not None:
            embedding = embedding + classes
        extra = self._extra(given, batch, weight)
        return embedding if extra is None else embedding + extra

    def _sinusoids(self, t: Tensor, width: int) -> Tensor:
        config = self.config
        return sinusoidal_embedding(t, width, freq_shift=config.time_freq_shift, sin_first=config.time_sin_first)

    def _class(self, given: dict[str, Any], batch: int, weight: Tensor) -> Tensor | None:
        found = given.get("class")
        if self.classes is None:
            if found is not None:
                raise ValueError("this network has no classes, but cond was given")
            return None
        if found is None:
            found = torch.full((batch,), self.null_class, dtype=torch.int64, device=weight.device)
        embedded = embed_classes(self.classes, self.config.classes, found, batch, weight.device)
        embedded = embedded if self.config.class_scale == 1.0 else embedded * self.config.class_scale
        return embedded if self.class_bias is None else embedded + self.class_bias

    def _extra(self, given: dict[str, Any], batch: int, weight: Tensor) -> Tensor | None:
        config, parts = self.config, []
        for name, size in (("vector", config.vector_channels), ("ids", config.ids)):
            value = given.get(name)
            if not size:
                if value is not None:
                    raise ValueError(f"this network has no {name}, but cond[{name!r}] was given")
                continue
            found = expect(name, value, (batch, size), weight)
            if name == "ids":
                found = self._sinusoids(found.reshape(-1), config.id_channels).reshape(batch, -1)
            parts.append(found.to(weight.dtype))
        if self.vector is None:
            return None
        return perceptron(self.vector, torch.cat(parts, dim=1))

    def _conditioned(self, x: Tensor, given: dict[str, Any]) -> Tensor:
        """x with the image that is concatenated to it, channels_last."""
        config, image = self.config, given.get("image")
        if config.concat_channels:
            upsamples = config.concat_upsample is not None
            size = (None, None) if upsamples else tuple(x.shape[2:])
            image = expect("image", image, (x.shape[0], config.concat_channels, *size), x)
            if upsamples and image.shape[2:] != x.shape[2:]:
                image = F.interpolate(image, x.shape[2:], mode=config.concat_upsample or "nearest")
            x = torch.cat([x, image.to(x.dtype)], dim=1)
        elif image is not None:
            raise ValueError("this network takes no image, but cond['image'] was given")
        return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)

    def _stage(self, stage: nn.Module, *args: Any) -> Tensor:
        """The stage, keeping only its inputs for the backward pass where that was asked for."""
        if self.checkpointing and self.training and torch.is_grad_enabled():
            found: Tensor = checkpoint(stage, *args, use_reentrant=False)
        else:
            found = stage(*args)
        return found
