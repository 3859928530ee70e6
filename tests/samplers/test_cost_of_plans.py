"""A plan asks its schedule about all of its points at once, not step by step."""

from __future__ import annotations

import inspect
from collections import Counter

import pytest
import torch

from diffkern import pc_plan, samplers, schedules
from diffkern.plan import Plan
from diffkern.samplers import SAMPLERS

CALLS = Counter[str]()
NAMES = ("alpha", "sigma", "alpha_dot", "sigma_dot", "drift", "diffusion_squared", "abar", "time_of_log_snr", "log_snr")
KINDS = {
    "table": schedules.linear,
    "edm": schedules.edm,
    "vp": schedules.vp,
    "log_snr_path": lambda: schedules.log_snr_path(lambda t: 10.0 - 15.0 * t),
    "flow": lambda: schedules.flow(0.01),
    "path": lambda: schedules.path(lambda t: t, lambda t: 1.0 - t),
}


@pytest.fixture
def counted(monkeypatch):
    """Every call of a schedule's functions, whoever makes it."""
    for kind in {type(make()) for make in KINDS.values()}:
        for name in NAMES:
            plain = inspect.getattr_static(kind, name, None)
            if plain is None:
                continue

            def call(self, *args, plain=plain, name=name, **more):
                CALLS[name] += 1
                return plain(self, *args, **more)

            monkeypatch.setattr(kind, name, call)
    return CALLS


def made(name: str, kind: str, steps: int) -> Plan:
    schedule, make = KINDS[kind](), SAMPLERS[name]
    more = {"prediction": "v"} if kind in ("flow", "path") and name not in ("euler_maruyama", "ddim_inversion") else {}
    if name == "langevin":
        return make(schedule, steps, t=schedule.time_range[1] / 2, step_size=0.01)
    if name == "annealed_langevin":
        times = torch.linspace(0.01, 0.99, steps).tolist()[:: 1 if schedule.direction < 0 else -1]
        grid = {"timesteps": times} if kind in ("flow", "path") else {"levels": steps}
        return make(schedule, **grid, each=2, step_size=1e-4, **more)
    if name == "euler_maruyama" and kind in ("flow", "path"):
        return make(schedule, timesteps=torch.linspace(0.01, 0.99, steps + 1).tolist())
    return make(schedule, steps, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SAMPLERS)
def test_more_steps_ask_no_more_often(name, kind, counted):
    if kind in ("flow", "path") and name in ("deis", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral"):
        pytest.skip("not for flows")
    if kind in ("table", "edm") and name == "flow_sde":
        pytest.skip("a flow of continuous t")
    asked = []
    for steps in (6, 60):
        counted.clear()
        assert len(made(name, kind, steps).rows) >= steps
        asked.append(counted.total())
    assert asked[0] > 0
    assert asked[1] == asked[0], counted


@pytest.mark.parametrize("predictor", ["reverse_diffusion", "ancestral", "euler_maruyama"])
def test_predictor_corrector_too(predictor, counted):
    asked = []
    for steps in (6, 60):
        counted.clear()
        pc_plan(schedules.vp(), steps, predictor=predictor, corrector="ald")
        asked.append(counted.total())
    assert asked[1] == asked[0]


@pytest.mark.parametrize(
    "name",
    [
        *(
            "euler",
            "heun",
            "midpoint",
            "rk4",
            "rk4_38",
            "lms",
            "deis",
            "dpm_2",
            "dpm_2_ancestral",
            "dpmpp_2s_ancestral",
        ),
        *("dpmpp_1s", "dpmpp_2s", "dpmpp_2m", "dpmpp_3m", "dpmpp_2m_sde", "dpmpp_3m_sde", "dpmpp_sde", "unipc"),
    ],
)
def test_more_steps_make_no_more_rows_one_by_one(name, monkeypatch):
    """Rows are made by columns, all of a stage at once; the last step may have a row of its own."""
    module, alone = inspect.getmodule(inspect.unwrap(SAMPLERS[name])), Counter[str]()
    for maker, one in (("row", module.row), ("still", module.still)):

        def call(*args, plain=one, **more):
            alone["rows"] += 1
            return plain(*args, **more)

        monkeypatch.setattr(module, maker, call)
    found = []
    for steps in (6, 60):
        alone.clear()
        assert len(made(name, "vp", steps).rows) >= steps
        found.append(alone.total())
    assert found[0] == found[1] <= 1


def test_a_point_has_the_same_bits_alone_and_in_a_grid():
    for kind in KINDS:
        space = samplers.nodes.coordinates(KINDS[kind](), "v", None)
        values = [0.83, 0.71, 0.5, 0.33, 0.21] if space.in_time else [7.3, 3.3, 1.1, 0.4, 0.09]
        assert space.nodes(values) == [space.node(v) for v in values]
        ratios = [-1.3, 0.2, 0.7]
        assert space.at_log_ratios(ratios) == [space.at_log_ratios([value])[0] for value in ratios]
