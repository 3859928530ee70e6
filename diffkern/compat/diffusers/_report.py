"""What `accelerate`, `replace` and `restore` did to a pipeline, item by item."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from diffkern.compat.kit import kernels

ALREADY = "it is diffkern's already"


@dataclass(frozen=True)
class Swap:
    """One scheduler, attention processor or block of a pipeline: what became of it."""

    component: str
    """The pipeline's name for it: "scheduler", "unet", "vae" ..."""
    layer: str | None
    """The attention layer or block inside the component; None for a scheduler."""
    before: str
    """The class that was there, with its module."""
    after: str
    """The class that is there now; `before` where nothing was swapped."""
    reason: str | None = None
    """Why nothing was swapped; None where something was."""
    processor: Any = None
    """The processor that is there now; None for schedulers and blocks."""

    @property
    def swapped(self) -> bool:
        return self.reason is None


class Report(tuple[Swap, ...]):
    """What `accelerate`, `replace` or `restore` did, one `Swap` a scheduler, attention layer and block; `print` it."""

    @property
    def swapped(self) -> tuple[Swap, ...]:
        """What was swapped."""
        return tuple(swap for swap in self if swap.swapped)

    @property
    def kept(self) -> tuple[Swap, ...]:
        """What was left as it was, each with its reason."""
        return tuple(swap for swap in self if not swap.swapped)

    @property
    def fallbacks(self) -> dict[str, dict[str, int]]:
        """Layer -> {reason: calls that ran on the original processor until now, or on torch's attention where it is the
        faster one}, for the layers with such calls."""
        return {
            f"{swap.component}.{swap.layer}": dict(swap.processor.fallbacks)
            for swap in self
            if getattr(swap.processor, "fallbacks", None)  # a DiffkernAttnProcessor's
        }

    def __str__(self) -> str:
        if not self:
            return "nothing to swap: no scheduler, no attention layer and no block of diffusers"
        groups: dict[tuple[str, str, str, str | None, bool], list[str]] = {}
        for swap in self:
            key = (swap.component, short(swap.before), short(swap.after), swap.reason, swap.processor is not None)
            groups.setdefault(key, []).append(swap.layer or "")
        lines = [f"{len(self.swapped)} swapped, {len(self.kept)} kept"]
        for (component, before, after, reason, attention), layers in groups.items():
            kind = "attention layer" if attention else "block"
            count = "" if layers == [""] else f" in {len(layers)} {kind}{'s' * (len(layers) > 1)}"
            what = f"{before} -> {after}" if reason is None else f"{before} kept: {reason}"
            lines.append(f"  {component}: {what}{count}")
        calls: Counter[str] = Counter()
        for reasons in self.fallbacks.values():
            calls.update(reasons)
        if kernels.TORCH_HAS_AMX and any(hasattr(swap.processor, "fallbacks") for swap in self):
            lines.append("  bfloat16 attention runs on torch's kernels where they are faster on this processor (AMX)")
        lines += [f"  fell back to the original in {n} calls: {reason}" for reason, n in calls.items()]
        return "\n".join(lines)


def full(kind: type) -> str:
    """The name of a class with its module."""
    return f"{kind.__module__}.{kind.__qualname__}"


def short(name: str) -> str:
    """The last part of a full name, with its owner where that is diffkern."""
    package, _, rest = name.partition(".")
    return f"diffkern's {rest.rpartition('.')[2]}" if package == "diffkern" else rest.rpartition(".")[2] or name
