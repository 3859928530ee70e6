"""What a network is trained on: losses of every prediction, bounds and scores, their weights and their times.

| module | |
|---|---|
| `losses` | noise prediction and every other prediction, EDM, condition dropout |
| `variational` | the variational bound, learned variance, bits per dimension |
| `flow_matching` | conditional flow matching, pairs by optimal transport |
| `score_matching` | denoising, NCSN, implicit and sliced score matching |
| `adversarial` | losses of generators and discriminators, gradient penalties, the adaptive weight |
| `weightings` | weights of a loss by time |
| `time_sampling` | how training times are drawn |

docs/objectives.md has formulas and sources.
"""

from diffkern.objectives import (
    adversarial,
    flow_matching,
    losses,
    score_matching,
    time_sampling,
    variational,
    weightings,
)

__all__ = ["adversarial", "flow_matching", "losses", "score_matching", "time_sampling", "variational", "weightings"]
