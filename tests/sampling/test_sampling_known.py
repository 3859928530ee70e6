"""What a network knows of a run beforehand: the same bits as without, computed once, and never stale."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.op_cases import same_bits
from helpers.op_counter import CountOps, EveryOp
from torch import Tensor, nn

import diffkern
from diffkern import guidance
from diffkern.nn import DiT, DiTConfig, UNet, UNetConfig

SCHEDULE = diffkern.linear()
B, STEPS = 2, 4


def network(seed: int = 0, **options: Any) -> UNet:
    """Small, and no weight of it is zero."""
    given: dict[str, Any] = {
        "channels": 8,
        "multipliers": (1, 2),
        "blocks": 1,
        "groups": 4,
        "attention_levels": (),
        "heads": 2,
    }
    torch.manual_seed(seed)
    made = UNet(UNetConfig(**{**given, **options}))
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.2)
    return made.eval()


TEXT = {"attention_levels": (1,), "transformer_depth": 1, "context_channels": 6}
CONTEXT = torch.randn(2, B, 5, 6, generator=torch.Generator().manual_seed(1))
PLAIN, CLASSED, WRITTEN = network(), network(classes=3), network(**TEXT)
TEXTS = {"context": CONTEXT[0]}, {"context": CONTEXT[1]}
CLASSES = torch.tensor([2, 0]), torch.tensor([3, 3])


def start(model: Any, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, model.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype)


def run(model: Callable[..., Tensor], x: Tensor, plan: Any, **options: Any) -> Tensor:
    made = diffkern.sample(model, x, plan, seeds=5, **options)
    return made if isinstance(made, Tensor) else made.trajectory


def check(model: Callable[..., Tensor], x: Tensor, plan: Any, **options: Any) -> Tensor:
    """The same bits with and without; what the network knows is made less often with."""
    found = [run(model, x, plan, **options, prepare=prepare) for prepare in (True, False)]
    assert found[0].isfinite().all()
    assert same_bits(*found)
    return found[0]


def products(model: Callable[..., Tensor], x: Tensor, plan: Any, **options: Any) -> int:
    with CountOps(()) as count:
        run(model, x, plan, **options)
    return count.fused["linear_rows"]


# --------------------------------------------------------------------------------------------------------- the bits
@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m", "heun", "unipc", "dpmpp_2s"])
def test_samplers(name: str) -> None:
    plan = getattr(diffkern, name)(SCHEDULE, STEPS)
    check(PLAIN, start(PLAIN), plan)
    check(CLASSED, start(CLASSED), plan, cond=CLASSES[0], uncond=CLASSES[1], guidance=3.0)


def test_guidance_that_is_one_or_none_in_some_steps() -> None:
    """Batches of one and of two conditions in one run."""
    options = {"cond": CLASSES[0], "uncond": CLASSES[1], "guidance": [1.0, 2.5, 0.0, 2.5]}
    check(CLASSED, start(CLASSED), diffkern.ddim(SCHEDULE, STEPS), **options)


def test_classifier_free_guidance_with_a_context() -> None:
    guided = guidance.classifier_free(WRITTEN, *TEXTS, 4.0, rescale=0.5)
    got = check(guided, start(WRITTEN), diffkern.ddim(SCHEDULE, STEPS))
    apart = guidance.classifier_free(WRITTEN, *TEXTS, 4.0, rescale=0.5, batched=False)
    torch.testing.assert_close(check(apart, start(WRITTEN), diffkern.ddim(SCHEDULE, STEPS)), got, rtol=1e-3, atol=1e-3)
    check(guided, start(WRITTEN), diffkern.dpmpp_2m(SCHEDULE, STEPS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_options_of_a_run(dtype: torch.dtype) -> None:
    model = network(classes=3, modulation="add").to(dtype)
    x, plan = start(model, dtype), diffkern.ddpm(SCHEDULE, STEPS)
    check(model, x, plan, cond=CLASSES[0], trajectory=True)
    check(model, x, plan, cond={"class": CLASSES[0]}, start=2)
    check(model, x, plan, start=torch.tensor([0, 2]))
    check(model, x, plan, mask=(x[:, :1] > 0), known=x)


@pytest.mark.parametrize(
    "options",
    [
        {"time_embedding": "fourier"},
        {"classes": 3, "class_place": "before", "class_bias": True},
        {"block": "convnext", "resample": "conv"},
        {"vector_channels": 5, "ids": 2, "id_channels": 4},
        {"augment_channels": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_networks(options: dict[str, Any]) -> None:
    model = network(**options)
    values = torch.Generator().manual_seed(4)
    cond: dict[str, Tensor] = {"class": CLASSES[0]} if "classes" in options else {}
    if "vector_channels" in options:
        cond = {"vector": torch.randn(B, 5, generator=values), "ids": torch.rand(B, 2, generator=values)}
    if "augment_channels" in options:
        cond = {"augment": torch.randn(B, 3, generator=values)}
    check(model, start(model), diffkern.ddim(SCHEDULE, STEPS), cond=cond or None)


@pytest.mark.parametrize("own", [False, True])
def test_a_transformer(own: bool) -> None:
    torch.manual_seed(0)
    config = DiTConfig(image_size=8, in_channels=3, patch=4, width=16, depth=2, heads=2, classes=3, own_embeddings=own)
    model = DiT(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    options = {"cond": CLASSES[0], "uncond": CLASSES[1], "guidance": 2.0}
    plan = diffkern.ddim(SCHEDULE, STEPS)
    check(model, start(model), plan, **options)
    assert products(model, start(model), plan, **options) * STEPS == products(
        model, start(model), plan, **options, prepare=False
    )


def test_a_batch_has_the_bits_of_its_samples_modulations() -> None:
    with torch.no_grad():
        whole = CLASSED.changes(torch.tensor([7.0, 900.0]), {"class": CLASSES[0]}, 2)
        alone = CLASSED.changes(torch.tensor([900.0]), {"class": CLASSES[0][1:]}, 1)
    assert all(same_bits(w[1:], a) for w, a in zip(whole, alone, strict=True))


def test_rows_beyond_what_is_kept_come_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = diffkern.ddim(SCHEDULE, 7)
    whole, layers = products(PLAIN, start(PLAIN), plan), len(PLAIN.changes(torch.zeros(1), None, 1)) + 2
    assert whole == layers
    monkeypatch.setattr("diffkern.nn.rows.MOST", 3 * PLAIN.change_width)
    assert products(PLAIN, start(PLAIN), plan) == 3 * layers
    check(PLAIN, start(PLAIN), plan)


# ------------------------------------------------------------------------------------------------------------- once
def test_every_layer_of_the_time_runs_once_a_run() -> None:
    layers = len(CLASSED.changes(torch.zeros(1), None, 1)) + 2
    x, plan = start(CLASSED), diffkern.heun(SCHEDULE, STEPS)
    calls = sum(row.calls_model for row in plan.rows)
    options = {"cond": CLASSES[0], "uncond": CLASSES[1], "guidance": 2.0}
    assert products(CLASSED, x, plan, **options) == layers
    assert products(CLASSED, x, plan, **options, prepare=False) == layers * calls > layers


def test_keys_and_values_of_the_context_are_made_once() -> None:
    guided = guidance.classifier_free(WRITTEN, *TEXTS, 4.0)
    counts = []
    for prepare in (True, False):
        with EveryOp() as every:
            run(guided, start(WRITTEN), diffkern.ddim(SCHEDULE, STEPS), prepare=prepare)
        counts.append(sum(n for name, n in every.counts.items() if name in ("aten.mm", "aten.addmm", "aten.bmm")))
    layers = len(WRITTEN.contexts(TEXTS[0], B))
    assert layers > 0
    assert counts[1] - counts[0] == layers * (STEPS - 1)


def test_diffusion_samples_so_too() -> None:
    diffusion = diffkern.Diffusion(CLASSED, SCHEDULE, "eps")
    found = [diffusion.sample(B, "ddim", 3, seeds=0, cond=CLASSES[0], guidance=2.0, prepare=p) for p in (True, False)]
    assert same_bits(*found)
    with CountOps(()) as count:
        diffusion.sample(B, "ddim", 3, seeds=0, cond=CLASSES[0], guidance=2.0)
    assert count.fused["linear_rows"] == len(CLASSED.changes(torch.zeros(1), None, 1)) + 2


# ------------------------------------------------------------------------------------------------------- never stale
def changed(change: Callable[[UNet, int], None]) -> None:
    """A callback that changes the network after the second step has its effect, with and without."""
    found = []
    for prepare in (True, False):
        model = network(classes=3)
        x = start(model)

        def callback(info: Any, model: UNet = model) -> None:
            change(model, info["i"])

        plan = diffkern.ddim(SCHEDULE, STEPS)
        found.append(run(model, x, plan, cond=CLASSES[0], callback=callback, prepare=prepare))
    assert same_bits(*found)
    model = network(classes=3)
    assert not torch.equal(found[0], run(model, start(model), plan, cond=CLASSES[0]))


def test_weights_that_a_callback_changes() -> None:
    def written(model: UNet, i: int) -> None:
        if i == 1:
            with torch.no_grad():
                model.time[0].weight.mul_(2.0)

    def replaced(model: UNet, i: int) -> None:
        if i == 1:
            model.time[2].bias = nn.Parameter(torch.ones_like(model.time[2].bias))

    def loaded(model: UNet, i: int) -> None:
        if i == 1:
            model.load_state_dict(network(7, classes=3).state_dict())

    def by_data(model: UNet, i: int) -> None:
        if i == 1:
            model.classes.weight.data = 3 * model.classes.weight.data

    for change in (written, replaced, loaded, by_data):
        changed(change)


def test_options_that_a_callback_changes() -> None:
    def configured(model: UNet, i: int) -> None:
        if i == 1:
            model.config = dataclasses.replace(model.config, time_scale=3.0)

    def restricted(model: UNet, i: int) -> None:
        if i == 1:
            assert model.classes is not None
            model.classes.max_norm = 0.1

    def longer(model: UNet, i: int) -> None:
        if i == 1:
            model.time.append(nn.Tanh())

    def biased(model: UNet, i: int) -> None:
        layer: Any = model.down[0].blocks[0].block.modulate
        if i <= 1:
            layer.bias = nn.Parameter(torch.ones(layer.out_features)) if i == 1 else None

    for change in (configured, restricted, longer, biased):
        changed(change)
    found = []
    for prepare in (True, False):
        model = network(time_embedding="fourier")

        def reordered(info: Any, model: UNet = model) -> None:
            if info["i"] == 1:
                model.fourier.sin_first = True

        found.append(run(model, start(model), diffkern.ddim(SCHEDULE, STEPS), callback=reordered, prepare=prepare))
    assert same_bits(*found)
    assert not torch.equal(
        found[0], run(network(time_embedding="fourier"), start(model), diffkern.ddim(SCHEDULE, STEPS))
    )


@pytest.mark.parametrize("name", ["time_scale", "network"])
def test_what_a_callback_changes_of_a_diffusion(name: str) -> None:
    found = []
    for prepare in (True, False):
        diffusion = diffkern.Diffusion(CLASSED, SCHEDULE, "eps")
        value = 2.0 if name == "time_scale" else lambda x, t, cond=None: 0.5 * x

        def callback(info: Any, diffusion: Any = diffusion, value: Any = value) -> None:
            if info["i"] == 1:
                setattr(diffusion, name, value)

        made = diffusion.sample(B, "ddim", STEPS, seeds=0, cond=CLASSES[0], callback=callback, prepare=prepare)
        found.append(made)
    assert same_bits(*found)
    plain = diffkern.Diffusion(CLASSED, SCHEDULE, "eps").sample(B, "ddim", STEPS, seeds=0, cond=CLASSES[0])
    assert not torch.equal(found[0], plain)


def test_hooks_are_called_at_every_evaluation() -> None:
    plan = diffkern.ddim(SCHEDULE, STEPS)
    for place in (lambda m: m, lambda m: m.time, lambda m: m.time[2], lambda m: m.down[0].blocks[0].block.modulate):
        model, calls = network(), []
        place(model).register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        check(model, start(model), plan)
        assert len(calls) == 2 * STEPS
    found = []
    for prepare in (True, False):  # one that comes in the middle
        model, late = network(), []

        def callback(info: Any, model: UNet = model, late: list[int] = late) -> None:
            if info["i"] == 1:
                model.time[0].register_forward_hook(lambda m, i, out: (late.append(1), 2 * out)[1])

        found.append(run(model, start(model), plan, callback=callback, prepare=prepare))
        assert len(late) == STEPS - 2
    assert same_bits(*found)


class Louder(UNet):
    def forward(self, x: Tensor, t: Tensor, cond: Any = None) -> Tensor:
        return 2 * super().forward(x, t, cond)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_what_is_more_than_a_network_of_ours_is_called_as_it_is() -> None:
    plan = diffkern.ddim(SCHEDULE, STEPS)
    plain = run(PLAIN, start(PLAIN), plan)
    louder = Louder(PLAIN.config)
    louder.load_state_dict(PLAIN.state_dict())
    replaced, replaced_layer = network(), network()
    forward = replaced.forward
    replaced.forward = lambda *args: 2 * forward(*args)  # type: ignore[method-assign]
    other = Scaled(*replaced_layer.time[0].weight.shape[::-1])
    other.load_state_dict(replaced_layer.time[0].state_dict())
    replaced_layer.time[0] = other
    for model in (louder, replaced, replaced_layer):
        assert not torch.equal(check(model, start(PLAIN), plan), plain)
    for wrapped in (lambda x, t: PLAIN(x, t), nn.DataParallel(PLAIN), guidance.classifier_free(PLAIN, None, None, 1.0)):
        assert torch.equal(check(wrapped, start(PLAIN), plan), plain)


@pytest.mark.full
def test_a_compiled_network_runs_compiled() -> None:
    calls = []

    def backend(graph: Any, _: Any) -> Any:
        return lambda *args: (calls.append(1), graph(*args))[1]

    model = network()
    compiled = torch.compile(model, backend=backend)
    run(compiled, start(model), diffkern.ddim(SCHEDULE, 2))
    assert len(calls) >= 2


def test_a_condition_that_is_written_to() -> None:
    found = []
    for prepare in (True, False):
        context = CONTEXT[0].clone()

        def callback(info: Any, context: Tensor = context) -> None:
            context.mul_(1.5)

        plan = diffkern.ddim(SCHEDULE, STEPS)
        cond = {"context": context}
        found.append(run(WRITTEN, start(WRITTEN), plan, cond=cond, callback=callback, prepare=prepare))
    assert same_bits(*found)
    assert not torch.equal(found[0], run(WRITTEN, start(WRITTEN), plan, cond=TEXTS[0]))


def test_autocast_and_inference_mode() -> None:
    plan = diffkern.ddim(SCHEDULE, STEPS)
    with torch.autocast("cpu", torch.bfloat16):
        cast = check(WRITTEN, start(WRITTEN), plan, cond=TEXTS[0])
    assert not torch.equal(cast, check(WRITTEN, start(WRITTEN), plan, cond=TEXTS[0]))
    with torch.inference_mode():
        model, context = network(**TEXT), CONTEXT[0].clone()
        check(model, start(model), plan, cond={"context": context})


def test_training_mode_draws_what_it_drew() -> None:
    model, found = network(dropout=0.5).train(), []
    for prepare in (True, False):
        torch.manual_seed(0)
        found.append(run(model, start(model), diffkern.ddim(SCHEDULE, STEPS), prepare=prepare))
    assert same_bits(*found)


def test_a_wrong_condition_says_what_it_says_without() -> None:
    plan = diffkern.ddim(SCHEDULE, STEPS)
    bad = [{"cond": torch.tensor([0, 9])}, {"cond": torch.tensor([0, 1, 2])}, {"cond": {"context": CONTEXT[0]}}]
    for options in bad:
        said = []
        for prepare in (True, False):
            with pytest.raises(ValueError, match=r"cond|context") as caught:
                run(CLASSED, start(CLASSED), plan, **options, prepare=prepare)
            said.append(str(caught.value))
        assert said[0] == said[1]
