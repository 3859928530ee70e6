"""Writes docs/plans.md: the plan of every sampler, printed.

    python tools/plan_pages.py [--output docs/plans.md]

tests/samplers/test_plan_pages.py holds the page against what this writes.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffkern import pc_plan, samplers, schedules
from diffkern.plan import Plan

# What each sampler is called with, as a reader would type it; four steps where nothing else is said.
CALLS: dict[str, str] = {
    "flow_sde": "flow_sde(flow(), 4, sigma_t=0.5)",
    "langevin": "langevin(linear(), 4, t=500, step_size=0.01)",
    "annealed_langevin": "annealed_langevin(ve(), 2, each=2, step_size=1e-4, denoise=True)",
    "repaint": "repaint(linear(), 4, jump_length=2, jump_n_sample=2)",
    "lms": "lms(linear(), 5)",
    "deis": "deis(linear(), 5)",
}
MORE = (
    'ddpm(linear(), 4, variance="learned", clip=1.0)',
    "ddim(linear(), 4, eta=0.5, clip=1.0).with_threshold(0.995, 2.0)",
    "heun(edm(), 3, churn=2.0)",
    "euler(flow(), 4)",
    'dpmpp_sde(linear(), 3, noise_path="brownian")',
    'pc_plan(ve(), 3, corrector="ald")',
)


def page() -> str:
    names = {name: getattr(schedules, name) for name in ("linear", "flow", "ve", "edm")}
    known: dict[str, Any] = {**names, **samplers.SAMPLERS, "pc_plan": pc_plan}
    calls = [CALLS.get(name, f"{name}(linear(), 4)") for name in samplers.SAMPLERS]
    parts = [
        "# The plan of every sampler",
        "",
        "What `print(plan)` shows, written by `python tools/plan_pages.py`. Columns and terms: `diffkern.plan`;",
        "formulas and orders: [samplers.md](samplers.md). Columns that say nothing in any row of a plan are left out.",
    ]
    for call in (*calls, *MORE):
        plan = eval(call, {"__builtins__": {}}, known)  # the calls above, as Python
        assert isinstance(plan, Plan)
        parts += ["", f"## `{call}`", "", *("    " + line for line in str(plan).splitlines())]
    return "\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent.parent / "docs/plans.md")
    parser.parse_args().output.write_text(page())


if __name__ == "__main__":
    main()
