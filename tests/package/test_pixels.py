"""Bytes and images."""

from __future__ import annotations

import torch

from diffkern.pixels import from_bytes, to_bytes


def test_every_byte_comes_back_and_the_ends_are_one() -> None:
    every = torch.arange(256, dtype=torch.uint8).reshape(4, 64)
    x = from_bytes(every)
    assert x.dtype == torch.float32
    assert (x[0, 0].item(), x[3, 63].item()) == (-1.0, 1.0)
    assert torch.equal(to_bytes(x), every)


def test_what_is_outside_is_clamped_and_what_is_between_is_rounded() -> None:
    x = torch.tensor([-7.0, 7.0, 0.0, from_bytes(torch.tensor([10]))[0].item() + 0.9 / 127.5])
    assert to_bytes(x).tolist() == [0, 255, 128, 11]  # 127.5 rounds to the even 128
