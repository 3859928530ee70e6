"""`python -m helpers.mode_cases MODE`: everything that is kept, first asked for in a mode; then used outside of it.

Prints a digest of the bits of every result and gradient in the normal mode, by name, as JSON.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode

import diffkern
from diffkern import brownian, guidance
from diffkern.compat import edm as edm_drop_in
from diffkern.compat import flow_matching, k_diffusion, score_sde, torchcfm
from diffkern.objectives import score_matching
from diffkern.objectives.time_sampling import TIME_SAMPLERS, get_time_sampler
from diffkern.objectives.weightings import WEIGHTINGS
from diffkern.samplers import SAMPLERS
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.schedules.makers import SCHEDULES


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "none": contextlib.nullcontext,
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "meta": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "fake": lambda: FakeTensorMode(allow_non_fake_inputs=True),
}

SHAPE = (3, 2, 4, 4)
# Sampler -> a schedule that it takes; the others take `linear`.
OF: dict[str, str] = {"flow_sde": "flow", "euler": "edm", "heun": "flow", "rk4": "vp", "midpoint": "ve"}
OPTIONS: dict[str, dict[str, Any]] = {
    "annealed_langevin": {"levels": 2, "each": 2},
    "langevin": {"steps": 3, "t": 200, "step_size": 1e-3},
}


def predictions_of(schedule: Any) -> list[str]:
    found = ["eps", "x0", "v", "score", "velocity"]
    if isinstance(schedule, DiscreteSchedule):
        found.append("mu")
    if schedule.name == "edm":
        found.append("edm")
    return found


def work(record: Callable[[str, Callable[[], Any]], None], gradients: bool) -> None:
    """Calls everything; ``record(name, call)`` of each, whose results are tensors."""
    seeds = diffkern.seeds(0, 3)
    x0 = diffkern.randn(SHAPE, seeds, 7)

    def leaf(channels: int = 2) -> Tensor:
        pred = diffkern.randn((3, channels, 4, 4), seeds, 9)
        return pred.requires_grad_() if gradients else pred

    def with_gradient(loss: Callable[[Tensor], Tensor], channels: int = 2) -> list[Tensor]:
        pred = leaf(channels)
        value = loss(pred)
        if gradients:
            value.backward()
        return [value, *([pred.grad] if pred.grad is not None else [])]

    made = {name: make() for name, make in SCHEDULES.items()}
    made["path"] = diffkern.path(lambda t: t, lambda t: 1.0 - t)
    made["log_snr_path"] = diffkern.log_snr_path(lambda t: 8.0 - 14.0 * t)
    made["subsequence"] = diffkern.linear().subsequence(range(0, 1000, 10))
    made["discretised"] = diffkern.schedules.discretise(diffkern.vp(), 100)
    made["zero_snr"] = diffkern.zero_terminal_snr(diffkern.scaled_linear())
    for name, schedule in made.items():
        whole = isinstance(schedule, DiscreteSchedule)
        t = torch.tensor([3, 50, 90], device="cpu") if whole else torch.tensor([0.25, 0.5, 0.75], device="cpu").double()
        record(f"{name} rates", lambda s=schedule, t=t: [s.alpha(t), s.sigma(t), s.log_snr(t), s.drift(t)])
        record(f"{name} of a number", lambda s=schedule: [s.sigma(s.noise_end), s.snr(s.noise_end)])
        for prediction in predictions_of(schedule):
            record(
                f"{name} {prediction} noised",
                lambda s=schedule, t=t, p=prediction: [diffkern.noised(x0, t, s, p, seeds=seeds)],
            )
            for weight in (None, *WEIGHTINGS) if prediction in ("eps", "velocity") else (None, "min_snr"):
                record(
                    f"{name} {prediction} {weight}",
                    lambda s=schedule, t=t, p=prediction, w=weight: with_gradient(
                        lambda pred: diffkern.prediction_loss(pred, x0, t, s, p, weight=w, seeds=seeds)
                    ),
                )
        samplers = [n for n in TIME_SAMPLERS if n != "loss_second_moment" or name == "linear"]
        for sampler in samplers if name in ("linear", "vp", "flow") else ():
            record(
                f"{name} times {sampler}",
                lambda s=schedule, n=sampler: [get_time_sampler(n).sample(3, s, seeds=seeds)],
            )
    table = made["scaled_linear"]
    t = torch.tensor([0, 500, 999], device="cpu")
    record("hybrid", lambda: with_gradient(lambda p: diffkern.hybrid_loss(p, x0, t, table, seeds=seeds), 4))
    record("vlb", lambda: with_gradient(lambda p: diffkern.vlb_loss(p, x0, t, table, variance="beta", seeds=seeds)))
    record(
        "sigmas",
        lambda: [score_matching.geometric_sigmas(5, 1.0, 0.01), diffkern.schedules.karras_sigmas(5, 0.1, 10.0)],
    )
    record("brownian", lambda: [brownian.noise(SHAPE, seeds, 0.25, 0.75)])

    def model(x: Tensor, t: Tensor, *rest: Any) -> Tensor:
        return 0.5 * x

    for name, sampler in SAMPLERS.items():
        schedule = made[OF.get(name, "linear")]
        options = OPTIONS.get(name, {"steps": 3})
        record(f"{name} table", lambda f=sampler, s=schedule, o=options: [f(s, **o).table])
        record(
            f"{name} sample",
            lambda f=sampler, s=schedule, o=options: [
                diffkern.sample(model, diffkern.initial(plan := f(s, **o), SHAPE, 0), plan, seeds=0)
            ],
        )
    plan = diffkern.ddim(made["linear"], 4)
    ones = torch.ones(3, device="cpu")
    record(
        "guided sample",
        lambda: [diffkern.sample(lambda x, t, c: x * 0.5, x0, plan, cond=ones, uncond=0 * ones, guidance=3.0)],
    )
    record(
        "predictor_corrector",
        lambda: [diffkern.predictor_corrector(model, x0, made["vp"], 3, prediction="eps", seeds=0)],
    )
    guided = guidance.classifier_free(lambda x, t, c: x * c[:, None, None, None], ones, 0 * ones, 2.0)
    record("classifier_free", lambda: [guided(x0, t)])
    inside = guidance.classifier_free(
        lambda x, t, c: x * c[:, None, None, None], ones, 0 * ones, 2.0, interval=(0.2, 0.8), plan=plan
    )
    record("interval", lambda: [inside(x0, 300.0), inside(x0, 900)])

    at = torch.tensor([0.2, 0.5, 0.7], device="cpu", dtype=torch.float32)
    # Drop-ins, whose own tables are made here.
    levels = torch.tensor([10.0, 3.0, 0.7, 0.1, 0.0], dtype=torch.float32, device="cpu")
    for name in ("euler", "heun", "dpmpp_2m", "lms", "dpm_2"):
        drop_in = getattr(k_diffusion, f"sample_{name}")
        record(f"k_diffusion {name}", lambda f=drop_in: [f(lambda x, _: 0.5 * x, x0, levels, disable=True)])
    record(
        "edm sampler", lambda: [edm_drop_in.edm_sampler(Net(), x0, randn_like=torch.zeros_like, num_steps=3, S_churn=1)]
    )
    sde = score_sde.sde_lib.VPSDE()
    predict = score_sde.sampling.ReverseDiffusionPredictor(sde, lambda x, t: -x)
    record("score_sde", lambda: [predict.update_fn(x0, at)[1]])
    matcher = torchcfm.ConditionalFlowMatcher(0.1)
    record("torchcfm", lambda: [matcher.sample_location_and_conditional_flow(x0, 0.5 * x0, at)[2]])
    ends = torch.tensor([0.0, 1.0], device="cpu", dtype=torch.float32)
    solver = flow_matching.solver.ODESolver(lambda x, t: 0.5 * x)
    record("flow_matching", lambda: [solver.sample(x0, step_size=0.25, time_grid=ends, method="midpoint")])
    condot = flow_matching.path.CondOTProbPath()
    record("flow_matching path", lambda: [condot.sample(x0, 0.5 * x0, at).x_t])


class Net:
    """As EDM's networks."""

    sigma_min, sigma_max = 0.0, float("inf")

    def round_sigma(self, sigma: Any) -> Any:
        return sigma

    def __call__(self, x: Tensor, sigma: Tensor, labels: Any = None) -> Tensor:
        return 0.5 * x


def digest(found: Any) -> str:
    parts = [part.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for part in found]
    kinds = [f"{part.dtype} {list(part.shape)} {part.device}" for part in found]
    return hashlib.sha256(b"".join(parts) + repr(kinds).encode()).hexdigest()[:16]


def main(mode: str) -> None:
    refused: dict[str, str] = {}
    found: dict[str, str] = {}

    def try_it(name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # told to the test, which knows what may be refused
            refused[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"

    def use(name: str, call: Callable[[], Any]) -> None:
        made = call()
        fake = any(isinstance(part, FakeTensor) for part in made)
        found[name] = "fake" if fake else digest(made)

    if mode != "none":
        with MODES[mode]():
            work(try_it, gradients=False)
    torch.manual_seed(0)
    work(use, gradients=True)
    print(json.dumps({"refused": refused, "found": found}))


if __name__ == "__main__":
    main(sys.argv[1])
