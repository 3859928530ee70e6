"""A whole sampling run: network and sampler, from noise to images, by diffusers' pipelines and by `diffkern.sample`.

A network of images runs DDIM by `DDIMPipeline`, to numpy images; where a pipeline would need parts that are not here
(an autoencoder, a text encoder) or another scheduler, its loop is written out: network, `scheduler.step`. On our parts
the pipeline has our scheduler, too. The final states from the same noise are compared with diffusers' own, then the
runs are timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.alone import reason
from benchmarks.networks.contenders import (
    ATTENTION,
    BASELINES,
    NAMES,
    OWN,
    OWN_FROZEN,
    REPLACED,
    REPLACED_FROZEN,
    Contender,
    contenders,
    errors,
)
from benchmarks.networks.evaluation import Found, Row, Run, timed
from benchmarks.networks.peers import NETWORKS, Inputs, Network, parameters
from benchmarks.timing import interleave

__all__ = ["SAMPLERS", "run_of"]

SAMPLERS = {"ddim": "DDIM", "dpmpp_2m": "DPM-Solver++ 2M"}
RUN_ERROR = 1e-3
"""Of the final state, over its largest value: twenty evaluations, each within 1e-5, on a path that magnifies."""


def _scheduler(module: Any, sampler: str, steps: int) -> Any:
    """diffusers' or our scheduler of the name; both pipelines' defaults, without clipping to [-1, 1]."""
    if sampler == "ddim":
        made = module.DDIMScheduler(clip_sample=False)
    else:
        made = module.DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", solver_order=2)
    made.set_timesteps(steps)
    return made


def _module(one: Contender) -> Any:
    """Whose schedulers the contender uses."""
    import diffusers

    from diffkern.compat import diffusers as ours

    return ours if one.name in (ATTENTION, REPLACED, REPLACED_FROZEN) else diffusers


def _loop(one: Contender, given: Inputs, module: Any, sampler: str, steps: int) -> Tensor:
    """As pipelines do."""
    scheduler = _scheduler(module, sampler, steps)
    x = given.x
    for t in scheduler.timesteps:
        prediction = one.run(replace(given, x=scheduler.scale_model_input(x, t), t=t.expand(len(x))))
        x = scheduler.step(prediction[:, : x.shape[1]], t, x, return_dict=False)[0]
    return x


def _sample(one: Contender, given: Inputs, sampler: str, steps: int) -> Tensor:
    """By `diffkern.sample` with the plan of our scheduler of the same name."""
    import diffkern
    from diffkern.compat import diffusers as ours
    from diffkern.nn import UNet

    plan = _scheduler(ours, sampler, steps).plan()
    channels = given.x.shape[1]
    if isinstance(one.model, UNet) and one.model.config.out_channels == channels:
        # As it is, not in a function: what its times and conditions decide is then computed once a run.
        return diffkern.sample(one.model, given.x, plan, cond=dict(given.cond) or None)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return one.run(replace(given, x=x, t=t))[:, :channels]

    return diffkern.sample(model, given.x, plan)


def _pipeline(one: Contender, batch: int, steps: int) -> Callable[[], object]:
    """diffusers' own run, from its noise to its images."""
    import diffusers

    pipe: Any = diffusers.DDIMPipeline(unet=one.model, scheduler=_module(one).DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return lambda: pipe(batch, num_inference_steps=steps, output_type="np").images


def _images(x: Tensor) -> Any:
    """As the pipeline makes them of its last state."""
    return (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()


def _state(one: Contender, given: Inputs, sampler: str, steps: int) -> Tensor:
    if one.name == OWN:
        return _sample(one, given, sampler, steps)
    return _loop(one, given, _module(one), sampler, steps)


def _call(network: Network, one: Contender, given: Inputs, sampler: str, steps: int) -> Callable[[], object]:
    """What is timed."""
    if sampler != "ddim" or network.kind != "UNet2DModel":
        return lambda: _state(one, given, sampler, steps)
    if one.name == OWN:
        return lambda: _images(_state(one, given, sampler, steps))
    return _pipeline(one, len(given.x), steps)


def run_of(
    name: str | Network,
    sampler: str,
    batch: int,
    *,
    steps: int = 20,
    wanted: Sequence[str] = NAMES,
    seconds: float = 20.0,
    timing: Run = interleave,
) -> Found:
    """Every contender's run of ``steps`` steps in float32: ours by `diffkern.sample`, the others by diffusers' loop."""
    network = NETWORKS[name] if isinstance(name, str) else name
    peer, given = network.build(), network.inputs(batch)
    rows: list[Row] = []
    calls: dict[str, Callable[[], object]] = {}
    want: Tensor | None = None
    with torch.no_grad():
        for one in contenders(network, peer, [name for name in wanted if name != OWN_FROZEN]):  # `sample` does it
            if one.model is None:
                rows.append(Row(one.name, why=one.why))
                continue
            x = given.to(torch.float32, one.layout)

            try:
                got = _state(one, x, sampler, steps)
                want = got if want is None else want
                error = errors(got, want)
            except Exception as failed:  # its row says why, the others run
                rows.append(Row(one.name, why=reason(failed)))
                continue
            why = "" if error[0] <= RUN_ERROR else f"wrong: off by {error[0]:.1e}, {RUN_ERROR:.0e} allowed"
            if one.name in BASELINES:
                why = ""
            rows.append(Row(one.name, error, why=why))
            if not why:
                calls[one.name] = _call(network, one, x, sampler, steps)
        title = f"{network.title}, {SAMPLERS[sampler]}, {steps} steps"
        found = Found(network.name, title, batch, "float32", parameters(peer), tuple(rows))
        return timed(found, calls, seconds, timing)
