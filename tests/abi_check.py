"""One wheel under two versions of torch: `make test-abi`.

Builds a wheel with the torch of this environment, makes a throw-away environment each for torch 2.10 and for the newest
torch that the package index serves, installs the same wheel there, and compares what it computes, bit for bit. Needs
the network and, for the CUDA builds of torch on Linux, about 7 GB a version; the environments are deleted at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ["torch==2.10.*", "torch"]

# Runs under each torch; prints one line of JSON.
SMOKE = """
import hashlib, json, torch, diffkern
from diffkern import _load

def digest(*tensors):
    return hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()[:16]

ops = torch.ops.diffkern
seeds = torch.tensor([1, -2, 3 << 40])
z = ops.randn([3, 4, 5, 7], seeds, 5, torch.float32)
x0 = torch.linspace(-1, 1, z.numel()).reshape(z.shape)
table = torch.tensor([[0.8, 0.6, -0.6, 0.8], [0.6, 0.8, 1.0, 0.25]], dtype=torch.float64)
index = torch.tensor([0, 1, 1])
noised = ops.noising(x0, table, index, seeds, 7, None, True, True)
loss_table = torch.tensor([[1.0, -0.5, 2.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
loss = ops.loss(noised[0], x0, loss_table, index, seeds, 7, None, 1, True)
row = [0.0] * 21
for name, value in {1: 1.25, 2: -0.75, 4: 1.0, 5: 0.5, 6: 0.5, 12: 0.1, 16: 1.0}.items():
    row[name] = value
plan = torch.tensor([row], dtype=torch.float64)
step = ops.step(x0, z, None, None, None, None, None, plan, 0, None, seeds, None, None, None, True, False, 0, None)
try:
    ops.randn([2, 2], seeds, 0, torch.float32)
    error = "none"
except RuntimeError as raised:
    error = str(raised).split("\\n")[0]
print(json.dumps({
    "torch": torch.__version__,
    "cuda": "loaded" if _load._cuda is not None else _load.cuda_status().text,
    "randn": digest(z),
    "noising": digest(*noised),
    "loss": digest(*loss),
    "step": digest(step[0], step[1]),
    "error": error,
}))
"""


def run(*command: object, **variables: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        env={**os.environ, **variables},
        cwd=tempfile.gettempdir(),
        text=True,
        stdout=subprocess.PIPE,
    )
    if done.returncode:
        sys.exit(f"failed: {' '.join(str(part) for part in command)}\n{done.stdout}")
    return done.stdout


def build_wheel(folder: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, ROOT)
    return next(folder.glob("*.whl"))


def try_wheel(wheel: Path, requirement: str, folder: Path) -> dict[str, str]:
    """The smoke test's answers under one torch. A constraint of the machine on torch's version is not followed here."""
    started = time.monotonic()
    run(sys.executable, "-m", "venv", folder)
    python = folder / "bin" / "python"
    # The environment variable replaces a constraint of pip's configuration files.
    empty = folder / "no-constraints.txt"
    empty.touch()
    run(python, "-m", "pip", "install", "-qq", requirement, "numpy", "tqdm", PIP_CONSTRAINT=str(empty))
    run(python, "-m", "pip", "install", "-qq", "--no-deps", wheel)
    answers: dict[str, str] = json.loads(run(python, "-c", SMOKE).splitlines()[-1])
    answers["seconds"] = f"{time.monotonic() - started:.0f}"
    return answers


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--wheel", type=Path, help="use this wheel instead of building one")
    parser.add_argument("--torch", action="append", metavar="REQUIREMENT", help=f"default: {VERSIONS}")
    parser.add_argument("--folder", type=Path, help="where the environments are made (default: the temporary folder)")
    arguments = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
        wheel = arguments.wheel.resolve() if arguments.wheel else build_wheel(Path(temporary) / "wheel")
        print(wheel.name, flush=True)
        for number, requirement in enumerate(arguments.torch or VERSIONS):
            folder = Path(temporary) / f"env{number}"
            results.append(try_wheel(wheel, requirement, folder))
            shutil.rmtree(folder)
            print(f"  {requirement}: torch {results[-1]['torch']}", flush=True)
    equal = True
    print(f"\n{'':10}" + "".join(f"{result['torch']:<22}" for result in results))
    for key in ("cuda", "randn", "noising", "loss", "step", "error", "seconds"):
        values = [result[key] for result in results]
        same = len(set(values)) == 1
        equal &= same or key in ("cuda", "seconds")
        mark = "" if key in ("cuda", "seconds") else ("equal" if same else "DIFFERENT")
        print(f"{key:10}" + "".join(f"{value[:20]:<22}" for value in values) + mark)
    for result in results:
        if result["cuda"] != "loaded":
            print(f"{result['torch']}: {result['cuda']}")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
