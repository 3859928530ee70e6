"""Averages of weights: closed forms, the paper's profile against its integral, and what they leave alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from diffkern.train.ema import WIDEST, Averages, gamma_of, name_of, width_of


class Value(nn.Module):
    """One trainable number, one that is not, a buffer."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(1, dtype=dtype), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def set(self, value: float) -> None:
        with torch.no_grad():
            self.value.fill_(value)


def test_gamma_and_width_are_those_of_the_paper() -> None:
    """Karras et al. 2024, section 3.1: sigma_rel 0.05 and 0.10 are gamma = 16.97 and 6.94."""
    assert gamma_of(0.05) == pytest.approx(16.97, abs=5e-3)
    assert gamma_of(0.10) == pytest.approx(6.94, abs=5e-3)


@pytest.mark.parametrize("width", [0.001, 0.05, 0.25, WIDEST])
def test_a_width_is_the_standard_deviation_of_its_profile(width: float) -> None:
    """Of the density (gamma + 1) x^gamma on [0, 1], summed by the trapezoidal rule."""
    gamma = gamma_of(width)
    assert width_of(gamma) == pytest.approx(width, rel=1e-9)
    x = torch.linspace(0.0, 1.0, 400_001, dtype=torch.float64)
    density = (gamma + 1.0) * x**gamma
    mean = torch.trapezoid(density * x, x)
    deviation = torch.trapezoid(density * (x - mean) ** 2, x).sqrt().item()
    assert deviation == pytest.approx(width, rel=1e-4)


@pytest.mark.parametrize("width", [0.0, 0.3, -0.1, math.nan])
def test_a_width_that_no_profile_has_is_refused(width: float) -> None:
    with pytest.raises(ValueError, match=r"width must lie in \(0, 1/sqrt\(12\) = 0.2887\].*got"):
        gamma_of(width)


@pytest.mark.parametrize("every", [1, 3])
def test_the_average_is_the_integral_of_the_power_function_over_the_steps(every: int) -> None:
    """Weights that stay the same between updates: theta_i counts (i^(g+1) - (i - every)^(g+1))/t^(g+1)."""
    module, end = Value(), 30
    averages = Averages(module, widths=(0.1, 0.2))
    for step in range(every, end + 1, every):
        module.set(math.sin(step))
        averages.update(step)
    for name, width in {"0.100": 0.1, "0.200": 0.2}.items():
        power = gamma_of(width) + 1.0
        parts = [((i**power) - (i - every) ** power, math.sin(i)) for i in range(every, end + 1, every)]
        want = math.fsum(weight * value for weight, value in parts) / end**power
        assert averages.tensors(name)["value"].item() == pytest.approx(want, rel=1e-12)


def test_the_widest_average_is_the_mean_of_all_steps() -> None:
    module = Value()
    averages = Averages(module, widths=(WIDEST,))
    for step in range(1, 11):
        module.set(float(step))
        averages.update(step)
    assert averages.names == (name_of(WIDEST),)
    assert averages.tensors(name_of(WIDEST))["value"].item() == pytest.approx(5.5, rel=1e-7)


def test_the_name_of_a_width_is_read_back_as_it() -> None:
    assert [name_of(width) for width in (0.05, 0.1, 0.0505)] == ["0.050", "0.100", "0.0505"]
    assert float(name_of(WIDEST)) == WIDEST


def test_the_plain_average_warms_up_and_then_decays() -> None:
    """min(0.5, (1 + t)/(10 + t)): 2/11 and 3/12 at first, 0.5 from t = 8 on."""
    module = Value()
    averages = Averages(module, widths=(), decay=0.5)
    module.set(11.0)
    averages.update(1)
    assert averages.tensors("plain")["value"].item() == pytest.approx(11.0 * 9 / 11, rel=1e-15)
    averages.update(2)
    assert averages.tensors("plain")["value"].item() == pytest.approx(9.0 / 4 + 11.0 * 3 / 4, rel=1e-15)
    module.set(0.0)
    averages.update(100)
    assert averages.tensors("plain")["value"].item() == pytest.approx(5.25, rel=1e-15)
    assert averages.names == ("plain",)


def test_what_is_not_trained_is_the_modules() -> None:
    module = Value()
    averages = Averages(module)
    module.set(3.0)
    module.seen += 7
    averages.update(1)
    tensors = averages.tensors("0.050")
    assert {name: t.item() for name, t in tensors.items()} == {"value": 3.0, "frozen": 1.0, "seen": 7}
    assert set(averages.state_dict()["averages"]["0.050"]) == {"value"}


def test_half_precision_is_averaged_in_float32() -> None:
    """A change of 1/1000 a step is below bfloat16's spacing of 1/128 and would be lost in it."""
    module = Value(torch.bfloat16)
    averages = Averages(module, widths=(), decay=0.999)
    module.set(1.0)
    averages.step = 10**6
    averages.update(10**6 + 1)
    average = averages.tensors("plain")["value"]
    assert average.dtype == torch.float32
    assert average.item() == pytest.approx(1e-3, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_module_has_an_average_for_a_while_and_then_its_own_bits(dtype: torch.dtype) -> None:
    module = Value(dtype)
    averages = Averages(module, widths=(0.2,))
    for step in (1, 2):
        module.set(step / 3)
        averages.update(step)
    own, average = module.value.clone(), averages.tensors("0.200")["value"].clone()
    seen = []

    def stops() -> None:
        with averages.used("0.200"):
            seen.append(module.value.clone())
            raise KeyError

    with pytest.raises(KeyError):
        stops()
    assert torch.equal(seen[0], average.to(dtype))
    assert torch.equal(module.value, own)
    assert torch.equal(averages.tensors("0.200")["value"], average)
    other = Value(dtype)
    averages.load_into("0.200", other)
    assert torch.equal(other.value, average.to(dtype))


def test_tied_weights_are_averaged_once_and_under_both_names() -> None:
    module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    module[1].weight = module[0].weight
    averages = Averages(module, widths=(0.1,))
    with torch.no_grad():
        module[0].weight.fill_(2.0)
    averages.update(1)
    tensors = averages.tensors("0.100")
    assert tensors["0.weight"] is tensors["1.weight"]
    assert torch.equal(tensors["0.weight"], torch.full((2, 2), 2.0))


def test_a_wrapped_module_has_the_names_of_its_own() -> None:
    """Whole or in parts, as torch.compile wraps: a module whose own is ``_orig_mod``."""

    class Compiled(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self._orig_mod = module

    averages = Averages(Compiled(nn.Sequential(Compiled(nn.Linear(2, 2)))))
    assert list(averages.tensors("0.050")) == ["0.weight", "0.bias"]
    assert list(averages.state_dict()["averages"]["0.050"]) == ["0.weight", "0.bias"]


def test_a_state_goes_into_another_and_a_wrong_one_changes_nothing() -> None:
    first, second = Value(), Value()
    averages, others = Averages(first, decay=0.9), Averages(second, decay=0.9)
    first.set(2.0)
    averages.update(4)
    others.load_state_dict(averages.state_dict())
    assert others.step == 4
    assert torch.equal(others.tensors("plain")["value"], averages.tensors("plain")["value"])
    with pytest.raises(ValueError, match=r"averages must be 0\.050, 0\.100, plain, got 0\.050, 0\.100"):
        others.load_state_dict(Averages(first).state_dict())
    wrong = averages.state_dict()
    wrong["averages"]["plain"] = {"value": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"average plain of value must have the shape \[1\], got \[2\]"):
        others.load_state_dict(wrong)
    assert torch.equal(others.tensors("0.050")["value"], averages.tensors("0.050")["value"])


def test_what_cannot_be_averaged_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="module must have trainable parameters to average, got none"):
        Averages(nn.Identity())
    with pytest.raises(ValueError, match=r"widths must differ, got \[0.05, 0.05\]"):
        Averages(Value(), widths=(0.05, 0.05))
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1.0"):
        Averages(Value(), decay=1.0)
    averages = Averages(Value())
    averages.update(3)
    with pytest.raises(ValueError, match="step must come after that of the last update, 3, got 3"):
        averages.update(3)
    with pytest.raises(ValueError, match=r"name must be one of 0\.050, 0\.100, got 'plain'"):
        averages.tensors("plain")
