"""Valid calls of the ops of networks, drawn by hypothesis: a part of fuzz_calls.py."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from diffkern import ops, reference
from helpers.fuzz_draws import DTYPES, Call, tensors
from helpers.op_cases import arrange
from helpers.winograd import packed_weight


@st.composite
def group_norm_calls(draw: st.DrawFn) -> Call:
    dtype, width, groups = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 5)), draw(st.integers(1, 4))
    positions = draw(st.sampled_from([(8,), (67,), (4, 5), (33, 34), (3, 4, 2)]))
    shape = (draw(st.integers(1, 3)), width * groups, *positions)
    given: dict[str, Any] = {"x": draw(tensors(shape, dtype)), "groups": groups}
    sizes = dict.fromkeys(("weight", "bias"), shape[1:2]) | dict.fromkeys(("scale", "shift", "add"), shape[:2])
    for name, size in sizes.items():
        given[name] = draw(tensors(size, draw(st.sampled_from(DTYPES)))) if draw(st.booleans()) else None
    given |= {"eps": draw(st.sampled_from([1e-5, 0.5])), "act": draw(st.sampled_from(["silu", None]))}
    return Call("group_norm_act", given, lambda: (reference.group_norm_act(**given),), 64.0, 1.5)


@st.composite
def linear_rows_calls(draw: st.DrawFn) -> Call:
    dtype, inputs = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([1, 5, 16, 67, 530]))
    leading = draw(st.sampled_from([(1,), (4,), (25,), (2, 3), (3, 1, 2)]))
    outputs = draw(st.sampled_from([1, 3, 8, 21]))
    given: dict[str, Any] = {"x": draw(tensors((*leading, inputs), dtype))}
    given["weight"] = draw(tensors((outputs, inputs), dtype))
    given["bias"] = draw(tensors((outputs,), dtype)) if draw(st.booleans()) else None
    given["act"] = draw(st.sampled_from(["silu", None]))
    return Call("linear_rows", given, lambda: (reference.linear_rows(**given),), 2.25 * inputs + 1.5)


@st.composite
def conv3x3_calls(draw: st.DrawFn, packs: bool = False) -> Call:
    """The op's own dtype is float32. Sums of F(4, 3) round more: by what its matrices are large."""
    inputs, outputs = draw(st.sampled_from([1, 3, 17, 97])), draw(st.sampled_from([1, 5, 64, 66]))
    form: dict[str, Any] = {"upsample": draw(st.booleans()), "precision": draw(st.sampled_from(["exact", "fast"]))}
    weight = draw(tensors((outputs, inputs, 3, 3), torch.float32))
    if packs:
        points = "upsampled" if form["upsample"] else form["precision"]
        return Call("pack_conv3x3", {"weight": weight, **form}, lambda: (packed_weight(weight, points),), 9 * 1.5)
    size = draw(st.sampled_from([1, 2, 4, 5, 9])), draw(st.sampled_from([1, 3, 8, 11]))
    given: dict[str, Any] = {"x": draw(tensors((draw(st.integers(1, 3)), inputs, *size), torch.float32))}
    given |= {"weight": weight, "bias": draw(tensors((outputs,), torch.float32)) if draw(st.booleans()) else None}
    given["packed"] = ops.pack_conv3x3(weight, **form) if draw(st.booleans()) else None

    def expected() -> tuple[Tensor]:
        return (reference.conv3x3(given["x"], weight, given["bias"], upsample=form["upsample"]),)

    fast = form["precision"] == "fast" and not form["upsample"]
    return Call("conv3x3", {**given, **form}, expected, (20 if fast else 1) * (2.25 * 9 * inputs + 1.5))


@st.composite
def attention_calls(draw: st.DrawFn) -> Call:
    dtype, dim = draw(st.sampled_from(DTYPES)), draw(st.sampled_from([8, 16, 24, 64, 512]))
    batch, heads, queries, keys = (draw(st.integers(1, most)) for most in (2, 3, 40, 70))
    q, k, v = (draw(tensors((batch, heads, n, dim), dtype)) for n in (queries, keys, keys))
    q, k, v = (t.contiguous() if 1 not in (t.stride(2), t.stride(3)) else t for t in (q, k, v))
    scale = draw(st.sampled_from([None, 0.1, 0.0, -0.2]))
    given = {"q": q, "k": k, "v": v, "scale": scale}
    return Call("attention", given, lambda: reference.attention(**given)[:1], 32.0, 1.5)


@st.composite
def spatial_calls(draw: st.DrawFn) -> Call:
    dtype, dim, heads = (draw(st.sampled_from(c)) for c in (DTYPES, [8, 16, 64], [1, 2, 3]))
    positions = draw(st.sampled_from([(1,), (5,), (3, 4), (1, 7), (2, 3, 2)]))
    order = draw(st.sampled_from(["new", "legacy", "edm"]))
    qkv = draw(tensors((draw(st.integers(1, 2)), 3 * heads * dim, *positions), dtype)).contiguous()
    if order != "edm" and draw(st.booleans()):
        qkv = arrange(qkv, "channels_last")
    given = {"qkv": qkv, "num_heads": heads, "order": order, "scale": draw(st.sampled_from([None, 0.1]))}
    return Call("spatial_attention", given, lambda: reference.spatial_attention(**given)[:1], 32.0, 1.5)
