"""The package as a whole: what the wheel and the sdist hold, the build's choices, the walls between folders, `info`."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import diffkern
from diffkern import _load
from diffkern.__main__ import main
from diffkern.command import info


def run(*command: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """One command with changed environment variables, its output kept; stderr goes into stdout."""
    environment = {**os.environ, **variables}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


# ------------------------------------------------------------------------------------------------ wheel and sdist


@pytest.fixture(scope="module")
def sdist(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    egg = tmp_path_factory.mktemp("egg")
    done = run(sys.executable, "setup.py", "-q", "egg_info", "-e", egg, "sdist", "-d", folder, cwd=root)
    assert done.returncode == 0, done.stdout
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="module")
def cpu_wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel without CUDA, built from the sdist alone, so that the sdist is shown to be complete."""
    folder = tmp_path_factory.mktemp("from-sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    source = next(folder.glob("diffkern-*"))
    command = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder / "wheel", "."]
    done = run(sys.executable, *command, cwd=source, DIFFKERN_CUDA="off", MAX_JOBS="2")
    assert done.returncode == 0, done.stdout
    return next((folder / "wheel").glob("*.whl"))


def wheel_problems(wheel: Path) -> Iterator[str]:
    """What a wheel holds beyond modules, Python files, the typing marker and metadata, or lacks of them."""
    names = zipfile.ZipFile(wheel).namelist()
    files = [name for name in names if not re.match(r"diffkern-[^/]+\.dist-info/", name)]
    for name in files:
        if not re.fullmatch(r"diffkern/([\w/]+\.py|py\.typed|_(C|cuda)\.[\w.-]+)", name):
            yield f"unexpected {name}"
    package = Path(__file__).resolve().parent.parent.parent / "diffkern"
    expected = {f"diffkern/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")} | {
        "diffkern/py.typed"
    }
    yield from (f"missing {name}" for name in expected - set(files))
    if sum(name.startswith("diffkern/_C.") for name in files) != 1:
        yield "not exactly one _C"
    if not any(name.endswith("licenses/LICENSE") for name in names):
        yield "no LICENSE"


@pytest.mark.full
def test_cpu_wheel_contents(cpu_wheel: Path) -> None:
    assert list(wheel_problems(cpu_wheel)) == []
    assert not any("_cuda" in name for name in zipfile.ZipFile(cpu_wheel).namelist())
    assert re.fullmatch(rf"diffkern-{re.escape(diffkern.__version__)}-cp\d+-cp\d+\w?-\w+\.whl", cpu_wheel.name)


def test_wheel_under_test_contents() -> None:
    """`make test` runs the suite against a wheel; that wheel is looked at here, and it is what was imported."""
    wheel = os.environ.get("DIFFKERN_TEST_WHEEL")
    if not wheel:
        pytest.skip("the tree is under test, not a wheel (make test)")
    assert list(wheel_problems(Path(wheel))) == []
    assert "site" in Path(diffkern.__file__).parts
    if shutil.which("nvcc") and os.environ.get("DIFFKERN_CUDA") != "off":
        assert any(name.startswith("diffkern/_cuda.") for name in zipfile.ZipFile(wheel).namelist())


@pytest.mark.full
def test_cpu_wheel_works(cpu_wheel: Path, tmp_path: Path) -> None:
    """Installed into an empty folder, it is imported from there, draws noise, and says why CUDA is off."""
    install = ["-m", "pip", "install", "-q", "--no-deps", "--target", tmp_path, cpu_wheel]
    assert run(sys.executable, *install, cwd=tmp_path).returncode == 0
    code = (
        "import torch, diffkern\n"
        "from diffkern import _load\n"
        "print(diffkern.__file__)\n"
        "seeds = torch.arange(2)\n"
        "print(torch.ops.diffkern.randn([2, 3], seeds, 0, torch.float32).shape)\n"
    )
    done = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert done.stdout.split("\n")[0] == str(tmp_path / "diffkern" / "__init__.py")
    assert "torch.Size([2, 3])" in done.stdout
    done = run(sys.executable, "-m", "diffkern", "info", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert "CUDA ops          off" in done.stdout
    expected = "built without its CUDA module" if torch.version.cuda else "is a build without CUDA"
    assert expected in done.stdout


def test_sdist_contents(sdist: Path, root: Path) -> None:
    """All that git knows: whatever a test reads is there."""
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    listed = run("git", "ls-files", cwd=root) if shutil.which("git") and (root / ".git").exists() else None
    tracked = listed.stdout.split() if listed is not None and listed.returncode == 0 else []
    written = [name for name in tracked if (root / name).exists()]
    parts = ("CMakeLists.txt", ".ci/run", "csrc", "tests", "benchmarks", "examples", "docs", "tools", "diffkern")
    read = [path for part in parts for path in (root / part, *(root / part).rglob("*.*")) if path.is_file()]
    made = ("__pycache__", ".so", ".pyc", "_cache")
    found = {path.relative_to(root).as_posix() for path in read if not any(m in str(path) for m in made)}
    assert len(found) > 400
    assert {*written, *found} - names == set()
    assert not [
        name for name in names if re.search(r"\.(so|pyc|whl|o|a)$|(^|/)(build|\.venv|\.git|__pycache__)(/|$)", name)
    ]


def needed(library: Path) -> str:
    if shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    return subprocess.run(["readelf", "-d", library], check=True, text=True, capture_output=True).stdout


def modules() -> list[Path]:
    return [Path(module.__file__) for module in (_load._cpu, _load._cuda) if module is not None and module.__file__]


def test_modules_need_no_cuda_runtime_and_carry_no_path() -> None:
    for module in modules():
        dynamic = needed(module)
        assert "libtorch_cpu.so" in dynamic
        assert "libcudart" not in dynamic
        assert "libtorch_python" not in dynamic
        assert "RPATH" not in dynamic
        assert "RUNPATH" not in dynamic


# --------------------------------------------------------------------------------------------- the build's choices


def configure(root: Path, build: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    options = (f"-DPython_EXECUTABLE={sys.executable}", f"-DDIFFKERN_OUTPUT_DIR={build / 'out'}", *options)
    return run("cmake", "-S", root, "-B", build, *options, cwd=root, **variables)


@pytest.mark.full
def test_cuda_on_without_nvcc_is_an_error(root: Path, tmp_path: Path) -> None:
    done = configure(root, tmp_path, "-DDIFFKERN_CUDA=on", CUDACXX=str(tmp_path / "no" / "nvcc"))
    assert done.returncode != 0
    message = " ".join(done.stdout.split())
    assert "DIFFKERN_CUDA=on, but" in message
    assert "put nvcc on PATH" in message


@pytest.mark.full
def test_cuda_auto_without_nvcc_says_so(root: Path, tmp_path: Path) -> None:
    done = configure(root, tmp_path, CUDACXX=str(tmp_path / "no" / "nvcc"), DIFFKERN_CUDA="auto")
    assert done.returncode == 0, done.stdout
    assert "diffkern: CUDA ops off, " in done.stdout


@pytest.mark.full
def test_cuda_off_removes_the_module_of_an_earlier_build(root: Path, tmp_path: Path) -> None:
    stale = tmp_path / "out" / f"_cuda{Path(str(_load._cpu.__file__)).name.removeprefix('_C')}"
    stale.parent.mkdir()
    stale.touch()
    done = configure(root, tmp_path, DIFFKERN_CUDA="off")
    assert done.returncode == 0, done.stdout
    assert "diffkern: CUDA ops off, DIFFKERN_CUDA=off" in done.stdout
    assert not stale.exists()


@pytest.mark.full
@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("DIFFKERN_CUDA", "yes", "DIFFKERN_CUDA must be auto, on or off, got 'yes'"),
        ("DIFFKERN_SANITIZE", "memory", "must be address, undefined, thread or empty, got 'memory'"),
        ("TORCH_CUDA_ARCH_LIST", "Hopper", "must hold entries such as 8.0 or 9.0+PTX, got 'Hopper'"),
    ],
)
def test_wrong_choice_is_named(root: Path, tmp_path: Path, variable: str, value: str, sentence: str) -> None:
    if variable == "TORCH_CUDA_ARCH_LIST" and shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    done = configure(root, tmp_path, **{"DIFFKERN_CUDA": "on", variable: value})
    assert done.returncode != 0
    assert sentence in " ".join(done.stdout.split())


@pytest.mark.full
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize(("wanted", "shown"), [("8.0;9.0+PTX", "80 90+PTX"), ("8.6 9.0a", "86 90a"), ("", "120+PTX")])
def test_architectures(root: Path, tmp_path: Path, wanted: str, shown: str) -> None:
    done = configure(root, tmp_path, TORCH_CUDA_ARCH_LIST=wanted, DIFFKERN_CUDA="on")
    assert done.returncode == 0, done.stdout
    line = next(line for line in done.stdout.splitlines() if "CUDA ops on" in line)
    if wanted:
        assert line.endswith(f"architectures {shown}")
    else:  # cut to what this nvcc knows, with PTX of the last one only
        assert re.search(r"architectures( \d+)+\+PTX$", line)
    commands = json.loads((tmp_path / "compile_commands.json").read_text())
    assert any(command["file"].endswith("step.cu") and "--fmad=false" in command["command"] for command in commands)


def test_python_and_version_have_one_home(root: Path) -> None:
    assert re.search(r'^__version__ = "\d+\.\d+\.\d+[^"]*"$', (root / "diffkern/__init__.py").read_text(), re.M)
    assert _load.build_info()["version"] == diffkern.__version__
    assert "version =" not in (root / "pyproject.toml").read_text().split("[project]")[1].split("[tool.")[0]


def test_makefile_installs_what_the_build_requires(root: Path) -> None:
    declared = re.search(r"^requires = \[(.*)\]$", (root / "pyproject.toml").read_text(), re.M)
    installed = re.search(r"^BUILD_REQUIRES := (.*)$", (root / "Makefile").read_text(), re.M)
    assert declared is not None
    assert installed is not None
    assert sorted(re.findall(r'"([^"]+)"', declared[1])) == sorted(re.findall(r'"([^"]+)"', installed[1]))


def test_every_native_source_is_listed_once(root: Path) -> None:
    listed = re.findall(r"csrc/[\w/]+\.(?:cpp|cu)\b", (root / "CMakeLists.txt").read_text())
    present = {
        path.relative_to(root).as_posix() for suffix in ("cpp", "cu") for path in (root / "csrc").rglob(f"*.{suffix}")
    }
    assert sorted(listed) == sorted(present)


def test_no_flag_that_changes_bits_or_binds_to_a_cpu(root: Path) -> None:
    flags = (root / "CMakeLists.txt").read_text() + (root / "setup.py").read_text()
    code = "\n".join(line.split("#")[0] for line in flags.splitlines())
    for flag in ("-march", "-mavx", "fast-math", "fast_math", "Ofast", "GLOB"):
        assert flag not in code


# ----------------------------------------------------------------------------------------------------- info and loading


def test_info_prints_what_a_bug_report_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    printed = capsys.readouterr().out
    for part in (diffkern.__version__, torch.__version__, "CPU code in use", "CUDA module", "CUDA ops"):
        assert part in printed
    assert str(_load.build_info()["isa"]) in printed
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        assert f"{dtype}: {_load.build_info()['attention'][dtype]}" in printed
    convolutions = (
        "Winograd F(2, 3) for 3 x 3 in float32 from 64 pixels, 16 inputs and 32 outputs on; torch's otherwise"
    )
    if _load.build_info()["isa"] != "scalar":
        assert f"CPU convolutions  {convolutions}\n" in printed
    status = _load.cuda_status()
    assert status.ready or status.text in printed


def test_info_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["build"]["version"] == diffkern.__version__
    assert set(data["cuda"]) == {"ready", "text", "torch", "driver", "devices"}


@pytest.mark.full
def test_info_shows_a_forced_instruction_set(root: Path) -> None:
    done = run(
        sys.executable, "-m", "diffkern", "info", cwd=Path(diffkern.__file__).parent.parent, DIFFKERN_ISA="scalar"
    )
    assert done.returncode == 0, done.stdout
    assert re.search(r"scalar \(forced by DIFFKERN_ISA, best here: \w+\)", done.stdout)
    assert "CPU convolutions  torch's (the code in use has no vectors)\n" in done.stdout


def test_info_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(info.EXTRAS, "demo", ("the demo", ("no_such_module",)))
    monkeypatch.setattr(diffkern, "__version__", "9.9.9")
    missing = info.report()["missing"]
    assert "the demo need no_such_module: pip install 'diffkern[demo]'" in missing
    assert any("native modules are of version" in sentence and "9.9.9" in sentence for sentence in missing)


def test_info_advises_what_a_user_of_the_wheel_can_install(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Extras that pyproject.toml declares; the benchmarks' in the source folder alone, as no wheel has them."""
    declared = re.search(r"\[project.optional-dependencies\]\n(.*?)\n\[", (root / "pyproject.toml").read_text(), re.S)
    assert declared is not None
    assert {*info.EXTRAS, *info.SOURCE_EXTRAS} <= set(re.findall(r"^(\w+) = \[", declared[1], re.M))
    monkeypatch.setattr(info, "SOURCE_EXTRAS", {"bench": ("the benchmarks", ("no_such_module",))})
    for folder, says in ((root, True), (root / "build", False)):
        monkeypatch.setattr(diffkern, "__file__", str(folder / "diffkern" / "__init__.py"))
        assert any("diffkern[bench]" in sentence for sentence in info.report()["missing"]) is says


@pytest.mark.full
def test_a_wrong_instruction_set_is_one_sentence() -> None:
    package = Path(diffkern.__file__).parent.parent
    done = run(sys.executable, "-m", "diffkern", "info", cwd=package, DIFFKERN_ISA="mmx")
    assert done.returncode != 0
    assert "DIFFKERN_ISA must be one of" in done.stdout.splitlines()[-1]


def test_command_line_names_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["no-such-command"])
    assert stop.value.code == 2
    assert "info" in capsys.readouterr().err


def test_cuda_status_without_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load, "_cuda", None)
    monkeypatch.setattr(_load, "_cuda_missing", "the reason")
    assert _load.cuda_status() == (False, "the reason")


def test_cpu_build_of_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    module, reason = _load._load_cuda()
    assert module is None
    assert "is a build without CUDA: install a CUDA build of torch" in reason


def test_old_torch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(ImportError, match=r"diffkern needs torch >= 2\.10, found torch 2\.9\.1"):
        _load._load_cpu()


def test_missing_cpu_module_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffkern._C", None)
    with pytest.raises(ImportError, match="native module _C was not built for this Python: run `make build`"):
        _load._load_cpu()


@pytest.mark.parametrize(
    ("archs", "capability", "serves"),
    [
        ("80 90+PTX", (8, 0), True),
        ("80 90+PTX", (8, 9), True),
        ("80 90+PTX", (12, 0), True),
        ("80 90+PTX", (7, 5), False),
        ("90", (8, 9), False),
        ("90", (10, 0), False),
        ("89", (8, 6), False),
        ("90a", (9, 0), True),
        ("90a+PTX", (10, 0), False),
        ("75 80 86 89 90 100 120+PTX", (12, 1), True),
    ],
)
def test_architecture_serves(archs: str, capability: tuple[int, int], serves: bool) -> None:
    assert _load.architecture_serves(archs, capability) is serves


@pytest.mark.parametrize(
    ("cuda", "driver", "serves"),
    [("13.0.88", 13000, True), ("13.2.1", 13000, True), ("13.0.88", 12080, False), ("12.8.93", 13000, True)],
)
def test_driver_serves(cuda: str, driver: int, serves: bool) -> None:
    assert _load.driver_serves(cuda, driver) is serves


@pytest.mark.skipif(_load._cuda is None or torch.cuda.is_available(), reason="needs the CUDA module and no GPU")
def test_cuda_status_without_gpu() -> None:
    status = _load.cuda_status()
    assert not status.ready
    assert re.search("driver|GPU", status.text)
