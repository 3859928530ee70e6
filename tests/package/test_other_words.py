"""Other libraries' words are taken where they mean one thing; what is kept, printed and stored is our own name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from helpers.diffusion_cases import small_unet
from helpers.lazy import needs

import diffkern
from diffkern import checks, guidance, names, samplers, schedules, simulate
from diffkern.__main__ import main
from diffkern.checks import plain, word
from diffkern.command.plan import read
from diffkern.generate import recommended
from diffkern.objectives import flow_matching, variational, weightings
from diffkern.objectives.weightings import get_weighting
from diffkern.plan import Plan
from diffkern.schedules.predictions import check_prediction

S, VP, EDM = schedules.linear(20), schedules.vp(), schedules.edm()
X = torch.linspace(-1.0, 1.0, 24).reshape(2, 3, 4)
T = torch.tensor([10, 10])


def half(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    return 0.5 * x


class Half(torch.nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return half(x, t)


def doubled(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """A network of a learned variance."""
    return torch.cat([0.5 * x, 0.1 * x], 1)


# ------------------------------------------------------------------------------------------------------- predictions


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        *(("epsilon", "eps"), ("pred_noise", "eps"), ("EPS", "eps"), ("Epsilon", "eps")),
        *(("sample", "x0"), ("original_sample", "x0"), ("x_start", "x0"), ("START_X", "x0"), ("pred_x0", "x0")),
        *(("v_prediction", "v"), ("v-prediction", "v"), ("V", "v"), ("pred_v", "v"), ("V Prediction", "v")),
        *(("PREVIOUS_X", "mu"), ("Score", "score"), ("EDM", "edm"), ("velocity", "velocity")),
    ],
)
def test_a_prediction_is_known_by_other_names(said: str, meant: str) -> None:
    assert check_prediction(said) == meant


def weight(log_snr: torch.Tensor, prediction: str) -> torch.Tensor:
    """A user's weighting, which compares names."""
    return torch.full_like(log_snr, {"eps": 2.0, "x0": 3.0, "v": 4.0}[prediction])


# Every function that takes a prediction's name, as a function of the name.
TAKES: dict[str, Callable[[Any], Any]] = {
    "convert from": lambda p: diffkern.convert(X, X, T, S, p, "v"),
    "convert to": lambda p: diffkern.convert(X, X, T, S, "v", p),
    "convert to itself": lambda p: diffkern.convert(X, X, T, S, "eps", p),
    "noised": lambda p: diffkern.noised(X, T, S, p, seeds=0),
    "prediction_loss": lambda p: diffkern.prediction_loss(X, X, T, S, p, seeds=0),
    "prediction_loss, target": lambda p: diffkern.prediction_loss(X, X, T, S, "v", target=p, seeds=0),
    "prediction_loss, both": lambda p: diffkern.prediction_loss(X, X, T, S, p, target=p, seeds=0),
    "prediction_loss, weight": lambda p: diffkern.prediction_loss(X, X, T, S, p, weight="min_snr", seeds=0),
    "prediction_loss, own weight": lambda p: diffkern.prediction_loss(X, X, T, S, p, weight=weight, seeds=0),
    "prediction_loss, continuous": lambda p: diffkern.prediction_loss(X, X, 0.5, VP, p, target="x0", seeds=0),
    "simple_loss": lambda p: diffkern.simple_loss(half, X, T, S, p, seeds=0),
    "hybrid_loss": lambda p: diffkern.hybrid_loss(doubled(X, T), X, T, S, p, seeds=0),
    "vlb_loss": lambda p: diffkern.vlb_loss(doubled(X, T), X, T, S, p, seeds=0),
    "bits_per_dim": lambda p: diffkern.bits_per_dim(half, X, S, p, seeds=0).total,
    "variational_table": lambda p: variational.variational_table(S, p),
    "Weighting": lambda p: get_weighting("p2")(0.5, p),
    "Weighting.at": lambda p: get_weighting("likelihood").at(S, p, T),
    "Uniform.at": lambda p: get_weighting("uniform").at(S, "v", T, p),
    "fold": lambda p: weightings.fold(S, p, p, T),
    "marginal_prediction": lambda p: flow_matching.marginal_prediction(X[:, 0], X[:, 0], T, S, p),
    "from_model": lambda p: simulate.from_model(half, S, p)(X, T),
    "from_model, target": lambda p: simulate.from_model(half, S, "v", p)(X, T),
    "log_likelihood": lambda p: diffkern.log_likelihood(half, X, VP, p, solver="euler", steps=2, seeds=0).nats,
    "classifier_guided": lambda p: guidance.classifier_guided(half, half, S, p)(X, T),
    "sigma_interval": lambda p: guidance.classifier_free(
        lambda x, t, c: c * x, X, -X, 2.0, sigma_interval=(0.1, 1.0), schedule=S, prediction=p
    )(X, T),
    "Schedule.table": lambda p: S.table(p),
    "Schedule.coefficients": lambda p: VP.coefficients(p, 0.5),
    "ddim": lambda p: samplers.ddim(S, 4, prediction=p),
    "ddpm": lambda p: samplers.ddpm(S, prediction=p),
    "euler": lambda p: samplers.euler(VP, 4, prediction=p),
    "unipc": lambda p: samplers.unipc(S, 4, prediction=p),
    "euler_maruyama": lambda p: samplers.euler_maruyama(S, 4, prediction=p),
    "repaint": lambda p: samplers.repaint(S, 9, 2, 3, prediction=p),
    "pc_plan": lambda p: diffkern.pc_plan(VP, 4, corrector="none", prediction=p),
    "predictor_corrector": lambda p: diffkern.predictor_corrector(half, X, VP, 4, seeds=0, prediction=p),
    "rk45": lambda p: diffkern.rk45(half, X, VP, rtol=1e-2, prediction=p).x,
    "Plan": lambda p: Plan("mine", samplers.ddim(S, 4).rows, prediction=p),
    "path": lambda p: schedules.path(torch.sin, torch.cos, prediction=p).default_prediction,
    "Diffusion": lambda p: diffkern.Diffusion(torch.nn.Identity(), S, p).prediction,
    "Diffusion, target": lambda p: diffkern.Diffusion(torch.nn.Identity(), S, "v", target=p).target,
}


@pytest.mark.parametrize("taker", TAKES)
def test_every_function_takes_a_prediction_by_another_name(taker: str) -> None:
    """The same result, to the bit, and ours in what is returned."""
    found, expected = TAKES[taker]("epsilon"), TAKES[taker]("eps")
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def test_the_edm_network_is_known_by_any_case() -> None:
    sigma = torch.tensor([0.5, 2.0], dtype=torch.float64)
    assert torch.equal(EDM.model_time("EDM", sigma), 0.25 * sigma.log())  # type: ignore[arg-type]
    assert torch.equal(EDM.input_scale("EDM", sigma), (sigma**2 + 0.25).rsqrt())  # type: ignore[arg-type]


def test_what_is_stored_and_printed_is_our_own_name() -> None:
    plan = samplers.ddim(S, 4, prediction="v_prediction")  # type: ignore[arg-type]
    assert json.loads(plan.to_json())["prediction"] == "v"
    assert "prediction v," in str(plan)
    assert "prediction='x0'" in repr(diffkern.Diffusion(torch.nn.Identity(), S, "sample"))  # type: ignore[arg-type]


def test_a_plan_is_read_with_another_name() -> None:
    plan = samplers.ddim(S, 4, prediction="v")
    text = plan.to_json().replace('"prediction": "v"', '"prediction": "v_prediction"')
    assert text != plan.to_json()
    assert Plan.from_json(text) == plan


@needs("safetensors")
def test_a_folder_is_read_with_another_name(tmp_path: Path) -> None:
    diffkern.Diffusion(small_unet(), S, "v", target="eps").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    data = json.loads(config.read_text())
    assert (data["prediction"], data["target"]) == ("v", "eps")
    config.write_text(json.dumps({**data, "prediction": "v_prediction", "target": "epsilon"}))
    found = diffkern.Diffusion.from_pretrained(tmp_path)
    assert (found.prediction, found.target) == ("v", "eps")


@pytest.mark.full
def test_another_name_compiles_in_one_graph() -> None:
    def loss(x: torch.Tensor) -> torch.Tensor:
        return diffkern.simple_loss(half, x, T, S, "v_prediction", seeds=diffkern.seeds(0, 2))  # type: ignore[arg-type]

    torch.testing.assert_close(torch.compile(loss, fullgraph=True)(X), loss(X))


def test_diffusers_flow_prediction_is_refused_for_its_sign() -> None:
    """It is eps - x0: of x = (1 - t) x0 + t eps that is dx/dt, of flow(), x = t x0 + (1 - t) eps, its negative."""
    rising = schedules.path(lambda t: 1 - t, lambda t: t)
    assert rising.coefficients("velocity", 0.25).tolist() == [0.75, 0.25, -1.0, 1.0]
    assert schedules.flow().coefficients("velocity", 0.25).tolist() == [0.25, 0.75, 1.0, -1.0]
    sentence = (
        "prediction must be one of eps, x0, v, score, velocity, mu, edm, got 'flow_prediction', which is eps - x0 in "
        "diffusers, while 'velocity' is the schedule's d alpha/dt x0 + d sigma/dt eps, x0 - eps on flow(): negate the "
        "network's output there, or take path(lambda t: 1 - t, lambda t: t)"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        diffkern.euler(schedules.flow(), 4, prediction="flow_prediction")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        (
            "epsilon",
            "prediction must be 'eps' or 'edm' on an EDM schedule, got 'epsilon': 'eps' is that of x0 + sigma eps, "
            "'edm' the preconditioned network of arXiv 2206.00364, which diffusers' EDM schedulers call epsilon",
        ),
        (
            "v-prediction",
            "prediction must be 'v' or 'edm' on an EDM schedule, got 'v-prediction': 'v' is that of x0 + sigma eps, "
            "'edm' the preconditioned network of arXiv 2206.00364, whose negative diffusers' EDM schedulers call "
            "v_prediction",
        ),
    ],
)
def test_a_name_of_two_meanings_on_an_edm_schedule_is_refused(said: Any, sentence: str) -> None:
    for call in (
        lambda: diffkern.Diffusion(torch.nn.Identity(), EDM, said),
        lambda: diffkern.heun(EDM, 4, prediction=said),
        lambda: diffkern.prediction_loss(X, X, 1.0, EDM, said, seeds=0),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
            call()


# ---------------------------------------------------------------------------------------------------------- samplers


SAID = [
    *(("DDIM", "ddim"), ("DDPM", "ddpm"), ("Euler", "euler"), ("Euler a", "euler_ancestral")),
    *(("DPM++ 2M", "dpmpp_2m"), ("dpm++_2m", "dpmpp_2m"), ("DPM++ 2M SDE", "dpmpp_2m_sde"), ("dpmpp-3m", "dpmpp_3m")),
    *(("DPM2", "dpm_2"), ("DPM2 a", "dpm_2_ancestral"), ("DPM++ 2S a", "dpmpp_2s_ancestral"), ("UniPC", "unipc")),
    *(("RK4-38", "rk4_38"), ("Euler-Ancestral", "euler_ancestral"), ("LMS", "lms"), ("DPM++ SDE", "dpmpp_sde")),
]


@pytest.mark.parametrize(("said", "meant"), SAID)
def test_a_sampler_is_known_by_its_name_as_others_write_it(said: str, meant: str) -> None:
    assert samplers.get_sampler(said) is samplers.SAMPLERS[meant]


@pytest.mark.parametrize("said", ["DPM++ 2M", "dpm++_2m", "DPMPP-2M"])
def test_every_place_takes_a_samplers_name_as_others_write_it(said: Any, capsys: pytest.CaptureFixture[str]) -> None:
    plan = samplers.dpmpp_2m(schedules.linear(), 4)
    diffusion = diffkern.Diffusion(torch.nn.Identity(), schedules.linear())
    assert diffusion.plan(said, 4) == plan
    assert read(said, ("steps=4",)) == read(f"{said}(steps=4)") == plan
    assert recommended(diffusion, said, 4) == recommended(diffusion, "dpmpp_2m", 4)
    assert main(["plan", "show", said, "steps=4"]) == 0
    assert capsys.readouterr().out == f"{plan}\n"


def test_a_sampler_with_more_in_its_name_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^sampler must be one of ddpm, ddim, .*, got 'DPM\+\+ 2M Karras': did you me"
    ):
        samplers.get_sampler("DPM++ 2M Karras")


# ------------------------------------------------------------------------------------------- num_inference_steps=


PLANS = {
    **dict.fromkeys(samplers.SAMPLERS, (S, {})),
    "flow_sde": (schedules.flow(), {}),
    "langevin": (VP, {"t": 0.5, "step_size": 1e-3}),
}
del PLANS["annealed_langevin"]  # which has levels


@pytest.mark.parametrize("name", PLANS)
def test_num_inference_steps_are_steps(name: str) -> None:
    schedule, options = PLANS[name]
    make: Any = samplers.get_sampler(name)
    assert make(schedule, num_inference_steps=10, **options) == make(schedule, steps=10, **options)


def test_a_diffusion_takes_num_inference_steps() -> None:
    diffusion = diffkern.Diffusion(Half(), S)
    assert diffusion.plan("ddim", num_inference_steps=4) == diffusion.plan("ddim", 4)
    found = diffusion.sample((2, 3), "DDIM", num_inference_steps=4, seeds=0)  # type: ignore[call-overload]
    assert torch.equal(found, diffusion.sample((2, 3), "ddim", 4, seeds=0))
    sentence = "sample() got steps and num_inference_steps, which are one argument: give steps alone"
    with pytest.raises(TypeError, match=f"^{re.escape(sentence)}$"):
        diffusion.sample((2, 3), "ddim", 4, num_inference_steps=4)
    sentence = "num_inference_steps must be given to the sampler that made the plan ddim, not with it"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        diffusion.sample((2, 3), samplers.ddim(S, 4), num_inference_steps=4)


def test_a_function_of_the_users_gets_its_own_argument() -> None:
    def mine(schedule: Any, *, prediction: Any, num_inference_steps: int) -> Plan:
        return samplers.ddim(schedule, num_inference_steps, prediction=prediction)

    diffusion = diffkern.Diffusion(torch.nn.Identity(), S)
    assert diffusion.plan(mine, num_inference_steps=4) == samplers.ddim(S, 4)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: samplers.ddim(S, steps=4, num_inference_steps=5),  # type: ignore[call-arg]
            "ddim() got steps and num_inference_steps, which are one argument: give steps alone",
        ),
        (
            lambda: samplers.heun(S, 4, num_inference_steps=5),  # type: ignore[call-arg]
            "heun() got multiple values for argument 'steps'",
        ),
        (
            lambda: diffkern.sample(half, X, samplers.ddim(S, 4), num_inference_steps=5),  # type: ignore[call-overload]
            "sample() got an unexpected keyword argument 'num_inference_steps'",
        ),
    ],
)
def test_steps_are_given_once_and_where_they_belong(call: Any, sentence: str) -> None:
    with pytest.raises(TypeError, match=f"^{re.escape(sentence)}$"):
        call()


# --------------------------------------------------------------------------------------------------------- the tables


@pytest.mark.parametrize("words", [names.Prediction, names.SamplerName, names.WeightingName, names.Spacing])
def test_no_two_words_look_alike(words: Any) -> None:
    assert len({plain(one) for one in get_args(words)}) == len(get_args(words))


@pytest.mark.parametrize(
    ("elsewhere", "words"),
    [(checks.PREDICTIONS_ELSEWHERE, names.Prediction), (checks.SAMPLERS_ELSEWHERE, names.SamplerName)],
)
def test_a_name_elsewhere_stands_for_one_of_ours_and_hides_none(elsewhere: dict[str, str], words: Any) -> None:
    assert set(elsewhere.values()) <= set(get_args(words))
    assert len({plain(name) for name in elsewhere}) == len(elsewhere)
    for name in elsewhere:
        assert word(name, get_args(words)) is None


def test_the_page_lists_the_names_that_are_taken(root: Path) -> None:
    page = (root / "docs/diffusion.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| ((?:`\w+`(?:, )?)+) \|$", page, re.M)
    listed = {name: ours for ours, said in rows for name in re.findall(r"\w+", said)}
    assert listed == {**checks.PREDICTIONS_ELSEWHERE, **checks.SAMPLERS_ELSEWHERE}
