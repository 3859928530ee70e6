"""guided-diffusion's and improved-diffusion's networks by what they compute, slow and small: for comparisons.

Of Dhariwal and Nichol 2021 (section 3, table 1) and Nichol and Dhariwal 2021, with the names of their state dicts and
of their constructors' arguments. Functions of `Weights`: what they ask for is the state dict.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from helpers.named_weights import Weights, softmax_attention

DEFAULTS: dict[str, Any] = {
    "conv_resample": True,
    "num_classes": None,
    "num_heads": 1,
    "num_head_channels": -1,
    "num_heads_upsample": -1,
    "use_scale_shift_norm": False,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "pool": "adaptive",
}


def sinusoids(t: Tensor, width: int) -> Tensor:
    """cos(t f_i) then sin(t f_i), f_i = 10000^(-i / half)."""
    half = width // 2
    f = torch.tensor([10000 ** (-i / half) for i in range(half)], device=t.device)
    return torch.cat([(t.float()[:, None] * f).cos(), (t.float()[:, None] * f).sin()], 1)


def attend(qkv: Tensor, heads: int, new_order: bool) -> Tensor:
    """[B, 3C, N] to [B, C, N]: q, k and v of all heads one after the other, or head by head."""
    axes, part = ((3, heads, -1), 1) if new_order else ((heads, 3, -1), 2)
    q, k, v = qkv.unflatten(1, axes).unbind(part)
    return softmax_attention(q, k, v).flatten(1, 2)


class _Net:
    """One evaluation: the weights, the arguments, and the embedding that every block gets."""

    def __init__(self, w: Weights, given: dict[str, Any], x: Tensor, t: Tensor) -> None:
        self.w, self.given = w, {**DEFAULTS, **given}
        self.c, self.levels = given["model_channels"], list(given["channel_mult"])
        wide = 4 * self.c
        first = w.affine("time_embed.0", sinusoids(t, self.c).to(x.device), wide)
        self.embedding = w.affine("time_embed.2", F.silu(first), wide)

    def residual(self, name: str, x: Tensor, out: int, resize: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        w = self.w
        h = F.silu(w.group_norm(f"{name}.in_layers.0", x, 32, 1e-5))
        if resize is not None:
            h, x = resize(h), resize(x)
        h = w.conv(f"{name}.in_layers.2", h, out, 3)
        scaled = self.given["use_scale_shift_norm"]
        change = w.affine(f"{name}.emb_layers.1", F.silu(self.embedding), out * (2 if scaled else 1))[..., None, None]
        if scaled:
            h = w.group_norm(f"{name}.out_layers.0", h, 32, 1e-5) * (1 + change[:, :out]) + change[:, out:]
        else:
            h = w.group_norm(f"{name}.out_layers.0", h + change, 32, 1e-5)
        h = w.conv(f"{name}.out_layers.3", F.silu(h), out, 3)
        return h + (x if x.shape[1] == out else w.conv(f"{name}.skip_connection", x, out, 1))

    def attention(self, name: str, x: Tensor, up: bool = False) -> Tensor:
        given, channels = self.given, x.shape[1]
        heads = given["num_heads"]
        if up and given["num_heads_upsample"] != -1:
            heads = given["num_heads_upsample"]
        if given["num_head_channels"] != -1:
            heads = channels // given["num_head_channels"]
        qkv = self.w.conv(f"{name}.qkv", self.w.group_norm(f"{name}.norm", x, 32, 1e-5), 3 * channels, 1, axes=1)
        out = attend(qkv.flatten(2), heads, given["use_new_attention_order"]).reshape(x.shape)
        return x + self.w.conv(f"{name}.proj_out", out, channels, 1, axes=1)

    def down(self, name: str, x: Tensor) -> Tensor:
        if self.given["resblock_updown"]:
            return self.residual(name, x, x.shape[1], lambda h: F.avg_pool2d(h, 2))
        return self.w.conv(f"{name}.op", x, x.shape[1], 3, 2) if self.given["conv_resample"] else F.avg_pool2d(x, 2)

    def up(self, name: str, x: Tensor) -> Tensor:
        def twice(h: Tensor) -> Tensor:
            return h.repeat_interleave(2, 2).repeat_interleave(2, 3)

        if self.given["resblock_updown"]:
            return self.residual(name, x, x.shape[1], twice)
        return self.w.conv(f"{name}.conv", twice(x), x.shape[1], 3) if self.given["conv_resample"] else twice(x)

    def encode(self, x: Tensor) -> list[Tensor]:
        """The results of the input blocks, then that of the middle."""
        found = [self.w.conv("input_blocks.0.0", x, int(self.levels[0] * self.c), 3)]
        for level, multiplier in enumerate(self.levels):
            for _ in range(self.given["num_res_blocks"]):
                name = f"input_blocks.{len(found)}"
                h = self.residual(f"{name}.0", found[-1], int(multiplier * self.c))
                found.append(self.attention(f"{name}.1", h) if self.attends(level) else h)
            if level + 1 < len(self.levels):
                found.append(self.down(f"input_blocks.{len(found)}.0", found[-1]))
        channels = found[-1].shape[1]
        h = self.attention("middle_block.1", self.residual("middle_block.0", found[-1], channels))
        return [*found, self.residual("middle_block.2", h, channels)]

    def attends(self, level: int) -> bool:
        return 2**level in self.given["attention_resolutions"]

    def decode(self, skips: list[Tensor], h: Tensor) -> Tensor:
        block = 0
        for level in reversed(range(len(self.levels))):
            for i in range(self.given["num_res_blocks"] + 1):
                name = f"output_blocks.{block}"
                h = self.residual(f"{name}.0", torch.cat([h, skips.pop()], 1), int(self.levels[level] * self.c))
                if self.attends(level):
                    h = self.attention(f"{name}.1", h, up=True)
                if level and i == self.given["num_res_blocks"]:
                    h = self.up(f"{name}.{2 if self.attends(level) else 1}", h)
                block += 1
        assert not skips
        h = F.silu(self.w.group_norm("out.0", h, 32, 1e-5))
        return self.w.conv("out.2", h, self.given["out_channels"], 3)


def unet(w: Weights, given: dict[str, Any], x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
    """UNetModel(**given)(x, t, y)."""
    net = _Net(w, given, x, t)
    if net.given["num_classes"] is not None:
        net.embedding = net.embedding + w("label_emb.weight", net.given["num_classes"], 4 * net.c)[y]
    *skips, h = net.encode(x)
    return net.decode(skips, h)


def super_resolution(
    w: Weights, given: dict[str, Any], x: Tensor, t: Tensor, low_res: Tensor, y: Tensor | None = None
) -> Tensor:
    """SuperResModel(**given)(x, t, low_res=low_res, y=y)."""
    large = F.interpolate(low_res, x.shape[2:], mode="bilinear", align_corners=False)
    return unet(w, given, torch.cat([x, large], 1), t, y)


def encoder(w: Weights, given: dict[str, Any], x: Tensor, t: Tensor) -> Tensor:
    """EncoderUNetModel(**given)(x, t)."""
    net = _Net(w, given, x, t)
    results, out, pool = net.encode(x), given["out_channels"], net.given["pool"]
    h = results[-1]
    if pool.startswith("spatial"):
        h = w.affine("out.0", torch.cat([result.mean((2, 3)) for result in results], 1), 2048)
        if pool == "spatial":
            return w.affine("out.2", F.relu(h), out)
        return w.affine("out.3", F.silu(w.group_norm("out.1", h, 32, 1e-5)), out)
    h = F.silu(w.group_norm("out.0", h, 32, 1e-5))
    if pool == "adaptive":
        return w.conv("out.3", h.mean((2, 3), keepdim=True), out, 1)[:, :, 0, 0]
    side, channels = given["image_size"] >> (len(net.levels) - 1), h.shape[1]
    tokens = torch.cat([h.mean((2, 3))[..., None], h.flatten(2)], 2)
    tokens = tokens + w("out.2.positional_embedding", channels, side * side + 1)
    qkv = w.conv("out.2.qkv_proj", tokens[..., None], 3 * channels, 1, axes=1)[..., 0]
    tokens = attend(qkv, channels // net.given["num_head_channels"], new_order=True)
    return w.conv("out.2.c_proj", tokens[..., None], out, 1, axes=1)[:, :, 0, 0]
