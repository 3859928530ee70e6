"""docs/gradients.md against the code: each gradient it promises is that of finite differences, each refusal is said."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.op_cases import EVERYTHING, table, values
from helpers.suites import few
from torch import Tensor

import diffkern
from diffkern import ops
from diffkern.plan import LEARNED_COLUMNS

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "gradients.md"
WHOLE = {"index", "seeds", "streams", "mask", "directions"}
"""Without a gradient by nature (a mask: where it is not of numbers)."""
INTEGERS = {"hybrid_loss": {"t"}, "vlb_loss": {"t"}, "initial": {"start"}}
UNRECORDED = {"sample", "predictor_corrector", "rk45", "log_likelihood", "bits_per_dim"}
NO_LOOK = {"ops.bound_step", "ops.bound_step_out"}


def rows() -> dict[str, tuple[list[str], list[str]]]:
    """Function -> (arguments with gradients, arguments refused)."""
    found = re.findall(r"^\| `([\w.]+)` \|([^|]*)\|([^|]*)\|$", PAGE.read_text(), re.MULTILINE)
    split = lambda text: [name.strip() for name in text.split(",") if name.strip()]  # noqa: E731
    return {name: (split(first), split(second)) for name, first, second in found}


ROWS = rows()


def function(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = reduce(getattr, name.split("."), diffkern)
    return found


# ----------------------------------------------------------------------------------------------------------- the calls
SHAPE = (3, 2, 4)
SEEDS = ops.seeds(0, 3)


def numbers(seed: int, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return values(shape, seed, torch.float64)


T = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
STEPS = torch.tensor([3, 400, 900])
LINEAR = diffkern.linear()
POINT = torch.tensor(0.7, dtype=torch.float64)


def learned_path(speed: Tensor) -> Any:
    """A path with a parameter in both rates."""
    return diffkern.path(lambda t: torch.sin(0.5 + speed * t), lambda t: 1.1 - 0.9 * t * speed.sigmoid())


def model(x: Tensor, t: Tensor) -> Tensor:
    return torch.tanh(0.7 * x + 0.1 * t.reshape(-1, *(1,) * (x.ndim - 1)))


def row(**more: float) -> Tensor:
    plain = {name: value for name, value in EVERYTHING.items() if name not in ("r", "clip")}
    return table({**plain, **more})


LEARNED = torch.zeros(1, len(LEARNED_COLUMNS), dtype=torch.float64)
LEARNED[0, [LEARNED_COLUMNS.index(name) for name in ("a", "clip", "k", "g", "known_s")]] = 1.0
STEP = {
    **{name: numbers(k) for k, name in enumerate(("x", "m", "m2", "h0", "h1", "h2", "h3", "known"))},
    **{"table": row(known_n=0.0), "noise": numbers(9), "mask": numbers(10).abs().clamp(max=1)},
}
LOSS = torch.tensor([[0.43, -0.9, 1.3]], dtype=torch.float64)
OUT = {"out": numbers(20)}
MODEL_LOSS = {"model": model, "x0": numbers(1), "t": T, "schedule": POINT, "weight": T + 0.5, "noise": numbers(2)}
IMAGES = {"data": numbers(1), "x": numbers(2), "t": T, "schedule": POINT, "weights": T}
BOUND = {"x0": numbers(1).clamp(-1, 1), "t": STEPS, "schedule": LINEAR, "noise": numbers(2)}

CASES: dict[str, dict[str, Any]] = {
    "ops.noising": {"x0": numbers(1), "table": numbers(2, (3, 4)), "noise": numbers(3), "want_target": True},
    "ops.noising_out": {
        **{"x0": numbers(1), "table": numbers(2, (3, 4)), "noise": numbers(3)},
        **{"out": numbers(4), "target": numbers(5), "eps": numbers(6)},
    },
    "ops.loss": {"pred": numbers(1), "x0": numbers(2), "table": LOSS, "noise": numbers(3)},
    "ops.variational": {
        **{"pred": numbers(1), "x0": numbers(2), "noise": numbers(3)},
        "table": torch.tensor([[0.3, -0.9, 0.7, 9.0, 3.0, 0.2, 0.0, 0.0, 0.1, 1.5, 0.5, 1.0]], dtype=torch.float64),
    },
    "ops.step": STEP,
    "ops.step_out": {**STEP, **OUT, "x0": numbers(21), "s": numbers(22), "next": numbers(23)},
    "ops.learned_step": {
        **{"x": numbers(1), "m": numbers(2, (3, 4, 4)), "table": LEARNED, "noise": numbers(3)},
        **{"mask": numbers(4).abs().clamp(max=1), "known": numbers(5)},
    },
    "ops.step_logprob": {name: t for name, t in STEP.items() if name not in ("noise", "mask", "known")}
    | {"after": numbers(11)},
    "ops.attention": {name: numbers(k, (1, 2, 3, 8)) for k, name in enumerate("qkv")} | {"scale": POINT},
    "ops.spatial_attention": {"qkv": numbers(1, (1, 48, 2, 2)), "num_heads": 2, "order": "legacy", "scale": POINT},
    "ops.group_norm_act": {
        **{"x": numbers(1, (2, 4, 3)), "groups": 2, "weight": numbers(2, (4,)), "bias": numbers(3, (4,))},
        **{"scale": numbers(4, (2, 4)), "shift": numbers(5, (2, 4)), "add": numbers(6, (2, 4))},
    },
    "ops.linear_rows": {"x": numbers(1, (3, 5)), "weight": numbers(2, (4, 5)), "bias": numbers(3, (4,)), "act": "silu"},
    "ops.conv3x3": {
        **{"x": numbers(1, (2, 2, 3, 3)), "weight": numbers(2, (3, 2, 3, 3)), "bias": numbers(3, (3,))},
        "packed": ops.pack_conv3x3(numbers(2, (3, 2, 3, 3)).float()),
    },
    "ops.pack_conv3x3": {"weight": numbers(2, (3, 2, 3, 3))},
    "ops.quantile": {"x": numbers(1), "q": 0.5},
    "ops.dynamic_threshold": {"x0": numbers(1)},
    "ops.dynamic_threshold_out": {"x0": numbers(1), **OUT},
    "ops.moments": {"x": numbers(1)},
    "ops.randn": {"shape": SHAPE, "seeds": SEEDS, **OUT},
    "ops.noise_sum": {"size": SHAPE, "seeds": SEEDS, "streams": torch.tensor([1, 2, 3]), "weights": T},
    "ops.noise_sum_out": {"seeds": SEEDS, "streams": torch.tensor([1, 2, 3]), "weights": T, **OUT},
    "noised": {"x0": numbers(1), "t": T, "schedule": POINT, "noise": numbers(2)},
    "prediction_loss": {
        **{"pred": numbers(3), "x0": numbers(1), "t": T, "schedule": POINT, "prediction": "velocity"},
        **{"weight": T + 0.5, "noise": numbers(2)},
    },
    "simple_loss": {**MODEL_LOSS, "prediction": "v"},
    "edm_loss": {"model": model, "x0": numbers(1), "sigma": 3 * T, "noise": numbers(2)},
    "flow_matching_loss": {
        **{"model": model, "x1": numbers(1), "t": T, "schedule": POINT, "weight": T + 0.5, "noise": numbers(2)},
        "coupling": "independent",
    },
    "denoising_score_matching_loss": {("score" if k == "model" else k): v for k, v in MODEL_LOSS.items()},
    "ncsn_loss": {
        **{"score": model, "x0": numbers(1), "sigmas": 2 * T, "index": torch.tensor([0, 2, 1]), "noise": numbers(2)},
        "weight": T + 0.5,
    },
    "implicit_score_matching_loss": {"score": model, "x": numbers(1), "t": T},
    "sliced_score_matching_loss": {"score": model, "x": numbers(1), "t": T, "seeds": SEEDS},
    "hybrid_loss": {**BOUND, "pred": 0.3 * numbers(3, (3, 4, 4)), "vlb_weight": 0.0},  # the bound's mean is held
    "vlb_loss": {**BOUND, "pred": 0.3 * numbers(3), "variance": "beta"},
    "discriminator_loss": {"real": numbers(1), "fake": numbers(2)},
    "generator_loss": {"fake": numbers(1), "kind": "relativistic", "real": numbers(2)},
    "objectives.adversarial.optimal_discriminator": {"p": numbers(1).exp(), "q": numbers(2).exp()},
    "objectives.adversarial.jensen_shannon": {
        **{"p": numbers(1).exp(), "q": numbers(2).exp(), "weights": numbers(3).abs()},
    },
    "objectives.variational.decoder_bits": {
        "x0": numbers(1).clamp(-0.9, 0.9),
        "mean": numbers(1).clamp(-0.9, 0.9) + 0.01 * numbers(2),
        "std": 0.1,
    },
    "objectives.variational.prior_bits": {"x0": numbers(1), "schedule": LINEAR},
    "objectives.variational.learned_log_variance": {"w": numbers(1), "t": STEPS, "schedule": LINEAR},
    "objectives.marginals.log_joint": IMAGES,
    "objectives.marginals.marginal_prediction": IMAGES,
    "convert": {"m": numbers(1), "x": numbers(2), "t": T, "schedule": POINT, "source": "velocity", "target": "x0"},
    "drop_condition": {"cond": numbers(1), "null": numbers(2), "p": 0.5, "seeds": ops.seeds(2, 3)},
    "initial": {
        **{"plan": diffkern.ddim(LINEAR, 4), "shape": SHAPE, "seeds": 0, "dtype": torch.float64},
        **{"start": 2, "x0": numbers(1)},
    },
    "transition_logprob": {
        **{"model": model, "x": numbers(1), "after": numbers(2), "plan": diffkern.ddpm(LINEAR, 4), "step": 1},
    },
    "from_alphas_cumprod": {"alphas_cumprod": T.flip(0)},
    "from_betas": {"betas": T / 10},
}
CASES["ops.learned_step_out"] = {
    **CASES["ops.learned_step"],
    **{**OUT, "x0": numbers(21), "next": numbers(22)},
}


def run(name: str, arguments: Mapping[str, Any]) -> Any:
    given = dict(arguments)
    if isinstance(given.get("schedule"), Tensor):
        given["schedule"] = learned_path(given["schedule"])
    if not name.endswith("conv3x3"):
        return function(name)(**given)
    result: Tensor = function(name)(**{key: t.float() for key, t in given.items()})  # its one dtype
    return result.double()


def tensors(result: Any) -> tuple[Tensor, ...]:
    found = [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]
    return tuple(t for t in found if t.is_floating_point())


# ------------------------------------------------------------------------------------------------------------ the walk
QUICK = ("ops.step-table", "ops.attention-scale", "prediction_loss-t", "prediction_loss-weight", "noised-schedule")


@pytest.mark.parametrize(
    ("name", "argument"), few([(name, a) for name, (first, _) in ROWS.items() for a in first], *QUICK)
)
def test_gradient(name: str, argument: str) -> None:
    """Of each argument alone, and beside all the others (those may take another way)."""
    given = {key: value for key, value in CASES[name].items() if key != "packed"}  # which is of one weight
    coefficients = argument == "table" and name == "ops.step"

    def call(leaf: Tensor, others: Mapping[str, Any] = given) -> tuple[Tensor, ...]:
        if coefficients:  # streams are whole numbers, and clip and w are apart: tests/ops/test_table_gradients.py
            kept = torch.zeros_like(leaf, dtype=torch.bool)
            kept[:, 5:17] = True
            leaf = torch.where(kept, leaf, given["table"])
        outs = tensors(run(name, {**others, argument: leaf}))
        return tuple(out for out in outs if out.requires_grad) or outs

    leaf = given[argument].clone().masked_fill(torch.isinf(given[argument]), 0.0).requires_grad_()
    narrow = "model" in given or "score" in given  # whose times are float32
    step, tolerance = (1e-3, 1e-3) if narrow and argument in ("t", "sigma", "sigmas") else (1e-6, 1e-6)
    step, tolerance = (0.5, 1e-5) if name == "ops.conv3x3" else (step, tolerance)  # float32, and linear in each
    assert torch.autograd.gradcheck(call, (leaf,), eps=step, atol=tolerance, rtol=1e-4)
    alone = torch.autograd.grad(sum(out.sum() for out in call(leaf)), leaf)[0]
    wanted = [a for a in ROWS[name][0] if a != argument and isinstance(given[a], Tensor)]
    beside = {**given, **{a: given[a].clone().requires_grad_() for a in wanted}}
    together = torch.autograd.grad(sum(out.sum() for out in call(leaf, beside)), leaf)[0]
    close = 1e-6 if name == "ops.conv3x3" else 1e-9
    torch.testing.assert_close(together, alone, rtol=close, atol=close)
    assert bool((alone != 0).any())


@pytest.mark.parametrize(
    ("name", "argument"), [(name, a) for name, (_, second) in ROWS.items() for a in second], ids=lambda p: str(p)
)
def test_refusal(name: str, argument: str) -> None:
    given = CASES[name].get(argument, 0.5)
    value = given.clone() if isinstance(given, Tensor) else torch.tensor(given, dtype=torch.float64)
    more = {"sigma": None} if argument in ("P_mean", "P_std") else {}
    with pytest.raises((RuntimeError, ValueError), match=r"require.? grad|requires_grad") as caught:
        run(name, {**CASES[name], **more, argument: value.requires_grad_()})
    assert re.search(r"detach|no_grad|use ", str(caught.value)), str(caught.value)
    with torch.no_grad():  # where nothing is recorded there is nothing to lose
        if name not in ("from_betas", "from_alphas_cumprod") and argument not in (
            "P_mean",
            "P_std",
            "std",
            "vlb_weight",
        ):
            run(name, {**CASES[name], argument: value})


def test_every_function_is_there() -> None:
    """All of `ops`, and all at the top level: every argument that may be a tensor of numbers stands in one column."""
    public = {f"ops.{name}": getattr(ops, name) for name in ops.__all__}
    top = {name: getattr(diffkern, name) for name in diffkern.__all__ if name not in ops.__all__}
    public |= {name: each for name, each in top.items() if inspect.isfunction(each)}
    for name, each in public.items():
        if name in UNRECORDED | NO_LOOK or name in diffkern.samplers.__all__:  # plans are numbers
            continue
        parameters = inspect.signature(each).parameters.values()
        may = {p.name for p in parameters if re.search(r"\bTensor\b|\bTime\b|\bWeight\b", str(p.annotation))} - WHOLE
        missing = may - {*ROWS.get(name, ([], []))[0], *ROWS.get(name, ([], []))[1]} - INTEGERS.get(name, set())
        assert not missing, f"docs/gradients.md does not say what {name} does with {sorted(missing)}"


@pytest.mark.parametrize("name", sorted(UNRECORDED))
def test_samplers_record_nothing(name: str) -> None:
    x, net = numbers(1, (2, 3)).float().requires_grad_(), torch.nn.Linear(3, 3)
    call: dict[str, Callable[[], Any]] = {
        "sample": lambda: diffkern.sample(lambda x, t: net(x), x, diffkern.ddim(LINEAR, 2)),
        "predictor_corrector": lambda: diffkern.predictor_corrector(
            lambda x, t: net(x), x, diffkern.vp(), 2, corrector="ald", seeds=0
        ),
        "rk45": lambda: diffkern.rk45(lambda x, t: net(x), x, diffkern.vp()).x,
        "log_likelihood": lambda: (
            diffkern.log_likelihood(
                lambda x, t: net(x), x, diffkern.vp(), "eps", solver="euler", steps=2, seeds=ops.seeds(0, 2)
            ).nats
        ),
        "bits_per_dim": lambda: (
            diffkern.bits_per_dim(lambda x, t: net(x), x, diffkern.linear(4, 0.1, 0.5), seeds=ops.seeds(0, 2)).total
        ),
    }
    assert not call[name]().requires_grad
