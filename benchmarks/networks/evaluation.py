"""An evaluation, and a training step, of every contender: checked against diffusers in float32, then timed in turns.

The ratio of a contender is the time of the fastest peer (diffusers, diffusers in channels_last; for ADM also
guided-diffusion's network) over its own, round by round.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.alone import reason
from benchmarks.costs import peak_of
from benchmarks.networks.contenders import BASELINES, FROZEN, NAMES, PEERS, Contender, contenders, errors
from benchmarks.networks.peers import NETWORKS, Inputs, Network, parameters
from benchmarks.timing import Measured, Stats, interleave, ratio, wall_timer

__all__ = ["FLOAT32_ERROR", "Found", "Row", "Run", "evaluate", "refusal", "saved_bytes", "timed", "train"]

FLOAT32_ERROR, GRADIENT_ERROR = 1e-5, 1e-4
"""Largest difference from diffusers' output, and from its gradient, over the largest value of that."""
SIXTEEN_BITS_ERROR = 1.1
"""Root mean square error of ours against the float32 output, over that of diffusers in the same dtype: equal but for
the chance of where roundings fall."""
Run = Callable[..., Measured]


@dataclass(frozen=True)
class Row:
    """A contender: its error (largest; root mean square), time, ratio; or why there is none."""

    name: str
    error: tuple[float, float] | None = None
    time: Stats | None = None
    ratio: Stats | None = None
    peak: int | None = None
    """Bytes that a training step needs at once beside the parameters, its gradients with them."""
    saved: int | None = None
    """Bytes that the forward of a training step keeps for the backward."""
    why: str = ""


@dataclass(frozen=True)
class Found:
    """A network, batch and dtype: the rows, and the share of the cores that others used meanwhile."""

    network: str
    title: str
    batch: int
    dtype: str
    parameters: int
    rows: tuple[Row, ...]
    others: float | None = None
    better: str = ""
    """The fastest one of the peers."""
    why: str = ""
    """Why there are no rows: it failed as a whole."""


def refusal(
    dtype: torch.dtype, error: tuple[float, float], peer: tuple[float, float], most: float = FLOAT32_ERROR
) -> str:
    """Why a result with that error is wrong, where ``peer`` is diffusers' own error in this dtype; "" if it is not.

    ``most`` is that of float32.
    """
    if not all(math.isfinite(e) for e in error):
        return "wrong: the output is not finite"
    if dtype == torch.float32:
        return f"wrong: off by {error[0]:.1e}, {most:.0e} allowed" if error[0] > most else ""
    wrong = error[1] > SIXTEEN_BITS_ERROR * peer[1]
    return f"wrong: off by {error[1]:.2e}, diffusers by {peer[1]:.2e}" if wrong else ""


def evaluate(
    name: str | Network,
    batch: int,
    dtype: torch.dtype = torch.float32,
    *,
    wanted: Sequence[str] = NAMES,
    seconds: float = 10.0,
    timing: Run = interleave,
) -> Found:
    """An evaluation without gradients."""
    network = NETWORKS[name] if isinstance(name, str) else name
    peer, given = network.build(), network.inputs(batch)
    with torch.no_grad():
        want = contenders(network, peer, BASELINES[:1])[0].run(given)
        made = contenders(network, peer.to(dtype), wanted)
        rows, calls = [], {}
        base = (0.0, 0.0)
        for one in made:
            row, call = _checked(one, given.to(dtype, one.layout), want, dtype, base)
            if one.name == BASELINES[0] and row.error is not None:
                base = row.error
            rows.append(row)
            if call is not None:
                calls[one.name] = call
        found = Found(network.name, network.title, batch, _word(dtype), parameters(peer), tuple(rows))
        return timed(found, calls, seconds, timing)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _checked(
    one: Contender, given: Inputs, want: Tensor, dtype: torch.dtype, peer: tuple[float, float]
) -> tuple[Row, Callable[[], object] | None]:
    if one.model is None:
        return Row(one.name, why=one.why), None
    try:
        error = errors(one.run(given), want)
    except Exception as failed:  # its row says why, the others run
        return Row(one.name, why=reason(failed)), None
    why = "" if one.name in BASELINES else refusal(dtype, error, peer)
    return Row(one.name, error, why=why), None if why else lambda: one.run(given)


def timed(found: Found, calls: Mapping[str, Callable[[], object]], seconds: float, timing: Run) -> Found:
    if not calls:
        return found
    measured = timing(calls, wall_timer(), sample_seconds=0.0, budget_seconds=seconds, rounds=200, least_rounds=3)
    known = [name for name in PEERS if name in calls]
    better = min(known, key=lambda name: measured.stats(name).median, default="")

    def with_time(row: Row) -> Row:
        if row.name not in calls:
            return row
        faster = ratio(measured, better, row.name) if better and row.name != better else None
        return replace(row, time=measured.stats(row.name), ratio=faster)

    return replace(found, rows=tuple(map(with_time, found.rows)), others=measured.others, better=better)


# ---------------------------------------------------------------------------------------------------- a training step
def _step(one: Contender, given: Inputs, target: Tensor) -> float:
    """Forward, mean square, backward; no optimiser. It begins and ends without gradients."""
    assert one.model is not None
    loss = F.mse_loss(one.run(given), target)
    loss.backward()
    one.model.zero_grad(set_to_none=True)
    return float(loss.detach())


def _gradient(one: Contender, given: Inputs, target: Tensor) -> Tensor:
    """That of the loss by x: through every layer's backward."""
    x = given.x.detach().requires_grad_()
    return torch.autograd.grad(F.mse_loss(one.run(replace(given, x=x)), target), x)[0]


def saved_bytes(call: Callable[[], object], model: nn.Module) -> int:
    """Bytes of the storages that autograd keeps from a forward for its backward, parameters not counted."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        kept = call()  # held until all is counted: an address is not used twice
    del kept
    return sum(found.values())


def train(
    name: str | Network,
    batch: int,
    dtype: torch.dtype = torch.float32,
    *,
    wanted: Sequence[str] = NAMES,
    seconds: float = 15.0,
    timing: Run = interleave,
) -> Found:
    """A training step in the dtype; the gradient by x is compared with diffusers' in float32.

    In evaluation mode: what is drawn (dropout of classes) would differ from contender to contender.
    """
    network = NETWORKS[name] if isinstance(name, str) else name
    peer, given = network.build(), network.inputs(batch)
    with torch.no_grad():
        shape = contenders(network, peer, BASELINES[:1])[0].run(given).shape
    target = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    rows, calls, base = [], {}, (0.0, 0.0)
    want = _gradient(contenders(network, peer, BASELINES[:1])[0], given, target)
    peer = peer.to(dtype)
    for one in contenders(network, peer, [name for name in wanted if name not in FROZEN]):
        if one.model is None:
            rows.append(Row(one.name, why=one.why))
            continue
        x, goal = given.to(dtype, one.layout), target.to(dtype)

        call = functools.partial(_step, one, x, goal)
        try:
            error = errors(_gradient(one, x, goal), want)
            if one.name == BASELINES[0]:
                base = error
            why = "" if one.name in BASELINES else refusal(dtype, error, base, GRADIENT_ERROR)
            row = Row(one.name, error, why=why)
            if not why:
                saved = saved_bytes(functools.partial(one.run, x), one.model)
                row = replace(row, peak=peak_of(call), saved=saved)
                calls[one.name] = call
        except Exception as failed:  # its row says why, the others run
            row = Row(one.name, why=reason(failed))
        rows.append(row)
    found = Found(network.name, network.title, batch, _word(dtype), parameters(peer), tuple(rows))
    return timed(found, calls, seconds, timing)
