"""flow_matching's paths, schedulers and ODE solver under their own names, on fused ops (docs/compat-flow-matching.md).

from diffkern.compat.flow_matching.path import AffineProbPath, CondOTProbPath
from diffkern.compat.flow_matching.path.scheduler import CondOTScheduler
from diffkern.compat.flow_matching.solver import ODESolver
from diffkern.compat.flow_matching.utils import ModelWrapper

flow_matching need not be installed; its own schedulers and models are taken as they are. Signatures and behaviour as
published (arXiv 2412.06264, 2210.02747); the discrete and the Riemannian parts are not here.
"""

from typing import TYPE_CHECKING

from diffkern.compat.kit.lazy import lazily

if TYPE_CHECKING:
    from diffkern.compat.flow_matching import path, solver, utils

__all__ = ["path", "solver", "utils"]

__getattr__, __dir__ = lazily(__name__, __all__)
