"""The predictor-corrector loop: seeds, batches, conditions, masks, layouts, what is read and refused."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.corrector_cases import EDM, FLOW, SCHEDULES, SEEDS, SHAPE, VP, VP_TABLE, draw, network
from helpers.op_counter import CountOps
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from diffkern import ops, pc_plan, predictor_corrector, streams
from diffkern.sampling import _predictor_corrector, initial
from diffkern.sampling._corrector_rows import rows_of

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
    """One step a model call, two sums of squares a langevin step; all that is made: two states, two model inputs."""
    x = initial(pc_plan(VP, 8), (4, 3, 16, 16), 1)
    buffer = torch.empty_like(x)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(x, out=buffer)

    with CountOps(x.shape) as count:
        predictor_corrector(model, x, VP, 8, corrector=corrector, corrector_steps=steps, seeds=3)
    assert {k: v for k, v in count.fused.items() if k != "seeds"} == fused
    made = {k: v for k, v in count.large.items() if k != "tanh"}
    assert made == {"empty_like": 4}


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
    ({"corrector_steps": 2**63}, "corrector_steps must make a plan of at most 10000000 rows, got 9223372036854775808"),
    ({"steps": 2**63}, "steps must make a plan of at most 10000000 rows, got 9223372036854775808"),
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
     r"mask must be bool, uint8 or torch.float64 of the shape of x \[3, 2, 4, 5\] or of one channel, got torch.bool"),
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
