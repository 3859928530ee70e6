"""The convolutional blocks of diffusers' UNets and VAEs on fused parts."""

from __future__ import annotations

from typing import Any

from diffusers.models import resnet, upsampling
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern.compat.diffusers._blocks import by_op, normed, plus
from diffkern.compat.kit.kernels import why_not_on
from diffkern.nn.convolution import convolve


class ResnetBlock2D(resnet.ResnetBlock2D):
    """diffusers' residual block: GroupNorm, time embedding and SiLU in one op, and no tensor made for the sum.

        h = conv1(resample(silu(norm(x))));  y = (shortcut(resample(x)) + conv2(dropout(silu(norm(h + e))))) / factor

    or silu(norm(h) (1 + e_scale) + e_shift). Ho et al. 2020, Dhariwal and Nichol 2021.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if args or kwargs or (temb is not None and self.time_emb_proj is None):
            theirs: Any = super().forward
            made: Tensor = theirs(input_tensor, temb, *args, **kwargs)
            return made
        x = input_tensor
        h = normed(self.norm1, self.nonlinearity, x)
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            if self.upsample is not None and x.shape[0] >= 64 and x.device.type != "cpu":
                x, h = x.contiguous(), h.contiguous()  # as diffusers does, for the kernel of large batches
            x, h = resample(x), resample(h)
        h = convolve(self.conv1, h)
        add = scale = shift = None
        if self.time_emb_proj is not None:
            add = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))
        if self.time_embedding_norm == "scale_shift":
            if add is None:
                raise ValueError("`temb` should not be None when `time_embedding_norm` is scale_shift")
            (scale, shift), add = add.chunk(2, dim=1), None
        h = normed(self.norm2, self.nonlinearity, h, add=add, scale=scale, shift=shift)
        h = convolve(self.conv2, self.dropout(h))
        if self.conv_shortcut is not None:
            x = self.conv_shortcut(x)
        y = plus(h, x, self.conv2)
        return y if self.output_scale_factor == 1 else y.div_(self.output_scale_factor)


class Upsample2D(upsampling.Upsample2D):
    """diffusers' nearest upsampling by 2 and its convolution, from the small image where that is less work.

    Without diffusers' copy to NCHW from 64 samples on, which is for a CUDA kernel.
    """

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        x = hidden_states
        conv: Any = self.conv if self.name == "conv" else self.Conv2d_0
        usual = self.norm is None and not self.use_conv_transpose and self.interpolate and x.shape[1] == self.channels
        if args or kwargs or not usual or output_size is not None or x.device.type != "cpu":
            return super().forward(hidden_states, output_size, *args, **kwargs)
        return convolve(conv, x, upsample=True) if self.use_conv else F.interpolate(x, scale_factor=2.0, mode="nearest")


class GroupNorm(nn.GroupNorm):
    """The norm before a network's last convolution, by diffkern's op."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) if why_not_on(input) is not None else by_op(self, input, False)


class Conv2d(nn.Conv2d):
    """A network's last convolution: what leaves the network is contiguous, as it is without channels_last inside."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).contiguous()
