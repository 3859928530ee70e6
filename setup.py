"""Hands Python, output folder, build type and job count to CMake. Sources, flags and choices live in CMakeLists.txt."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def jobs() -> int:
    """MAX_JOBS, or as many compilers as the cores and 2 GiB of free memory for each allow."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return cores
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return max(1, min(cores, free // 2**21))


class CMakeBuild(build_ext):
    """Runs CMake in build/<tag>, a folder that is kept: one changed kernel is rebuilt in seconds."""

    def run(self) -> None:
        output = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "diffkern"
        build_type = "Debug" if self.debug else "Release"
        tag = f"{sys.implementation.cache_tag}-{sysconfig.get_platform()}-{build_type.lower()}"
        build = ROOT / "build" / tag
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), f"-DPython_EXECUTABLE={sys.executable}"]
        configure += [f"-DDIFFKERN_OUTPUT_DIR={output}", f"-DCMAKE_BUILD_TYPE={build_type}"]
        # cmake and ninja of this Python's environment count too when it is not activated.
        os.environ["PATH"] = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")
        # Named each time: under build isolation, the ninja of the last build is gone.
        if ninja := shutil.which("ninja"):
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        for command in (configure, ["cmake", "--build", str(build), "--parallel", str(jobs())]):
            if subprocess.run(command).returncode:
                # What is wrong stands above, in the words of CMake or the compiler; a traceback would bury it.
                raise SystemExit(f"the native build failed: {' '.join(command)}")


class CleanBuildPy(build_py):
    """Empties build/lib first: a module deleted from the tree must not live on in the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


# The extension only tells setuptools that the wheel belongs to one platform; CMake also builds _cuda where it can.
setup(ext_modules=[Extension("diffkern._C", sources=[])], cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuildPy})
