"""compat.guided_diffusion beside an installed guided_diffusion: same model, seed and schedule."""

from __future__ import annotations

import inspect
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from helpers import guided_diffusion_oracle
from helpers.guided_diffusion_runs import MEANS, VARIANCES, change, classifier, error, images, network, seeded, state
from torch import Tensor

from diffkern.compat import guided_diffusion as ours
from diffkern.compat.guided_diffusion import gaussian_diffusion, losses, respace

theirs = guided_diffusion_oracle.load()

STEP = {torch.float32: 2e-6, torch.float64: 1e-12}
"""Of a step, relative to the largest element."""
TABLES = (
    *("betas", "alphas_cumprod", "alphas_cumprod_prev", "alphas_cumprod_next", "sqrt_alphas_cumprod"),
    *("sqrt_one_minus_alphas_cumprod", "log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod"),
    *("sqrt_recipm1_alphas_cumprod", "posterior_variance", "posterior_log_variance_clipped"),
    *("posterior_mean_coef1", "posterior_mean_coef2"),
)
METHODS = (
    *("q_mean_variance", "q_sample", "q_posterior_mean_variance", "p_mean_variance", "p_sample", "ddim_sample"),
    *("ddim_reverse_sample", "condition_mean", "condition_score", "training_losses", "calc_bpd_loop", "_prior_bpd"),
    *("_vb_terms_bpd", "_predict_xstart_from_eps", "_predict_xstart_from_xprev", "_predict_eps_from_xstart"),
    *("_scale_timesteps", "p_sample_loop", "p_sample_loop_progressive", "ddim_sample_loop"),
    "ddim_sample_loop_progressive",
)


def make(
    mean: str = "EPSILON",
    variance: str = "FIXED_SMALL",
    loss: str = "MSE",
    steps: str | None = "10",
    schedule: str = "linear",
    rescale: bool = True,
    T: int = 1000,
) -> tuple[Any, Any]:
    """(the original, ours); steps None: without SpacedDiffusion."""
    found = []
    for gd, rs in ((theirs.gaussian_diffusion, theirs.respace), (gaussian_diffusion, respace)):
        options = {
            "betas": gd.get_named_beta_schedule(schedule, T),
            "model_mean_type": gd.ModelMeanType[mean],
            "model_var_type": gd.ModelVarType[variance],
            "loss_type": gd.LossType[loss],
            "rescale_timesteps": rescale,
        }
        if steps is None:
            found.append(gd.GaussianDiffusion(**options))
        else:
            found.append(rs.SpacedDiffusion(use_timesteps=rs.space_timesteps(T, steps), **options))
    return found[0], found[1]


def both(pair: tuple[Any, Any], call: Any) -> tuple[Any, Any]:
    """What a call gives with each; the generator is left in the same place."""
    (want, want_next), (found, found_next) = (seeded(lambda d=d: call(d)) for d in pair)
    assert torch.equal(found_next, want_next), "the generator is not where the original leaves it"
    return want, found


def close(found: Tensor, want: Tensor, steps: int = 1) -> None:
    assert found.dtype == want.dtype
    assert found.shape == want.shape
    assert error(found, want) <= steps * STEP[want.dtype]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("steps", [None, "25", "ddim50", "10,15,20", [3, 0, 1]])
def test_tables(schedule: str, steps: Any) -> None:
    """Bit for bit, float64."""
    want, found = make(schedule=schedule, steps=steps)
    assert found.num_timesteps == want.num_timesteps
    for name in TABLES:
        table = getattr(found, name)
        assert isinstance(table, np.ndarray)
        assert table.dtype == np.float64
        np.testing.assert_array_equal(table, getattr(want, name), err_msg=name)
    if steps is not None:
        for name in ("timestep_map", "use_timesteps", "original_num_steps"):
            assert getattr(found, name) == getattr(want, name)


def test_timesteps() -> None:
    for T, counts in product((300, 1000, 7, 1), ("ddim25", "ddim7", "4", "1", "3,2", "2,1,4", [7], [5, 0, 2], "250")):
        results = []
        for module in (theirs.respace, respace):
            try:
                results.append(module.space_timesteps(T, counts))
            except ValueError:
                results.append(ValueError)
        assert results[0] == results[1], (T, counts)


@pytest.mark.parametrize("name", METHODS)
def test_signatures(name: str) -> None:
    """OpenAI's; its fork has more at the end."""
    want = inspect.signature(getattr(theirs.gaussian_diffusion.GaussianDiffusion, name)).parameters
    found = inspect.signature(getattr(ours.GaussianDiffusion, name)).parameters
    names = list(found)
    assert list(want)[: len(names)] == names
    for key in names:
        assert found[key].default == want[key].default
        assert found[key].kind == want[key].kind


def test_enums() -> None:
    for name in ("ModelMeanType", "ModelVarType", "LossType"):
        want, found = getattr(theirs.gaussian_diffusion, name), getattr(ours, name)
        assert {e.name: e.value for e in found} == {e.name: e.value for e in want}
    assert [e.is_vb() for e in ours.LossType] == [e.is_vb() for e in theirs.gaussian_diffusion.LossType]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_steps(mean: str, variance: str, dtype: torch.dtype) -> None:
    """Every option of every step, each sample at a time of its own."""
    pair, model = make(mean, variance), network(variance)
    x, t = state(dtype), torch.tensor([9, 0, 4, 1])
    for clip, denoised_fn, cond_fn in product((True, False), (None, change), (None, classifier)):
        options: dict[str, Any] = {
            "clip_denoised": clip,
            "denoised_fn": denoised_fn,
            "model_kwargs": {"y": torch.arange(4)},
        }
        guided = {**options, "cond_fn": cond_fn}
        runs = {
            "p": ("p_sample", guided),
            "ddim": ("ddim_sample", guided),
            "ddim eta": ("ddim_sample", {**guided, "eta": 0.6}),
        }
        if cond_fn is None:
            runs |= {"reverse": ("ddim_reverse_sample", options), "moments": ("p_mean_variance", options)}
        for kind, (method, arguments) in runs.items():
            want, found = both(pair, lambda d, name=method, given=arguments: getattr(d, name)(model, x, t, **given))
            assert list(found) == list(want)
            for key, value in want.items():
                if key == "pred_xstart" and kind.startswith("ddim") and cond_fn and guided_diffusion_oracle.is_fork():
                    continue  # compared in the next test
                if kind == "p" and cond_fn and dtype == torch.float64:
                    assert error(found[key], value) <= 1e-6  # the original rounds the mean to float32
                else:
                    close(found[key], value)


@pytest.mark.parametrize("mean", MEANS)
def test_conditional_ddim_returns_the_conditional_x0(mean: str) -> None:
    pair, model = make(mean, "LEARNED_RANGE"), network("LEARNED_RANGE")
    x, t = state(), torch.tensor([9, 0, 4, 1])
    want = pair[0].condition_score(classifier, pair[0].p_mean_variance(model, x, t), x, t, model_kwargs={})
    found = pair[1].ddim_sample(model, x, t, cond_fn=classifier)["pred_xstart"]
    close(found, want["pred_xstart"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_half_precision(mean: str, variance: str, dtype: torch.dtype) -> None:
    """The original's dtypes, and at least as close to float64 as it."""
    pair, model = make(mean, variance), network(variance)
    x, t = state(dtype), torch.tensor([9, 0, 4, 1])
    given = model(x, pair[0].timestep_map[0] * torch.ones(4)).double()  # one output for all precisions
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
    for clip, kind in product((True, False), ("p_sample", "ddim_sample", "p_mean_variance")):
        results = []
        for d, wide in ((pair[0], False), (pair[1], False), (pair[0], True)):
            target = torch.float64 if wide else dtype
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "randn_like", lambda x, target=target: z.to(target))
                results.append(getattr(d, kind)(lambda *args, to=target: given.to(to), x.to(target), t, clip))
        want, found, exact = results
        for key, value in want.items():
            assert found[key].dtype == value.dtype, (kind, key)
            assert error(found[key], exact[key]) <= error(value, exact[key]) + 5e-7, (kind, key)


@pytest.mark.parametrize(
    ("own", "of_model"),
    [(torch.float32, torch.float16), (torch.float32, torch.float64), (torch.float16, torch.float32)],
)
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_dtypes_that_differ(mean: str, variance: str, own: torch.dtype, of_model: torch.dtype) -> None:
    """A model under autocast, and its like: the original's dtypes, its numbers but for its roundings to half."""
    x, t = state(own), torch.tensor([9, 0, 4, 1])
    m = network(variance)(state(), t).to(of_model)
    limit = 5e-3 if torch.float16 in (own, of_model) else 2e-6
    for name, arguments in (("p_sample", (x, t)), ("ddim_sample", (x, t)), ("training_losses", (images(own), t))):
        pair = make(mean, variance, "RESCALED_MSE")
        z = state(own, seed=4)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn_like", lambda x, z=z: z.to(x.dtype))
            want, found = (getattr(d, name)(lambda *args: m, *arguments) for d in pair)
        for key, value in want.items():
            assert found[key].dtype == value.dtype, (name, key)
            assert error(found[key], value) <= limit, (name, key)


@pytest.mark.parametrize("options", [{}, {"clip_denoised": False}, {"denoised_fn": change}, {"cond_fn": classifier}])
@pytest.mark.parametrize("kind", ["p_sample", "ddim_sample", "ddim_sample eta"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_trajectories(variance: str, kind: str, options: dict[str, Any]) -> None:
    """Whole loops, each state compared; the model sees the same times."""
    name, *eta = kind.split()
    options = {**options, **({"eta": 0.7} if eta else {}), "model_kwargs": {"y": torch.arange(2)}, "device": "cpu"}
    pair = make("EPSILON", variance, steps="12")
    inner = network(variance)
    seen: list[list[Tensor]] = [[], []]

    for dtype in (torch.float32, torch.float64):
        guided_64 = dtype == torch.float64 and "cond_fn" in options and name == "p_sample"

        def run(d: Any, dtype: torch.dtype = dtype) -> list[Any]:
            times = seen[d is pair[1]] = []

            def model(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
                times.append(t)
                return inner(x, t, **kwargs)

            start = state(dtype, (2, 3, 4, 5)) if dtype == torch.float64 else None
            steps = getattr(d, f"{name}_loop_progressive")(model, (2, 3, 4, 5), noise=start, **options)
            return [out["sample"] for out in steps]

        want, found = both(pair, run)
        assert len(found) == len(want) == 12
        for i, (a, b) in enumerate(zip(found, want, strict=True)):
            if guided_64:
                assert error(a, b) <= 1e-6
            else:
                close(a, b, i + 1)
        for a, b in zip(*seen, strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
        last, whole = (getattr(d, f"{name}_loop") for d in pair), []
        for loop in last:
            torch.manual_seed(5)
            whole.append(loop(inner, [2, 3, 4, 5], noise=state(dtype, (2, 3, 4, 5)), **options))
        if not guided_64:
            close(whole[1], whole[0], 12)


@pytest.mark.parametrize("rescale", [True, False])
def test_without_respacing(rescale: bool) -> None:
    pair = make("EPSILON", "LEARNED_RANGE", steps=None, T=60, rescale=rescale, schedule="cosine")
    model = network("LEARNED_RANGE")
    run = lambda d: d.p_sample_loop(model, (2, 3, 4, 5), device="cpu", cond_fn=classifier, model_kwargs={})  # noqa: E731
    want, found = both(pair, run)
    close(found, want, 60)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_helpers(mean: str, variance: str, dtype: torch.dtype) -> None:
    pair, model = make(mean, variance), network(variance)
    x, y, t = state(dtype), state(dtype, seed=2), torch.tensor([9, 0, 4, 1])
    limit = {**STEP, torch.float16: 2e-6}
    moments = [d.p_mean_variance(model, x, t) for d in pair]
    calls: dict[str, Any] = {
        "q_sample": lambda d: [d.q_sample(x, t), d.q_sample(x, t, y), d.q_sample(x, t[:1], y), d.q_sample(x, t[0], y)],
        "q_mean_variance": lambda d: d.q_mean_variance(x, t),
        "q_posterior": lambda d: d.q_posterior_mean_variance(x, y, t),
        "from_eps": lambda d: [d._predict_xstart_from_eps(x, t, y)],
        "from_xprev": lambda d: [d._predict_xstart_from_xprev(x, t, y)],
        "to_eps": lambda d: [d._predict_eps_from_xstart(x, t, y)],
        "scale": lambda d: [d._scale_timesteps(t)],
        "score": lambda d: list(d.condition_score(classifier, moments[d is pair[1]], x, t, model_kwargs={}).values()),
    }
    if dtype != torch.float64:
        calls["mean"] = lambda d: [d.condition_mean(classifier, moments[d is pair[1]], x, t, model_kwargs={})]
    for name, call in calls.items():
        want, found = both(pair, call)
        for a, b in zip(found, want, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype), name
            # The original rounds a learned log-variance and a classifier's part to float16 on the way.
            coarse = dtype == torch.float16 and name in ("score", "mean")
            assert error(a, b) <= (2e-3 if coarse else limit[dtype]), name


@pytest.mark.parametrize("loss", ["MSE", "RESCALED_MSE", "KL", "RESCALED_KL"])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_training_losses(mean: str, variance: str, loss: str) -> None:
    """Every entry and its gradient, with timesteps 0 and above."""
    pair, inner = make(mean, variance, loss, "20", "cosine"), network(variance)
    t = torch.tensor([9, 0, 4, 19])
    for dtype in (torch.float32, torch.float64):
        x = images(dtype)

        def run(d: Any, dtype: torch.dtype = dtype, x: Tensor = x) -> dict[str, Tensor]:
            weight = torch.tensor([0.8, 0.1], dtype=dtype, requires_grad=True)

            def model(x: Tensor, t: Tensor, **kwargs: Any) -> Tensor:
                out = inner(x, t, **kwargs)
                return weight[0] * out + weight[1] * torch.cos(out)

            terms = d.training_losses(model, x, t, model_kwargs={"y": torch.arange(4)})
            found = {key: value.detach() for key, value in terms.items()}
            for key, value in terms.items():
                (found[f"gradient of {key}"],) = torch.autograd.grad(value.sum(), [weight], retain_graph=True)
            return found

        want, found = both(pair, run)
        assert set(found) == set(want)
        # A fixed variance's exponentials are float32 in the original, whatever the state.
        rounded = dtype == torch.float64 and not variance.startswith("LEARNED") and loss.endswith("KL")
        for key, value in want.items():
            assert found[key].dtype == value.dtype
            assert error(found[key], value) <= (2e-7 if rounded else STEP[dtype]), key


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("mean", MEANS)
def test_bits_per_dimension(mean: str, variance: str, clip: bool) -> None:
    pair, model = make(mean, variance, steps="8"), network(variance)
    for dtype in (torch.float32, torch.float64):
        x, t = images(dtype), torch.tensor([3, 0, 7, 1])
        want, found = both(pair, lambda d, x=x: d.calc_bpd_loop(model, x, clip_denoised=clip))
        assert set(found) == set(want)
        for key, value in want.items():
            assert (found[key].shape, found[key].dtype) == (value.shape, value.dtype)
            limit = 2e-6 if dtype == torch.float32 or variance.startswith("FIXED") else STEP[dtype]
            if key == "prior_bpd":  # a difference of numbers near 1, in float32
                torch.testing.assert_close(found[key], value, rtol=0, atol=1e-7)
            else:
                # The total has the prior in it.
                assert error(found[key], value) <= (max(limit, 1e-9) if key == "total_bpd" else limit), key
        x_t = state(dtype)
        want, found = both(
            pair,
            lambda d, x=x, x_t=x_t, t=t: d._vb_terms_bpd(model, x, x_t, t, clip, model_kwargs={"y": torch.arange(4)}),
        )
        assert error(found["output"], want["output"]) <= (2e-6 if dtype == torch.float32 else 2e-7)
        close(found["pred_xstart"], want["pred_xstart"])


def test_formulas() -> None:
    x, mean, other = images(), state(), state(seed=3)
    torch.testing.assert_close(
        losses.normal_kl(x, mean, other, 0.25), theirs.losses.normal_kl(x, mean, other, 0.25), rtol=1e-12, atol=1e-15
    )
    torch.testing.assert_close(
        losses.discretized_gaussian_log_likelihood(x, means=mean, log_scales=other - 2),
        theirs.losses.discretized_gaussian_log_likelihood(x, means=mean, log_scales=other - 2),
        rtol=1e-12,
        atol=1e-15,
    )
    table, t = np.linspace(0.0, 1.0, 7), torch.tensor([0, 6, 3])
    want = theirs.gaussian_diffusion._extract_into_tensor(table, t, (3, 2, 4))
    assert torch.equal(gaussian_diffusion._extract_into_tensor(table, t, (3, 2, 4)), want)


def test_enums_of_the_original() -> None:
    """Options that come from an imported guided_diffusion."""
    gd = theirs.gaussian_diffusion
    made = ours.GaussianDiffusion(
        betas=gd.get_named_beta_schedule("linear", 50),
        model_mean_type=gd.ModelMeanType.START_X,
        model_var_type=gd.ModelVarType.LEARNED_RANGE,
        loss_type=gd.LossType.RESCALED_MSE,
    )
    own = make("START_X", "LEARNED_RANGE", "RESCALED_MSE", None, T=50, rescale=False)[1]
    x, t, model = state(torch.float32), torch.tensor([3, 0, 20, 49]), network("LEARNED_RANGE")
    for call in (lambda d: d.p_sample(model, x, t)["sample"], lambda d: d.training_losses(model, x, t)["loss"]):
        want, found = both((own, made), call)
        assert torch.equal(found, want)
