"""The way down and the middle of a UNet, and the stages that its levels are put together from."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from torch import Tensor, nn

from diffkern.nn.attention import SpatialSelfAttention
from diffkern.nn.blocks import ConvNeXtBlock, ConvResample, InputSkip, Resampler, ResBlock
from diffkern.nn.conditions import Known, as_mapping, check_state, expect, weight_of
from diffkern.nn.embedded import Embedded
from diffkern.nn.heads import count_heads
from diffkern.nn.norm import count_groups
from diffkern.nn.rows import project
from diffkern.nn.transformer import SpatialTransformer, TransformerBlock
from diffkern.nn.unet_config import UNetConfig


class Stage(nn.Module):
    """A block and the attention that may follow it: ``stage(x, change, contexts)``."""

    def __init__(self, block: nn.Module, attention: nn.Module | None = None) -> None:
        super().__init__()
        self.block = block
        self.attention = attention

    def forward(self, x: Tensor, change: Tensor, contexts: tuple[Tensor, ...]) -> Tensor:
        x = self.block(x, change)
        if self.attention is not None:
            x = self.attention(x, contexts) if isinstance(self.attention, SpatialTransformer) else self.attention(x)
        return x

    @property
    def crossing(self) -> list[TransformerBlock]:
        """The transformer blocks that attend to a context."""
        if not isinstance(self.attention, SpatialTransformer):
            return []
        return [block for block in self.attention.transformers if block.crosses]


class Level(nn.Module):
    """The blocks of one resolution, and what leads to the next."""

    def __init__(self, blocks: list[Stage], resample: nn.Module | None, input_skip: InputSkip | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.resample = resample
        self.input_skip = input_skip

    @property
    def run_order(self) -> list[nn.Module]:
        """The blocks, then what resamples."""
        return [*self.blocks, *([] if self.resample is None else [self.resample])]


class Parts:
    """Makes the blocks of a network from its configuration."""

    def __init__(self, config: UNetConfig) -> None:
        self.config = config

    def block(self, in_channels: int, out_channels: int, resample: Any = "none") -> nn.Module:
        config = self.config
        made = ResBlock if config.block == "residual" else ConvNeXtBlock
        return made(
            in_channels,
            out_channels,
            config.embedding_width,
            modulation=config.modulation,
            resample=resample,
            filter=config.filter,
            resampled_skip_conv=config.resampled_skip_conv,
            dropout=config.dropout,
            groups=config.groups,
            group_channels=config.group_channels,
            eps=config.eps,
            residual_scale=config.residual_scale,
            zero_init=config.zero_init,
        )

    def attention(self, level: int) -> nn.Module:
        config = self.config
        channels, depth = config.widths[level], config.depths[level]
        eps = config.eps if config.attention_eps is None else config.attention_eps
        groups = count_groups(channels, config.groups, config.group_channels)
        heads = count_heads(channels, config.heads, config.head_channels)
        if depth:
            return SpatialTransformer(
                channels,
                config.context_channels,
                depth,
                heads,
                groups=groups,
                eps=eps,
                attention=config.attention,
                zero_init=config.zero_init,
            )
        made = SpatialSelfAttention(
            channels,
            heads,
            groups=groups,
            eps=eps,
            attention=config.attention,
            residual_scale=config.residual_scale,
        )
        if not config.zero_init:
            made.proj_out.reset_parameters()
        return made

    def stage(self, in_channels: int, level: int, attends: bool) -> Stage:
        return Stage(self.block(in_channels, self.config.widths[level]), self.attention(level) if attends else None)

    def resample(self, channels: int, kind: Any) -> nn.Module:
        config = self.config
        if config.resample == "residual":
            return self.block(channels, channels, kind)
        if config.resample == "conv":
            return ConvResample(channels, kind, config.downsample_padding)
        return Resampler(kind, config.filter)


class Encoder(Embedded):
    """The way down and the middle, which a `UNet` and a `UNetClassifier` have alike."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(config)
        parts, widths = Parts(config), config.widths
        given = config.in_channels + config.concat_channels
        current = widths[0] if config.enter_channels is None else config.enter_channels
        self.enter = nn.Conv2d(given, current, 3, padding=1)
        self.down = nn.ModuleList()
        self.skip_channels = [current]
        """Channels of every skip, in the order in which they are made."""
        for level, width in enumerate(widths):
            stages = []
            for _ in range(config.block_counts[level]):
                stages.append(parts.stage(current, level, level in config.attention_levels))
                current = width
                self.skip_channels.append(current)
            resample, input_skip = None, None
            if level + 1 < len(widths):
                resample = parts.resample(current, "down")
                self.skip_channels.append(current)
                if config.input_skips == "residual":
                    input_skip = InputSkip(given, current, config.filter, config.residual_scale)
                    given = current
            self.down.append(Level(stages, resample, input_skip))
        attention = parts.attention(len(widths) - 1) if config.middle_attention else None
        self.middle = nn.ModuleList(
            [Stage(parts.block(current, current), attention), Stage(parts.block(current, current))]
        )

    def _levels(self) -> list[Any]:
        """The levels after the middle."""
        return []

    def _blocks(self) -> Iterator[Stage | ResBlock | ConvNeXtBlock]:
        """Every stage, and every block that resamples and knows the time, in the order in which they run."""
        down: list[Any] = [*self.down]
        middle: list[Any] = [*self.middle]
        for blocks in (*(level.run_order for level in down), middle, *(level.run_order for level in self._levels())):
            yield from (block for block in blocks if isinstance(block, Stage | ResBlock | ConvNeXtBlock))

    def known(self, t: Tensor, cond: Any, batch: int) -> Known:
        """What the network makes of times [B] (or one for all) and condition alone: see `Known`."""
        return Known(self.changes(t, cond, batch), self.contexts(cond, batch))

    def changes(self, t: Tensor, cond: Any, batch: int) -> tuple[Tensor, ...]:
        """Every block's modulation [B, ...]. Without gradients a sample's have the same bits in every batch."""
        embedding = self.embed(t, cond, batch)
        return tuple(project(layer, embedding, silu=True) for layer in self._modulations())

    def contexts(self, cond: Any, batch: int) -> tuple[Tensor, ...]:
        """Every cross-attention's keys and values [B, T, 2 C]."""
        context = as_mapping(cond).get("context")
        if not self.config.context_channels:
            if context is not None:
                raise ValueError("this network has no context, but cond['context'] was given")
            return ()
        weight = weight_of(self)
        context = expect("context", context, (batch, None, self.config.context_channels), weight)
        context = context.to(weight.dtype)
        return tuple(layer(context) for layer in self._context_layers())

    def _modulations(self) -> list[Any]:
        """The layer of every block that makes its modulation."""
        timed: list[Any] = [block.block if isinstance(block, Stage) else block for block in self._blocks()]
        return [block.modulate for block in timed]

    def _context_layers(self) -> list[Any]:
        """The layer of every cross-attention that makes its keys and values."""
        return [block.kv for stage in self._blocks() if isinstance(stage, Stage) for block in stage.crossing]

    def _checked(self, x: Any) -> None:
        config = self.config
        check_state(x, config.in_channels, config.divisor, weight_of(self))

    def _run(self, level: Any, h: Tensor, changes: Iterator[Tensor], contexts: Iterator[Tensor]) -> Tensor:
        """One stage or block."""
        if isinstance(level, Stage):
            return self._stage(level, h, next(changes), tuple(islice(contexts, len(level.crossing))))
        if isinstance(level, ResBlock | ConvNeXtBlock):
            return self._stage(level, h, next(changes))
        out: Tensor = level(h)
        return out

    def encode(
        self, x: Tensor, given: dict[str, Any], changes: Iterator[Tensor], contexts: Iterator[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The middle's output and the skips."""
        entered = self._conditioned(x, given)
        h = self.enter(entered)
        skips = [h]
        down: list[Any] = [*self.down]
        for level in down:
            for stage in level.blocks:
                h = self._run(stage, h, changes, contexts)
                skips.append(h)
            if level.resample is not None:
                h = self._run(level.resample, h, changes, contexts)
                if level.input_skip is not None:
                    h = entered = level.input_skip(h, entered)
                skips.append(h)
        for stage in self.middle:
            h = self._run(stage, h, changes, contexts)
        return h, skips
