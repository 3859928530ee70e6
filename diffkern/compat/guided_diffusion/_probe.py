"""Whether a guided_diffusion's own methods compute what diffkern's do: both are tried on a few numbers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffkern.compat.guided_diffusion.gaussian_diffusion import LossType, ModelMeanType, ModelVarType

__all__ = ["differences", "results", "undisturbed", "unknown_kinds"]

Results = dict[tuple[str, str], Any]
"""(method, the argument that the call uses, or "") -> what it returned, for each kind of diffusion."""
KINDS = (
    ("EPSILON", "FIXED_LARGE", "MSE"),
    ("EPSILON", "LEARNED_RANGE", "RESCALED_MSE"),
    ("START_X", "FIXED_SMALL", "KL"),
    ("PREVIOUS_X", "LEARNED", "RESCALED_KL"),
)
ENUMS = {"ModelMeanType": ModelMeanType, "ModelVarType": ModelVarType, "LossType": LossType}


@contextmanager
def undisturbed() -> Iterator[None]:
    """The CPU without autograd and autocast, whatever is the default; torch's generators are left as they were."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
        torch.autocast("cpu", enabled=False),
        torch.no_grad(),
    ):
        yield


def _globals(cls: type) -> dict[str, Any]:
    """The names that the class's module has."""
    found: dict[str, Any] = getattr(inspect.getattr_static(cls, "__init__"), "__globals__", {})
    return found


def unknown_kinds(cls: type) -> list[str]:
    """The members of the class's enums that guided_diffusion has not."""
    names = _globals(cls)
    return [
        f"{name}.{member}"
        for name, ours in ENUMS.items()
        for member in getattr(names.get(name), "__members__", ())
        if member not in ours.__members__
    ]


def results(cls: type) -> Results:
    """What the methods of this class return now; empty where no object can be made as guided_diffusion makes it.

    Methods and arguments that the class has not are left out.
    """
    names = _globals(cls)
    found: Results = {}
    for kind in KINDS:
        try:
            mean, variance, loss = (getattr(names[name], value) for name, value in zip(ENUMS, kind, strict=True))
            diffusion = cls(
                betas=np.linspace(0.05, 0.4, 4), model_mean_type=mean, model_var_type=variance, loss_type=loss
            )
        except Exception:  # a fork's own arguments
            continue
        for call, function in _calls(kind[1].startswith("LEARNED")).items():
            if not _takes(cls, *call):
                continue
            torch.default_generator.manual_seed(0)  # torch.manual_seed would seed those of GPUs too
            try:
                found.setdefault(call, []).append(function(diffusion))
            except Exception as error:  # as above
                found.setdefault(call, []).append(error)
    return found


def _takes(cls: type, method: str, argument: str) -> bool:
    function = getattr(cls, method, None)
    return callable(function) and (not argument or argument in inspect.signature(function).parameters)


def differences(theirs: Results, ours: Results) -> dict[str, set[str]]:
    """Method -> the uses of it that return something else, or that the original cannot do for any kind of diffusion."""
    found: dict[str, set[str]] = {}
    for (method, use), want in theirs.items():
        pairs = zip(want, ours.get((method, use), [None] * len(want)), strict=True)
        tried = [_same(a, b) for a, b in pairs if not isinstance(a, Exception)]
        if not tried or not all(tried):
            found.setdefault(method, set()).add(use)
    return found


def _calls(learned: bool) -> dict[tuple[str, str], Callable[[Any], Any]]:
    x = torch.linspace(-2, 2, 24, dtype=torch.float32).sin().reshape(3, 2, 4)
    x0, z = x.flip(0).contiguous(), x.cos()
    t = torch.tensor([0, 1, 3])

    def model(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        eps = (x.float() * 1.5).sin() + 0.01 * t.reshape(-1, 1, 1)
        return torch.cat([eps, 0.3 * x], 1) if learned else eps

    def gradient(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
        return 0.2 * x + 0.01 * t.reshape(-1, 1, 1)

    variance = torch.full_like(x, 0.04)
    guessed = {"mean": 0.9 * x, "variance": variance, "log_variance": variance.log(), "pred_xstart": 0.5 * x}

    def condition(name: str) -> Callable[[Any], Any]:
        return lambda d: getattr(d, name)(gradient, guessed, x, t, model_kwargs={})

    calls: dict[tuple[str, str], Callable[[Any], Any]] = {
        ("q_sample", ""): lambda d: d.q_sample(x0, t, noise=z),
        ("q_mean_variance", ""): lambda d: d.q_mean_variance(x0, t),
        ("q_posterior_mean_variance", ""): lambda d: d.q_posterior_mean_variance(x_start=x0, x_t=x, t=t),
        ("p_mean_variance", ""): lambda d: d.p_mean_variance(model, x, t),
        ("p_mean_variance", "denoised_fn"): lambda d: d.p_mean_variance(model, x, t, denoised_fn=torch.tanh),
        ("condition_mean", ""): condition("condition_mean"),
        ("condition_score", ""): condition("condition_score"),
        ("ddim_reverse_sample", ""): lambda d: d.ddim_reverse_sample(model, x, t),
        ("training_losses", ""): lambda d: d.training_losses(model, x0, t, noise=z),
        ("calc_bpd_loop", ""): lambda d: d.calc_bpd_loop(model, x0),
    }
    for name in ("p_sample", "ddim_sample"):
        calls |= {
            (name, ""): lambda d, name=name: getattr(d, name)(model, x, t),  # type: ignore[misc]
            (name, "cond_fn"): lambda d, name=name: getattr(d, name)(model, x, t, cond_fn=gradient, model_kwargs={}),  # type: ignore[misc]
            (name, "denoised_fn"): lambda d, name=name: getattr(d, name)(model, x, t, denoised_fn=torch.tanh),  # type: ignore[misc]
        }
        for loop in (f"{name}_loop", f"{name}_loop_progressive"):
            calls[loop, ""] = lambda d, loop=loop: _listed(getattr(d, loop)(model, tuple(x.shape), device="cpu"))  # type: ignore[misc]
    calls["ddim_sample", "eta"] = lambda d: d.ddim_sample(model, x, t, eta=0.5)
    return calls


def _listed(found: Any) -> Any:
    return found if isinstance(found, Tensor) else list(found)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, tuple | list):
        return isinstance(b, tuple | list) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and torch.allclose(a.double(), b.double(), 1e-4, 1e-4)
    return bool(a == b)
