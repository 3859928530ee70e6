"""Arguments that many functions take alike are typed once, and every signature still shows them by name."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

from diffkern import samplers, sampling
from diffkern.samplers.nodes import GridOptions, grid
from diffkern.sampling import options
from diffkern.sampling._corrector_rows import rows_of
from diffkern.schedules import linear
from diffkern.signatures import shows_arguments_of

PUBLIC = {
    **samplers.SAMPLERS,
    **{name: getattr(sampling, name) for name in ("sample", "predictor_corrector", "pc_plan", "rk45", "initial")},
}
ON_A_GRID = [
    name
    for name, function in samplers.SAMPLERS.items()
    if {"sigmas", "clip"} <= set(inspect.signature(function).parameters)
    and name not in ("repaint", "ddpm", "ddim")  # whose default of spacing depends on the schedule
]


def with_defaults(function: Any) -> dict[str, inspect.Parameter]:
    return {name: p for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty}


def types_of(typed: Any) -> dict[str, str]:
    return {name: getattr(value, "__forward_arg__", value) for name, value in typed.__annotations__.items()}


@pytest.mark.parametrize("name", PUBLIC)
def test_every_argument_is_listed_by_name(name: str) -> None:
    kinds = {p.kind for p in inspect.signature(PUBLIC[name]).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


@pytest.mark.parametrize("name", ON_A_GRID)
def test_samplers_on_a_grid_show_its_arguments_and_their_defaults(name: str) -> None:
    shown = inspect.signature(samplers.SAMPLERS[name]).parameters
    for argument, parameter in with_defaults(grid).items():
        assert shown[argument].default == parameter.default
        assert shown[argument].annotation == parameter.annotation
        assert shown[argument].kind is inspect.Parameter.KEYWORD_ONLY


def test_most_samplers_are_on_a_grid() -> None:
    assert len(ON_A_GRID) >= 18


@pytest.mark.parametrize(
    ("typed", "function"),
    [
        (GridOptions, grid),
        (options.RowOptions, rows_of),
        (options.SampleOptions, sampling.sample),
        (options.PredictorCorrectorOptions, sampling.predictor_corrector),
    ],
)
def test_the_types_are_those_of_the_arguments_with_defaults(typed: Any, function: Any) -> None:
    own = with_defaults(function)
    for name in ("trajectory", "logprob", "steps"):  # on which the kind of the result depends; steps is positional
        own.pop(name, None)
    assert types_of(typed) == {name: p.annotation for name, p in own.items()}


def test_an_argument_that_there_is_not_is_said_to_be_the_samplers() -> None:
    with pytest.raises(TypeError, match=r"^midpoint\(\) got an unexpected keyword argument 'nodes'$"):
        samplers.midpoint(linear(), 10, nodes=3)  # type: ignore[call-arg]


def test_own_arguments_stay_as_they_are() -> None:
    def source(first: int, a: int = 1, b: str = "x") -> tuple[int, int, str]:
        return first, a, b

    @shows_arguments_of(source)
    def function(first: int, *, b: str = "own", **more: int) -> tuple[int, int, str]:
        """Its docstring."""
        return source(first, b=b, **more)

    shown = {name: (p.kind, p.default) for name, p in inspect.signature(function).parameters.items()}
    by_name = inspect.Parameter.KEYWORD_ONLY
    assert shown.pop("first") == (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty)
    assert shown == {"b": (by_name, "own"), "a": (by_name, 1)}
    assert inspect.getdoc(function) == "Its docstring."
    assert function(3, a=4) == (3, 4, "own")
