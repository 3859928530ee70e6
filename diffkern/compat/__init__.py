"""Drop-in classes and functions for other projects: the same names and signatures, on diffkern's fused ops.

Each is a module or package of its own, imported when it is first asked for: ``diffkern.compat.edm`` after ``import
diffkern``, or ``from diffkern.compat import edm``. `kit` is what they stand on together.
"""

from typing import TYPE_CHECKING

from diffkern.compat.kit.lazy import lazily

if TYPE_CHECKING:
    from diffkern.compat import diffusers as diffusers
    from diffkern.compat import edm as edm
    from diffkern.compat import flow_matching as flow_matching
    from diffkern.compat import guided_diffusion as guided_diffusion
    from diffkern.compat import k_diffusion as k_diffusion
    from diffkern.compat import score_sde as score_sde
    from diffkern.compat import torchcfm as torchcfm

__getattr__, __dir__ = lazily(
    __name__,
    ("diffusers", "edm", "flow_matching", "guided_diffusion", "k_diffusion", "score_sde", "torchcfm"),
)
