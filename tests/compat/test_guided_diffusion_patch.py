"""patch and unpatch on a package of guided-diffusion's shape (tests/mini_guided_diffusion)."""

from __future__ import annotations

import copy
import importlib
import pickle
import sys
from collections.abc import Iterator
from typing import Any

import mini_guided_diffusion as mini
import pytest
import torch
from helpers.guided_diffusion_patching import SHAPE, apart, module_with, net, run
from helpers.op_counter import CountOps, EveryOp
from mini_guided_diffusion import gaussian_diffusion, nn, respace, script_util, unet

from diffkern.compat import guided_diffusion as ours
from diffkern.compat.guided_diffusion import patch, unpatch


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    unpatch()


def contents() -> dict[str, dict[str, Any]]:
    """Every attribute of the package's modules and of the classes that they define."""
    modules = (gaussian_diffusion, nn, respace, script_util, unet)
    found = {module.__name__: dict(vars(module)) for module in modules}
    for module in modules:
        for name, value in vars(module).items():
            if isinstance(value, type) and value.__module__ == module.__name__:
                found[f"{module.__name__}.{name}"] = dict(vars(value))
    return found


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_same_images(rescale: bool, clip: bool) -> None:
    """Objects made before the patch, objects made after it, names imported before it."""
    before, model = script_util.create_gaussian_diffusion(rescale_timesteps=rescale), net()
    want, state = run(before, model, clip_denoised=clip)
    patch(mini)
    after = script_util.create_gaussian_diffusion(rescale_timesteps=rescale)
    for diffusion in (before, after):
        found, state_found = run(diffusion, model, clip_denoised=clip)
        assert apart(found, want) <= 2e-6 * before.num_timesteps
        assert torch.equal(state_found, state)
        with CountOps(SHAPE) as counted:
            run(diffusion, lambda x, t: x, clip_denoised=clip)
        assert counted.fused == {"step": before.num_timesteps}
    assert type(after) is respace.SpacedDiffusion
    assert isinstance(before, gaussian_diffusion.GaussianDiffusion)
    unpatch(mini)
    for diffusion in (before, after):
        assert torch.equal(run(diffusion, model, clip_denoised=clip)[0], want)


def test_network() -> None:
    """Layers inside a network that exists, and the embedding that another module has imported."""
    model = net()
    x, t = torch.randn(SHAPE), torch.tensor([3.0, 500.0])
    want = model(x, t)
    patch(mini)
    with EveryOp() as counted:
        found = model(x, t)
    assert counted.counts["diffkern.spatial_attention"] == 2
    assert apart(found, want) <= 2e-6
    assert unet.timestep_embedding is nn.timestep_embedding is ours.timestep_embedding
    unpatch()
    assert torch.equal(model(x, t), want)


def test_undone_exactly() -> None:
    before = contents()
    report = patch(mini)
    assert contents() != before
    undone = unpatch()
    assert contents() == before
    for name, found in contents().items():
        assert list(found) == list(before[name]) or set(found) == set(before[name])
        assert all(found[key] is before[name][key] for key in found)
    assert {change.name for change in undone} == {change.name for change in report.replaced}
    assert str(unpatch()) == "no package: nothing to replace"


def test_report() -> None:
    report = patch(mini)
    text = str(report)
    assert f"mini_guided_diffusion: {len(report.replaced)} replaced, {len(report.kept)} kept" in text
    names = {change.name.removeprefix("mini_guided_diffusion."): change for change in report}
    assert names["unet.QKVAttention.forward"].replaced
    assert names["gaussian_diffusion.GaussianDiffusion.p_sample"] in report.replaced
    loop = names["gaussian_diffusion.GaussianDiffusion.p_sample_loop_progressive"]
    assert loop.note == "calls with skip_timesteps run on the original"
    kept = {change.name.rpartition(".")[2]: change.reason for change in report.kept}
    assert kept["mean_sample"] == kept["take"] == "diffkern has no method of this name"
    assert "its arguments are (self, model" in kept["p_sample_loop"]
    assert "gaussian_diffusion.GaussianDiffusion: mean_sample" in text or "take, mean_sample kept" in text
    assert "p_sample_loop_progressive (calls with skip_timesteps run on the original)" in text


def test_trying_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generators (a GPU's too), and whatever device, dtype or mode happens to be the default."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    want = {(change.name, change.reason, change.note) for change in patch(mini)}
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded
    unpatch()
    modes = (torch.device("meta"), torch.autocast("cpu", torch.bfloat16), torch.inference_mode(), torch.no_grad())
    for mode in modes:
        with mode:
            assert {(change.name, change.reason, change.note) for change in patch(mini)} == want
        unpatch()
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            assert {(change.name, change.reason, change.note) for change in patch(mini)} == want
        finally:
            torch.set_default_dtype(torch.float32)
        unpatch()


def test_twice() -> None:
    first = patch(mini)
    second = patch(mini)
    assert not second.replaced
    assert {change.reason for change in second} == {"it is diffkern's already"}
    assert len(second) < len(first)
    before = contents()
    patch(mini)
    assert contents() == before


def test_halves() -> None:
    report = patch(mini, network=False)
    assert unet.timestep_embedding is not ours.timestep_embedding
    assert report.replaced
    unpatch()
    report = patch(mini, diffusion=False)
    assert {change.name.split(".")[1] for change in report} == {"unet", "nn"}
    assert gaussian_diffusion.GaussianDiffusion.p_sample.__module__ == gaussian_diffusion.__name__
    again = patch(mini)  # what has come since
    assert {change.name.split(".")[1] for change in again.replaced} == {"gaussian_diffusion", "respace"}


def test_arguments_that_diffkern_has_not() -> None:
    """A loop of a fork with an argument more: calls that use it run on the fork's own, one op a step still."""
    diffusion, model = script_util.create_gaussian_diffusion(), net()
    want, state = run(diffusion, model, skip_timesteps=3)
    patch(mini)
    found, state_found = run(diffusion, model, skip_timesteps=3)
    assert apart(found, want) <= 2e-6 * 8
    assert torch.equal(state_found, state)
    with CountOps(SHAPE) as counted:
        run(diffusion, lambda x, t: x, skip_timesteps=3)
    assert counted.fused == {"step": diffusion.num_timesteps - 3}


def test_subclasses_and_overrides() -> None:
    """A user's override of a part is what counts, in a class made before the patch or after it."""

    def make() -> Any:
        class Mine(respace.SpacedDiffusion):
            def p_mean_variance(self, *args: Any, **kwargs: Any) -> Any:
                out = super().p_mean_variance(*args, **kwargs)
                out["mean"] = out["mean"] * 0.5
                return out

        class WithWeights(respace.SpacedDiffusion, torch.nn.Module):
            def __init__(self, **kwargs: Any) -> None:
                torch.nn.Module.__init__(self)
                super().__init__(**kwargs)
                self.weight = torch.nn.Parameter(torch.ones(2))

        return Mine, WithWeights

    options = vars(script_util.create_gaussian_diffusion())
    made = {name: options[name] for name in ("model_mean_type", "model_var_type", "loss_type")}
    made |= {"betas": options["betas"], "use_timesteps": range(8)}
    early = make()
    model = net()
    want = run(early[0](**made), model)[0]
    patch(mini)
    for mine, weights in (early, make()):
        assert apart(run(mine(**made), model)[0], want) <= 2e-6 * 8
        assert list(dict(weights(**made).named_parameters())) == ["weight"]
        assert run(weights(**made), model)[0].shape == SHAPE


def test_copies_and_pickles() -> None:
    diffusion, model = script_util.create_gaussian_diffusion(), net()
    patch(mini)
    want = run(diffusion, model)[0]
    for other in (copy.deepcopy(diffusion), pickle.loads(pickle.dumps(diffusion))):
        assert type(other) is respace.SpacedDiffusion
        assert torch.equal(run(other, model)[0], want)
    unpatch()
    assert apart(run(pickle.loads(pickle.dumps(diffusion)), model)[0], want) <= 2e-5


def test_wrapped_models() -> None:
    """A model that the original wrapped is not wrapped again: its times would be mapped twice."""
    diffusion, model = script_util.create_gaussian_diffusion(), net()
    want = run(diffusion, model)[0]
    wrapped = diffusion._wrap_model(model)
    patch(mini)
    assert diffusion._wrap_model(wrapped) is wrapped
    assert apart(run(diffusion, wrapped)[0], want) <= 2e-6 * 8


def test_finding_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("guided_diffusion", "improved_diffusion"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(
        ImportError, match=r"guided_diffusion is not imported: import guided_diffusion before patch\(\)"
    ):
        patch()
    with pytest.raises(ImportError, match="package must be an imported module or its name, got 'no_such_fork'"):
        patch("no_such_fork")
    assert patch("mini_guided_diffusion").package == "mini_guided_diffusion"
    unpatch("mini_guided_diffusion")
    monkeypatch.setitem(sys.modules, "improved_diffusion", mini)
    assert patch().replaced
    unpatch()
    monkeypatch.setitem(sys.modules, "guided_diffusion", module_with())
    assert patch().package == "another_fork"


def test_modules_that_are_not_loaded(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own modules are imported; one that cannot be is in the report."""
    folder = tmp_path / "lazy_fork"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "nn.py").write_text("from mini_guided_diffusion.nn import timestep_embedding\n")
    (folder / "unet.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    package = importlib.import_module("lazy_fork")
    report = patch(package)
    reasons = {change.name: change.reason for change in report}
    assert reasons["lazy_fork.unet"] == "it cannot be imported: No module named 'no_such_package'"
    assert reasons["lazy_fork.nn.timestep_embedding"] is None
    assert "lazy_fork.unet" in str(report) or "unet kept" in str(report)


def test_fallbacks_are_counted() -> None:
    report = patch(mini)
    layer = unet.QKVAttention(2)
    with pytest.warns(RuntimeWarning, match="multiple of 8 up to 256, or 512, got 12"):
        layer(torch.randn(1, 72, 5))
    reason = "the channels of a head must be a multiple of 8 up to 256, or 512, got 12"
    assert report.fallbacks[reason] >= 1
    assert f"calls: {reason}" in str(report)
