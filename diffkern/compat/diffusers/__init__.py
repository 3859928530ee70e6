"""diffusers' schedulers on fused ops: same names, configs and results, one launch a step (docs/compat-diffusers.md).

from diffkern.compat.diffusers import DDIMScheduler, accelerate
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
print(accelerate(pipe))  # or this: the scheduler of its class, and the attention layers
"""

import sys

# _engine first: without diffusers it says in one sentence what to install.
from diffkern.compat.diffusers import _engine
from diffkern.compat.diffusers._report import Report, Swap
from diffkern.compat.diffusers.accelerate import accelerate, restore
from diffkern.compat.diffusers.attention import DiffkernAttnProcessor
from diffkern.compat.diffusers.ddim import DDIMScheduler
from diffkern.compat.diffusers.ddim_inverse import DDIMInverseScheduler
from diffkern.compat.diffusers.ddpm import DDPMScheduler
from diffkern.compat.diffusers.deis import DEISMultistepScheduler
from diffkern.compat.diffusers.dpm_solver import DPMSolverMultistepScheduler
from diffkern.compat.diffusers.edm_euler import EDMEulerScheduler
from diffkern.compat.diffusers.euler import EulerDiscreteScheduler
from diffkern.compat.diffusers.euler_ancestral import EulerAncestralDiscreteScheduler
from diffkern.compat.diffusers.flow_match import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from diffkern.compat.diffusers.heun import HeunDiscreteScheduler
from diffkern.compat.diffusers.lms import LMSDiscreteScheduler
from diffkern.compat.diffusers.repaint import RePaintScheduler
from diffkern.compat.diffusers.replace import replace
from diffkern.compat.diffusers.score_sde_ve import ScoreSdeVeScheduler
from diffkern.compat.diffusers.unipc import UniPCMultistepScheduler

for _found in list(vars().values()):
    if isinstance(_found, type) and issubclass(_found, _engine.DropIn):
        # A pipeline's file names its scheduler's module; diffusers looks there for the base class that can load it.
        sys.modules[_found.__module__].__dict__["SchedulerMixin"] = _engine.SchedulerMixin

__all__ = [
    "DDIMInverseScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DiffkernAttnProcessor",
    "EDMEulerScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "HeunDiscreteScheduler",
    "LMSDiscreteScheduler",
    "RePaintScheduler",
    "Report",
    "ScoreSdeVeScheduler",
    "Swap",
    "UniPCMultistepScheduler",
    "accelerate",
    "replace",
    "restore",
]
