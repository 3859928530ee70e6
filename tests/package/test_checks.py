"""The sentence about a function of the user's that returned something else."""

from __future__ import annotations

import pytest
import torch

from diffkern.checks import got, must_return, returned


def test_what_is_returned_is_checked() -> None:
    x = torch.zeros(2, 3)
    assert returned(x, x.shape) is x
    with pytest.raises(ValueError, match=r"^model must return a tensor of shape \[2, 3\], got shape \[3, 2\]$"):
        returned(x.T, x.shape)
    with pytest.raises(ValueError, match=r"^shift must return a tensor of shape \[2, 3\], got list at row 0$"):
        returned([x], x.shape, "shift", 0)
    assert must_return(None, "one number", "weight") == "weight must return one number, got NoneType"
    assert got(x) == "shape [2, 3]"
