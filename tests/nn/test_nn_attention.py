"""The attention blocks: numerically those of guided-diffusion and diffusers with the same weights."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.memory import allocated
from helpers.op_cases import values
from helpers.tolerances import unit_roundoff
from torch import Tensor, nn
from torch.nn import functional as F

from diffkern.nn import SpatialCrossAttention, SpatialSelfAttention
from diffkern.nn.heads import count_heads


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


class GuidedDiffusionBlock(nn.Module):
    """guided-diffusion's AttentionBlock from its formulas: norm in float32, 1-D convolutions, both orders."""

    def __init__(self, channels: int, num_heads: int, legacy: bool) -> None:
        super().__init__()
        self.heads, self.legacy = num_heads, legacy
        self.norm = nn.GroupNorm(32, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, *positions = x.shape
        x = x.reshape(batch, channels, -1)
        qkv = self.qkv(self.norm(x.to(self.norm.weight.dtype)).type(x.dtype))
        d = channels // self.heads
        if self.legacy:
            q, k, v = qkv.reshape(batch * self.heads, 3 * d, -1).split(d, 1)
        else:
            q, k, v = (t.reshape(batch * self.heads, d, -1) for t in qkv.chunk(3, 1))
        factor = 1 / math.sqrt(math.sqrt(d))
        weight = torch.einsum("bct,bcs->bts", q * factor, k * factor)
        weight = weight.float().softmax(-1).type(weight.dtype)
        h = torch.einsum("bts,bcs->bct", weight, v).reshape(batch, channels, -1)
        return (x + self.proj_out(h)).reshape(batch, channels, *positions)


def awake(module: nn.Module) -> nn.Module:
    """The module with all its parameters random: the last layers start at zero."""
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn_like(p) / math.sqrt(p[0].numel()) + (p.dim() == 1))
    return module


def assert_near(a: Tensor, b: Tensor) -> None:
    """To float32's precision of the largest number: gradients of weights are sums in which much cancels."""
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 2e-5 * b.abs().max() + 1e-12


def both(channels: int, heads: int, order: str) -> tuple[SpatialSelfAttention, nn.Module]:
    theirs = awake(GuidedDiffusionBlock(channels, heads, order == "legacy"))
    ours = SpatialSelfAttention(channels, heads, order=order)
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    return ours, theirs


# ------------------------------------------------------------------------------------------------------ self-attention
@pytest.mark.parametrize("order", ["legacy", "new"])
@pytest.mark.parametrize(
    ("channels", "heads", "positions"),
    [
        (64, 1, (8, 8)),
        (128, 4, (7, 9)),
        (96, 4, (35,)),
        (64, 2, (3, 4, 5)),
        (512, 1, (6, 6)),
        (64, 4, (2, 3, 2, 2)),
        (32, 2, (1, 1)),
    ],
)
def test_guided_diffusion_block(channels: int, heads: int, positions: tuple[int, ...], order: str) -> None:
    """Output and every gradient, with its weights by name."""
    ours, theirs = both(channels, heads, order)
    # A group of one element has no gradient: what is left of it in float32 is rounding times eps^-1/2, here and there.
    dtype = torch.float32 if math.prod(positions) > 1 else torch.float64
    ours, theirs = ours.to(dtype), theirs.to(dtype)
    x = values((2, channels, *positions), 1).to(dtype)
    up = values(tuple(x.shape), 2).to(dtype)
    results = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        out = module(leaf)
        grads = torch.autograd.grad(out, (leaf, *module.parameters()), up)
        results.append((out, *grads))
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in theirs.named_parameters()]
    for a, b in zip(*results, strict=True):
        assert_near(a, b)


def test_the_order_matters() -> None:
    ours, theirs = both(64, 4, "new")
    ours.order = "legacy"
    x = values((2, 64, 4, 4), 1)
    assert (ours(x) - theirs(x)).abs().max() > 0.01


@pytest.mark.parametrize("order", ["new", "legacy", "edm"])
def test_memory_format_is_kept(order: str) -> None:
    block = awake(SpatialSelfAttention(64, 2, order=order))
    x = values((2, 64, 6, 5), 1)
    last = x.contiguous(memory_format=torch.channels_last)
    out = block(x)
    assert out.is_contiguous()
    torch.testing.assert_close(block(last), out, rtol=1e-4, atol=1e-4)
    assert block(last).is_contiguous(memory_format=torch.channels_last)


def test_edm_interleaves_the_parts() -> None:
    """The rows of qkv put from one order into the other give the same block."""
    new = awake(SpatialSelfAttention(64, 2))
    edm = SpatialSelfAttention(64, 2, order="edm")
    state = new.state_dict()
    for name in ("qkv.weight", "qkv.bias"):
        rows = state[name].reshape(3, 2, 32, *state[name].shape[1:])
        state[name] = rows.permute(1, 2, 0, *range(3, rows.dim())).reshape(state[name].shape)
    edm.load_state_dict(state)
    x = values((2, 64, 6, 5), 1)
    torch.testing.assert_close(edm(x), new(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("extra", [(), (1,), (1, 1)])
def test_weights_of_any_1_x_1_shape(extra: tuple[int, ...]) -> None:
    """Of a linear layer, a one- or a two-dimensional convolution (DDPM); within a larger network too."""
    source = awake(SpatialSelfAttention(512))
    state = {
        f"mid.{name}": t.reshape(*t.shape[:2], *extra) if t.dim() == 3 else t for name, t in source.state_dict().items()
    }
    before = dict(state)
    network = nn.ModuleDict({"mid": SpatialSelfAttention(512)})
    network.load_state_dict(state)
    x = values((1, 512, 3, 3), 1)
    assert torch.equal(network["mid"](x), source(x))
    assert all(state[name] is t for name, t in before.items()), "the caller's state dict was changed"
    state["mid.qkv.weight"] = torch.zeros(1536, 512, 3, 3)
    with pytest.raises(
        ValueError, match=r"mid\.qkv\.weight must be the weight of a 1 x 1 convolution, got \(1536, 512"
    ):
        network.load_state_dict(state)


def test_starts_as_the_identity() -> None:
    x, context = values((2, 64, 4, 4), 1), values((2, 7, 24), 2)
    assert torch.equal(SpatialSelfAttention(64, 2)(x), x)
    assert torch.equal(SpatialCrossAttention(64, 24, 2)(x, context), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_with_the_norm_in_float32(dtype: torch.dtype) -> None:
    """As guided-diffusion's convert_to_fp16 leaves it: convolutions in half precision, the norm in float32."""
    ours, theirs = both(64, 2, "legacy")
    for module in (ours, theirs):
        for child in (module.qkv, module.proj_out):
            child.to(dtype)
    x = values((2, 64, 6, 5), 1, dtype)
    exact = awake(SpatialSelfAttention(64, 2, order="legacy")).double()
    exact.load_state_dict(ours.state_dict())
    want = exact(x.double())
    out = ours(x)
    assert out.dtype == dtype
    error, baseline = ((t.double() - want).square().mean().sqrt() for t in (out, theirs(x)))
    # Which of the two rounds more follows the order of sums in the processor's products: one rounding of the result.
    assert error <= 1.5 * baseline + unit_roundoff(dtype) * want.square().mean().sqrt()
    with torch.autocast("cpu", dtype):
        mixed = both(64, 2, "legacy")[0]
        assert mixed(x.float()).dtype == torch.float32


def test_memory_is_that_of_the_convolutions() -> None:
    """Beside what norm, 1 x 1 convolutions and the sum make: the attention's result and a number a query and head."""
    block = SpatialSelfAttention(64, 2)
    x = values((1, 64, 32, 32), 1)
    with torch.no_grad():
        used, _ = allocated(lambda: block(x))
        parts = 0
        for step in (lambda: block.norm(x), lambda: F.conv2d(x, block.qkv.weight[..., None], block.qkv.bias)):
            parts += allocated(step)[0]
        parts += 2 * allocated(lambda: F.conv2d(x, block.proj_out.weight[..., None], block.proj_out.bias))[0]
    assert used <= parts + x.numel() * 4 + 2 * 1024 * 4 + 8192


# ----------------------------------------------------------------------------------------------------- cross-attention
def plain_cross(block: SpatialCrossAttention, x: Tensor, context: Tensor) -> Tensor:
    batch, channels, *positions = x.shape
    heads = block.num_heads
    tokens = block.norm(x).flatten(2).transpose(1, 2)
    q = F.linear(tokens, block.q.weight[..., 0], block.q.bias).unflatten(-1, (heads, -1)).transpose(1, 2)
    k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in block.kv(context).chunk(2, -1))
    h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    h = F.linear(h, block.proj_out.weight[..., 0], block.proj_out.bias).transpose(1, 2)
    return x + h.reshape(batch, channels, *positions)


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_cross_attention_is_its_formula(form: torch.memory_format) -> None:
    block = awake(SpatialCrossAttention(64, 40, num_head_channels=16))
    x = values((2, 64, 6, 5), 1).contiguous(memory_format=form)
    context = values((2, 77, 40), 2)
    results = []
    for function in (block, lambda *a: plain_cross(block, *a)):  # type: ignore[arg-type]
        leaves = [t.detach().requires_grad_() for t in (x, context)]
        out = function(*leaves)
        grads = torch.autograd.grad(out, (*leaves, *block.parameters()), values(tuple(x.shape), 3))
        results.append((out, *grads))
    for a, b in zip(*results, strict=True):
        assert_near(a, b)
    assert results[0][0].is_contiguous(memory_format=form)


def test_cross_attention_of_one_and_three_dimensions() -> None:
    block = awake(SpatialCrossAttention(32, 8, 2))
    context = values((2, 5, 8), 2)
    for positions in ((11,), (2, 3, 4)):
        x = values((2, 32, *positions), 1)
        torch.testing.assert_close(block(x, context), plain_cross(block, x, context), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_against_diffusers(cross: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    processor = pytest.importorskip("diffusers.models.attention_processor")
    theirs = processor.Attention(
        query_dim=64,
        cross_attention_dim=40 if cross else None,
        heads=4,
        dim_head=16,
        norm_num_groups=32,
        bias=True,
        residual_connection=True,
        eps=1e-6,
        processor=processor.AttnProcessor2_0(),
    )
    awake(theirs)
    given = theirs.state_dict()
    state = {f"norm.{p}": given[f"group_norm.{p}"] for p in ("weight", "bias")}
    state |= {f"proj_out.{p}": given[f"to_out.0.{p}"] for p in ("weight", "bias")}
    for name, parts in (("q", "q"), ("kv", "kv")) if cross else (("qkv", "qkv"),):
        state |= {f"{name}.{p}": torch.cat([given[f"to_{x}.{p}"] for x in parts]) for p in ("weight", "bias")}
    ours = SpatialCrossAttention(64, 40, 4, eps=1e-6) if cross else SpatialSelfAttention(64, 4, eps=1e-6)
    ours.load_state_dict(state)
    x, context = values((2, 64, 6, 5), 1), values((2, 77, 40), 2)
    extra = (context,) if cross else ()
    torch.testing.assert_close(ours(x, *extra), theirs(x, *extra), rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------- compile and bad input
@pytest.mark.full
def test_compiled_in_one_graph() -> None:
    own, cross = awake(SpatialSelfAttention(64, 2)), awake(SpatialCrossAttention(64, 24, 2))
    x, context = values((2, 64, 6, 5), 1), values((2, 7, 24), 2)

    def network(x: Tensor, context: Tensor) -> Tensor:
        return cross(own(x), context)

    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    for form in (torch.contiguous_format, torch.channels_last):
        given = x.contiguous(memory_format=form).requires_grad_()
        out, want = compiled(given, context), network(given, context)
        torch.testing.assert_close(out, want)
        torch.testing.assert_close(*(torch.autograd.grad(t.sum(), given)[0] for t in (out, want)))
    torch._dynamo.reset()


def test_bad_input() -> None:
    block, cross = SpatialSelfAttention(64, 2), SpatialCrossAttention(64, 24, 2)
    with pytest.raises(ValueError, match=r"x must have shape \(B, 64, positions...\), got \(2, 32, 4, 4\)"):
        block(torch.zeros(2, 32, 4, 4))
    with pytest.raises(ValueError, match=r"x must have shape \(B, 64, positions...\), got \(2, 64\)"):
        cross(torch.zeros(2, 64), torch.zeros(2, 7, 24))
    for shape in ((7, 24), (1, 7, 24), (2, 7, 25)):
        with pytest.raises(ValueError, match=r"context must have shape \(2, tokens, 24\), got \("):
            cross(torch.zeros(2, 64, 4, 4), torch.zeros(shape))
    for arguments, sentence in (
        ((64, 3), "num_heads must divide the 64 channels, got 3"),
        ((64, 0), "num_heads must divide the 64 channels, got 0"),
        ((64, 1, 24), "num_head_channels must divide the 64 channels, got 24"),
        ((96, 8), r"a multiple of 8 up to 256, or 512, got 12 \(96 channels in 8 heads\)"),
        ((320, 1), r"a multiple of 8 up to 256, or 512, got 320 \(320 channels in 1 heads\)"),
        ((72, 1), "groups must divide the 72 channels, got 32"),
    ):
        with pytest.raises(ValueError, match=sentence):
            SpatialSelfAttention(*arguments)
    with pytest.raises(ValueError, match=r"order must be one of new, legacy, edm, got 'old'"):
        SpatialSelfAttention(64, order="old")
    assert count_heads(512) == 1
    assert count_heads(512, num_head_channels=64) == 8
