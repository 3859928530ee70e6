"""Predictor-corrector and ODE samplers of arXiv 2011.13456 (algorithms 1 to 5) with score_sde's interface.

Every update is one fused op (`_rows`); a sampler with the predictors and correctors of this module prepares the rows of
all steps before its loop. Noise comes from torch's generator, as often and in the shapes that score_sde asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from diffkern.compat.score_sde import _ode, _rows
from diffkern.compat.score_sde._prepared import prepared_run
from diffkern.compat.score_sde._updates import (
    AncestralSamplingPredictor,
    AnnealedLangevinDynamics,
    Corrector,
    EulerMaruyamaPredictor,
    LangevinCorrector,
    NoneCorrector,
    NonePredictor,
    Pair,
    Predictor,
    ReverseDiffusionPredictor,
    get_corrector,
    get_predictor,
    register_corrector,
    register_predictor,
)
from diffkern.compat.score_sde.models import from_flattened_numpy, get_score_fn, to_flattened_numpy
from diffkern.names import OdeSolver

__all__ = [
    "AncestralSamplingPredictor",
    "AnnealedLangevinDynamics",
    "Corrector",
    "EulerMaruyamaPredictor",
    "LangevinCorrector",
    "NoneCorrector",
    "NonePredictor",
    "Predictor",
    "ReverseDiffusionPredictor",
    "from_flattened_numpy",
    "get_corrector",
    "get_ode_sampler",
    "get_pc_sampler",
    "get_predictor",
    "get_sampling_fn",
    "get_score_fn",
    "register_corrector",
    "register_predictor",
    "shared_corrector_update_fn",
    "shared_predictor_update_fn",
    "to_flattened_numpy",
]


# ------------------------------------------------------------------------------------------------------------ samplers
def shared_predictor_update_fn(
    x: Tensor, t: Tensor, sde: Any, model: Any, predictor: Any, probability_flow: bool, continuous: bool
) -> Pair:
    """One update of a predictor class (None: of none), with the score function of the network."""
    score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
    pair: Pair = (NonePredictor if predictor is None else predictor)(sde, score_fn, probability_flow).update_fn(x, t)
    return pair


def shared_corrector_update_fn(
    x: Tensor, t: Tensor, sde: Any, model: Any, corrector: Any, continuous: bool, snr: float, n_steps: int
) -> Pair:
    """One update of a corrector class (None: of none), with the score function of the network."""
    score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
    pair: Pair = (NoneCorrector if corrector is None else corrector)(sde, score_fn, snr, n_steps).update_fn(x, t)
    return pair


def get_sampling_fn(config: Any, sde: Any, shape: Sequence[int], inverse_scaler: Any, eps: float) -> Any:
    """The sampler that a configuration names: ``sampling_fn(model) -> (samples, network calls)``.

    ``config.sampling``: method ("ode" or "pc"), noise_removal; for "pc" predictor, corrector, snr, n_steps_each,
    probability_flow, and ``config.training.continuous``. ``config.device`` is where the state lives.
    """
    chosen = config.sampling
    if chosen.method.lower() == "ode":
        return get_ode_sampler(sde, shape, inverse_scaler, denoise=chosen.noise_removal, eps=eps, device=config.device)
    if chosen.method.lower() != "pc":
        raise ValueError(f"Sampler name {chosen.method} unknown.")
    return get_pc_sampler(
        sde,
        shape,
        get_predictor(chosen.predictor.lower()),
        get_corrector(chosen.corrector.lower()),
        inverse_scaler,
        chosen.snr,
        n_steps=chosen.n_steps_each,
        probability_flow=chosen.probability_flow,
        continuous=config.training.continuous,
        denoise=chosen.noise_removal,
        eps=eps,
        device=config.device,
    )


def get_pc_sampler(
    sde: Any,
    shape: Sequence[int],
    predictor: Any,
    corrector: Any,
    inverse_scaler: Callable[[Tensor], Tensor],
    snr: float,
    n_steps: int = 1,
    probability_flow: bool = False,
    continuous: bool = False,
    denoise: bool = True,
    eps: float = 1e-3,
    device: torch.device | str = "cuda",
) -> Callable[[Any], tuple[Tensor, int]]:
    """``pc_sampler(model) -> (samples, N (n_steps + 1))``: corrector and predictor at N times from T to eps.

    ``denoise``: the last update's mean instead of its state. Predictors and correctors of this module run as rows of
    one op each, prepared before the loop; classes of the user's own are called as score_sde calls them.
    """

    @torch.no_grad()
    def pc_sampler(model: Any) -> tuple[Tensor, int]:
        x = sde.prior_sampling(shape).to(device)
        _rows.check_start(sde, x)
        score_fn = get_score_fn(sde, model, train=False, continuous=continuous)
        steps = (
            (NonePredictor if predictor is None else predictor)(sde, score_fn, probability_flow),
            (NoneCorrector if corrector is None else corrector)(sde, score_fn, snr, n_steps),
        )
        times = torch.linspace(sde.T, eps, sde.N, device=x.device)
        if score_fn.fits and _preparable(*steps):
            x = prepared_run(*steps, score_fn, x, times, denoise)
        else:
            mean = x
            for t in times.unsqueeze(1):
                at = t.expand(len(x)).clone()
                x, mean = shared_corrector_update_fn(x, at, sde, model, corrector, continuous, snr, n_steps)
                x, mean = shared_predictor_update_fn(x, at, sde, model, predictor, probability_flow, continuous)
            x = mean if denoise else x
        return inverse_scaler(x), sde.N * (n_steps + 1)

    return pc_sampler


def _preparable(predictor: Any, corrector: Any) -> bool:
    """Whether both are of this module, and fit their SDE: their rows are known before the loop."""
    ours = (EulerMaruyamaPredictor, ReverseDiffusionPredictor, AncestralSamplingPredictor, NonePredictor)
    if type(predictor) not in ours or type(corrector) not in (
        LangevinCorrector,
        AnnealedLangevinDynamics,
        NoneCorrector,
    ):
        return False
    return isinstance(predictor, NonePredictor) or bool(predictor.fits())


def get_ode_sampler(
    sde: Any,
    shape: Sequence[int],
    inverse_scaler: Callable[[Tensor], Tensor],
    denoise: bool = False,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    method: str = "RK45",
    eps: float = 1e-3,
    device: torch.device | str = "cuda",
    solver: OdeSolver = "device",
) -> Callable[..., tuple[Tensor, int]]:
    """``ode_sampler(model, z=None) -> (samples, network calls)``: the probability flow from T to eps, from z.

    ``solver`` "device": `diffkern.rk45`, a step size for each sample, the state in float64 where it is. "scipy":
    `scipy.integrate.solve_ivp` on the flattened batch on the host, as score_sde does; also for every ``method`` but
    RK45, and for SDEs of other forms. ``denoise``: then the mean of one reverse diffusion step at eps.
    """
    _ode.check_solver(solver)

    @torch.no_grad()
    def ode_sampler(model: Any, z: Tensor | None = None) -> tuple[Tensor, int]:
        start = sde.prior_sampling(shape) if z is None else z
        _rows.check_start(sde, start)
        x = (start if z is None else _ode.widened(start)).to(device)
        score_fn = get_score_fn(sde, model, train=False, continuous=True)
        x, calls = _ode.integrate(sde, score_fn, x, (sde.T, eps), rtol, atol, method, solver)
        if denoise:
            x = ReverseDiffusionPredictor(sde, score_fn).update_fn(x, x.new_full([len(x)], eps))[1]
        return inverse_scaler(x), calls

    return ode_sampler
