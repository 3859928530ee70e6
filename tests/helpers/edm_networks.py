"""EDM's two networks by what they compute, slow and small: for comparisons.

DDPM++ and NCSN++ (Song et al. 2021, appendix H) as Karras et al. 2022 (appendix F) reimplemented them, and ADM's as
they did, with the names of their state dicts and of their constructors' arguments. Functions of `Weights`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.named_weights import Weights, softmax_attention

SONG: dict[str, Any] = {
    "label_dim": 0, "augment_dim": 0, "model_channels": 128, "channel_mult": [1, 2, 2, 2], "channel_mult_emb": 4,
    "num_blocks": 4, "attn_resolutions": [16], "embedding_type": "positional", "channel_mult_noise": 1,
    "encoder_type": "standard", "decoder_type": "standard", "resample_filter": [1, 1],
}  # fmt: skip
DHARIWAL: dict[str, Any] = {
    "label_dim": 0, "augment_dim": 0, "model_channels": 192, "channel_mult": [1, 2, 3, 4], "channel_mult_emb": 4,
    "num_blocks": 3, "attn_resolutions": [32, 16, 8],
}  # fmt: skip


class _Net:
    """One evaluation of either; ``song``: of the first."""

    def __init__(self, w: Weights, given: dict[str, Any], song: bool) -> None:
        self.w, self.given, self.song = w, {**(SONG if song else DHARIWAL), **given}, song
        taps = torch.tensor(self.given.get("resample_filter", [1, 1]), dtype=torch.float32)
        self.kernel = (torch.outer(taps, taps) / taps.sum() ** 2)[None, None]
        self.embedding = torch.empty(0)

    # ------------------------------------------------------------------------------------------------- the embedding

    def positions(self, t: Tensor, width: int) -> Tensor:
        half = width // 2
        if self.given.get("embedding_type") == "fourier":
            angles = t[:, None] * 2 * math.pi * self.w("map_noise.freqs", half)
        else:
            last = half - 1 if self.song else half
            f = torch.tensor([10000 ** (-i / last) for i in range(half)], device=t.device)
            angles = t[:, None] * f
        both = [angles.sin(), angles.cos()] if self.song else [angles.cos(), angles.sin()]
        return torch.cat(both, 1)

    def embed(self, t: Tensor, labels: Tensor | None, augment: Tensor | None) -> None:
        w, given = self.w, self.given
        classes, wide = given["label_dim"], given["channel_mult_emb"] * given["model_channels"]
        width = given["model_channels"] * given.get("channel_mult_noise", 1)
        e = self.positions(t.float(), width)
        if classes and self.song:
            assert labels is not None
            e = e + w.affine("map_label", labels * math.sqrt(classes), width)
        if given["augment_dim"]:
            change = w.affine("map_augment", torch.zeros(1, given["augment_dim"], device=t.device)
                              if augment is None else augment, width, bias=False)  # fmt: skip
            e = e + change
        e = w.affine("map_layer1", F.silu(w.affine("map_layer0", e, wide)), wide)
        if classes and not self.song:
            assert labels is not None
            e = e + w.affine("map_label", labels, wide, bias=False)
        self.embedding = F.silu(e)

    # ---------------------------------------------------------------------------------------------------- resampling

    def half(self, x: Tensor, padding: int, name: str) -> Tensor:
        """Every second value of x under the filter."""
        kernel = self.w.constant(f"{name}.resample_filter", self.kernel)
        return F.conv2d(x.flatten(0, 1)[:, None], kernel, stride=2, padding=padding).unflatten(0, x.shape[:2])[:, :, 0]

    def resized(self, name: str, x: Tensor, resize: str) -> Tensor:
        padding = (self.kernel.shape[-1] - 1) // 2
        if resize == "down":
            return self.half(x, padding, name)
        if resize == "up":  # zeros between the values, then the filter, 4 times, as 3 of 4 values are zero
            kernel = 4 * self.w.constant(f"{name}.resample_filter", self.kernel)
            b, c, height, width = x.shape
            wide = torch.zeros(b * c, 1, 2 * height - 1, 2 * width - 1, device=x.device)
            wide[:, :, ::2, ::2] = x.flatten(0, 1)[:, None]
            edge = self.kernel.shape[-1] - 1 - padding
            return F.conv2d(wide, kernel.flip(2, 3), padding=edge).reshape(b, c, 2 * height, 2 * width)
        return x

    # -------------------------------------------------------------------------------------------------------- blocks

    def norm(self, name: str, x: Tensor) -> Tensor:
        return self.w.group_norm(name, x, min(32, x.shape[1] // 4), 1e-6 if self.song else 1e-5)

    def block(self, name: str, x: Tensor, out: int, resize: str = "", attention: bool = False) -> Tensor:
        w, scale = self.w, math.sqrt(0.5) if self.song else 1.0
        h = self.resized(f"{name}.conv0", F.silu(self.norm(f"{name}.norm0", x)), resize)
        h = w.conv(f"{name}.conv0", h, out, 3)
        change = w.affine(f"{name}.affine", self.embedding, out if self.song else 2 * out)[..., None, None]
        if self.song:
            h = self.norm(f"{name}.norm1", h + change)
        else:
            h = self.norm(f"{name}.norm1", h) * (1 + change[:, :out]) + change[:, out:]
        h = w.conv(f"{name}.conv1", F.silu(h), out, 3)
        mixed = x.shape[1] != out or (self.song and bool(resize))
        x = self.resized(f"{name}.skip", x, resize)
        h = scale * (h + (w.conv(f"{name}.skip", x, out, 1) if mixed else x))
        if not attention:
            return h
        heads = 1 if self.song else out // 64
        qkv = w.conv(f"{name}.qkv", self.norm(f"{name}.norm2", h), 3 * out, 1).flatten(2)
        q, k, v = qkv.unflatten(1, (heads, out // heads, 3)).unbind(3)
        return scale * (h + w.conv(f"{name}.proj", softmax_attention(q, k, v).reshape(h.shape), out, 1))

    def run(self, x: Tensor) -> Tensor:
        given, song, w = self.given, self.song, self.w
        c, levels, side = given["model_channels"], given["channel_mult"], given["img_resolution"]
        skips: list[Tensor] = []
        image = x
        for level, multiplier in enumerate(levels):
            at = f"enc.{side >> level}x{side >> level}"
            if level == 0:
                skips.append(w.conv(f"{at}_conv", x, c if song else c * multiplier, 3))
            else:
                skips.append(self.block(f"{at}_down", skips[-1], skips[-1].shape[1], "down"))
                if given.get("encoder_type") == "residual":
                    image = self.reduced(f"{at}_aux_residual", image, skips[-1].shape[1])
                    skips[-1] = image = (skips[-1] + image) / math.sqrt(2)
            for i in range(given["num_blocks"]):
                attention = side >> level in given["attn_resolutions"]
                skips.append(self.block(f"{at}_block{i}", skips[-1], c * multiplier, "", attention))
        h = skips[-1]
        for level in reversed(range(len(levels))):
            at = f"dec.{side >> level}x{side >> level}"
            if level + 1 == len(levels):
                h = self.block(f"{at}_in0", h, h.shape[1], "", attention=True)
                h = self.block(f"{at}_in1", h, h.shape[1])
            else:
                h = self.block(f"{at}_up", h, h.shape[1], "up")
            for i in range(given["num_blocks"] + 1):
                attends = side >> level in given["attn_resolutions"] and (not song or i == given["num_blocks"])
                h = self.block(f"{at}_block{i}", torch.cat([h, skips.pop()], 1), c * levels[level], "", attends)
        assert not skips
        names = [f"dec.{side}x{side}_aux_{part}" for part in ("norm", "conv")] if song else ["out_norm", "out_conv"]
        return w.conv(names[1], F.silu(self.norm(names[0], h)), given["out_channels"], 3)

    def reduced(self, name: str, x: Tensor, out: int) -> Tensor:
        """3 x 3, then the filter at every second place, over x with enough zeros around; the bias last."""
        more = (self.kernel.shape[-1] - 1) // 2
        h = F.conv2d(x, self.w(f"{name}.weight", out, x.shape[1], 3, 3), padding=1 + more)
        return self.half(h, 0, name) + self.w(f"{name}.bias", out)[:, None, None]


def song_unet(
    w: Weights, given: dict[str, Any], x: Tensor, t: Tensor, labels: Tensor | None, augment: Tensor | None = None
) -> Tensor:
    """SongUNet(**given)(x, t, labels, augment)."""
    net = _Net(w, given, song=True)
    net.embed(t, labels, augment)
    return net.run(x)


def dhariwal_unet(
    w: Weights, given: dict[str, Any], x: Tensor, t: Tensor, labels: Tensor | None, augment: Tensor | None = None
) -> Tensor:
    """DhariwalUNet(**given)(x, t, labels, augment)."""
    net = _Net(w, given, song=False)
    net.embed(t, labels, augment)
    return net.run(x)
