"""Training losses and the variational bound in bits, on the fused loss ops.

arXiv 2006.11239, eq. 5, 13 and 14; 2102.09672, eq. 15 and 16; lectures 000, 001, 002.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffkern import ops
from diffkern.compat.guided_diffusion._loss_rows import bound_rows, error_rows
from diffkern.compat.guided_diffusion._ops import CORE, GaussianOps, Rows, same_shape
from diffkern.compat.guided_diffusion._tables import LEARNED, column_of
from diffkern.compat.guided_diffusion.losses import discretized_gaussian_log_likelihood, normal_kl
from diffkern.compat.kit.rows import as_dtype, wide

Model = Callable[..., Tensor]

LOSSES = ("MSE", "RESCALED_MSE", "KL", "RESCALED_KL")
TERMS = frozenset({"_vb_terms_bpd"})
TARGET = frozenset({"q_sample", "q_posterior_mean_variance"})
BPD = CORE | {"q_sample", "_vb_terms_bpd"}
"""Methods that fused losses stand for: the bound's, PREVIOUS_X's target, those of `calc_bpd_loop`."""


def bits(values: Tensor) -> Tensor:
    """Nats [B, ...] as their mean in bits, [B]."""
    return values.flatten(1).mean(1) / math.log(2.0)


class Losses(GaussianOps):
    """The training half of GaussianDiffusion."""

    p_mean_variance: Any
    q_mean_variance: Any
    q_posterior_mean_variance: Any
    q_sample: Any
    _predict_eps_from_xstart: Any
    _scale_timesteps: Any

    def training_losses(
        self,
        model: Model,
        x_start: Tensor,
        t: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        noise: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The loss of each sample at timesteps t: "loss" [B], and "mse" and (learned variance) "vb" of the MSE types.

            MSE           |target - m|^2, mean over the sample; plus the bound in bits with the mean's gradient stopped
            RESCALED_MSE  the same with the bound times T/1000
            KL            the bound in bits;    RESCALED_KL  times T

        The noise is drawn like x_start unless given. Every entry is differentiable, once, in the model's output.
        """
        kind: str = getattr(self.loss_type, "name", "")
        if kind not in LOSSES:
            raise NotImplementedError(
                f"loss_type must be one of {', '.join(LOSSES)} of LossType, got {self.loss_type!r}"
            )
        if noise is None:
            noise = torch.randn_like(x_start)
        x_t = self.q_sample(x_start, t, noise=noise)
        model = self._dk_model(model)
        own = self._dk_own(TERMS)
        if kind.endswith("KL"):
            if own:
                found = self._dk_terms(model, x_start, x_t, t, False, model_kwargs, wants_x0=False)["output"]
            else:
                given = {"x_start": x_start, "x_t": x_t, "t": t, "clip_denoised": False, "model_kwargs": model_kwargs}
                found = self._vb_terms_bpd(model=model, **given)["output"]
            return {"loss": found * self.num_timesteps if kind == "RESCALED_KL" else found}
        self._dk_check(x_t, t)
        m = self._dk_output(model(x_t, self._scale_timesteps(t), **(model_kwargs or {})), x_t)
        terms = {}
        if self._dk_variance_name() in LEARNED:
            if own:
                bound = self._dk_bound(m, x_start, x_t, t, clip=False, frozen=True)
            else:
                held = self._dk_frozen(m, x_t)
                given = {"x_start": x_start, "x_t": x_t, "t": t, "clip_denoised": False}
                bound = self._vb_terms_bpd(model=lambda *args, **kwargs: held, **given)["output"]
            terms["vb"] = bound * (self.num_timesteps / 1000.0) if kind == "RESCALED_MSE" else bound
        half = self._dk_split(m, x_start.shape[1])
        mean = self._dk_mean_name()
        if mean == "PREVIOUS_X" and not self._dk_own(TARGET):
            target = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)[0]
            terms["mse"] = (target - half).square().flatten(1).mean(1)
        else:
            terms["mse"] = self._dk_error(half, x_start, t, noise, mean)
        terms["loss"] = terms["mse"] + terms["vb"] if "vb" in terms else terms["mse"]
        return terms

    def _dk_error(self, m: Tensor, x_start: Tensor, t: Tensor | int, noise: Tensor, what: str) -> Tensor:
        """The mean square of the model's error in a sample, [B]: one op. ``what``: see `error_rows`."""
        target = wide(x_start.dtype, noise.dtype)
        if what != "PREVIOUS_X":
            target = x_start.dtype if what == "START_X" else noise.dtype
        state = torch.promote_types(x_start.dtype, noise.dtype)
        if m.dtype is torch.float64:
            state = m.dtype
        table = self._dk_table(x_start.device, error_rows, what)
        index = None if isinstance(t, int) else self._dk_rows_of(t).each
        if isinstance(t, int):
            table = table[t : t + 1]
        found = ops.loss(m, as_dtype(x_start, state), table, index, noise=as_dtype(noise, state), reduction="none")
        return as_dtype(found, torch.promote_types(target, m.dtype))

    def _vb_terms_bpd(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """A term of the bound in bits: "output" [B], KL(q || p), or at t = 0 the decoder's -log2 P; "pred_xstart"."""
        return self._dk_terms(model, x_start, x_t, t, bool(clip_denoised), model_kwargs)

    def _dk_terms(
        self,
        model: Model,
        x_start: Tensor,
        x_t: Tensor,
        t: Tensor,
        clip: bool,
        model_kwargs: dict[str, Any] | None,
        wants_x0: bool = True,
    ) -> dict[str, Tensor]:
        if not self._dk_own():
            out = self.p_mean_variance(model, x_t, t, clip_denoised=clip, model_kwargs=model_kwargs)
            return {"output": self._dk_plain_bound(out, x_start, x_t, t), "pred_xstart": out["pred_xstart"]}
        self._dk_check(x_t, t)
        m = self._dk_output(self._dk_model(model)(x_t, self._scale_timesteps(t), **(model_kwargs or {})), x_t)
        terms = {"output": self._dk_bound(m, x_start, x_t, t, clip=clip, frozen=False)}
        if wants_x0:
            terms["pred_xstart"] = self._dk_mean(x_t, m, self._dk_rows_of(t), clip, None)[1]
        return terms

    def _dk_plain_bound(self, out: dict[str, Tensor], x_start: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The bound of a p_mean_variance, elementwise formulas: differentiable in everything, any number of times."""
        mean, _, log_variance = self.q_posterior_mean_variance(x_start=x_start, x_t=x_t, t=t)
        kl = bits(normal_kl(mean, log_variance, out["mean"], out["log_variance"]))
        nats = -discretized_gaussian_log_likelihood(x_start, means=out["mean"], log_scales=0.5 * out["log_variance"])
        return torch.where(t == 0, bits(nats), kl)

    def _dk_bound(
        self, m: Tensor, x_start: Tensor, x_t: Tensor, t: Tensor, *, clip: bool, frozen: bool, row: int | None = None
    ) -> Tensor:
        """The bound in bits, [B], of the model's output m at x_t: one op, and formulas for the decoder at t = 0.

        ``frozen``: the mean gets no gradient. ``row``: t, where all samples share it and the host knows it.
        """
        same_shape(x_start=x_start, x_t=x_t)
        mean, variance = self._dk_mean_name(), self._dk_variance_name()
        records = torch.is_grad_enabled() and (x_start.requires_grad or x_t.requires_grad)
        if records or not self._dk_own():
            if frozen:
                m = self._dk_frozen(m, x_t)
            out = self.p_mean_variance(lambda *args, **kwargs: m, x_t, t, clip_denoised=clip)
            return self._dk_plain_bound(out, x_start, x_t, t)
        state = wide(x_start.dtype, x_t.dtype, m.dtype)
        x_start, x_t = as_dtype(x_start, state), as_dtype(x_t, state)
        table = self._dk_table(x_t.device, bound_rows, mean, variance, clip, frozen, self._dk_exact)
        index = self._dk_rows_of(t).each if row is None else None
        if row is not None:
            table = table[row : row + 1]
        try:
            kl = ops.variational(m, x_start, table, index, noise=x_t, reduction="none")[0]
        except RuntimeError as error:
            raise self._dk_outside(index, error) from None
        if self._dk_exact or (row is not None and row > 0):
            return kl
        if row == 0:
            return self._dk_decoder(m, x_start, x_t, clip, frozen)
        first = t == 0
        if not self._dk_may_read(t):
            return torch.where(first, self._dk_decoder(m, x_start, x_t, clip, frozen), kl)
        at = first.nonzero().flatten()
        if not len(at):
            return kl
        return kl.index_copy(0, at, self._dk_decoder(m[at], x_start[at], x_t[at], clip, frozen))

    def _dk_frozen(self, m: Tensor, x: Tensor) -> Tensor:
        """The output with the gradient of its mean stopped."""
        channels = x.shape[1]
        return torch.cat([m.narrow(1, 0, channels).detach(), m.narrow(1, channels, channels)], 1)

    def _dk_may_read(self, t: Tensor) -> bool:
        """Whether asking for the samples at t = 0 costs no device read: else all samples go through the decoder."""
        return t.device.type == "cpu"

    def _dk_decoder(self, m: Tensor, x_start: Tensor, x_t: Tensor, clip: bool, frozen: bool) -> Tensor:
        """-log2 P(bin of x_start) of the step from t = 0, [B], by the original's approximate distribution."""
        channels = x_t.shape[1]
        half = self._dk_split(m, channels)
        mean = self._dk_mean(x_t, half.detach() if frozen else half, Rows(0), clip, None)[0]
        variance = self._dk_variance_name()
        if variance in LEARNED:
            r0, r1 = (
                (0.0, 1.0)
                if variance == "LEARNED"
                else (float(self._dk_table(None, column_of, name, torch.float64)[0]) for name in ("r0", "r1"))
            )
            log_variance = r0 + r1 * as_dtype(m.narrow(1, channels, channels), x_t.dtype)
        else:
            log_variance = self._dk_table(x_t.device, column_of, f"{variance} log-variance", None)[:1].expand(x_t.shape)
        nats = -discretized_gaussian_log_likelihood(x_start, means=mean, log_scales=0.5 * log_variance)
        return bits(nats)

    # ---------------------------------------------------------------------------------------------------- bits
    def _prior_bpd(self, x_start: Tensor) -> Tensor:
        """KL(q(x_T | x_0) || N(0, 1)) in bits, [B]."""
        t = torch.full((x_start.shape[0],), self.num_timesteps - 1, device=x_start.device)
        mean, _, log_variance = self.q_mean_variance(x_start, t)
        return bits(normal_kl(mean, log_variance, 0.0, 0.0))

    def calc_bpd_loop(
        self,
        model: Model,
        x_start: Tensor,
        clip_denoised: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """The whole bound in bits per dimension, T calls of the model with fresh noise each.

        "total_bpd" [B] = "prior_bpd" [B] + the sum of "vb" [B, T]; "xstart_mse" and "mse" [B, T] of the predicted x_0
        and of the noise that follows from it. Column i belongs to t = T - 1 - i.
        """
        clip, own = bool(clip_denoised), self._dk_own(BPD)
        columns: dict[str, list[Tensor]] = {"vb": [], "xstart_mse": [], "mse": []}
        with torch.no_grad():
            all_t = torch.arange(self.num_timesteps, device=x_start.device)[:, None]
            all_t = all_t.expand(-1, x_start.shape[0]).contiguous()
            ts = all_t.unbind()
            call, times = self._dk_times(model, all_t) if own else (model, all_t)
            every = times.unbind()
            for i in range(self.num_timesteps)[::-1]:
                noise = torch.randn_like(x_start)
                if own:
                    terms = self._dk_bpd(call, every[i], x_start, noise, i, clip, model_kwargs or {})
                else:
                    terms = self._dk_plain_bpd(model, x_start, noise, ts[i], clip, model_kwargs)
                for name, column in columns.items():
                    column.append(terms[name])
            found = {name: torch.stack(column, dim=1) for name, column in columns.items()}
        prior = self._prior_bpd(x_start)
        return {"total_bpd": found["vb"].sum(dim=1) + prior, "prior_bpd": prior, **found}

    def _dk_bpd(
        self, model: Model, time: Tensor, x_start: Tensor, noise: Tensor, t: int, clip: bool, kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Five ops: x_t, x_0, the bound, and two errors."""
        state = wide(x_start.dtype)
        x_0, noise = as_dtype(x_start, state), as_dtype(noise, state)
        x_t = self._dk_noised(x_0, noise, t)
        m = self._dk_output(model(x_t.clone(), time.clone(), **kwargs), x_t)
        x0 = self._dk_mean(x_t, m, Rows(t), clip, None)[1]
        return {
            "vb": self._dk_bound(m, x_0, x_t, time, clip=clip, frozen=False, row=t),
            "xstart_mse": self._dk_error(x0, x_start, t, noise, "START_X"),
            "mse": self._dk_error(x0, x_0, t, noise, "eps"),
        }

    def _dk_plain_bpd(
        self, model: Model, x_start: Tensor, noise: Tensor, t: Tensor, clip: bool, kwargs: dict[str, Any] | None
    ) -> dict[str, Tensor]:
        x_t = self.q_sample(x_start=x_start, t=t, noise=noise)
        out = self._vb_terms_bpd(model, x_start=x_start, x_t=x_t, t=t, clip_denoised=clip, model_kwargs=kwargs)
        x0 = out["pred_xstart"]
        eps = self._predict_eps_from_xstart(x_t, t, x0)
        errors = (x0 - x_start, eps - noise)
        x_error, error = (e.square().flatten(1).mean(1) for e in errors)
        return {"vb": out["output"], "xstart_mse": x_error, "mse": error}
