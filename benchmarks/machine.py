"""The facts about the machine and the versions that a page of numbers has to name."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["environment"]


def _command(*words: str) -> str:
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=10, check=False, cwd=Path(__file__).parent)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _processor() -> str:
    for line in _command("lscpu").splitlines():
        if line.startswith("Model name:"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    commit = _command("git", "rev-parse", "--short=12", "HEAD")
    return commit + (" with changes" if commit and _command("git", "status", "--porcelain") else "")


def environment(device: str) -> dict[str, str]:
    """Machine, versions, date and commit: enough to read a number a year later."""
    import diffkern
    from diffkern import _load

    found = {
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z"),
        "device": device,
        "processor": _processor(),
        "cores": f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()}",
        "threads": f"{torch.get_num_threads()}",
        "isa": str(_load.build_info().get("isa", "")),
        "torch capability": torch.backends.cpu.get_cpu_capability(),
        "load average": " ".join(f"{load:.2f}" for load in os.getloadavg()) if hasattr(os, "getloadavg") else "",
        "diffkern": diffkern.__version__,
        "torch": torch.__version__,
        "diffusers": _version("diffusers"),
        "python": platform.python_version(),
        "commit": _commit(),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = f"{torch.version.cuda}"
    return {key: value for key, value in found.items() if value}
