"""The words of string arguments as types are those that are taken at run time."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from diffkern import draws, names
from diffkern.objectives import flow_matching
from diffkern.ops import _common
from diffkern.sampling import _corrector_rows, _predictor_corrector
from diffkern.schedules import grids, predictions
from diffkern.simulate import _divergence, likelihood


@pytest.mark.parametrize(
    ("words", "taken"),
    [
        (names.Prediction, predictions.PREDICTIONS),
        (names.Reduction, _common.REDUCTIONS),
        (names.Spacing, [*grids.SPACINGS, *grids.LEVELS]),
        (names.Coupling, flow_matching.COUPLINGS),
        (names.Projection, draws.PROJECTIONS),
        (names.Divergence, _divergence.DIVERGENCES),
        (names.Solver, likelihood.SOLVERS),
        (names.Norm, _predictor_corrector.NORMS),
        (names.Corrector, _corrector_rows.CORRECTORS),
        (names.Predictor, _corrector_rows.PREDICTORS),
    ],
)
def test_the_type_has_the_words_that_are_taken(words: Any, taken: Any) -> None:
    assert sorted(get_args(words)) == sorted(taken)
