"""What CMakeLists.txt builds and how: the sources of a target, the flags of a source, the architectures of a release.

CMake itself is asked: build/tests is configured (a second when nothing changed) and its compile_commands.json read, so
what the tests compile cannot drift from what ships. It is a release build of its own, whatever DIFFKERN_CUDA,
DIFFKERN_DEV and TORCH_CUDA_ARCH_LIST say, so that it needs no other build and leaves none changed.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
FOLDER = ROOT / "build" / "tests"
CSRC = ROOT / "csrc"


@dataclass(frozen=True)
class Unit:
    """A source, the flags that it is compiled with (architectures and file names apart), and its object."""

    source: Path
    compiler: str
    flags: tuple[str, ...]
    architectures: tuple[str, ...]  # of CUDA: "90", and with PTX "90+PTX"
    object: Path


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time: what several pytest workers want is made once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def run(command: Sequence[str | Path]) -> str:
    """The output of a command; when it fails, an error that holds it."""
    # cmake and ninja of this Python's environment count too when it is not activated.
    environment = os.environ | {"PATH": _path()}
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def _path() -> str:
    return sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")


def configure(source: Path = ROOT, folder: Path = FOLDER) -> Path:
    """compile_commands.json of the description in `source`, made anew when CMake says so."""
    choices = {
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_BUILD_TYPE": "Release",
        "DIFFKERN_OUTPUT_DIR": folder / "modules",
        "DIFFKERN_CUDA": "auto",
        "DIFFKERN_DEV": "OFF",
        "DIFFKERN_NVCC_FLAGS": "",
        "TORCH_CUDA_ARCH_LIST": "",
    }
    command: list[str | Path] = ["cmake", "-S", source, "-B", folder]
    command += [f"-D{name}={value}" for name, value in choices.items()]
    if ninja := shutil.which("ninja", path=_path()):
        command += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    with locked(folder.with_suffix(".lock")):
        run(command)
    return folder / "compile_commands.json"


def read(commands: Path) -> dict[str, tuple[Unit, ...]]:
    """Target -> its units, from a compile_commands.json."""
    targets: dict[str, list[Unit]] = {}
    for entry in json.loads(commands.read_text()):
        found = re.search(r"CMakeFiles/([^/]+)\.dir/", entry["output"])
        assert found is not None, entry["output"]
        targets.setdefault(found[1], []).append(_unit(entry))
    return {name: tuple(units) for name, units in targets.items()}


def _unit(entry: dict[str, str]) -> Unit:
    words = shlex.split(entry["command"])
    first = next(i for i, word in enumerate(words) if word.startswith("-"))  # a launcher may stand before the compiler
    flags, architectures = [], []
    rest = iter(words[first:])
    for word in rest:
        if word in ("-o", "-x"):
            next(rest)
        elif word.startswith("--generate-code="):
            code = re.search(r",code=\[?([^\]]*)", word)
            assert code is not None, word
            number = re.sub(r".*_", "", code[1].split(",")[-1])
            architectures.append(number + "+PTX" * ("compute_" in code[1]))
        elif word not in ("-c", "-ptx", entry["file"]):
            flags.append(word)
    target = Path(entry["directory"]) / entry["output"]
    return Unit(Path(entry["file"]), words[first - 1], tuple(flags), tuple(architectures), target)


@functools.cache
def units(target: str) -> tuple[Unit, ...]:
    """What a target is made of: diffkern_cpu and diffkern_cuda are the kernels. () for CUDA without an nvcc."""
    return read(configure()).get(target, ())


def flags(of: Sequence[Unit]) -> tuple[str, ...]:
    """The flags that all of these have: one may have more, for the order of its instructions."""
    return tuple(flag for flag in of[0].flags if all(flag in unit.flags for unit in of))


# ---------------------------------------------------------------------------------------------------------- CPU
def cpu_library(bridge: Path) -> Path:
    """A shared library of the CPU kernels, the objects that CMake builds, behind the C functions of one more source."""
    kernels = units("diffkern_cpu")
    library = FOLDER / "bridges" / f"{bridge.parent.name}_{bridge.stem}.so"
    jobs = str(len(os.sched_getaffinity(0)))
    with locked(FOLDER.with_suffix(".lock")):
        run(["cmake", "--build", FOLDER, "--target", "diffkern_cpu", "--parallel", jobs])
        parts = [bridge, *bridge.parent.glob("*.h"), *(CSRC / "core").glob("*.h"), *(u.object for u in kernels)]
        if not library.exists() or library.stat().st_mtime <= max(part.stat().st_mtime for part in parts):
            library.parent.mkdir(exist_ok=True)
            fresh = library.with_suffix(".new")
            visible = ["-fvisibility=default", "-shared", "-pthread"]
            objects = [unit.object for unit in kernels]
            run([kernels[0].compiler, *flags(kernels), *visible, bridge, *objects, "-o", fresh])
            fresh.replace(library)  # a library that a process has open keeps its contents
    return library


# --------------------------------------------------------------------------------------------------------- CUDA
class NoNvcc(RuntimeError):
    """There is no nvcc: the message says what to do."""


def cuda_units() -> tuple[Unit, ...]:
    """The CUDA kernels; their nvcc is on PATH afterwards."""
    found = units("diffkern_cuda")
    if not found:
        raise NoNvcc(
            "the CUDA kernels are tested by compiling them to PTX, and no nvcc was found: put one on PATH, or "
            "pip install 'cuda-toolkit[nvcc,cudart,cccl]' (which brings nvidia-cuda-nvcc)"
        )
    if shutil.which("nvcc") != found[0].compiler:
        os.environ["PATH"] = f"{Path(found[0].compiler).parent}{os.pathsep}{os.environ['PATH']}"
    return found


def cuda_sources() -> tuple[str, ...]:
    """Names of the files of csrc/cuda that are compiled."""
    return tuple(unit.source.name for unit in cuda_units())


def nvcc_flags() -> tuple[str, ...]:
    """Of every CUDA kernel, without include folders and architectures."""
    return tuple(flag for flag in flags(cuda_units()) if not flag.startswith("-I"))


def architectures() -> tuple[str, ...]:
    """What a release is built for: "75", ..., the last with "+PTX"."""
    (found,) = {unit.architectures for unit in cuda_units()}
    return found
