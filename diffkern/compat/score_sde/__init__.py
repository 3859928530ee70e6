"""score_sde_pytorch's interfaces (arXiv 2011.13456) on fused ops: docs/compat-score-sde.md.

    from diffkern.compat.score_sde import likelihood, losses, sampling, sde_lib  # was: import likelihood, losses, ...
    from diffkern.compat.score_sde.models import get_score_fn  # was: from models.utils import get_score_fn

Needs torch alone; scipy where its ODE solvers are asked for by name.
"""

from typing import TYPE_CHECKING

from diffkern.compat.kit.lazy import lazily

if TYPE_CHECKING:
    from diffkern.compat.score_sde import likelihood, losses, models, sampling, sde_lib

__all__ = ["likelihood", "losses", "models", "sampling", "sde_lib"]

__getattr__, __dir__ = lazily(__name__, __all__)
