"""One safetensors file: the weights, and in its metadata, as JSON, everything needed to sample from them."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import torch

from diffkern import schedules
from diffkern.demo import need
from diffkern.nn import UNet, UNetConfig
from diffkern.schedules.discrete import DiscreteSchedule

_KEY = "diffkern_demo"
_FORMAT = 1
_SCHEDULES = {"cosine": schedules.cosine, "linear": schedules.linear}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to use the weights: the network, the schedule, the prediction, and what sampling takes when nothing else is
    asked.

    schedule      "cosine" or "linear", with `timesteps` noise levels
    prediction    what the network predicts
    guidance      default weight of classifier-free guidance
    micro_batch   default number of images sampled together (one image's bits depend on it, so it is part of the recipe)
    seed          default seed of a sampling job
    training      how the weights were made, for the reader
    """

    unet: UNetConfig = dataclasses.field(default_factory=UNetConfig)
    schedule: str = "cosine"
    timesteps: int = 1000
    prediction: str = "eps"
    guidance: float = 1.5
    micro_batch: int = 80
    seed: int = 0
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def make_schedule(self) -> DiscreteSchedule:
        """The noise schedule the network was trained with."""
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"Recipe.schedule must be one of {', '.join(_SCHEDULES)}, got {self.schedule!r}")
        return _SCHEDULES[self.schedule](self.timesteps)


def save(path: str | os.PathLike[str], model: UNet, recipe: Recipe) -> None:
    """Write the file, whole or not at all: a run that is cut off leaves no half checkpoint."""
    safetensors = need("safetensors.torch", "safetensors")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    text = json.dumps({"format": _FORMAT, **dataclasses.asdict(recipe)}, sort_keys=True)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(safetensors.save(weights, metadata={_KEY: text}))
    os.replace(unfinished, path)


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> tuple[UNet, Recipe]:
    """The network in evaluation mode, and its recipe. A file of another kind is a ValueError with one sentence."""
    safetensors = need("safetensors", "safetensors")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}: `python -m diffkern demo` writes one")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error})") from error
    if text is None:
        raise ValueError(f"{path} is a safetensors file, but not a checkpoint of the diffkern demo (no {_KEY!r} in it)")
    try:
        values = json.loads(text)
        if values.pop("format") != _FORMAT:
            raise ValueError(f"its format is not {_FORMAT}")
        recipe = Recipe(**{**values, "unet": UNetConfig.from_dict(values["unet"])})
        recipe.make_schedule()
        model = UNet(recipe.unet)
        model.load_state_dict(weights)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} does not fit this version of the diffkern demo: {reason[:300]}") from error
    model = model.to(device)
    if torch.device(device).type == "cpu":
        model = model.to(memory_format=torch.channels_last)  # as trained: the same bits
    return model.requires_grad_(False).eval(), recipe
