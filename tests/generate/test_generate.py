"""Many images one micro-batch after the other: the same bits in every cut of a job, and one sentence for bad input."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from helpers.generate_cases import Elementwise, elementwise, in_turn, small_unet
from helpers.suites import few
from torch import Tensor

import diffkern
from diffkern import ops
from diffkern.generate import DEFAULT_STEPS, described, generate, recommended
from diffkern.generate.images import cuts


def images(diffusion: diffkern.Diffusion, n: int, *arguments: Any, **options: Any) -> Tensor:
    return torch.cat([part.images for part in generate(diffusion, n, *arguments, **options)])


# ------------------------------------------------------------------------------------------------------------- the bits
def test_cuts_are_at_multiples_of_the_size() -> None:
    assert cuts(10, 0, 4) == [range(4), range(4, 8), range(8, 10)]
    assert cuts(7, 6, 4) == [range(6, 8), range(8, 12), range(12, 13)]
    assert cuts(2, 5, 4) == [range(5, 7)]
    assert cuts(4, 4, 4) == [range(4, 8)]


def test_images_are_the_models_samples_of_their_seeds() -> None:
    diffusion = small_unet()
    plan = recommended(diffusion, "ddim", 3)
    parts = list(generate(diffusion, 5, "ddim", 3, seed=7, first=3, classes=[2, 0, 1, 1, 2], micro_batch=4))
    assert [(part.first, len(part.images)) for part in parts] == [(3, 1), (4, 4)]
    for part in parts:
        asked = part.classes
        assert asked is not None
        expected = diffusion.sample(len(asked), plan, seeds=ops.seeds(7, len(asked), part.first), cond=asked)
        assert torch.equal(part.images, expected)
    assert torch.cat([part.classes for part in parts if part.classes is not None]).tolist() == [2, 0, 1, 1, 2]


def test_an_image_has_its_bits_in_every_cut_at_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    diffusion = small_unet()
    job: dict[str, Any] = {"seed": 1, "micro_batch": 2, "guidance": 2.0}
    whole = images(diffusion, 9, "dpmpp_2m", 3, classes="even", **job)
    later = images(diffusion, 5, "dpmpp_2m", 3, classes="even", first=4, **job)
    assert torch.equal(later, whole[4:])
    assert not torch.equal(whole[0], whole[3]), "one class, two noises"
    for world in (1, 2, 4, 7):
        ranks = in_turn(monkeypatch, world, lambda: list(generate(diffusion, 9, "dpmpp_2m", 3, classes="even", **job)))
        assert torch.equal(torch.cat([part.images for parts in ranks for part in parts]), whole)
        assert [part.first for parts in ranks for part in parts] == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("sampler", few(DEFAULT_STEPS, "ddpm", "heun", "dpmpp_2m_sde"))
def test_noise_and_updates_do_not_know_the_micro_batch(sampler: Any) -> None:
    diffusion = elementwise(diffkern.vp() if sampler == "flow_sde" else None)
    classes = torch.arange(7)
    whole = images(diffusion, 7, sampler, 4, seed=3, classes=classes, micro_batch=7)
    for micro_batch in (1, 3):
        assert torch.equal(images(diffusion, 7, sampler, 4, seed=3, classes=classes, micro_batch=micro_batch), whole)
    assert torch.equal(images(diffusion, 2, sampler, 4, seed=3, first=5, classes=classes[5:]), whole[5:])


def test_even_classes_go_round_with_the_numbers_of_the_images() -> None:
    parts = list(generate(small_unet(), 7, "ddim", 1, first=4, classes="even", micro_batch=4))
    assert [part.classes.tolist() for part in parts if part.classes is not None] == [[1, 2, 0, 1], [2, 0, 1]]
    assert next(generate(small_unet(), 1, "ddim", 1)).classes is None


def test_guidance_is_towards_the_class_from_the_models_null() -> None:
    """The first row of DDIM to sigma = 0 is its x0, linear in m = u + w (c - u) where nothing is clipped."""
    diffusion = small_unet()
    none, one, two = (
        images(diffusion, 2, "ddim", 1, classes=[0, 2], guidance=w, clip=None, micro_batch=2) for w in (0.0, 1.0, 2.0)
    )
    assert torch.equal(one, images(diffusion, 2, "ddim", 1, classes=[0, 2], clip=None, micro_batch=2))
    assert torch.equal(none, images(diffusion, 2, "ddim", 1, clip=None, micro_batch=2))
    torch.testing.assert_close(two, none + 2.0 * (one - none), rtol=1e-4, atol=1e-4)


def test_a_learned_variance_is_used_and_left_alone_where_there_is_guidance() -> None:
    diffusion = diffkern.Diffusion(
        small_unet(learned_variance=True).model, diffkern.cosine(100), "eps", learned_variance=True
    )
    assert recommended(diffusion).learned_variance
    first = images(diffusion, 2, None, 2, classes="even")
    assert torch.equal(first, images(diffusion, 2, "ddpm", 2, classes="even"))
    guided = images(diffusion, 2, None, 2, classes="even", guidance=2.0)
    assert torch.equal(guided, images(diffusion, 2, "ddim", 2, classes="even", guidance=2.0))
    with pytest.raises(ValueError, match=r"guidance must go with a sampler that learns no variance, .* got ddpm"):
        generate(diffusion, 2, "ddpm", 2, classes="even", guidance=2.0)


def test_images_are_made_when_they_are_asked_for_and_not_kept() -> None:
    diffusion, calls = elementwise(), []
    diffusion.model.register_forward_hook(lambda *_: calls.append(None))
    parts = generate(diffusion, 6, "ddim", 3, micro_batch=2)
    assert not calls
    seen = weakref.ref(next(parts).images)
    assert len(calls) == 3
    next(parts)
    assert seen() is None
    assert len(calls) == 6


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"n": 0}, "n must be an integer of at least 1, got 0"),
        ({"micro_batch": 0}, r"micro_batch must be an integer in 1\.\.2\*\*31 - 1, got 0"),
        ({"first": -1}, r"first must be an integer in 0\.\.2\*\*63 - 1 - 4, got -1"),
        ({"first": 2**63 - 3}, r"first must be an integer in 0\.\.2\*\*63 - 1 - 4, got 9223372036854775805"),
        ({"seed": 2**64}, "seed must be an integer of 64 bits, got 18446744073709551616"),
        ({"classes": [0, 1, 2, 3]}, r"classes must lie in 0\.\.2, got 3"),
        ({"classes": [0, 1]}, r"classes must be int64 \[4\], one an image, got torch.int64 \[2\]"),
        ({"classes": torch.zeros(4)}, r"classes must be int64 \[4\], one an image, got torch.float32 \[4\]"),
        ({"classes": "all"}, r"classes must be int64 \[n\], 'even' or None, got 'all'"),
        ({"guidance": 2.0}, "guidance must go with classes, got guidance=2.0 without them"),
        ({"classes": "even", "guidance": float("nan")}, "guidance must be finite, got nan"),
        ({"sampler": "dimm"}, "sampler must be one of ddpm, ddim"),
        ({"sampler": "ddim_inversion", "steps": 2}, "sampler must start from noise, got ddim_inversion"),
        ({"steps": 0}, r"steps must be an integer in 1\.\.100000, got 0"),
        ({"progress": 3}, "progress must be True, False or the label of a bar, got int"),
    ],
)
def test_bad_jobs_are_one_sentence_at_the_call(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        generate(small_unet(), **{"n": 4, "sampler": "ddim", **options})
    assert "\n" not in str(caught.value)


def test_a_network_that_does_not_say_its_shape_or_classes() -> None:
    silent = diffkern.Diffusion(Elementwise(), diffkern.cosine(100))
    with pytest.raises(ValueError, match=r"must know the shape of its images, got none: Diffusion\(\.\.\., shape="):
        generate(silent, 4)
    with pytest.raises(ValueError, match="where the network does not say how many, got 'even'"):
        generate(elementwise(), 4, classes="even")


# ------------------------------------------------------------------------------------------------------------ the plans
def test_plans_of_a_table_have_their_steps_and_keep_x0_in_range() -> None:
    diffusion = elementwise(diffkern.cosine())
    for sampler in DEFAULT_STEPS.keys() - {"flow_sde"}:  # which wants continuous time
        plan = recommended(diffusion, sampler)  # type: ignore[arg-type]
        assert len(plan.steps) == DEFAULT_STEPS[sampler]
        assert {row.clip for row in plan.rows if row.calls_model} == {1.0}, sampler
    assert recommended(diffusion, "ddim", 10).rows[0].time == 999
    assert recommended(diffusion, "heun", 10).model_calls == 19
    assert recommended(diffusion, "euler", 10).init_scale == pytest.approx(80.0)
    assert recommended(elementwise(diffkern.linear(50)), "euler", 10).init_scale < 80.0  # its noise ends earlier
    assert len(recommended(elementwise(diffkern.linear(20)), "ddpm").steps) == 20
    assert not recommended(diffusion, "ddim", 10, eta=1.0).deterministic
    assert recommended(diffusion) == recommended(diffusion, "ddim", 50)


def test_what_is_asked_for_is_not_replaced() -> None:
    diffusion = elementwise(diffkern.cosine())
    assert recommended(diffusion, "ddim", 4, clip=None).rows[0].clip == float("inf")
    asked = diffusion.plan("euler", sigmas=[3.0, 1.0, 0.0], clip=1.0)
    assert recommended(diffusion, "euler", sigmas=[3.0, 1.0, 0.0]) == asked
    assert recommended(diffusion, "ddim", 5, spacing="leading") == diffusion.plan(
        "ddim", 5, spacing="leading", clip=1.0
    )
    assert recommended(diffusion, asked) is asked
    own = recommended(elementwise(diffkern.edm()), "heun", 18)  # EDM's levels are its own
    assert own == elementwise(diffkern.edm()).plan("heun", 18, clip=1.0)
    assert recommended(elementwise(diffkern.edm())).name == "heun"
    with pytest.raises(TypeError, match="eat"):
        recommended(diffusion, "ddim", eat=1.0)


def test_a_plan_in_words() -> None:
    plan = recommended(elementwise(diffkern.cosine()), "heun", 10)
    assert described(plan) == "heun, 10 steps, 19 model calls"
    assert described(plan, 1.5) == "heun, 10 steps, 19 model calls, guidance 1.5"
