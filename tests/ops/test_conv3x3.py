"""conv3x3: the sums of its definition, bits that know nothing of the batch, any strides, and what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.op_cases import check_sentence, same_bits, threads, values
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from diffkern import ops, reference

FORMS: dict[str, dict[str, Any]] = {"exact": {}, "fast": {"precision": "fast"}, "upsampled": {"upsample": True}}
forms = pytest.mark.parametrize("form", FORMS)
# A tile is 2 x 2, 4 x 4 or (of the image that is upsampled) 1 x 1: less, whole ones, one more, and rests along one axis
SIZES = [(1, 1), (2, 2), (1, 5), (4, 1), (3, 5), (7, 9), (5, 13)]
# A block is 96 inputs, a vector 16 or fewer, a panel 64 outputs: less, whole ones, one more
CHANNELS = [(1, 1), (15, 16), (16, 63), (96, 64), (97, 65), (200, 130)]


def operands(batch: int, inputs: int, outputs: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    x = values((batch, inputs, height, width), 1, layout="channels_last")
    return x, values((outputs, inputs, 3, 3), 2) / math.sqrt(9 * inputs), values((1, outputs), 3)[0]


def seen(x: Tensor, form: str) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest") if form == "upsampled" else x


# ------------------------------------------------------------------------------------------------------------- values
@forms
def test_value(form: str) -> None:
    """At most twice the error of torch's convolution in float32 and a rounding of the result; "fast": 16 times; one
    pixel upsampled four times, as torch with AVX-512 adds up its inputs in 16 parts (networks leave it to torch)."""
    for channels in CHANNELS:
        for k, size in enumerate(SIZES):
            x, weight, bias = operands(2, *channels, *size)
            b = bias if k % 2 else None
            got = ops.conv3x3(x, weight, b, **FORMS[form])
            exact = reference.conv3x3(x, weight, b, upsample=form == "upsampled")
            theirs = F.conv2d(seen(x, form), weight, b, padding=1)
            rounding = torch.finfo(torch.float32).eps * exact.abs().max()
            assert got.dtype == torch.float32
            assert got.is_contiguous(memory_format=torch.channels_last)
            factor = 16 if form == "fast" else 4 if (form, size) == ("upsampled", (1, 1)) else 2
            limit = factor * ((theirs - exact).abs().max() + rounding)
            assert (got - exact).abs().max() <= limit, (channels, size)


@forms
def test_whole_numbers_are_exact(form: str) -> None:
    """Where nothing rounds, no product is missing or there twice: G g G^T has quarters for F(2, 3); for F(4, 3)
    24 x 24 ths, so that weights are multiples of 576."""
    for inputs, outputs in CHANNELS:
        for height, width in SIZES:
            x = torch.arange(2 * inputs * height * width).reshape(2, inputs, height, width)
            x = x.remainder(3).sub(1) if form == "fast" else x.remainder(7).sub(3)
            weight = torch.arange(outputs * inputs * 9).reshape(outputs, inputs, 3, 3)
            weight = 576 * weight.remainder(5).sub(2) if form == "fast" else weight.remainder(11).sub(5)
            bias = torch.arange(outputs)
            want = F.conv2d(seen(x.double(), form), weight.double(), bias.double(), padding=1)
            got = ops.conv3x3(x.float(), weight.float(), bias.float(), **FORMS[form])
            assert torch.equal(got.double(), want), (inputs, outputs, height, width)


def test_the_definition_by_hand() -> None:
    """One tap at a time moves the image, the border being zeros; twice as large, each pixel stands four times."""
    x = torch.arange(1.0, 13.0).reshape(1, 1, 3, 4)
    for p in range(3):
        for q in range(3):
            weight = torch.zeros(1, 1, 3, 3)
            weight[0, 0, p, q] = 1.0
            moved = torch.zeros(5, 6)
            moved[2 - p : 5 - p, 2 - q : 6 - q] = x[0, 0]
            assert torch.equal(ops.conv3x3(x, weight)[0, 0], moved[1:4, 1:5])
            torch.testing.assert_close(ops.conv3x3(x, weight, precision="fast")[0, 0], moved[1:4, 1:5])
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 1, 1] = 1.0
    twice = ops.conv3x3(x, weight, upsample=True)[0, 0]
    assert torch.equal(twice, x[0, 0].repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_upsampled_images_are_the_same_with_either_precision() -> None:
    x, weight, bias = operands(1, 5, 3, 3, 4)
    packed = ops.pack_conv3x3(weight, upsample=True, precision="fast")
    assert same_bits(packed, ops.pack_conv3x3(weight, upsample=True))
    want = ops.conv3x3(x, weight, bias, upsample=True)
    assert same_bits(ops.conv3x3(x, weight, bias, upsample=True, precision="fast", packed=packed), want)


# --------------------------------------------------------------------------------------------------------------- bits
@forms
def test_a_sample_has_its_bits_alone_and_among_others_at_any_place_and_thread_count(form: str) -> None:
    """Of few tiles (a task is one panel) and of many (two panels, several strips, the last one shorter)."""
    x, weight, bias = operands(14, 20, 130, 9, 17)
    run = lambda x, w=weight, b=bias: ops.conv3x3(x, w, b, **FORMS[form])  # noqa: E731
    whole = run(x)
    packed = ops.pack_conv3x3(weight, **FORMS[form])
    for n in (1, 2, 3):
        with threads(n):
            assert same_bits(ops.pack_conv3x3(weight, **FORMS[form]), packed)
            assert same_bits(run(x), whole)
            assert same_bits(ops.conv3x3(x, weight, bias, packed=packed, **FORMS[form]), whole)
            for begin, end in ((0, 1), (13, 14), (3, 5), (1, 12)):
                assert same_bits(run(x[begin:end]), whole[begin:end])
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    assert same_bits(run(x[order]), whole[order])
    assert same_bits(run(x[5:6].expand(3, -1, -1, -1)), whole[5].expand(3, -1, -1, -1))
    for begin, end in ((64, 130), (0, 64), (64, 128), (7, 24)):
        assert same_bits(run(x[:2], weight[begin:end], bias[begin:end]), whole[:2, begin:end])


@forms
def test_weights_of_several_rounds_are_packed_as_all_at_once(form: str) -> None:
    x, weight, bias = operands(1, 290, 400, 3, 2)
    packed = ops.pack_conv3x3(weight, **FORMS[form])
    assert packed.numel() > 2**20  # what is packed for one call at a time
    want = ops.conv3x3(x, weight, bias, packed=packed, **FORMS[form])
    assert same_bits(ops.conv3x3(x, weight, bias, **FORMS[form]), want)


@forms
def test_any_strides(form: str) -> None:
    x, weight, bias = operands(3, 20, 18, 5, 6)
    run = lambda x, w=weight, b=bias: ops.conv3x3(x, w, b, **FORMS[form])  # noqa: E731
    want = run(x)
    wide = torch.zeros(3, 8, 9, 27).permute(0, 3, 1, 2)  # channels among others, rows with a border, off any alignment
    inner = wide[:, 3:23, 2:7, 1:7]
    inner.copy_(x)
    for given in (x.contiguous(), inner, x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)):
        assert same_bits(run(given), want)
    for d in range(4):  # the same image, channel, row or column everywhere
        one = x.narrow(d, 1, 1)
        sizes = list(x.shape)
        assert same_bits(run(one.expand(sizes)), run(one.repeat([n if k == d else 1 for k, n in enumerate(sizes)])))
        one = weight.narrow(d, 1, 1)
        assert same_bits(run(x, one.expand(weight.shape)), run(x, one.expand(weight.shape).contiguous()))
    taps = torch.zeros(18, 20, 5, 4)
    taps[..., 1:4, 1:] = weight
    for w in (taps[..., 1:4, 1:], weight.transpose(0, 1).contiguous().transpose(0, 1)):
        assert same_bits(run(x, w), want)
        assert same_bits(ops.pack_conv3x3(w, **FORMS[form]), ops.pack_conv3x3(weight, **FORMS[form]))
    assert same_bits(run(x, weight.contiguous(memory_format=torch.channels_last)), want)
    assert same_bits(run(x, weight, torch.stack([bias, bias], 1)[:, 1]), want)
    assert same_bits(run(x, weight, bias[:1].expand(18)), run(x, weight, bias[:1].repeat(18)))
    assert same_bits(run(x[:, :1], weight[:, :1]), run(x[:, :1].clone(), weight[:, :1]))


def test_what_is_not_finite_reaches_what_reads_it_and_no_other_tile() -> None:
    """One place in each sample. Of F(4, 3)'s tile of inputs the first and the last go to one output along an axis, the
    four between them to all."""
    height, width = 9, 10
    places = [(i, j) for i in range(height) for j in range(width)]
    weight = values((3, 4, 3, 3), 2)

    def reached(p: int, n: int, form: str) -> set[int]:
        reads = range(2 * p - 1, 2 * p + 3) if form == "upsampled" else range(p - 1, p + 2)
        found = {o for o in reads if 0 <= o < (2 * n if form == "upsampled" else n)}
        if form == "fast":
            for tile in (p // 4, (p + 1) // 4, p // 4 - 1):
                place = p - (4 * tile - 1)
                found |= set(range(4 * tile, 4 * tile + 4)) & set(range(n)) if 1 <= place <= 4 else set()
        return found

    for form in FORMS:
        scale = 2 if form == "upsampled" else 1
        want = torch.zeros(len(places), scale * height, scale * width, dtype=torch.bool)
        for sample, (i, j) in enumerate(places):
            rows, columns = sorted(reached(i, height, form)), sorted(reached(j, width, form))
            want[sample, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        for bad in (math.nan, math.inf):
            x = values((len(places), 4, height, width), 1)
            for sample, (i, j) in enumerate(places):
                x[sample, sample % 4, i, j] = bad
            got = ~ops.conv3x3(x, weight, **FORMS[form]).isfinite()
            assert torch.equal(got, want[:, None].expand(-1, 3, -1, -1)), (form, bad)


@forms
def test_a_weight_that_is_not_finite_spoils_its_output_alone(form: str) -> None:
    x, weight, bias = operands(2, 20, 70, 4, 5)
    want = ops.conv3x3(x, weight, bias, **FORMS[form])
    others = [k for k in range(70) if k != 65]
    for spoilt in (weight, bias):
        given = {"weight": weight.clone(), "bias": bias.clone()}
        given["weight" if spoilt is weight else "bias"][65] = math.nan
        got = ops.conv3x3(x, **given, **FORMS[form])
        assert got[:, 65].isnan().all()
        assert same_bits(got[:, others], want[:, others])


@forms
def test_nothing_to_add_up(form: str) -> None:
    bias = torch.arange(1.0, 4.0)
    scale = 2 if form == "upsampled" else 1
    for batch, inputs, outputs, height, width in (
        *((0, 4, 3, 5, 6), (2, 0, 3, 5, 6), (2, 4, 0, 5, 6), (2, 4, 3, 0, 6)),
        *((2, 4, 3, 5, 0), (0, 0, 0, 0, 0), (1, 4, 1, 1, 1)),
    ):
        x, weight = torch.ones(batch, inputs, height, width), torch.ones(outputs, inputs, 3, 3)
        packed = ops.pack_conv3x3(weight, **FORMS[form])
        for pack in (None, packed):
            for b in (None, bias[:outputs]):
                y = ops.conv3x3(x, weight, b, packed=pack, **FORMS[form])
                assert y.shape == (batch, outputs, scale * height, scale * width)
                if inputs == 0:
                    assert torch.equal(y, (torch.zeros(outputs) if b is None else b)[:, None, None].expand_as(y))
        made = ops.conv3x3(x.to("meta"), weight.to("meta"), **FORMS[form])
        assert made.stride() == y.stride()
        assert ops.pack_conv3x3(weight.to("meta"), **FORMS[form]).shape == packed.shape


# ----------------------------------------------------------------------------------------------------------- bad input
def test_bad_input() -> None:
    x, weight, bias = operands(2, 5, 4, 6, 7)
    run, form = ops.conv3x3, torch.ops.diffkern.conv3x3
    x_rule = r"diffkern\.conv3x3: x must have shape \[batch, inputs, height, width\] with the inputs of weight"
    w_rule = r"diffkern\.{}: weight must have shape \[outputs, inputs, 3, 3\], got {}"
    for device in ("cpu", "meta"):
        t, w = x.to(device), weight.to(device)
        check_sentence(lambda t=t, w=w: run(t[0], w), rf"{x_rule}, 5, got \[5, 6, 7\]")
        check_sentence(lambda t=t, w=w: run(t, w[:, :3]), rf"{x_rule}, 3, got \[2, 5, 6, 7\]")
        check_sentence(lambda t=t, w=w: run(t, w[..., :2]), w_rule.format("conv3x3", r"\[4, 5, 3, 2\]"))
        check_sentence(lambda w=w: ops.pack_conv3x3(w[0]), w_rule.format("pack_conv3x3", r"\[5, 3, 3\]"))
        for call in (lambda t=t, w=w: form(t, w, None, None, 3), lambda w=w: torch.ops.diffkern.pack_conv3x3(w, -1)):
            check_sentence(call, r"form must be 0 \(F\(2, 3\)\), 1 \(F\(4, 3\)\) or 2 \(upsampled\), got (3|-1)")
    check_sentence(lambda: run(x, weight, bias[:2]), r"bias must have shape \[outputs\] = \[4\], got \[2\]")
    check_sentence(lambda: run(x, weight, bias[None]), r"bias must have shape \[outputs\] = \[4\], got \[1, 4\]")
    for wrong in (torch.float64, torch.bfloat16):
        name = str(wrong).removeprefix("torch.")
        check_sentence(lambda w=wrong: run(x.to(w), weight), rf"conv3x3: x must be float32, got {name}")
        check_sentence(lambda w=wrong: run(x, weight.to(w)), rf"weight must be float32, got {name}")
        check_sentence(lambda w=wrong: run(x, weight, bias.to(w)), rf"bias must be float32, got {name}")
        check_sentence(
            lambda w=wrong: ops.pack_conv3x3(weight.to(w)), rf"pack_conv3x3: weight must be float32, got {name}"
        )
    for call in (lambda: run(x, weight, precision="half"), lambda: ops.pack_conv3x3(weight, precision="half")):  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="precision must be one of exact, fast, got 'half'"):
            call()


def test_bad_packed_weights() -> None:
    x, weight, _ = operands(2, 5, 4, 6, 7)
    packed = ops.pack_conv3x3(weight)
    run = lambda packed, **form: ops.conv3x3(x, weight, packed=packed, **form)  # noqa: E731
    rule = r"packed must be what pack_conv3x3 made of this weight for the same upsample and precision, \[{}\]"
    check_sentence(lambda: run(packed, upsample=True), rule.format(9 * 64 * 5))
    check_sentence(lambda: run(packed, precision="fast"), rule.format(36 * 64 * 5))
    check_sentence(lambda: ops.conv3x3(x[:, :4], weight[:, :4], packed=packed), rule.format(16 * 64 * 4))
    check_sentence(lambda: run(packed.reshape(16, -1)), r"packed must be .*\[5120\], got \[16, 320\]")
    for view in (torch.cat([packed[:1], packed])[1:], torch.stack([packed, packed], 1)[:, 0]):
        check_sentence(
            lambda view=view: run(view), "packed must be .* contiguous and on 64 bytes: got a view, call clone"
        )
    assert same_bits(run(torch.cat([packed, packed])[5120:]), run(None))
    check_sentence(lambda: run(packed.double()), "packed must be float32, got float64")
    check_sentence(
        lambda: run(packed.clone().requires_grad_()), r"packed must not require grad, .* use packed\.detach\(\)"
    )
    check_sentence(
        lambda: ops.pack_conv3x3(weight.requires_grad_()),
        r"diffkern\.pack_conv3x3: not differentiable, and a tensor requires grad: use torch\.no_grad\(\)",
    )


def test_it_is_for_the_cpu_and_says_what_is_for_a_gpu() -> None:
    x, weight, bias = operands(2, 5, 4, 6, 7)
    meta = r"must be on the device of x \(cpu\), got meta"
    check_sentence(lambda: ops.conv3x3(x, weight.to("meta")), f"weight {meta}")
    check_sentence(lambda: ops.conv3x3(x, weight, bias.to("meta")), f"bias {meta}")
    check_sentence(lambda: ops.conv3x3(x, weight, packed=torch.ones(5120, device="meta")), f"packed {meta}")
    other = r"a GPU's convolutions are cuDNN's, by torch\.nn\.functional\.conv2d"
    with FakeTensorMode(allow_non_fake_inputs=True):
        there = torch.ones(2, 5, 6, 7, device="cuda"), torch.ones(4, 5, 3, 3, device="cuda")
        check_sentence(lambda: ops.conv3x3(*there), rf"conv3x3: x must be on the CPU, got cuda:0: {other}")
        check_sentence(lambda: ops.conv3x3(x, there[1]), f"weight must be on the CPU, got cuda:0: {other}")
        check_sentence(
            lambda: ops.pack_conv3x3(there[1]), f"pack_conv3x3: weight must be on the CPU, got cuda:0: {other}"
        )
        check_sentence(lambda: ops.conv3x3(x, weight, there[1][:, 0, 0, 0]), r"bias must be on the device of x \(cpu\)")
