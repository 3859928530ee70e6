"""torchcfm's matchers, signatures and draws of the original, on one fused op (docs/compat-torchcfm.md).

    from diffkern.compat.torchcfm import ConditionalFlowMatcher

All are Gaussian paths between a source x0 and a target x1, N(mu_t, sigma_t^2) with mu_t = a_t x0 + b_t x1, and their
conditional field u_t = sigma_dot/sigma (x_t - mu_t) + mu_dot. Time runs from the source (0) to the target (1).

    ConditionalFlowMatcher         mu = (1 - t) x0 + t x1                  sigma                    2302.00482
    ExactOptimalTransport...       the same, x0 and x1 paired by optimal transport                  2302.00482
    SchrodingerBridge...           the same, paired                        sigma sqrt(t (1 - t))    2307.03672
    TargetConditional...           mu = t x1                               1 - (1 - sigma) t        2210.02747
    VariancePreserving...          mu = cos(pi t/2) x0 + sin(pi t/2) x1    sigma                    2303.08797
"""

from __future__ import annotations

import math
import warnings
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from diffkern import ops
from diffkern.compat.kit.rows import of_samples, table_of
from diffkern.compat.kit.transforms import transformed
from diffkern.compat.kit.transport import OTPlanSampler
from diffkern.modes import kept

__all__ = [
    "ConditionalFlowMatcher",
    "ExactOptimalTransportConditionalFlowMatcher",
    "OTPlanSampler",
    "SchrodingerBridgeConditionalFlowMatcher",
    "TargetConditionalFlowMatcher",
    "VariancePreservingConditionalFlowMatcher",
    "pad_t_like_x",
]

_HOOKS = {"compute_mu_t", "compute_sigma_t", "sample_xt", "compute_conditional_flow"}


def pad_t_like_x(t: Any, x: Tensor) -> Any:
    """A time a sample, [B], as [B, 1, ...], so that it broadcasts over x [B, ...]; a number as it is."""
    return t if isinstance(t, float | int) else t.reshape(-1, *(1,) * (x.dim() - 1))


# ------------------------------------------------------------------------------------------------------ the fused op
@kept(256)
def _weights(cls: Any, sigma: float) -> tuple[Tensor, Tensor]:
    """(constant [columns], weights [features, columns]): x_t and u_t are linear in the features of a time."""

    def at(*features: float) -> Tensor:
        a, d, b = cls._location(sigma, *features)
        A, D, B = cls._field(sigma, *features)
        return table_of(1, r=1.0, a=a, d=d, b=b, A=A, D=D, B=B)[0]

    count = len(cls._features(torch.tensor([0.5], device="cpu")))
    constant = at(*(0.0,) * count)
    units = [at(*(float(i == k) for i in range(count))) - constant for k in range(count)]
    return constant, torch.stack(units).nan_to_num(0.0)  # inf - inf, where nothing is clipped


@kept(256)
def _constants(cls: Any, sigma: float, device: torch.device) -> tuple[Tensor, Tensor]:
    constant, weights = _weights(cls, sigma)
    return constant.to(device), weights.to(device)


@kept(64)
def _samples(batch: int, device: torch.device) -> Tensor:
    return torch.arange(batch, device=device)


def _step(x: Tensor, m: Tensor, z: Tensor | None, table: Tensor, want_s: bool = False) -> tuple[Tensor, Any]:
    """(a x + b (p x + q m + r z) + d m, A x + B (p x + q m + r z) + D m): one op, a row a sample.

    Raises ValueError for times and sigmas at which a coefficient is NaN (on a GPU the result is).
    """
    index = _samples(x.shape[0], x.device)
    table = table.to(x.device, non_blocking=True)  # made on the CPU where t was drawn there
    try:
        out, _, s, _ = ops.step(x, m, table=table, index=index, noise=z, want_s=want_s)
    except RuntimeError:
        wrong = table.isnan().any(1).nonzero().flatten().tolist()
        if not wrong:
            raise
        raise ValueError(f"t and sigma must be inside the path's range, got NaN for samples {wrong}") from None
    return out, s


def _combined(x: Tensor, m: Tensor, z: Tensor | None, **columns: Any) -> Tensor:
    """x' of a step with these columns, numbers or float64 [B]."""
    device = next((c.device for c in columns.values() if isinstance(c, Tensor)), x.device)
    return _step(x, m, z, of_samples(x.shape[0], device, **columns))[0]


def _time(t: Any) -> Tensor:
    """The times as coefficients are made of them: float64, [B] or [1]."""
    t = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64, device="cpu")
    return t.detach().reshape(-1).to(torch.float64)


class ConditionalFlowMatcher:
    """Independent coupling: x_t = t x1 + (1 - t) x0 + sigma eps, u_t = x1 - x0 (arXiv 2302.00482, eq. 14 and 15).

    x0 and x1 [B, ...] of one floating dtype; sums are float32 (float64 for float64), rounded once. Differentiable in
    x0, x1 and eps. What one op cannot take (operands that have to be broadcast or promoted, a t that requires grad, a
    sigma that is a tensor, a subclass with a formula of its own) is computed in plain torch from the same coefficients.
    """

    _own: ClassVar[bool] = True
    """Whether x_t and u_t come from this module's formulas; false where a subclass or its mixin overrides one."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls._own = all(getattr(getattr(cls, hook), "__module__", "") == __name__ for hook in _HOOKS)

    def __init__(self, sigma: float = 0.0) -> None:
        self.sigma = sigma

    # The path: what it is linear in, and the coefficients of x0, x1 and eps in x_t and in u_t.
    @staticmethod
    def _features(t: Any) -> tuple[Any, ...]:
        return (t,)

    @staticmethod
    def _location(sigma: Any, *features: Any) -> tuple[Any, Any, Any]:
        (t,) = features
        return 1 - t, t, sigma

    @staticmethod
    def _field(sigma: Any, *features: Any) -> tuple[Any, Any, Any]:
        return -1.0, 1.0, 0.0

    def _at(self, t: Any) -> tuple[Any, Any, Any]:
        """The location's coefficients at a time."""
        return self._location(self.sigma, *self._features(t))

    def _one_op(self, t: Any, *tensors: Tensor) -> bool:
        """Whether the op takes these: one shape, dtype and device, a time a sample without a gradient of its own."""
        if not self._own or not _HOOKS.isdisjoint(self.__dict__) or isinstance(self.sigma, Tensor) or transformed():
            return False
        first = tensors[0]
        shape, dtype, device = first.shape, first.dtype, first.device
        for x in tensors[1:]:
            if x.shape != shape or x.dtype != dtype or x.device != device:
                return False
        if not dtype.is_floating_point or not shape or not first.numel() or device.type not in ("cpu", "cuda"):
            return False
        if not isinstance(t, Tensor):
            return True
        if not t.is_floating_point() or torch.promote_types(t.dtype, dtype) != dtype:
            return False  # the result is wider than x0 in the original
        return t.numel() == shape[0] and not t.requires_grad

    def compute_mu_t(self, x0: Tensor, x1: Tensor, t: Any) -> Tensor:
        """The path's mean."""
        if self._one_op(t, x0, x1):
            a, d, _ = self._at(_time(t))
            return _combined(x0, x1, None, a=a, d=d)
        a, d, _ = self._at(pad_t_like_x(t, x1))
        return cast(Tensor, d * x1 + a * x0)

    def compute_sigma_t(self, t: Any) -> Any:
        """The path's standard deviation: a number, or a tensor in the shape of t."""
        del t
        return self.sigma

    def sample_xt(self, x0: Tensor, x1: Tensor, t: Any, epsilon: Tensor) -> Tensor:
        """mu_t + sigma_t epsilon."""
        if self._one_op(t, x0, x1, epsilon):
            a, d, b = self._at(_time(t))
            return _combined(x0, x1, epsilon, r=1.0, a=a, b=b, d=d)
        mean = self.compute_mu_t(x0, x1, t)
        return cast(Tensor, mean + pad_t_like_x(self.compute_sigma_t(t), x0) * epsilon)

    def compute_conditional_flow(self, x0: Tensor, x1: Tensor, t: Any, xt: Tensor) -> Tensor:
        """The conditional field u_t at xt, sigma_dot/sigma (xt - mu_t) + mu_dot."""
        del t, xt
        return x1 - x0

    def sample_noise_like(self, x: Tensor) -> Tensor:
        """Standard normals from torch's generator."""
        return torch.randn_like(x)

    def sample_location_and_conditional_flow(
        self, x0: Tensor, x1: Tensor, t: Tensor | None = None, return_noise: bool = False
    ) -> tuple[Tensor, ...]:
        """``(t, x_t, u_t)``, with ``return_noise`` ``(t, x_t, u_t, eps)``.

        t [B] is drawn uniformly on the CPU if not given, then eps as x0 (also where sigma is 0), as the original does.
        Raises AssertionError for a t of another length.
        """
        times: Any = t
        if t is None:
            times = torch.rand(x0.shape[0]).to(x0.dtype)
            t = times.to(x0.device, non_blocking=True)
        if len(t) != x0.shape[0]:
            raise AssertionError(f"t has to have batch size dimension {x0.shape[0]}, got {list(t.shape)}")
        eps = self.sample_noise_like(x0)
        if self._one_op(t, x0, x1, eps):
            features = self._features(_time(times))
            kind: Any = type(self)
            constant, weights = _constants(kind, float(self.sigma), features[0].device)
            table = torch.addmm(constant, torch.stack(features, 1), weights)
            xt, ut = _step(x0, x1, eps, table, want_s=True)
        else:
            xt = self.sample_xt(x0, x1, t, eps)
            ut = self.compute_conditional_flow(x0, x1, t, xt)
        return (t, xt, ut, eps) if return_noise else (t, xt, ut)

    def compute_lambda(self, t: Any) -> Any:
        """The weight of a score loss, 2 sigma_t/(sigma^2 + 1e-8) (arXiv 2307.03672, eq. 23)."""
        return 2 * self.compute_sigma_t(t) / (self.sigma**2 + 1e-8)


class TargetConditionalFlowMatcher(ConditionalFlowMatcher):
    """From noise to x1: x_t = t x1 + (1 - (1 - sigma) t) eps, u_t = x1 - (1 - sigma) eps (arXiv 2210.02747, eq. 20-23).

    The path of `diffkern.flow`. x0 gives the noise its shape and dtype and nothing else: eps is a fresh draw.
    """

    @staticmethod
    def _location(sigma: Any, *features: Any) -> tuple[Any, Any, Any]:
        (t,) = features
        return 0.0, t, 1 - (1 - sigma) * t

    @staticmethod
    def _field(sigma: Any, *features: Any) -> tuple[Any, Any, Any]:
        return 0.0, 1.0, -(1 - sigma)

    def compute_mu_t(self, x0: Tensor, x1: Tensor, t: Any) -> Tensor:
        """t x1."""
        del x0
        return cast(Tensor, pad_t_like_x(t, x1) * x1)

    def compute_sigma_t(self, t: Any) -> Any:
        """1 - (1 - sigma) t."""
        return self._at(t)[2]

    def compute_conditional_flow(self, x0: Tensor, x1: Tensor, t: Any, xt: Tensor) -> Tensor:
        """(x1 - (1 - sigma) xt)/(1 - (1 - sigma) t)."""
        del x0
        slope = -(1 - self.sigma)
        if self._one_op(t, x1, xt):
            sigma = self._at(_time(t))[2]
            return _combined(x1, xt, None, a=1 / sigma, d=slope / sigma)
        return cast(Tensor, (x1 + slope * xt) / self._at(pad_t_like_x(t, x1))[2])


class VariancePreservingConditionalFlowMatcher(ConditionalFlowMatcher):
    """Trigonometric interpolants, x_t = cos(pi t/2) x0 + sin(pi t/2) x1 + sigma eps (arXiv 2303.08797)."""

    @staticmethod
    def _features(t: Any) -> tuple[Any, ...]:
        angle = math.pi / 2 * t
        return torch.cos(angle), torch.sin(angle)

    @staticmethod
    def _location(sigma: Any, *features: Any) -> tuple[Any, Any, Any]:
        return *features, sigma

    @staticmethod
    def _field(sigma: Any, *features: Any) -> tuple[Any, Any, Any]:
        cosine, sine = features
        return -math.pi / 2 * sine, math.pi / 2 * cosine, 0.0

    def compute_conditional_flow(self, x0: Tensor, x1: Tensor, t: Any, xt: Tensor) -> Tensor:
        """pi/2 (cos(pi t/2) x1 - sin(pi t/2) x0)."""
        del xt
        if self._one_op(t, x0, x1):
            a, d, _ = self._field(self.sigma, *self._features(_time(t)))
            return _combined(x0, x1, None, a=a, d=d)
        a, d, _ = self._field(self.sigma, *self._features(pad_t_like_x(t, x0)))
        return cast(Tensor, d * x1 + a * x0)


class _Coupled(ConditionalFlowMatcher):
    """A matcher whose pairs are drawn from a transport plan between the two batches."""

    ot_sampler: OTPlanSampler

    def sample_location_and_conditional_flow(
        self, x0: Tensor, x1: Tensor, t: Tensor | None = None, return_noise: bool = False
    ) -> tuple[Tensor, ...]:
        """As `ConditionalFlowMatcher`'s, of pairs drawn from the plan."""
        x0, x1 = self.ot_sampler.sample_plan(x0, x1)
        return super().sample_location_and_conditional_flow(x0, x1, t, return_noise)

    def guided_sample_location_and_conditional_flow(
        self,
        x0: Tensor,
        x1: Tensor,
        y0: Tensor | None = None,
        y1: Tensor | None = None,
        t: Tensor | None = None,
        return_noise: bool = False,
    ) -> tuple[Any, ...]:
        """``(t, x_t, u_t, y0, y1)``, and eps with ``return_noise``: the labels go with their samples."""
        x0, x1, y0, y1 = self.ot_sampler.sample_plan_with_labels(x0, x1, y0, y1)
        t, xt, ut, *eps = super().sample_location_and_conditional_flow(x0, x1, t, return_noise)
        return t, xt, ut, y0, y1, *eps


class ExactOptimalTransportConditionalFlowMatcher(_Coupled):
    """`ConditionalFlowMatcher` with pairs of the exact transport plan between the batches (arXiv 2302.00482)."""

    def __init__(self, sigma: float = 0.0) -> None:
        super().__init__(sigma)
        self.ot_sampler = OTPlanSampler(method="exact")


class SchrodingerBridgeConditionalFlowMatcher(_Coupled):
    """Brownian bridges between paired samples, sigma_t = sigma sqrt(t (1 - t)) (arXiv 2307.03672, eq. 20 and 21).

    ``ot_method``: "exact", or "sinkhorn" with the entropy 2 sigma^2. Raises ValueError for a sigma that is not positive
    and warns below 1e-3. sigma_dot/sigma is (1 - 2 t)/(2 t (1 - t) + 1e-8), finite at both ends.
    """

    def __init__(self, sigma: float = 1.0, ot_method: str = "exact") -> None:
        if sigma <= 0:
            raise ValueError(f"Sigma must be strictly positive, got {sigma}.")
        if sigma < 1e-3:
            warnings.warn("Small sigma values may lead to numerical instability.", stacklevel=2)
        super().__init__(sigma)
        self.ot_method = ot_method
        self.ot_sampler = OTPlanSampler(method=ot_method, reg=2 * sigma**2)

    @staticmethod
    def _rate(t: Any) -> Any:
        """sigma_dot/sigma."""
        return (1 - 2 * t) / (2 * t * (1 - t) + 1e-8)

    @staticmethod
    def _features(t: Any) -> tuple[Any, ...]:
        root = torch.sqrt(torch.as_tensor(t * (1 - t)))
        return t, root, root * SchrodingerBridgeConditionalFlowMatcher._rate(t)

    @staticmethod
    def _location(sigma: Any, *features: Any) -> tuple[Any, Any, Any]:
        t, root, _ = features
        return 1 - t, t, sigma * root

    @staticmethod
    def _field(sigma: Any, *features: Any) -> tuple[Any, Any, Any]:
        return -1.0, 1.0, sigma * features[2]

    def compute_sigma_t(self, t: Any) -> Any:
        """sigma sqrt(t (1 - t))."""
        return self._at(t)[2]

    def compute_conditional_flow(self, x0: Tensor, x1: Tensor, t: Any, xt: Tensor) -> Tensor:
        """(1 - 2 t)/(2 t (1 - t) + 1e-8) (xt - mu_t) + x1 - x0."""
        if self._one_op(t, x0, x1, xt):
            at = _time(t)
            a, d, _ = self._at(at)
            return _combined(x0, x1, xt, p=-a, q=-d, r=1.0, b=self._rate(at), a=-1.0, d=1.0)
        mean = self.compute_mu_t(x0, x1, t)
        return cast(Tensor, self._rate(pad_t_like_x(t, x0)) * (xt - mean) + x1 - x0)
