"""Helpers that flow_matching exports, and its base class of models."""

from diffkern.compat.flow_matching.utils.model_wrapper import ModelWrapper
from diffkern.compat.flow_matching.utils.utils import expand_tensor_like, gradient, unsqueeze_to_match

__all__ = ["ModelWrapper", "expand_tensor_like", "gradient", "unsqueeze_to_match"]
