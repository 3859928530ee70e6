"""What the tests compile is what CMakeLists.txt says: sources, flags and architectures come from there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers import build_description
from helpers.build_description import NoNvcc, configure, cuda_units, flags, read, units
from helpers.core_headers import constant, enumerators


def test_every_kernel_file_is_compiled(root: Path) -> None:
    for target, pattern in (("diffkern_cpu", "csrc/cpu/*.cpp"), ("diffkern_cuda", "csrc/cuda/*.cu")):
        assert {unit.source for unit in units(target)} == set(root.glob(pattern))


def test_flags_are_those_of_a_release() -> None:
    """Whatever the environment chose for the tree's own build (make: warnings as errors, one architecture)."""
    assert {"-O3", "-DNDEBUG", "-ffp-contract=off"} <= set(flags(units("diffkern_cpu")))
    assert "--fmad=false" in build_description.nvcc_flags()
    assert not any("Werror" in flag or "arch" in flag for flag in build_description.nvcc_flags())
    assert len(build_description.architectures()) > 3


@pytest.mark.full
def test_what_changes_in_cmakelists_changes_here(root: Path, tmp_path: Path) -> None:
    text = (root / "CMakeLists.txt").read_text()
    changes = (
        ("-fno-math-errno;", "-fno-math-errno;-DDRIFT=1;"),
        ("--fmad=false;", "--fmad=false;--drift;"),
        ("    csrc/cuda/randn.cu\n", ""),
        ("set(archs 75 80 ", "set(archs 80 "),
    )
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (tmp_path / "CMakeLists.txt").write_text(text)
    for name in ("csrc", "diffkern"):
        (tmp_path / name).symlink_to(root / name)
    found = read(configure(tmp_path, tmp_path / "build"))
    assert "-DDRIFT=1" in flags(found["diffkern_cpu"])
    assert "--drift" in flags(found["diffkern_cuda"])
    cuda = found["diffkern_cuda"]
    assert len(cuda) == len(cuda_units()) - 1
    assert cuda[0].architectures == cuda_units()[0].architectures[1:]


def test_a_build_without_cuda_has_no_cuda_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = "ccache /usr/bin/c++ -I/x/csrc -O3 -std=c++17 -o CMakeFiles/diffkern_cpu.dir/a.cpp.o -c /x/a.cpp"
    output = "CMakeFiles/diffkern_cpu.dir/a.cpp.o"
    entry = {"directory": "/b", "command": command, "file": "/x/a.cpp", "output": output}
    (tmp_path / "compile_commands.json").write_text(json.dumps([entry]))
    found = read(tmp_path / "compile_commands.json")
    assert list(found) == ["diffkern_cpu"]
    (unit,) = found["diffkern_cpu"]
    assert (unit.compiler, unit.flags) == ("/usr/bin/c++", ("-I/x/csrc", "-O3", "-std=c++17"))
    assert unit.object == Path("/b") / output
    monkeypatch.setattr(build_description, "units", lambda target: found.get(target, ()))
    with pytest.raises(NoNvcc, match="no nvcc was found"):
        cuda_units()


def test_numbers_of_the_core_are_read_from_its_headers() -> None:
    assert constant("kQuantilePart") == 65536
    assert enumerators("Layout") == {"contiguous": 0, "channels_last": 1, "strided": 2}
    with pytest.raises(ValueError, match="not enough values"):
        constant("kNoSuchNumber")
