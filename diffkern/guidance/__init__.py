"""Guidance: models made of models, called like the model itself, by `sample` or a loop of your own.

    guided = guidance.classifier_free(model, cond, uncond, 7.5, rescale=0.7, interval=(0.2, 0.8), plan=plan)
    images = sample(guided, x, plan)

| function | prediction | source |
|---|---|---|
| `classifier_free` | u + w (c - u); ``form="paper"``: (1 + w) c - w u | arXiv 2207.12598; lectures 000, 002 |
| its ``rescale`` | m (phi std(c)/std(m) + 1 - phi) | arXiv 2305.08891 |
| its ``sigma_interval``, ``interval`` | guided where low < sigma/alpha <= high, or in some steps | arXiv 2404.07724 |
| `compose` | u + sum_j w_j (c_j - u) | arXiv 2206.01714 |
| `nested` | m_0 + sum_j w_j (m_j - m_(j-1)), InstructPix2Pix | arXiv 2211.09800 |
| `autoguidance` | m_weak + w (m - m_weak) | arXiv 2406.02507 |
| `classifier_guided` | score + s grad log p(y given x_t), in every prediction | arXiv 2105.05233, algorithm 2 |
| `classifier_gradient`, `log_prob_gradient` | s grad log p, for the mean shift mu + s Sigma grad log p | lecture 002 |

Each is one fused op a call beside the models' own. A guided model may be guided again.
"""

from diffkern.guidance._classifier import (
    ClassifierGuided,
    Gradient,
    classifier_gradient,
    classifier_guided,
    log_prob_gradient,
    score_shift,
)
from diffkern.guidance._classifier_free import autoguidance, classifier_free, compose, interval_weights, nested
from diffkern.guidance._guided import Guided, Model, Weight

__all__ = [
    "ClassifierGuided",
    "Gradient",
    "Guided",
    "Model",
    "Weight",
    "autoguidance",
    "classifier_free",
    "classifier_gradient",
    "classifier_guided",
    "compose",
    "interval_weights",
    "log_prob_gradient",
    "nested",
    "score_shift",
]
