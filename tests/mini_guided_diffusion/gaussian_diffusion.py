"""A diffusion over t = 0 .. T - 1 of a network that predicts the noise."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


class ModelMeanType(enum.Enum):
    PREVIOUS_X = enum.auto()
    START_X = enum.auto()
    EPSILON = enum.auto()


class ModelVarType(enum.Enum):
    LEARNED = enum.auto()
    FIXED_SMALL = enum.auto()
    FIXED_LARGE = enum.auto()
    LEARNED_RANGE = enum.auto()


class LossType(enum.Enum):
    MSE = enum.auto()
    RESCALED_MSE = enum.auto()
    KL = enum.auto()
    RESCALED_KL = enum.auto()


class GaussianDiffusion:
    def __init__(
        self,
        *,
        betas: Any,
        model_mean_type: Any = ModelMeanType.EPSILON,
        model_var_type: Any = ModelVarType.FIXED_SMALL,
        loss_type: Any = LossType.MSE,
        rescale_timesteps: bool = False,
    ) -> None:
        self.model_mean_type, self.model_var_type = model_mean_type, model_var_type
        self.loss_type, self.rescale_timesteps = loss_type, rescale_timesteps
        self.betas = betas = np.asarray(betas, dtype=np.float64)
        self.num_timesteps = len(betas)
        abar = self.alphas_cumprod = np.cumprod(1 - betas)
        before = self.alphas_cumprod_prev = np.append(1.0, abar[:-1])
        self.alphas_cumprod_next = np.append(abar[1:], 0.0)
        self.sqrt_alphas_cumprod, self.sqrt_one_minus_alphas_cumprod = np.sqrt(abar), np.sqrt(1 - abar)
        self.log_one_minus_alphas_cumprod = np.log(1 - abar)
        self.sqrt_recip_alphas_cumprod, self.sqrt_recipm1_alphas_cumprod = np.sqrt(1 / abar), np.sqrt(1 / abar - 1)
        variance = self.posterior_variance = betas * (1 - before) / (1 - abar)
        self.posterior_log_variance_clipped = np.log(np.append(variance[1], variance[1:]))
        self.posterior_mean_coef1 = betas * np.sqrt(before) / (1 - abar)
        self.posterior_mean_coef2 = (1 - before) * np.sqrt(1 - betas) / (1 - abar)

    def take(self, name: str, t: Tensor, x: Tensor) -> Tensor:
        return torch.from_numpy(getattr(self, name))[t].float().reshape(-1, *(1,) * (x.dim() - 1))

    def q_sample(self, x_start: Tensor, t: Tensor, noise: Tensor | None = None) -> Tensor:
        noise = torch.randn_like(x_start) if noise is None else noise
        return (
            self.take("sqrt_alphas_cumprod", t, x_start) * x_start
            + self.take("sqrt_one_minus_alphas_cumprod", t, x_start) * noise
        )

    def _scale_timesteps(self, t: Tensor) -> Tensor:
        return t.float() * (1000 / self.num_timesteps) if self.rescale_timesteps else t

    def p_mean_variance(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
    ) -> dict[str, Tensor]:
        if self.model_mean_type is not ModelMeanType.EPSILON or self.model_var_type.name.startswith("LEARNED"):
            raise NotImplementedError(f"{self.model_mean_type}, {self.model_var_type}")
        eps = model(x, self._scale_timesteps(t), **(model_kwargs or {}))
        x0 = self.take("sqrt_recip_alphas_cumprod", t, x) * x - self.take("sqrt_recipm1_alphas_cumprod", t, x) * eps
        x0 = x0 if denoised_fn is None else denoised_fn(x0)
        x0 = x0.clamp(-1, 1) if clip_denoised else x0
        mean = self.take("posterior_mean_coef1", t, x) * x0 + self.take("posterior_mean_coef2", t, x) * x
        if self.model_var_type is ModelVarType.FIXED_LARGE:
            large = np.append(self.posterior_variance[1], self.betas[1:])
            variance = torch.from_numpy(large)[t].float().reshape(mean.shape[:1] + (1,) * (x.dim() - 1)).expand(x.shape)
            log_variance = variance.log()
        else:
            log_variance = self.take("posterior_log_variance_clipped", t, x).expand(x.shape)
            variance = self.take("posterior_variance", t, x).expand(x.shape)
        return {"mean": mean, "variance": variance, "log_variance": log_variance, "pred_xstart": x0}

    def condition_mean(self, cond_fn: Any, p_mean_var: Any, x: Tensor, t: Tensor, model_kwargs: Any = None) -> Tensor:
        gradient = cond_fn(x, self._scale_timesteps(t), **(model_kwargs or {}))
        moved: Tensor = p_mean_var["mean"].float() + p_mean_var["variance"] * gradient.float()
        return moved

    def p_sample(
        self,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: Any = None,
    ) -> dict[str, Tensor]:
        out = self.p_mean_variance(model, x, t, clip_denoised, denoised_fn, model_kwargs)
        z = torch.randn_like(x) * (t != 0).float().reshape(-1, *(1,) * (x.dim() - 1))
        if cond_fn is not None:
            out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
        return {"sample": out["mean"] + (0.5 * out["log_variance"]).exp() * z, "pred_xstart": out["pred_xstart"]}

    def p_sample_loop(self, model: Any, shape: Any, *args: Any, **kwargs: Any) -> Tensor:
        *_, last = self.p_sample_loop_progressive(model, shape, *args, **kwargs)
        return last["sample"]

    def p_sample_loop_progressive(
        self,
        model: Any,
        shape: Any,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        cond_fn: Any = None,
        model_kwargs: Any = None,
        device: Any = None,
        progress: bool = False,
        skip_timesteps: int = 0,
    ) -> Iterator[dict[str, Tensor]]:
        x = torch.randn(*shape) if noise is None else noise
        for i in reversed(range(self.num_timesteps - skip_timesteps)):
            t = torch.full((shape[0],), i)
            with torch.no_grad():
                out = self.p_sample(model, x, t, clip_denoised, denoised_fn, cond_fn, model_kwargs)
            yield out
            x = out["sample"]

    def mean_sample(self, model: Any, x: Tensor, t: Tensor) -> Tensor:
        """A sampler that the original has not."""
        return self.p_mean_variance(model, x, t)["mean"]
