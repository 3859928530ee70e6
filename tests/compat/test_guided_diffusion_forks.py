"""patch on packages that differ from guided-diffusion: what they compute otherwise stays theirs."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from helpers.guided_diffusion_patching import SHAPE, apart, cond_fn, module_with, net, run
from helpers.op_counter import CountOps, EveryOp
from mini_guided_diffusion import gaussian_diffusion, nn, respace, unet
from torch import Tensor

from diffkern.compat import guided_diffusion as ours
from diffkern.compat.guided_diffusion import patch, unpatch
from diffkern.compat.guided_diffusion._fit import fit


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    unpatch()


def test_attention_of_forks() -> None:
    class Cross(torch.nn.Module):
        """The legacy order under the other name, and an argument more (GLIDE)."""

        def __init__(self, n_heads: int) -> None:
            super().__init__()
            self.n_heads = n_heads

        def forward(self, qkv: Tensor, encoder_kv: Tensor | None = None) -> Tensor:
            out = unet.QKVAttentionLegacy.forward(self, qkv)
            return out if encoder_kv is None else out + encoder_kv

    class NoHeads(torch.nn.Module):
        """Heads folded into the batch (improved-diffusion)."""

        def forward(self, qkv: Tensor) -> Tensor:
            q, k, v = qkv.chunk(3, 1)
            return unet.attend(q, k, v)

    class Other(Cross):
        def forward(self, qkv: Tensor) -> Tensor:  # type: ignore[override]
            return 2 * super().forward(qkv)

    class Needy(torch.nn.Module):
        def __init__(self, a: int, b: int) -> None:
            super().__init__()

        def forward(self, qkv: Tensor) -> Tensor:
            return qkv

    x = torch.randn(2, 96, 7)
    layer, plain = Cross(4), NoHeads()
    want, folded = layer(x), plain(x.reshape(8, 24, 7))
    report = patch(module_with(QKVAttention=Cross, QKVAttentionLegacy=NoHeads))
    assert [change.note for change in report] == ["calls with encoder_kv run on the original", None]
    with EveryOp() as counted:
        assert apart(layer(x), want) <= 2e-6
        assert apart(plain(x.reshape(8, 24, 7)), folded) <= 2e-6
    assert counted.counts["diffkern.spatial_attention"] == 2
    assert apart(layer(x, encoder_kv=torch.ones(1)), want + 1) <= 2e-6
    unpatch()
    for other in (Other, Needy):
        (change,) = patch(module_with(QKVAttention=other))
        assert change.reason == "it computes something else on a few numbers, or fails on them"


def test_embeddings_of_forks() -> None:
    def swapped(timesteps: Tensor, dim: int, max_period: float = 10000) -> Tensor:
        return nn.timestep_embedding(timesteps, dim, max_period).flip(1)

    def repeated(timesteps: Tensor, dim: int, max_period: float = 10000, repeat_only: bool = False) -> Tensor:
        found = nn.timestep_embedding(timesteps, dim, max_period)
        return timesteps[:, None].expand(-1, dim) if repeat_only else found

    module = module_with(timestep_embedding=swapped)
    (change,) = patch(module)
    assert change.reason == "it computes something else on a few numbers, or fails on them"
    assert module.timestep_embedding is swapped
    module = module_with(timestep_embedding=repeated)
    (change,) = patch(module)
    assert change.note == "calls with repeat_only run on the original"
    t = torch.tensor([1.0, 2.0])
    assert torch.equal(module.timestep_embedding(t, 6), ours.timestep_embedding(t, 6))
    assert torch.equal(module.timestep_embedding(t, 6, repeat_only=True), repeated(t, 6, repeat_only=True))


LOOPS = ("p_sample_loop", "p_sample_loop_progressive")


def fork_of(**methods: Any) -> tuple[ModuleType, Any]:
    """A package in which these methods are others, inherited ones included, and its diffusion of 8 steps."""
    base = type("GaussianDiffusion", (gaussian_diffusion.GaussianDiffusion,), methods)

    class SpacedDiffusion(base):  # type: ignore[misc,valid-type]
        __init__ = respace.SpacedDiffusion.__init__
        _wrap_model = respace.SpacedDiffusion._wrap_model
        _scale_timesteps = respace.SpacedDiffusion._scale_timesteps

        def p_mean_variance(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            return super().p_mean_variance(self._wrap_model(model), *args, **kwargs)

        def condition_mean(self, cond_fn: Any, *args: Any, **kwargs: Any) -> Any:
            return super().condition_mean(self._wrap_model(cond_fn), *args, **kwargs)

    def init(self: Any, use_timesteps: Any, **kwargs: Any) -> None:
        self.use_timesteps, self.timestep_map = set(use_timesteps), sorted(use_timesteps)
        self.original_num_steps = len(kwargs["betas"])
        abar = base(**kwargs).alphas_cumprod[self.timestep_map]
        super(SpacedDiffusion, self).__init__(**{**kwargs, "betas": 1 - abar / np.append(1.0, abar[:-1])})

    SpacedDiffusion.__init__ = init
    made = SpacedDiffusion(range(0, 40, 5), betas=np.linspace(1e-3, 0.2, 40))
    return module_with(GaussianDiffusion=base, SpacedDiffusion=SpacedDiffusion), made


def half_mean(
    self: Any, model: Any, x: Any, t: Any, clip_denoised: Any = True, denoised_fn: Any = None, model_kwargs: Any = None
) -> Any:
    options = (clip_denoised, denoised_fn, model_kwargs)
    out = gaussian_diffusion.GaussianDiffusion.p_mean_variance(self, model, x, t, *options)
    return {**out, "mean": 0.5 * out["mean"]}


def less_guided(self: Any, cond_fn: Any, p_mean_var: Any, x: Tensor, t: Tensor, model_kwargs: Any = None) -> Any:
    moved = gaussian_diffusion.GaussianDiffusion.condition_mean(self, cond_fn, p_mean_var, x, t, model_kwargs)
    return 0.5 * (moved + p_mean_var["mean"])


def other_images(
    self: Any,
    model: Any,
    x: Tensor,
    t: Tensor,
    clip_denoised: bool = True,
    denoised_fn: Any = None,
    cond_fn: Any = None,
    model_kwargs: Any = None,
) -> Any:
    options = (clip_denoised, denoised_fn, cond_fn, model_kwargs)
    out = gaussian_diffusion.GaussianDiffusion.p_sample(self, model, x, t, *options)
    return {**out, "sample": out["sample"] * 0.9}


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize(
    ("methods", "kept", "noted"),
    [
        ({}, set(), set()),
        ({"p_mean_variance": half_mean}, {"p_mean_variance", "p_sample", *LOOPS}, set()),
        ({"condition_mean": less_guided}, {"condition_mean"}, {"p_sample"}),
        ({"p_sample": other_images}, {"p_sample", *LOOPS}, set()),
    ],
    ids=lambda value: "-".join(sorted(value)) or "none",  # a set has another order in every process
)
def test_formulas_of_forks(methods: dict[str, Any], kept: set[str], noted: set[str], guided: bool) -> None:
    """What a fork computes otherwise stays, and so do its images."""
    module, diffusion = fork_of(**methods)
    model = net()
    options: dict[str, Any] = {"cond_fn": cond_fn, "model_kwargs": {}} if guided else {}
    want, state = run(diffusion, model, **options)
    report = patch(module)
    found, state_found = run(diffusion, model, **options)
    assert apart(found, want) <= 2e-6 * 8
    assert torch.equal(state_found, state)
    names = {change.name.rpartition(".")[2]: change for change in report if "SpacedDiffusion" not in change.name}
    other = {
        name
        for name, change in names.items()
        if change.reason == "it computes something else on a few numbers, or fails on them"
    }
    assert other == kept
    assert {name for name in names if names[name].note == "calls with cond_fn run on the original"} == noted
    before = unpatch()
    assert len(before) < len(report)
    assert torch.equal(run(diffusion, model, **options)[0], want)


def test_steps_that_cannot_be_tried() -> None:
    """As in a motion diffusion model: its step needs an argument of its own."""

    def p_mean_variance(
        self: Any,
        model: Any,
        x: Any,
        t: Any,
        clip_denoised: Any = True,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
    ) -> Any:
        known = model_kwargs["y"]["known"]
        inner = lambda x, t: torch.where(known, 0.0, model(x, t))  # noqa: E731
        return gaussian_diffusion.GaussianDiffusion.p_mean_variance(self, inner, x, t, clip_denoised, denoised_fn)

    module, diffusion = fork_of(p_mean_variance=p_mean_variance)
    model, options = net(), {"model_kwargs": {"y": {"known": torch.rand(SHAPE) > 0.5}}}
    want, _ = run(diffusion, model, **options)
    report = patch(module)
    assert apart(run(diffusion, model, **options)[0], want) <= 2e-6 * 8
    names = {change.name.rpartition(".")[2]: change for change in report if "SpacedDiffusion" not in change.name}
    assert {name for name in names if "or fails on them" in (names[name].reason or "")} == {
        *("p_mean_variance", "p_sample"),
        *LOOPS,
    }
    assert names["q_sample"].replaced


def test_kinds_of_forks() -> None:
    """A kind of model that diffkern has not, and a class that is made in another way."""

    class ModelMeanType(enum.Enum):
        EPSILON = enum.auto()
        VELOCITY = enum.auto()

    def init(self: Any, *, betas: Any, model_mean_type: Any = ModelMeanType.VELOCITY) -> None: ...

    def made_otherwise(self: Any, steps: int) -> None: ...

    for own, reason in (
        (init, "it has ModelMeanType.VELOCITY, which diffkern has not"),
        (made_otherwise, "it cannot be tried: it is not made as guided_diffusion's"),
    ):
        names = {"ModelMeanType": ModelMeanType} if own is init else {}
        cls = type(
            "GaussianDiffusion",
            (gaussian_diffusion.GaussianDiffusion,),
            {"__init__": FunctionType(own.__code__, names, own.__name__)},
        )
        before = dict(vars(cls))
        (change,) = patch(module_with(GaussianDiffusion=cls))
        assert change.reason == reason
        assert dict(vars(cls)) == before


@pytest.mark.parametrize("factor", [1.0, 0.9])
def test_steps_without_cond_fn(factor: float) -> None:
    """As in improved-diffusion: no classifier, so that arguments stand elsewhere; the same step, and another one."""

    def p_sample(
        self: Any,
        model: Any,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
    ) -> Any:
        options = (clip_denoised, denoised_fn, None, model_kwargs)
        out = gaussian_diffusion.GaussianDiffusion.p_sample(self, model, x, t, *options)
        return {**out, "sample": out["sample"] * factor}

    def p_sample_loop_progressive(
        self: Any,
        model: Any,
        shape: Any,
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Any = None,
        model_kwargs: Any = None,
        device: Any = None,
        progress: bool = False,
    ) -> Any:
        x = torch.randn(*shape, device=device) if noise is None else noise
        for i in reversed(range(self.num_timesteps)):
            out = self.p_sample(model, x, torch.full((shape[0],), i), clip_denoised, denoised_fn, model_kwargs)
            yield out
            x = out["sample"]

    def p_sample_loop(self: Any, model: Any, shape: Any, **options: Any) -> Tensor:
        *_, last = self.p_sample_loop_progressive(model, shape, **options)
        return last["sample"]

    methods = (p_sample, p_sample_loop_progressive, p_sample_loop)
    module, diffusion = fork_of(**{method.__name__: method for method in methods})
    model = net()
    with torch.no_grad():
        want, state = run(diffusion, model, model_kwargs={"y": 3})
        report = patch(module)
        found, state_found = run(diffusion, model, model_kwargs={"y": 3})
    assert apart(found, want) <= 2e-6 * 8
    assert torch.equal(state_found, state)
    names = {change.name.rpartition(".")[2]: change for change in report if "SpacedDiffusion" not in change.name}
    assert names["p_sample"].replaced == (factor == 1.0)
    assert names["p_sample_loop_progressive"].replaced == (factor == 1.0)
    with CountOps(SHAPE) as counted:
        run(diffusion, lambda x, t: x)
    assert counted.fused["step"] == 8


def test_classes_that_stay() -> None:
    class GaussianDiffusion(torch.nn.Module):
        pass

    class SpacedDiffusion(GaussianDiffusion):
        pass

    report = patch(module_with(GaussianDiffusion=GaussianDiffusion, SpacedDiffusion=SpacedDiffusion))
    assert [change.reason for change in report] == [
        "it sets attributes in a way of its own",
        "the class that it is made of was not replaced",
    ]
    report = patch(module_with(GaussianDiffusion=ours.GaussianDiffusion, QKVAttention=ours.QKVAttention))
    assert {change.reason for change in report} == {"it is diffkern's already"}
    assert str(patch(ModuleType("empty"))) == "empty: nothing to replace"


def ours_of(x: int, a: int = 1, b: Any = None, c: str = "c") -> tuple[Any, ...]:
    return "ours", x, a, b, c


def test_fitted_arguments() -> None:
    assert fit(ours_of, ours_of) == (ours_of, None, None)

    def reordered(x: int, c: str = "see", a: int = 1) -> tuple[Any, ...]:
        return "theirs", x, c, a

    fitted, note, reason = fit(reordered, ours_of)
    assert (note, reason) == (None, None)
    assert fitted(1) == ("ours", 1, 1, None, "see")  # their default
    assert fitted(1, "z", 4) == fitted(x=1, a=4, c="z") == ("ours", 1, 4, None, "z")
    with pytest.raises(TypeError):
        fitted(1, b=2)

    def longer(x: int, a: int = 1, b: Any = None, c: str = "c", d: Any = None, e: float = 0.5) -> tuple[Any, ...]:
        return "theirs", x, a, b, c, d, e

    fitted, note, reason = fit(longer, ours_of)
    assert (note, reason) == ("calls with d, e run on the original", None)
    assert fitted(1, 2, 3, "4") == fitted(1, 2, 3, "4", None, 0.5) == ("ours", 1, 2, 3, "4")
    assert fitted(1, 2, 3, "4", 0)[0] == fitted(1, e=0)[0] == fitted(1, d=torch.ones(2))[0] == "theirs"
    fitted, note, _ = fit(ours_of, ours_of, {"b"})
    assert note == "calls with b run on the original"
    assert fitted(1, b=2) == ("ours", 1, 1, 2, "c")


def test_arguments_that_cannot_be_fitted() -> None:
    def open_ended(x: int, *args: Any) -> None: ...

    def needy(x: int, d: int) -> None: ...

    def less() -> None: ...

    assert fit(open_ended, ours_of)[2] == "its arguments are (x: 'int', *args: 'Any') -> 'None'"
    assert fit(needy, ours_of)[2] == "its arguments are (x: 'int', d: 'int') -> 'None', which leaves d open"
    assert "which leaves x open" in str(fit(less, ours_of)[2])
