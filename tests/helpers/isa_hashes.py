"""Hashes of what the ops compute, for comparison between SIMD levels: `python isa_hashes.py` prints them as JSON."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import Tensor


def digest(*tensors: Tensor | None) -> str:
    sha = hashlib.sha256()
    for t in tensors:
        if t is not None:
            sha.update(t.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def hashes() -> dict[str, str]:
    """Every op over the dtypes, with odd sizes so that whole vectors and remainders are met."""
    from diffkern import _C, ops
    from helpers.op_cases import ROWS, arrange, table, values

    shape = (2, 3, 37, 29)
    seeds = torch.tensor([5, -7])
    found: dict[str, str] = {}
    for quad in (0, 2**32 - 21, 2**33 + 5, 2**63 - 9, 2**64 - 50):  # counters that no tensor reaches
        found[f"normals {quad}"] = hashlib.sha256(_C.normals(2**64 - 3, 2**53 - 1, quad, 47)).hexdigest()[:16]
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for layout in ("contiguous", "channels_last", "sliced"):
            out = arrange(torch.zeros(shape, dtype=dtype), layout)
            found[f"randn {name} {layout}"] = digest(ops.randn(shape, seeds, 2**40 + 3, out=out))
            ops.noise_sum_out(seeds, torch.tensor([3, 2**41, 5]), torch.tensor([0.3, -1.7, 11.0]).double(), out)
            found[f"noise_sum {name} {layout}"] = digest(out)
        x, m = values(shape, 1, dtype), values(shape, 2, dtype)
        # Infinities, NaN, subnormal and huge values: the conversions of 16-bit tensors must agree on them too.
        x.view(-1)[:8] = torch.tensor([float("inf"), -float("inf"), float("nan"), 1e-7, -6e-8, 65504.0, 1e30, 0.0])
        rows = torch.tensor([[0.9, 0.4, 0.4, -0.9], [0.1, 0.99, 0.99, -0.1]], dtype=torch.float64)
        found[f"noising {name}"] = digest(*ops.noising(x, rows, seeds=seeds, want_target=True, want_eps=True))
        weights = torch.tensor([[0.4, -0.9, 1.5], [0.3, 0.2, 0.7]], dtype=torch.float64)
        for reduction in range(3):
            loss = torch.ops.diffkern.loss(m, values(shape, 3, dtype), weights, None, seeds, 3, None, reduction, True)
            found[f"loss {name} {reduction}"] = digest(*loss)
        bounds = torch.tensor([[0.1, 0.9, -0.5, 1.2, 2.0, 0.3, 0.3, std, 0.004, 1.0, 0.1, 1.0] for std in (0.0, 30.0)])
        both = torch.cat([m, values(shape, 5, dtype)], 1)
        image = values(shape, 3, dtype) / 2
        bound = torch.ops.diffkern.variational(both, image, bounds.double(), None, seeds, 3, None, 1, True)
        found[f"variational {name}"] = digest(*bound)
        usual = values((2, 3, 211, 109), 3, dtype)  # more than one part of the quantile's count
        for k, t in enumerate((usual, arrange(usual[:, :, :37, :29], "sliced"), x)):
            found[f"quantile {name} {k}"] = digest(*(ops.quantile(t, q) for q in (0.0, 0.31, 0.5, 0.995)))
            found[f"threshold {name} {k}"] = digest(ops.dynamic_threshold(t, 0.9, 1.5))
            found[f"moments {name} {k}"] = digest(ops.moments(t))
        for form in ("contiguous", "channels_last"):
            t = arrange(values((2, 6, 37, 33), 11, dtype), form).requires_grad_()
            w = values((1, 6), 12)[0].requires_grad_()
            s, h = (values((2, 6), k, dtype).requires_grad_() for k in (13, 14))
            y = ops.group_norm_act(t, 2, w, scale=s, add=h)
            found[f"group_norm_act {name} {form}"] = digest(y.detach(), *torch.autograd.grad(y.sum(), (t, w, s, h)))
        for rows, inputs, outputs in ((1, 67, 9), (29, 530, 21)):
            given = (values((n, inputs), k, dtype) for k, n in ((14, rows), (15, outputs)))
            y = ops.linear_rows(*given, values((1, outputs), 16, dtype)[0], act="silu")
            found[f"linear_rows {name} {rows}"] = digest(y)
        columns = {"p": 1.25, "q": -0.75, "clip": 1.5, "a": 0.6, "b": 0.4, "g": 1.0, "k": 0.9, "r0": -2.5, "r1": 1.5}
        learned = torch.tensor([[columns.get(name, 0.0) for name in ops.LEARNED_COLUMNS]], dtype=torch.float64)
        one = ops.learned_step(x, both, table=learned, seeds=seeds, want_x0=True, next_copies=1)
        found[f"learned_step {name}"] = digest(*one)
        density = torch.ops.diffkern.step_logprob(image, m, both, *(None,) * 5, learned, 0, None, True)
        found[f"step_logprob {name} learned"] = digest(*density)
        for row, coefficients in ROWS.items():
            h = [values(shape, 4 + k, dtype) for k in range(4)]
            pair = torch.cat([m, values(shape, 9, dtype)])
            mask = values(shape, 10) > 0 if row == "everything" else None
            out = ops.step(
                *(x, pair, None, *h),
                **{"table": table(coefficients), "seeds": seeds, "mask": mask, "known": h[0]},
                **{"want_x0": row.startswith("x0"), "want_s": row == "everything", "next_copies": 1},
            )
            found[f"step {name} {row}"] = digest(*out)
            rows = table({**coefficients, "r": 0.0, "g": 0.3})
            density = torch.ops.diffkern.step_logprob(image, x, pair, None, *h, rows, 0, None, True)
            found[f"step_logprob {name} {row}"] = digest(*density)
    return found


def fused() -> dict[str, str]:
    """What has the same bits at every level with fused products, which scalar has not."""
    from diffkern import ops
    from helpers.op_cases import values

    found: dict[str, str] = {}
    for name, form in (("exact", {}), ("fast", {"precision": "fast"}), ("upsampled", {"upsample": True})):
        for batch, inputs, outputs, size in ((1, 5, 3, (3, 5)), (3, 97, 66, (9, 13))):
            x, weight = values((batch, inputs, *size), 1), values((outputs, inputs, 3, 3), 2)
            made = ops.conv3x3(x, weight, values((1, outputs), 3)[0], **form)  # type: ignore[arg-type]
            found[f"conv3x3 {name} {inputs}"] = digest(made, ops.pack_conv3x3(weight, **form))  # type: ignore[arg-type]
    return found


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from diffkern._load import build_info

    print(json.dumps({"isa": build_info()["isa"], "hashes": hashes(), "fused": fused()}))
