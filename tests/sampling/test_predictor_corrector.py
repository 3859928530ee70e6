"""Predictor-corrector sampling: score_sde's formulas, moments known in closed form, batch invariance, op counts."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.op_counter import CountOps
from helpers.oracles import Gaussian, run_plan
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import diffkern
from diffkern import ops, pc_plan, predictor_corrector, samplers, schedules, streams
from diffkern.sampling import _predictor_corrector, initial, sample
from diffkern.sampling._corrector_rows import rows_of

SHAPE = (3, 2, 4, 5)
SEEDS = torch.tensor([11, -5, 2**62], dtype=torch.int64)
DATA = Gaussian(0.4, 0.6)
N = 40
VP_TABLE = schedules.from_betas(torch.linspace(0.1 / N, 20 / N, N, dtype=torch.float64))
VE, VP, SUB_VP, EDM, FLOW = schedules.ve(), schedules.vp(), schedules.sub_vp(), schedules.edm(), schedules.flow()
SCHEDULES = [schedules.linear(), VP, SUB_VP, VE, EDM, FLOW]


def network(x: Tensor, t: Tensor | float) -> Tensor:
    """Elementwise, so that a sample cannot see its batch; smooth in time."""
    time = torch.as_tensor(t).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    return 0.6 * torch.tanh(x) - 0.05 * torch.sin(0.01 * time) * x + 0.1


def exact(schedule: schedules.Schedule, prediction: str | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The perfect network of Gaussian data, in float64 arithmetic."""
    model = DATA.model(schedule, prediction or schedule.default_prediction)
    return lambda x, t: model(x.double(), float(t[0])).to(x.dtype)


def draw(n: int, seed: int = 3, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(n)]


# --- score_sde's formulas (arXiv 2011.13456, algorithms 2 to 5), transcribed --------------------------------------


def langevin_step(x, score, z, snr, alpha, std, kind, norm):
    """One corrector step."""
    if kind == "langevin":
        grad_norm = score.flatten(1).norm(dim=1)
        noise_norm = z.flatten(1).norm(dim=1)
        if norm == "batch":
            grad_norm, noise_norm = grad_norm.mean(), noise_norm.mean()
        size = (snr * noise_norm / grad_norm) ** 2 * 2 * alpha
    else:
        size = torch.tensor((snr * std) ** 2 * 2 * alpha, dtype=torch.float64)
    size = size.reshape(-1, 1, 1, 1)
    return x + size * score + torch.sqrt(size * 2) * z


def score_sde(kind, x, score, noises, predictor, corrector, n_steps, snr, norm):
    """Its pc_sampler, over the indices of its own tables, noise in the order it draws it; returns x_mean."""
    draws = iter(noises)
    betas = torch.linspace(0.1 / N, 20 / N, N, dtype=torch.float64)
    alphas_cumprod = torch.cumprod(1 - betas, 0)
    sigmas = torch.exp(torch.linspace(math.log(0.01), math.log(50), N, dtype=torch.float64))
    mean = x
    for i in reversed(range(N)):
        beta, adjacent = float(betas[i]), float(sigmas[i - 1]) if i else 0.0
        alpha, std = (1 - beta, float((1 - alphas_cumprod[i]).sqrt())) if kind == "vp" else (1.0, float(sigmas[i]))
        for _ in range(n_steps if corrector != "none" else 0):
            x = langevin_step(x, score(x, i), next(draws), snr, alpha, std, corrector, norm)
        if predictor == "none":
            mean = x
            continue
        z = next(draws)
        s = score(x, i)
        if predictor == "reverse_diffusion":
            f = math.sqrt(1 - beta) * x - x if kind == "vp" else 0.0
            g2 = beta if kind == "vp" else std**2 - adjacent**2
            mean = x - (f - g2 * s)
            x = mean + math.sqrt(g2) * z
        elif predictor == "ancestral" and kind == "vp":
            mean = (x + beta * s) / math.sqrt(1 - beta)
            x = mean + math.sqrt(beta) * z
        elif predictor == "ancestral":
            mean = x + s * (std**2 - adjacent**2)
            x = mean + math.sqrt(adjacent**2 * (std**2 - adjacent**2) / std**2) * z
        else:
            g = std * math.sqrt(2 * math.log(5000))
            mean = x + g**2 * s / N
            x = mean + g * math.sqrt(1 / N) * z
    return mean


def score_of(kind: str) -> Callable[[Tensor, int], Tensor]:
    """A score of x and the index of the level, elementwise."""

    def score(x: Tensor, i: int) -> Tensor:
        level = 1.0 if kind == "vp" else 0.05 + 3 * (i / N) ** 2
        return -(torch.tanh(x) + 0.05 * i / N) / level - 0.1 * x

    return score


PAIRS = [
    (kind, predictor, corrector)
    for kind in ("vp", "ve")
    for predictor in ("reverse_diffusion", "ancestral", "euler_maruyama", "none")
    for corrector in ("langevin", "ald", "none")
    if (predictor, corrector) != ("none", "none") and (kind, predictor) != ("vp", "euler_maruyama")
]


@pytest.mark.parametrize("norm", ["batch", "sample"])
@pytest.mark.parametrize(("kind", "predictor", "corrector"), PAIRS)
def test_score_sde(kind, predictor, corrector, norm):
    """The same noise gives the same samples, in float64 within its rounding; "sample" by the per-sample norms."""
    score = score_of(kind)
    n_steps = 2
    noises = draw(3 * N)
    x = draw(1, 8)[0] * (50.0 if kind == "ve" else 1.0)
    if kind == "vp":
        schedule, grid = VP_TABLE, {"steps": N}
        index = lambda t: int(t[0])  # noqa: E731
    else:
        schedule = VE
        grid = {"timesteps": torch.arange(N - 1, -1, -1, dtype=torch.float64) / (N - 1)}
        index = lambda t: round(float(t[0]) * (N - 1))  # noqa: E731
    given = {"dt": 1.0 / N} if predictor == "euler_maruyama" else {}
    got = predictor_corrector(
        lambda x, t: score(x, index(t)), x, schedule, **grid, predictor=predictor, corrector=corrector,
        corrector_steps=n_steps, snr=0.16, norm=norm, prediction="score", noise=noises, **given,
    )  # fmt: skip
    want = score_sde(kind, x, score, noises, predictor, corrector, n_steps, 0.16, norm)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * float(want.abs().max()))


def test_score_sde_euler_maruyama_of_vp():
    """Their step of 1/N, at times that are not 1/N apart."""
    times = torch.linspace(1.0, 1e-3, N, dtype=torch.float64)
    noises, x = draw(N), draw(1, 8)[0]
    score = lambda x, t: -torch.tanh(x) - 0.3 * float(t) * x  # noqa: E731
    want, mean = x, x
    for t, z in zip(times.tolist(), noises, strict=True):
        beta = 0.1 + t * 19.9
        mean = want - (-0.5 * beta * want - beta * score(want, torch.tensor(t).float())) / N
        want = mean + math.sqrt(beta / N) * z
    got = predictor_corrector(
        lambda x, t: score(x, t[0]), x, VP, timesteps=times, predictor="euler_maruyama", corrector="none", dt=1 / N,
        prediction="score", noise=noises,
    )  # fmt: skip
    torch.testing.assert_close(got, mean, rtol=1e-12, atol=1e-12)


# --- closed forms ----------------------------------------------------------------------------------------------------


def affine_moments(made, model: Callable[..., Tensor], variance: float) -> tuple[float, float]:
    """Mean and variance at the end of a plan, from N(0, variance), for a model affine in x."""
    mean = 0.0
    probe = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for i, row in enumerate(made.rows):
        at = run_plan(made, model, probe, [torch.zeros_like(probe)] * row.draws, range(i, i + 1))
        slope, offset = float(at[1] - at[0]), float(at[0])
        mean, variance = offset + slope * mean, slope**2 * variance + row.g**2
    return mean, variance


@pytest.mark.parametrize("corrector", ["ald", "none"])
@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral", "euler_maruyama"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_gaussian_data(schedule, predictor, corrector):
    """Mean and variance of the output tend to the data's, at order one of the steps; ald keeps the marginals."""

    def grid(n: int) -> dict[str, object]:
        if schedule is FLOW:
            return {"timesteps": torch.linspace(0.02, 0.999, n, dtype=torch.float64)}
        if isinstance(schedule, schedules.DiscreteSchedule):
            return {"timesteps": torch.linspace(999, 0, n).round()}
        return {"steps": n}

    errors = []
    for n in (100, 400):
        made = pc_plan(schedule, **grid(n), predictor=predictor, corrector=corrector, snr=0.1)
        model = DATA.model(schedule, made.prediction)
        level = made.init_scale
        if schedule is FLOW:
            level = math.hypot(0.02 * DATA.std, float(FLOW.sigma(0.02)))
        mean, variance = affine_moments(made, model, level**2)
        errors.append(abs(mean - DATA.mean) + abs(math.sqrt(variance) - DATA.std))
    assert errors[-1] < 0.06, errors
    assert errors[-1] < errors[0] or errors[-1] < 2e-3, errors


@pytest.mark.parametrize("schedule", [schedules.linear(), VE, SUB_VP, EDM], ids=lambda s: s.name)
def test_langevin_keeps_gaussian_data(schedule):
    """The norm-ratio corrector, by moments over 40 000 elements, whose standard error is 0.003; the rest is bias."""
    n, count = 200, 20_000
    x = initial(samplers.euler_maruyama(schedule, n), (2, count), 5, torch.float64)
    got = predictor_corrector(exact(schedule), x, schedule, n, seeds=7, snr=0.1)
    assert float(got.mean()) == pytest.approx(DATA.mean, abs=0.03)
    assert float(got.std()) == pytest.approx(DATA.std, abs=0.03)


def test_corrector_moves_towards_the_marginal():
    """Many correctors at one level: from a wrong spread to N(alpha mean, alpha^2 std^2 + sigma^2)."""
    t = 0.3
    x = 3.0 * ops.randn((2, 20_000), ops.seeds(1, 2), streams.INITIAL, dtype=torch.float64)
    got = predictor_corrector(exact(VP), x, VP, timesteps=[t], predictor="none", corrector_steps=600, snr=0.16, seeds=3)
    alpha, sigma = float(VP.alpha(t)), float(VP.sigma(t))
    assert float(got.mean()) == pytest.approx(alpha * DATA.mean, abs=0.02)
    assert float(got.std()) == pytest.approx(math.hypot(alpha * DATA.std, sigma), rel=0.03)


# --- identities ------------------------------------------------------------------------------------------------------


def test_annealed_langevin_identity():
    """ald alone on VE is annealed Langevin with step_size = snr^2 sigma_last^2 2, row for row."""
    times = torch.linspace(1, 0, 6, dtype=torch.float64)
    mine = pc_plan(VE, timesteps=times, predictor="none", corrector="ald", corrector_steps=4, snr=0.1)
    size = 2 * (0.1 * float(VE.sigma(0.0))) ** 2
    theirs = samplers.annealed_langevin(VE, timesteps=times, each=4, step_size=size)
    assert len(mine.rows) == len(theirs.rows) == 24
    torch.testing.assert_close(mine.table, theirs.table, rtol=1e-13, atol=1e-13)


def test_a_predictor_alone_is_the_samplers():
    """ancestral with beta is DDPM with beta; Euler-Maruyama without corrector the sampler of that name, but its end."""
    table = schedules.linear(T=50)
    one, two = pc_plan(table, 50, predictor="ancestral", corrector="none"), samplers.ddpm(table, variance="beta")
    x = draw(1)[0]
    noises = draw(49, 4)
    torch.testing.assert_close(
        run_plan(one, network, x, noises), run_plan(two, network, x, noises), rtol=1e-10, atol=1e-10
    )
    tilde = pc_plan(table, 50, predictor="ancestral", corrector="none", variance="beta_tilde")
    other = samplers.ddpm(table, variance="beta_tilde")
    torch.testing.assert_close(
        run_plan(tilde, network, x, noises), run_plan(other, network, x, noises), rtol=1e-10, atol=1e-10
    )
    times = [0.9, 0.6, 0.3]
    em = samplers.euler_maruyama(VP, timesteps=[*times, 0.0])
    mine = pc_plan(VP, timesteps=times, predictor="euler_maruyama", corrector="none")
    assert mine.table[:, :17].tolist() == em.table[:, :17].tolist()


@pytest.mark.parametrize("corrector", ["ald", "none"])
def test_a_plan_run_by_sample_is_the_same(corrector):
    x = initial(samplers.euler_maruyama(VP, 9), SHAPE, SEEDS)
    made = pc_plan(VP, 9, corrector=corrector)
    got = predictor_corrector(network, x, VP, 9, corrector=corrector, seeds=SEEDS)
    assert torch.equal(got, sample(network, x, made, seeds=SEEDS))
    assert diffkern.Plan.from_json(made.to_json()) == made


def test_a_sample_without_a_score_stays():
    """A zero score has no ratio of norms: no step, instead of 0 times infinity."""
    x = draw(1)[0]
    got = predictor_corrector(
        lambda x, t: torch.zeros_like(x), x, VE, timesteps=[0.5], predictor="none", prediction="score", seeds=1
    )
    assert torch.equal(got, x)


def test_a_nan_stays_in_its_sample():
    x = draw(1)[0]

    def model(x: Tensor, t: Tensor) -> Tensor:
        m = network(x, t)
        m[1, 0, 0, 0] = math.nan
        return m

    got = predictor_corrector(model, x, VP, timesteps=[0.5], predictor="none", seeds=SEEDS)
    assert got.isnan().nonzero().tolist() == [[1, 0, 0, 0]]


def test_where_the_model_says_nothing_about_the_score():
    """A flow at t = 0: x is noise there, whatever the velocity; the corrector's size is 0 with r."""
    x = draw(1)[0]
    got = predictor_corrector(network, x, FLOW, 5, predictor="reverse_diffusion", seeds=1)
    assert torch.isfinite(got).all()


# --- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("corrector", ["langevin", "ald"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_a_sample_depends_on_its_own_seed_alone(schedule, corrector, dtype):
    """Bit for bit: alone, turned round, and in a large batch."""
    x = initial(pc_plan(schedule, 6), SHAPE, SEEDS, dtype)
    model = lambda x, t: network(x.float(), t)  # noqa: E731
    run = lambda x, seeds: predictor_corrector(model, x, schedule, 6, corrector=corrector, seeds=seeds)  # noqa: E731
    whole = run(x, SEEDS)
    assert torch.isfinite(whole).all()
    for b in range(3):
        assert torch.equal(run(x[b : b + 1], SEEDS[b : b + 1])[0], whole[b])
    assert torch.equal(run(x.flip(0), SEEDS.flip(0)).flip(0), whole)
    many = run(x.repeat(7, 1, 1, 1), SEEDS.repeat(7))
    assert torch.equal(many, whole.repeat(7, 1, 1, 1))
    if corrector == "langevin" and dtype == torch.float32:
        batch = predictor_corrector(model, x, schedule, 6, norm="batch", seeds=SEEDS)
        assert not torch.equal(batch, whole)  # the parity mode does see its neighbours


def test_noise_by_address_is_the_tensor():
    x = initial(pc_plan(VP, 5), SHAPE, SEEDS, torch.float64)
    noises = [ops.randn(SHAPE, SEEDS, streams.STEP + i, dtype=torch.float64) for i in range(15)]
    one = predictor_corrector(network, x, VP, 5, corrector_steps=2, seeds=SEEDS, denoise=False)
    two = predictor_corrector(network, x, VP, 5, corrector_steps=2, noise=noises, denoise=False)
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)
    assert torch.equal(
        predictor_corrector(network, x, VP, 5, seeds=7), predictor_corrector(network, x, VP, 5, seeds=ops.seeds(7, 3))
    )
    torch.manual_seed(1)
    drawn = predictor_corrector(network, x, VP, 5)
    torch.manual_seed(1)
    assert torch.equal(drawn, predictor_corrector(network, x, VP, 5))


def test_trajectory_callback_progress_and_dtypes(capsys):
    x = initial(pc_plan(VP, 5), SHAPE, SEEDS)
    kept = x.clone()
    seen: list[tuple[int, float, Tensor, Tensor]] = []
    dtypes = set()

    def model(x: Tensor, t: Tensor) -> Tensor:
        dtypes.add((x.dtype, t.shape, t.dtype))
        return network(x, t)

    got = predictor_corrector(
        model, x, VP, 5, seeds=SEEDS, progress="sampling", trajectory=True, model_dtype=torch.bfloat16,
        out_dtype=torch.float64,
        callback=lambda info: seen.append((info["i"], info["t"], info["x"].clone(), info["x0"].clone())),
    )  # fmt: skip
    assert "sampling" in capsys.readouterr().err
    assert torch.equal(x, kept)
    assert got.x.dtype == torch.float64
    assert got.trajectory.shape == (6, *SHAPE)
    assert dtypes == {(torch.bfloat16, torch.Size([3]), torch.float32)}
    assert [s[0] for s in seen] == [0, 1, 2, 3, 4]
    assert [s[1] for s in seen] == pytest.approx(torch.linspace(1, 1e-3, 5).tolist())
    for i, (_, _, state, _) in enumerate(seen):
        assert torch.equal(state, got.trajectory[i + 1])
    assert torch.equal(got.trajectory[0], x)
    assert torch.equal(got.trajectory[-1].double(), got.x)
    row = pc_plan(VP, 5).rows[-1]
    last = got.trajectory[-1]
    assert float((seen[-1][3] - last).abs().max()) < 0.2  # x0 and the state meet at the end
    assert row.known_n == 0.0


def test_conditions_are_passed_on():
    x = initial(pc_plan(VP, 3), SHAPE, SEEDS)
    label, seen = {"text": "seven"}, []

    def model(x: Tensor, t: Tensor, c: object) -> Tensor:
        seen.append(c)
        return network(x, t)

    got = predictor_corrector(model, x, VP, 3, cond=label, seeds=SEEDS)
    assert all(c is label for c in seen)
    assert len(seen) == 6
    assert torch.equal(got, predictor_corrector(network, x, VP, 3, seeds=SEEDS))


@pytest.mark.parametrize("corrector", ["langevin", "ald"])
def test_inpainting(corrector):
    x = initial(pc_plan(VP, 6), SHAPE, SEEDS, torch.float64)
    known = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).reshape(SHAPE)
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    mask[:, :, :2] = True
    got, states, _ = predictor_corrector(
        network, x, VP, 6, corrector=corrector, seeds=SEEDS, mask=mask, known=known, trajectory=True
    )
    assert torch.equal(got[~mask], known[~mask])
    assert not torch.equal(got[mask], known[mask])
    row = pc_plan(VP, 6).rows[5]
    z = ops.randn(SHAPE, SEEDS, row.known_stream, dtype=torch.float64)
    torch.testing.assert_close(states[3][~mask], (row.known_s * known + row.known_n * z)[~mask], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.float64])
@pytest.mark.parametrize("corrector", ["langevin", "ald"])
def test_noise_tensors_with_a_mask_leave_the_known_part_to_the_seeds(corrector, dtype):
    x = initial(pc_plan(VP, 6), SHAPE, SEEDS, torch.float64)
    known = draw(1)[0]
    mask = (torch.arange(known.numel()).reshape(SHAPE) % 2).to(dtype)
    given = {"corrector": corrector, "mask": mask, "known": known, "trajectory": True}
    want = predictor_corrector(network, x, VP, 6, seeds=SEEDS, **given).trajectory
    rows = pc_plan(VP, 6).rows
    noises = [ops.randn(SHAPE, SEEDS, row.stream, dtype=torch.float64) for row in rows if row.draws]
    got = predictor_corrector(network, x, VP, 6, seeds=SEEDS, noise=noises, **given).trajectory
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.manual_seed(1)
    drawn = predictor_corrector(network, x, VP, 6, noise=noises, **given).trajectory  # seeds of torch's generator
    torch.manual_seed(1)
    assert torch.equal(drawn, predictor_corrector(network, x, VP, 6, noise=noises, **given).trajectory)
    assert not torch.equal(drawn, got)


@pytest.mark.parametrize("norm", ["sample", "batch"])
def test_a_default_device_holds_none_of_the_tables(norm):
    """Of the schedule and plan only what was made before is asked for."""
    x = initial(pc_plan(VP, 4), SHAPE, SEEDS)
    plan, scores = rows_of(VP, 4, predictor="ancestral", corrector="langevin")
    assert plan.table.device.type == "cpu"

    def run() -> Tensor:
        made = _predictor_corrector._Run(plan, scores, x, x.dtype, None, None, None, norm, SEEDS)
        for i in range(len(plan.rows)):
            made.row(lambda x, t: torch.tanh(x), i, None, want_x0=False)
        return made.state

    want = run()
    with torch.device("meta"):
        assert torch.equal(run(), want)


def test_memory_format_and_empty_batch():
    x = initial(pc_plan(VP, 4), SHAPE, SEEDS).to(memory_format=torch.channels_last)
    got = predictor_corrector(network, x, VP, 4, seeds=SEEDS)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        got, predictor_corrector(network, x.contiguous(), VP, 4, seeds=SEEDS), rtol=1e-4, atol=1e-4
    )
    assert predictor_corrector(network, torch.zeros(0, 2), VP, 4, seeds=1).shape == (0, 2)
    assert predictor_corrector(network, torch.zeros(3, 0), VP, 4, seeds=1).shape == (3, 0)


def test_a_model_that_returns_its_input():
    x = initial(pc_plan(EDM, 4), SHAPE, SEEDS)
    one = predictor_corrector(lambda x, t: x, x, EDM, 4, seeds=SEEDS)
    two = predictor_corrector(lambda x, t: x.clone(), x, EDM, 4, seeds=SEEDS)
    assert torch.equal(one, two)


@pytest.mark.parametrize(("corrector", "steps", "fused"), [
    ("none", 1, {"step_out": 8}),
    ("ald", 2, {"step_out": 24}),
    ("langevin", 1, {"step_out": 16, "loss": 16}),
    ("langevin", 2, {"step_out": 24, "loss": 32}),
])  # fmt: skip
def test_op_counts(corrector, steps, fused):
    """One step a model call, two sums of squares a langevin step; two states are all that is made."""
    x = initial(pc_plan(VP, 8), (4, 3, 16, 16), 1)
    buffer = torch.empty_like(x)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x, out=buffer)

    with CountOps(x.shape) as count:
        predictor_corrector(model, x, VP, 8, corrector=corrector, corrector_steps=steps, seeds=3)
    assert {k: v for k, v in count.fused.items() if k != "seeds"} == fused
    made = {k: v for k, v in count.large.items() if k != "tanh"}
    assert made == {"empty_like": 2}


class Reads(TorchDispatchMode):
    """Counts the ops that bring a value to the host, from the first model call on."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.on = 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += self.on and func._opname in ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("norm", ["sample", "batch"])
def test_nothing_is_read_back(norm):
    """The sizes of the corrector's steps stay on the device."""
    x = initial(pc_plan(VP, 4), SHAPE, SEEDS)
    with Reads() as reads:

        def model(x: Tensor, t: Tensor) -> Tensor:
            reads.on = True
            return torch.tanh(x)

        predictor_corrector(model, x, VP, 4, seeds=SEEDS, norm=norm)
        assert reads.on
        assert reads.count == 0
        float(x[0, 0, 0, 0])
        assert reads.count == 1


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "words"), [
    ({"predictor": "heun"}, "predictor must be 'reverse_diffusion' or 'ancestral' .* got 'heun'"),
    ({"corrector": "mala"}, "corrector must be 'langevin' or 'ald' or 'none', got 'mala'"),
    ({"predictor": "none", "corrector": "none"}, "predictor and corrector must not both be 'none'"),
    ({"corrector_steps": 0}, "corrector_steps must be an integer of at least 1, got 0"),
    ({"snr": 0.0}, "snr must be positive, got 0"),
    ({"snr": math.nan}, "snr must be positive, got nan"),
    ({"norm": "all"}, "norm must be 'sample' or 'batch', got 'all'"),
    ({"variance": "beta"}, "variance belongs to the ancestral predictor, got it for 'reverse_diffusion'"),
    ({"predictor": "ancestral", "variance": "learned"}, "variance must be 'beta' or 'beta_tilde', got 'learned'"),
    ({"dt": 0.1}, "dt belongs to the euler_maruyama predictor, got it for 'reverse_diffusion'"),
    ({"predictor": "euler_maruyama", "dt": 0.0}, "dt must be positive, got 0"),
    ({"steps": 0}, "steps must be .* got 0"),
    ({"steps": None}, "exactly one of steps and timesteps"),
    ({"timesteps": [0.5]}, "exactly one of steps and timesteps"),
    ({"prediction": "noise"}, "prediction must be one of"),
    ({"mask": torch.ones(SHAPE)}, "mask and known must be given together, got only mask"),
    ({"noise": draw(1)}, "noise must hold one tensor for each row that draws, got no more at row 1"),
    ({"noise": draw(1), "seeds": 3}, "give seeds or noise, not both"),
    ({"seeds": torch.zeros(2, dtype=torch.int64)}, r"seeds must be an integer or int64 \[3\], got"),
])  # fmt: skip
def test_bad_input(given, words):
    options = {"steps": 4} | given
    with pytest.raises(ValueError, match=words):
        predictor_corrector(network, draw(1)[0], VP, options.pop("steps"), **options)


def test_bad_model_and_states():
    x = draw(1)[0]
    with pytest.raises(
        ValueError, match=r"model must return a tensor of shape \[3, 2, 4, 5\], got shape \[3\] at row 0"
    ):
        predictor_corrector(lambda x, t: t, x, VP, 4, seeds=1)
    with pytest.raises(ValueError, match="x must be a floating point tensor"):
        predictor_corrector(network, torch.zeros(3, dtype=torch.int64), VP, 4)
    with pytest.raises(ValueError, match="schedule must be a diffkern Schedule, got str"):
        predictor_corrector(network, x, "vp", 4)
    with pytest.raises(ValueError, match=r"steps must .* got 41"):
        predictor_corrector(network, x, VP_TABLE, 41)
    with pytest.raises(ValueError, match="the ancestral predictor needs alpha > 0, got 0 at t=0"):
        predictor_corrector(network, x, FLOW, 4, predictor="ancestral")
    with pytest.raises(ValueError, match="needs a finite drift and diffusion at each model call, got -inf and inf"):
        predictor_corrector(network, x, FLOW, 4, predictor="euler_maruyama")
    with pytest.raises(ValueError, match="corrector must be 'ald' or 'none' in a plan, got 'langevin'"):
        pc_plan(VP, 4, corrector="langevin")


@pytest.mark.parametrize(("given", "words"), [
    ({"mask": torch.ones(SHAPE[1:], dtype=torch.bool)},
     r"mask must be bool, uint8 or torch.float64 of the shape of x \[3, 2, 4, 5\], got torch.bool of shape \[2, 4"),
    ({"mask": torch.ones(SHAPE)}, r"mask must be bool, uint8 or torch.float64 .*, got torch.float32 of shape"),
    ({"mask": 1}, "mask must be .*, got int"),
    ({"known": torch.zeros(SHAPE)}, r"known must be torch.float64 of the shape of x .*, got torch.float32 of shape"),
    ({"known": torch.zeros(3, dtype=torch.float64)}, r"known must be .*, got torch.float64 of shape \[3\]"),
    ({"known": 0.0}, "known must be .*, got float"),
])  # fmt: skip
def test_mask_and_known_are_checked_before_the_model(given, words):
    def model(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("called")

    options = {"mask": torch.ones(SHAPE, dtype=torch.bool), "known": draw(1)[0]} | given
    with pytest.raises(ValueError, match=words):
        predictor_corrector(model, draw(1)[0], VP, 4, seeds=1, **options)
