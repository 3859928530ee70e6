"""Assumptions and formulas of docs/scale-out.md: bytes and seconds of training on n GPUs. Nothing here is measured."""

from __future__ import annotations

import math
from dataclasses import dataclass


# -------------------------------------------------------------------------------------------------------- assumptions
@dataclass(frozen=True)
class Machine:
    """Nodes of 8 H100 SXM, by their datasheets: operations a second in bfloat16 without sparsity, bytes a second."""

    node: int = 8
    peak: float = 989e12
    reached: float = 0.4
    """Share of the peak that training reaches: an assumption, on the good side for convolutions."""
    memory: float = 3.35e12
    memory_reached: float = 0.8
    nvlink: float = 450e9
    """One direction."""
    links_reached: float = 0.8
    hop: float = 4e-6
    """Seconds from a GPU to the next in a node, and between nodes: the constants of NCCL's own choice of algorithms
    (its src/graph/tuning.cc) for NVLink and network, protocol Simple."""
    far_hop: float = 14e-6
    disk: float = 2e9
    """Bytes a second of one process that writes and flushes."""
    disks: float = 40e9
    """Of all processes together, into a parallel file system."""


@dataclass(frozen=True)
class Network:
    """Between nodes: bytes a second of a node, one direction."""

    name: str
    node: float


MACHINE = Machine()
FAST = Network("8 x 400 Gb/s", 400e9)
SLOW = Network("100 Gb/s", 12.5e9)
BUCKET = 25 * 2**20
"""Bytes of a bucket of DistributedDataParallel: its default."""


@dataclass(frozen=True)
class Counts:
    """Of a network: parameters, operations of a forward pass of one image, and the pieces that FSDP2 cuts it into."""

    parameters: int
    forward: int
    pieces: int
    largest: int
    """Parameters of the largest piece."""


@dataclass(frozen=True)
class Case:
    """A network in training: images a GPU where that is fixed, images of a batch as published."""

    name: str
    preset: str
    counts: Counts
    local: int
    batch: int
    pixels: tuple[int, int, int]
    """C, H, W of what the network sees."""
    image: int
    """Bytes of one in the data: uint8 pixels, or a VAE's latents in float16."""
    average: int = 2
    """How many averages of the weights are kept."""


CASES = (
    Case(
        "ddpm-cifar10", "ddpm-cifar10", Counts(35_746_307, 12_443_713_536, 24, 2_560_896), 128, 128, (3, 32, 32), 3072
    ),
    Case(
        "adm-64", "adm-imagenet64", Counts(295_905_222, 219_356_037_120, 38, 27_462_528), 64, 2048, (3, 64, 64), 12_288
    ),
    Case("DiT-XL/2", "DiT-XL/2", Counts(674_834_720, 237_242_843_136, 30, 223_147_008), 32, 256, (4, 32, 32), 8192),
    Case(
        "SDXL's UNet",
        "sdxl",
        Counts(2_567_463_684, 6_761_236_398_080, 19, 400_005_120),
        8,
        2048,
        (4, 128, 128),
        131_072,
    ),
)


# ------------------------------------------------------------------------------------------------------------ formulas
def nodes(n: int) -> int:
    return max(1, n // MACHINE.node)


def bandwidth(n: int, network: Network) -> float:
    """Bytes a second of the ring's narrowest link, which carries what each GPU sends: NVLink, or a node's network."""
    narrowest = MACHINE.nvlink if n <= MACHINE.node else min(MACHINE.nvlink, network.node)
    return MACHINE.links_reached * narrowest


def all_reduce(size: float, n: int, network: Network, calls: int = 1) -> float:
    """Seconds of the sum of ``size`` bytes over n GPUs, in so many calls.

    2 (n - 1)/n size / bandwidth, and for each call up and down a tree: log2 of the node, log2 of the nodes.
    """
    if n == 1:
        return 0.0
    inside, across = min(n, MACHINE.node), nodes(n)
    hops = 2.0 * (math.log2(inside) * MACHINE.hop + math.log2(across) * MACHINE.far_hop)
    return 2.0 * (n - 1) / n * size / bandwidth(n, network) + calls * hops


def gather(size: float, n: int, network: Network, calls: int = 1) -> float:
    """Seconds until every GPU has all ``size`` bytes of which each has a part; a reduce-scatter takes the same.

    (n - 1)/n size / bandwidth, and for each call the n - 1 hops of a ring, one to each further node.
    """
    hops = (n - nodes(n)) * MACHINE.hop + (nodes(n) - 1) * MACHINE.far_hop
    return (n - 1) / n * size / bandwidth(n, network) + calls * hops


def pipelined(first: float, second: float, pieces: int) -> float:
    """Seconds of two stages in so many equal pieces, of which a piece's second follows its first.

    max(a, b) + min(a, b)/pieces.
    """
    return max(first, second) + min(first, second) / pieces


def forward(case: Case, images: float) -> float:
    """Seconds of the forward pass; the backward pass takes twice as long."""
    return case.counts.forward * images / (MACHINE.reached * MACHINE.peak)


def update(case: Case) -> float:
    """Seconds of clipping, AdamW and averages, by the bytes they move: 12 + 28 + 12 for each average, a parameter.

    Clipping reads the gradient twice and writes it; AdamW reads weight, gradient and two moments and writes three;
    an average reads weight and average and writes one. All in float32.
    """
    return (40 + 12 * case.average) * case.counts.parameters / (MACHINE.memory_reached * MACHINE.memory)


@dataclass(frozen=True)
class Step:
    """Seconds of a training step on n GPUs, beside them those of its parts."""

    compute: float
    update: float
    traffic: float
    """Of all collectives, whatever they run beside."""
    total: float

    @property
    def exposed(self) -> float:
        """What of the traffic nothing runs beside."""
        return self.total - self.compute - self.update


def ddp(case: Case, n: int, images: float, network: Network) -> Step:
    """DistributedDataParallel: the gradient in float32 is summed bucket by bucket while the backward pass goes on."""
    size = 4 * case.counts.parameters
    buckets = math.ceil(size / BUCKET)
    there, back = forward(case, images), 2.0 * forward(case, images)
    traffic = all_reduce(size, n, network, buckets)
    total = there + pipelined(back, traffic, buckets) + update(case)
    return Step(there + back, update(case), traffic, total)


def fsdp(case: Case, n: int, images: float, network: Network) -> Step:
    """FSDP2: a piece is gathered (float32) before it runs, forward and backward, its gradient scattered after it."""
    size, pieces = 4 * case.counts.parameters, case.counts.pieces
    there, back = forward(case, images), 2.0 * forward(case, images)
    once = gather(size, n, network, pieces)
    total = pipelined(once, there, pieces) + pipelined(2.0 * once, back, pieces) + update(case) / n
    return Step(there + back, update(case) / n, 3.0 * once, total)


def alone(case: Case, images: float) -> float:
    """Seconds of a step of one GPU that has all these images (in micro-batches) and nobody to talk to."""
    return 3.0 * forward(case, images) + update(case)


def memory_ddp(case: Case) -> float:
    """Bytes a GPU without activations: weight, gradient, two moments, averages, the buckets' copy of the gradient."""
    return (20 + 4 * case.average) * case.counts.parameters


def memory_fsdp(case: Case, n: int) -> float:
    """The same with FSDP2: a part of all, and two gathered pieces, one that runs and one that comes."""
    return (16 + 4 * case.average) * case.counts.parameters / n + 2 * 4 * case.counts.largest


def checkpoint(case: Case) -> float:
    """Bytes of a checkpoint: weights, averages and two moments in float32, each once."""
    return (12 + 4 * case.average) * case.counts.parameters


def written(case: Case, writers: int) -> float:
    """Seconds to write a checkpoint: of several, each its part of weights and moments, the first also the averages."""
    if writers == 1:
        return checkpoint(case) / MACHINE.disk
    averages = 4 * case.average * case.counts.parameters
    return (checkpoint(case) - averages) / min(writers * MACHINE.disk, MACHINE.disks) + averages / MACHINE.disk


def hidden_from(case: Case, n: int, network: Network) -> int:
    """Images a GPU from which the backward pass is longer than the sum of the gradient."""
    return math.ceil(ddp(case, n, 1.0, network).traffic / (2.0 * forward(case, 1.0)))
