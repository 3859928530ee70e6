"""Dynamic thresholding of the drop-ins' plans."""

from __future__ import annotations

import math
from typing import Any

from diffkern.plan import Plan


def thresholded(plan: Plan, config: Any) -> Plan:
    """``plan`` with the config's dynamic thresholding (`Plan.with_threshold`), or as it is where there is none.

    Raises ValueError for what a plan does not say: a ``sample_max_value`` below 1, where the original divides by less
    than 1, and rows that read the model beside x0.
    """
    if not config.thresholding:
        return plan
    maximum = config.sample_max_value
    if not maximum >= 1.0:
        raise ValueError(f"a plan's threshold is at least 1, got sample_max_value={maximum}: use step")
    return plan.with_threshold(config.dynamic_thresholding_ratio, None if maximum == math.inf else float(maximum))
