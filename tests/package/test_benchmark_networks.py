"""The benchmarks of whole networks: who is compared, what is refused, what is counted, and the page."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

# At the end: the package under test stays the installed one.
sys.path.append(str(Path(__file__).resolve().parent.parent.parent))

pytest.importorskip("benchmarks")
pytest.importorskip("diffusers")

from benchmarks import costs, timing
from benchmarks.networks import command, contenders, counts, decoding, evaluation, own, page, peers, profiles, sampling

F32, BF16 = torch.float32, torch.bfloat16
TINY = peers.Network(
    "tiny",
    "Tiny",
    "UNet2DModel",
    channels=3,
    size=8,
    config={
        "sample_size": 8,
        "block_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "num_class_embeds": 5,
    },
    classes=5,
)
ADM = dataclasses.replace(
    TINY,
    config={
        "sample_size": 8,
        "out_channels": 6,
        "block_out_channels": (32, 64),
        "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        "downsample_type": "resnet",
        "upsample_type": "resnet",
        "resnet_time_scale_shift": "scale_shift",
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "attn_norm_num_groups": 32,
        "num_class_embeds": 5,
    },
    guided={
        **(peers.NETWORKS["adm"].guided or {}),
        "model_channels": 32,
        "num_res_blocks": 1,
        "attention_resolutions": (2,),
        "channel_mult": (1, 2),
        "num_classes": 5,
        "num_head_channels": 16,
    },
)
TWO = (contenders.EAGER, contenders.OWN)


def fixed_times(seconds: Mapping[str, Sequence[float]]) -> evaluation.Run:
    """A timing that calls nothing and says these seconds."""

    def timing_of(calls: Mapping[str, Callable[[], object]], timer: Any, **options: Any) -> timing.Measured:
        return timing.Measured({name: list(seconds[name]) for name in calls}, dict.fromkeys(calls, 1), 0.25)

    return timing_of


def answers_like_diffusers(monkeypatch: pytest.MonkeyPatch, off: float = 0.0) -> None:
    """In the place of our network: diffusers', all of whose outputs are off by a share."""

    class Scaled(nn.Module):
        def __init__(self, peer: nn.Module) -> None:
            super().__init__()
            self.peer = contenders.shared_copy(peer)

    def run(model: nn.Module, given: peers.Inputs) -> Tensor:
        return (1 + off) * peers.theirs(model.peer, given)  # type: ignore[arg-type]

    monkeypatch.setattr(own, "build", lambda network, peer: Scaled(peer))
    monkeypatch.setattr(own, "run", run)


# ------------------------------------------------------------------------------------------------------ who runs
def test_all_contenders_have_the_weights_of_the_network_and_share_what_they_do_not_lay_out_anew() -> None:
    peer = TINY.build()
    last = contenders.contenders(TINY, peer, [contenders.LAST])[0].model
    assert last is not None
    here, there = peer.state_dict(), last.state_dict()
    assert all(torch.equal(here[name], there[name]) for name in here)
    conv, linear = "conv_in.weight", "time_embedding.linear_1.weight"
    assert there[conv].is_contiguous(memory_format=torch.channels_last)
    assert here[conv].is_contiguous()
    assert there[linear].data_ptr() == here[linear].data_ptr()


def test_two_builds_are_the_same_network_and_no_norm_or_bias_is_trivial() -> None:
    one, two = TINY.build().state_dict(), TINY.build().state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert all(one[name].std() > 0.01 for name in one if name.endswith("bias") or ".norm" in name)


def test_diffusers_guided_diffusion_and_ours_are_the_same_network() -> None:
    peer, given = ADM.build(), ADM.inputs(2)
    names = (contenders.EAGER, contenders.GUIDED, contenders.OWN)
    with torch.no_grad():
        want, *others = [one.run(given) for one in contenders.contenders(ADM, peer, names)]
    for got in others:
        assert 0 < contenders.errors(got, want)[0] < 1e-5
    assert [one.name for one in contenders.contenders(TINY, TINY.build(), names[:2])] == [contenders.EAGER]


def test_every_block_of_a_dit_has_the_same_embedding_as_in_the_published_weights() -> None:
    config = {**peers.NETWORKS["dit"].config, "num_attention_heads": 2, "attention_head_dim": 4, "num_layers": 2}
    state = dataclasses.replace(peers.NETWORKS["dit"], config={**config, "num_embeds_ada_norm": 3}).build().state_dict()
    there = "transformer_blocks.{}.norm1.emb.class_embedder.embedding_table.weight"
    assert torch.equal(state[there.format(0)], state[there.format(1)])


def test_a_contender_that_cannot_be_had_is_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(network: peers.Network, peer: nn.Module) -> nn.Module:
        raise ValueError("no such thing\nmore of it")

    monkeypatch.setattr(own, "build", build)
    found = evaluation.evaluate(TINY, 1, wanted=TWO, timing=fixed_times({contenders.EAGER: [1.0]}))
    assert [row.why for row in found.rows] == ["", "ValueError: no such thing"]
    assert found.rows[1].time is None


# ------------------------------------------------------------------------------------------------- checked and timed
def test_a_ratio_is_that_of_the_better_baseline(monkeypatch: pytest.MonkeyPatch) -> None:
    answers_like_diffusers(monkeypatch)
    names = (contenders.EAGER, contenders.LAST, contenders.OWN)
    times = {names[0]: [3.0, 3.0, 3.0], names[1]: [2.0, 2.0, 4.0], names[2]: [1.0, 0.5, 1.0]}
    found = evaluation.evaluate(TINY, 2, wanted=names, timing=fixed_times(times))
    assert found.better == names[1]
    assert found.others == 0.25
    eager, last, mine = found.rows
    assert last.ratio is None
    assert eager.ratio is not None
    assert eager.ratio.median == pytest.approx(2 / 3)
    assert mine.ratio is not None
    assert mine.ratio.median == 4.0  # of 2, 4 and 4
    assert mine.error is not None
    assert 0 < mine.error[0] < 1e-5  # in channels_last the sums have another order


def test_a_wrong_output_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    answers_like_diffusers(monkeypatch, off=1e-4)
    found = evaluation.evaluate(TINY, 1, wanted=TWO, timing=fixed_times({contenders.EAGER: [1.0]}))
    mine = found.rows[1]
    assert mine.why.startswith("wrong: off by 1.0e-04")
    assert mine.time is None
    found = evaluation.train(TINY, 1, wanted=TWO, timing=fixed_times({contenders.EAGER: [1.0]}))
    assert found.rows[1].why.startswith("wrong")


def test_in_sixteen_bits_ours_may_be_as_far_from_float32_as_diffusers() -> None:
    assert evaluation.refusal(F32, (9e-6, 1e-6), (0.0, 0.0)) == ""
    assert evaluation.refusal(F32, (2e-5, 1e-6), (0.0, 0.0))
    assert evaluation.refusal(BF16, (9e-2, 1e-2), (1e-2, 1e-2)) == ""
    assert evaluation.refusal(BF16, (1e-2, 1.2e-2), (1e-2, 1e-2))
    assert "not finite" in evaluation.refusal(BF16, (float("nan"), 1e-2), (1e-2, 1e-2))


def test_errors_are_relative_to_the_largest_value_and_to_the_root_mean_square() -> None:
    found = contenders.errors(torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0]))
    assert found == pytest.approx((0.5 / 4, 0.5 / 5))
    with pytest.raises(ValueError, match=r"shape \(2,\), got \(3,\)"):
        contenders.errors(torch.zeros(3), torch.ones(2))


def test_a_training_step_leaves_no_gradients_and_counts_them_in_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = TINY.build()
    monkeypatch.setattr(peers.Network, "build", lambda self: peer)
    found = evaluation.train(TINY, 2, wanted=TWO[:1], timing=fixed_times({contenders.EAGER: [1.0]}))
    row = found.rows[0]
    assert row.why == ""
    assert row.error == (0.0, 0.0)
    assert all(p.grad is None for p in peer.parameters())
    assert row.peak is not None
    assert row.saved is not None
    assert row.peak > 4 * peers.parameters(peer)  # all gradients are there at the end
    assert row.peak > row.saved > 0


def test_peak_is_what_is_held_at_once() -> None:
    def call() -> Tensor:
        small = torch.empty(1000)
        large = torch.empty(3000)
        del small, large
        return torch.empty(2500)

    assert costs.peak_of(call) == pytest.approx(4 * 4000, abs=256)


def test_saved_bytes_are_those_of_activations_each_once() -> None:
    """The first layer keeps its input (6 numbers), SiLU its own (8), the second layer what SiLU returns (8)."""
    model = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 1))
    x = torch.randn(2, 3)
    assert evaluation.saved_bytes(lambda: model(x), model) == 4 * (6 + 8 + 8)


@pytest.mark.parametrize("sampler", sampling.SAMPLERS)
def test_a_run_by_our_sample_ends_where_diffusers_loop_does(sampler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers_like_diffusers(monkeypatch)
    times = {contenders.EAGER: [2.0], contenders.OWN: [1.0]}
    found = sampling.run_of(TINY, sampler, 2, steps=3, wanted=TWO, timing=fixed_times(times))
    mine = found.rows[1]
    assert mine.error is not None
    assert 0 < mine.error[0] < 1e-5
    assert mine.ratio is not None
    assert mine.ratio.median == 2.0


# ------------------------------------------------------------------------------------------------------- profiles
def test_kinds_of_ops() -> None:
    assert {name: profiles.kind_of(name) for name in ("aten::addmm", "aten::bmm", "aten::add_", "aten::copy_")} == {
        "aten::addmm": "linear",
        "aten::bmm": "attention",
        "aten::add_": "adds",
        "aten::copy_": "copies",
    }
    assert profiles.kind_of("aten::mkldnn_convolution") == "convolution"
    assert profiles.kind_of("diffkern::group_norm_act") == "norm + act"
    assert profiles.kind_of("diffkern::attention") == "attention"
    assert profiles.kind_of("ProfilerStep#1") == "other"


def test_a_profile_adds_up_and_knows_its_operations() -> None:
    layer, x = nn.Conv2d(2, 3, 3, padding=1), torch.randn(1, 2, 8, 8)
    found = profiles.profile_of("a", lambda: F.silu(layer(x)), times=2)
    assert sum(map(found.share, profiles.KINDS)) == pytest.approx(1)
    assert found.share("convolution") > 0
    assert found.share("norm + act") > 0
    assert found.flops == {"convolution": 2 * 3 * 64 * 2 * 9}
    assert found.rate("convolution") is None
    limited = dataclasses.replace(found, limit=2 * found.flops["convolution"] / found.seconds["convolution"])
    assert limited.rate("convolution") == pytest.approx(0.5)


# ------------------------------------------------------------------------------------------------ counts for a GPU
def test_counts_of_a_network_worked_out_by_hand() -> None:
    with torch.device("meta"):
        conv, linear, x = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(3 * 16, 5), torch.empty(1, 2, 4, 4)
    found = counts.count(lambda: linear(F.silu(conv(x)).flatten(1)))
    conv_op, silu, product = found.ops
    assert (conv_op.read, conv_op.written) == (4 * (32 + 54 + 3), 4 * 48)
    assert conv_op.flops == 2 * 48 * 2 * 9
    assert (silu.read, silu.written, silu.flops) == (4 * 48, 4 * 48, 0)
    assert (product.read, product.written) == (4 * (5 + 48 + 48 * 5), 4 * 5)
    assert product.flops == 2 * 48 * 5
    assert found.launches == found.allocations == 3
    assert found.around == 4 * 96
    assert found.moved == 4 * (89 + 48 + 96 + 293 + 5)


def test_views_are_free_and_what_is_in_place_allocates_nothing() -> None:
    x, one = torch.empty(4, 6, device="meta"), torch.empty(6, device="meta")

    def call() -> None:
        x.view(2, 12).transpose(0, 1)[1:]
        x.add_(one.expand(4, 6))
        x.zero_()

    found = counts.count(call)
    assert [(op.name, op.read, op.written) for op in found.ops] == [("add_", 4 * (24 + 6), 96), ("zero_", 0, 96)]
    assert found.allocations == 0


def test_attention_is_one_launch() -> None:
    q, k = torch.empty(1, 2, 8, 4, device="meta"), torch.empty(1, 2, 3, 4, device="meta")
    found = counts.count(lambda: F.scaled_dot_product_attention(q, k, value=k).transpose(1, 2).reshape(1, 8, 8))
    assert [(op.read, op.written, op.flops) for op in found.ops] == [(4 * (64 + 24 + 24), 4 * 64, 4 * 2 * 8 * 3 * 4)]
    assert found.allocations == 1


def test_an_op_takes_as_long_as_its_bytes_or_its_products() -> None:
    gpu = counts.Gpu("g", bandwidth=100.0, flops=1000.0)
    found = counts.Counts([counts.Op("a", 50, 50), counts.Op("b", 100, 100, 5000)], 2)
    assert found.roofline(gpu) == pytest.approx(1 + 5)
    assert found.host == pytest.approx(2 * counts.LAUNCH)
    assert found.largest() == {"b": (1, 200), "a": (1, 100)}


def test_a_network_is_counted_without_memory() -> None:
    rows = counts.on_gpu(TINY, 4, wanted=contenders.BASELINES)
    assert [row.why for row in rows] == ["", ""]
    of = [row.counts for row in rows]
    assert of[0] is not None
    assert of[1] is not None
    assert of[0].launches == of[1].launches > 50
    assert "scaled_dot_product_attention" in of[0].largest()


# ----------------------------------------------------------------------------------------------- page and command
def test_the_section_takes_the_place_of_the_last_one(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    page.put(path, "one")
    assert path.read_text() == f"{page.BEGIN}\none\n{page.END}\n"
    path.write_text("# Before\n\n" + path.read_text() + "\nAfter\n")
    page.put(path, "two")
    assert path.read_text() == f"# Before\n\n{page.BEGIN}\ntwo\n{page.END}\nAfter\n"
    path.write_text("# Before\n")
    page.put(path, "three")
    assert path.read_text() == f"# Before\n\n{page.BEGIN}\nthree\n{page.END}\n"


def test_names_of_cases() -> None:
    assert {"ddpm-1", "ddpm-16", "adm-4", "sd-1", "dit-1-bf16", "ddpm-train-4", "ddpm-ddim-1"} <= set(command.CASES)
    assert {"sd-dpmpp_2m-1", "adm-profile-1", "sd-gpu-1"} <= set(command.CASES)
    assert all(case.dtype == BF16 for case in command.CASES.values() if case.half or case.kind == "gpu")


@pytest.mark.full
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.main(["--list"]) == 0
    assert capsys.readouterr().out.split("\n")[0] == "ddpm-1 *"
    assert command.main(["--cases", "no-such-case"]) == 2
    assert "matches none" in capsys.readouterr().err
    answers_like_diffusers(monkeypatch)
    monkeypatch.setattr(command, "alone", lambda work, *arguments: work(*arguments))
    monkeypatch.setattr(command, "_facts", lambda threads: {"processor": "p"})
    monkeypatch.setitem(peers.NETWORKS, "tiny", TINY)
    monkeypatch.setitem(peers.NETWORKS, "gone", dataclasses.replace(TINY, kind="NoSuchModel"))
    kinds = [("evaluation", "tiny"), ("training", "tiny"), ("profile", "tiny"), ("gpu", "tiny"), ("evaluation", "gone")]
    cases = [command.Case(kind, network, 1, quick=True) for kind, network in kinds]
    monkeypatch.setattr(command, "CASES", {case.name: case for case in cases})
    path = tmp_path / "page.md"
    threads = str(torch.get_num_threads())
    assert command.main(["--seconds", "0.01", "--threads", threads, "--out", str(path)]) == 1
    printed = capsys.readouterr()
    assert "[5/5] gone-1 AttributeError" in printed.out
    assert printed.err == "failed, or wrong: gone-1\n"
    text = path.read_text()
    assert f"`python -m benchmarks.networks --seconds 0.01 --threads {threads} --out {path}`" in text
    for part in ("An evaluation", "A training step", "Where the time goes", "What a GPU would be asked for"):
        _, _, rest = text.partition(f"### {part}\n")
        rows = [line for line in rest.partition("###")[0].splitlines() if line.startswith("|")]
        assert len({row.count("|") for row in rows}) == 1, part
        assert sum(f"| {contenders.OWN} |" in row for row in rows) == 1, part
    assert "AttributeError: module diffusers has no attribute NoSuchModel" in text
    assert "replace" in text


def test_decoders_are_held_against_diffusers_before_they_are_timed() -> None:
    rows = decoding.measure(16, 32, 1, 0.0, [*decoding.NAMES, "nobody"])
    assert [row["name"] for row in rows] == [*decoding.NAMES, "nobody"]
    for row in rows[:-1]:
        assert row["error"] < 1e-5
        assert row["time"] > 0.0
        assert "why" not in row
    assert ("eager" in rows[0]) != ("eager" in rows[1])  # the faster one is not its own ratio
    assert rows[-1]["why"].startswith("ValueError: name must be one of diffusers, ")
    rows[0]["memory"], rows[1]["memory"], rows[2]["memory"] = 4 << 20, 2 << 20, 1 << 20
    lines = decoding.table(rows).splitlines()
    assert lines[2].endswith("| 4 MiB | 2.00 |")
    assert lines[4].endswith("| 1 MiB | 0.50 |")
