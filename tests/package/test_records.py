"""`diffkern.records`: JSON into dataclasses, every field checked, with one rule for what a field may be."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import pytest

from diffkern import records


@dataclasses.dataclass(frozen=True)
class Inner:
    name: str
    size: int = 1


@dataclasses.dataclass(frozen=True)
class Outer:
    number: float
    inner: Inner = dataclasses.field(default_factory=lambda: Inner("a"))
    pair: tuple[float, float | None] | None = None
    many: tuple[tuple[int, str], ...] = ()
    kind: Literal["x", "y"] = "x"
    on: bool = False
    free: dict[str, Any] = dataclasses.field(default_factory=dict)


def test_a_record_is_the_dataclass() -> None:
    text = (
        '{"number": 1, "inner": {"name": "b"}, "pair": [0.5, null], "many": [[1, "s"]], "on": true, "free": {"a": []}}'
    )
    assert records.record(Outer, records.parse(text)) == Outer(
        1, Inner("b"), (0.5, None), ((1, "s"),), "x", True, {"a": []}
    )
    assert records.record(Outer, {}, number=2.0) == Outer(2.0)
    assert type(records.record(Outer, {"number": 1}).number) is float
    assert records.record(Inner, {"name": "c", "size": 2**64 - 1}).size == 2**64 - 1
    assert records.record(Inner, {"name": "c", "size": -(2**63)}).size == -(2**63)


def test_a_record_of_one_of_several_kinds() -> None:
    kinds = {"Inner": Inner, "Outer": Outer}
    data = records.kind_of(Inner("b", 2), kinds, "it", "give it again")
    assert data == {"kind": "Inner", "name": "b", "size": 2}
    assert records.of_kind(data, kinds, "it") == Inner("b", 2)
    with pytest.raises(ValueError, match=r"^it must be one of Inner, Outer to be stored as JSON, got int: give it ag"):
        records.kind_of(3, kinds, "it", "give it again")
    for data, sentence in (
        ([], r"^it must be an object, got \[\]$"),
        ({"kind": ["Inner"]}, r"^it.kind must be one of Inner, Outer, got \['Inner'\]$"),
        ({"kind": "Inner"}, r"^it.name must be given, got none$"),
        ({"kind": "Inner", "name": "b", "size": True}, r"^it.size must be an integer, got True$"),
        ({"kind": "Inner", "name": "b", "other": 1}, r"^it has the fields name, size, got 'other'$"),
    ):
        with pytest.raises(ValueError, match=sentence):
            records.of_kind(data, kinds, "it")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"number": true}', r"^n: number must be a finite number, got True$"),
        ('{"number": 1e999}', r"^n: number must be a finite number, got inf$"),
        (f'{{"number": 1{"0" * 400}}}', r"^n: number must be a finite number, got 1000.*0000$"),
        ("{}", r"^n: number must be given, got none$"),
        ('{"number": 1, "other": 2}', r"^n has the fields number, inner, pair, many, kind, on, free, got 'other'$"),
        ('{"number": 1, "inner": {"name": 1}}', r"^n: inner.name must be text, got 1$"),
        ('{"number": 1, "inner": {}}', r"^n: inner.name must be given, got none$"),
        ('{"number": 1, "inner": {"name": "a", "size": 1.0}}', r"^n: inner.size must be an integer, got 1.0$"),
        (
            f'{{"number": 1, "inner": {{"name": "a", "size": {2**64}}}}}',
            r"^n: inner.size must be an integer of 64 bits, got 18446744073709551616$",
        ),
        ('{"number": 1, "inner": []}', r"^n: inner must be an object, got \[\]$"),
        ('{"number": 1, "pair": 3}', r"^n: pair must be a list of 2 \(a finite number, .*\) or null, got 3$"),
        ('{"number": 1, "pair": [1, 2, 3]}', r"^n: pair must be a list of 2 .*, got \[1, 2, 3\]$"),
        ('{"number": 1, "many": [[1, 2]]}', r"^n: many\[0\]\[1\] must be text, got 2$"),
        ('{"number": 1, "kind": "z"}', r"^n: kind must be one of 'x', 'y', got 'z'$"),
        ('{"number": 1, "on": 1}', r"^n: on must be true or false, got 1$"),
        ('{"number": 1, "free": [1]}', r"^n: free must be an object, got \[1\]$"),
        ("[]", r"^n must be an object, got \[\]$"),
    ],
)
def test_a_field_of_another_type_is_named(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        records.record(Outer, records.parse(text), "n: ")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", r"^it must be a thing, got '\{' \(Expecting"),
        ("NaN", r"^it must be a thing, got 'NaN' \(NaN is no JSON number\)$"),
        ('{"a": -Infinity}', r"\(-Infinity is no JSON number\)$"),
        ('{"a": 1, "b": 2, "a": 3}', r"\('a' stands twice in one object\)$"),
        ("[" * 10**6, r"^it must be a thing, got '\[\[\[.* \(nested too deeply\)$"),
        ('{"a":' * 10**5, r"\(nested too deeply\)$"),
        ("1" * 10**5, r"^it must be a thing, got '111.* \(Exceeds the limit"),
        (None, r"^it must be a thing, got NoneType$"),
        (b"\xff\xfe", r"^it must be a thing, got b'"),
    ],
    ids=range(9),
)
def test_text_that_is_no_json_is_one_sentence(text: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as caught:
        records.parse(text, "a thing", "it")
    assert len(str(caught.value)) < 300
