"""The vision transformer in the UNet's place: Peebles & Xie 2023 (arXiv 2212.09748; lecture 000).

The image is cut into patches, each a token; the tokens, with fixed positions added, pass through transformer blocks
whose layer norms are scaled and shifted, and whose branches are gated, by what a linear layer makes of the embedding of
time and class (adaLN-zero: gates that start at 0, blocks that start as the identity).
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffkern.modes import kept
from diffkern.names import Attention
from diffkern.nn.adaptive import adaptive_linear, gelu_linear
from diffkern.nn.attention import spatial_attention_by_torch
from diffkern.nn.blocks import zeroed
from diffkern.nn.conditions import Known, as_mapping, check_state, check_times, embed_classes, weight_of
from diffkern.nn.dit_config import DiTConfig
from diffkern.nn.embeddings import sinusoidal_embedding
from diffkern.nn.heads import check_attention
from diffkern.nn.rows import KnowsRows, perceptron, project
from diffkern.ops import spatial_attention

__all__ = ["DiT", "DiTBlock", "grid_positions"]


def grid_positions(
    height: int, width: int, channels: int, of: tuple[int, int] | None = None, device: torch.device | None = None
) -> Tensor:
    """[height width, channels] float32: the position of every token of a grid, row by row.

        p[(y, x)] = [sin(x f), cos(x f), sin(y f), cos(y f)],   f_i = 10000^(-i / (channels / 4))

    The sinusoids of Vaswani et al. 2017 in two dimensions, each a quarter of the channels, as in Peebles & Xie 2023
    (arXiv 2212.09748). ``of``: the grid that the network was trained on, (height, width), whose coordinates another
    grid shares out: y runs over 0, of[0] / height, 2 of[0] / height, ...
    """
    if channels % 4:
        raise ValueError(f"channels must be divisible by 4, got {channels}")
    quarter = channels // 4
    places = [torch.arange(n, dtype=torch.float64, device=device) for n in (quarter, height, width)]
    frequencies = 10000.0 ** (-places[0] / quarter)
    rows, columns = of or (height, width)
    y = places[1][:, None] * (rows / height) * frequencies
    x = places[2][:, None] * (columns / width) * frequencies
    parts = [part.expand(height, width, -1) for part in (x.sin(), x.cos())]
    parts += [part[:, None].expand(height, width, -1) for part in (y.sin(), y.cos())]
    return torch.cat(parts, dim=-1).flatten(0, 1).to(torch.float32)


@kept(16)
def _kept_positions(height: int, width: int, channels: int, of: tuple[int, int], device: torch.device) -> Tensor:
    return grid_positions(height, width, channels, of).to(device)


class DiTBlock(nn.Module):
    """Attention and two linear layers, each between an adaptive layer norm and a gate: [B, N, C] to the same.

        x = x + gate_1 attention((1 + scale_1) norm(x) + shift_1)
        x = x + gate_2 mlp((1 + scale_2) norm(x) + shift_2),         mlp: linear, GELU (tanh), linear

    ``change`` [B, 6 C] is shift_1, scale_1, gate_1, shift_2, scale_2, gate_2, which `modulate` makes of SiLU of the
    embedding [B, E]; it starts at zero, and the block as the identity. Peebles & Xie 2023 (arXiv 2212.09748), section
    3.2, "adaLN-Zero".
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        width, embedding = config.width, config.embedding or config.width
        self.heads, self.attention = config.heads, config.attention
        self.eps, self.mlp_eps = config.eps, config.eps if config.mlp_eps is None else config.mlp_eps
        self.modulate = zeroed(nn.Linear(embedding, 6 * width))
        self.qkv = nn.Linear(width, 3 * width, bias=config.qkv_bias)
        self.out = nn.Linear(width, width)
        self.mlp_enter = nn.Linear(width, config.mlp_width)
        self.mlp_leave = nn.Linear(config.mlp_width, width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, change: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = change.chunk(6, dim=1)
        # [B, 3 C, N] as the linear layer wrote it: channels_last, and so is its gradient.
        qkv = adaptive_linear(x, scale1, shift1, self.qkv, self.eps).transpose(1, 2)
        if self.attention == "torch":
            found = spatial_attention_by_torch(qkv, self.heads, "new")
        else:
            found = spatial_attention(qkv, self.heads)
        x = torch.addcmul(x, gate1[:, None], self.dropout(self.out(found.transpose(1, 2))))
        h = adaptive_linear(x, scale2, shift2, self.mlp_enter, self.mlp_eps)
        return torch.addcmul(x, gate2[:, None], gelu_linear(h, self.mlp_leave, self.dropout))


class DiT(KnowsRows, nn.Module):
    """eps(x_t, t, class), or whichever prediction the network is trained for, by a transformer over patches.

    ``model(x, t, cond=None)``: x [B, in_channels, H, W], any strides; t [B], [1] or [], of any dtype; cond None, class
    indices [B], or {"class": indices}, where index ``config.classes`` (`null_class`) means none, as does None. The
    result is [B, out_channels, H, W] in the dtype and the memory format of x, and zero before training. H and W are
    those of the configuration, or others divisible by the patch: the coordinates of the grid are then shared out over
    the tokens there are. Under autocast the linear layers run in its dtype.

    What x does not decide (the changes of every block) is `known(t, cond, batch)`, and the rest `run(x, known)`;
    ``model(x, t, cond)`` is one after the other. ``checkpointing = True`` keeps the input of every block alone for the
    gradient, and runs the block again. ValueError for x, t or cond of another shape, dtype or device, and for a class
    that there is not (NaN for that sample on a GPU, where looking would wait for it).

    Peebles & Xie 2023 (arXiv 2212.09748), whose sizes `preset` knows: ``DiT(preset("DiT-S/2"))``. Lecture 000.
    """

    positions: Tensor

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpointing = False
        width, embedding = config.width, config.embedding or config.width
        self.enter = nn.Conv2d(config.in_channels, width, config.patch, stride=config.patch)
        self.register_buffer("positions", self.positions_of(config).to(self.enter.weight))
        self.time, self.classes = _embeddings(config, embedding)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        for block in self._blocks()[1:] if config.own_embeddings else ():
            block.time, block.classes = _embeddings(config, embedding)
        self.modulate = zeroed(nn.Linear(embedding, 2 * width))
        self.leave = zeroed(nn.Linear(width, config.patch**2 * config.out_channels))
        self._start()

    @staticmethod
    def positions_of(config: DiTConfig) -> Tensor:
        """[1, N, width] float32 on the CPU: the positions of the tokens of such a network (`grid_positions`)."""
        rows, columns = config.size[0] // config.patch, config.size[1] // config.patch
        return grid_positions(rows, columns, config.width, device=torch.device("cpu"))[None]

    @classmethod
    def from_diffusers(
        cls, path: str | os.PathLike[str], subfolder: str | None = None, *, variant: str | None = None
    ) -> DiT:
        """The network of a folder that diffusers' `DiTTransformer2DModel` was saved in, for evaluation; no download.

        ``path``: of its config.json and safetensors, or of a pipeline, whose "transformer" it is (else ``subfolder``).
        ``variant``: "fp16", say. Same function: cond is `class_labels` there, and the result `sample`.
        FileNotFoundError for a missing file; ValueError for a configuration that no `DiT` has, and one that lists every
        weight that is missing, unknown or of another shape.
        """
        from diffkern.nn.weights.dit import from_folder  # which makes one

        return from_folder(path, subfolder, variant=variant)

    def to_diffusers(self, path: str | os.PathLike[str]) -> None:
        """Writes the folder that `from_diffusers` and diffusers' `DiTTransformer2DModel.from_pretrained` read.

        ValueError for a network that theirs is not; ImportError without safetensors.
        """
        from diffkern.nn.weights.dit import to_folder

        to_folder(self, path)

    def _blocks(self) -> list[Any]:
        return [*self.blocks]

    def _start(self) -> None:
        """The initial weights of the paper."""
        nn.init.xavier_uniform_(self.enter.weight.view(self.config.width, -1))
        for block in self._blocks():
            for linear in (block.qkv, block.out, block.mlp_enter, block.mlp_leave):
                nn.init.xavier_uniform_(linear.weight)
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)
        nn.init.zeros_(cast(Tensor, self.enter.bias))

    def set_attention(self, attention: Attention) -> DiT:
        """Switches every block to diffkern's kernels or to torch's, with the same weights; the network.

        ``attention``: "diffkern", or "torch", which `torch.onnx.export` needs; equal within rounding. The config
        follows. ValueError for another.
        """
        check_attention("attention", attention)
        self.config = dataclasses.replace(self.config, attention=attention)
        for block in self._blocks():
            block.attention = attention
        return self

    @property
    def null_class(self) -> int:
        """The class index that means "no condition"."""
        return self.config.classes

    def known(self, t: Tensor, cond: Any, batch: int) -> Known:
        """All that x does not decide: the changes of the blocks, [B, 6 width] each, and of the end, [B, 2 width]."""
        return Known(self.changes(t, cond, batch))

    def contexts(self, cond: Any, batch: int) -> tuple[Tensor, ...]:
        """None: there is no attention to a context."""
        return ()

    def _modulations(self) -> list[Any]:
        return [*(block.modulate for block in self._blocks()), self.modulate]

    def _knowing(self) -> list[nn.Module]:
        own = self._blocks()[1:] if self.config.own_embeddings else []
        parts = (part for each in (self, *own) for part in (each.time, each.classes) if part is not None)
        return [*parts, *self._modulations()]

    def changes(self, t: Tensor, cond: Any, batch: int) -> tuple[Tensor, ...]:
        """Every block's modulation and that of the end. Without gradients a sample's have one result in every batch."""
        config, weight = self.config, weight_of(self)
        times = check_times(t, batch, weight).to(torch.float32)
        waves = sinusoidal_embedding(
            times * config.time_scale, config.time_channels, freq_shift=config.time_freq_shift
        ).to(weight.dtype)
        classes = self._classes(cond, batch, weight.device)

        def embedded(time: nn.Module, table: nn.Module | None) -> Tensor:
            """[B, E]: the embedding of the time plus that of the class."""
            made = perceptron(time, waves)
            if table is None:
                return made.expand(batch, -1)
            return made + embed_classes(table, config.classes, classes, batch, weight.device)

        first = embedded(self.time, self.classes)
        own = config.own_embeddings
        each = [embedded(b.time, b.classes) if own and i > 0 else first for i, b in enumerate(self._blocks())]
        return tuple(project(m, e, silu=True) for m, e in zip(self._modulations(), [*each, first], strict=True))

    def _classes(self, cond: Any, batch: int, device: torch.device) -> Any:
        """[B] class indices, those of "none" where none are given; None for a network without classes."""
        given = as_mapping(cond)
        for key in given:
            if key != "class":
                raise ValueError(f"this network has no {key}, but cond[{key!r}] was given")
        if self.classes is None:
            if given:
                raise ValueError("this network has no classes, but cond was given")
            return None
        if not given:
            return torch.full((batch,), self.null_class, dtype=torch.int64, device=device)
        return given["class"]

    def run(self, x: Tensor, known: Known, cond: Any = None) -> Tensor:
        """The network on x, with what is known; ``cond`` has nothing that is not in there."""
        check_state(x, self.config.in_channels, self.config.patch, weight_of(self))
        config, (height, width) = self.config, x.shape[2:]
        p, rows, columns = config.patch, height // config.patch, width // config.patch
        h = self._tokens(x, rows, columns)
        *changes, last = known.changes
        # Whether a block keeps nothing for the backward pass but its input, and runs again in it.
        again = self.checkpointing and self.training and torch.is_grad_enabled()
        for block, change in zip(self.blocks, changes, strict=True):
            h = checkpoint(block, h, change, use_reentrant=False) if again else block(h, change)
        shift, scale = last.chunk(2, dim=1)
        out = adaptive_linear(h, scale, shift, self.leave, config.eps).unflatten(2, (p, p, -1))
        out = out.unflatten(1, (rows, columns))  # [B, rows, columns, p, p, C]
        if x.stride(1) == 1 and x.shape[1] > 1:
            return out.transpose(2, 3).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
        return out.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        check_state(x, self.config.in_channels, self.config.patch, weight_of(self))
        return self.run(x, self.known(t, cond, x.shape[0]), cond)

    def _tokens(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """[B, N, width]: the patches, with their positions."""
        config = self.config
        positions = self.positions
        grid = (config.size[0] // config.patch, config.size[1] // config.patch)
        if (rows, columns) != grid:
            made = grid_positions if torch.compiler.is_compiling() else _kept_positions
            positions = made(rows, columns, config.width, grid, x.device).to(positions.dtype)
        # channels_last, in words that torch.vmap knows
        patches: Tensor = self.enter(x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2))
        return patches.permute(0, 2, 3, 1).flatten(1, 2).contiguous() + positions


def _embeddings(config: DiTConfig, embedding: int) -> tuple[nn.Sequential, nn.Embedding | None]:
    """Of time and class."""
    time = nn.Sequential(nn.Linear(config.time_channels, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
    classes = nn.Embedding(config.classes + 1, embedding) if config.classes else None
    for module in (time[0], time[2], classes):
        if module is not None:
            nn.init.normal_(cast(Tensor, module.weight), std=0.02)
    return time, classes
