"""The drop-ins' cache of tables: what it finds again, what it notices, what copies take along."""

from __future__ import annotations

import copy
import pickle
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor

from diffkern.compat.kit.tables import Tables, content_of


class Counted:
    """A builder that counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return torch.full((2, 3), float(self.calls))


def test_the_same_sources_give_the_same_value() -> None:
    tables, build, sigmas, config = Tables(), Counted(), torch.rand(4), {"a": 1}
    first = tables.get("rows", build, sigmas, config)
    assert tables.get("rows", build, sigmas, config) is first
    assert tables.get("other rows", build, sigmas, config) is not first
    assert build.calls == len(tables) == 2


def test_equal_content_is_found_again_and_other_content_is_not() -> None:
    tables, build = Tables(), Counted()
    first = tables.get("rows", build, torch.tensor([1.0, 2.0]), {"a": 1, "b": 2})
    assert tables.get("rows", build, torch.tensor([1.0, 2.0]), {"b": 2, "a": 1}) is first
    others: list[tuple[Any, Any]] = [
        (torch.tensor([1.0, 2.0], dtype=torch.float64), {"a": 1, "b": 2}),
        (torch.tensor([1, 2]), {"a": 1, "b": 2}),
        (torch.tensor([1.0, 2.5]), {"a": 1, "b": 2}),
        (torch.tensor([1.0, 2.0]), {"a": 1, "b": 3}),
    ]
    for sources in others:
        assert tables.get("rows", build, *sources) is not first
    assert build.calls == 5


@pytest.mark.parametrize("inference", [False, True])
def test_a_write_is_noticed_and_taken_back_is_found(inference: bool) -> None:
    """Also where torch does not count writes."""
    with torch.inference_mode(inference):
        tables, build, sigmas = Tables(), Counted(), torch.tensor([1.0, 2.0])
        first = tables.get("rows", build, sigmas)
        sigmas.mul_(2)
        assert tables.get("rows", build, sigmas) is not first
        sigmas.mul_(0.5)
        assert tables.get("rows", build, sigmas) is first


def test_tables_stand_for_themselves() -> None:
    """Tensors of two dimensions are never read."""
    tables, build, table = Tables(), Counted(), torch.zeros(2, 2)
    first = tables.get("split", build, table)
    assert tables.get("split", build, table) is first
    assert tables.get("split", build, table.clone()) is not first
    assert content_of(table) == content_of(table) != content_of(table.clone())


def test_values_are_made_outside_a_user_s_modes() -> None:
    tables = Tables()
    with torch.inference_mode(), torch.device("meta"):
        made = tables.get("rows", lambda: torch.zeros(3))
    assert made.device.type == "cpu"
    assert not made.is_inference()


def test_none_is_a_value() -> None:
    tables, calls = Tables(), []
    for _ in range(2):
        assert tables.get("nothing", lambda: calls.append(1)) is None
    assert len(calls) == 1


def test_the_oldest_values_go_first() -> None:
    tables, build = Tables(most=3), Counted()
    for i in range(100):
        tables.get(i, build)
        assert len(tables) <= 3
    assert build.calls == 100
    tables.get(98, build)
    assert build.calls == 100
    tables.clear()
    assert len(tables) == 0
    tables.get(98, build)
    assert build.calls == 101


def test_copies_and_pickles() -> None:
    """Shallow copies of an owner share its tables, others start without."""
    tables, build = Tables(most=5), Counted()
    tables.get("rows", build)
    owner = {"tables": tables}
    assert copy.copy(owner)["tables"] is tables
    for other in (copy.deepcopy(owner)["tables"], pickle.loads(pickle.dumps(owner))["tables"]):
        assert len(other) == 0
        assert other.most == 5


def test_a_table_on_its_own_device_is_itself() -> None:
    tables, table = Tables(), torch.zeros(2, 2)
    assert tables.on(table, torch.device("cpu")) is table
    there = tables.on(table, torch.device("meta"))
    assert there.device.type == "meta"
    assert tables.on(table, torch.device("meta")) is there


def test_threads_share_one_cache() -> None:
    tables, errors = Tables(most=4), []

    def work() -> None:
        try:
            for i in range(2000):
                assert int(tables.get(i % 11, lambda i=i: torch.tensor(i % 11))) == i % 11
        except Exception as error:
            errors.append(error)

    threads = [Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
