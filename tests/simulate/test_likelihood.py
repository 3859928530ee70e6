"""Log-likelihoods against closed forms: Gaussians and mixtures on every schedule, Hutchinson, solvers, bits."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.oracles import Gaussian, Mixture
from helpers.suites import few
from torch import Tensor, nn

import diffkern
from diffkern import ops, schedules
from diffkern.schedules.predictions import PREDICTIONS
from diffkern.simulate import BrownianMotion, VectorField
from diffkern.simulate.likelihood import FIXED, dequantise, log_likelihood, nats_to_bits_per_dim, ode_log_likelihood

DATA, MIXTURE = Gaussian(0.4, 0.6), Mixture()
X = torch.tensor([[-1.0, 0.3], [0.2, 0.9], [2.0, -0.4]], dtype=torch.float64)


def normal(x: Tensor, mean: float, std: float) -> Tensor:
    return (-0.5 * ((x - mean) / std) ** 2 - math.log(std) - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def gaussian_model(schedule, prediction, data=DATA):
    """The exact network; c_noise of edm turned back into its sigma."""

    def model(x, t):
        shape = (-1, *(1,) * (x.ndim - 1))
        if prediction == "edm":
            t = (4 * t).exp()
            x = x / schedule.preconditioning(t)[2].reshape(shape)

        class At:  # the oracle's scalar rates, one a sample
            def __getattr__(self, name):
                def rate(t):
                    value = getattr(schedule, name)(t)
                    one = lambda v: v.reshape(shape)  # noqa: E731
                    return tuple(map(one, value)) if isinstance(value, tuple) else one(value)

                return rate

        return data.predict(At(), prediction, x, t)

    return model


def level(schedule, t: float) -> tuple[float, float]:
    return float(schedule.alpha(t)), float(schedule.sigma(t))


def ends(schedule) -> tuple[float, float]:
    low, high = schedule.time_range
    return (low, high) if schedule.direction > 0 else (high, low)


def closed_form(schedule, t_data: float, t_noise: float) -> Tensor:
    """ln of the density that the prior has after the exact, affine flow back to the data end."""
    start, end = level(schedule, t_data), level(schedule, t_noise)
    stretch = float(DATA.ode(X[:1, :1] + 1, start, end) - DATA.ode(X[:1, :1], start, end))
    return normal(DATA.ode(X, start, end), 0.0, schedule.prior_std) + X[0].numel() * math.log(stretch)


CASES = [
    *((name, "eps") for name in schedules.SCHEDULES if name not in ("flow", "cosine_vp")),
    ("vp", "score"),
    ("vp", "x0"),
    ("vp", "v"),
    ("sub_vp", "velocity"),
    ("edm", "edm"),
    ("linear", "v"),
    ("linear", "mu"),
    ("flow", "velocity"),
    ("cosine_vp", "v"),
]


# make test: a table, a continuous path, one of flow matching, and a network of its own time and scale.
@pytest.mark.parametrize(("name", "prediction"), few(CASES, "linear-eps", "vp-v", "flow-velocity", "edm-edm"))
def test_gaussian_data_to_a_ten_thousandth_of_a_nat(name, prediction):
    """Every schedule, through the default prior: the density of the model; and the data's own from the exact one."""
    schedule = schedules.SCHEDULES[name]()
    t0, t1 = ends(schedule)
    model = gaussian_model(schedule, prediction)
    found = log_likelihood(model, X, schedule, prediction, divergence="exact")
    torch.testing.assert_close(found.nats, closed_form(schedule, t0, t1), rtol=0, atol=1e-4)
    torch.testing.assert_close(
        found.latent, DATA.ode(X, level(schedule, t0), level(schedule, t1)), rtol=1e-4, atol=1e-4
    )

    def of_the_data(t):
        alpha, sigma = level(schedule, t)
        return lambda x: normal(x, alpha * DATA.mean, math.hypot(alpha * DATA.std, sigma))

    exact = log_likelihood(model, X, schedule, prediction, divergence="exact", prior=of_the_data(t1))
    torch.testing.assert_close(exact.nats, of_the_data(t0)(X), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "t_noise"), [("flow", 1e-3), ("cosine_vp", 0.999)])
def test_an_eps_network_stays_inside_where_the_signal_is_zero(name, t_noise):
    """At alpha = 0 eps says nothing of x0: an error at the end itself, the exact density from a given end."""
    schedule = schedules.SCHEDULES[name]()
    model = gaussian_model(schedule, "eps")
    with pytest.raises(ValueError, match="does not determine x0 and eps"):
        log_likelihood(model, X, schedule, "eps", divergence="exact")
    alpha, sigma = level(schedule, t_noise)
    found = log_likelihood(
        model,
        X,
        schedule,
        "eps",
        divergence="exact",
        t_noise=t_noise,
        prior=lambda x: normal(x, alpha * DATA.mean, math.hypot(alpha * DATA.std, sigma)),
    )
    alpha, sigma = level(schedule, ends(schedule)[0])
    want = normal(X, alpha * DATA.mean, math.hypot(alpha * DATA.std, sigma))
    torch.testing.assert_close(found.nats, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "prediction"), few([("vp", "eps"), ("edm", "x0"), ("flow", "velocity")], "vp-eps"))
@pytest.mark.parametrize("dims", [1, 2])
def test_mixtures_against_their_density(name, prediction, dims):
    schedule = schedules.SCHEDULES[name]()
    t0, t1 = ends(schedule)
    x = torch.linspace(-2.2, 2.2, 6 * dims, dtype=torch.float64).reshape(dims, 6).T.contiguous()

    def density(t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return lambda x: MIXTURE.log_density(alpha, sigma, x).sum(1)

    def model(x, t):
        return MIXTURE.predict(schedule, prediction, x, t)

    # At the end of a flow x0 and eps of the mixture are 0/0: a little inside, and from the exact density there.
    if name == "flow":
        t0, t1 = 0.999, 0.001
    found = log_likelihood(
        model,
        x,
        schedule,
        prediction,
        divergence="exact",
        t_data=t0,
        t_noise=t1,
        prior=density(t1),
        rtol=1e-6,
        atol=1e-6,
    )
    torch.testing.assert_close(found.nats, density(t0)(x), rtol=0, atol=1e-4)


def network(D: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, D)).double()


def test_hutchinson_is_unbiased_for_both_kinds_of_probe():
    """Same x, fresh probes: the mean within 4.5 standard errors; Rademacher varies less; more probes, less too."""
    net, vp, n = network(3), schedules.vp(), 600
    x = torch.tensor([[0.5, -0.2, 1.0]], dtype=torch.float64)
    settings = {"solver": "midpoint", "steps": 12}
    model = lambda x, t: net(x)  # noqa: E731
    exact = float(log_likelihood(model, x, vp, "eps", divergence="exact", **settings).nats)
    spread = {}
    for probe, probes in (("rademacher", 1), ("gaussian", 1), ("rademacher", 4)):
        found = log_likelihood(
            model, x.expand(n, 3), vp, "eps", probe=probe, probes=probes, seeds=ops.seeds(0, n), **settings
        )
        spread[probe, probes] = float(found.nats.std())
        assert float(found.nats.mean()) == pytest.approx(exact, abs=4.5 * spread[probe, probes] / math.sqrt(n))
    assert 0 < spread["rademacher", 1] < spread["gaussian", 1]
    assert spread["rademacher", 4] == pytest.approx(spread["rademacher", 1] / 2, rel=0.2)


def test_hutchinson_is_exact_where_the_jacobian_is_diagonal():
    """Elementwise models: v_i^2 = 1."""
    vp = schedules.vp()
    model = gaussian_model(vp, "eps")
    exact = log_likelihood(model, X, vp, "eps", divergence="exact").nats
    torch.testing.assert_close(
        log_likelihood(model, X, vp, "eps", seeds=ops.seeds(0, 3)).nats, exact, rtol=0, atol=1e-5
    )


ORDERS = [("euler", 1), ("midpoint", 2), ("heun", 2), ("rk4", 4), ("rk4_38", 4)]


@pytest.mark.parametrize(("solver", "order"), few(ORDERS, "midpoint-2"))
def test_order_of_the_fixed_solvers(solver, order):
    vp, steps = schedules.vp(), [256, 1024] if order == 1 else [64, 256]
    model, want = gaussian_model(vp, "eps"), closed_form(vp, 1e-3, 1.0)
    errors = []
    for n in steps:
        found = log_likelihood(model, X, vp, "eps", divergence="exact", solver=solver, steps=n)
        assert found.evaluations == n * len(FIXED[solver].nodes)
        errors.append(float((found.nats - want).abs().max()))
    assert math.log(errors[0] / errors[-1]) / math.log(4) == pytest.approx(order, abs=0.2)


def test_rk45_follows_its_tolerance():
    vp, found = schedules.vp(), {}
    model, want = gaussian_model(vp, "eps"), closed_form(vp, 1e-3, 1.0)
    for tolerance in (1e-3, 1e-5, 1e-7):
        found[tolerance] = log_likelihood(model, X, vp, "eps", divergence="exact", rtol=tolerance, atol=tolerance)
        assert float((found[tolerance].nats - want).abs().max()) < 60 * tolerance
    assert found[1e-3].evaluations < found[1e-5].evaluations < found[1e-7].evaluations


@pytest.mark.parametrize("settings", [{}, {"solver": "rk4", "steps": 20}], ids=["rk45", "rk4"])
@pytest.mark.parametrize(("name", "prediction"), few([("vp", "eps"), ("flow", "velocity")], "flow-velocity"))
def test_a_sample_alone_is_the_sample_in_a_batch(settings, name, prediction):
    """Bit for bit, also with adaptive steps, which are each sample's own, and with probes by address."""
    schedule = schedules.SCHEDULES[name]()
    model, seeds = gaussian_model(schedule, prediction), ops.seeds(3, 5)
    x = ops.randn((5, 3, 2, 2), ops.seeds(1, 5)) * torch.tensor([0.1, 1.0, 3.0, 0.5, 2.0]).reshape(5, 1, 1, 1)
    for divergence in ("exact", "hutchinson"):
        options = {"divergence": divergence, "t_noise": 0.9 if name == "vp" else 0.1, **settings}
        whole = log_likelihood(model, x, schedule, prediction, seeds=seeds, **options)
        for b in (0, 2, 4):
            alone = log_likelihood(model, x[b : b + 1], schedule, prediction, seeds=seeds[b : b + 1], **options)
            assert torch.equal(alone.nats[0], whole.nats[b])
            assert torch.equal(alone.latent[0], whole.latent[b])


def test_a_float32_network_is_called_in_float32_and_given_its_arguments():
    seen = []

    def model(x, t, scale):
        seen.append((x.dtype, t.dtype, tuple(t.shape)))
        return scale * x

    found = log_likelihood(
        model, X.float(), schedules.vp(), "eps", divergence="exact", solver="euler", steps=2, scale=0.5
    )
    assert set(seen) == {(torch.float32, torch.float32, (3,))}
    assert found.nats.dtype == found.latent.dtype == torch.float64
    assert not found.nats.requires_grad


def test_any_ode_from_one_density_to_another():
    """dx/dt = -theta x stretches by exp(-theta t): lecture 003's flow, either way in time."""
    theta = 0.8
    for t0, t1 in ((0.0, 1.5), (1.5, 0.0)):
        found = ode_log_likelihood(
            VectorField(lambda x, t: -theta * x), X, t0, t1, lambda x: normal(x, 0.0, 1.0), divergence="exact"
        )
        stretch = math.exp(-theta * (t1 - t0))
        torch.testing.assert_close(found.nats, normal(X, 0.0, 1 / stretch), rtol=0, atol=1e-4)


def test_every_prediction_is_covered():
    assert {p for _, p in CASES} == set(PREDICTIONS)


# ----------------------------------------------------------------------------------------------------------------- bits


def test_bits_per_dim_and_their_offset():
    """A uniform density over [-1, 1]^D is log2 256 = 8 bits a dimension; over [0, 1]^D as well."""
    for low, high in ((-1.0, 1.0), (0.0, 1.0)):
        nats = torch.tensor([-12 * math.log(high - low)], dtype=torch.float64)
        assert float(nats_to_bits_per_dim(nats, 12, low=low, high=high)) == pytest.approx(8.0)
    assert float(nats_to_bits_per_dim(torch.zeros(1), 5)) == 7.0
    assert float(nats_to_bits_per_dim(torch.zeros(1), 5, low=0.0)) == 8.0
    assert float(nats_to_bits_per_dim(torch.zeros(1), 5, levels=2)) == 0.0


def test_dequantised_integers_stay_in_their_bins():
    images = torch.arange(256, dtype=torch.uint8).repeat(2, 40).reshape(2, 40, 256)
    seeds = ops.seeds(0, 2)
    x = dequantise(images, seeds=seeds, dtype=torch.float64)
    u = (x + 1) / 2 * 256 - images
    assert 0 < float(u.min()) < 0.01
    assert 0.99 < float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=4.5 * 12**-0.5 / math.sqrt(u.numel()))
    assert float(u.var()) == pytest.approx(1 / 12, abs=4.5 * math.sqrt(1 / 180 / u.numel()))
    assert torch.equal(dequantise(images[1:], seeds=seeds[1:], dtype=torch.float64)[0], x[1])
    assert dequantise(images, seeds=seeds).dtype == torch.float32
    torch.manual_seed(0)
    assert not torch.equal(dequantise(images), dequantise(images))


def test_dequantised_bits_bound_those_of_the_integers():
    """Gaussian of integers: E[bits of images + u] is at least -log2 of the bins' masses, and close for wide ones."""
    images = torch.randint(100, 156, (200, 6), generator=torch.Generator().manual_seed(0))
    x = dequantise(images, seeds=ops.seeds(0, 200), dtype=torch.float64)
    bits = float(nats_to_bits_per_dim(normal(x, 0.0, 0.2), 6).mean())
    edge = lambda v: 0.5 * torch.erfc(-(2 * v / 256 - 1) / 0.2 / math.sqrt(2))  # noqa: E731
    mass = edge(images.double() + 1) - edge(images.double())
    assert float(-mass.log2().mean()) == pytest.approx(bits, abs=0.01)


VP = schedules.vp()
EYE = VectorField(lambda x, t: 0 * x)


def call(**options):
    return lambda: log_likelihood(lambda x, t: 0.1 * x, X, VP, "eps", **options)


BAD = [
    (call(solver="rk5"), "solver must be one of euler, midpoint, heun, rk4, rk4_38, rk45, got 'rk5'"),
    (call(solver="heun", steps=-3), "steps must be an integer of at least 1 for heun, got -3"),
    (call(solver="rk4"), "steps must be an integer of at least 1 for rk4, got None"),
    (call(steps=10), "steps must not be given to rk45, which chooses its own, got 10"),
    (call(rtol=0.0), "rtol must be positive, got 0.0"),
    (call(atol=-1.0), "atol must be positive, got -1.0"),
    (call(divergence="trace"), "divergence must be one of exact, hutchinson, got 'trace'"),
    (call(probes=0), "probes must be an integer of at least 1, got 0"),
    (call(probe="sphere"), "probe must be one of rademacher, gaussian, got 'sphere'"),
    (
        call(seeds=ops.seeds(0, 2)),
        r"seeds must be an integer or int64 \[3\], got torch.int64 of shape \[2\]",
    ),
    (call(t_data=0.5, t_noise=0.4), "t_noise must lie on the noise side of t_data, got t_data = 0.5 and t_noise = 0.4"),
    (
        lambda: log_likelihood(lambda x, t: x, X.to(torch.int64), VP, "eps"),
        r"x must be floating-point samples \[B, ...\], got torch.int64: integers go through dequantise",
    ),
    (lambda: log_likelihood(lambda x, t: x, X[0], VP, "eps"), r"x must be floating-point samples .* got shape \[2\]"),
    (
        lambda: log_likelihood(lambda x, t: x, X, diffkern.ddpm(schedules.linear(), 10), "eps"),
        "needs a schedule, got the plan .*: its steps are stochastic",
    ),
    (
        lambda: log_likelihood(lambda x, t: x, X, diffkern.ddim(schedules.linear(), 10, clip=1.0), "eps"),
        "needs a schedule, got the plan .*: it clips x0, which has no inverse",
    ),
    (
        lambda: log_likelihood(lambda x, t: x, X, diffkern.ddim(schedules.linear(), 10), "eps"),
        "needs a schedule, got the plan .*: a plan runs from noise to data only",
    ),
    (lambda: log_likelihood(lambda x, t: x, X, "vp", "eps"), "schedule must be a Schedule, got str"),
    (lambda: log_likelihood("net", X, VP, "eps"), r"model must be a function of \(x, t\), got 'net'"),
    (
        lambda: log_likelihood(torch.no_grad()(lambda x, t: 0.1 * x), X, VP, "eps"),
        "model must be differentiable in x, got an output without a gradient",
    ),
    (
        lambda: log_likelihood(lambda x, t: x, X, schedules.zero_terminal_snr(schedules.linear()), "v"),
        "t_noise must be a time before the last of a table that ends on zero SNR, got t_noise = 999",
    ),
    (
        lambda: ode_log_likelihood(BrownianMotion(), X, 0.0, 1.0, normal),
        "ode must be deterministic to have a likelihood, got the SDE BrownianMotion",
    ),
    (lambda: ode_log_likelihood(lambda x, t: x, X, 0.0, 1.0, normal), "ode must be an ODE, got function"),
    (lambda: ode_log_likelihood(EYE, X, 1.0, 1.0, normal), "t_data and t_noise must be two finite times, got 1 and 1"),
    (
        lambda: ode_log_likelihood(VectorField(lambda x, t: torch.zeros_like(x)), X, 0.0, 1.0, normal),
        "the drift must be differentiable in x, got one without a gradient",
    ),
    (lambda: dequantise(X), r"images must be integers \[B, ...\], got torch.float64"),
    (lambda: dequantise(torch.full((2, 2), 256)), r"images must lie in 0..255, got 256..256"),
    (
        lambda: dequantise(torch.zeros(2, 2, dtype=torch.int64), levels=1),
        "levels must be an integer of at least 2, got 1",
    ),
    (lambda: nats_to_bits_per_dim(X, 0), "dims must be an integer of at least 1, got 0"),
    (lambda: nats_to_bits_per_dim(X, 3, low=1.0), "low and high must be finite, low < high, got 1.0 and 1.0"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_bad_input_is_one_sentence(case):
    bad, sentence = BAD[case]
    with pytest.raises(ValueError, match=sentence):
        bad()


def test_a_drift_that_is_not_finite_ends_in_a_sentence():
    with pytest.raises(RuntimeError, match=r"rk45 did not reach t = 1 .* too steep or not finite"):
        ode_log_likelihood(VectorField(lambda x, t: x * math.nan), X, 0.0, 1.0, lambda x: normal(x, 0, 1))
