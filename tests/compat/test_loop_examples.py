"""The examples of the peers' loops, run small."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import flow_matching_oracle, k_diffusion_oracle

import diffkern


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "options", "lines", "limit"),
    [
        ("k_diffusion_loop", ("--steps", "4"), 5, 8e-6),
        ("edm_loop", ("--steps", "4"), 2, 1e-12),
        ("score_sde_loop", ("--steps", "30"), 5, 8e-6),
        ("flow_matching_loop", ("--steps", "4"), 4, 8e-6),
        ("guided_diffusion_loop", ("--steps", "4"), 3, 2e-5),
    ],
)
def test_example(root: Path, name: str, options: tuple[str, ...], lines: int, limit: float) -> None:
    if name.startswith("k_diffusion") and k_diffusion_oracle.missing():
        pytest.skip(f"needs {', '.join(k_diffusion_oracle.missing())}")
    if name.startswith("flow_matching") and flow_matching_oracle.missing():
        pytest.skip(f"needs {', '.join(flow_matching_oracle.missing())}")
    done = subprocess.run(
        [sys.executable, root / "examples" / f"{name}.py", "--size", "8", *options],
        capture_output=True,
        text=True,
        cwd=Path(diffkern.__file__).parent.parent,
        env={"PYTHONPATH": str(Path(diffkern.__file__).parent.parent)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = re.findall(r"max difference (\S+?)[ ;]", done.stdout)
    assert len(found) == lines
    assert all(float(value) <= limit for value in found)
    assert len(re.findall(r"times faster", done.stdout)) == lines


def test_the_drop_ins_need_torch_alone() -> None:
    """Nothing of the originals, nor of what they stand on, is imported."""
    code = """
import sys
absent = ("k_diffusion", "torchsde", "torchdiffeq", "scipy", "diffusers", "torchvision", "clip", "wandb")
for name in (*absent, "guided_diffusion"):
    sys.modules[name] = None  # an import of it fails
import torch
from diffkern.compat import edm
from diffkern.compat import k_diffusion as K
x = torch.ones(1, 3, 4, 4)
sigmas = K.get_sigmas_karras(3, 0.1, 5.0)
model = K.Denoiser(lambda x, sigma: x.tanh(), 0.5)
for name in K.__all__:
    if name.startswith("sample_"):
        assert getattr(K, name)(model, x, sigmas, disable=True).isfinite().all(), name
print(float(K.log_likelihood(model, x, 0.1, 5.0)[0]))
edm.EDMLoss()(lambda x, sigma, labels, augment_labels: x, x).mean()
from diffkern.compat import guided_diffusion as G
d = G.SpacedDiffusion(
    use_timesteps=G.space_timesteps(50, "3"),
    betas=G.get_named_beta_schedule("linear", 50),
    model_mean_type=G.ModelMeanType.EPSILON,
    model_var_type=G.ModelVarType.FIXED_SMALL,
    loss_type=G.LossType.KL,
)
assert d.p_sample_loop(lambda x, t: x.tanh(), (1, 3, 4, 4), device="cpu").isfinite().all()
assert d.calc_bpd_loop(lambda x, t: x.tanh(), x)["total_bpd"].isfinite().all()
from diffkern.compat.score_sde import likelihood, losses, sampling, sde_lib
sde = sde_lib.VPSDE(N=25)
sampling.get_ode_sampler(sde, (1, 3, 4, 4), lambda x: x, device="cpu")(lambda x, t: x)
likelihood.get_likelihood_fn(sde, lambda x: x)(lambda x, t: x, x)
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(diffkern.__file__).parent.parent)},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
