"""docs/scale-out.md against its formulas, and these against the mathematics and the networks."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from diffkern.nn import DiT, UNet
from diffkern.nn.presets import PRESETS
from diffkern.train.sharded import pieces_of

TOOLS = Path(__file__).parent.parent.parent / "tools"


@pytest.fixture(scope="module")
def page() -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    try:
        return importlib.import_module("scale_out")
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture(scope="module")
def formulas(page: ModuleType) -> ModuleType:
    return sys.modules["scale_formulas"]


@pytest.fixture(scope="module")
def cases(formulas: ModuleType) -> dict[str, Any]:
    return {case.name: case for case in formulas.CASES}


def test_the_page_has_what_the_formulas_give(page: ModuleType) -> None:
    text = page.PAGE.read_text()
    assert page.filled(text, page.sections()) == text


def test_a_part_that_the_page_lacks_is_named(page: ModuleType) -> None:
    with pytest.raises(ValueError, match=r"must have <!-- more --> once, got 0"):
        page.filled("<!-- less -->\n\n<!-- end -->", {"more": ""})


def test_the_measured_table_divides_by_one_process_and_by_two_apart(page: ModuleType) -> None:
    scaling = importlib.import_module("scaling")
    one, apart = {"train strong": 4.0, "sample strong": 2.0}, {"train strong": 6.0, "sample strong": 4.0}
    two = {"train strong": 5.0, "train weak": 5.4, "sample strong": 3.0, "sample weak": 3.9}
    lines = scaling.report({"one": one, "two": two, "apart": apart}, "a machine", "2030-01-02").splitlines()
    assert lines[2:] == [
        "| training, batch 16 | 4.00 | 5.00 | 1.25 | 6.00 | 83 % |",
        "| training, 16 images a process | 4.00 | 5.40 | 1.35 | 6.00 | 90 % |",
        "| sampling 16 images | 2.00 | 3.00 | 1.50 | 4.00 | 75 % |",
        "| sampling 16 images a process | 2.00 | 3.90 | 1.95 | 4.00 | 98 % |",
        "",
        "a machine, 2030-01-02.",
    ]
    assert page.filled(page.PAGE.read_text(), {"measured": "|"}).count("<!-- measured -->\n|\n<!-- end -->") == 1


def test_a_ring_of_any_size_is_counted_hop_by_hop(formulas: ModuleType) -> None:
    """n GPUs in turn, each to the next: n - 1 rounds of size/n bytes to gather, twice as many to add up."""
    size, rate = 1e9, 0.8 * 450e9
    for n in (2, 8):
        rounds = sum(size / n / rate + 4e-6 for _ in range(n - 1))
        assert formulas.gather(size, n, formulas.FAST) == pytest.approx(rounds)
        tree = 2 * 4e-6 * math.log2(n)
        summed = sum(size / n / rate for _ in range(2 * (n - 1))) + tree
        assert formulas.all_reduce(size, n, formulas.FAST) == pytest.approx(summed)
    slow = sum(size / 16 / (0.8 * 12.5e9) + hop for hop in [4e-6] * 14 + [14e-6])  # 16 GPUs: one hop leaves the node
    assert formulas.gather(size, 16, formulas.SLOW) == pytest.approx(slow)
    assert formulas.all_reduce(size, 1, formulas.SLOW) == 0.0


@pytest.mark.parametrize(("first", "second"), [(3.0, 1.0), (1.0, 3.0), (2.0, 2.0)])
def test_two_stages_overlap_as_a_simulation_says(formulas: ModuleType, first: float, second: float) -> None:
    for pieces in (1, 2, 7):
        ready = done = 0.0
        for _ in range(pieces):  # a piece is taken on by the second stage when both are free
            ready += first / pieces
            done = max(done, ready) + second / pieces
        assert formulas.pipelined(first, second, pieces) == pytest.approx(done)


def test_a_step_is_what_its_parts_take(formulas: ModuleType, cases: dict[str, Any]) -> None:
    """Where nothing travels it is one GPU's; what is not hidden is what the bytes take beyond the computation."""
    case = cases["DiT-XL/2"]
    alone = formulas.ddp(case, 1, 32, formulas.FAST)
    assert alone.total == pytest.approx(formulas.alone(case, 32))
    assert (alone.traffic, alone.exposed) == (0.0, pytest.approx(0.0, abs=1e-12))
    seconds = 3 * 32 * 237_242_843_136 / (0.4 * 989e12)
    assert alone.compute == pytest.approx(seconds)
    assert alone.update == pytest.approx(64 * 674_834_720 / (0.8 * 3.35e12))
    slow = formulas.ddp(
        case, 16, 1, formulas.SLOW
    )  # 103 buckets, all but the first's computation is beside the traffic
    traffic = 2 * 15 / 16 * 4 * 674_834_720 / 10e9 + 103 * 2 * (3 * 4e-6 + 14e-6)
    assert slow.traffic == pytest.approx(traffic)
    assert slow.total == pytest.approx(seconds / 96 + seconds / 48 / 103 + traffic + alone.update)
    cut = formulas.fsdp(case, 8, 32, formulas.FAST)
    assert cut.traffic == pytest.approx(3 * (7 / 8 * 4 * 674_834_720 / 360e9 + 30 * 7 * 4e-6))
    assert cut.update == pytest.approx(alone.update / 8)
    assert formulas.hidden_from(case, 16, formulas.SLOW) == math.ceil(traffic / (seconds / 48))


def test_bytes_are_those_of_the_tensors(formulas: ModuleType, cases: dict[str, Any], tmp_path: Path) -> None:
    """A checkpoint that was written, of 20 bytes a parameter with two averages and little beside."""
    from diffkern import Diffusion, cosine
    from diffkern.train import Averages, checkpoint

    network = torch.nn.Linear(300, 300)
    diffusion = Diffusion(network, cosine(10), shape=(1, 1, 300))
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.ones(1, 300)).sum().backward()
    optimizer.step()
    path = checkpoint.save(
        tmp_path, 1, diffusion=diffusion, averages=Averages(diffusion, (0.05, 0.1)), optimizer=optimizer
    )
    found = {file.stat().st_ino: file.stat().st_size for file in path.iterdir()}  # a second name is no second file
    a = formulas.checkpoint(cases["ddpm-cifar10"]) / cases["ddpm-cifar10"].counts.parameters
    assert a == 20.0
    assert sum(found.values()) == pytest.approx(a * 90_300, rel=0.02)
    case = cases["SDXL's UNet"]
    assert formulas.written(case, 1) == 20 * 2_567_463_684 / 2e9
    assert formulas.written(case, 4) == 12 * 2_567_463_684 / 8e9 + 8 * 2_567_463_684 / 2e9
    assert formulas.memory_ddp(case) == 28 * 2_567_463_684
    assert formulas.memory_fsdp(case, 8) == 3 * 2_567_463_684 + 8 * 400_005_120


def test_operations_of_the_transformer_are_those_of_its_products(cases: dict[str, Any]) -> None:
    """Peebles & Xie 2023: 28 blocks of width d on N tokens, 24 N d^2 + 4 N^2 d and 12 d^2 of modulation each; patches
    of 2 x 2 x 4 to d, d to 2 x 2 x 8, its own modulation 4 d^2, and the time's 256 to d to d."""
    d, n = 1152, 256
    block = 24 * n * d**2 + 4 * n**2 * d + 12 * d**2
    ends = 2 * 16 * d * n + 2 * d * 32 * n + 4 * d**2 + 2 * 256 * d + 2 * d**2
    counts = cases["DiT-XL/2"].counts
    assert counts.forward == 28 * block + ends
    with torch.device("meta"):
        network = DiT(PRESETS["DiT-XL/2"])
    assert counts.parameters == sum(p.numel() for p in network.parameters())
    assert counts.pieces == len(pieces_of(network)) + 1
    assert counts.largest == 28 * (6 * d * d + 6 * d)  # all blocks' modulations, which run first


@pytest.mark.parametrize(
    "name", ["ddpm-cifar10", *(pytest.param(name, marks=pytest.mark.long) for name in ("adm-64", "SDXL's UNet"))]
)
@pytest.mark.full
def test_counts_are_those_of_the_networks(page: ModuleType, cases: dict[str, Any], name: str) -> None:
    case = cases[name]
    assert page.counted(case.preset) == (case.counts.parameters, case.counts.forward)
    with torch.device("meta"):
        pieces = pieces_of(UNet(PRESETS[case.preset]))
    assert case.counts.pieces == len(pieces) + 1  # and the whole, of what is in none
    assert case.counts.largest == max(sum(p.numel() for part in piece for p in part.parameters()) for piece in pieces)
