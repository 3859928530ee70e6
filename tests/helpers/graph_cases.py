"""`python -m helpers.graph_cases GROUP`: calls compiled as one graph, or exported, before a process has run anything.

Prints, by name, the number of graphs after calls at several times, and how far the values are from eager's, as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import diffkern
from diffkern.objectives.score_matching import geometric_sigmas
from diffkern.objectives.weightings import MinSNR

Call = Callable[..., Tensor]
GROUPS: dict[str, dict[str, tuple[Call, list[tuple[Tensor, ...]]]]] = {}
B = 3
plain, learned, dense = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1), nn.Linear(2, 2)
TABLE = diffkern.linear()
WHOLE = [torch.tensor([0, 3, 999]), torch.tensor([10, 500, 20]), torch.tensor([1, 2, 3])]
REAL = [torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0.2, 0.3, 0.4]), torch.tensor([0.8, 0.7, 0.6])]


def x_of(k: int, *shape: int) -> Tensor:
    return diffkern.randn((B, *(shape or (2, 4, 4))), diffkern.seeds(k, B), 3)


def model(x: Tensor, t: Tensor, *rest: Any) -> Tensor:
    found: Tensor = plain(x)
    return found


def add(group: str, name: str, call: Call, *columns: list[Tensor]) -> None:
    """``call`` at rows of arguments: the first makes the graph, the others use it."""
    rows = [tuple(column[k] for column in columns) for k in range(len(columns[0]))] if columns else [()]
    GROUPS.setdefault(group, {})[name] = call, rows


IMAGES = [x_of(k) for k in range(3)]
SEEDS = [diffkern.seeds(k, B) for k in range(3)]

# ------------------------------------------------------------------------------------------------------------ losses
add("seeds", "seeds", lambda: diffkern.seeds(0, B))
add("seeds", "seeds of the batch", lambda x: diffkern.seeds(0, x.shape[0], first=5), IMAGES)


def trains(schedule: Any, prediction: str, **options: Any) -> Call:
    def step(x0: Tensor, t: Tensor, seeds: Tensor) -> Tensor:
        x_t = diffkern.noised(x0, t, schedule, prediction, seeds=seeds)
        return diffkern.prediction_loss(model(x_t, t), x0, t, schedule, prediction, seeds=seeds, **options)

    return step


for name, options in {
    "eps": {},
    "min_snr": {"weight": "min_snr"},
    "a weighting": {"weight": MinSNR(3.0)},
    "a function": {"weight": lambda log_snr, prediction: torch.sigmoid(log_snr), "target": "x0"},
}.items():
    add("table", name, trains(TABLE, "eps", **options), IMAGES, WHOLE, SEEDS)
add("table", "numbers", lambda x, t, s: trains(TABLE, "v", weight=torch.ones(1000))(x, t, s), IMAGES, WHOLE, SEEDS)


def weighting_made_inside(x0: Tensor, t: Tensor, seeds: Tensor) -> Tensor:
    return trains(TABLE, "eps", weight=MinSNR(3.0))(x0, t, seeds)


add("table", "a weighting made inside", weighting_made_inside, IMAGES, WHOLE, SEEDS)


def two_tables(x0: Tensor, t: Tensor, seeds: Tensor) -> Tensor:
    return trains(TABLE, "eps")(x0, t, seeds) + trains(COSINE, "mu")(x0, t, seeds) + TABLE.alpha(t).float().sum()


COSINE = diffkern.cosine()
add("table", "two tables", two_tables, IMAGES, WHOLE, SEEDS)
add(
    "table", "hybrid",
    lambda x, t, s: diffkern.hybrid_loss(learned(diffkern.noised(x, t, TABLE, seeds=s)), x, t, TABLE, seeds=s),
    IMAGES, WHOLE, SEEDS,
)  # fmt: skip
add(
    "table", "vlb",
    lambda x, t, s: diffkern.vlb_loss(model(x, t), x, t, TABLE, variance="beta", seeds=s),
    IMAGES, WHOLE, SEEDS,
)  # fmt: skip

for name, (schedule, prediction) in {
    "vp": (diffkern.vp(), "eps"),
    "sub_vp": (diffkern.sub_vp(), "score"),
    "cosine_vp": (diffkern.cosine_vp(), "v"),
    "laplace_vp": (diffkern.laplace_vp(), "x0"),
    "ve": (diffkern.ve(), "score"),
    "edm": (diffkern.edm(), "edm"),
    "flow": (diffkern.flow(), "velocity"),
    "path": (diffkern.path(lambda t: t**2, lambda t: 1.0 - t), "velocity"),
    "log_snr_path": (diffkern.log_snr_path(lambda t: 8.0 - 14.0 * t), "velocity"),
}.items():
    add("continuous", name, trains(schedule, prediction), IMAGES, REAL, SEEDS)
    add("continuous", f"{name}, likelihood", trains(schedule, prediction, weight="likelihood"), IMAGES, REAL, SEEDS)

add("models", "simple_loss", lambda x, t, s: diffkern.simple_loss(model, x, t, TABLE, seeds=s), IMAGES, WHOLE, SEEDS)
add("models", "drawn seeds", lambda x, t: diffkern.simple_loss(model, x, t, TABLE), IMAGES, WHOLE)
add("models", "edm_loss", lambda x, s: diffkern.edm_loss(model, x, seeds=s), IMAGES, SEEDS)
add("models", "edm_loss, drawn", lambda x: diffkern.edm_loss(model, x), IMAGES)
add("models", "flow_matching_loss", lambda x, s: diffkern.flow_matching_loss(model, x, seeds=s), IMAGES, SEEDS)
for times in ("logit_normal", "log_normal", "stratified", "mode", "cosmap"):
    add(
        "models", f"flow_matching_loss, {times}",
        lambda x, s, times=times: diffkern.flow_matching_loss(model, x, seeds=s, times=times), IMAGES, SEEDS,
    )  # fmt: skip
VP = diffkern.vp()
add(
    "models", "denoising score matching",
    lambda x, s: diffkern.denoising_score_matching_loss(model, x, None, VP, seeds=s), IMAGES, SEEDS,
)  # fmt: skip
LADDER = geometric_sigmas(10, 1.0, 0.01)
add("models", "ncsn", lambda x, s: diffkern.ncsn_loss(model, x, LADDER, seeds=s), IMAGES, SEEDS)
POINTS = [x_of(k, 2) for k in range(3)]


def score(x: Tensor) -> Tensor:
    return torch.tanh(dense(x))


add("models", "implicit", lambda x: diffkern.implicit_score_matching_loss(score, x), POINTS)
add("models", "sliced", lambda x, s: diffkern.sliced_score_matching_loss(score, x, seeds=s), POINTS, SEEDS)


# ----------------------------------------------------------------------------------------------------------- samplers
def samples(plan: diffkern.Plan, **options: Any) -> Call:
    return lambda x: diffkern.sample(model, x, plan, seeds=0, **options)


for name, plan in {
    "ddim": diffkern.ddim(TABLE, 3),
    "ddpm": diffkern.ddpm(TABLE, 3),
    "dpmpp_2m": diffkern.dpmpp_2m(TABLE, 3),
    "heun": diffkern.heun(diffkern.edm(), 3, prediction="x0"),
    "flow": diffkern.euler(diffkern.flow(), 3),
    "brownian": diffkern.euler_ancestral(TABLE, 3, noise_path="brownian"),
    "threshold": diffkern.dpmpp_2m(TABLE, 3).with_threshold(),
}.items():
    add("samplers", name, samples(plan), IMAGES)
PLAN = diffkern.ddim(TABLE, 3, eta=1.0)
add("samplers", "from seeds", lambda: diffkern.sample(model, diffkern.initial(PLAN, (B, 2, 4, 4), 0), PLAN, seeds=0))
add("samplers", "16 bits for the model", samples(PLAN, model_dtype=torch.float32), [x.double() for x in IMAGES])
add("samplers", "inpainting", samples(PLAN, mask=IMAGES[0] > 0, known=x_of(9)), IMAGES)
add("samplers", "guidance", samples(PLAN, cond=torch.ones(B), uncond=torch.zeros(B), guidance=3.0), IMAGES)


def densities(x: Tensor) -> Tensor:
    found = diffkern.sample(model, x, PLAN, seeds=0, trajectory=True, logprob=True)
    assert found.trajectory is not None
    assert found.logprob is not None
    return found.trajectory.sum() + found.logprob.sum()


add("samplers", "trajectory and logprob", densities, IMAGES)


# ------------------------------------------------------------------------------------------------------------- running
def distance(found: Tensor, want: Tensor) -> float:
    """The largest difference in units of the result's size; infinite where only one is finite."""
    off = (found.detach().double() - want.detach().double()).abs().max() / want.detach().double().abs().max()
    return float(off) if bool(torch.isfinite(off)) else float("inf")


def compiled(call: Call, rows: list[tuple[Tensor, ...]]) -> tuple[int, float]:
    """(graphs, largest distance from eager) of one function at every row of arguments."""
    torch._dynamo.reset()
    counters.clear()
    graph = torch.compile(call, fullgraph=True, backend="aot_eager")
    off = 0.0
    for row in rows:
        torch.manual_seed(7)
        found = graph(*row)
        torch.manual_seed(7)
        off = max(off, distance(found, call(*row)))
    return counters["stats"]["unique_graphs"], off


def exported(call: Call, rows: list[tuple[Tensor, ...]]) -> tuple[int, float]:
    """(1, distance) of the exported program."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.networks = nn.ModuleList([plain, learned, dense])

        def forward(self, *args: Tensor) -> Tensor:
            return call(*args)

    program = torch.export.export(Module(), rows[0], strict=False)
    off = 0.0
    for row in rows:
        torch.manual_seed(7)
        found = program.module()(*row)
        torch.manual_seed(7)
        off = max(off, distance(found, call(*row)))
    return 1, off


EXPORTED = {
    "table": ["eps", "min_snr", "hybrid", "vlb"],
    "continuous": ["vp", "edm", "flow", "path"],
    "models": [
        "simple_loss",
        "edm_loss",
        "flow_matching_loss",
        "ncsn",
        "denoising score matching",
        "implicit",
        "sliced",
    ],
    "samplers": ["ddim", "heun", "dpmpp_2m", "guidance"],
}


def main(group: str) -> None:
    kind, _, name = group.rpartition(" ")
    cases = GROUPS[name] if not kind else {case: GROUPS[name][case] for case in EXPORTED[name]}
    results = {}
    for case, (call, rows) in cases.items():
        try:
            results[case] = exported(call, rows) if kind else compiled(call, rows)
        except Exception as error:  # the test names the case
            results[case] = (0, f"{type(error).__name__}: {str(error)[:600]}")
    print(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1])
