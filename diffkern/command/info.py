"""`python -m diffkern info`: versions, instruction set in use, CUDA architectures, what is missing and what to do."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from diffkern import _load
from diffkern.command._machine import crowding
from diffkern.nn.convolution import chosen

__all__ = ["add_command", "report", "text"]

# What the extras are for, by the module that shows that it is installed.
EXTRAS = {
    "demo": ("`make demo` and `python -m diffkern demo`", ("sklearn", "matplotlib", "torch_fidelity", "yaml")),
    "train": ("`diffkern train`", ("jsonargparse", "yaml", "PIL", "matplotlib", "safetensors")),
    "evaluate": ("`diffkern evaluate`", ("torch_fidelity", "scipy")),
    "grids": ("noise levels spaced by `beta_sigmas`", ("scipy",)),
}
# The same, for what stands in the source folder alone.
SOURCE_EXTRAS = {"bench": ("the benchmarks", ("pytest_benchmark", "matplotlib", "diffusers"))}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def report() -> dict[str, Any]:
    """Everything `text` prints, as plain data.

    Keys: diffkern, python, torch, numpy, build (of the native modules), isa, threads, convolutions (of `diffkern.nn`,
    which run by which kernel), cuda (ready, text, torch's CUDA,
    driver, devices), crowding (a sentence where other processes or a quota leave torch's threads too few cores, else
    None) and missing: a list of sentences, each with what to do.
    """
    import diffkern

    build = _load.build_info()
    status = _load.cuda_status()
    driver = _load.driver_version()
    devices = []
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            devices.append(f"{torch.cuda.get_device_name(index)} ({major}.{minor})")
    missing = [] if status.ready else [status.text]
    if build.get("version") != diffkern.__version__:
        missing.append(
            f"the native modules are of version {build.get('version')}, the Python files of {diffkern.__version__}: "
            "run `make build` or pip install --no-build-isolation ."
        )
    in_source = (Path(diffkern.__file__).parent.parent / "pyproject.toml").is_file()
    for extra, (purpose, modules) in {**EXTRAS, **(SOURCE_EXTRAS if in_source else {})}.items():
        absent = [name for name in modules if importlib.util.find_spec(name) is None]
        if absent:
            missing.append(f"{purpose} need {', '.join(absent)}: pip install 'diffkern[{extra}]'")
    return {
        "diffkern": f"{diffkern.__version__} in {Path(diffkern.__file__).parent}",
        "python": f"{platform.python_version()} in {sys.executable}",
        "system": f"{platform.system()} {platform.machine()}",
        "torch": f"{torch.__version__}",
        "numpy": _version("numpy"),
        "build": build,
        "isa": build.get("isa", ""),
        "isa_forced": os.environ.get("DIFFKERN_ISA", ""),
        "threads": torch.get_num_threads(),
        "convolutions": chosen(),
        "cuda": {
            "ready": status.ready,
            "text": status.text,
            "torch": torch.version.cuda or "none",
            "driver": f"CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "none",
            "devices": devices,
        },
        "crowding": crowding(),
        "missing": missing,
    }


def text(data: dict[str, Any] | None = None) -> str:
    """The report for a person to read."""
    data = report() if data is None else data
    build, cuda = data["build"], data["cuda"]
    forced = f" (forced by DIFFKERN_ISA, best here: {build.get('isa_best')})" if data["isa_forced"] else ""
    module = "not there"
    if "cuda_version" in build:
        module = f"nvcc {build['cuda_version']}, architectures {build['cuda_archs']}"
        module += f" (needs a driver for CUDA {build['cuda_version'].split('.')[0]}.0 or newer)"
    rows = [
        ("diffkern", data["diffkern"]),
        ("python", data["python"]),
        ("system", data["system"]),
        ("torch", f"{data['torch']}, built with CUDA {cuda['torch']}"),
        ("numpy", data["numpy"]),
        ("CPU module", f"{build.get('compiler')}, {build.get('build_type')}"),
        ("CPU code in use", f"{data['isa']}{forced}, {data['threads']} threads"),
        ("CPU attention", "; ".join(f"{dtype}: {kernel}" for dtype, kernel in build.get("attention", {}).items())),
        ("CPU convolutions", data["convolutions"]),
        ("CUDA module", module),
        ("CUDA driver", cuda["driver"]),
        ("GPUs", ", ".join(cuda["devices"]) or "none"),
        ("CUDA ops", "ready" if cuda["ready"] else "off"),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    if data.get("crowding"):
        lines += ["", f"Crowded: {data['crowding']}."]
    if data["missing"]:
        lines += ["", "Missing:"] + [f"- {sentence}" for sentence in data["missing"]]
    else:
        lines += ["", "Nothing is missing."]
    return "\n".join(lines)


def _run(arguments: argparse.Namespace) -> int:
    print(json.dumps(report(), indent=2) if arguments.json else text())
    return 0


def add_command(parser: argparse.ArgumentParser) -> None:
    """The arguments of `info`."""
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.set_defaults(run=_run)
