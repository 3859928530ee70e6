"""The state of any torch optimizer by the names of its parameters: tensors, and plain data for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["described", "identity", "moments", "placed", "restore"]


def moments(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The tensors of its state: {"NAME.exp_avg": ...}; ``names`` by the id of a parameter."""
    return {
        f"{names[id(parameter)]}.{key}": value.detach()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def described(optimizer: Optimizer, names: Mapping[int, str]) -> dict[str, Any]:
    """Class, groups with their options, and what its state has beside tensors."""
    groups = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if id(parameter) not in names:
                shape = list(parameter.shape)
                raise ValueError(f"optimizer must hold parameters of the network alone, got another, of shape {shape}")
        options = {key: v.item() if isinstance(v, Tensor) else v for key, v in group.items() if key != "params"}
        groups.append(
            {
                "parameters": [names[id(parameter)] for parameter in group["params"]],
                "options": {key: value for key, value in options.items() if _plain(value)},
            }
        )
    numbers: dict[str, dict[str, Any]] = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if not isinstance(value, Tensor):
                if not _plain(value):
                    kind = type(optimizer).__name__
                    raise ValueError(f"optimizer must keep tensors and numbers, got {type(value).__name__} in a {kind}")
                numbers.setdefault(names[id(parameter)], {})[key] = value
    return {"kind": type(optimizer).__name__, "groups": groups, "numbers": numbers}


def identity(data: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Of what is `described`, what must be the same for its state to be another's: the class and the parameters."""
    if data is None:
        return {"optimizer": None}
    return {"optimizer": {"kind": data["kind"], "parameters": [group["parameters"] for group in data["groups"]]}}


def restore(
    optimizer: Optimizer, data: Mapping[str, Any], tensors: Mapping[str, Tensor], names: Mapping[int, str]
) -> None:
    """State and options of what was `described`, with the ``tensors`` of `moments`."""
    packed = optimizer.state_dict()
    state: dict[str, dict[str, Any]] = {name: dict(values) for name, values in data["numbers"].items()}
    parameters = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
    for entry, value in tensors.items():
        name, _, key = entry.rpartition(".")
        parameter = parameters[name]
        if value.shape == parameter.shape and value.ndim > 0 and not hasattr(value, "device_mesh"):
            value = placed(value, torch.empty_like(parameter, dtype=value.dtype, requires_grad=False))
        state.setdefault(name, {})[key] = value
    numbers: dict[int, dict[str, Any]] = {}
    for group, own, stored in zip(packed["param_groups"], optimizer.param_groups, data["groups"], strict=True):
        for key, value in stored["options"].items():
            now = own.get(key)
            group[key] = torch.full_like(now, value) if isinstance(now, Tensor) else _tuples(value)
        for number, parameter in zip(group["params"], own["params"], strict=True):
            if names[id(parameter)] in state:
                numbers[number] = state[names[id(parameter)]]
    optimizer.load_state_dict({"state": numbers, "param_groups": packed["param_groups"]})


def placed(value: Tensor, target: Tensor) -> Tensor:
    """The target, filled with a whole tensor's values: of a target that is shared (FSDP2) each process its part."""
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor  # only where there is one

        assert isinstance(target, DTensor)
        mesh, places = target.device_mesh, target.placements
        value = distribute_tensor(value.to(target.device), mesh, places, src_data_rank=None)
    return target.copy_(value)


def _plain(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(part) for part in value)
    return value is None or isinstance(value, bool | int | float | str)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
