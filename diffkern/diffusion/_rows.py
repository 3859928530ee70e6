"""The network of a `Diffusion` as `diffkern.sample` calls it, which asks what it knows of all rows beforehand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffkern.checks import unwrapped
from diffkern.plan.prepared import Prepared

if TYPE_CHECKING:
    from diffkern.diffusion import Diffusion


class Network:
    """``network(x, time, cond)`` of the model, with what it says of the variance where ``whole``.

    ``condition``: what makes the network's condition of that of a run; the same object each time for the same one.
    """

    def __init__(self, diffusion: Diffusion, whole: bool) -> None:
        self.diffusion, self.whole = diffusion, whole
        self.condition: Callable[[Any], Any] | None = None

    def __call__(self, x: Tensor, time: Tensor, cond: Any = None) -> Tensor:
        return self._part(self.diffusion.network(x, time, self._given(cond)), x)

    def _given(self, cond: Any) -> Any:
        return cond if self.condition is None else self.condition(cond)

    def _part(self, m: Tensor, x: Tensor) -> Tensor:
        return m[:, : x.shape[1]] if self.diffusion.learned_variance and not self.whole else m

    def sampling_rows(
        self, times: Tensor, cond: Any, batch: int
    ) -> Callable[[int, Tensor, Tensor, Any], Tensor] | None:
        """None where `Diffusion.network` has been replaced; called as ever where it or the times are, meanwhile."""
        diffusion = self.diffusion
        if not diffusion.is_itself():
            return None
        prepared, scale = Prepared(diffusion.model_time(times), True), diffusion.time_scale

        def predicted(i: int, x: Tensor, t: Tensor, cond: Any) -> Tensor:
            if diffusion.time_scale != scale or not diffusion.is_itself():
                return self(x, t, cond)
            given = self._given(cond)
            return self._part(unwrapped(prepared.call(diffusion.model, i, x, diffusion.model_time(t), given)), x)

        return predicted
