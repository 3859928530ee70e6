"""guided-diffusion's GaussianDiffusion: the same tables, methods and dictionaries; the updates are fused ops.

Time t is an index 0 .. T - 1, where t = 0 is one step of noise. arXiv 2006.11239 (DDPM), 2010.02502 (DDIM), 2102.09672
(learned variances), 2105.05233 (classifier guidance); lectures 000, 001, 002.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkern.compat.guided_diffusion._losses import Losses
from diffkern.compat.guided_diffusion._ops import CONVERSIONS, PARTS, GaussianOps, same_shape
from diffkern.compat.guided_diffusion._sampling import Sampling
from diffkern.compat.guided_diffusion._tables import LEARNED, posterior_tables
from diffkern.compat.kit.rows import as_dtype, wide

__all__ = [
    "GaussianDiffusion",
    "LossType",
    "ModelMeanType",
    "ModelVarType",
    "betas_for_alpha_bar",
    "get_named_beta_schedule",
]


def get_named_beta_schedule(schedule_name: str, num_diffusion_timesteps: int) -> np.ndarray:
    """float64 [T] betas: "linear" from 0.1/T to 20/T (arXiv 2006.11239) or "cosine" (arXiv 2102.09672, eq. 17).

    Raises NotImplementedError for any other name.
    """
    if schedule_name == "linear":
        scale = 1000 / num_diffusion_timesteps
        return np.linspace(scale * 0.0001, scale * 0.02, num_diffusion_timesteps, dtype=np.float64)
    if schedule_name == "cosine":
        return betas_for_alpha_bar(num_diffusion_timesteps, lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2)
    raise NotImplementedError(f"schedule_name must be 'linear' or 'cosine', got {schedule_name!r}")


def betas_for_alpha_bar(
    num_diffusion_timesteps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999
) -> np.ndarray:
    """beta_i = min(1 - abar((i+1)/T)/abar(i/T), max_beta), float64 [T], for a function abar on [0, 1]."""
    T = num_diffusion_timesteps
    kept = (alpha_bar((i + 1) / T) / alpha_bar(i / T) for i in range(T))
    return np.array([min(1 - ratio, max_beta) for ratio in kept])


class ModelMeanType(enum.Enum):
    """What the model's output is: x_{t-1}, x_0 or the noise."""

    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    """The variance of a step: the second half of the channels as log-variance, beta tilde, beta, or that half between
    the two (LEARNED_RANGE, -1 to 1)."""

    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    """The squared error (with the bound where the variance is learned), the bound, and both scaled by T."""

    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()

    def is_vb(self) -> bool:
        """Whether it is the variational bound."""
        return self in (LossType.KL, LossType.RESCALED_KL)


class GaussianDiffusion(Sampling, Losses, GaussianOps):
    """A diffusion over t = 0 .. T - 1 with these betas, 1-D in (0, 1]; its tables are float64 arrays of length T.

    The enums are `ModelMeanType`, `ModelVarType` and `LossType` (or guided-diffusion's own).
    ``rescale_timesteps``: the model is given t 1000/T in float32.
    """

    def __init__(
        self,
        *,
        betas: Any,
        model_mean_type: Any,
        model_var_type: Any,
        loss_type: Any,
        rescale_timesteps: bool = False,
    ) -> None:
        self.model_mean_type = model_mean_type
        self.model_var_type = model_var_type
        self.loss_type = loss_type
        self.rescale_timesteps = rescale_timesteps
        betas = np.array(betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas):
            raise AssertionError(f"betas must be 1-D and not empty, got shape {list(betas.shape)}")
        if not ((betas > 0) & (betas <= 1)).all():
            at = int(np.argmin((betas > 0) & (betas <= 1)))
            raise AssertionError(f"betas must lie in (0, 1], got {betas[at]} at {at}")
        self.num_timesteps = len(betas)
        for name, table in posterior_tables(betas).items():
            setattr(self, name, table)

    # ------------------------------------------------------------------------------------------ q: towards noise
    def q_mean_variance(self, x_start: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, variance, log-variance) of q(x_t | x_0), each of x_start's shape."""
        shape = x_start.shape
        mean = self._dk_take("sqrt_alphas_cumprod", t, shape) * x_start
        variance = self._dk_take("one_minus_alphas_cumprod", t, shape)
        return mean, variance, self._dk_take("log_one_minus_alphas_cumprod", t, shape)

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        """x_t = sqrt(abar) x_0 + sqrt(1 - abar) noise in one op; without noise it is drawn like x_start.

        arXiv 2006.11239, eq. 4; lectures 000, 001, 002.
        """
        if noise is None:
            noise = torch.randn_like(x_start)
        same_shape(noise=noise, x_start=x_start)
        state = wide(x_start.dtype, noise.dtype)
        return self._dk_noised(as_dtype(x_start, state), as_dtype(noise, state), t)

    def q_posterior_mean_variance(self, x_start: Tensor, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, variance, clipped log-variance) of q(x_{t-1} | x_t, x_0). arXiv 2006.11239, eq. 6 and 7."""
        same_shape(x_start=x_start, x_t=x_t)
        mean = self._dk_linear("posterior", x_t, x_start, t)
        variance = self._dk_take("posterior_variance", t, x_t.shape)
        return mean, variance, self._dk_take("posterior_log_variance_clipped", t, x_t.shape)

    # ------------------------------------------------------------------------------------------ p: the model's step
    def p_mean_variance(
        self,
        model: Callable[..., Tensor],
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The model's p(x_{t-1} | x_t): "mean", "variance", "log_variance" and "pred_xstart", each of x's shape.

        x [B, C, ...], t int64 [B]. ``denoised_fn`` changes the predicted x_0 before ``clip_denoised`` clamps it to
        [-1, 1]. The model is called as ``model(x, t, **model_kwargs)``.
        """
        self._dk_check(x, t)
        model = self._dk_model(model)
        m = self._dk_output(model(x.clone(), self._scale_timesteps(t.clone()), **(model_kwargs or {})), x)
        variance, log_variance = self._dk_variance(m, x, t)
        if self._dk_own(PARTS):
            mean, pred_xstart = self._dk_mean(x, m, self._dk_rows_of(t), clip_denoised, denoised_fn)
        else:
            mean, pred_xstart = self._dk_mean_of_parts(x, m, t, clip_denoised, denoised_fn)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": pred_xstart}

    def _dk_mean_of_parts(
        self, x: Tensor, m: Tensor, t: Tensor, clip: bool, denoised_fn: Callable[[Tensor], Tensor] | None
    ) -> tuple[Tensor, Tensor]:
        """`_dk_mean` by the methods that a subclass has replaced."""
        kind, m = self._dk_mean_name(), self._dk_split(m, x.shape[1])
        if kind == "PREVIOUS_X":
            x0 = self._predict_xstart_from_xprev(x_t=x, t=t, xprev=m)
        else:
            x0 = m if kind == "START_X" else self._predict_xstart_from_eps(x_t=x, t=t, eps=m)
        x0 = x0 if denoised_fn is None else denoised_fn(x0)
        x0 = x0.clamp(-1, 1) if clip else x0
        return (m if kind == "PREVIOUS_X" else self.q_posterior_mean_variance(x_start=x0, x_t=x, t=t)[0]), x0

    def _dk_variance(self, m: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """(variance, log-variance) of the model's step, of x's shape."""
        kind = self._dk_variance_name()
        if kind not in LEARNED:
            return self._dk_take(f"{kind} variance", t, x.shape), self._dk_take(f"{kind} log-variance", t, x.shape)
        log_variance = m.narrow(1, x.shape[1], x.shape[1])
        if kind == "LEARNED_RANGE":
            state = wide(m.dtype)
            r0, r1 = (self._dk_take(name, t, x.shape, state) for name in ("r0", "r1"))
            log_variance = torch.addcmul(r0, r1, as_dtype(log_variance, state))
        return torch.exp(log_variance), log_variance

    def _predict_xstart_from_eps(self, x_t: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        same_shape(x_t=x_t, eps=eps)
        return self._dk_linear("EPSILON", x_t, eps, t)

    def _predict_xstart_from_xprev(self, x_t: Tensor, t: Tensor, xprev: Tensor) -> Tensor:
        same_shape(x_t=x_t, xprev=xprev)
        return self._dk_linear("PREVIOUS_X", x_t, xprev, t)

    def _predict_eps_from_xstart(self, x_t: Tensor, t: Tensor, pred_xstart: Tensor) -> Tensor:
        return self._dk_linear("eps", x_t, pred_xstart, t)

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t.float() * (1000.0 / self.num_timesteps) if self.rescale_timesteps else t

    # ------------------------------------------------------------------------------------------ classifier guidance
    def condition_mean(
        self,
        cond_fn: Callable[..., Tensor],
        p_mean_var: dict[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """mean + variance gradient, gradient = ``cond_fn(x, t, **model_kwargs)`` of ln p(y | x).

        Half precision is widened to float32. arXiv 2105.05233, algorithm 1.
        """
        gradient = self._dk_model(cond_fn)(x.clone(), self._scale_timesteps(t.clone()), **(model_kwargs or {}))
        mean = p_mean_var["mean"]
        state = wide(mean.dtype)
        moved: Tensor = as_dtype(mean, state) + p_mean_var["variance"] * as_dtype(gradient, wide(gradient.dtype))
        return as_dtype(moved, state)

    def condition_score(
        self,
        cond_fn: Callable[..., Tensor],
        p_mean_var: dict[str, Tensor],
        x: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """p_mean_var with the "pred_xstart" and "mean" of eps - sqrt(1 - abar) gradient. arXiv 2105.05233, algorithm 2.

        The result is not clamped.
        """
        gradient = self._dk_model(cond_fn)(x.clone(), self._scale_timesteps(t.clone()), **(model_kwargs or {}))
        out = p_mean_var.copy()
        if self._dk_own(CONVERSIONS):
            x0 = self._dk_guided_x0(out["pred_xstart"], gradient, self._dk_rows_of(t))
        else:
            eps = self._predict_eps_from_xstart(x, t, out["pred_xstart"])
            sigma = (1 - self._dk_take("alphas_cumprod", t, x.shape)).sqrt()
            x0 = self._predict_xstart_from_eps(x, t, eps - sigma * gradient)
        out["pred_xstart"] = x0
        out["mean"] = self.q_posterior_mean_variance(x_start=x0, x_t=x, t=t)[0]
        return out

    def diffkern(self, *, exact: bool) -> GaussianDiffusion:
        """Set diffkern's option and return the diffusion: ``exact=True`` takes the right branch where the original's
        numerical choice is questionable (docs/compat-guided-diffusion.md lists them)."""
        self._dk_exact = bool(exact)
        self._dk_forget()
        return self


def _extract_into_tensor(arr: np.ndarray, timesteps: Tensor, broadcast_shape: Iterable[int]) -> Tensor:
    """float32 entries of a table at these timesteps, expanded to a shape; copies the table to the device each time."""
    shape = tuple(broadcast_shape)
    values = torch.from_numpy(arr).to(timesteps.device)[timesteps].float()
    return values.reshape(*values.shape, *(1,) * (len(shape) - values.dim())).expand(shape)
