"""What every loop is given in the same way, checked: the state, a mask, seeds or noise tensors, a progress bar."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffkern import ops
from diffkern.checks import got, meant, need_model, need_tensor
from diffkern.draws import draw_seeds
from diffkern.plan import Plan
from diffkern.progress import progress_bar as progress_bar
from diffkern.schedules.base import Schedule

if TYPE_CHECKING:
    from diffkern.ops import Seeds
    from diffkern.plan import Row


def check_call(model: object, x: object, plan: object) -> None:
    """Raise ValueError, with the remedy, unless these are a model, a tensor and a plan in this order."""
    need_plan(plan)
    need_model(model)
    need_tensor("x", x)


def need_plan(plan: object) -> None:
    """Raise ValueError, with the way to a plan, unless it is one."""
    if isinstance(plan, Plan):
        return
    text = f"plan must be a Plan, got {plan!r}" if isinstance(plan, str) else f"plan must be a Plan, got {got(plan)}"
    if isinstance(plan, str):
        from diffkern.samplers import SAMPLERS

        name = meant(plan, SAMPLERS)
        text += f": make one with diffkern.{name}(schedule, steps)" if name else ", and no sampler of that name"
    elif isinstance(plan, Schedule):
        text += ": a sampler makes one of a schedule, as in diffkern.ddim(schedule, 50)"
    elif callable(plan):
        text += ": call the sampler, as in diffkern.ddim(schedule, 50)"
    raise ValueError(text)


def check_state(x: Tensor, mask: Tensor | None = None, known: Tensor | None = None) -> Tensor | None:
    """The mask in the shape of x, also of [B, 1, ...], which all channels share; ValueError unless x is a state, and
    mask and known are both absent or fit it."""
    if not x.is_floating_point() or x.ndim < 1:
        raise ValueError(f"x must be a floating point tensor [B, ...], got {x.dtype} of shape {list(x.shape)}")
    if (mask is None) != (known is None):
        raise ValueError(f"mask and known must be given together, got only {'known' if mask is None else 'mask'}")
    rules: dict[str, tuple[Any, str, tuple[torch.dtype, ...]]] = {
        "mask": (mask, f"bool, uint8 or {x.dtype}", (torch.bool, torch.uint8, x.dtype)),
        "known": (known, f"{x.dtype}", (x.dtype,)),
    }
    for argument, (value, rule, dtypes) in rules.items():
        if value is None:
            continue
        shapes = [x.shape, (x.shape[0], 1, *x.shape[2:])] if argument == "mask" and x.ndim > 1 else [x.shape]
        if not isinstance(value, Tensor) or value.shape not in shapes or value.dtype not in dtypes:
            got = f"{value.dtype} of shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            shape = f"{list(x.shape)}{' or of one channel' if argument == 'mask' else ''}"
            raise ValueError(f"{argument} must be {rule} of the shape of x {shape}, got {got}")
    if mask is None:
        return None
    if mask.is_floating_point() and mask.device.type == "cpu" and not torch.compiler.is_compiling():
        inside = (mask >= 0) & (mask <= 1)
        if not bool(inside.all()):
            bad = mask[~inside][0].item()
            raise ValueError(f"mask must lie in [0, 1], 1 where the state is kept and 0 where it is known, got {bad:g}")
    # Once a run, so that every step reads it as it reads the state.
    return mask if mask.shape == x.shape else torch.empty_like(x, dtype=mask.dtype).copy_(mask.expand(x.shape))


def seeds_for(
    rows: Sequence[Row], x: Tensor, seeds: Seeds | None, noise: Iterable[Tensor] | None, mask: Tensor | None
) -> Tensor | None:
    """The seeds that a run of ``rows`` draws by, int64 [B]; None where none are given and none are needed."""
    masked = mask is not None and any(row.known_n for row in rows)
    if noise is not None and seeds is not None and not masked:
        raise ValueError("give seeds or noise, not both, got both")
    needed = masked or (noise is None and any(row.draws for row in rows))
    return seeds_of(seeds, x.shape[0], x.device) if needed or seeds is not None else None


def seeds_of(seeds: Seeds | None, batch: int, device: torch.device) -> Tensor:
    """int64 [B] on ``device`` from an integer, a tensor, or (None) torch's default generator."""
    if seeds is None:
        return draw_seeds(batch).to(device)
    return ops.as_seeds(seeds, batch, device)


def next_noise(noises: Iterator[Tensor], row: int, x: Tensor) -> Tensor:
    """The next tensor of noise, checked."""
    z = next(noises, None)
    if z is None:
        raise ValueError(f"noise must hold one tensor for each row that draws, got no more at row {row}")
    if not isinstance(z, Tensor) or z.shape != x.shape or z.dtype != x.dtype:
        found = f"{z.dtype} of shape {list(z.shape)}" if isinstance(z, Tensor) else type(z).__name__
        raise ValueError(f"noise must be tensors like x, {x.dtype} of shape {list(x.shape)}, got {found} for row {row}")
    return z
