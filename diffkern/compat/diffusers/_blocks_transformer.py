"""The transformer blocks of diffusers' UNets and of DiT with fewer passes over the tokens."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models import activations, attention, normalization
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
)
from diffusers.models.transformers import transformer_2d
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern.compat.diffusers._blocks import last_of, normed, plus, will_differentiate
from diffkern.compat.diffusers.attention import DiffkernAttnProcessor
from diffkern.compat.kit.kernels import why_not_on
from diffkern.nn.adaptive import adaptive_linear, adaptive_norm, gelu_linear
from diffkern.nn.plain import is_plain

NORMS = ("layer_norm", "ada_norm_zero")
"""The norm_type of the transformer blocks known here."""


class Transformer2DModel(transformer_2d.Transformer2DModel):
    """diffusers' transformer of an image: in channels_last it is [B, HW, C] already, both ways without a copy."""

    def _operate_on_continuous_inputs(self, hidden_states: Tensor) -> tuple[Tensor, int]:
        x = normed(self.norm, None, hidden_states)
        if self.use_linear_projection:
            tokens = self.proj_in(x.permute(0, 2, 3, 1).flatten(1, 2))
        else:
            tokens = self.proj_in(x).permute(0, 2, 3, 1).flatten(1, 2)
        return tokens, tokens.shape[2]

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if self.use_linear_projection:
            x = self.proj_out(hidden_states).unflatten(1, (height, width)).permute(0, 3, 1, 2)
        else:
            x = self.proj_out(hidden_states.unflatten(1, (height, width)).permute(0, 3, 1, 2))
        return plus(x, residual, self.proj_out)


class BasicTransformerBlock(attention.BasicTransformerBlock):
    """diffusers' transformer block: gates, modulations and sums in one pass each, written where it may be.

        x = x + g1 attn1(norm1(x));  x = x + attn2(norm2(x), context);  x = x + g2 ff(norm3(x) (1 + scale) + shift)

    Plain (layer_norm) and with DiT's adaptive norms (ada_norm_zero; Peebles and Xie 2023); calls and blocks with more
    (GLIGEN, chunks, positions of their own, other norms) run on diffusers' code.
    """

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        x = hidden_states
        if (
            self.norm_type not in NORMS
            or self.pos_embed is not None
            or self._chunk_size is not None
            or cross_attention_kwargs
            or x.dim() != 3
        ):
            theirs: Any = super().forward
            made: Tensor = theirs(
                hidden_states,
                attention_mask,
                encoder_hidden_states,
                encoder_attention_mask,
                timestep,
                cross_attention_kwargs,
                class_labels,
                added_cond_kwargs,
            )
            return made
        gate = gate_ff = scale = shift = None
        if self.norm_type == "layer_norm":
            y = self.norm1(x)
        else:
            y, gate, shift, scale, gate_ff = self.norm1(x, timestep, class_labels, hidden_dtype=x.dtype)
        context = encoder_hidden_states if self.only_cross_attention else None
        y = self.attn1(y, encoder_hidden_states=context, attention_mask=attention_mask)
        x = gated(y, x, gate, _last_of_attention(self.attn1))
        if self.attn2 is not None:
            y = self.attn2(
                self.norm2(x), encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask
            )
            x = gated(y, x, None, _last_of_attention(self.attn2))
        if scale is None or shift is None:
            y = self.ff(self.norm3(x))
        else:
            y = adaptive_feed_forward(self.norm3, self.ff, x, scale, shift)
        return gated(y, x, gate_ff, _last_of_feed_forward(self.ff))


class AdaLayerNormZero(normalization.AdaLayerNormZero):
    """diffusers' adaptive norm of DiT, its modulation in one pass instead of two (Peebles and Xie 2023)."""

    def forward(
        self,
        x: Tensor,
        timestep: Tensor | None = None,
        class_labels: Tensor | None = None,
        hidden_dtype: torch.dtype | None = None,
        emb: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        if self.emb is not None:
            emb = self.emb(timestep, class_labels, hidden_dtype=hidden_dtype)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = self.linear(self.silu(emb)).chunk(6, dim=1)
        return normed_and_modulated(self.norm, x, scale, shift), gate, shift_ff, scale_ff, gate_ff


class GEGLU(activations.GEGLU):
    """diffusers' gated GELU, x gelu(g) of the halves of one linear layer (Shazeer 2020): gelu(g) is not kept."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or hidden_states.device.type not in ("cpu", "cuda"):
            return super().forward(hidden_states, *args, **kwargs)
        x, gate = self.proj(hidden_states).chunk(2, dim=-1)
        return geglu(x, gate)


def normed_and_modulated(norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """norm(x) (1 + scale) + shift of tokens [B, N, C] and [B, C], the modulation in one pass."""
    if _is_adaptive(norm, x, scale, shift):
        return adaptive_norm(x, scale, shift, norm.eps)
    y, factor, shift = norm(x), 1 + scale[:, None], shift[:, None]
    return torch.addcmul(shift, y, factor) if y.dtype == factor.dtype == shift.dtype else y * factor + shift


def adaptive_feed_forward(norm: Any, ff: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """ff(norm(x) (1 + scale) + shift); where ff is linear, GELU by its tanh, linear, what both read is not kept."""
    if not (is_plain(ff, attention.FeedForward) and is_plain(ff.net, nn.ModuleList) and len(ff.net) == 3):
        return ff(normed_and_modulated(norm, x, scale, shift))
    act, dropout, last = ff.net
    usual = is_plain(act, activations.GELU) and act.approximate == "tanh" and is_plain(dropout, nn.Dropout)
    usual = usual and why_not_on(x) is None  # elsewhere torch may not even know of autocast
    if not (usual and is_plain(act.proj, nn.Linear) and is_plain(last, nn.Linear)):
        return ff(normed_and_modulated(norm, x, scale, shift))
    if _is_adaptive(norm, x, scale, shift):
        u = adaptive_linear(x, scale, shift, act.proj, norm.eps)
    else:
        u = act.proj(normed_and_modulated(norm, x, scale, shift))
    return gelu_linear(u, last, dropout)


def _is_adaptive(norm: Any, x: Tensor, scale: Tensor, shift: Tensor) -> bool:
    """Whether the norm is the plain one that `diffkern.nn.adaptive` computes."""
    return is_plain(norm, nn.LayerNorm) and norm.weight is None and x.dtype == scale.dtype == shift.dtype


def gated(made: Tensor, x: Tensor, gate: Tensor | None, last: Any) -> Tensor:
    """x + gate made in one pass, of tokens [B, N, C] and a gate [B, C] or None; `last` is the layer that made it."""
    if gate is None:
        return plus(made, x, last)
    gate = gate[:, None]
    return torch.addcmul(x, gate, made) if x.dtype == gate.dtype == made.dtype else gate * made + x


_RETURN_LAST = (DiffkernAttnProcessor, AttnProcessor, AttnProcessor2_0, FusedAttnProcessor2_0)
"""Processors that return what the last layer has made and keep nothing of it."""


def _last_of_attention(layer: Any) -> Any:
    """The linear layer whose result an attention layer returns; None where somebody else may know it."""
    usual = is_plain(layer, Attention) and not layer.residual_connection and type(layer.processor) in _RETURN_LAST
    return last_of(layer.to_out) if usual else None


def _last_of_feed_forward(layer: Any) -> Any:
    """As `_last_of_attention`, of diffusers' FeedForward."""
    usual = is_plain(layer, attention.FeedForward) and is_plain(layer.net, nn.ModuleList)
    return layer.net[-1] if usual else None


class _Geglu(torch.autograd.Function):
    """y = x gelu(g);  dx = gelu(g) dy,  dg = x gelu'(g) dy. Keeps x and g, which lie in one tensor already."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gate: Tensor) -> Tensor:
        return F.gelu(gate).mul_(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, gate = ctx.saved_tensors
        return F.gelu(gate) * grad, torch.ops.aten.gelu_backward(grad * x, gate)


def geglu(x: Tensor, gate: Tensor) -> Tensor:
    """x gelu(gate), with one new tensor."""
    if will_differentiate(x, gate):
        made: Tensor = _Geglu.apply(x, gate)
        return made
    return F.gelu(gate).mul_(x)
