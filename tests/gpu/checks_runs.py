"""Checks of what is built from ops: streams, sampling loops, training losses, allocations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from gpu.calls import LOSS, NOISING, noise_terms, seeds_of
from gpu.harness import HOST, Target, Traffic, assert_same
from gpu.models import COSINE, EDM, FLOW, LINEAR, SHAPE, ExactModel
from helpers.op_cases import ROWS, table, values
from torch import Tensor

from diffkern import ops, samplers, schedules
from diffkern.objectives import losses
from diffkern.plan import Plan
from diffkern.sampling import initial, sample

VP, VE = schedules.vp(), schedules.ve()
PLANS: dict[str, Plan] = {
    "ddpm": samplers.ddpm(COSINE, 9),
    "ddpm clipped": samplers.ddpm(COSINE, 9, variance="beta", clip=0.7),
    "ddim": samplers.ddim(LINEAR, 8),
    "ddim noise clip v": samplers.ddim(LINEAR, 8, eta=0.7, clip=0.8, prediction="v"),
    "euler": samplers.euler(LINEAR, 7),
    "euler edm": samplers.euler(EDM, 7),
    "euler flow": samplers.euler(FLOW, 7),
    "heun": samplers.heun(LINEAR, 6, clip=1.5),
    "heun edm": samplers.heun(EDM, 6),
    "heun flow": samplers.heun(FLOW, 6),
    "heun churn": samplers.heun(EDM, 5, churn=4.0),
    "midpoint": samplers.midpoint(LINEAR, 3),
    "rk4": samplers.rk4(FLOW, 2),
    "rk4_38": samplers.rk4_38(EDM, 2),
    "lms": samplers.lms(LINEAR, 6),
    "deis": samplers.deis(COSINE, 5, clip=1.0),
    "euler_ancestral": samplers.euler_ancestral(LINEAR, 5),
    "dpmpp_1s": samplers.dpmpp_1s(FLOW, 3),
    "dpmpp_2s": samplers.dpmpp_2s(EDM, 3),
    "dpmpp_2m": samplers.dpmpp_2m(LINEAR, 5, clip=1.0),
    "dpmpp_3m": samplers.dpmpp_3m(COSINE, 5, spacing="log_snr"),
    "dpmpp_2m_sde": samplers.dpmpp_2m_sde(LINEAR, 4),
    "dpmpp_3m_sde": samplers.dpmpp_3m_sde(LINEAR, 5),
    "dpmpp_sde": samplers.dpmpp_sde(LINEAR, 3),
    "unipc": samplers.unipc(LINEAR, 6, order=3),
    "euler_maruyama": samplers.euler_maruyama(VP, 5),
    "flow_sde": samplers.flow_sde(FLOW, 4),
    "langevin": samplers.langevin(VP, 3, t=0.5, step_size=0.01),
    "annealed_langevin": samplers.annealed_langevin(VE, 3, each=2, step_size=1e-4, denoise=True),
    "ddim_inversion": samplers.ddim_inversion(LINEAR, 4),
    "dpm_2": samplers.dpm_2(EDM, 3),
    "dpm_2_ancestral": samplers.dpm_2_ancestral(LINEAR, 3),
    "dpmpp_2s_ancestral": samplers.dpmpp_2s_ancestral(LINEAR, 3),
    "repaint": samplers.repaint(LINEAR, 6, jump_length=2, jump_n_sample=2),
    "ddpm learned": samplers.ddpm(LINEAR, 4, variance="learned"),
    "ddim threshold": samplers.ddim(LINEAR, 4, clip=1.0).with_threshold(0.9, 1.5),
    "dpmpp_2m_sde path": samplers.dpmpp_2m_sde(LINEAR, 4, noise_path="brownian"),
}


class LearnedModel(ExactModel):
    """With a second half of the channels, the same as the first."""

    def __init__(self) -> None:
        super().__init__()
        self.both: dict[Any, Tensor] = {}

    def __call__(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        m = super().__call__(x, t, cond)
        key = (x.device, x.dtype, x.shape)
        if key not in self.both:
            self.both[key] = torch.cat([m, m], 1)
        return torch.cat([m, m], 1, out=self.both[key])


# ------------------------------------------------------------------------------------------------------------ streams
STREAM_JOBS = ("randn", "noise_sum", "noising", "loss", "step", "step, table on the device")


def stream_jobs(target: Target) -> dict[str, tuple[Callable[[dict[str, Tensor]], Any], dict[str, Tensor]]]:
    """Op -> (a function of operands, the operands on the CPU); tables stay constant."""
    shape = (4, 3, 64, 65)
    rows = table(ROWS["eps noise"])
    on = {t.device.type: t for t in (rows, target.move(rows))}
    noising = {"cpu": NOISING[:1].clone(), target.device.type: target.move(NOISING[:1].clone())}
    loss = {"cpu": LOSS[2:3].clone(), target.device.type: target.move(LOSS[2:3].clone())}
    x, m, seeds = values(shape, 1), values(shape, 2), seeds_of(4)
    return {
        "randn": (lambda o: ops.randn(shape, o["seeds"], 3), {"seeds": seeds}),
        "noise_sum": (lambda o: ops.noise_sum(shape, o["seeds"], **noise_terms(24)), {"seeds": seeds}),
        "noising": (
            lambda o: ops.noising(o["x0"], noising[o["x0"].device.type], seeds=o["seeds"])[0],
            {"x0": x, "seeds": seeds},
        ),
        "loss": (
            lambda o: ops.loss(o["pred"], o["x0"], loss[o["x0"].device.type], seeds=o["seeds"], reduction="none"),
            {"pred": m, "x0": x, "seeds": seeds},
        ),
        "step": (
            lambda o: ops.step(o["x"], o["m"], table=rows, seeds=o["seeds"])[0],
            {"x": x, "m": m, "seeds": seeds},
        ),
        "step, table on the device": (
            lambda o: ops.step(o["x"], o["m"], table=on[o["x"].device.type], seeds=o["seeds"])[0],
            {"x": x, "m": m, "seeds": seeds},
        ),
    }


def check_side_stream(target: Target, op: str, current: Target | None = None) -> None:
    """Operands that a side stream fills late are seen by the op behind them, and its result by who waits for an event.

    An op on another stream would read zeros: the fill stands behind a tenth of a second of work. `current`: the device
    that is the current one while the op is called, if it is not the target.
    """
    function, host = stream_jobs(target)[op]
    expected = function(host)
    source = target.move(host)
    late = {name: torch.zeros_like(t) for name, t in source.items()}
    with target.side_stream() as join:
        function(late)  # loads the kernel and makes memory, both of which may wait
        target.synchronize()
        target.busy()
        for name, t in late.items():
            t.copy_(source[name])
        with (current or target).as_current():
            result = function(late)
        join()
    copy = result.clone()  # on the outer stream, behind the event
    target.synchronize()
    assert_same(target.fetch(copy), expected, f"{op} on a side stream")


def check_no_sync(target: Target, op: str) -> None:
    """The host never waits: it queues the op while the device is still busy."""
    function, host = stream_jobs(target)[op]
    there = target.move(host)
    function(there)  # as above
    target.synchronize()
    with target.no_sync():
        target.busy()
        result = function(there)
        if target.is_gpu:
            event = torch.cuda.Event()
            event.record()
            assert not event.query(), f"{op}: the host came back after the device was done"
    assert_same(target.fetch(result), function(host), op)


def check_device_guard(target: Target, current: Target, op: str) -> None:
    """The target's tensors while `current` is the current device: on the target's own current stream, late operands."""
    with current.as_current():
        check_side_stream(target, op, current)
        if current.is_gpu:
            assert torch.cuda.current_device() == current.device.index


# ----------------------------------------------------------------------------------------------------------- sampling
def options() -> dict[str, dict[str, Any]]:
    """Keyword arguments of `sample`, tensors on the CPU."""
    cond, uncond = torch.tensor([0.5, -0.25, 1.0]), torch.tensor([0.0, 0.125, 0.0])
    mask = values(SHAPE, 5).gt(0.3)
    return {
        "plain": {},
        "guided": {"cond": cond, "uncond": uncond, "guidance": 2.5},
        "inpainting": {"mask": mask, "known": values(SHAPE, 6).clamp(-1, 1)},
        "16-bit model": {"model_dtype": torch.bfloat16, "trajectory": True},
        "densities": {"logprob": True},
    }


def allowed(plan: Plan, option: str) -> bool:
    """Guidance of a learned variance is the model's own."""
    return not (plan.learned_variance and option == "guided")


def states_of(x: Tensor, plan: Plan, **given: Any) -> list[Tensor]:
    """The state after every step, the result, and the trajectory if there is one."""
    states: list[Tensor] = []
    model = model_of(plan)
    result: Any = sample(model, x, plan, callback=lambda info: states.append(info["x"].clone()), **given)
    assert len(states) == len(plan.steps)
    return [*states, *(part for part in (result if isinstance(result, tuple) else (result,)) if part is not None)]


def model_of(plan: Plan) -> Callable[..., Tensor]:
    """A model of as many channels as the plan reads."""
    return LearnedModel() if plan.learned_variance else ExactModel()


def check_sampling(target: Target, name: str, dtype: torch.dtype) -> None:
    """`sample` on the device: the bits of the CPU, for the state after every step; and of every split of the batch."""
    plan, seeds = PLANS[name], seeds_of(SHAPE[0])
    start = initial(plan, SHAPE, seeds)
    got_start = initial(plan, SHAPE, target.move(seeds), device=target.device)
    assert_same(target.fetch(got_start), start, f"{name}: start")
    start = start.to(dtype)
    for option, host in options().items():
        if not allowed(plan, option):
            continue
        given = {k: v.to(dtype) if k == "known" else v for k, v in host.items()}
        what, last = f"{name}, {option}, {dtype}", len(plan.steps)
        want = states_of(start, plan, seeds=seeds, **given)
        there, x, s = target.move((given, start, seeds))
        for i, (a, b) in enumerate(zip(states_of(x, plan, seeds=s, **there), want, strict=True)):
            assert_same(target.fetch(a), b, f"{what}: step {i}")
        for part in (slice(0, 1), slice(1, 3)):
            mine = {k: v[part] if isinstance(v, Tensor) else v for k, v in there.items()}
            alone = states_of(x[part], plan, seeds=s[part], **mine)
            assert_same(target.fetch(alone[last]), want[last][part], f"{what}: samples {part} alone")
    if not plan.deterministic:
        noise = [ops.randn(SHAPE, seeds, row.stream, dtype=dtype) for row in plan.rows if row.draws]
        result = sample(model_of(plan), start, plan, noise=noise)
        got = sample(model_of(plan), target.move(start), plan, noise=target.move(noise))
        assert_same(target.fetch(got), result, f"{name}, {dtype}: noise as tensors")
        if dtype.itemsize >= 4 and all(row.path is None for row in plan.rows):  # 16 bits: rounded before it is used
            assert_same(result, sample(model_of(plan), start, plan, seeds=seeds), f"{name}: tensors and addresses")


def check_starts(target: Target, name: str) -> None:
    """A start for each sample: the bits of the CPU."""
    plan, seeds = PLANS[name], seeds_of(SHAPE[0])
    start = initial(plan, SHAPE, seeds)
    for dtype in (torch.float32, torch.bfloat16):
        start = start.to(dtype)
        first = torch.tensor([0, len(plan.steps) - 1, 1])
        want = sample(model_of(plan), start, plan, seeds=seeds, start=first)
        got = sample(model_of(plan), target.move(start), plan, seeds=target.move(seeds), start=first)
        assert_same(target.fetch(got), want, f"{name}, {dtype}")


def check_layout_of_sampling(target: Target) -> None:
    """channels_last in, channels_last out, the same bits."""
    plan, seeds = PLANS["ddim noise clip v"], seeds_of(SHAPE[0])
    start = initial(plan, SHAPE, seeds)
    want = sample(ExactModel(), start, plan, seeds=seeds)
    x = target.move(start).to(memory_format=torch.channels_last)
    got = sample(ExactModel(), x, plan, seeds=target.move(seeds))
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert_same(target.fetch(got), want, "channels_last")


# A density is a new tensor for each step, so that option is not lean.
LEAN = [
    (name, option) for name in PLANS for option in options() if option != "densities" and allowed(PLANS[name], option)
]


def check_loop_is_lean(target: Target, name: str, option: str, model: Callable[..., Tensor] | None = None) -> None:
    """After its first steps the loop allocates nothing; from the first model call on, it never makes the host wait."""
    plan = PLANS[name]
    model = model_of(plan) if model is None else model
    host = {k: v for k, v in options()[option].items() if k != "trajectory"}
    start, seeds = initial(plan, SHAPE, 1), seeds_of(SHAPE[0])
    there, x, s = target.move((host, start, seeds))
    sample(model, x, plan, seeds=s, **there)  # makes the model's buffers
    counts: list[int] = []
    with ExitStack() as guards:
        allocated = guards.enter_context(target.counting())

        def guarded(*arguments: Tensor) -> Tensor:
            if not guarded_from:
                guarded_from.append(guards.enter_context(target.no_sync()))
            return model(*arguments)

        guarded_from: list[None] = []
        result = sample(guarded, x, plan, seeds=s, callback=lambda info: counts.append(allocated()), **there)
    assert len(counts) == len(plan.steps)
    assert counts[2] == counts[-1], f"{name}, {option}: allocations after each step: {counts}"
    assert_same(target.fetch(result), sample(model, start, plan, seeds=seeds, **host), f"{name}, {option}")


# ----------------------------------------------------------------------------------------------------------- training
def check_training(target: Target) -> None:
    """Loss and gradient of every kind of schedule; discrete and flow have the bits of the CPU in the whole pass."""
    x0, seeds = values(SHAPE, 1), seeds_of(SHAPE[0])
    cases: dict[str, tuple[Any, Tensor, str]] = {
        "discrete": (LINEAR, torch.tensor([0, 500, 999]), "v"),
        "flow": (FLOW, torch.tensor([0.0, 0.25, 0.875], dtype=torch.float64), "velocity"),
        "edm": (EDM, torch.tensor([0.01, 1.0, 40.0], dtype=torch.float64), "edm"),
    }

    def run(there: Target, schedule: Any, t: Tensor, prediction: str) -> tuple[Tensor, Tensor]:
        x, times, s = there.move((x0, t, seeds))
        weight = torch.full(SHAPE[1:], 0.5, device=x.device, requires_grad=True)
        value = losses.simple_loss(lambda x, t: x * weight, x, times, schedule, prediction, seeds=s, reduction="none")
        (grad,) = torch.autograd.grad(value.sum(), weight)
        return value.detach(), grad

    for name, (schedule, t, prediction) in cases.items():
        got, want = run(target, schedule, t, prediction), run(HOST, schedule, t, prediction)
        if name == "edm":  # its coefficients hold roots and logarithms, which a GPU may round otherwise in float64
            torch.testing.assert_close(target.fetch(got[0]), want[0], rtol=1e-5, atol=1e-7)
        else:
            assert_same(target.fetch(got[0]), want[0], f"{name}: loss")
        # torch adds up the batch in an order of its own
        torch.testing.assert_close(target.fetch(got[1]), want[1], rtol=1e-5, atol=1e-6)


def check_training_never_waits(target: Target) -> None:
    """With times on the device, loss and backward only queue work, once tables and kernels are there."""
    x0, weight = target.move((values(SHAPE, 1), torch.ones(SHAPE[1:], requires_grad=True)))

    def iteration(schedule: Any, prediction: str, times: Tensor) -> None:
        losses.simple_loss(lambda x, t: x * weight, x0, times, schedule, prediction).backward()

    cases = ((LINEAR, "eps", [1, 2, 3]), (FLOW, "velocity", [0.1, 0.5, 0.9]), (EDM, "edm", [0.1, 1.0, 9.0]))
    for schedule, prediction, numbers in cases:
        times = target.move(torch.tensor(numbers))
        iteration(schedule, prediction, times)
        target.synchronize()
        with target.no_sync():
            iteration(schedule, prediction, times)
        assert weight.grad is not None
        assert target.fetch(weight.grad).isfinite().all()


# -------------------------------------------------------------------------------------- traffic between host and device
def sampling_traffic(plan: Plan, device: torch.device, **given: Any) -> tuple[list[Any], list[Any]]:
    """What `sample` sends and waits for before its first model call, and after it. Fake tensors will do."""
    traffic = Traffic()
    before: list[int] = []

    def model(x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        if not before:
            before.append(len(traffic.events))
        return torch.cat([x, x], 1) if plan.learned_variance else x * 0.5

    x = torch.empty(SHAPE, device=device)
    with traffic:
        sample(model, x, plan, seeds=7, callback=lambda info: None, trajectory=True, **given)
    return traffic.events[: before[0]], traffic.events[before[0] :]


def training_traffic(schedule: Any, prediction: str, t: Tensor, device: torch.device) -> list[Any]:
    """What the forward half of a training iteration sends and waits for, after a first one."""
    x0, model = torch.empty(SHAPE, device=device), torch.nn.Tanh()
    traffic = Traffic()
    for _ in range(2):
        traffic.events.clear()
        with traffic:
            losses.simple_loss(lambda x, t: model(x), x0, t, schedule, prediction)
    return traffic.events
