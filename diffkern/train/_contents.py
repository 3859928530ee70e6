"""What a checkpoint holds in tensors: gathered from a run, and put back into one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from diffkern import parallel
from diffkern.train import _optimizer, sharded
from diffkern.train._optimizer import placed
from diffkern.train._tensors import Tensors, opened
from diffkern.train.ema import Averages

if TYPE_CHECKING:
    from diffkern.train.stepper import Trained

__all__ = ["RAW", "SHARDS", "Group", "fill", "groups", "names_of", "random_state"]

RAW, SHARDS = "raw", "shards"
OPTIMIZER, RANDOM, REST = "optimizer.safetensors", "random.safetensors", "rest.safetensors"

Group = tuple[str, dict[str, Tensor]]


def names_of(diffusion: Trained) -> dict[int, str]:
    """The names of the network's parameters, by their ids."""
    return {id(p): name for name, p in parallel.bare(diffusion.model).named_parameters()}


def groups(
    diffusion: Trained,
    averages: Averages | None,
    optimizer: Optimizer | None,
    random: dict[str, Tensor],
    in_shards: bool,
) -> Iterator[Group]:
    """What goes into one file each, by its name or an average's; every process has to come to each.

    Tensors are gathered for the first process, on the CPU, a group at a time. ``in_shards``: the first group are those
    of weights and optimizer that each process has a part of, as they are.
    """
    names = names_of(diffusion)
    own = {name: p.detach() for name, p in parallel.bare(diffusion.model).named_parameters()}
    moments = {} if optimizer is None else _optimizer.moments(optimizer, names)
    if in_shards:
        state = {**_weights(diffusion), **{f"optimizer.{name}": tensor for name, tensor in moments.items()}}
        yield SHARDS, {name: tensor for name, tensor in state.items() if sharded.is_shared(tensor)}
        yield REST, _whole({name: tensor for name, tensor in state.items() if not sharded.is_shared(tensor)})
    if not in_shards or averages is None or not averages.names:
        yield RAW, _whole(own)
    for average in () if averages is None else averages.names:
        assert averages is not None
        yield average, _whole({**own, **{names[id(p)]: tensor for p, tensor in averages.pairs(average)}})
    if optimizer is not None and not in_shards:
        yield OPTIMIZER, _whole(moments)
    yield RANDOM, random


def _weights(diffusion: Trained) -> dict[str, Tensor]:
    """The tensors of model.safetensors, by their names there; a tied one once."""
    network = parallel.bare(diffusion.model)
    parameters = dict(network.named_parameters())
    twice = {name for name, _ in network.named_parameters(remove_duplicate=False)} - parameters.keys()
    state = network.state_dict(keep_vars=True)
    found = {f"model.{name}": t.detach() for name, t in state.items() if isinstance(t, Tensor) and name not in twice}
    null: Tensor | None = getattr(diffusion, "null", None)
    return found if null is None else {**found, "null": null}


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gathered from the processes that share them, one at a time; kept by the first process."""
    found = {}
    for name, tensor in tensors.items():
        shared: Any = tensor if sharded.is_shared(tensor) else None
        full = tensor if shared is None else shared.full_tensor()
        if parallel.is_main():
            full = full.cpu().contiguous()
            padded = shared is not None and full.untyped_storage().nbytes() > full.nbytes
            found[name] = full.clone() if padded else full
    return found


def random_state() -> dict[str, Tensor]:
    """The state of torch's generators, of every process, by its rank."""
    own = {"cpu": _text(torch.get_rng_state())}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        own["cuda"] = _text(torch.cuda.get_rng_state())
    every = parallel.gathered(own)
    return {
        f"{kind}.{rank}": torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8)
        for rank, states in enumerate(every)
        for kind, state in states.items()
    }


def _text(state: Tensor) -> str:
    return bytes(state.tolist()).hex()


def fill(
    path: Path,
    diffusion: Trained,
    averages: Averages | None,
    optimizer: Optimizer | None,
    described: Mapping[str, Any],
    again: bool,
) -> None:
    """Puts a checkpoint's tensors where they belong, after all of them were compared.

    ``described``: what the optimizer's state has beside tensors. ``again``: torch's generators, too.
    """
    names, in_shards = names_of(diffusion), (path / SHARDS).is_dir()
    fills = {} if in_shards else {RAW: _weights(diffusion)}
    for average in () if averages is None else averages.names:
        assert averages is not None
        fills[average] = {f"model.{names[id(p)]}": tensor for p, tensor in averages.pairs(average)}
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(opened(path / f"average-{name}.safetensors")) for name in fills}
        random = stack.enter_context(opened(path / RANDOM))
        moments: Mapping[str, Tensor] = {}
        for name, targets in fills.items():
            stored = {key: files[name].shape(key) for key in (*targets, *(files[name] if name == RAW else ()))}
            _check(stored, targets, path / f"average-{name}.safetensors")
        if in_shards:
            rest = stack.enter_context(opened(path / REST))
            moments = _from_shards(path / SHARDS, rest, _weights(diffusion), optimizer, names)
        elif optimizer is not None:
            moments = stack.enter_context(opened(path / OPTIMIZER))
        for name, targets in fills.items():
            for key, target in targets.items():
                placed(files[name][key], target)
        if optimizer is not None:
            _optimizer.restore(optimizer, described, moments, names)
        if again:
            _restore_random(random)


def _from_shards(
    folder: Path, rest: Tensors, weights: Mapping[str, Tensor], optimizer: Optimizer | None, names: Mapping[int, str]
) -> dict[str, Tensor]:
    """Fills the weights; the tensors of the optimizer, of which each process reads its parts alone."""
    shapes = sharded.shapes(folder)
    stored = {**shapes, **{name: rest.shape(name) for name in rest}}
    _check({name: shape for name, shape in stored.items() if not name.startswith("optimizer.")}, weights, folder)
    targets = {name: tensor for name, tensor in weights.items() if name in shapes}
    moments: dict[str, Tensor] = {}
    if optimizer is not None:
        parameters = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"]}
        entries = [name.removeprefix("optimizer.") for name in stored if name.startswith("optimizer.")]
        for entry in entries:
            moments[entry] = (
                torch.empty_like(parameters[entry.rpartition(".")[0]], requires_grad=False)
                if f"optimizer.{entry}" in shapes
                else rest[f"optimizer.{entry}"]
            )
        targets.update({name: moments[name[10:]] for name in shapes if name.startswith("optimizer.")})
    sharded.read(folder, targets)
    for name, target in weights.items():
        if name not in shapes:
            placed(rest[name], target)
    return moments


def _check(stored: Mapping[str, list[int] | None], targets: Mapping[str, Tensor], path: Path) -> None:
    """What is stored is what the targets are: names and shapes."""
    for name in sorted({*targets, *stored}):
        got = stored.get(name)
        want = list(targets[name].shape) if name in targets else None
        if got != want:
            raise ValueError(
                f"the tensors in {path} must be those of the network, got {got or 'nothing'} for {name}, which has "
                f"{want or 'no place'}"
            )


def _restore_random(file: Mapping[str, Tensor]) -> None:
    rank = parallel.rank()
    if f"cpu.{rank}" in file:
        torch.set_rng_state(file[f"cpu.{rank}"])
    if f"cuda.{rank}" in file and torch.cuda.is_available():
        torch.cuda.set_rng_state(file[f"cuda.{rank}"])
