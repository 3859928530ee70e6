"""`diffkern.storage`: JSON into dataclasses, every field checked; files whole or not at all."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, Literal

import pytest

from diffkern import storage


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
    assert storage.record(Outer, storage.parse(text)) == Outer(
        1, Inner("b"), (0.5, None), ((1, "s"),), "x", True, {"a": []}
    )
    assert storage.record(Outer, {}, number=2.0) == Outer(2.0)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('{"number": true}', r"^n: number must be a finite number, got True$"),
        ('{"number": 1e999}', r"^n: number must be a finite number, got inf$"),
        (f'{{"number": 1{"0" * 400}}}', r"^n: number must be a finite number, got 1000.*0000$"),
        ("{}", r"^n: number must be given, got none$"),
        ('{"number": 1, "other": 2}', r"^n does not know other; it knows free, inner, kind, many, number, on, pair$"),
        ('{"number": 1, "inner": {"name": 1}}', r"^n: inner.name must be text, got 1$"),
        ('{"number": 1, "inner": {}}', r"^n: inner.name must be given, got none$"),
        ('{"number": 1, "inner": {"name": "a", "size": 1.0}}', r"^n: inner.size must be an integer, got 1.0$"),
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
        storage.record(Outer, storage.parse(text), "n: ")


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
        storage.parse(text, "a thing", "it")
    assert len(str(caught.value)) < 300


def test_a_file_is_written_through_a_link_and_into_what_is_no_file(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.write_text("before")
    link.symlink_to(file)
    storage.write(link, "after")
    assert link.is_symlink()
    assert file.read_text() == "after"
    storage.write("/dev/null", b"x" * 1000)
    assert Path("/dev/null").is_char_device()
    read, written = os.pipe()
    storage.write(f"/dev/fd/{written}", "through")
    assert os.read(read, 100) == b"through"
    os.close(read)
    os.close(written)


def test_a_file_has_the_mode_of_any_other(tmp_path: Path) -> None:
    storage.write(tmp_path / ("n" * 250), "long name")
    (tmp_path / "other").write_text("")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none/file'$"):
        storage.write(tmp_path / "none" / "file", b"")
