"""k-diffusion's samplers and model wrappers on fused ops; needs torch alone (docs/compat-k-diffusion.md).

    from diffkern.compat import k_diffusion as K  # was: import k_diffusion as K

    x = K.sampling.sample_dpmpp_2m(K.external.CompVisDenoiser(model), x, sigmas)

Modules, names and signatures are k-diffusion's; every name is also here.
"""

from typing import TYPE_CHECKING

from diffkern.compat.kit.lazy import lazily

if TYPE_CHECKING:
    from diffkern.compat.k_diffusion import external, layers, sampling, utils
    from diffkern.compat.k_diffusion._noise import BrownianTreeNoiseSampler
    from diffkern.compat.k_diffusion.external import (
        CompVisDenoiser,
        CompVisVDenoiser,
        DiscreteEpsDDPMDenoiser,
        DiscreteSchedule,
        DiscreteVDDPMDenoiser,
        OpenAIDenoiser,
        VDenoiser,
    )
    from diffkern.compat.k_diffusion.layers import Denoiser, SimpleLossDenoiser
    from diffkern.compat.k_diffusion.sampling import (
        append_zero,
        default_noise_sampler,
        get_ancestral_step,
        get_sigmas_exponential,
        get_sigmas_karras,
        get_sigmas_polyexponential,
        get_sigmas_vp,
        log_likelihood,
        sample_dpm_2,
        sample_dpm_2_ancestral,
        sample_dpmpp_2m,
        sample_dpmpp_2m_sde,
        sample_dpmpp_2s_ancestral,
        sample_dpmpp_3m_sde,
        sample_dpmpp_sde,
        sample_euler,
        sample_euler_ancestral,
        sample_heun,
        sample_lms,
        to_d,
    )

__all__ = [
    "BrownianTreeNoiseSampler",
    "CompVisDenoiser",
    "CompVisVDenoiser",
    "Denoiser",
    "DiscreteEpsDDPMDenoiser",
    "DiscreteSchedule",
    "DiscreteVDDPMDenoiser",
    "OpenAIDenoiser",
    "SimpleLossDenoiser",
    "VDenoiser",
    "append_zero",
    "default_noise_sampler",
    "external",
    "get_ancestral_step",
    "get_sigmas_exponential",
    "get_sigmas_karras",
    "get_sigmas_polyexponential",
    "get_sigmas_vp",
    "layers",
    "log_likelihood",
    "sample_dpm_2",
    "sample_dpm_2_ancestral",
    "sample_dpmpp_2m",
    "sample_dpmpp_2m_sde",
    "sample_dpmpp_2s_ancestral",
    "sample_dpmpp_3m_sde",
    "sample_dpmpp_sde",
    "sample_euler",
    "sample_euler_ancestral",
    "sample_heun",
    "sample_lms",
    "sampling",
    "to_d",
    "utils",
]

__getattr__, __dir__ = lazily(__name__, ("sampling", "external", "layers", "utils", "_noise"), __all__)
