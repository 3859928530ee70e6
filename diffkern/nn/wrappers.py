"""Networks inside of formulas: preconditioned denoisers, scores of noise-conditional networks, fields of flows.

Each wraps a network of `diffkern.nn` and is one itself: it has a configuration, is called as ``model(x, t, cond)``, and
is trained, sampled, saved and loaded by `diffkern.Diffusion`:

    Diffusion(Preconditioned.of(network, "edm"), diffkern.edm(), "x0")
    Diffusion(ScoreNetwork.of(network), diffkern.edm(), "score")
    Diffusion(FlowNetwork.of(network), diffkern.flow(), "velocity")

(EDM's preconditioning alone needs no wrapper: ``Diffusion(network, diffkern.edm(), "edm")`` has it in the plan.)
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from diffkern import records
from diffkern.checks import unknown
from diffkern.modes import readable

__all__ = [
    "FlowNetwork",
    "FlowNetworkConfig",
    "Preconditioned",
    "PreconditionedConfig",
    "ScoreNetwork",
    "ScoreNetworkConfig",
]

Form = Literal["edm", "vp", "ve", "iddpm"]
ScoreForm = Literal["ve", "vp"]
Wrapped = TypeVar("Wrapped", bound="_Wrapper")


@dataclasses.dataclass(frozen=True)
class _WrapperConfig:
    """network: the inner one's configuration as plain data, with its name under "kind"."""

    network: dict[str, Any]

    @property
    def inner(self) -> Any:
        """The configuration of the network inside; ValueError for none that can be wrapped."""
        return records.of_kind(self.network, _kinds(), "network")

    @property
    def in_channels(self) -> int:
        """Of the network inside."""
        return int(self.inner.in_channels)

    @property
    def image_size(self) -> Any:
        """Of the network inside."""
        return self.inner.image_size

    def __post_init__(self) -> None:
        object.__setattr__(self, "network", _data(self.inner))  # with every field, lists as tuples
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and not isinstance(value, bool) and not 0.0 < value < math.inf:
                name = f"{type(self).__name__}.{field.name}"
                raise ValueError(f"{name} must be positive and finite, got {records.shown(value)}")

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)


def _inside() -> dict[str, tuple[type[nn.Module], type]]:
    """What can be wrapped, by name: our networks of a time, but for the wrappers."""
    from diffkern.nn.networks import NETWORKS  # which has the wrappers too

    timeless = ("Generator", "Discriminator")
    return {n: pair for n, pair in NETWORKS.items() if n not in timeless and not issubclass(pair[0], _Wrapper)}


def _data(config: Any) -> dict[str, Any]:
    return records.kind_of(config, _kinds(), "network", "wrap one of diffkern.nn's networks")


def _kinds() -> dict[str, type]:
    return {config.__name__: config for _, config in _inside().values()}


class _Wrapper(nn.Module):
    """A network inside of a formula."""

    CONFIG: ClassVar[type]

    def __init__(self, config: Any, network: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        inner = config.inner
        made = next(network_class for network_class, kind in _inside().values() if type(inner) is kind)
        self.network = made(inner) if network is None else network

    @classmethod
    def of(cls: type[Wrapped], network: nn.Module, *args: Any, **options: Any) -> Wrapped:
        """The wrapper around this very network; options by the names of the configuration.

        ValueError for a network that is none of `diffkern.nn`, as the wrapper's configuration has that of the network.
        """
        known = _inside()
        if type(network) not in {network_class for network_class, _ in known.values()}:
            raise ValueError(f"network must be one of {', '.join(known)}, got {type(network).__name__}")
        inner: Any = network
        return cls(cls.CONFIG(_data(inner.config), *args, **options), network)

    @property
    def classes(self) -> Any:
        """The class embedding of the network inside, or None."""
        return getattr(self.network, "classes", None)

    @property
    def null_class(self) -> int:
        """The class index that means "no condition"."""
        return int(self.network.null_class)  # type: ignore[arg-type]

    def _times(self, t: Any, x: Tensor) -> Tensor:
        """[B] or [1] in float32 at least. ValueError for another number of them."""
        if not isinstance(t, Tensor) or t.dim() > 1 or (t.dim() == 1 and t.shape[0] not in (1, x.shape[0])):
            got = tuple(t.shape) if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"t must be 0-dim or have one time for each of the {x.shape[0]} samples, got {got}")
        return t.reshape(-1).to(torch.promote_types(x.dtype, torch.float32))

    def _positive(self, t: Any, x: Tensor) -> Tensor:
        """`_times` that are noise levels. ValueError for one that is not above 0."""
        found = self._times(t, x)
        if readable(found) and bool((found <= 0).any()):
            raise ValueError(f"t must be above 0, where there is noise, got {float(found.min()):g}")
        return found

    def _run(self, x: Tensor, t: Tensor, cond: Any) -> Tensor:
        """The network's first channels, as many as x has, in the wide dtype: the others are a learned variance."""
        found: Tensor = self.network(x, t) if cond is None else self.network(x, t, cond)
        return found[:, : x.shape[1]].to(torch.promote_types(x.dtype, torch.float32))


# -------------------------------------------------------------------------------------------------------- denoisers


@dataclasses.dataclass(frozen=True)
class PreconditionedConfig(_WrapperConfig):
    """A `Preconditioned`.

    form         "edm", "vp", "ve" or "iddpm"
    sigma_data   standard deviation of the data ("edm")
    beta_d       slope of the noise level, and
    beta_min     its start ("vp")
    steps        M, the number of training steps ("vp", "iddpm")
    C_1, C_2     floor of a step's ratio, and offset of the cosine ("iddpm")
    """

    form: Form = "edm"
    sigma_data: float = 0.5
    beta_d: float = 19.9
    beta_min: float = 0.1
    steps: int = 1000
    C_1: float = 0.001
    C_2: float = 0.008

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in get_args(Form):
            raise ValueError(unknown("PreconditionedConfig.form", self.form, get_args(Form)))


class Preconditioned(_Wrapper):
    """A denoiser D(x; sigma) of a network F, ``model(x, sigma, cond)``: the prediction "x0" on `diffkern.edm()`.

        D = c_skip x + c_out F(c_in x, c_noise, cond),   x = x0 + sigma eps

    | form | c_skip | c_out | c_in | c_noise |
    |---|---|---|---|---|
    | edm | sd^2/(sigma^2 + sd^2) | sigma sd/sqrt(sigma^2 + sd^2) | 1/sqrt(sigma^2 + sd^2) | ln(sigma)/4 |
    | vp | 1 | -sigma | 1/sqrt(sigma^2 + 1) | (M - 1) t(sigma) |
    | ve | 1 | sigma | 1 | ln(sigma/2) |
    | iddpm | 1 | -sigma | 1/sqrt(sigma^2 + 1) | M - 1 - argmin_j abs(u_j - sigma) |

    sd is `sigma_data`. t(sigma) is the inverse of sigma(t) = sqrt(exp(beta_d t^2/2 + beta_min t) - 1). u_M = 0 and
    u_(j-1) = sqrt((u_j^2 + 1)/max(a_(j-1)/a_j, C_1) - 1) with a_j = sin(pi j/(2 M (C_2 + 1)))^2. A network with a
    learned variance gives its first channels. Karras et al. 2022 (arXiv 2206.00364), table 1, whose other columns are
    the networks of Song et al. 2021 (arXiv 2011.13456) and Nichol and Dhariwal 2021 (arXiv 2102.09672).

    x [B, ...] in the network's dtype, sigma > 0 [B] or 0-dim; the result is like x, the sum in float32 at least.
    ValueError as of the network, for a sigma not above 0 and for another number of them than samples.
    """

    CONFIG = PreconditionedConfig
    config: PreconditionedConfig

    def __init__(self, config: PreconditionedConfig, network: nn.Module | None = None) -> None:
        super().__init__(config, network)
        self._levels = _iddpm_levels(config) if config.form == "iddpm" else None

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(c_skip, c_out, c_in, c_noise) in the shape and dtype of sigma: the table above."""
        config, one = self.config, torch.ones_like(sigma)
        if config.form == "edm":
            data = config.sigma_data
            total = sigma.square() + data**2
            return data**2 / total, sigma * data * total.rsqrt(), total.rsqrt(), 0.25 * sigma.log()
        if config.form == "ve":
            return one, sigma, one, (0.5 * sigma).log()
        if self._levels is None:
            root = (config.beta_min**2 + 2.0 * config.beta_d * sigma.square().log1p()).sqrt()
            noise = (config.steps - 1) * (root - config.beta_min) / config.beta_d
        else:
            distance = (torch.tensor(self._levels, dtype=sigma.dtype, device=sigma.device) - sigma[..., None]).abs()
            noise = (config.steps - 1 - distance.argmin(-1)).to(sigma.dtype)
        return one, -sigma, (sigma.square() + 1.0).rsqrt(), noise

    def forward(self, x: Tensor, sigma: Tensor, cond: Any = None) -> Tensor:
        sigma = self._positive(sigma, x)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        over = (-1, *[1] * (x.dim() - 1))
        c_skip, c_out, c_in = (c.reshape(over) for c in (c_skip, c_out, c_in))
        found = self._run((c_in * x).to(x.dtype), c_noise, cond)
        return (c_skip * x + c_out * found).to(x.dtype)


def _iddpm_levels(config: PreconditionedConfig) -> list[float]:
    """u_0 ... u_M, from the largest level to 0."""
    M, levels = config.steps, [0.0]
    products = [math.sin(0.5 * math.pi * j / (M * (config.C_2 + 1.0))) ** 2 for j in range(M + 1)]
    for j in range(M, 0, -1):
        ratio = max(products[j - 1] / products[j], config.C_1)
        levels.append(math.sqrt((levels[-1] ** 2 + 1.0) / ratio - 1.0))
    return levels[::-1]


# ----------------------------------------------------------------------------------------------------------- scores


@dataclasses.dataclass(frozen=True)
class ScoreNetworkConfig(_WrapperConfig):
    """A `ScoreNetwork`.

    form                   "ve" or "vp"
    sigma_min, sigma_max   the noise levels at the times 0 and 1 ("ve"); None: the time is the noise level
    beta_min, beta_max     beta at the times 0 and 1 ("vp")
    time_range             the network's time at t = 1 ("vp")
    """

    form: ScoreForm = "ve"
    sigma_min: float | None = None
    sigma_max: float | None = None
    beta_min: float = 0.1
    beta_max: float = 20.0
    time_range: float = 999.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in get_args(ScoreForm):
            raise ValueError(unknown("ScoreNetworkConfig.form", self.form, get_args(ScoreForm)))
        if (self.sigma_min is None) != (self.sigma_max is None):
            raise ValueError(
                f"ScoreNetworkConfig.sigma_min and sigma_max must go together, got {self.sigma_min} and "
                f"{self.sigma_max}"
            )


class ScoreNetwork(_Wrapper):
    """The score s(x, t) = grad log p_t(x) of a network F, ``model(x, t, cond)``: the prediction "score".

    | form | s(x, t) | noise level | schedule |
    |---|---|---|---|
    | ve | F(x, ln sigma)/sigma | sigma = t | `edm()` |
    | ve | the same | sigma = sigma_min (sigma_max/sigma_min)^t | `ve(sigma_min, sigma_max)` |
    | vp | -F(x, time_range t)/sigma | sigma = sqrt(1 - exp(-t beta_min - t^2 (beta_max - beta_min)/2)) | `vp()` |

    "ve" is NCSN's: F has the size of -eps at every level, the network is scaled by 1/sigma (Song and Ermon 2020, arXiv
    2006.09011, technique 3) and knows ln sigma (NCSN++, Song et al. 2021, arXiv 2011.13456). "vp" is the score of a
    network that predicts eps (DDPM++ there). Lectures 000, 001 and 003 (score matching).

    Shapes, dtypes and errors as of `Preconditioned`.
    """

    CONFIG = ScoreNetworkConfig
    config: ScoreNetworkConfig

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        config, t = self.config, self._positive(t, x)
        if config.form == "vp":
            total = t * (config.beta_min + 0.5 * t * (config.beta_max - config.beta_min))
            factor, time = -(-torch.expm1(-total)).rsqrt(), config.time_range * t
        else:
            low, high = config.sigma_min, config.sigma_max
            time = t.log() if low is None or high is None else math.log(low) + t * math.log(high / low)
            factor = (-time).exp()
        found = self._run(x, time, cond)
        return (factor.reshape(-1, *[1] * (x.dim() - 1)) * found).to(x.dtype)


# ------------------------------------------------------------------------------------------------------------ flows


@dataclasses.dataclass(frozen=True)
class FlowNetworkConfig(_WrapperConfig):
    """A `FlowNetwork`.

    time_range   the network's time at the end of the path, 1000 where its sinusoids are made for steps
    backwards    the network knows the path from data (0) to noise (1), and its velocity eps - x0, as diffusers' do
    """

    time_range: float = 1000.0
    backwards: bool = False


class FlowNetwork(_Wrapper):
    """The velocity u_t(x) of a flow from noise (t = 0) to data (t = 1), ``model(x, t, cond)`` with t in [0, 1].

        u_t(x) = F(x, time_range t),   or backwards   u_t(x) = -F(x, time_range (1 - t))

    The prediction "velocity" on `diffkern.flow()`, whose target is x0 - eps (arXiv 2209.03003, 2210.02747; lectures 000
    and 003). Backwards: a network of the opposite convention, time and target (arXiv 2403.03206).

    Shapes, dtypes and errors as of `Preconditioned`; t may be 0.
    """

    CONFIG = FlowNetworkConfig
    config: FlowNetworkConfig

    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        t = self._times(t, x)
        time = 1.0 - t if self.config.backwards else t
        found = self._run(x, self.config.time_range * time, cond)
        return (-found if self.config.backwards else found).to(x.dtype)
