"""diffkern.compat's drop-ins are imported when they are asked for."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from diffkern import compat
from diffkern.compat.kit.lazy import lazily

DROP_INS = ["diffusers", "edm", "flow_matching", "guided_diffusion", "k_diffusion", "score_sde", "torchcfm"]


def in_a_new_process(code: str) -> object:
    """What the code leaves in `found`."""
    text = f"import json, sys\n{code}\nprint(json.dumps(found))"
    ran = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def test_names() -> None:
    assert dir(compat) == DROP_INS
    with pytest.raises(AttributeError, match=r"module 'diffkern\.compat' has no attribute 'nothing'"):
        compat.nothing  # noqa: B018
    for name in ("edm", "flow_matching", "guided_diffusion", "k_diffusion", "score_sde"):
        module = getattr(compat, name)
        assert module is sys.modules[f"diffkern.compat.{name}"]
        for exported in getattr(module, "__all__", ()):
            assert getattr(module, exported) is not None
            assert exported in dir(module)
    assert compat.k_diffusion.sample_heun is compat.k_diffusion.sampling.sample_heun
    assert callable(compat.guided_diffusion.patch)


@pytest.mark.full
def test_nothing_is_imported_before_it_is_asked_for() -> None:
    code = """
import diffkern.compat
loaded = lambda: sorted(name for name in sys.modules if name.startswith("diffkern.compat.") and ".kit" not in name)
found = [loaded()]
diffkern.compat.k_diffusion
found.append(loaded())
diffkern.compat.k_diffusion.CompVisDenoiser
found.append("diffkern.compat.k_diffusion.external" in loaded())
diffkern.compat.guided_diffusion.gaussian_diffusion
import diffkern.compat.guided_diffusion.patching
found.append(callable(diffkern.compat.guided_diffusion.patch))
"""
    assert in_a_new_process(code) == [[], ["diffkern.compat.k_diffusion"], True, True]


@pytest.mark.full
def test_a_missing_peer_says_so_itself() -> None:
    code = """
sys.modules["diffusers"] = None
import diffkern.compat
try:
    diffkern.compat.diffusers
    found = "imported"
except ImportError as error:
    found = str(error)
"""
    text = in_a_new_process(code)
    assert isinstance(text, str)
    assert text.startswith("diffkern.compat.diffusers needs diffusers: pip install 'diffkern[diffusers]'")


def test_an_error_of_an_import_is_that_of_the_attribute(monkeypatch: pytest.MonkeyPatch) -> None:
    find, listed = lazily("diffkern.compat", ("absent",), ("name",))
    assert listed() == ["absent", "name"]
    for name in ("absent", "name"):
        with pytest.raises(ModuleNotFoundError, match=r"diffkern\.compat\.absent"):
            find(name)
