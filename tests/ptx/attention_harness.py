"""Runs the attention launchers of csrc/cuda in the PTX emulator, on torch CPU tensors of any layout.

`Attention(arch).forward(q, k, v)` and `.backward(...)` allocate poisoned outputs in the axis order of their inputs, run
the kernels and check what the emulator can see: no access outside of a tensor, no race, no read of what nobody wrote,
inputs unchanged, every output element written and nothing beside them, no local memory, no warning. What comes back
are the outputs and the statistics of each launch. `exact` and `plain` are the two references of the accuracy rule.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from helpers import build_description, tolerances
from helpers.attention_bounds import attention_floors
from helpers.native_layout import CODES
from ptx.harness import CUDA_CSRC, HERE, bits, host, module
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


# ------------------------------------------------------------------------------------------------------- inputs
def random(seed: int, *shape: int, dtype: torch.dtype = torch.float32, std: float = 1.0) -> Tensor:
    """Normals, [B, H, N, D]."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, dtype=torch.float64, generator=generator) * std).to(dtype)


ORDERS = {
    "bnhd": (0, 2, 1, 3),  # tokens of [B, N, C]
    "bhnd": (0, 1, 2, 3),
    "nchw": (0, 1, 3, 2),  # [B, C, H, W]
}


def empty(layout: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Logical [B, H, N, D] in memory as ORDERS says. "+n" behind the name: n elements past an aligned address, as in
    "nchw+1"; "/n": rows of the contiguous axis are n elements longer than they need to be."""
    name, _, offset = layout.partition("+")
    name, _, gap = name.partition("/")
    order = ORDERS[name]
    sizes = [shape[d] for d in order]
    sizes[-1] += int(gap or 0)
    start = int(offset or 0)
    flat = torch.empty(math.prod(sizes) + start, dtype=dtype)[start:].view(sizes)
    back = [order.index(d) for d in range(4)]
    return flat[..., : shape[order[-1]]].permute(back)


def place(values: Tensor, layout: str) -> Tensor:
    """The same values in another layout; "expanded …": head 0 for all heads, by stride 0."""
    if layout.startswith("expanded "):
        one = place(values[:, :1], layout.removeprefix("expanded "))
        return one.expand(-1, values.shape[1], -1, -1)
    out = empty(layout, values.shape, values.dtype)
    return out.copy_(values)


# How the heads of q, k, v lie in the 3C channels of one tensor [B, 3C, N].
HEAD_ORDERS = ("legacy", "new", "edm")


def split_heads(qkv: Tensor, heads: int, order: str) -> tuple[Tensor, Tensor, Tensor]:
    """Views [B, H, N, D] of q, k, v in one tensor [B, 3C, N]: guided-diffusion's legacy and new order, and EDM's."""
    batch, channels, tokens = qkv.shape
    dim = channels // (3 * heads)
    if order == "legacy":
        parts = qkv.view(batch, heads, 3, dim, tokens).unbind(2)
    elif order == "new":
        parts = qkv.view(batch, 3, heads, dim, tokens).unbind(1)
    else:
        assert order == "edm"
        parts = qkv.view(batch, heads, dim, 3, tokens).unbind(3)
    q, k, v = (part.transpose(2, 3) for part in parts)
    return q, k, v


def same_order(like: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """A new tensor in the axis order of `like`."""
    shape = like.shape if shape is None else shape
    if like.stride(3) != 1 and like.stride(2) == 1:
        return empty("nchw", shape, like.dtype)
    return empty("bhnd" if like.stride(1) >= like.stride(2) else "bnhd", shape, like.dtype)


# --------------------------------------------------------------------------------------------------- references
@dataclass
class Gradients:
    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def _differentiate(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: Sequence[Tensor], grad: Tensor, scale: float
) -> Gradients:
    q, k, v = (t.detach().clone().requires_grad_() for t in inputs)
    out = attend(q, k, v)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), grad)
    lse = torch.logsumexp(q.detach() @ k.detach().transpose(2, 3) * scale, 3)
    return Gradients(out.detach(), lse, dq, dk, dv)


def exact(q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None = None, scale: float | None = None) -> Gradients:
    """softmax(scale q k^T) v, its log-sum-exp and gradients in float64."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    grad = torch.zeros_like(q) if grad is None else grad

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(2, 3) * scale, 3) @ v

    return _differentiate(attend, [t.double() for t in (q, k, v)], grad.double(), scale)


def plain(q: Tensor, k: Tensor, v: Tensor, grad: Tensor | None = None, scale: float | None = None) -> Gradients:
    """What PyTorch's own formula gives in the dtype of the inputs."""
    scale = q.shape[3] ** -0.5 if scale is None else scale
    grad = torch.zeros_like(q) if grad is None else grad

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)

    return _differentiate(attend, (q, k, v), grad, scale)


# --------------------------------------------------------------------------------------------------- the emulator
@dataclass
class Run:
    """Outputs by name, and what the emulator counted in each launch."""

    tensors: dict[str, Tensor]
    inputs: dict[str, Tensor]
    launches: list[Any] = field(default_factory=list)

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.tensors[name]
        except KeyError:
            raise AttributeError(name) from None

    def launch(self, kernel: str) -> Any:
        """The only launch of a kernel with this in its name."""
        found = [launch for launch in self.launches if kernel in launch["kernel"]]
        assert len(found) == 1, f"{len(found)} launches of {kernel} in {[launch['kernel'] for launch in self.launches]}"
        return found[0]

    def minimum_bytes(self) -> tuple[int, int]:
        """Inputs and outputs, each element once (of expanded inputs: each element that there is)."""
        return tuple(sum(_distinct(t) for t in tensors.values()) for tensors in (self.inputs, self.tensors))  # type: ignore[return-value]


def _distinct(t: Tensor) -> int:
    sizes = (n for n, stride in zip(t.shape, t.stride(), strict=True) if stride != 0)
    return math.prod(sizes) * t.element_size()


def share(launch: Any, *classes: str) -> float:
    """Of the issued warp instructions, those of these classes ("mma", "f32.fma", "ld.shared" ...)."""
    return sum(launch["instructions_by_class"].get(name, 0) for name in classes) / launch["warp_instructions"]


def conflicts(launch: Any) -> list[str]:
    """The shared-memory instructions that had bank conflicts, with the factor each takes longer."""
    stats = launch.stats
    found = [pc for pc in range(len(stats.code)) if stats.s_wave[pc] > stats.s_ideal[pc]]
    return [
        f"{stats.code[pc].loc} {stats.code[pc].text}: {stats.s_wave[pc] / stats.s_ideal[pc]:.2f} x {stats.s_req[pc]}"
        for pc in found
    ]


def _view(t: Tensor | None) -> list[int]:
    return [0] * 5 if t is None else [t.data_ptr(), *t.stride()]


class Attention:
    """The attention kernels as PTX of one architecture.

    files: sources of csrc/cuda (names) or others (paths), all of attention unless given; the launch file holds the C
    functions that are called.
    """

    def __init__(
        self,
        arch: str = "sm_80",
        files: Sequence[str | Path] = (),
        launch: Path = HERE / "attention_launch.cu",
        defines: Sequence[str] = (),
    ) -> None:
        files = files or [name for name in build_description.cuda_sources() if name.startswith("attention")]
        paths = (*(CUDA_CSRC / "cuda" / f for f in files), launch)
        self.arch = arch
        self.host = host(paths, tuple(defines))
        self.modules = [module(path, tuple(defines), arch) for path in paths]

    @property
    def capability(self) -> int:
        return int("".join(c for c in self.arch if c.isdigit()))

    def library(self, **options: Any) -> ctypes.CDLL:
        """The launchers, with this architecture's kernels behind them."""
        host = self.host
        host.modules, host.cc = self.modules, self.capability
        host.options = {"race_global": True, **options}
        host.launches.clear()
        lib = host.lib
        assert isinstance(lib, ctypes.CDLL)
        for name in ("dk_attention_workspace", "dk_attention_grad_workspace"):
            getattr(lib, name).restype = ctypes.c_int64
        for name in ("dk_attention_limit", "dk_attention_grad_limit"):
            getattr(lib, name).restype = ctypes.c_char_p
        return lib

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float | None = None,
        out: Tensor | None = None,
        entry: str = "dk_attention",
        complete: bool = True,
        **options: Any,
    ) -> Run:
        """out [B, H, N, D] (in the order of q, or into the given tensor) and lse [B, H, N]. complete=False: some blocks
        are left out (only_ctas), so not all is written."""
        made = {"out": same_order(q) if out is None else out, "lse": torch.empty(q.shape[:3])}
        words = [*_problem(q, k, v), *_view(made["out"]), made["lse"].data_ptr()]
        return self._run(entry, {"q": q, "k": k, "v": v}, made, words, scale, complete, options)

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        grad_out: Tensor,
        lse: Tensor,
        scale: float | None = None,
        gradients: tuple[Tensor, Tensor, Tensor] | None = None,
        entry: str = "dk_attention_grad",
        complete: bool = True,
        **options: Any,
    ) -> Run:
        """dq, dk, dv in the orders of q, k, v, or into the given tensors."""
        made = dict(zip(("dq", "dk", "dv"), gradients or (same_order(t) for t in (q, k, v)), strict=True))
        words = [*_problem(q, k, v), *_view(out), *_view(grad_out), lse.data_ptr()]
        words += [word for t in made.values() for word in _view(t)]
        inputs = {"q": q, "k": k, "v": v, "out": out, "grad_out": grad_out, "lse": lse}
        return self._run(entry, inputs, made, words, scale, complete, options)

    def limit(self, q: Tensor, k: Tensor, v: Tensor, backward: bool = False) -> str | None:
        """What this architecture cannot do with these, or None."""
        lib = self.library()
        words = [*_problem(q, k, v), *[0] * 40]
        function = lib.dk_attention_grad_limit if backward else lib.dk_attention_limit
        text = function((ctypes.c_int64 * len(words))(*words), ctypes.c_double(1.0), self.capability)
        return None if text is None else text.decode()

    def _run(
        self,
        entry: str,
        inputs: dict[str, Tensor],
        outputs: dict[str, Tensor],
        words: list[int],
        scale: float | None,
        complete: bool,
        options: dict[str, Any],
    ) -> Run:
        host, lib = self.host, self.library(**options)
        factor = ctypes.c_double(inputs["q"].shape[3] ** -0.5 if scale is None else scale)
        before = {name: bits(t) for name, t in inputs.items()}
        for t in outputs.values():
            _storage(t).fill_(255)
        for name, t in inputs.items():
            if t.numel():
                host.register(t, name, readonly=True)
        for name, t in outputs.items():
            if t.numel():
                host.register(t, name, init=False)
        run = Run(outputs, inputs)
        try:
            flat = (ctypes.c_int64 * (len(words) + 1))(*words, 0)
            size = int(getattr(lib, f"{entry}_workspace")(flat, factor))
            workspace = torch.empty(size + 256, dtype=torch.uint8)
            workspace = workspace[-workspace.data_ptr() % 256 :][:size]
            if size:
                host.register(workspace, "workspace", init=False)
                flat[len(words)] = workspace.data_ptr()
            status = getattr(lib, entry)(flat, factor)
            run.launches = list(host.launches)
            host.check()
            assert status == 0, f"the launcher returned {status}"
            for name, t in outputs.items():
                if complete and t.numel():
                    assert host.unwritten(t) == 0, f"{name}: {host.unwritten(t)} bytes were not written"
            _check_gaps(outputs)
            for name, t in inputs.items():
                assert torch.equal(bits(t), before[name]), f"{name} was changed"
            for launch in run.launches:
                assert not launch.warnings, launch.warnings
                assert launch["local"]["bytes"] == 0, f"{launch['kernel']} uses local memory"
        finally:
            host.release()
        return run


def _problem(q: Tensor, k: Tensor, v: Tensor) -> list[int]:
    batch, heads, queries, dim = q.shape
    return [CODES[q.dtype], batch, heads, queries, k.shape[2], dim, *_view(q), *_view(k), *_view(v)]


def _storage(t: Tensor) -> Tensor:
    return torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())


def _check_gaps(outputs: dict[str, Tensor]) -> None:
    """Bytes of the outputs' memory that belong to no element are still poison."""
    gaps: dict[int, tuple[Tensor, Tensor, str]] = {}
    for name, t in outputs.items():
        memory = _storage(t)
        known = gaps.setdefault(memory.data_ptr(), (memory, torch.ones(memory.numel(), dtype=torch.bool), name))
        size = t.element_size()
        strides = [*(s * size for s in t.stride()), 1]
        known[1].as_strided([*t.shape, size], strides, t.storage_offset() * size).fill_(False)
    for memory, gap, name in gaps.values():
        assert bool((memory[gap] == 255).all()), f"a kernel wrote beside the elements of {name}"


def check(
    run: Run, names: Sequence[str], q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float | None = None
) -> None:
    """The accuracy rule for these outputs of a run: out and lse, or dq, dk and dv."""
    true, usual = exact(q, k, v, grad, scale), plain(q, k, v, grad, scale)
    floors = attention_floors(q, k, v, q.shape[3] ** -0.5 if scale is None else scale, grad)
    for name in names:
        ours, ideal, theirs, floor = (getattr(of, name) for of in (run, true, usual, floors))
        tolerances.check(ours, ideal, theirs, f"{name} {tuple(q.shape)}, {k.shape[2]} keys", floor=floor)
