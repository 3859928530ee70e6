"""accelerate and restore on pipelines with random weights, and the examples that show them."""

from __future__ import annotations

import copy
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.lazy import Lazy, exported, needs
from helpers.op_counter import CountOps
from torch import Tensor, nn

pytestmark = needs("diffusers")
diffusers, ours = Lazy("diffusers"), Lazy("diffkern.compat.diffusers")
processors = Lazy("diffusers.models.attention_processor")
OURS = [name for name in exported("diffkern.compat.diffusers") if name.endswith("Scheduler")]


@pytest.fixture(scope="module")
def examples(root: Path) -> Any:
    """The examples' modules by name."""
    sys.path.insert(0, str(root / "examples"))
    try:
        yield {
            name: runpy.run_path(str(root / "examples" / f"{name}.py"))
            for name in ("diffusers_ddpm", "diffusers_latent")
        }
    finally:
        sys.path.remove(str(root / "examples"))


@pytest.fixture
def latent(examples: Any) -> Any:
    return examples["diffusers_latent"]["make"]()


def run(pipe: Any, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    prompt, negative = torch.randn(2, 1, 7, 32, generator=generator).unbind()
    return pipe(prompt, negative, 3, size=32, **options)


def contents(pipe: Any) -> list[Any]:
    """The very schedulers and processors of a pipeline."""
    models = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return [
        pipe.scheduler,
        *(layer.get_processor() for m in models for layer in m.modules() if hasattr(layer, "heads")),
    ]


def test_a_pipeline_gives_the_same_image(latent: Any) -> None:
    before, there = run(latent), contents(latent)
    report = ours.accelerate(latent)
    with CountOps((1, 4, 4, 4)) as count:
        after = run(latent)
    assert len(report.swapped) == len(report) == len(there) == 17
    assert count.fused["attention"] == 3 * 14 + 1
    assert count.fused["step"] == 3 * 2  # scale_model_input and step
    assert (after - before).abs().max() < 1e-4 * before.abs().max()
    assert not torch.equal(after, before)
    assert type(latent.scheduler) is ours.EulerDiscreteScheduler
    assert not report.fallbacks
    assert len(ours.restore(latent).swapped) == 17
    assert all(a is b for a, b in zip(contents(latent), there, strict=True))
    assert torch.equal(run(latent), before)


def test_an_unconditional_pipeline(examples: Any) -> None:
    module = examples["diffusers_ddpm"]
    pipe = module["make"](16)
    if "DDPMScheduler" not in OURS:
        pipe.scheduler = diffusers.DDIMScheduler()
    before = module["sample"](pipe, 2, 4)
    report = ours.accelerate(pipe)
    assert not report.kept
    assert {swap.component for swap in report} == {"unet", "scheduler"}
    assert (module["sample"](pipe, 2, 4) - before).abs().max() < 1e-4
    ours.restore(pipe)
    assert torch.equal(module["sample"](pipe, 2, 4), before)


@pytest.mark.parametrize("name", OURS)
def test_every_scheduler_is_swapped_with_its_state(name: str) -> None:
    original = getattr(diffusers, name)()
    original.set_timesteps(7)
    pipe = diffusers.DDPMPipeline(
        diffusers.UNet2DModel(
            block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
        ),
        original,
    )
    report = ours.accelerate(pipe, rng="counter", exact=True)
    new = pipe.scheduler
    assert type(new) is getattr(ours, name)
    assert [(s.before.split(".")[0], s.after.split(".")[0]) for s in report.swapped if s.layer is None] == [
        ("diffusers", "diffkern")
    ]
    assert new.config == original.config
    assert torch.equal(new.timesteps, original.timesteps)
    assert new._engine.rng == "counter"
    assert new._engine.exact is True
    new.set_timesteps(3)
    assert len(original.timesteps) >= 7, "the original's state is its own"
    ours.restore(pipe)
    assert pipe.scheduler is original


def test_a_saved_pipeline_loads_without_diffkern(latent: Any, tmp_path: Path) -> None:
    ours.accelerate(latent)
    latent.save_pretrained(tmp_path)
    assert "diffkern" not in (tmp_path / "model_index.json").read_text()
    loaded = type(latent).from_pretrained(tmp_path)
    assert type(loaded.scheduler) is diffusers.EulerDiscreteScheduler
    assert all(type(p) is processors.AttnProcessor2_0 for p in loaded.unet.attn_processors.values())
    assert torch.equal(run(loaded), run(restored(latent)))


def test_a_scheduler_put_there_by_hand_is_saved_and_loaded(latent: Any, tmp_path: Path) -> None:
    """The pipeline's file names diffkern's class: it loads where diffkern is installed."""
    latent.scheduler = ours.DDIMScheduler(clip_sample=False)
    latent.save_pretrained(tmp_path)
    loaded = type(latent).from_pretrained(tmp_path)
    assert type(loaded.scheduler) is ours.DDIMScheduler
    assert loaded.scheduler.config.clip_sample is False
    for name in OURS:  # where diffusers looks when it loads
        module = sys.modules[getattr(ours, name).__module__]
        assert module.SchedulerMixin is diffusers.SchedulerMixin


def restored(pipe: Any) -> Any:
    ours.restore(pipe)
    return pipe


def test_twice_is_once_and_restore_without_it_does_nothing(latent: Any) -> None:
    there = contents(latent)
    assert not ours.restore(latent)
    ours.accelerate(latent)
    again = ours.accelerate(latent)
    assert not again.swapped
    assert {swap.reason for swap in again} == {"it is diffkern's already"}
    ours.restore(latent)
    assert all(a is b for a, b in zip(contents(latent), there, strict=True))


def test_parts_can_be_chosen(latent: Any) -> None:
    assert {swap.component for swap in ours.accelerate(latent, attention=False)} == {"scheduler"}
    assert {swap.component for swap in ours.accelerate(latent, schedulers=False)} == {"unet", "vae"}
    ours.restore(latent)
    report = ours.accelerate(latent.unet)
    assert len(report.swapped) == 14
    assert {swap.component for swap in report} == {"UNet2DConditionModel"}
    assert len(ours.restore(latent.unet).swapped) == 14


def test_what_stays_says_why(latent: Any) -> None:
    class Mine(diffusers.EulerDiscreteScheduler):
        pass

    class MyProcessor(processors.AttnProcessor2_0):
        pass

    names = list(latent.unet.attn_processors)
    latent.unet.set_attn_processor(
        {name: MyProcessor() if i == 0 else processors.AttnProcessor2_0() for i, name in enumerate(names)}
    )
    for scheduler, reason in (
        (diffusers.PNDMScheduler(), "diffkern has no scheduler of this name"),
        (Mine(), "diffkern has no scheduler of this name"),
        (type("EulerDiscreteScheduler", (Mine,), {})(), "it is not diffusers' own class of this name"),
        (ours.EulerDiscreteScheduler(), "it is diffkern's already"),
    ):
        latent.scheduler = scheduler
        report = ours.accelerate(latent)
        kept = {swap.layer: swap for swap in report.kept}
        assert kept[None].reason == reason
        assert latent.scheduler is scheduler
        first = kept[names[0].removesuffix(".processor")]
        assert first.reason == "MyProcessor computes something else than softmax(Q K^T) V of the layer's projections"
        assert "1 attention layer" in str(report) or "it is diffkern's already in 15" in str(report)
        assert reason in str(report)
        back = ours.restore(latent)
        assert [swap.reason for swap in back.kept] == (
            ["it was not put there by accelerate"] if reason == "it is diffkern's already" else []
        )
    assert type(latent.unet.attn_processors[names[0]]) is MyProcessor


def test_unfit_heads_stay(latent: Any) -> None:
    unet = diffusers.UNet2DModel(
        block_out_channels=(32, 32), attention_head_dim=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), layers_per_block=1,
    )  # fmt: skip
    report = ours.accelerate(unet)
    assert not report.swapped
    assert {swap.reason for swap in report} == {
        "the channels of a head must be a multiple of 8 up to 256, or 512, got 4"
    }
    deep = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 32), addition_embed_type="text", encoder_hid_dim=16, cross_attention_dim=32,
        attention_head_dim=8, down_block_types=("DownBlock2D", "SimpleCrossAttnDownBlock2D"), layers_per_block=1,
        up_block_types=("SimpleCrossAttnUpBlock2D", "UpBlock2D"), mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        addition_embed_type_num_heads=2,
    )  # fmt: skip
    report = ours.accelerate(deep)
    assert not report.swapped
    assert all("AddedKVProcessor" in str(swap.reason) for swap in report)
    assert processors.AttnAddedKVProcessor2_0.__name__ in str(report)


@torch.no_grad()
def test_masks_fall_back_and_are_counted(latent: Any) -> None:
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 7, 32)
    mask = torch.ones(2, 7)
    mask[:, 4:] = 0
    before = latent.unet(x, 5, context, encoder_attention_mask=mask).sample
    report = ours.accelerate(latent.unet)
    after = latent.unet(x, 5, context, encoder_attention_mask=mask).sample
    assert (after - before).abs().max() < 1e-5 * before.abs().max()
    cross = {name for name in latent.unet.attn_processors if "attn2" in name}
    assert set(report.fallbacks) == {f"UNet2DConditionModel.{name.removesuffix('.processor')}" for name in cross}
    assert all(calls == {"an attention mask was given": 1} for calls in report.fallbacks.values())
    assert f"fell back to the original in {len(cross)} calls: an attention mask was given" in str(report)


def test_copies_can_be_restored(latent: Any) -> None:
    ours.accelerate(latent)
    other = copy.deepcopy(latent)
    ours.restore(other)
    assert type(other.scheduler) is diffusers.EulerDiscreteScheduler
    assert type(latent.scheduler) is ours.EulerDiscreteScheduler
    assert isinstance(next(iter(latent.unet.attn_processors.values())), ours.DiffkernAttnProcessor)
    assert not isinstance(next(iter(other.unet.attn_processors.values())), ours.DiffkernAttnProcessor)


def test_only_pipelines_and_models_are_taken() -> None:
    for wrong in (3, None, diffusers.DDIMScheduler()):
        with pytest.raises(TypeError, match="pipeline must be a diffusers pipeline or a model, got "):
            ours.accelerate(wrong)
    assert (
        str(ours.accelerate(nn.Linear(1, 1)))
        == "nothing to swap: no scheduler, no attention layer and no block of diffusers"
    )


@pytest.mark.parametrize("arguments", [["diffusers_ddpm.py", "--size", "16"], ["diffusers_latent.py", "--size", "32"]])
@pytest.mark.full
def test_examples_run(root: Path, arguments: list[str]) -> None:
    command = [sys.executable, str(root / "examples" / arguments[0]), *arguments[1:], "--steps", "3"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, env={"PYTHONPATH": str(root)}, check=True)
    lines = done.stdout.splitlines()
    difference = next(line for line in lines if line.startswith("max difference of the results: "))
    assert float(difference.split()[-1]) < 1e-3
    assert lines[-1].startswith("sampler update of (")
