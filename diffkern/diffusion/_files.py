"""A `Diffusion` in a folder: config.json says what it is, model.safetensors holds the weights."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from diffkern.diffusion import _autoencoder
from diffkern.diffusion._autoencoder import StoredAutoencoder
from diffkern.names import Prediction
from diffkern.objectives.time_sampling import TimeSampler, get_time_sampler
from diffkern.objectives.weightings import Weighting, get_weighting
from diffkern.parallel import bare
from diffkern.records import record, shown
from diffkern.schedules.base import Schedule
from diffkern.schedules.predictions import with_predictions

if TYPE_CHECKING:
    from diffkern.diffusion import Diffusion

KEY, FORMAT = "diffkern_diffusion", 1
PLACES = 9


@dataclasses.dataclass(frozen=True)
class _Null:
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class _Config:
    """What config.json holds beside the number of its format; parts of several kinds are read where they are used."""

    prediction: Prediction
    schedule: dict[str, Any]
    weight: dict[str, Any] | None
    target: Prediction | None
    times: dict[str, Any]
    drop: float
    null: _Null | None
    shape: tuple[int, ...] | None
    time_scale: float
    learned_variance: bool
    network: dict[str, Any]
    autoencoder: StoredAutoencoder | None = None
    degradation: dict[str, Any] | None = None


class _Stored(nn.Module):
    """The tensors of a file, by their names there: ``model.`` and the network's own, and ``null``."""

    def __init__(self, model: nn.Module, null: Tensor | None) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("null", null)


def described(diffusion: Diffusion) -> dict[str, Any]:
    """See `Diffusion.to_dict`."""
    from diffkern.nn import stored  # where a network is stored or built alone

    null = diffusion.null
    config = _Config(
        prediction=diffusion.prediction,
        schedule=_schedule_to(diffusion.schedule),
        weight=None if diffusion.weight is None else _named(diffusion.weight),
        target=diffusion.target,
        times=_named(diffusion.times),
        drop=diffusion.drop,
        null=None if null is None else _Null(tuple(null.shape), str(null.dtype).removeprefix("torch.")),
        shape=diffusion.shape,
        time_scale=diffusion.time_scale,
        learned_variance=diffusion.learned_variance,
        network=stored.network_data(diffusion.model),
        autoencoder=_autoencoder.described(diffusion),
        degradation=None if diffusion.degradation is None else diffusion.degradation.to_dict(),
    )
    found = {KEY: FORMAT, **dataclasses.asdict(config)}
    for name in ("autoencoder", "degradation"):  # the file of a model without is that of earlier versions
        if found[name] is None:
            del found[name]
    return found


def save(
    diffusion: Diffusion, folder: str | os.PathLike[str], weights: Mapping[str, Tensor], average: str | None
) -> None:
    """See `Diffusion.save_pretrained`."""
    from diffkern.nn import stored

    module = _Stored(bare(diffusion.model), diffusion.null)
    given = {f"model.{name}": tensor for name, tensor in weights.items()}
    stored.save(module, described(diffusion), folder, given, average)


def load(
    cls: type[Diffusion],
    path: str | os.PathLike[str],
    model: nn.Module | None,
    *,
    schedule: Schedule | None,
    weight: Any,
    times: Any,
    average: str | None,
    autoencoder: nn.Module | None,
    hub: dict[str, Any],
) -> Diffusion:
    """See `Diffusion.from_pretrained`."""
    from diffkern import degradations
    from diffkern.nn import stored

    config_path, weights_path = stored.files(path, average, hub, "Diffusion")
    config = _config(config_path)
    found_in = stored.contents(weights_path)
    encoder, preview = _autoencoder.restored(config.autoencoder, autoencoder, config_path.parent, hub, str(path))
    null = _place(config.null)
    ours = model is None
    if model is None:
        model = stored.network_from(config.network, found_in, str(path), lambda network: _Stored(network, null))
    found = cls(
        model,
        _schedule_from(config.schedule, schedule),
        config.prediction,
        weight=_given("weight", config.weight, weight, Weighting.from_dict, get_weighting),
        target=config.target,
        times=_given("times", config.times, times, TimeSampler.from_dict, get_time_sampler),
        drop=config.drop,
        null=null,
        shape=config.shape,
        time_scale=config.time_scale,
        learned_variance=config.learned_variance,
        autoencoder=encoder,
        degradation=None if config.degradation is None else degradations.from_dict(config.degradation),
    )
    found.preview_map = preview
    if ours and found_in.dtype is not None:
        model.to(found_in.dtype)
    stored.fill(_Stored(bare(model), found.null), weights_path)
    return found


# ---------------------------------------------------------------------------------------------------------- the parts


def _named(value: Any) -> dict[str, Any]:
    """What the value is, or that it is made of functions or has a state, which have to be given again."""
    try:
        return value.to_dict()
    except ValueError:
        return {"given": type(value).__name__}


def _schedule_to(schedule: Schedule) -> dict[str, Any]:
    """The schedule; of one that is made of functions its values at some times, by which it is known again."""
    try:
        return schedule.to_dict()
    except ValueError:
        return {"given": schedule.name, "values": _values(schedule)}


def _values(schedule: Schedule) -> list[list[float]]:
    low, high = schedule.time_range
    t = torch.linspace(low, high, PLACES, dtype=torch.float64)
    return torch.stack([schedule.alpha(t), schedule.sigma(t)]).tolist()


def _schedule_from(data: Any, given: Schedule | None) -> Schedule:
    if not isinstance(data, dict) or "given" not in data:
        stored = Schedule.from_dict(data)
        if given is not None and given != stored:
            raise ValueError(f"schedule must be the one that the network was trained with, {stored!r}, got {given!r}")
        return stored
    if given is None:
        raise ValueError(
            f"schedule must be given, as {data['given']!r} is made of functions, which the file does not hold: "
            "from_pretrained(path, schedule=...)"
        )
    values = torch.tensor(data.get("values"), dtype=torch.float64)
    if values.shape != (2, PLACES) or not torch.allclose(torch.tensor(_values(given)).double(), values, 1e-6, 1e-9):
        raise ValueError(
            f"schedule must be the one that the network was trained with, {data['given']!r}, got {given.name!r} with "
            "other values"
        )
    return given


def _given(name: str, data: Any, given: Any, from_dict: Any, get: Any) -> Any:
    """What the caller gives, else what the file says."""
    if given is not None:
        return get(given)
    if isinstance(data, dict) and "given" in data:
        raise ValueError(
            f"{name} must be given, as the file only knows that it was {data['given']}: "
            f"from_pretrained(path, {name}=...)"
        )
    return None if data is None else from_dict(data)


def _place(null: _Null | None) -> Tensor | None:
    """A place for the condition that means none."""
    if null is None:
        return None
    kind = getattr(torch, null.dtype, None)
    ok = all(0 <= n < 2**24 for n in null.shape) and isinstance(kind, torch.dtype)
    if not ok or math.prod(null.shape) > 2**24:
        raise ValueError(f"null must have a shape and a dtype, got {shown(null.shape)} and {shown(null.dtype)}")
    return torch.zeros(null.shape, dtype=kind)


def _config(path: Path) -> _Config:
    from diffkern.nn import stored

    data = stored.read_config(path, KEY, FORMAT, "a Diffusion")
    config = record(_Config, with_predictions(data, "prediction", "target"), f"{path}: ")
    if not all(0 <= n < 2**24 for n in config.shape or ()):
        raise ValueError(f"{path}: shape must be a list of sizes, got {shown(config.shape)}")
    return config
