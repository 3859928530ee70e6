"""The samplers of compat.k_diffusion beside k-diffusion's own: same model, noise, options."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from helpers import k_diffusion_oracle
from helpers.lazy import needs
from helpers.op_counter import EveryOp
from torch import Tensor

from diffkern.compat import k_diffusion as ours

pytestmark = needs(*k_diffusion_oracle.NEEDED)
theirs = k_diffusion_oracle.Peer()

CHURN = ("euler", "heun", "dpm_2")
ANCESTRAL = ("euler_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral")
SDE = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")
ALL = (*CHURN, *ANCESTRAL, *SDE, "lms", "dpmpp_2m")
STEP = {torch.float32: 2e-6, torch.float64: 1e-12}
"""Of a step, relative to the largest element of the state."""

CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in ALL),
    *((name, {"s_churn": 4.0, "s_noise": 1.1}) for name in CHURN),
    *((name, {"s_churn": 100.0, "s_tmin": 0.5, "s_tmax": 30.0, "s_noise": 0.9}) for name in CHURN),
    *((name, {"s_churn": 3.0, "s_noise": 0.0}) for name in CHURN),
    *((name, {"eta": 0.0}) for name in (*ANCESTRAL, *SDE)),
    *((name, {"eta": 0.6, "s_noise": 1.2}) for name in (*ANCESTRAL, *SDE)),
    *((name, {"eta": 1.5}) for name in (*ANCESTRAL, *SDE)),
    *((name, {"eta": 40.0}) for name in ANCESTRAL),
    *(("lms", {"order": order}) for order in (1, 2, 3)),
    ("dpmpp_2m_sde", {"solver_type": "heun"}),
    *(("dpmpp_sde", {"r": r, "eta": eta}) for r in (0.3, 1.0, 1.5) for eta in (0.7, 1.0)),
]


class Network:
    """A denoiser, smooth and different at every element; remembers what it was given."""

    def __init__(self) -> None:
        self.levels: list[Tensor] = []
        self.states: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor, shift: float = 0.0) -> Tensor:
        self.levels.append(sigma)
        self.states.append(x)
        wide = x.double()
        level = sigma.double().reshape(-1, *(1,) * (x.ndim - 1))
        ramp = torch.linspace(-1, 1, x[0].numel(), dtype=torch.float64).reshape(x.shape[1:])
        return (wide / (1 + level**2).sqrt() + 0.3 * torch.tanh(wide / (1 + level) + ramp) + shift).to(x.dtype)


def levels(n: int = 9, dtype: torch.dtype = torch.float32) -> Tensor:
    return theirs.sampling.get_sigmas_karras(n, 0.03, 60.0).to(dtype)


def start(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (2, 3, 5, 7)) -> Tensor:
    return 60.0 * torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)


def run(module: Any, name: str, x: Tensor, sigmas: Tensor, **options: Any) -> tuple[Tensor, list[dict[str, Any]], Any]:
    """(result, what the callback saw, what torch's generator gives next), noise from a recorded sampler for SDEs."""
    torch.manual_seed(11)
    seen: list[dict[str, Any]] = []
    model = options.pop("model", None) or Network()
    if name in SDE and "noise_sampler" not in options:
        options["noise_sampler"] = lambda sigma, sigma_next: torch.randn_like(x)
    function = getattr(module.sampling, f"sample_{name}")
    out = function(model, x, sigmas, callback=seen.append, disable=True, **options)
    return out, seen, torch.rand(3)


def error(found: Tensor, want: Tensor) -> float:
    return float((found - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{'-'.join(map(str, o.values()))}" for n, o in CASES])
def test_trajectory(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    x, sigmas = start(dtype), levels(dtype=dtype)
    want, want_seen, want_next = run(theirs, name, x, sigmas, **options)
    found, found_seen, found_next = run(ours, name, x, sigmas, **options)
    assert found.dtype == want.dtype
    assert torch.equal(found_next, want_next), "the generator is not where k-diffusion leaves it"
    assert [d["i"] for d in found_seen] == [d["i"] for d in want_seen] == list(range(len(sigmas) - 1))
    for k, (one, other) in enumerate(zip(found_seen, want_seen, strict=True), 1):
        assert one.keys() == other.keys()
        assert torch.equal(one["sigma"], other["sigma"])
        for key in ("x", "sigma_hat", "denoised"):
            assert one[key].shape == other[key].shape
            assert one[key].dtype == other[key].dtype
            assert error(one[key], other[key]) <= k * STEP[dtype], (key, k)
    assert error(found, want) <= len(sigmas) * STEP[dtype]


@pytest.mark.parametrize("name", ALL)
def test_signature(name: str) -> None:
    want = inspect.signature(getattr(theirs.sampling, f"sample_{name}")).parameters.values()
    found = inspect.signature(getattr(ours, f"sample_{name}")).parameters.values()
    assert [(p.name, p.default) for p in found] == [(p.name, p.default) for p in want]


@pytest.mark.parametrize("name", ALL)
def test_ends_above_zero_and_takes_extra_args(name: str) -> None:
    x, sigmas = start(torch.float64), levels(dtype=torch.float64)[2:-3]
    options = {"extra_args": {"shift": 0.5}}
    want, found = (run(module, name, x, sigmas, **options)[0] for module in (theirs, ours))
    assert error(found, want) <= 1e-12
    plain = run(ours, name, x, sigmas)[0]
    assert error(plain, want) > 1e-3


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded"])
def test_layouts(name: str, layout: str) -> None:
    """Which element gets which draw of torch's generator depends on the strides."""
    x = {
        "channels_last": start().contiguous(memory_format=torch.channels_last),
        "transposed": start().transpose(2, 3),
        "sliced": start(shape=(2, 3, 5, 14))[..., ::2],
        "expanded": start()[:1].expand(2, 3, 5, 7),
    }[layout].double()
    options = {"s_churn": 5.0} if name in CHURN else {}
    want, found = (run(module, name, x, levels(dtype=torch.float64), **options)[0] for module in (theirs, ours))
    assert error(found, want) <= 1e-11


@pytest.mark.parametrize("name", ALL)
def test_one_level_is_no_step(name: str) -> None:
    x = start()
    assert run(ours, name, x, levels()[:1])[0] is x


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_one_step_where_the_original_fails(name: str) -> None:
    x, sigmas = start(), torch.tensor([60.0, 0.0])
    with pytest.raises(UnboundLocalError):
        run(theirs, name, x, sigmas)
    assert torch.equal(run(ours, name, x, sigmas)[0], Network()(x, sigmas[:1].repeat(2)))


@pytest.mark.parametrize("name", [*ANCESTRAL, *SDE])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_noise_sampler_is_asked_alike(name: str, eta: float) -> None:
    x, sigmas = start(), levels()
    asked: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for key, module in (("theirs", theirs), ("ours", ours)):
        calls = asked.setdefault(key, [])

        def sampler(sigma: Tensor, sigma_next: Tensor, calls: list[tuple[Tensor, Tensor]] = calls) -> Tensor:
            calls.append((sigma, sigma_next))
            return torch.randn_like(x)

        run(module, name, x, sigmas, eta=eta, noise_sampler=sampler)
    assert len(asked["ours"]) == len(asked["theirs"])
    for one, other in zip(asked["ours"], asked["theirs"], strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.shape == b.shape == ()
            assert a.dtype == b.dtype
            assert float(a) == pytest.approx(float(b), rel=2e-6)


@pytest.mark.parametrize("name", ALL)
def test_model_is_given_the_same_levels(name: str) -> None:
    x, sigmas = start(torch.float16), levels()
    networks = Network(), Network()
    for module, network in zip((theirs, ours), networks, strict=True):
        run(module, name, x, sigmas, model=network)
    want, found = (network.levels for network in networks)
    assert len(found) == len(want)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == b.dtype == torch.float16
        assert a.shape == b.shape == (2,)
        assert error(a.double(), b.double()) <= 1e-3  # a unit in the last place of float16


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_no_worse(name: str, dtype: torch.dtype) -> None:
    """Deterministic options, the same model outputs: the distance from float64 is at most the original's."""
    x, sigmas = start(dtype, (4, 3, 16, 16)), levels()
    options: dict[str, Any] = {} if "eta" not in inspect.signature(getattr(ours, f"sample_{name}")).parameters else {
        "eta": 0.0
    }  # fmt: skip
    # Levels that half precision rounds alike, so that only the arithmetic of the state is compared.
    sigmas = torch.cat([sigmas[:-1].to(dtype).float().unique().flip(0), sigmas[-1:]])

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.double().reshape(-1, 1, 1, 1)
        return (x.double() / (1 + level**2).sqrt()).to(x.dtype)

    exact = run(ours, name, x.double(), sigmas.double(), model=network, **options)[0]
    off = [run(m, name, x, sigmas, model=network, **options)[0] for m in (ours, theirs)]
    assert off[0].dtype == off[1].dtype
    rms = [float((o.double() - exact).square().mean().sqrt()) for o in off]
    assert rms[0] <= 1.05 * rms[1]


def test_a_wider_model_widens_the_state() -> None:
    x, sigmas = start(torch.float16), levels()

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        return Network()(x.float(), sigma.float())

    for name in ("heun", "dpmpp_2m", "lms"):
        want, found = (run(module, name, x, sigmas, model=network)[0] for module in (theirs, ours))
        assert found.dtype == want.dtype == torch.float32
        assert error(found, want) <= 1e-3  # the original multiplies its first state in float16


@pytest.mark.parametrize("name", ALL)
def test_callbacks_may_keep_what_they_see(name: str) -> None:
    x, sigmas = start(), levels()
    before = x.clone()
    kept: list[Tensor] = []
    copies: list[Tensor] = []

    def callback(found: dict[str, Any]) -> None:
        for key in ("x", "denoised"):
            kept.append(found[key])
            copies.append(found[key].clone())

    options = {"noise_sampler": lambda s, t: torch.randn_like(x)} if name in SDE else {}
    getattr(ours, f"sample_{name}")(Network(), x, sigmas, callback=callback, disable=True, **options)
    assert torch.equal(x, before)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_one_op_a_model_call(name: str) -> None:
    """Between two model calls: one step op, the noise, no arithmetic on numbers and no device read."""
    x, sigmas = start(), levels()
    m = torch.randn_like(x)
    calls = 0

    def network(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return m

    function = getattr(ours, f"sample_{name}")
    z = torch.randn_like(x)
    options = {"noise_sampler": lambda s, t: z} if name in SDE else {}
    function(network, x, sigmas, disable=True, **options)  # makes the plan
    calls = 0
    with EveryOp() as counted:
        function(network, x, sigmas, disable=True, **options)
    ops = counted.counts
    assert ops.pop("diffkern.step") == calls
    assert ops.pop("aten.randn_like", 0) == (
        0 if name not in (*CHURN, *ANCESTRAL) else len(sigmas) - 1 - (name in ANCESTRAL)
    )
    assert sum(count for op, count in ops.items() if "item" in op or "local_scalar" in op) == 0
    # What is left is made once a run, whatever the number of steps: levels, and views of them.
    assert set(ops) <= {
        "aten._to_copy",
        "aten.unbind",
        "aten.unsqueeze",
        "aten.repeat",
        "aten.lift_fresh",
        "aten.detach",
    }, ops
    assert sum(ops.values()) < 16, ops


def test_bits_do_not_depend_on_the_batch() -> None:
    x, sigmas = start(shape=(3, 2, 6, 5)), levels()
    for name in ALL:
        options = {"noise_sampler": lambda s, t: torch.zeros(1)} if name in SDE else {}
        if name in (*ANCESTRAL, *SDE):
            options = {"eta": 0.0}
        whole = getattr(ours, f"sample_{name}")(Network(), x, sigmas, disable=True, **options)
        alone = getattr(ours, f"sample_{name}")(Network(), x[1:2], sigmas, disable=True, **options)
        assert torch.equal(whole[1:2], alone), name


def test_limits_of_the_churn_are_compared_in_the_dtype_of_sigmas() -> None:
    """0.3 in float32 is above 0.3: k-diffusion finds the level inside, comparing with a number."""
    x, sigmas = start(), torch.tensor([2.0, 0.3, 0.1, 0.0])
    for limit in ({"s_tmax": 0.3}, {"s_tmin": 0.3}, {"s_tmax": 0.1}):
        want, found = (run(m, "euler", x, sigmas, s_churn=1.0, **limit)[0] for m in (theirs, ours))
        assert error(found, want) <= 1e-5


@pytest.mark.parametrize("name", CHURN)
@pytest.mark.parametrize("limits", [{"s_tmin": 5.0, "s_tmax": 1.0}, {"s_tmax": -1.0}, {"s_tmin": -1.0, "s_tmax": 5.0}])
def test_limits_between_which_no_level_lies_make_no_churn(name: str, limits: dict[str, float]) -> None:
    results = []
    for module in (theirs, ours):
        torch.manual_seed(4)
        results.append((run(module, name, start(), levels(), s_churn=4.0, **limits)[0], torch.rand(1).item()))
    assert error(results[1][0], results[0][0]) <= 9 * STEP[torch.float32]
    assert results[1][1] == results[0][1]


def test_no_gradient_is_recorded() -> None:
    x = start().requires_grad_()
    assert not ours.sample_euler(Network(), x, levels(), disable=True).requires_grad


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    ours.sample_euler(Network(), start(), levels(), disable=False)
    assert "9/9" in capsys.readouterr().err
    ours.sample_euler(Network(), start(), levels(), disable=True)
    assert capsys.readouterr().err == ""


def test_bad_input() -> None:
    x, sigmas = start(), levels()
    for bad, message in (
        (sigmas.tolist(), r"sigmas must be a tensor \[steps \+ 1\], got list"),
        (sigmas[None], r"sigmas must be a tensor \[steps \+ 1\], got shape \[1, 10\]"),
        (sigmas.flip(0), "sigmas must fall strictly"),
        (torch.tensor([1.0, 0.5, 0.5, 0.0]), r"sigmas must fall strictly.*sigmas\[1\] = 0.5 and sigmas\[2\] = 0.5"),
        (torch.tensor([1.0, math.nan, 0.0]), r"sigmas must be finite, got sigmas\[1\] = nan"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.sample_euler(Network(), x, bad, disable=True)
    with pytest.raises(
        ValueError, match=r"model must return a tensor of shape \[2, 3, 5, 7\], got shape \[2, 6, 5, 7\]"
    ):
        ours.sample_heun(lambda x, s: torch.cat([x, x], 1), x, sigmas, disable=True)
    with pytest.raises(ValueError, match=r"model must return a tensor of shape .*, got NoneType"):
        ours.sample_heun(lambda x, s: None, x, sigmas, disable=True)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="churn must be a finite number >= 0, got -1"):
        ours.sample_euler(Network(), x, sigmas, disable=True, s_churn=-1.0)
    with pytest.raises(ValueError, match="eta must be a finite number"):
        ours.sample_euler_ancestral(Network(), x, sigmas, disable=True, eta=-1.0)
    for options, message in (
        ({"eta": -1.0}, "eta must be a finite number of at least 0, got -1"),
        ({"s_noise": math.nan}, "s_noise must be a finite number of at least 0, got nan"),
        ({"r": 0.0}, "r must be a finite number of at least 1e-06, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ours.sample_dpmpp_sde(Network(), x, sigmas, disable=True, **options)
    with pytest.raises(ValueError, match="solver_type must be 'heun' or 'midpoint'"):
        ours.sample_dpmpp_2m_sde(Network(), x, sigmas, disable=True, solver_type="rk4")
    with pytest.raises(ValueError, match=r"order must be an integer in 1\.\.5, got 6"):
        ours.sample_lms(Network(), x, sigmas, disable=True, order=6)


# ------------------------------------------------------------------------------------------------------ noise levels
@pytest.mark.parametrize("n", [1, 2, 10, 100])
def test_noise_levels(n: int) -> None:
    for name, args in (
        ("karras", (0.02, 80.0)),
        ("karras", (0.1, 10.0, 3.0)),
        ("exponential", (0.02, 80.0)),
        ("polyexponential", (0.02, 80.0, 1.7)),
        ("vp", ()),
        ("vp", (15.0, 0.2, 1e-2)),
    ):
        want = getattr(theirs.sampling, f"get_sigmas_{name}")(n, *args)
        found = getattr(ours, f"get_sigmas_{name}")(n, *args)
        assert found.dtype == want.dtype
        assert found.shape == want.shape
        assert found[-1] == 0
        # The original computes in float32, in which e^t - 1 of a small t is off by 2e-4.
        torch.testing.assert_close(found, want, rtol=3e-4 if name == "vp" else 3e-6, atol=0)
        try:
            torch.set_default_dtype(torch.float64)
            want = getattr(theirs.sampling, f"get_sigmas_{name}")(n, *args)
            found = getattr(ours, f"get_sigmas_{name}")(n, *args)
        finally:
            torch.set_default_dtype(torch.float32)
        torch.testing.assert_close(found, want, rtol=1e-12, atol=0)


def test_ancestral_step_and_slope() -> None:
    a, b = torch.tensor(3.0), torch.tensor(1.5)
    for eta in (0.0, 0.5, 1.0, 9.0):
        assert ours.get_ancestral_step(a, b, eta) == theirs.sampling.get_ancestral_step(a, b, eta)
    x, sigma = start(), torch.tensor([2.0, 3.0])
    torch.testing.assert_close(ours.to_d(x, sigma, x / 2), theirs.sampling.to_d(x, sigma, x / 2))
    torch.testing.assert_close(ours.to_d(x, a, x / 2), theirs.sampling.to_d(x, a, x / 2))
    assert ours.append_zero(sigma).tolist() == [2.0, 3.0, 0.0]


# -------------------------------------------------------------------------------------------------------- likelihood
def gaussian(x: Tensor, sigma: Tensor, data: float = 0.5) -> Tensor:
    """The denoiser of N(0, data^2 I)."""
    return x * (data**2 / (data**2 + sigma.reshape(-1, *(1,) * (x.ndim - 1)) ** 2))


def mixing(x: Tensor, sigma: Tensor) -> Tensor:
    """`gaussian` of neighbours: its Jacobian has elements off the diagonal."""
    made: Tensor = 0.7 * gaussian(x, sigma) + 0.3 * gaussian(x.roll(1, -1), sigma)
    return made


def test_log_likelihood() -> None:
    x = 0.5 * torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = 0.02, 50.0
    found, info = ours.log_likelihood(gaussian, x, low, high, atol=1e-7, rtol=1e-7)
    # The state at sigma_min has variance data^2 + low^2; the prior is high^2 where that of the path has data^2 too.
    scale = math.sqrt((0.25 + high**2) / (0.25 + low**2))
    latent = torch.distributions.Normal(0.0, high).log_prob(x * scale).flatten(1).sum(1)
    want = latent + x[0].numel() * math.log(scale)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-3)
    other, other_info = theirs.sampling.log_likelihood(gaussian, x, low, high, atol=1e-7, rtol=1e-7)
    torch.testing.assert_close(found, other, rtol=0, atol=1e-3)
    assert info.keys() == other_info.keys() == {"fevals"}
    assert info["fevals"] > 10
    # Off the diagonal the probe counts: it is k-diffusion's, and so is what is left in torch's generator.
    values = []
    for module in (theirs.sampling, ours):
        torch.manual_seed(5)
        nats, _ = module.log_likelihood(mixing, x, low, high, atol=1e-7, rtol=1e-7)
        values.append((nats, torch.rand(1).item()))
    torch.testing.assert_close(values[1][0], values[0][0], rtol=0, atol=1e-3)
    assert values[1][1] == values[0][1]
    torch.manual_seed(7)
    assert (ours.log_likelihood(mixing, x, low, high, atol=1e-7, rtol=1e-7)[0] - values[1][0]).abs().max() > 0.01
    alone = ours.log_likelihood(gaussian, x[1:2], low, high, atol=1e-7, rtol=1e-7)[0]
    assert torch.equal(alone, found[1:2])
    for ends in ((0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match="sigma_min and sigma_max must be 0 < sigma_min < sigma_max, got"):
            ours.log_likelihood(gaussian, x, *ends)
