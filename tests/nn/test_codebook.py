"""Codes: the nearest by brute force, averages by NumPy, dead codes by address, levels and their indices, statistics."""

from __future__ import annotations

import itertools
import math
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from helpers.autoencoder_cases import images, model
from torch import Tensor

from diffkern import ops, streams
from diffkern.nn.codebook import Codebook, statistics
from diffkern.nn.quantised import FiniteScalars, Quantised, nearest


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# ----------------------------------------------------------------------------------------------------- the nearest code
@pytest.mark.parametrize(("rows", "codes", "channels"), [(37, 19, 3), (1, 1, 1), (50, 300, 64), (0, 4, 2)])
def test_the_nearest_code_is_that_of_brute_force(rows: int, codes: int, channels: int) -> None:
    x, e = torch.randn(rows, channels), torch.randn(codes, channels)
    distances = ((x.double().numpy()[:, None] - e.double().numpy()) ** 2).sum(axis=-1)
    np.testing.assert_array_equal(nearest(x, e).numpy(), distances.argmin(axis=1))


def test_of_equal_codes_the_first() -> None:
    e = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.0, 1.0]])
    assert nearest(torch.tensor([[0.9, 0.0], [0.0, 2.0], [0.0, 0.0]]), e).tolist() == [0, 1, 0]


@pytest.mark.parametrize("channels", [3, 40])
def test_a_row_has_the_same_code_in_every_batch(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where two codes are so close that rounding decides."""
    e = torch.randn(16, channels).repeat(2, 1)
    e[16:] += torch.randn(16, channels) * 1e-7
    x = torch.randn(200, channels)
    whole = nearest(x, e)
    assert torch.equal(torch.cat([nearest(row, e) for row in x.split(1)]), whole)
    assert torch.equal(torch.cat([nearest(row, e) for row in x.split(7)]), whole)
    monkeypatch.setattr("diffkern.nn.quantised.MOST_DISTANCES", 32 * 5)
    assert torch.equal(nearest(x, e), whole)


def test_losses_and_gradients_go_where_they_belong() -> None:
    book = Codebook(5, 3, None, 0.05)
    z = torch.randn(2, 3, 2, 4, requires_grad=True)
    found = book(z)
    code = book.codes.detach().numpy()[found.indices.numpy()].transpose(0, 3, 1, 2)
    expected = ((z.detach().numpy() - code) ** 2).reshape(2, -1).mean(axis=1)
    np.testing.assert_allclose(found.commitment.detach().numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(found.codebook.detach().numpy(), expected, rtol=1e-6)
    np.testing.assert_array_equal(found.latents.detach().numpy(), code)
    weights = torch.randn_like(z)
    of_z, of_codes = torch.autograd.grad((found.latents * weights).sum(), (z, book.codes), allow_unused=True)
    assert torch.equal(of_z, weights)  # straight through
    assert of_codes is None
    of_z, of_codes = torch.autograd.grad(found.commitment.sum(), (z, book.codes), allow_unused=True)
    np.testing.assert_allclose(of_z.numpy(), 2.0 * (z.detach().numpy() - code) / 24, rtol=1e-5, atol=1e-7)
    assert of_codes is None
    of_z, of_codes = torch.autograd.grad(found.codebook.sum(), (z, book.codes), allow_unused=True)
    assert of_z is None
    summed = np.zeros((5, 3))
    np.add.at(summed, found.indices.numpy(), 2.0 * (code - z.detach().numpy()).transpose(0, 2, 3, 1) / 24)
    np.testing.assert_allclose(of_codes.numpy(), summed, rtol=1e-5, atol=1e-7)
    assert book.update(found) == 0  # which a gradient does


# ------------------------------------------------------------------------------------------------- averages, dead codes
def test_codes_are_averages_of_what_falls_to_them() -> None:
    book = Codebook(4, 2, 0.8, 0.0)
    counts, sums = np.ones(4), book.codes.double().numpy().copy()
    for _ in range(5):
        z = torch.randn(2, 2, 3, 3)
        found = book(z)
        rows, falls = z.permute(0, 2, 3, 1).reshape(-1, 2).double().numpy(), found.indices.flatten().numpy()
        for k in range(4):
            counts[k] = 0.8 * counts[k] + 0.2 * (falls == k).sum()
            sums[k] = 0.8 * sums[k] + 0.2 * rows[falls == k].sum(axis=0)
        assert book.update(found) == 0
        np.testing.assert_allclose(book.counts.numpy(), counts, rtol=1e-5)
        np.testing.assert_allclose(book.codes.numpy(), sums / counts[:, None], rtol=1e-5, atol=1e-6)
    assert book.updates.item() == 5


def test_a_code_without_a_count_stays_where_it_is() -> None:
    """Without restarts: at once with averages of one batch, else after thousands of updates that never reach it."""
    book = Codebook(4, 2, 0.0, 0.0)
    with torch.no_grad():
        book.codes[:] = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 60.0], [70.0, 70.0]])
    far = book.codes[1:].clone()
    z = torch.randn(2, 2, 3, 3)
    assert book.update(book(z)) == 0
    torch.testing.assert_close(book.codes[0], z.mean((0, 2, 3)))
    assert torch.equal(book.codes[1:], far)
    slow = Codebook(2, 1, 0.5, 0.0)
    with torch.no_grad():
        slow.codes[:] = torch.tensor([[0.0], [50.0]])
        slow.sums[:] = slow.codes
    for _ in range(200):
        slow.update(slow(torch.zeros(1, 1, 1, 1)))
    assert slow.counts[1] < 1e-37
    assert slow.codes.flatten().tolist() == [0.0, 50.0]


def test_dead_codes_start_again_from_latents_drawn_by_address() -> None:
    book = Codebook(6, 2, 0.5, 0.3)
    with torch.no_grad():
        book.codes[:] = 100.0  # nothing falls to them
        book.codes[0] = 0.0
    z, seeds = torch.randn(2, 2, 3, 3), torch.tensor([11, -4])
    found = book(z, seeds)
    assert found.indices.unique().tolist() == [0]
    again = book.update(found)  # counts 0.5 of a mean of (5 * 0.5 + 9.5) / 6 = 2: dead
    assert again == 5
    draws = torch.cat([ops.randn([1, 3, 3], seed[None], streams.CODEBOOK).flatten() for seed in seeds])
    rows = z.permute(0, 2, 3, 1).reshape(-1, 2)
    torch.testing.assert_close(book.codes[1:], rows[draws.argsort()[:5]])
    torch.testing.assert_close(book.counts[1:], torch.full((5,), 2.0))
    assert len(book.codes.unique(dim=0)) == 6


def test_more_dead_codes_than_latents() -> None:
    book = Codebook(20, 2, 0.0, 0.5)
    found = book(torch.randn(1, 2, 1, 3), 3)
    alive = len(found.indices.unique())
    assert book.update(found) == 3 < 20 - alive
    assert book.codes.isfinite().all()


def test_a_codebook_recovers_from_collapse() -> None:
    book = Codebook(8, 2, 0.9, 0.05)
    centres = torch.tensor([[math.cos(a), math.sin(a)] for a in np.arange(8) * math.pi / 4.0]) * 3.0
    with torch.no_grad():
        book.codes.fill_(50.0)
    for step in range(60):
        z = (centres[torch.arange(64) % 8] + torch.randn(64, 2) * 0.05).view(4, 4, 4, 2).permute(0, 3, 1, 2)
        book.update(book(z, torch.arange(4) + 4 * step))
    found = statistics(book(z), 8)
    assert found.usage >= 0.75
    assert found.perplexity > 5.0


def test_statistics_by_numpy() -> None:
    indices = torch.tensor([[[0, 0], [3, 1]], [[0, 3], [0, 0]]])
    zero = torch.zeros(2)
    found = statistics(Quantised(zero, zero, indices, zero, zero), 5)
    p = np.array([5, 1, 2]) / 8
    assert found.usage == 3 / 5
    np.testing.assert_allclose(found.perplexity, np.exp(-(p * np.log(p)).sum()), rtol=1e-12)


_JOB = """
import sys, torch
from torch import distributed as dist
from diffkern.nn.codebook import Codebook, statistics
rank, world = int(sys.argv[1]), int(sys.argv[2])
dist.init_process_group("gloo", init_method="file://" + sys.argv[3], rank=rank, world_size=world)
torch.manual_seed(0)
book, again = Codebook(40, 3, 0.7, 0.2), 0
for step in range(6):
    z, seeds = torch.randn(4, 3, 3, 3), torch.arange(4) + 4 * step
    mine = slice(4 * rank // world, 4 * (rank + 1) // world)
    found = book(z[mine], seeds[mine])
    again += book.update(found)
if rank == 0:
    torch.save({**book.state_dict(), "again": again, "statistics": list(statistics(found, 40))}, sys.argv[4])
else:
    statistics(found, 40)
dist.destroy_process_group()
"""


@pytest.mark.full
def test_two_processes_do_as_one(tmp_path: pathlib.Path) -> None:
    made = []
    for world in (1, 2):
        place, out = tmp_path / f"meet{world}", tmp_path / f"{world}.pt"
        jobs = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", _JOB, str(rank), str(world), str(place), str(out)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank in range(world)
        ]
        assert [job.wait(timeout=120) for job in jobs] == [0] * world
        made.append(torch.load(out))
    assert made[0]["again"] == made[1]["again"] > 0
    assert made[0].keys() == made[1].keys()
    for name, value in made[0].items():
        if isinstance(value, Tensor):
            assert torch.equal(made[1][name], value), name
        else:
            np.testing.assert_allclose(made[1][name], value, rtol=1e-12)


# ---------------------------------------------------------------------------------------------------- finite scalars
@pytest.mark.parametrize("levels", [(8, 5, 5, 5), (2,), (3, 4), (7, 2, 6)])
def test_indices_and_codes_of_levels_go_round(levels: tuple[int, ...]) -> None:
    scalars, count = FiniteScalars(levels), math.prod(levels)
    indices = torch.arange(count).view(1, 1, count)
    codes = scalars.codes_of(indices)
    assert torch.equal(scalars.indices_of(codes), indices)
    # all combinations, channel 0 fastest, of whole numbers around 0 over L // 2
    every = itertools.product(*[[(i - n // 2) / (n // 2) for i in range(n)] for n in reversed(levels)])
    expected = torch.tensor([combination[::-1] for combination in every]).T
    torch.testing.assert_close(codes[0, :, 0], expected, rtol=1e-6, atol=0)
    assert torch.equal(scalars.snap(codes), codes)


@pytest.mark.parametrize("levels", [(8, 5, 3), (2, 4, 7)])
def test_every_level_is_reached_and_none_beyond(levels: tuple[int, ...]) -> None:
    scalars = FiniteScalars(levels)
    z = torch.linspace(-30.0, 30.0, 4001).expand(3, -1).reshape(1, 3, 1, -1)
    found = scalars(z)
    for i, n in enumerate(levels):
        values = found.latents[0, i].unique() * (n // 2)
        assert values.tolist() == [k - n // 2 for k in range(n)]
        assert (found.before[0, i].flatten().diff() >= 0).all()
    assert scalars.bound(torch.zeros(1, 3, 1, 1)).abs().max() < 1e-6
    beyond = scalars.snap(torch.tensor([-9.0, 9.0]).view(1, 1, 1, 2).expand(1, 3, 1, 2))
    assert torch.equal(scalars.codes_of(scalars.indices_of(beyond)), beyond)
    assert 0 <= int(scalars.indices_of(beyond).min()) <= int(scalars.indices_of(beyond).max()) < math.prod(levels)


def test_rounding_by_numpy_and_its_gradient() -> None:
    levels = (8, 5)
    scalars = FiniteScalars(levels)
    z = torch.randn(2, 2, 3, 3, requires_grad=True)
    found = scalars(z)
    for i, n in enumerate(levels):
        reach, offset = (n - 1) * 1.001 / 2.0, 0.5 if n % 2 == 0 else 0.0
        b = np.tanh(z.detach().double().numpy()[:, i] + np.arctanh(offset / reach)) * reach - offset
        np.testing.assert_allclose(found.latents.detach().numpy()[:, i], np.round(b) / (n // 2), atol=1e-6)
    (through,) = torch.autograd.grad(found.latents.sum(), z, retain_graph=True)
    (of_bound,) = torch.autograd.grad(found.before.sum(), z)
    torch.testing.assert_close(through, of_bound)
    assert not found.commitment.requires_grad


# -------------------------------------------------------------------------------------------------------- the network
@pytest.mark.parametrize(
    "changes",
    [
        {"regularisation": "vq", "codes": 12},
        {"regularisation": "vq", "codes": 12, "decay": None},
        {"regularisation": "fsq", "fsq_levels": (5, 5)},
    ],
)
def test_codes_by_number_decode_to_the_same_image(changes: dict[str, Any]) -> None:
    network = model(**changes)
    with torch.no_grad():
        encoded = network.encode(images())
        assert torch.equal(network.decode_indices(encoded.indices), network.decode(encoded.latents))
    found = network.codebook_statistics(encoded)
    assert 0.0 < found.usage <= 1.0 <= found.perplexity <= network.config.code_count
    assert network.update_codebook(encoded) >= 0
    assert (network.encode(images(), torch.arange(2)).seeds == torch.arange(2)).all()


@pytest.mark.parametrize(
    "changes", [{"regularisation": "vq", "codes": 20}, {"regularisation": "fsq", "fsq_levels": (4, 5)}]
)
def test_codes_that_there_are_not_are_refused(changes: dict[str, Any]) -> None:
    codes = model(**changes).eval()
    for wrong, sentence in (
        (torch.full((1, 4, 4), 20), r"indices must lie in 0\.\.19, the codes, got 20"),
        (torch.full((1, 4, 4), -1), r"indices must lie in 0\.\.19, the codes, got -1"),
        (torch.zeros(4, 4, dtype=torch.int64), r"indices must be int64 \[B, h, w\], got torch.int64 \[4, 4\]"),
        (torch.zeros(1, 4, 4), r"indices must be int64 \[B, h, w\], got torch.float32 \[1, 4, 4\]"),
        ([[[0]]], r"indices must be int64 \[B, h, w\], got list"),
    ):
        with pytest.raises(ValueError, match=sentence):
            codes.decode_indices(wrong)


def test_updates_by_something_else_are_refused_at_once() -> None:
    codes = model(regularisation="vq", codes=4, restart_below=0.0)
    encoded = codes.encode(images())
    with pytest.raises(ValueError, match='encoded must be of an autoencoder with codes, "vq" or "fsq", got NoneType'):
        codes.update_codebook(None)
    with pytest.raises(ValueError, match=rf"seeds must be an integer or int64 \[{len(encoded.indices)}\]"):
        codes.update_codebook(encoded, torch.arange(len(encoded.indices) + 1))
    assert int(codes.quantiser.updates) == 0
