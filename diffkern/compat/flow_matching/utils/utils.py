"""Shapes and derivatives."""

from __future__ import annotations

import torch
from torch import Tensor


def unsqueeze_to_match(source: Tensor, target: Tensor, how: str = "suffix") -> Tensor:
    """``source`` with dimensions of size 1 appended ("suffix") or put in front ("prefix") until it has target's."""
    if how not in ("prefix", "suffix"):
        raise AssertionError(f"how must be 'prefix' or 'suffix', got {how!r}")
    ones = (1,) * max(target.ndim - source.ndim, 0)
    return source.reshape((*source.shape, *ones) if how == "suffix" else (*ones, *source.shape))


def expand_tensor_like(input_tensor: Tensor, expand_to: Tensor) -> Tensor:
    """A vector [B] as a view of the shape of ``expand_to`` [B, ...], constant over each sample."""
    if input_tensor.ndim != 1:
        raise AssertionError(f"input_tensor must be a vector [B], got shape {list(input_tensor.shape)}")
    if input_tensor.shape[0] != expand_to.shape[0]:
        raise AssertionError(
            f"input_tensor must have the batch size of expand_to, {expand_to.shape[0]}, got {input_tensor.shape[0]}"
        )
    return unsqueeze_to_match(input_tensor, expand_to).expand_as(expand_to)


def gradient(output: Tensor, x: Tensor, grad_outputs: Tensor | None = None, create_graph: bool = False) -> Tensor:
    """The derivative by x of sum(grad_outputs * output), grad_outputs being ones if not given; x's shape."""
    weights = torch.ones_like(output) if grad_outputs is None else grad_outputs
    (found,) = torch.autograd.grad(output, x, grad_outputs=weights, create_graph=create_graph)
    return found
