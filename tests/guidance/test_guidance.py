"""Classifier-free guidance and its relatives in loops: bits, batches, weights, one op a call, bad input."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.guidance_cases import (
    COSINE,
    EDM,
    FLOW,
    LINEAR,
    SEEDS,
    SHAPE,
    C,
    Calls,
    T,
    U,
    X,
    column,
    net,
    noise,
    rescale_noise_cfg,
)
from helpers.op_counter import CountOps
from torch import Tensor

import diffkern
from diffkern import guidance, ops, samplers
from diffkern.guidance import autoguidance, classifier_free, compose, nested
from diffkern.sampling import initial, sample

PLANS = {
    "ddim": samplers.ddim(LINEAR, 7),
    "ddpm": samplers.ddpm(COSINE, 6, clip=1.0),
    "heun_edm": samplers.heun(EDM, 5),
    "euler_flow": samplers.euler(FLOW, 6),
    "rk4_flow": samplers.rk4(FLOW, 4),
    "dpmpp_2m": samplers.dpmpp_2m(LINEAR, 6, spacing="log_snr"),
    "unipc": samplers.unipc(LINEAR, 6),
    "dpmpp_sde": samplers.dpmpp_sde(LINEAR, 5),
}


# --- in the loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", PLANS)
def test_in_sample_it_has_the_bits_of_the_loops_own_guidance(name: str, dtype: torch.dtype) -> None:
    plan = PLANS[name]
    x = initial(plan, SHAPE, SEEDS, dtype)
    want = sample(net, x, plan, seeds=SEEDS, cond=C, uncond=U, guidance=3.5)
    model = Calls()
    assert torch.equal(sample(classifier_free(model, C, U, 3.5), x, plan, seeds=SEEDS), want)
    assert model.sizes == [6] * plan.model_calls
    assert torch.equal(sample(classifier_free(net, C, U, 2.5, form="paper"), x, plan, seeds=SEEDS), want)
    assert not torch.equal(want, sample(net, x, plan, seeds=SEEDS, cond=C))


def test_in_a_loop_of_your_own() -> None:
    plan = PLANS["ddim"]
    x = initial(plan, SHAPE, SEEDS)
    guided = classifier_free(net, C, U, 3.5)
    want = sample(guided, x, plan)
    for times in (lambda row: int(row.time), lambda row: torch.tensor(int(row.time))):
        state = x
        for i, row in enumerate(plan.rows):
            state = ops.step(state, guided(state, times(row)), table=plan.table, row=i)[0]
        assert torch.equal(state, want)


def test_documented_examples(root: Path) -> None:
    """The code of docs/guidance.md runs as it stands."""
    plan = PLANS["ddim"]
    names: dict[str, Any] = {
        "diffkern": diffkern, "model": net, "cond": C, "uncond": U, "plan": plan, "x": initial(plan, SHAPE, SEEDS)
    }  # fmt: skip
    first, second = re.findall(r"```python\n(.*?)```", (root / "docs" / "guidance.md").read_text(), re.S)
    exec(first, names)
    assert names["images"].shape == SHAPE
    exec(second, names)
    torch.testing.assert_close(
        names["guided"](X, T), classifier_free(net, C, U, (1 + 6.5 * T / 999).double())(X, T), rtol=1e-5, atol=1e-5
    )
    weights = guidance.interval_weights(plan, 7.5, sigma_interval=(0.28, 5.42), schedule=LINEAR)
    assert set(weights) == {1.0, 7.5}


def test_a_guided_model_is_a_model() -> None:
    """Guidance of guided models, and each with arguments of its own from the loop."""
    inner = classifier_free(lambda x, t, c, extra: net(x, t, c) + column(extra, x), C, U, 2.0)
    outer = autoguidance(inner, lambda x, t, extra: 0.5 * x, 1.5)
    extra = torch.tensor([0.0, 0.2, 0.4])
    m = net(X, T, U) + 2 * (net(X, T, C) - net(X, T, U)) + column(extra, X)
    torch.testing.assert_close(outer(X, T, extra), 0.5 * X + 1.5 * (m - 0.5 * X))
    torch.testing.assert_close(outer(X, T, extra=extra), 0.5 * X + 1.5 * (m - 0.5 * X))
    plan = PLANS["ddim"]
    assert sample(outer, initial(plan, SHAPE, SEEDS), plan, cond=extra).shape == SHAPE


def test_inference_mode() -> None:
    plan = PLANS["ddim"]
    x = initial(plan, SHAPE, SEEDS)
    guided = classifier_free(net, C, U, 3.5, rescale=0.5, interval=(0.2, 0.8), plan=plan)
    want = sample(guided, x, plan)
    with torch.inference_mode():
        assert torch.equal(sample(guided, x, plan), want)


@pytest.mark.parametrize("weight", [3.5, 1.0, torch.tensor([3.0, 1.0, 0.0])], ids=["number", "one", "per sample"])
def test_training_after_inference_mode(weight: Any) -> None:
    """What is put together under inference_mode serves calls with gradients."""
    scale = torch.tensor(0.7, requires_grad=True)

    def model(x: Tensor, t: Any, c: Tensor) -> Tensor:
        return scale * x * column(c, x)

    for outside in (False, True):  # also conditions that are inference tensors themselves
        with torch.inference_mode(outside):
            c, u = C[:1].clone(), U.clone()
        guided = classifier_free(model, c, u, weight, rescale=0.5)
        with torch.inference_mode():
            want = guided(X, T)
        got = guided(X.clone().requires_grad_(), T)
        (gradient,) = torch.autograd.grad(got.sum(), scale)
        assert torch.isfinite(gradient)
        torch.testing.assert_close(got.detach(), want.clone())


@pytest.mark.parametrize("preview", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("weight", [3.0, 1.0, torch.tensor([3.0, 1.0, 0.5])], ids=["number", "one", "per sample"])
@pytest.mark.parametrize("batch", [1, 3])
def test_conditions_that_are_learned(preview: Any, weight: Any, batch: int) -> None:
    """A preview keeps nothing that training would use, each graph is its own, and later previews see the changes."""
    cond = C[:batch].clone().requires_grad_()
    guided = classifier_free(lambda x, t, c: net(x, t, c["y"]), {"y": cond}, {"y": U}, weight)

    def plain() -> Tensor:
        return classifier_free(net, cond, U, weight)(X, T)

    for _ in range(3):
        with preview():
            assert torch.equal(guided(X, T), plain())
        (want,) = torch.autograd.grad(plain().sum(), cond)
        guided(X, T).sum().backward()
        torch.testing.assert_close(cond.grad, want)
        assert bool((want != 0).all())
        with torch.no_grad():
            cond -= 0.1 * cond.grad
        cond.grad = None
    assert not guided._stacked


# --- weights ----------------------------------------------------------------------------------------------------------


def test_a_weight_a_sample() -> None:
    weights = torch.tensor([1.0, 4.0, 0.0], dtype=torch.float64)
    got = classifier_free(net, C, U, weights)(X, T)
    for b, weight in enumerate(weights.tolist()):
        alone = classifier_free(net, C[b : b + 1], U[b : b + 1], weight)
        assert torch.equal(got[b : b + 1], alone(X[b : b + 1], T[b : b + 1]))
    assert torch.equal(got[0], net(X, T, C)[0])
    assert torch.equal(got[2], net(X, T, U)[2])
    assert torch.equal(classifier_free(net, C, U, weights - 1, form="paper")(X, T), got)
    mixed = nested(net, [U, C, 2 * C], [weights, 2.0])(X, T)
    for b, weight in enumerate(weights.tolist()):
        assert torch.equal(mixed[b], nested(net, [U, C, 2 * C], [weight, 2.0])(X, T)[b])
    none = torch.tensor(4.0)
    assert torch.equal(classifier_free(net, C, U, none)(X, T), classifier_free(net, C, U, 4.0)(X, T))


def test_a_weight_that_depends_on_the_time() -> None:
    got = classifier_free(net, C, U, lambda t: 1 + t / 100)(X, T)
    for b, t in enumerate(T.tolist()):
        assert torch.equal(got[b], classifier_free(net, C, U, float(torch.tensor(1 + t / 100)))(X, T)[b])
    paper = classifier_free(net, C, U, lambda t: t / 100, form="paper")(X, T)
    torch.testing.assert_close(paper, got)
    assert torch.equal(classifier_free(net, C, U, lambda t: 6.0)(X, 900), classifier_free(net, C, U, 6.0)(X, 900))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_no_samples_and_a_weight_for_each(rescale: float) -> None:
    got = classifier_free(net, C[:0], U[:0], torch.zeros(0), rescale=rescale)(X[:0], T[:0])
    assert got.shape == X[:0].shape


def test_one_time_for_all() -> None:
    """t [1] is t []."""
    for weight in (3.0, torch.tensor([3.0, 1.0, 0.0]), lambda t: 1 + t / 100):
        for options in ({}, {"sigma_interval": (0.3, 8.0), "schedule": LINEAR}):
            guided = classifier_free(net, C, U, weight, **options)
            assert torch.equal(guided(X, torch.tensor([500])), guided(X, torch.full((3,), 500)))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_does_not_depend_on_its_batch(rescale: float, dtype: torch.dtype) -> None:
    """Weights, times inside and outside an interval and rescaling all differ between the samples."""
    batch = 7
    x, c, u = noise(batch, 2, 5, 7).to(dtype), torch.linspace(-1, 1, batch), torch.zeros(1)
    weights = torch.tensor([0.0, 1.0, 2.0, 3.5, -1.0, 7.5, 5.0])
    t = torch.tensor([999, 800, 600, 500, 400, 100, 0])

    def guided(pick: Any, weight: Any, **options: Any) -> guidance.Guided:
        return classifier_free(net, c[pick], u, weight, rescale=rescale, **options)

    for options in ({}, {"sigma_interval": (0.3, 8.0), "schedule": LINEAR}):
        whole = guided(slice(None), weights, **options)(x, t)
        for b in range(batch):
            for pick in (slice(b, b + 1), [b, (b + 3) % batch], [(b + 1) % batch, b]):
                part = guided(pick, weights[pick], **options)(x[pick], t[pick])
                at = 1 if isinstance(pick, list) and pick[1] == b else 0
                assert torch.equal(part[at], whole[b])
            alone = guided(slice(b, b + 1), float(weights[b]), **options)(x[b : b + 1], t[b : b + 1])
            assert torch.equal(alone[0], whole[b])


# --- cost, gradients, compilation -------------------------------------------------------------------------------------


def test_one_op_a_call() -> None:
    """Beside the model: the doubled input, the op that combines, and the state's copy for the first of two models."""

    def model(x: Tensor, t: Any, c: Tensor) -> Tensor:
        return x

    for guided, fused in (
        (classifier_free(model, C, U, 3.0), {"step": 1}),
        (classifier_free(model, C, U, torch.tensor([1.0, 2.0, 3.0])), {"step": 1}),
        (nested(model, [U, C, U], [2.0, 3.0]), {"step": 1}),
        (compose(model, [C, U, C], U, [2.0, 3.0, 4.0]), {"step": 1}),
        (compose(model, [C, U, C, U], U, [2.0, 3.0, 4.0, 5.0]), {"step": 2}),
        (two := autoguidance(lambda x, t: x, lambda x, t: x, 2.0), {"step": 1}),
        (classifier_free(model, C, U, 3.0, rescale=0.7), {"step": 2, "moments": 2}),
        (classifier_free(model, C, U, 1.0), {}),
    ):
        guided(X, T)  # the conditions and tables are made once
        with torch.no_grad(), CountOps(SHAPE) as count:
            guided(X, T)
        assert dict(count.fused) == fused
        assert count.large == ({"clone": 1} if guided is two else {})


def test_gradients_pass_through() -> None:
    x = X.double().requires_grad_()
    for phi in (0.0, 0.7):

        def plain(x: Tensor, phi: float = phi) -> Tensor:
            u, c = net(x, T, U.double()), net(x, T, C.double())
            return rescale_noise_cfg(u + 3.0 * (c - u), c, phi)

        guided = classifier_free(net, C.double(), U.double(), 3.0, rescale=phi)
        direction = noise(*SHAPE, seed=9, dtype=torch.float64)
        (want,) = torch.autograd.grad((plain(x) * direction).sum(), x)
        (got,) = torch.autograd.grad((guided(x, T) * direction).sum(), x)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(guided(x, T).detach(), guided(x.detach(), T))


@pytest.mark.full
def test_compiles_in_one_graph() -> None:
    guided = classifier_free(net, C, U, 3.0, sigma_interval=(0.3, 8.0), schedule=LINEAR)
    compiled = torch.compile(lambda x, t: guided(x, t), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X, T), guided(X, T))


# --- bad input --------------------------------------------------------------------------------------------------------

N = torch.tensor([1.0, float("nan"), 2.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: classifier_free(net, C, U, 3.0, form="cfg"), r"form must be one of scale, paper, got 'cfg'"),
        (lambda: classifier_free(net, C, U, "7"), r"weight must be a number, .* or a function of t, got str"),
        (lambda: classifier_free(net, C, U, True), r"weight must be a number, .* got bool"),
        (lambda: classifier_free(net, C, U, True, form="paper"), r"weight must be a number, .* got bool"),
        (lambda: classifier_free(net, C, U, float("inf")), r"weight must be finite, got inf"),
        (lambda: classifier_free(net, C, U, N), r"weight must be finite, got \[1.0, nan, 2.0\]"),
        (lambda: classifier_free(net, C, U, C[:, None]), r"weight must be .* got torch.float32 \[3, 1\]"),
        (lambda: classifier_free(net, C, U, C.clone().requires_grad_()), r"weight must not require a gradient"),
        (lambda: classifier_free(net, C, U, C[:2])(X, T), r"weight must have one entry a sample \(3\), got"),
        (lambda: classifier_free(net, C, U, lambda t: C[:2])(X, T), r"weight must give a number or one a sample \[3\]"),
        (lambda: classifier_free(net, C, U, 3.0, rescale=1.5), r"rescale must be a number in \[0, 1\], got 1.5"),
        (
            lambda: classifier_free(lambda x, t, c: x, C, U, 3.0, rescale=0.5)(X[:, 0, 0, 0], T),
            r"rescale needs samples of more than one element, got x of shape \[3\]",
        ),
        (lambda: classifier_free(net, C, U[:2], 3.0)(X, T), r"uncond must have one entry a sample \(3\) or one"),
        (lambda: classifier_free(net, {"a": [C[0]]}, {"a": [U[0]]}, 3.0)(X, T), r"uncond\['a'\]\[0\] must have one"),
        (lambda: classifier_free(net, C, U.double(), 3.0), r"cond must have the .* dtype .* of uncond .*batched=False"),
        (lambda: classifier_free(net, C[:, None], U, 3.0), r"cond must have the shape .* got \[3, 1\] torch.float32"),
        (lambda: classifier_free(net, C, None, 3.0), r"cond must have .* of uncond .* got \[3\] .* and None"),
        (lambda: classifier_free(net, {"a": C}, {"b": C}, 3.0), r"cond must be built like uncond .* at cond\['a'\]"),
        (lambda: classifier_free(net, [C], (C,), 3.0), r"cond must be built like uncond .* a list of 1 and a tuple of"),
        (lambda: classifier_free(net, {"a": 1}, {"a": 2}, 3.0), r"cond\['a'\] must have .* got 1 and 2"),
        (lambda: classifier_free(net, C, U, 3.0, keywords=True), r"uncond must be a dict .* keywords=True, got Tensor"),
        (lambda: classifier_free(net, C, U, 3.0)(X.int(), T), r"x must be a floating point tensor .* got torch.int32"),
        (lambda: classifier_free(net, C, U, 3.0)(X, T[:2]), r"t must be .* one time a sample \[3\], got shape \[2\]"),
        (lambda: classifier_free(net, C, U, 1.0)(X, T[:0]), r"t must be .* one time a sample \[3\], got shape \[0\]"),
        (lambda: classifier_free(net, C, U, 3.0)(None, T), r"x must be a floating point tensor .* got NoneType"),
        (
            lambda: classifier_free(lambda x, t, c: x[:3], C, U, 3.0)(X, T),
            r"model must return a tensor of shape \[6, 2, 5, 4\] \(or \[6, 4, 5, 4\]: learned .*\), got shape \[3",
        ),
        (lambda: classifier_free(lambda x, t, c: None, C, U, 3.0)(X, T), r"model must return a tensor, got NoneType"),
        (
            lambda: autoguidance(lambda x, t: x, lambda x, t: x.double(), 2.0)(X, T),
            r"models must return predictions of one shape and dtype, got .*float64 and .*float32",
        ),
        (lambda: compose(net, [], U, []), r"conds must be a list of at least one condition"),
        (lambda: compose(net, C, U, [1.0]), r"conds must be a list of at least one condition, got Tensor"),
        (lambda: compose(net, [C, C], U, [1.0]), r"weights must be .* got 2 conditions and 1 weights"),
        (lambda: compose(net, [C, C], U, C[:2]), r"weights must be .* got 2 conditions and a tensor \[2\]"),
        (lambda: compose(net, [C, C], U, [C, C[:2]]), r"weights must have one entry a sample, .* got \[2, 3\]"),
        (lambda: compose(net, [C, C], U, [1.0, "a"]), r"weights\[1\] must be a number, .* got str"),
        (lambda: nested(net, [C], []), r"conds must be a list of at least two conditions, .* got 1 of them"),
        (lambda: nested(net, C, []), r"conds must be a list of at least two conditions, .* got Tensor"),
        (lambda: nested(net, [C, C, C], [1.0]), r"weights must be a list of 2, .* got 1 weights"),
        (lambda: nested(net, [C, C], C), r"weights must be a list of 1, .* got a tensor \[3\]"),
        (lambda: nested(net, [C] * 6, [1.0] * 5, rescale=0.5), r"rescale works for up to 5 conditions, got 6"),
    ],
)  # fmt: skip
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
