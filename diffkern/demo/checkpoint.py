"""One safetensors file: the weights, and in its metadata, as JSON, everything needed to sample from them."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import torch

from diffkern import records, schedules, storage
from diffkern.demo import need
from diffkern.names import Prediction
from diffkern.nn import UNet, UNetConfig, preset
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.predictions import check_prediction, with_predictions

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

    unet: UNetConfig = dataclasses.field(default_factory=lambda: preset("digits"))
    schedule: str = "cosine"
    timesteps: int = 1000
    prediction: Prediction = "eps"
    guidance: float = 1.5
    micro_batch: int = 80
    seed: int = 0
    training: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.schedule not in _SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(_SCHEDULES)}, got {records.shown(self.schedule)}")
        if not 2 <= self.timesteps <= 1_000_000:
            raise ValueError(f"timesteps must lie in 2..1000000, got {records.shown(self.timesteps)}")
        object.__setattr__(self, "prediction", check_prediction(self.prediction))
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance must be finite, got {self.guidance}")
        if not 1 <= self.micro_batch < 2**31:
            raise ValueError(f"micro_batch must lie in 1..2**31 - 1, got {records.shown(self.micro_batch)}")
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed must be an integer of 64 bits, got {records.shown(self.seed)}")
        if not isinstance(self.unet.image_size, int) or self.unet.image_size > 1024:
            raise ValueError(f"unet.image_size must be one number, at most 1024, got {self.unet.image_size}")

    def make_schedule(self) -> DiscreteSchedule:
        """The noise schedule the network was trained with."""
        return _SCHEDULES[self.schedule](self.timesteps)


def save(path: str | os.PathLike[str], model: UNet, recipe: Recipe) -> None:
    """Write the file, whole or not at all: a run that is cut off leaves no half checkpoint, two writers one of both."""
    safetensors = need("safetensors.torch", "safetensors")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    text = json.dumps({"format": _FORMAT, **dataclasses.asdict(recipe)}, sort_keys=True)
    storage.write(path, safetensors.save(weights, metadata={_KEY: text}))


def load(path: str | os.PathLike[str], device: torch.device | str = "cpu") -> tuple[UNet, Recipe]:
    """The network in evaluation mode, and its recipe. A file of another kind is a ValueError with one sentence.

    What the recipe asks for is compared with the weights in the file before anything of its size is made.
    """
    safetensors = need("safetensors", "safetensors")
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}: `python -m diffkern demo` writes one")
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get(_KEY)
            if text is None:
                raise ValueError(
                    f"{path} is a safetensors file, but not a checkpoint of the diffkern demo (no {_KEY!r} in it)"
                )
            try:
                recipe = _recipe(text)
                model = _empty(recipe.unet, {name: file.get_slice(name).get_shape() for name in file.keys()})  # noqa: SIM118
                weights = {name: file.get_tensor(name).to(t.dtype, copy=True) for name, t in model.state_dict().items()}
                model.load_state_dict(weights, assign=True)
            except (ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"{path} does not fit this version of the diffkern demo: {reason[:1500]}") from error
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file ({error})") from error
    model = model.to(device)
    if torch.device(device).type == "cpu":
        model = model.to(memory_format=torch.channels_last)  # as trained: the same bits
    return model.requires_grad_(False).eval(), recipe


def _recipe(text: str) -> Recipe:
    """The recipe of the metadata; ValueError for anything else."""
    values = records.parse(text, "the JSON of a recipe", "its metadata")
    found = values.pop("format", None) if isinstance(values, dict) else None
    if type(found) is not int or found != _FORMAT:
        raise ValueError(f"its metadata must be the JSON of a recipe of format {_FORMAT}, got {records.shown(text)}")
    return records.record(Recipe, with_predictions(values, "prediction"), "Recipe.")


def _empty(config: UNetConfig, shapes: dict[str, list[int]]) -> UNet:
    """The network without memory for its weights, if weights of these ``shapes`` are what it has; else a ValueError."""
    if config.stages > len(shapes):
        raise ValueError(
            f"Recipe.unet asks for {config.stages} residual blocks, and the file has {len(shapes)} tensors"
        )
    with torch.device("meta"):
        model = UNet(config)
    asked = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in [*asked, *shapes]:
        if asked.get(name) != shapes.get(name):
            raise ValueError(
                f"size mismatch: Recipe.unet asks for {name} of shape {asked.get(name, 'none')}, and the file has "
                f"{shapes.get(name, 'none')}"
            )
    return model
