"""diffkern: the inner loops of diffusion and flow-matching models, fast, exact and reproducible, in PyTorch.

    diffusion = diffkern.Diffusion(network, diffkern.linear(), "eps")
    diffusion.loss(images).backward()
    images = diffusion.sample((16, 3, 64, 64), "ddim", steps=50, seeds=0)

or, function by function, on which that stands,

    schedule = diffkern.linear()
    x = diffkern.initial(plan := diffkern.ddim(schedule, 50), (16, 3, 64, 64), seeds=0)
    images = diffkern.sample(model, x, plan, seeds=0)

Top level is what leads from a schedule to a loss and to images, by one rule: all that makes a schedule (`SCHEDULES`),
all that makes a sampler's plan (`SAMPLERS`), every op in each of its forms (`ops`), every loss, and the verbs that go
with them (`noised`, `initial`, `sample`, `predictor_corrector`, `rk45`, `log_likelihood`, `convert` ...). The rest is
in wings:

| wing | |
|---|---|
| `schedules` | alpha(t) and sigma(t); `schedules.grids`: spacings of steps; `schedules.predictions` |
| `plan`, `samplers` | a sampler is a plan, which is data: `plan.Plan` holds it, `samplers` make it |
| `diffusion` | `Diffusion`: network, schedule and prediction held together, trained, sampled and saved as one |
| `gan` | `GAN`: a generator with its discriminator, trained, sampled and saved as one |
| `degradations` | what images lose and a model gives back: super-resolution, inpainting, colourisation, deblurring |
| `sampling` | runs plans, and samplers whose steps depend on the sample |
| `objectives` | losses and bounds; `objectives.weightings`, `objectives.time_sampling` |
| `guidance` | models that guide models |
| `simulate` | ODEs, SDEs and probability paths, for study; `simulate.likelihood`: exact densities |
| `nn` | attention blocks and a UNet |
| `data`, `train`, `generate`, `metrics` | from a folder of images to samples with their scores |
| `ops`, `reference` | the native ops; the same in plain torch |
| `streams`, `brownian` | the addresses of noise; Brownian paths by address |
| `compat` | drop-ins for other libraries, a module each |

Names that the eye confuses:

- `sample` runs a plan, `samplers` make plans, `sampling` is the module that `sample` comes from.
- `Diffusion` is the model object, `diffusion` the wing that it comes from; `DiscreteSchedule` and the like are noise.
- `plan` is the module of `Plan`; a plan is what ``ddim(schedule, 50)`` returns.
- `loss`, `noising`, `variational` and `step` are ops: they take coefficients. `prediction_loss` and the other losses,
  `noised` and `sample` take a schedule or a plan, and call them.
- `linear`, `cosine`, `sigmoid`, `exponential`, `laplace`, `edm`, `flow` and `path` are noise schedules, no functions of
  a tensor. `flow` is that of flow matching, `path` that of any two functions alpha(t) and beta(t).
- `objectives.flow_matching` is the loss on a `flow` or a `path`, `compat.flow_matching` the library of that name.
- `seeds` are those of a job's samples, from one integer; `draw_seeds` draws those of a training step from torch.
- `bits_per_dim` is the variational bound; `simulate.likelihood.nats_to_bits_per_dim` is the unit of an exact density.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from diffkern import (
    brownian,
    degradations,
    diffusion,
    gan,
    guidance,
    objectives,
    ops,
    plan,
    reference,
    samplers,
    sampling,
    schedules,
    simulate,
    streams,
)
from diffkern._load import build_info, cuda_status
from diffkern.diffusion import Diffusion
from diffkern.gan import GAN
from diffkern.objectives.adversarial import discriminator_loss, generator_loss
from diffkern.objectives.flow_matching import flow_matching_loss
from diffkern.objectives.losses import (
    draw_seeds,
    drop_condition,
    edm_loss,
    noised,
    prediction_loss,
    simple_loss,
    uniform_times,
)
from diffkern.objectives.score_matching import (
    denoising_score_matching_loss,
    implicit_score_matching_loss,
    ncsn_loss,
    sliced_score_matching_loss,
)
from diffkern.objectives.variational import bits_per_dim, hybrid_loss, vlb_loss
from diffkern.ops import *
from diffkern.plan import Plan, Row
from diffkern.samplers import *
from diffkern.sampling import Sampled, initial, pc_plan, predictor_corrector, rk45, sample, transition_logprob
from diffkern.schedules import makers
from diffkern.schedules.makers import *
from diffkern.schedules.predictions import convert
from diffkern.simulate.likelihood import log_likelihood

if TYPE_CHECKING:
    from diffkern import compat, data, generate, metrics, nn, train

__version__ = "0.1.0"

__all__ = [
    "GAN",
    "Diffusion",
    "Plan",
    "Row",
    "Sampled",
    "__version__",
    "bits_per_dim",
    "brownian",
    "build_info",
    "compat",
    "convert",
    "cuda_status",
    "data",
    "degradations",
    "denoising_score_matching_loss",
    "diffusion",
    "discriminator_loss",
    "draw_seeds",
    "drop_condition",
    "edm_loss",
    "flow_matching_loss",
    "gan",
    "generate",
    "generator_loss",
    "guidance",
    "hybrid_loss",
    "implicit_score_matching_loss",
    "initial",
    "log_likelihood",
    "metrics",
    "ncsn_loss",
    "nn",
    "noised",
    "objectives",
    "ops",
    "pc_plan",
    "plan",
    "prediction_loss",
    "predictor_corrector",
    "reference",
    "rk45",
    "sample",
    "samplers",
    "sampling",
    "schedules",
    "simple_loss",
    "simulate",
    "sliced_score_matching_loss",
    "streams",
    "train",
    "transition_logprob",
    "uniform_times",
    "vlb_loss",
]
# Every op, sampler and schedule, as these modules list them; editors read this form.
__all__ += ops.__all__
__all__ += samplers.__all__
__all__ += makers.__all__


if not TYPE_CHECKING:  # a checker that saw this would take any name for one of the package

    def __getattr__(name: str) -> Any:
        """The wings that `import diffkern` leaves out, when they are first asked for."""
        if name in ("compat", "data", "generate", "metrics", "nn", "train"):
            return import_module(f"diffkern.{name}")
        raise AttributeError(f"module 'diffkern' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
