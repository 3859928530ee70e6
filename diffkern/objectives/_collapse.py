"""When an adversarial training has stopped to be one, said in a sentence."""

from __future__ import annotations

import math
from typing import get_args

from diffkern.checks import unknown
from diffkern.integers import integer
from diffkern.names import AdversarialName


class CollapseWatch:
    """Told each step's discriminator loss and logits, says once in one sentence what has gone wrong; else None.

    - The loss is not a finite number: at once.
    - The loss has been at most `least` for `steps` steps one after the other: the discriminator tells real from
      generated without an error, and what the generator gets as a gradient is none (`minimax`) or says nothing. Not of
      kind "wasserstein", whose loss is below 0 where all is well.
    - The logits have had a spread of at most `least` for as many steps (where it is told): the discriminator says the
      same of every sample, and the generator gets no gradient either.

    A pure object without torch: `state` and `load_state` for a checkpoint, so that a resumed run says what the
    uninterrupted one says.

        watch = CollapseWatch(200)
        if sentence := watch.see(loss, spread):
            warn(sentence)
    """

    def __init__(self, steps: int = 200, least: float = 1e-3, *, kind: AdversarialName = "non_saturating") -> None:
        self.steps = integer("steps", steps)
        if not 0.0 < least < math.inf:
            raise ValueError(f"least must be positive and finite, got {least}")
        if kind not in get_args(AdversarialName):
            raise ValueError(unknown("kind", kind, get_args(AdversarialName)))
        self.least, self._may_be_sure = float(least), kind == "wasserstein"
        self._sure = self._flat = 0
        self._broken = False

    def see(self, loss: float, spread: float | None = None) -> str | None:
        """One step: the discriminator's `loss`, without penalties, and the standard deviation of its logits over real
        and generated samples together, None where it is not measured."""
        if not math.isfinite(loss) or (spread is not None and not math.isfinite(spread)):
            said, self._broken = self._broken, True
            what = (
                f"loss must be finite, got {loss}"
                if not math.isfinite(loss)
                else f"logits must be finite, got a spread of {spread}"
            )
            return None if said else f"the discriminator's {what}: training has diverged, lower the learning rate"
        self._broken = False
        self._sure = self._sure + 1 if loss <= self.least and not self._may_be_sure else 0
        self._flat = self._flat + 1 if spread is not None and spread <= self.least else 0
        if self._sure == self.steps:
            return (
                f"the discriminator's loss has been 0 (at most {self.least:g}) for {self.steps} steps, got {loss:.3g}: "
                "it tells every sample apart and the generator learns nothing from it; penalise its gradient, train it "
                "slower or make it smaller"
            )
        if self._flat == self.steps:
            return (
                f"the discriminator's logits have had no spread (at most {self.least:g}) for {self.steps} steps, got "
                f"{spread:.3g}: it says the same of every sample and the generator gets no gradient; train it faster "
                "or lower the penalty"
            )
        return None

    def state(self) -> dict[str, int | bool]:
        """What a resumed run has to know, as plain data."""
        return {"sure": self._sure, "flat": self._flat, "broken": self._broken}

    def load_state(self, state: dict[str, int | bool]) -> None:
        """What `state` returned; ValueError for anything else."""
        if set(state) != {"sure", "flat", "broken"}:
            raise ValueError(
                f"state must have the entries sure, flat, broken, got {', '.join(sorted(state)) or 'none'}"
            )
        self._sure, self._flat = (integer(name, state[name], 0) for name in ("sure", "flat"))
        self._broken = bool(state["broken"])
