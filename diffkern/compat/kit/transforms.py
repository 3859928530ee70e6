"""Whether torch differentiates or batches in a way that the fused ops do not take part in."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether a forward-mode derivative, torch.func or vmap is at work.

    The ops carry no tangents (they would come out as zeros) and no batches of vmap: plain torch has to do it.
    """
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None
