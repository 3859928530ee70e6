"""What is given to a guided model: conditions in containers and as keywords, learned variances."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from helpers.guidance_cases import COSINE, SEEDS, SHAPE, C, Calls, T, U, X, net, noise, rescale_noise_cfg
from torch import Tensor

from diffkern import guidance, ops, samplers
from diffkern.guidance import autoguidance, classifier_free, compose, nested
from diffkern.sampling import initial, sample

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
