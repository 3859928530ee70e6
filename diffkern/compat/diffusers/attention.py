"""diffusers' attention layers on `diffkern.attention`, through `set_attn_processor`."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor
from torch.nn import functional as F

from diffkern.compat.diffusers._blocks import last_of, normed, plus
from diffkern.compat.kit.kernels import why_not_channels, why_not_on, why_torch
from diffkern.ops import attention

__all__ = ["DiffkernAttnProcessor", "why_not"]

# Which numbers a processor of diffusers computes. Its own classes only: a subclass may do anything.
_SCALED_BY_LAYER = (AttnProcessor, SlicedAttnProcessor, XFormersAttnProcessor)
_KNOWN = (*_SCALED_BY_LAYER, AttnProcessor2_0, FusedAttnProcessor2_0)


def why_not(layer: Any, processor: Any) -> str | None:
    """Why `DiffkernAttnProcessor` cannot stand for this layer's processor, one sentence; None if it can."""
    if type(processor) not in _KNOWN:
        return f"{type(processor).__name__} computes something else than softmax(Q K^T) V of the layer's projections"
    if type(layer) is not Attention:
        return f"{type(layer).__name__} is not diffusers' Attention layer"
    if layer.inner_kv_dim != layer.inner_dim:
        return f"keys and values have {layer.inner_kv_dim} channels, queries {layer.inner_dim}: fewer heads"
    if type(processor) is SlicedAttnProcessor and layer.spatial_norm is not None:
        return "SlicedAttnProcessor leaves out the layer's spatial norm"
    return why_not_channels(layer.inner_dim // layer.heads)


def _why_not_now(x: Tensor, mask: Tensor | None, extra: bool) -> str | None:
    """Why this call runs on the original processor."""
    if mask is not None:
        return "an attention mask was given"
    if extra:
        return "the deprecated argument scale was given"
    return why_not_on(x)


class DiffkernAttnProcessor(AttnProcessor2_0):
    """softmax(scale Q K^T) V of an attention layer of diffusers by one fused op, without the N x N scores.

    Self- and cross-attention, 3-D tokens and [B, C, H, W], with the layer's norms, projections, residual and
    rescaling, fused projections included. The scale is that of ``original``, the processor it stands for: the layer's
    own for AttnProcessor, SlicedAttnProcessor and XFormersAttnProcessor, D^-1/2 for AttnProcessor2_0 (which ignores
    the layer's) and FusedAttnProcessor2_0. Logits and softmax are float32 (float64 for float64) whatever the layer's
    upcast flags say.
    A call with an attention mask runs on ``original``, counted in ``fallbacks`` with its reason; so does one on a
    device or a dtype without kernels. Where torch's F.scaled_dot_product_attention is the faster one (bfloat16 on
    processors with AMX, see `diffkern.compat.kit.kernels.torch_is_faster`), it does the softmax, counted likewise. A
    layer that `why_not` names a reason for is refused: RuntimeError of the op, or AttributeError of a layer of another
    kind.
    A subclass of AttnProcessor2_0, as SDXL's pipelines ask for that class before they keep a VAE in half precision.
    """

    def __init__(self, original: Any = None) -> None:
        super().__init__()
        self.original = AttnProcessor2_0() if original is None else original
        self.fallbacks: Counter[str] = Counter()
        """Reason -> number of calls that ran on the original processor, or on torch's attention as it is faster."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        extra = bool(args) or kwargs.get("scale") is not None
        reason = _why_not_now(hidden_states, attention_mask, extra)
        if reason is not None:
            self.fallbacks[reason] += 1
            if not isinstance(self.original, SlicedAttnProcessor):  # which takes no more than these
                args = (temb, *args)
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, *args, **kwargs)
        tokens = hidden_states if attn.spatial_norm is None else attn.spatial_norm(hidden_states, temb)
        image = tokens.shape if tokens.dim() == 4 else None
        if image is not None:
            tokens = tokens.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            tokens = normed(attn.group_norm, None, tokens.transpose(1, 2)).transpose(1, 2)
        q, k, v = (self._heads(attn, t) for t in self._project(attn, tokens, encoder_hidden_states))
        scale = None
        if isinstance(self.original, _SCALED_BY_LAYER):
            scale = attn.scale
        else:  # the processors on scaled_dot_product_attention also normalise queries and keys where the layer says so
            q = q if attn.norm_q is None else attn.norm_q(q)
            k = k if attn.norm_k is None else attn.norm_k(k)
        reason = why_torch(q, q.shape[3], q.shape[2], k.shape[2])
        if reason is None:
            out = attention(q, k, v, scale)
        else:
            if not torch.compiler.is_compiling():
                self.fallbacks[reason] += 1
            out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        out = out.transpose(1, 2).flatten(2)  # lies in memory as the queries do: no copy
        out = attn.to_out[1](attn.to_out[0](out))
        if image is not None:
            out = out.transpose(1, 2).unflatten(2, image[2:])
        if attn.residual_connection:
            out = plus(out, hidden_states, last_of(attn.to_out))
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor

    def _project(self, attn: Any, tokens: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v, [B, tokens, heads x channels] each."""
        fused = isinstance(self.original, FusedAttnProcessor2_0)
        if context is None:
            if fused:
                q, k, v = attn.to_qkv(tokens).chunk(3, dim=-1)
                return q, k, v
            return attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        if attn.norm_cross:
            context = attn.norm_encoder_hidden_states(context)
        if fused:
            k, v = attn.to_kv(context).chunk(2, dim=-1)
            return attn.to_q(tokens), k, v
        return attn.to_q(tokens), attn.to_k(context), attn.to_v(context)

    @staticmethod
    def _heads(attn: Any, x: Tensor) -> Tensor:
        return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
