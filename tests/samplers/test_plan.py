"""Plans as data: table, steps, guidance, JSON, printing, and what they refuse."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch

from diffkern import samplers, schedules, streams
from diffkern.plan import COLUMNS, Plan, Row

PLANS = {
    "ddpm": samplers.ddpm(schedules.linear(20), clip=1.0),
    "ddim": samplers.ddim(schedules.cosine(), 7, eta=0.3, prediction="v"),
    "euler": samplers.euler(schedules.linear(), 6),
    "heun": samplers.heun(schedules.edm(), 5),
    "flow": samplers.heun(schedules.flow(0.01), 4),
    "guided": samplers.ddim(schedules.linear(), 4).with_guidance([1, 2.5, 0, 1]),
}


@pytest.mark.parametrize("name", PLANS)
def test_json_gives_back_an_equal_plan(name):
    plan = PLANS[name]
    text = plan.to_json()
    again = Plan.from_json(text)
    assert again == plan
    assert hash(again) == hash(plan)
    assert torch.equal(again.table, plan.table)
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


@pytest.mark.parametrize("name", PLANS)
def test_table_holds_the_rows(name):
    plan = PLANS[name]
    assert plan.table.shape == (len(plan.rows), 21)
    assert plan.table.dtype == torch.float64
    for row, line in zip(plan.rows, plan.table.tolist(), strict=True):
        assert line == [getattr(row, name) for name in COLUMNS]
        assert int(line[COLUMNS.index("stream")]) == row.stream  # exact as float64
    assert plan.table is plan.table


def test_columns_are_the_rows_first_fields():
    assert tuple(f.name for f in fields(Row))[: len(COLUMNS)] == COLUMNS
    assert len(COLUMNS) == 21


@pytest.mark.parametrize("name", PLANS)
def test_streams_are_the_row_numbers_and_no_minus_zero(name):
    for i, row in enumerate(PLANS[name].rows):
        assert row.stream == streams.STEP + i
        assert row.known_stream == streams.KNOWN + i
        assert all(math.copysign(1, c) == 1 for c in row.coefficients() if c == 0)


def test_streams_are_disjoint_named_and_exact_in_float64():
    starts = sorted(streams.NAMES.values())
    assert len(set(starts)) == len(starts)
    assert all(start % (1 << 40) == 0 and start < streams.USER for start in starts)
    assert streams.USER == 1024 << 40 < streams.LIMIT == 1 << 53
    assert streams.describe(streams.STEP + 3) == "step+3"
    assert streams.describe(streams.INITIAL) == "initial"
    assert streams.describe(streams.USER + 1) == "user+1"
    assert streams.describe(99 << 40) == "purpose99"
    with pytest.raises(ValueError, match=r"stream must lie in \[0, 2\*\*53\), got -1"):
        streams.describe(-1)


def test_steps_calls_and_levels():
    heun = PLANS["heun"]
    assert heun.steps == (range(0, 2), range(2, 4), range(4, 6), range(6, 8), range(8, 9))
    assert heun.model_calls == len(heun.rows) == 9
    assert heun.deterministic
    assert not PLANS["ddpm"].deterministic
    assert heun.level(0) == (0.0, heun.init_scale)
    sigmas = schedules.edm().sigmas(5).tolist()
    assert [heun.level(i) for i in range(1, 5)] == [(1.0, sigma) for sigma in sigmas[1:5]]
    with pytest.raises(ValueError, match=r"step must lie in 0\.\.4 \(heun has 5\), got 5"):
        heun.level(5)


def test_histories_live_until_their_last_read():
    assert PLANS["heun"].live == tuple(frozenset({0} if i in (1, 3, 5, 7) else ()) for i in range(10))
    two = Plan(
        "p", (Row(q=1.0, b=1.0, saves=((1, "x0"), (2, "x"))), Row(a=1.0, e1=0.5, saves=((1, "x"),)), Row(e1=1.0))
    )
    assert two.live == (frozenset(), frozenset({1}), frozenset({1}), frozenset())


def test_plans_compare_and_do_not_change():
    plan = samplers.ddim(schedules.linear(), 5)
    assert plan == samplers.ddim(schedules.linear(), 5)
    assert plan != samplers.ddim(schedules.linear(), 6)
    assert plan != samplers.ddim(schedules.linear(), 5, eta=0.1)
    with pytest.raises(FrozenInstanceError):
        plan.init_scale = 2.0
    assert isinstance(Plan("p", [Row(a=1.0)]).rows, tuple)


def test_guidance():
    plan = samplers.heun(schedules.flow(), 3)
    assert {row.w for row in plan.rows} == {0.0}
    assert {row.w for row in plan.with_guidance(7.5).rows} == {7.5}
    assert [row.w for row in plan.with_guidance([1, 2, 3]).rows] == [1, 1, 2, 2, 3]
    assert [row.w for row in plan.with_guidance([1, 2, 3, 4, 5]).rows] == [1, 2, 3, 4, 5]
    assert plan.with_guidance(7.5).with_guidance(0) == plan
    silent = Plan("p", (Row(p=1.0, a=1.0, calls_model=False), Row(q=1.0, b=1.0)))
    assert [row.w for row in silent.with_guidance(2.0).rows] == [0.0, 2.0]
    with pytest.raises(ValueError, match=r"one weight a step \(3\) or one a row \(5\), got 4 weights"):
        plan.with_guidance([1, 2, 3, 4])
    with pytest.raises(ValueError, match="guidance must be finite, got nan"):
        plan.with_guidance(math.nan)


def test_printing():
    text = str(samplers.ddpm(schedules.linear(), 3, clip=1.0))
    assert text.splitlines()[0] == (
        "ddpm: 3 steps, 3 rows, 3 model calls, prediction eps, time int64, init_scale 1, first_k 1"
    )
    assert text.splitlines()[1].split() == [
        "row", "time", "p", "q", "clip", "a", "b", "g", "known_s", "known_n", "stream", "saves",
    ]  # fmt: skip
    assert len(text.splitlines()) == 5
    assert text.splitlines()[-1].split()[1] == "0"
    assert "h0=s" in str(PLANS["heun"])
    assert "step+1" in text


def test_reads_draws_and_x0():
    row = Row(e1=0.5, e3=-1.0, g=0.1)
    assert row.reads == (1, 3)
    assert row.draws
    assert Row(r=0.1).draws
    assert not row.makes_x0
    assert Row(q=1.0).makes_x0


OK = Row(p=1.0, q=1.0, b=1.0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((), r"rows must hold at least one row, got none"),
        ((Row(e2=0.5),), r"row 0: history 2 is read \(e2 = 0\.5\) before any row saved it"),
        ((replace(OK, e0=1.0, saves=((0, "x0"),)),), r"row 0: history 0 is read"),
        ((replace(OK, q=math.nan),), r"row 0: coefficient q must be finite, got nan"),
        ((OK, replace(OK, a=math.inf)), r"row 1: coefficient a must be finite, got inf"),
        ((replace(OK, clip=math.nan),), r"row 0: clip must be positive \(inf for none\), got nan"),
        ((replace(OK, clip=0.0),), r"row 0: clip must be positive \(inf for none\), got 0\.0"),
        ((replace(OK, stream=-1),), r"row 0: stream must be an integer in \[0, 2\*\*53\), got -1"),
        (
            (replace(OK, known_stream=1 << 53),),
            r"row 0: known_stream must be an integer in \[0, 2\*\*53\), got 9007199254740992",
        ),
        ((replace(OK, time=math.nan),), r"row 0: time must be finite, got nan"),
        ((replace(OK, calls_model=False),), r"row 0: w, q, d and D must be 0 in a row that calls no model, got"),
        ((replace(OK, saves=((4, "x"),)),), r"row 0: a history slot must lie in 0\.\.3, got 4"),
        ((replace(OK, saves=((0, "eps"),)),), r"row 0: saves must name one of x, x0, s, got 'eps'"),
        ((replace(OK, saves=((0, "s"),)),), r"row 0: s is saved but the row has no s"),
        ((Row(a=1.0, saves=((0, "x0"),)),), r"row 0: x0 is saved but the row has no x0"),
        ((replace(OK, saves=((0, "x"), (0, "x0"))),), r"row 0: saves must name each history slot once"),
        ((replace(OK, ends_step=False),), r"the last row must end a step"),
    ],
)
def test_a_plan_that_could_not_run_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        Plan("p", rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction": "noise"}, r"prediction must be one of .*, got 'noise'"),
        ({"time_dtype": "int32"}, r"time_dtype must be 'int64' or 'float32', got 'int32'"),
        ({"init_scale": math.nan}, r"init_scale must be finite, got nan"),
        ({"first_k": math.inf}, r"first_k must be finite, got inf"),
        (
            {"rows": (replace(OK, time=0.5),), "time_dtype": "int64"},
            r"row 0: time must be an integer when time_dtype is 'int64', got 0\.5",
        ),
    ],
)
def test_bad_heads_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Plan(**{"name": "p", "rows": (OK,), **changes})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", r"text must be the JSON of a plan, got 'no json'"),
        ("[1]", r"text must be the JSON of a plan with diffkern_plan = 1, got \[1\]"),
        ('{"diffkern_plan": 2}', r"text must be the JSON of a plan with diffkern_plan = 1, got 2"),
        ('{"diffkern_plan": 1, "name": "p"}', "rows must be a list of objects, got None"),
        (
            '{"diffkern_plan": 1, "name": "p", "rows": [{"zeta": 1}]}',
            "row 0 has the fields w, p, q, .*, got 'zeta'",
        ),
        ('{"diffkern_plan": 1, "name": "p", "rows": [{"e0": 1}]}', r"row 0: history 0 is read"),
    ],
)
def test_bad_json_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Plan.from_json(text)


def test_a_table_outlives_where_it_was_made():
    """An inference mode, another default device: the plan is used again elsewhere."""
    plan = samplers.ddpm(schedules.linear(), 3, variance="learned")
    with torch.inference_mode(), torch.device("meta"):
        tables = (plan.table, plan.learned_table)
    for table in tables:
        assert table.device.type == "cpu"
        assert not table.is_inference()


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"stream": float("inf")}, r"\(Infinity is no JSON number\)"),
        ({"stream": True}, "^row 1: stream must be an integer, got True$"),
        ({"stream": 3.0}, r"^row 1: stream must be an integer, got 3\.0$"),
        ({"stream": 2**53}, r"^row 1: stream must be an integer in \[0, 2\*\*53\), got 9007199254740992$"),
        ({"known_stream": -1}, r"^row 1: known_stream must be an integer in \[0, 2\*\*53\), got -1$"),
        ({"a": "1"}, "^row 1: a must be a finite number, got '1'$"),
        ({"a": False}, "^row 1: a must be a finite number, got False$"),
        ({"a": None}, "^row 1: a must be a finite number, got None$"),
        ({"clip": 10**400}, "^row 1: clip must be a finite number, got 1000"),
        ({"time": "0"}, "^row 1: time must be a finite number, got '0'$"),
        ({"time": 2**63}, r"^row 1: time must be a number that int64 holds, got 9\.22"),
        ({"time": -1e300}, r"^row 1: time must be a number that int64 holds, got -1e\+300$"),
        ({"time": 0.5}, r"^row 1: time must be an integer when time_dtype is 'int64', got 0\.5$"),
        ({"saves": [[0]]}, r"^row 1: saves\[0\] must be a list of 2 \(an integer, text\), got \[0\]$"),
        ({"saves": [[True, "x"]]}, r"^row 1: saves\[0\]\[0\] must be an integer, got True$"),
        ({"saves": {"0": "x"}}, r"^row 1: saves must be a list \(each a list of 2 .*, got \{'0': 'x'\}$"),
        ({"saves": [[4, "x"]]}, r"^row 1: a history slot must lie in 0\.\.3, got 4$"),
        ({"path": [0.5]}, r"^row 1: path must be a list of 2 .* or null, got \[0\.5\]$"),
        ({"path": [0.5, None]}, r"^row 1: path\[1\] must be a finite number, got None$"),
        ({"path": [0.5, 0.25]}, r"^row 1: path must be \(s, t\) with 0 <= s < t <= 1, got \(0\.5, 0\.25\)$"),
        ({"ends_step": "no"}, "^row 1: ends_step must be true or false, got 'no'$"),
        ({"calls_model": 0}, "^row 1: calls_model must be true or false, got 0$"),
        ([], r"^row 1 must be an object, got \[\]$"),
    ],
)
def test_json_that_is_no_plan(row, found):
    """The sentence names the row and the field."""
    rows = [{"a": 1.0}, {"a": 1.0, **row} if isinstance(row, dict) else row]
    text = json.dumps({"diffkern_plan": 1, "name": "odd", "time_dtype": "int64", "rows": rows})
    with pytest.raises(ValueError, match=found):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("head", "found"),
    [
        ({"name": 3}, "^name must be text, got 3$"),
        ({"name": None}, "^name must be text, got None$"),
        ({"init_scale": "1"}, "^init_scale must be a finite number, got '1'$"),
        ({"first_k": True}, "^first_k must be a finite number, got True$"),
        ({"prediction": ["eps"]}, r"^prediction must be one of 'eps', 'x0', .*, got \['eps'\]$"),
        ({"time_dtype": {}}, r"^time_dtype must be one of 'int64', 'float32', got \{\}$"),
        ({"learned_variance": 1}, "^learned_variance must be true or false, got 1$"),
        ({"threshold": 0.9}, r"^threshold must be a list of 2 .* or null, got 0\.9$"),
        ({"threshold": [2, None]}, r"^quantile of a threshold must lie in \[0, 1\], got 2.0$"),
        ({"cache": {}}, "^Plan has the fields name, .*, got 'cache'"),
        ({"rows": {}}, r"^rows must be a list of objects, got \{\}$"),
        ({"diffkern_plan": True}, "^text must be the JSON of a plan with diffkern_plan = 1, got True$"),
    ],
)
def test_json_whose_head_does_not_fit(head, found):
    data = {"diffkern_plan": 1, "name": "odd", "rows": [{"a": 1.0}], **head}
    with pytest.raises(ValueError, match=found):
        Plan.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["[" * 10**6, '{"rows":' * 10**5, '{"diffkern_plan": 1, "rows": ' + "[" * 10**6])
def test_json_that_is_nested_deeply_is_one_sentence(text):
    with pytest.raises(ValueError, match=r"^text must be the JSON of a plan, got .* \(nested too deeply\)$"):
        Plan.from_json(text)


def test_a_time_that_its_dtype_cannot_hold_is_refused():
    Plan("p", (replace(OK, time=3e38),))
    with pytest.raises(ValueError, match=r"row 0: time must be a number that float32 holds, got 1e\+39"):
        Plan("p", (replace(OK, time=1e39),))
    with pytest.raises(ValueError, match=r"row 0: stream must be an integer in \[0, 2\*\*53\), got nan"):
        Plan("p", (replace(OK, stream=math.nan),))


def test_rows_by_columns_are_the_rows_one_by_one():
    made = Row.each({"a": [0.5, 2.0], "saves": [(), ((1, "x"),)]}, b=3.0, ends_step=False)
    assert made == [Row(a=0.5, b=3.0, ends_step=False), Row(a=2.0, b=3.0, saves=((1, "x"),), ends_step=False)]
    assert made[1].but(a=0.0).coefficients() == Row(b=3.0).coefficients()
    assert [row.reads for row in Row.each({"e1": [0.0, -1.0]}, e3=0.5)] == [(3,), (1, 3)]
    with pytest.raises(TypeError, match="a row has no c, z"):
        Row.each({"z": [1.0]}, c=2)
