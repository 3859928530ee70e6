"""Affine probability paths."""

from diffkern.compat.flow_matching.path.affine import AffineProbPath, CondOTProbPath
from diffkern.compat.flow_matching.path.path import ProbPath
from diffkern.compat.flow_matching.path.path_sample import PathSample

__all__ = ["AffineProbPath", "CondOTProbPath", "PathSample", "ProbPath"]
