"""Classifier-free guidance and its relatives: formulas, bits, conditions of every kind, one op a call."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers.op_counter import CountOps
from helpers.oracles import Gaussian
from helpers.tolerances import STATE_DTYPES, check
from torch import Tensor

import diffkern
from diffkern import guidance, ops, samplers, schedules
from diffkern.guidance import autoguidance, classifier_free, compose, nested
from diffkern.plan import Plan
from diffkern.sampling import initial, sample
from diffkern.schedules import predictions

LINEAR, COSINE, FLOW, EDM = schedules.linear(), schedules.cosine(), schedules.flow(), schedules.edm()
SHAPE = (3, 2, 5, 4)
SEEDS = torch.tensor([11, -5, 2**62], dtype=torch.int64)
C, U = torch.tensor([0.3, -0.8, 0.5]), torch.tensor([0.1, 0.1, 0.1])
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


def column(t: Any, x: Tensor) -> Tensor:
    return torch.as_tensor(t).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)


def net(x: Tensor, t: Any, c: Tensor) -> Tensor:
    """Elementwise, so that a sample cannot see its batch."""
    return 0.6 * torch.tanh(x + column(c, x)) - 0.05 * torch.sin(0.01 * column(t, x)) * x


class Calls:
    """A model that counts the inputs of each call."""

    def __init__(self, model: Any = net) -> None:
        self.model, self.sizes = model, []

    def __call__(self, x: Tensor, t: Any, *args: Any, **kwargs: Any) -> Tensor:
        self.sizes.append(x.shape[0])
        return self.model(x, t, *args, **kwargs)


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return ops.randn(shape, ops.seeds(seed, shape[0]), dtype=dtype)


X, T = noise(*SHAPE), torch.tensor([900, 500, 20])


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


# --- formulas ---------------------------------------------------------------------------------------------------------


def fixed(*outputs: Tensor) -> Any:
    """A model whose prediction for the integer condition j is outputs[j]."""

    def model(x: Tensor, t: Any, j: Tensor) -> Tensor:
        return torch.cat([outputs[int(part[0])] for part in j.split(len(outputs[0]))])

    return model


def label(j: int, batch: int = 3) -> Tensor:
    return torch.full((batch,), j)


def outputs(n: int, near: bool, dtype: torch.dtype) -> list[Tensor]:
    """Predictions that differ as if untrained, or by little, as those of a trained network do."""
    first = noise(*SHAPE, seed=1)
    return [
        (first + 0.03 * noise(*SHAPE, seed=2 + j) if near else noise(*SHAPE, seed=2 + j)).to(dtype) for j in range(n)
    ]


def combined(parts: list[Tensor], pairs: list[tuple[int, int]], weights: list[float]) -> Tensor:
    m = parts[0]
    for (a, b), w in zip(pairs, weights, strict=True):
        m = m + w * (parts[a] - parts[b])
    return m


WEIGHTS = [7.5, -1.3, 0.7, 2.0, 1.1, 0.4, 3.0, -2.0]


@pytest.mark.parametrize("near", [False, True], ids=["apart", "near"])
@pytest.mark.parametrize("dtype", STATE_DTYPES)
@pytest.mark.parametrize("kind", ["compose", "nested"])
@pytest.mark.parametrize("n", range(1, 9))
def test_error_against_float64(kind: str, n: int, dtype: torch.dtype, near: bool) -> None:
    """At most twice the error of plain torch in the same dtype, plus one rounding."""
    parts, weights = outputs(n + 1, near, dtype), WEIGHTS[:n]
    model = fixed(*parts)
    if kind == "compose":
        pairs = [(j + 1, 0) for j in range(n)]
        guided = compose(model, [label(j + 1) for j in range(n)], label(0), weights)
    else:
        pairs = [(j + 1, j) for j in range(n)]
        guided = nested(model, [label(j) for j in range(n + 1)], weights)
    exact = combined([part.double() for part in parts], pairs, weights)
    check(guided(X.to(dtype), 5), exact, combined(parts, pairs, weights), f"{kind} {n} {dtype}")


def test_two_conditions_are_classifier_free() -> None:
    want = classifier_free(net, C, U, 4.0)(X, T)
    assert torch.equal(compose(net, [C], U, [4.0])(X, T), want)
    assert torch.equal(nested(net, [U, C], [4.0])(X, T), want)
    assert torch.equal(classifier_free(net, C, U, 3.0, form="paper")(X, T), want)
    assert torch.equal(autoguidance(lambda x, t: net(x, t, C), lambda x, t: net(x, t, U), 4.0)(X, T), want)
    torch.testing.assert_close(want, 4 * net(X, T, C) - 3 * net(X, T, U))


def test_negative_prompts() -> None:
    """As uncond, or as a condition of negative weight."""
    bad = torch.tensor([0.9, 0.9, 0.9])
    u, c, n = net(X, T, U), net(X, T, C), net(X, T, bad)
    torch.testing.assert_close(classifier_free(net, C, bad, 4.0)(X, T), n + 4 * (c - n))
    torch.testing.assert_close(compose(net, [C, bad], U, [4.0, -1.5])(X, T), u + 4 * (c - u) - 1.5 * (n - u))


def test_instruct_pix2pix() -> None:
    """Equation 3 of arXiv 2211.09800."""
    image, both = torch.tensor([0.5, 0.6, 0.7]), torch.tensor([-1.0, 1.0, 2.0])
    e0, ei, eit = net(X, T, U), net(X, T, image), net(X, T, both)
    model = Calls()
    got = nested(model, [U, image, both], [1.5, 7.5])(X, T)
    torch.testing.assert_close(got, e0 + 1.5 * (ei - e0) + 7.5 * (eit - ei))
    assert model.sizes == [9]


def test_a_sum_that_is_one_branch_calls_it_alone() -> None:
    for weight, cond in ((1.0, C), (0.0, U), (1, C)):
        model = Calls()
        assert torch.equal(classifier_free(model, C, U, weight)(X, T), net(X, T, cond))
        assert model.sizes == [3]
    model = Calls()
    assert torch.equal(nested(model, [U, C, 2 * C], [1.0, 1.0])(X, T), net(X, T, 2 * C))
    assert torch.equal(nested(model, [U, C, 2 * C], [1.0, 0.0])(X, T), net(X, T, C))
    assert torch.equal(compose(model, [C, 2 * C], U, [0.0, 1.0])(X, T), net(X, T, 2 * C))
    assert model.sizes == [3, 3, 3]
    model = Calls()
    torch.testing.assert_close(
        compose(model, [C, 2 * C], U, [0.0, 2.0])(X, T), net(X, T, U) + 2 * (net(X, T, 2 * C) - net(X, T, U))
    )
    assert model.sizes in ([6], [9])


def test_a_guided_model_says_what_it_is() -> None:
    guided = classifier_free(net, C, U, 4.0, rescale=0.7, interval=(0.2, 0.8), plan=samplers.ddim(LINEAR, 10))
    assert repr(guided) == "Guided(uncond + 4.0 (cond - uncond), rescale=0.7, 101 <= t <= 700)"
    assert repr(nested(net, [U, C, U], [1.5, C])) == (
        "Guided(conds[0] + 1.5 (conds[1] - conds[0]) + weights[1] (conds[2] - conds[1]))"
    )


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


# --- rescale ----------------------------------------------------------------------------------------------------------


def rescale_noise_cfg(noise_cfg: Tensor, noise_pred_text: Tensor, guidance_rescale: float) -> Tensor:
    """arXiv 2305.08891, section 3.4, as diffusers has it."""
    std_text = noise_pred_text.std(dim=list(range(1, noise_pred_text.ndim)), keepdim=True)
    std_cfg = noise_cfg.std(dim=list(range(1, noise_cfg.ndim)), keepdim=True)
    rescaled = noise_cfg * (std_text / std_cfg)
    return guidance_rescale * rescaled + (1 - guidance_rescale) * noise_cfg


@pytest.mark.parametrize("dtype", STATE_DTYPES)
@pytest.mark.parametrize("phi", [0.3, 0.7, 1.0])
def test_rescale(phi: float, dtype: torch.dtype) -> None:
    u, c = outputs(2, False, dtype)

    def plain(u: Tensor, c: Tensor) -> Tensor:
        return rescale_noise_cfg(u + 6.0 * (c - u), c, phi)

    got = classifier_free(fixed(u, c), label(1), label(0), 6.0, rescale=phi)(X.to(dtype), 5)
    assert got.dtype == dtype
    check(got, plain(u.double(), c.double()), plain(u, c), f"rescale {dtype}")
    if phi == 1.0 and dtype == torch.float64:
        torch.testing.assert_close(got.flatten(1).std(1), c.flatten(1).std(1))
    torch.testing.assert_close(nested(fixed(u, c), [label(0), label(1)], [6.0], rescale=phi)(X.to(dtype), 5), got)


@pytest.mark.parametrize("form", ["scale", "paper"])
def test_diffusers_guider(form: str) -> None:
    """Both forms, the rescaling and the interval in steps of diffusers' ClassifierFreeGuidance, at every step."""
    guiders = pytest.importorskip("diffusers.guiders")
    guider = guiders.ClassifierFreeGuidance(
        guidance_scale=6.0, guidance_rescale=0.7, use_original_formulation=form == "paper", start=0.2, stop=0.8
    )
    plan = samplers.ddim(LINEAR, 13)
    guided = classifier_free(net, C, U, 6.0, form=form, rescale=0.7, interval=(0.2, 0.8), plan=plan)
    for step, row in enumerate(plan.rows):
        t = torch.full((3,), int(row.time))
        guider.set_state(step, 13, t)
        want = guider.forward(net(X, t, C), net(X, t, U) if guider.num_conditions == 2 else None).pred
        torch.testing.assert_close(guided(X, t), want, rtol=2e-6, atol=2e-6)


def test_rescale_of_nested_conditions() -> None:
    """To the std of the last condition, every term of the sum scaled."""
    parts = outputs(4, False, torch.float64)
    got = nested(fixed(*parts), [label(j) for j in range(4)], [1.5, 7.5, -2.0], rescale=0.7)(X.double(), 5)
    m = combined(parts, [(1, 0), (2, 1), (3, 2)], [1.5, 7.5, -2.0])
    torch.testing.assert_close(got, rescale_noise_cfg(m, parts[3], 0.7))


def test_rescale_where_nothing_varies() -> None:
    got = classifier_free(lambda x, t, c: 0 * x, C, U, 3.0, rescale=1.0)(X, T)
    assert torch.equal(got, torch.zeros_like(X))
    assert torch.equal(classifier_free(net, C, U, 1.0, rescale=0.7)(X, T), net(X, T, C))


# --- conditions -------------------------------------------------------------------------------------------------------


class Text(NamedTuple):
    tokens: Tensor
    pooled: Tensor


def test_conditions_in_containers() -> None:
    def model(x: Tensor, t: Any, c: Any) -> Tensor:
        assert isinstance(c["text"], Text)
        assert (c["size"], c["name"]) == ((512, None), "xl")
        return net(x, t, c["text"].tokens.mean(1) + c["text"].pooled + c["more"][0])

    def cond(seed: int, batch: int = 3) -> dict[str, Any]:
        text = Text(noise(batch, 5, seed=seed), noise(batch, 1, seed=seed + 1)[:, 0])
        return {"text": text, "more": [torch.full((batch,), 0.1 * seed)], "size": (512, None), "name": "xl"}

    c, u = cond(1), cond(5)
    counted = Calls(model)
    got = classifier_free(counted, c, u, 3.0)(X, T)
    assert counted.sizes == [6]
    one, two = model(X, T, u), model(X, T, c)
    torch.testing.assert_close(got, one + 3 * (two - one))
    null = cond(5, batch=1)  # one entry for all samples
    want = classifier_free(model, c, {**u, "text": Text(*(v[:1].expand(3, *v.shape[1:]) for v in null["text"]))}, 3.0)
    assert torch.equal(classifier_free(model, c, null, 3.0)(X, T), want(X, T))
    assert torch.equal(classifier_free(model, c, null, 0.0)(X, T), model(X, T, null))


def test_conditions_as_keywords() -> None:
    def model(x: Tensor, t: Any, extra: float = 0.0, *, label: Tensor, flag: bool) -> Tensor:
        assert flag
        return net(x, t, label) + extra

    guided = classifier_free(model, {"label": C, "flag": True}, {"label": U, "flag": True}, 3.0, keywords=True)
    assert torch.equal(guided(X, T), classifier_free(net, C, U, 3.0)(X, T))
    torch.testing.assert_close(guided(X, T, 0.5), guided(X, T) + 0.5)


def test_two_calls_for_conditions_that_do_not_fit_together() -> None:
    def model(x: Tensor, t: Any, c: Tensor | None) -> Tensor:
        return net(x, t, torch.zeros(len(x)) if c is None else c.mean(1))

    c = noise(3, 77)
    counted = Calls(model)
    got = classifier_free(counted, c, None, 3.0, batched=False)(X, T)
    assert counted.sizes == [3, 3]
    one, two = model(X, T, None), model(X, T, c)
    torch.testing.assert_close(got, one + 3 * (two - one))
    assert torch.equal(classifier_free(net, C, U, 3.0, batched=False)(X, T), classifier_free(net, C, U, 3.0)(X, T))


def test_one_guided_model_serves_batches_of_any_size() -> None:
    """A single condition for all samples; each size is put together anew."""
    guided = classifier_free(net, C[:1], U[:1], 3.0)
    whole = guided(X, T)
    for n in (1, 2, 3, 1, 0):
        assert torch.equal(guided(X[:n], T[:n]), whole[:n])


# --- learned variances ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("weight", [3.0, torch.tensor([3.0, 1.0, 0.0])], ids=["number", "per sample"])
def test_learned_variances_are_the_conditions(weight: Any, rescale: float) -> None:
    def model(x: Tensor, t: Any, c: Tensor) -> Tensor:
        return torch.cat([net(x, t, c), 0.1 * net(x, t, 2 * c)], 1)

    got = classifier_free(model, C, U, weight, rescale=rescale)(X, T)
    assert got.shape == (3, 4, 5, 4)
    assert torch.equal(got[:, :2], classifier_free(net, C, U, weight, rescale=rescale)(X, T))
    assert torch.equal(got[:, 2:], model(X, T, C)[:, 2:])
    both = compose(
        model,
        [C, U],
        U,
        [
            2.0,
            3.0,
        ][:2],
    )(X, T)
    assert torch.equal(both[:, 2:], model(X, T, C)[:, 2:])
    assert torch.equal(nested(model, [U, 2 * C, C], [2.0, 3.0])(X, T)[:, 2:], model(X, T, C)[:, 2:])
    many = compose(model, [C, U, C, U, C], U, [2.0, 3.0, 1.5, 0.5, 4.0])(X, T)
    assert torch.equal(many[:, 2:], model(X, T, C)[:, 2:])


ONE, ZERO = torch.ones(3), torch.zeros(3)


@pytest.mark.parametrize("form", ["number", "tensor", "scalar tensor", "function"])
@pytest.mark.parametrize(
    ("kind", "weights", "alone", "kept"),
    [
        ("classifier_free", [0.0], 0, 1),
        ("classifier_free", [1.0], 1, 1),
        ("compose", [0.0, 0.0, 0.0], 0, 1),
        ("compose", [0.0, 1.0, 0.0], 2, 1),
        ("compose", [1.0, 0.0, 0.0], 1, 1),
        ("compose", [0.0, 0.0, 0.0, 0.0, 1.0], 5, 1),
        ("nested", [0.0, 0.0, 0.0], 0, 3),
        ("nested", [1.0, 0.0, 0.0], 1, 3),
        ("nested", [1.0, 1.0, 1.0], 3, 3),
    ],
)
@pytest.mark.parametrize("batched", [True, False])
def test_learned_variances_where_one_branch_is_alone(
    batched: bool, kind: str, weights: list[float], alone: int, kept: int, form: str
) -> None:
    def model(x: Tensor, t: Any, c: Tensor) -> Tensor:
        return torch.cat([net(x, t, c), 0.1 * net(x, t, 2 * c)], 1)

    made = {
        "number": lambda w: w,
        "tensor": lambda w: torch.full((3,), w),
        "scalar tensor": torch.tensor,
        "function": lambda w: lambda t: w + 0.0 * t,
    }[form]
    conds, given = [U + 0.3 * j for j in range(len(weights) + 1)], [made(w) for w in weights]
    make = {
        "classifier_free": lambda model, **options: classifier_free(model, conds[1], conds[0], given[0], **options),
        "compose": lambda model, **options: compose(model, conds[1:], conds[0], given, **options),
        "nested": lambda model, **options: nested(model, conds, given, **options),
    }[kind]
    counted = Calls(model)
    got = make(counted, batched=batched)(X, T)
    assert torch.equal(got[:, :2], net(X, T, conds[alone]))
    assert torch.equal(got[:, 2:], model(X, T, conds[kept])[:, 2:])
    if form == "number":
        assert counted.sizes == [3] * (1 if alone == kept else 2)
        plain = Calls()
        assert torch.equal(make(plain)(X, T), net(X, T, conds[alone]))
        assert plain.sizes == [3]


def test_learned_variances_of_two_models() -> None:
    def weak(x: Tensor, t: Any) -> Tensor:
        return torch.cat([x, 2 * x], 1)

    got = autoguidance(lambda x, t: torch.cat([3 * x, 4 * x], 1), weak, 0.0)(X, T)
    assert torch.equal(got, torch.cat([X, 4 * X], 1))
    with pytest.raises(ValueError, match=r"predictions of one shape and dtype, got \[3, 4, 5, 4\] .* and \[3, 2"):
        autoguidance(lambda x, t: x, weak, 0.0)(X, T)


def test_in_plans_of_learned_variance() -> None:
    def model(x: Tensor, t: Any, c: Tensor) -> Tensor:
        return torch.cat([net(x, t, c), torch.tanh(net(x, t, 2 * c))], 1)

    plan = samplers.ddpm(COSINE, 6, variance="learned")
    x = initial(plan, SHAPE, SEEDS)
    guided = classifier_free(model, C, U, 3.0, rescale=0.5)
    shifted = guidance.classifier_guided(guided, lambda x, t: -0.1 * x, COSINE, "eps")
    for each in (guided, shifted):
        got, state = sample(each, x, plan, seeds=SEEDS), x
        for i, row in enumerate(plan.rows):
            u, c = (model(state, torch.full((3,), int(row.time)), cond)[:, :2] for cond in (U, C))
            m = rescale_noise_cfg(u + 3 * (c - u), c, 0.5)
            if each is shifted:
                m = m + COSINE.sigma(int(row.time)).float() * 0.1 * state
            m = torch.cat([m, model(state, torch.full((3,), int(row.time)), C)[:, 2:]], 1)
            state = ops.learned_step(state, m, table=plan.learned_table, row=i, seeds=SEEDS)[0]
        torch.testing.assert_close(got, state, rtol=1e-4, atol=1e-4)


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", predictions.PREDICTIONS)
def test_guidance_is_of_the_score_in_every_prediction(prediction: str) -> None:
    """Two Gaussian classes: the guided score is s_u + w (s_c - s_u) whatever the model predicts."""
    schedule = EDM if prediction == "edm" else COSINE
    t: Any = 1.7 if prediction == "edm" else 400
    none, one = Gaussian(0.2, 0.9), Gaussian(-0.6, 0.4)
    x = noise(2, 3, 8, dtype=torch.float64)

    def model(x: Tensor, t: Any, y: Tensor) -> Tensor:
        u, c = (data.predict(schedule, prediction, x, t) for data in (none, one))
        return torch.where(column(y, x) == 1, c, u)

    got = classifier_free(model, torch.ones(2), torch.zeros(2), 3.0)(x, t)
    score = none.predict(schedule, "score", x, t)
    score = score + 3.0 * (one.predict(schedule, "score", x, t) - score)
    torch.testing.assert_close(predictions.convert(got, x, t, schedule, prediction, "score"), score)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "flow"])
def test_guided_samples_of_gaussian_classes(name: str) -> None:
    """Classes of one width: the guided score is that of the Gaussian at u + w (c - u), and so are the samples."""
    schedule = FLOW if name == "flow" else LINEAR
    plan: Plan = {
        "ddim": samplers.ddim(LINEAR, 500),
        "dpmpp_2m": samplers.dpmpp_2m(LINEAR, 60, spacing="log_snr"),
        "flow": samplers.heun(FLOW, 60),
    }[name]
    means, width = (-0.3, 0.4), 0.5

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        at = float(t[0]) if t.is_floating_point() else int(t[0])
        u, c = (Gaussian(mean, width).predict(schedule, plan.prediction, x, at) for mean in means)
        return torch.where(column(y, x) == 1, c, u)

    x = initial(plan, SHAPE, SEEDS, torch.float64)
    got = sample(classifier_free(model, torch.ones(3), torch.zeros(3), 2.5), x, plan)
    first = plan.rows[0].time
    start = (float(schedule.alpha(first)), float(schedule.sigma(first)))
    want = Gaussian(means[0] + 2.5 * (means[1] - means[0]), width).ode(x, start, (1.0, 0.0))
    torch.testing.assert_close(got, want, rtol=0, atol=0.02)


# --- cost, gradients, compilation -------------------------------------------------------------------------------------


def test_one_op_a_call() -> None:
    """Beside the model: the doubled input, and the op that combines."""

    def model(x: Tensor, t: Any, c: Tensor) -> Tensor:
        return x

    for guided, fused in (
        (classifier_free(model, C, U, 3.0), {"step": 1}),
        (classifier_free(model, C, U, torch.tensor([1.0, 2.0, 3.0])), {"step": 1}),
        (nested(model, [U, C, U], [2.0, 3.0]), {"step": 1}),
        (compose(model, [C, U, C], U, [2.0, 3.0, 4.0]), {"step": 1}),
        (compose(model, [C, U, C, U], U, [2.0, 3.0, 4.0, 5.0]), {"step": 2}),
        (autoguidance(lambda x, t: x, lambda x, t: x, 2.0), {"step": 1}),
        (classifier_free(model, C, U, 3.0, rescale=0.7), {"step": 2, "moments": 2}),
        (classifier_free(model, C, U, 1.0), {}),
    ):
        guided(X, T)  # the conditions and tables are made once
        with torch.no_grad(), CountOps(SHAPE) as count:
            guided(X, T)
        assert dict(count.fused) == fused
        assert not count.large


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
        (lambda: classifier_free(lambda x, t, c: None, C, U, 3.0)(X, T), r"model must return a tensor .* got NoneType"),
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
