"""A network with what must agree with it: `Diffusion(model, schedule, prediction)` trains, samples and is saved.

    diffusion = diffkern.Diffusion(UNet(UNetConfig()), diffkern.cosine(), "v")
    diffusion.loss(images, cond=labels).backward()
    samples = diffusion.sample(16, "ddim", steps=50, seeds=0, cond=classes, guidance=3.0)
    diffusion.save_pretrained("digits");  diffusion = diffkern.Diffusion.from_pretrained("digits")

The functions under it (`simple_loss`, `sample`, the samplers, `log_likelihood`) stay: it calls them with its own
schedule, prediction and network, so that none of the three can be forgotten or taken from elsewhere. docs/diffusion.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor, nn

from diffkern.checks import unwrapped
from diffkern.diffusion import _fit, _plans
from diffkern.diffusion._degraded import Restores, Without
from diffkern.diffusion._rows import Network
from diffkern.diffusion._storing import InFolders, Weight
from diffkern.draws import draw_seeds
from diffkern.modes import evaluating
from diffkern.names import DegradationName, Prediction, Reduction, SamplerName, TimesName
from diffkern.objectives.losses import drop_condition, noised, simple_loss
from diffkern.objectives.time_sampling import TimeSampler, get_time_sampler
from diffkern.objectives.variational import hybrid_loss
from diffkern.objectives.weightings import get_weighting
from diffkern.ops import Seeds, as_seeds
from diffkern.plan import Plan
from diffkern.sampling.options import Sampled
from diffkern.sampling.runner import initial
from diffkern.sampling.runner import sample as run_plan
from diffkern.schedules.base import Schedule, Time, as_time
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.exploding import EDMSchedule
from diffkern.schedules.predictions import convert, per_sample, prediction_of
from diffkern.simulate.likelihood import LogLikelihood, log_likelihood

if TYPE_CHECKING:
    from diffkern.degradations import Degradation

__all__ = ["Diffusion"]

Sampler = SamplerName | Plan | Callable[..., Plan]


class Diffusion(Restores, InFolders):
    """A network, its noise schedule and its prediction, held together: trains, samples, scores and is saved as one.

    - ``model(x_t, t)``, or ``model(x_t, t, cond)`` where a condition is given, returns the ``prediction`` (the
      schedule's default if None) in the shape of x_t; an object with ``.sample`` or a tuple of one is unwrapped.
    - ``weight``, ``target``: what the loss is weighted by and measured in (`prediction_loss`).
    - ``times``: how training times are drawn, a name or a sampler of `objectives.time_sampling`; uniform if None,
      log-normal on an EDM schedule.
    - ``drop``: probability that a training sample loses its condition and gets ``null`` in its place, for
      classifier-free guidance (arXiv 2207.12598; lectures 000, 002). ``null`` is a number or one sample's tensor; a
      `UNet` with classes brings its own, and a network of texts (`nn.TextConditioned`) the empty one.
    - ``shape``: of one sample, so that ``sample(16)`` knows it; that of a `UNet` if None.
    - ``time_scale``: the network is given ``time_scale * schedule.model_time(prediction, t)``. By default 1, but for
      networks of `diffkern.nn` on a schedule of continuous time what makes their sinusoids see a range of 1000:
      1000 / config.time_scale for t in [0, 1]. Integer times of a table are given as they are, int64.
    - ``learned_variance``: the network returns [B, 2C, ...], its prediction and what it says of the variance (a table
      only): trained by `hybrid_loss`, sampled by ``ddpm`` with its variance, by all others with its prediction.
    - ``autoencoder``: a `diffkern.nn.Autoencoder` in whose latents the network works (latent diffusion, arXiv
      2112.10752; lecture 002): `loss` encodes images, `sample` decodes. It is frozen. docs/latent.md.
    - ``degradation``: what images lose and this model gives back (`diffkern.degradations`): `loss` makes the network's
      further input of x0 itself, `sample` takes it as ``image``. docs/super-resolution.md.

    It is an `nn.Module`: ``.to``, DistributedDataParallel and torch.compile take it whole, `forward` is `loss`. Raises
    ValueError, naming argument, rule and value, for what does not fit.
    """

    null: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        prediction: Prediction | None = None,
        *,
        weight: Weight | None = None,
        target: Prediction | None = None,
        times: TimesName | TimeSampler | None = None,
        drop: float = 0.0,
        null: float | Tensor | None = None,
        shape: Sequence[int] | None = None,
        time_scale: float | None = None,
        learned_variance: bool = False,
        autoencoder: nn.Module | None = None,
        degradation: DegradationName | Degradation | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(schedule, Schedule):
            raise ValueError(f"schedule must be a diffkern Schedule, got {type(schedule).__name__}")
        self.model, self.schedule = model, schedule
        self.prediction = prediction_of(schedule, prediction)
        low, high = schedule.time_range
        t = int(high) if isinstance(schedule, DiscreteSchedule) else 0.5 * (low + high)
        schedule.coefficients(self.prediction, t)  # raises where the schedule does not have the prediction
        if isinstance(weight, Tensor):
            raise ValueError(
                "weight must be a name, a Weighting or a function, got a tensor: its rows belong to a batch"
            )
        self.weight = None if weight is None else get_weighting(weight)
        self.target = None if target is None else prediction_of(schedule, target)
        if times is None:
            times = "log_normal" if isinstance(schedule, EDMSchedule) else "uniform"
        self.times = get_time_sampler(times)
        self.time_scale = _fit.time_scale(model, schedule, self.prediction, time_scale)
        self.register_buffer("null", _fit.null_of(model, null, drop))
        self.drop = float(drop)
        self._hold(autoencoder, model, shape)
        self._restore(degradation)
        self.learned_variance = learned_variance
        if learned_variance and not (isinstance(schedule, DiscreteSchedule) and weight is target is None):
            raise ValueError("learned_variance needs a table, and a loss of its own: no weight and no target")
        self._data_seen = False

    # ------------------------------------------------------------------------------------------------- the network

    def network(self, x: Tensor, time: Tensor, cond: Any = None, **model_kwargs: Any) -> Tensor:
        """The network at the schedule's model time: what `diffkern.sample`, guidance and a loop of your own call.

        x is the input as the plan scales it; ``time`` ([B] or []) is multiplied by ``time_scale``.
        """
        time = self.model_time(time)
        given = (x, time) if cond is None else (x, time, cond)
        return unwrapped(self.model(*given, **model_kwargs))

    def _prediction(self, x: Tensor, time: Tensor, cond: Any = None, **model_kwargs: Any) -> Tensor:
        """`network` without what it says of the variance."""
        m = self.network(x, time, cond, **model_kwargs)
        return m[:, : x.shape[1]] if self.learned_variance else m

    def model_time(self, time: Tensor) -> Tensor:
        """What the network is given at a model time of the schedule: times ``time_scale``."""
        if self.time_scale == 1.0:
            return time
        return (time if time.is_floating_point() else time.to(torch.float32)) * self.time_scale

    def is_itself(self) -> bool:
        """Whether `network` and `model_time` are those of this class."""
        names = ("network", "model_time")
        return all(getattr(type(self), n) is getattr(Diffusion, n) and n not in vars(self) for n in names)

    def denoise(self, x: Tensor, t: Time, cond: Any = None, **model_kwargs: Any) -> Tensor:
        """E[x0 given x_t], the network's estimate of the clean sample: [B, ...] like x.

        x = alpha_t x0 + sigma_t eps; ``t`` is a time of the schedule (a table's index), a number or one a sample [B].
        In the network's mode, with gradients where torch records them. With an autoencoder both are latents; see
        `decode`.
        """
        t = as_time(t).to(x.device)
        scale = self.schedule.input_scale(self.prediction, t)
        time = self.schedule.model_time(self.prediction, t)
        time = (time.to(torch.float32) if time.is_floating_point() else time).expand(x.shape[:1])
        given = per_sample(scale, x, x.dtype) * x if self.prediction == "edm" else x
        m = self._prediction(given, time, cond, **model_kwargs)
        return convert(m, x, t, self.schedule, self.prediction, "x0")

    # --------------------------------------------------------------------------------------------------- training

    def forward(self, x0: Tensor, t: Tensor | None = None, **options: Any) -> Tensor:
        """`loss`, so that what wraps a module (DistributedDataParallel, torch.compile) trains it."""
        return self.loss(x0, t, **options)

    def loss(
        self,
        x0: Tensor,
        t: Tensor | None = None,
        *,
        cond: Any = None,
        seeds: Seeds | None = None,
        noise: Tensor | None = None,
        reduction: Reduction = "mean",
        latents: bool | None = None,
        **model_kwargs: Any,
    ) -> Tensor:
        """The training loss of clean samples x0 [B, ...], about in [-1, 1]: `simple_loss` with all that this holds.

        Noise, times ``t`` [B] where none are given, and which conditions are dropped (in training mode) are drawn by
        address from ``seeds``, an integer or int64 [B]: fresh ones from torch's generator if None. ``noise`` replaces
        the noise. ``reduction`` "none" [B], "mean", "sum"; further arguments go to the network. Ho et al. 2020;
        lectures 000, 001, 002. Warns once if the range of x0 is far from [-1, 1].

        With an autoencoder x0 are images, whose latents are sampled from the posterior by address, or latents; which of
        both their shape says, or ``latents``. The loss is that of latents, also their range that is looked at.
        """
        seen = self._data_seen or _fit.check_data(x0)
        images, batch = x0, x0.shape[0]
        seeds = draw_seeds(batch, device=x0.device) if seeds is None else as_seeds(seeds, batch, x0.device)
        if self.autoencoder is not None:
            with torch.no_grad():
                x0 = self.encode(x0, seeds, latents=latents)
            seen = self._data_seen or _fit.check_data(x0)
        self._data_seen = seen
        if t is None:
            t = self.times.sample(batch, self.schedule, seeds=seeds)
        if self.drop > 0.0 and self.training and cond is not None:
            if not isinstance(cond, Tensor):
                raise ValueError(
                    f"cond must be a tensor [B, ...] where conditions are dropped, got {type(cond).__name__}"
                )
            assert self.null is not None
            cond = drop_condition(cond, self.null.to(cond.device, cond.dtype), self.drop, seeds)
        cond = self.condition(images, cond, seeds)

        given: dict[str, Any] = {"seeds": seeds if noise is None else None, "noise": noise}
        if self.learned_variance:
            assert isinstance(self.schedule, DiscreteSchedule)
            x_t = noised(x0, t, self.schedule, self.prediction, **given)
            time = self.schedule.model_time(self.prediction, t)
            m = self.network(x_t, time, cond, **model_kwargs)
            return hybrid_loss(m, x0, as_time(t), self.schedule, self.prediction, **given, reduction=reduction)

        def network(x_t: Tensor, time: Tensor) -> Tensor:
            return self.network(x_t, time, cond, **model_kwargs)

        return simple_loss(
            network,
            x0,
            t,
            self.schedule,
            self.prediction,
            target=self.target,
            weight=self.weight,
            reduction=reduction,
            **given,
        )

    # --------------------------------------------------------------------------------------------------- sampling

    def plan(self, sampler: Sampler | None = None, steps: int | None = None, **options: Any) -> Plan:
        """The plan of a sampler, by its name, a function that makes one, or a `Plan`, checked to fit this model.

        The default is ``ddim`` on a table (``ddpm`` where the variance is learned), ``heun`` on an EDM schedule,
        ``euler`` elsewhere; 50 ``steps`` (a table's T if it has fewer) if neither they nor a grid are given.
        """
        return _plans.plan_of(self.schedule, self.prediction, sampler, steps, options, self.learned_variance)

    @overload
    def sample(
        self,
        n: int | Sequence[int],
        sampler: Sampler | None = ...,
        steps: int | None = ...,
        *,
        trajectory: Literal[True],
        **options: Any,
    ) -> Sampled: ...
    @overload
    def sample(
        self,
        n: int | Sequence[int],
        sampler: Sampler | None = ...,
        steps: int | None = ...,
        *,
        logprob: Literal[True],
        **options: Any,
    ) -> Sampled: ...
    @overload
    def sample(
        self,
        n: int | Sequence[int],
        sampler: Sampler | None = ...,
        steps: int | None = ...,
        *,
        seeds: Seeds | None = ...,
        cond: Any = ...,
        uncond: Any = ...,
        guidance: float | Sequence[float] | None = ...,
        x: Tensor | None = ...,
        start: int | Tensor = ...,
        x0: Tensor | None = ...,
        dtype: torch.dtype = ...,
        decode: bool = ...,
        **options: Any,
    ) -> Tensor: ...

    @torch.no_grad()
    def sample(
        self,
        n: int | Sequence[int],
        sampler: Sampler | None = None,
        steps: int | None = None,
        *,
        seeds: Seeds | None = None,
        cond: Any = None,
        uncond: Any = None,
        guidance: float | Sequence[float] | None = None,
        x: Tensor | None = None,
        start: int | Tensor = 0,
        x0: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        decode: bool = True,
        image: Tensor | None = None,
        augmentation: float = 0.0,
        without: Without | None = None,
        **options: Any,
    ) -> Tensor | Sampled:
        """n samples, or samples of the whole shape ``n`` = [B, ...], by a ``sampler`` (see `plan`): [B, ...].

        - ``seeds``: an integer or int64 [B]; sample j of an integer is the same in every split of the job
          (`ops.seeds` with ``first``). None draws them from torch's default generator.
        - ``guidance``: the weight of classifier-free guidance, with ``cond``; ``uncond`` is this model's ``null`` if
          not given.
        - ``x`` is the state to start from; ``start`` with ``x0`` begins in the middle with noised images.
        - ``dtype`` of the state; the network is given its parameters' dtype.
        - ``options``: the sampler's (``eta``, ``clip``, ``spacing`` ...), and those of `diffkern.sample` (``mask`` and
          ``known``, ``callback``, ``trajectory``, ``logprob``, ``progress`` ...). ``noise``: tensors are the noise, a
          number is the sampler's.
        - ``decode``: with an autoencoder, whether the samples are images or latents. ``n`` as a shape, ``x``, callbacks
          and trajectories are of latents; ``x0``, ``known`` and ``mask`` may be of images (docs/latent.md).
        - ``image``: with a degradation, the inputs [B, C', h, w] of the samples, or one for all, of any size that the
          network takes; ``augmentation``: the level of noise that is added to them. ``without``: what guidance goes
          away from, "class" (the null class, the image stays), "image" or "both".

        The network runs in evaluation mode, and is put back. No gradients are recorded.
        """
        own, given = _plans.split(options)
        plan = self.plan(sampler, steps, **given)
        if plan.init_scale == 0.0 and x is None:
            raise ValueError(f"x must be given for {plan.name}, which starts from data, got none")
        shape = _fit.shape_wanted(n, self._own_shape(image))
        device, model_dtype = self._home(dtype)
        drawn = draw_seeds(shape[0]).to(device) if seeds is None else as_seeds(seeds, shape[0], device)
        brought = self._brought({**own, "x0": x0}, shape, dtype)
        x0, own = brought.pop("x0"), brought
        if x is None:
            x = initial(plan, shape, drawn, dtype, device=device, start=start, x0=x0)
        elif tuple(x.shape) != shape or x0 is not None:
            raise ValueError(f"x must have the shape {list(shape)}, and x0 be left out with it, got {list(x.shape)}")
        guided = guidance is not None or any(row.w != 0.0 for row in plan.rows)
        network, cond, uncond = self._conditioned(
            Network(self, plan.learned_variance),
            image,
            shape,
            drawn,
            cond=cond,
            uncond=uncond,
            guided=guided,
            augmentation=augmentation,
            without=without,
            dtype=dtype,
        )
        by_tensor = own.get("noise") is not None and own.get("mask") is None
        own.setdefault("model_dtype", model_dtype)
        with evaluating(self):
            found: Tensor | Sampled = run_plan(
                network,
                x,
                plan,
                seeds=None if by_tensor else drawn,
                cond=cond,
                uncond=uncond,
                guidance=guidance,
                start=start,
                **own,
            )
            return self._decoded(found, decode)

    def log_likelihood(self, x: Tensor, *, cond: Any = None, **options: Any) -> LogLikelihood:
        """ln p(x) in nats through the probability-flow ODE, `diffkern.log_likelihood` with its ``options``.

        With an autoencoder it is the density of latents, which compares with no density of images; images are encoded
        (mode), latents taken as they are.
        """

        def network(x: Tensor, time: Tensor) -> Tensor:
            return self._prediction(x, time, cond)

        with evaluating(self):
            x = self.encode(x) if self.autoencoder is not None else x
            return log_likelihood(network, x, self.schedule, self.prediction, **options)

    def extra_repr(self) -> str:
        """Schedule, prediction and what the network is given."""
        return f"schedule={self.schedule!r}, prediction={self.prediction!r}, time_scale={self.time_scale:g}"

    # ---------------------------------------------------------------------------------------------------- helpers

    def _home(self, dtype: torch.dtype) -> tuple[torch.device, torch.dtype]:
        """Where the network is, and in which dtype its input is."""
        for parameter in self.parameters():
            if parameter.is_floating_point():
                return parameter.device, parameter.dtype
        return torch.device("cpu"), dtype
