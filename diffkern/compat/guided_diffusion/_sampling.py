"""Steps and loops of DDPM and DDIM: one fused op a step where no function of the user stands inside it.

Noise comes from torch's generator and is drawn as guided-diffusion draws it: once a step of `p_sample` and
`ddim_sample`, used or not (t = 0, eta = 0), after the model and ``denoised_fn``; before ``cond_fn`` in `p_sample`,
after it in `ddim_sample`.

The loop is not `kit.loop`'s: it is a generator, which yields the dictionary of each step and goes on from its "sample",
and where a class replaces `p_sample` or `ddim_sample`, that method is the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffkern import ops
from diffkern.compat.guided_diffusion._ops import CORE, FIRST, GaussianOps, Rows, broadcast
from diffkern.compat.guided_diffusion._tables import (
    LEARNED,
    ddim_rows,
    deviation_rows,
    guided_p_rows,
    guided_x0_rows,
    learned_rows,
    mean_rows,
    p_rows,
    reverse_rows,
)
from diffkern.compat.kit.rows import AT, as_dtype, in_format, wide

Model = Callable[..., Tensor]
Change = Callable[[Tensor], Tensor]
Step = dict[str, Tensor]
"""What a step returns: "sample" and "pred_xstart"."""

LOOP = {name: CORE | {name} for name in ("p_sample", "ddim_sample")}
TO_EPS = frozenset({"_predict_eps_from_xstart"})


class Calls(NamedTuple):
    """The user's functions with the times that they are given, each its own; states are copied for them, as they may
    write into what they are given."""

    model: Model
    time: Tensor
    cond_fn: Model | None
    cond_time: Tensor | None
    kwargs: Mapping[str, Any]

    def output(self, x: Tensor) -> Tensor:
        return self.model(x.clone(), self.time, **self.kwargs)

    def gradient(self, x: Tensor) -> Any:
        assert self.cond_fn is not None
        return self.cond_fn(x.clone(), self.cond_time, **self.kwargs)


class Sampling(GaussianOps):
    """The sampling half of GaussianDiffusion."""

    p_mean_variance: Any
    condition_mean: Any
    condition_score: Any
    _predict_eps_from_xstart: Any
    _scale_timesteps: Any

    # ---------------------------------------------------------------------------------------------------- steps
    def p_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Change | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
    ) -> Step:
        """x_{t-1} = mean + std z: "sample" and "pred_xstart", of x's shape. arXiv 2006.11239, algorithm 2.

        x [B, C, ...], t int64 [B]; ``cond_fn(x, t, **model_kwargs)`` is a gradient that moves the mean
        (`condition_mean`). No noise is added where t is 0.
        """
        if not self._dk_own():
            out = self.p_mean_variance(
                model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
            )
            noise = torch.randn_like(x)
            if cond_fn is not None:
                out["mean"] = self.condition_mean(cond_fn, out, x, t, model_kwargs=model_kwargs)
            later = (t != 0).reshape(-1, *(1,) * (x.dim() - 1)).to(torch.float32)
            sample = out["mean"] + later * torch.exp(0.5 * out["log_variance"]) * noise
            return {"sample": sample, "pred_xstart": out["pred_xstart"]}
        self._dk_check(x, t)
        calls = self._dk_calls(model, cond_fn, t, model_kwargs)
        return self._dk_p(calls, x, self._dk_rows_of(t), bool(clip_denoised), denoised_fn)

    def ddim_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Change | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
    ) -> Step:
        """DDIM's x_{t-1}: "sample" and "pred_xstart". arXiv 2010.02502, eq. 12; eta = 1 has DDPM's noise.

        eps is that of the clipped x_0; ``cond_fn`` moves it (`condition_score`).
        """
        if not self._dk_own():
            out = self.p_mean_variance(
                model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
            )
            if cond_fn is not None:
                out = self.condition_score(cond_fn, out, x, t, model_kwargs=model_kwargs)
            x0 = out["pred_xstart"]
            state = wide(x.dtype, x0.dtype)
            eps = None if self._dk_own(TO_EPS) else self._predict_eps_from_xstart(x, t, x0)
            noise = torch.randn_like(x)
            if eps is not None:  # of the state that has this x0 and eps
                x = self._dk_noised(as_dtype(x0, state), as_dtype(eps, state), t)
            key = (ddim_rows, "START_X", False, float(eta))
            noise = as_dtype(noise, state)
            return {
                "sample": self._dk_run(as_dtype(x, state), x0, self._dk_rows_of(t), *key, noise=noise)[0],
                "pred_xstart": x0,
            }
        self._dk_check(x, t)
        calls = self._dk_calls(model, cond_fn, t, model_kwargs)
        return self._dk_ddim(calls, x, self._dk_rows_of(t), bool(clip_denoised), denoised_fn, float(eta))

    def ddim_reverse_sample(
        self,
        model: Model,
        x: Tensor,
        t: Tensor,
        clip_denoised: bool = True,
        denoised_fn: Change | None = None,
        model_kwargs: dict[str, Any] | None = None,
        eta: float = 0.0,
    ) -> Step:
        """x_{t+1} of DDIM's ODE towards noise: "sample" and "pred_xstart"; nothing is drawn. eta must be 0."""
        if eta != 0.0:
            raise AssertionError(f"eta must be 0 on the way to noise, which is deterministic, got {eta}")
        if not self._dk_own():
            x0 = self.p_mean_variance(
                model, x, t, clip_denoised=clip_denoised, denoised_fn=denoised_fn, model_kwargs=model_kwargs
            )["pred_xstart"]
            state = wide(x.dtype, x0.dtype)
            rows = self._dk_rows_of(t)
            sample = self._dk_run(as_dtype(x, state), x0, rows, reverse_rows, "START_X", False)[0]
            return {"sample": sample, "pred_xstart": x0}
        self._dk_check(x, t)
        calls = self._dk_calls(model, None, t, model_kwargs)
        return self._dk_ddim(calls, x, self._dk_rows_of(t), bool(clip_denoised), denoised_fn, None)

    # ---------------------------------------------------------------------------------------------------- fused
    def _dk_calls(
        self, model: Model, cond_fn: Model | None, t: Tensor, model_kwargs: Mapping[str, Any] | None
    ) -> Calls:
        time = self._scale_timesteps(t.clone())
        cond, cond_time = None, None
        if cond_fn is not None:
            cond, cond_time = self._dk_model(cond_fn), self._scale_timesteps(t.clone())
        return Calls(self._dk_model(model), time, cond, cond_time, model_kwargs or {})

    def _dk_p(self, calls: Calls, x: Tensor, rows: Rows, clip: bool, denoised_fn: Change | None) -> Step:
        m = self._dk_output(calls.output(x), x)
        mean, variance = self._dk_mean_name(), self._dk_variance_name()
        whole = variance in LEARNED and denoised_fn is None and not _records(x, m)
        source, kind, given = m if whole else self._dk_split(m, x.shape[1]), mean, None
        if denoised_fn is not None:
            given = self._dk_x0(x, source, rows, denoised_fn)
            if mean != "PREVIOUS_X":
                source, kind = given, "START_X"
        noise = torch.randn_like(x)
        state = wide(x.dtype, m.dtype, source.dtype)
        moved = None if calls.cond_fn is None else broadcast(calls.gradient(x), x, state)
        x, noise = as_dtype(x, state), as_dtype(noise, state)
        wants = given is None or kind == "START_X"
        if variance not in LEARNED:
            of = p_rows if moved is None else guided_p_rows
            sample, x0 = self._dk_run(x, source, rows, of, kind, variance, clip, h0=moved, noise=noise, want_x0=wants)
        else:
            if whole:
                sample, x0 = self._dk_learned(x, m, rows, learned_rows, mean, variance, clip, noise=noise, want_x0=True)
            else:
                sample, x0 = self._dk_run(x, source, rows, mean_rows, kind, clip, want_x0=wants)
                sample = self._dk_deviated(sample, m, rows, variance, 1, noise)
            if moved is not None:
                sample = self._dk_deviated(sample, m, rows, variance, 2, moved)
        if not wants:
            assert given is not None
            x0 = given.clamp(-1, 1) if clip else given
        elif kind == "START_X":
            x0 = as_dtype(x0, source.dtype)
        return {"sample": sample, "pred_xstart": x0}

    def _dk_learned(
        self, x: Tensor, m: Tensor, rows: Rows, *key: Any, noise: Tensor, want_x0: bool = False
    ) -> tuple[Tensor, Any]:
        """(x', x0) of one `ops.learned_step`; formats as in `_dk_run`."""
        if key[0] is learned_rows and key[1] not in FIRST:
            x = in_format(x, m)
        table = self._dk_table(None if rows.each is None else x.device, *key)
        try:
            found = ops.learned_step(x, m, table=table, row=rows.row, index=rows.each, noise=noise, want_x0=want_x0)
        except RuntimeError as error:
            raise self._dk_outside(rows.each, error) from None
        return in_format(found[0], x), found[1]

    def _dk_deviated(self, x: Tensor, m: Tensor, rows: Rows, variance: str, power: int, z: Tensor) -> Tensor:
        """x + std^power z by the learned variance of m (power 1: none at t = 0), one op; formulas with autograd."""
        if not _records(x, m, z):
            return self._dk_learned(x, m, rows, deviation_rows, variance, power, noise=z)[0]
        table = self._dk_table(x.device, deviation_rows, variance, power)
        row = as_dtype(table[rows.row if rows.each is None else rows.each], x.dtype)
        row = row.reshape(-1, row.shape[-1], *(1,) * (x.dim() - 1))
        v = as_dtype(m.narrow(1, x.shape[1], x.shape[1]), x.dtype)
        return x + row[:, AT["g"]] * torch.exp((row[:, AT["r0"]] + row[:, AT["r1"]] * v) / 2) * z

    def _dk_ddim(
        self, calls: Calls, x: Tensor, rows: Rows, clip: bool, denoised_fn: Change | None, eta: float | None
    ) -> Step:
        """A step of DDIM; eta None: towards noise."""
        m = self._dk_output(calls.output(x), x)
        source, kind = self._dk_split(m, x.shape[1]), self._dk_mean_name()
        if denoised_fn is not None:
            source, kind = self._dk_x0(x, source, rows, denoised_fn), "START_X"
        state = wide(x.dtype, source.dtype)
        found = None
        if calls.cond_fn is not None:
            gradient = calls.gradient(x)
            if isinstance(gradient, Tensor):
                state = wide(state, gradient.dtype)
            h0 = broadcast(gradient, x, state)
            found = self._dk_run(as_dtype(x, state), source, rows, guided_x0_rows, kind, clip, h0=h0)[0]
            source, kind, clip = found, "START_X", False
        key = (reverse_rows, kind, clip) if eta is None else (ddim_rows, kind, clip, eta)
        noise = None if eta is None else as_dtype(torch.randn_like(x), state)
        sample, x0 = self._dk_run(as_dtype(x, state), source, rows, *key, noise=noise, want_x0=found is None)
        if found is None:
            found = as_dtype(x0, source.dtype) if kind == "START_X" else x0
        return {"sample": sample, "pred_xstart": found}

    # ---------------------------------------------------------------------------------------------------- loops
    def p_sample_loop(
        self,
        model: Any,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Change | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: Any = None,
        progress: bool = False,
    ) -> Tensor:
        """Samples of this shape by `p_sample` from t = T - 1 to 0, from ``noise`` or torch's ``randn(*shape)``.

        ``device``: by default that of the model's parameters. ``progress``: tqdm's bar.
        """
        options = (shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress)
        return _last(self.p_sample_loop_progressive(model, *options))

    def p_sample_loop_progressive(
        self,
        model: Any,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Change | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: Any = None,
        progress: bool = False,
    ) -> Iterator[Step]:
        """`p_sample_loop` that yields the dictionary of each step; the next one starts from its "sample"."""
        options = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn}
        return self._dk_loop("p_sample", model, shape, noise, device, progress, options, model_kwargs)

    def ddim_sample_loop(
        self,
        model: Any,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Change | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: Any = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Tensor:
        """Samples by `ddim_sample`, as `p_sample_loop`."""
        options = (shape, noise, clip_denoised, denoised_fn, cond_fn, model_kwargs, device, progress, eta)
        return _last(self.ddim_sample_loop_progressive(model, *options))

    def ddim_sample_loop_progressive(
        self,
        model: Any,
        shape: Sequence[int],
        noise: Tensor | None = None,
        clip_denoised: bool = True,
        denoised_fn: Change | None = None,
        cond_fn: Model | None = None,
        model_kwargs: dict[str, Any] | None = None,
        device: Any = None,
        progress: bool = False,
        eta: float = 0.0,
    ) -> Iterator[Step]:
        """`ddim_sample_loop` that yields the dictionary of each step; the next one starts from its "sample"."""
        options = {"clip_denoised": clip_denoised, "denoised_fn": denoised_fn, "cond_fn": cond_fn, "eta": eta}
        return self._dk_loop("ddim_sample", model, shape, noise, device, progress, options, model_kwargs)

    def _dk_loop(
        self,
        name: str,
        model: Any,
        shape: Sequence[int],
        noise: Tensor | None,
        device: Any,
        progress: bool,
        options: dict[str, Any],
        model_kwargs: dict[str, Any] | None,
    ) -> Iterator[Step]:
        """t is known on the host: rows go by number, and the times that the functions see are made before the loop."""
        if device is None:
            device = next(model.parameters()).device
        if not isinstance(shape, tuple | list):
            raise AssertionError(f"shape must be a tuple or a list, got {type(shape).__name__}")
        x = torch.randn(*shape, device=device) if noise is None else noise
        with torch.no_grad():
            all_t = torch.arange(self.num_timesteps, device=device)[:, None].expand(-1, shape[0]).contiguous()
            ts = all_t.unbind()
            fused = self._dk_own(LOOP[name])
            clip, change, cond_fn = bool(options["clip_denoised"]), options["denoised_fn"], options["cond_fn"]
            if fused:
                self._dk_check(x, ts[0])
                call, times = self._dk_times(model, all_t)
                cond, cond_times = (None, None) if cond_fn is None else self._dk_times(cond_fn, all_t)
                every = times.clone().unbind()
                every_cond = None if cond_times is None else cond_times.clone().unbind()
        for i in _counted(range(self.num_timesteps)[::-1], progress):
            with torch.no_grad():
                if not fused:
                    out = getattr(self, name)(model, x, ts[i], model_kwargs=model_kwargs, **options)
                else:
                    time = None if every_cond is None else every_cond[i]
                    calls = Calls(call, every[i], cond, time, model_kwargs or {})
                    if name == "p_sample":
                        out = self._dk_p(calls, x, Rows(i), clip, change)
                    else:
                        out = self._dk_ddim(calls, x, Rows(i), clip, change, float(options["eta"]))
            yield out
            x = out["sample"]


def _records(*tensors: Tensor) -> bool:
    """Whether autograd asks for a gradient."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _last(steps: Iterator[Step]) -> Tensor:
    out: Step = {}
    for out in steps:  # noqa: B007
        pass
    return out["sample"]


def _counted(indices: Sequence[int], progress: bool) -> Any:
    if not progress:
        return indices
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("progress=True needs tqdm: pip install tqdm") from error
    return tqdm(indices)
