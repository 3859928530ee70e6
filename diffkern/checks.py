"""What a function of the user's returned, and what a dtype holds, checked; how errors say it; what a mask means."""

from __future__ import annotations

import difflib
import math
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

ROOM = 8.0
"""Standard deviations of noise that a state and a target have room for; the normals of `ops.randn` end at 6.7."""


def got(value: object) -> str:
    """What an error says of a value: its shape, or its type where it is no tensor."""
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def must_return(value: object, rule: str, name: str = "model") -> str:
    """The sentence of an error about a ``value`` that the function ``name`` returned."""
    text = f"{name} must return {rule}, got {got(value)}"
    if isinstance(value, tuple | list):
        text += f" of {len(value)}: choose one, as in lambda *args: {name}(*args)[0]"
    elif isinstance(value, Mapping):
        text += f" of {', '.join(map(str, value))}: choose one, as in lambda *args: {name}(*args)[...]"
    return text


def unwrapped(value: object, name: str = "model", field: str = "sample") -> Tensor:
    """The tensor that a network returned, by itself or in what it was wrapped in; ValueError where that is not certain.

    Certain are the attribute ``field`` of an object (diffusers' outputs have ``sample``), that key of a dict, and the
    one entry of a tuple or list.
    """
    if isinstance(value, Tensor):
        return value
    inside = value.get(field) if isinstance(value, Mapping) else getattr(value, field, None)
    if inside is None and isinstance(value, tuple | list) and len(value) == 1:
        inside = value[0]
    if not isinstance(inside, Tensor):
        raise ValueError(must_return(value, "a tensor", name))
    return inside


def returned(value: object, shape: torch.Size, name: str = "model", row: int | None = None) -> Tensor:
    """The ``value`` that the function ``name`` returned (at ``row`` of a plan), `unwrapped`; ValueError unless it has
    ``shape``."""
    if isinstance(value, Tensor) and value.shape == shape:
        return value
    try:
        value = unwrapped(value, name)
        if value.shape == shape:
            return value
    except ValueError:  # said below, with the shape
        pass
    text = must_return(value, f"a tensor of shape {list(shape)}", name)
    raise ValueError(text if row is None else f"{text} at row {row}")


PREDICTIONS_ELSEWHERE: dict[str, str] = {
    "epsilon": "eps",  # diffusers, guided-diffusion
    "pred_noise": "eps",  # denoising-diffusion-pytorch, as the other pred_
    "sample": "x0",  # diffusers
    "original_sample": "x0",  # diffusers, of its outputs
    "x_start": "x0",  # guided-diffusion
    "start_x": "x0",
    "pred_x0": "x0",
    "v_prediction": "v",  # diffusers
    "pred_v": "v",
    "previous_x": "mu",  # guided-diffusion
}
"""What other libraries call a prediction, and its name here."""
PREDICTIONS_OF_TWO_MEANINGS: dict[str, str] = {
    "flow_prediction": (
        "which is eps - x0 in diffusers, while 'velocity' is the schedule's d alpha/dt x0 + d sigma/dt eps, x0 - eps "
        "on flow(): negate the network's output there, or take path(lambda t: 1 - t, lambda t: t)"
    )
}
"""Names of other libraries with another meaning here, and which."""
EDM_ELSEWHERE: dict[str, str] = {
    "epsilon": "which diffusers' EDM schedulers call epsilon",
    "v_prediction": "whose negative diffusers' EDM schedulers call v_prediction",
}
"""Names that mean another prediction for the EDM schedulers of the library that they are from: what of ``edm``."""
SAMPLERS_ELSEWHERE: dict[str, str] = {  # of programs on k-diffusion
    "euler_a": "euler_ancestral",
    "dpm_2_a": "dpm_2_ancestral",
    "dpmpp_2s_a": "dpmpp_2s_ancestral",
}
"""What other programs call a sampler, and its name here."""
ARGUMENTS_ELSEWHERE: dict[str, str] = {"num_inference_steps": "steps"}
"""What other libraries call an argument of one meaning and type, and its name here."""
FOREIGN = {
    "noise": "eps",  # also an argument of the losses and samplers
    "num_steps": "steps",
    "num_timesteps": "steps",
    "guidance_scale": "guidance",
    "cfg_scale": "guidance",
    "seed": "seeds",
    "generator": "seeds",
    "prediction_type": "prediction",
    "clip_sample": "clip",
    "clip_denoised": "clip",
    "class_labels": "cond",
    "encoder_hidden_states": "cond",
    "negative_prompt_embeds": "uncond",
    "dpmsolver++": "dpmpp_2m",
    "squaredcos_cap_v2": "cosine",
}
"""What other libraries call what is here called so, or much like it: for sentences. Names of one meaning are taken, and
stand above."""
_ELSEWHERE = {**FOREIGN, **PREDICTIONS_ELSEWHERE, **SAMPLERS_ELSEWHERE, **ARGUMENTS_ELSEWHERE}


def plain(name: str) -> str:
    """A word without its case and its separators: two of one plain form are one word."""
    return name.lower().replace("++", "pp").replace("-", "").replace("_", "").replace(" ", "")


def word(value: object, known: Iterable[str], elsewhere: Mapping[str, str] | None = None) -> str | None:
    """The one of the ``known`` words that a value is, by its `plain` form or that of a name ``elsewhere``; or None."""
    if not isinstance(value, str):
        return None
    sought = plain(value)
    for name in known:
        if plain(name) == sought:
            return name
    for name, ours in (elsewhere or {}).items():
        if plain(name) == sought:
            return ours
    return None


def renamed(function: str, options: dict[str, Any], known: Container[str]) -> dict[str, Any]:
    """Arguments by keyword, those of `ARGUMENTS_ELSEWHERE` by the name of the ``known`` one; TypeError for both."""
    for name, ours in ARGUMENTS_ELSEWHERE.items():
        if name in options and name not in known and ours in known:
            if options.get(ours) is not None:
                raise TypeError(f"{function} got {ours} and {name}, which are one argument: give {ours} alone")
            options = {**options, ours: options[name]}
            del options[name]
    return options


def meant(value: object, known: Iterable[str]) -> str | None:
    """The known name that a wrong one probably means: another library's, another spelling, or the nearest."""
    if not isinstance(value, str):
        return None
    names = list(known)
    found = word(value, (), _ELSEWHERE)
    if found in names:
        return found
    if same := word(value, names):
        return same
    forms = {plain(name): name for name in names}
    near = difflib.get_close_matches(plain(value), forms, 1, 0.7)
    return forms[near[0]] if near else None


def unknown(argument: str, value: object, known: Iterable[str]) -> str:
    """The sentence of an error about a ``value`` that is none of the ``known`` names."""
    names = list(known)
    text = f"{argument} must be one of {', '.join(names)}, got {value!r}"
    near = meant(value, names)
    return text if near is None else f"{text}: did you mean {near!r}?"


def misspelt(function: str, name: str, known: Iterable[str]) -> str:
    """The sentence of an error about an argument ``name`` that the ``function`` does not have."""
    near = meant(name, known)
    text = f"{function} got an unexpected keyword argument {name!r}"
    return text if near is None else f"{text}: did you mean {near!r}?"


def need_tensor(name: str, value: object) -> None:
    """Raise ValueError, with the way to a tensor, unless ``value`` is one."""
    if isinstance(value, Tensor):
        return
    text = f"{name} must be a tensor [B, ...], got {type(value).__name__}"
    if isinstance(value, tuple | list):
        raise ValueError(f"{text} of {len(value)}: torch.stack makes one of a list, {name}[0] is the first of a pair")
    if type(value).__module__.startswith("PIL"):
        raise ValueError(f"{text}: torch.from_numpy(numpy.array(image)).permute(2, 0, 1)[None] / 127.5 - 1 makes one")
    if callable(value):
        raise ValueError(f"{text}, which can be called: are the arguments in another order?")
    raise ValueError(f"{text}: torch.as_tensor({name}) makes one")


def need_model(value: object, name: str = "model") -> None:
    """Raise ValueError unless ``value`` can be called, and for a `Diffusion`, whose call is its loss."""
    if hasattr(type(value), "denoise") and hasattr(type(value), "network"):
        raise ValueError(f"{name} must be a function of (x, t), got a Diffusion: use its methods, or give its .network")
    if not callable(value):
        hint = ": are the arguments in another order?" if isinstance(value, Tensor) else ""
        raise ValueError(f"{name} must be a function of (x, t), got {type(value).__name__}{hint}")


def opened(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """How far a mask lets x' through, from 0 to 1: its numbers, or for bool and integers 1 where they are not 0."""
    return mask.to(dtype) if mask.is_floating_point() else (mask != 0).to(dtype)


def most_in(dtype: torch.dtype) -> float:
    """The largest coefficient of noise in a state or a target of this dtype.

    8 standard deviations are numbers of the dtype, and their squares numbers of the arithmetic: 8188 for float16, 2e18
    for bfloat16 and float32, 2e153 for float64.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return min(torch.finfo(dtype).max, math.sqrt(torch.finfo(wide).max)) / ROOM


def check_level(sigma: float, dtype: torch.dtype, what: str = "the noise level of the state") -> None:
    """Raise ValueError unless a state of this dtype can have a noise level (or a scale) of ``sigma``."""
    if not abs(sigma) <= most_in(dtype):
        narrow = str(dtype).removeprefix("torch.")
        wide = "torch.bfloat16 or torch.float32" if dtype == torch.float16 else "torch.float64"
        raise ValueError(f"{what} must be at most {most_in(dtype):.4g} in {narrow}, got {sigma:.6g}: use {wide}")
