"""``diffkern COMMAND --help`` says what there is."""

from __future__ import annotations

import pytest
from helpers.lazy import needs

from diffkern.__main__ import _commands, main


@pytest.mark.parametrize("name", [name for name in _commands if name != "train"])
def test_help_of_a_command_made_by_argparse(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"usage: diffkern {name}")
    assert len(printed.splitlines()) > 3


@needs("jsonargparse")
def test_help_of_train(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    assert "--preset" in capsys.readouterr().out
