"""Published networks with weights from disk, of random numbers here: what they see, and what says where weights are."""

from __future__ import annotations

import hashlib
import io
import pickle
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.lazy import Lazy, needs
from torch import Tensor, nn

from diffkern.extras import MissingExtra
from diffkern.metrics import Extractor, extractor

torchvision = Lazy("torchvision")
inception = Lazy("torch_fidelity.feature_extractor_inceptionv3")
pytestmark = needs("torch_fidelity", "torchvision", "safetensors")

SMALL = "shufflenet_v2_x0_5"  # 1.4 million weights


def images(n: int = 2, side: int = 8, channels: int = 3) -> Tensor:
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    network = torchvision.models.get_model(SMALL, weights=None).eval()
    path = tmp_path_factory.mktemp("weights") / "small.pth"
    torch.save(network.state_dict(), path)
    return network, path


def test_a_torchvision_network_gives_what_its_last_layer_reads(small: tuple[nn.Module, Path]) -> None:
    network, path = small
    found = extractor(f"torchvision:{SMALL}", path)
    assert isinstance(found, Extractor)
    assert found.name == f"torchvision:{SMALL}@{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
    x = images(2, 224)  # its own size: nothing is resized
    features = found(x)
    levels = (x * 127.5 + 127.5).round() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        expected = network((levels - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(features.logits, expected)
    head = network.get_submodule("fc")
    with torch.no_grad():
        torch.testing.assert_close(head(features.pooled), expected)
    assert features.pooled.shape == (2, found.dims) == (2, 1024)


def test_grey_images_of_any_size_are_seen_as_colour(small: tuple[nn.Module, Path]) -> None:
    found = extractor(f"torchvision:{SMALL}", small[1])
    grey = images(1, 9, 1)
    assert torch.equal(found(grey).pooled, found(grey.expand(-1, 3, -1, -1)).pooled)
    with pytest.raises(ValueError, match="images must have 1 or 3 channels for a published network, got 4"):
        found(images(1, 8, 4))


@pytest.mark.full
def test_inception_is_torch_fidelitys_with_a_map_for_sfid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights; the map is the first 7 channels of mixed_6, whose first branch is the convolution of 1 x 1."""
    made = inception.FeatureExtractorInceptionV3
    empty, path = io.BytesIO(), tmp_path / "inception.pth"
    torch.save({}, empty)
    empty.seek(0)
    with monkeypatch.context() as patched:
        patched.setattr(made, "load_state_dict", lambda self, state: None)
        torch.save(made("random", ["2048"], feature_extractor_weights_path=empty).state_dict(), path)
    state = torch.get_rng_state()
    found = extractor("inception", path)
    assert torch.equal(torch.get_rng_state(), state)
    theirs = made("theirs", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
    middle: list[Tensor] = []
    theirs.Mixed_6d.register_forward_hook(lambda module, inputs, output: middle.append(output))
    x = images(2, 16)
    features = found(x)
    with torch.no_grad():
        pooled, logits = theirs((x * 127.5 + 127.5).round().to(torch.uint8))
    assert features.logits is not None
    assert features.spatial is not None
    assert torch.equal(features.pooled, pooled)
    assert torch.equal(features.logits, logits)
    assert torch.equal(features.spatial, middle[0][:, :7].flatten(1))
    assert (found.dims, features.spatial.shape[1]) == (2048, 2023)


def test_a_timm_network_gives_the_same_by_what_timm_says_of_its_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm itself in two functions: a network of one pooled pixel and a linear layer, seen at 4 x 4."""
    network = nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), head=nn.Linear(3, 5)))
    view = {"input_size": (3, 4, 4), "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "interpolation": "bicubic"}
    timm, data = ModuleType("timm"), ModuleType("timm.data")
    asked: list[Any] = []
    timm.create_model = lambda name, pretrained: asked.append((name, pretrained)) or network  # type: ignore[attr-defined]
    data.resolve_model_data_config = lambda model: view  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "timm.data", data)
    safetensors = Lazy("safetensors.torch")
    safetensors.save_file(network.state_dict(), tmp_path / "w.safetensors")
    features = extractor("timm:tiny", tmp_path / "w.safetensors")(images(2, 4))
    assert asked == [("tiny", False)]
    expected = ((images(2, 4) * 127.5 + 127.5).round() / 127.5 - 1).mean((2, 3))
    torch.testing.assert_close(features.pooled, expected)
    torch.testing.assert_close(features.logits, network.head(expected).detach())
    with pytest.raises(
        FileNotFoundError, match=r"'timm:tiny' must have weights=PATH, got None: .*huggingface.co/timm/"
    ):
        extractor("timm:tiny")


def test_timm_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtra, match=r"extractor 'timm:tiny' needs timm, which .*: pip install timm$"):
        extractor("timm:tiny")


def test_weights_that_are_missing_are_named_with_their_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    file = tmp_path / "hub" / "checkpoints" / "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(FileNotFoundError, match=f"in the file {file}.*curl -L --create-dirs -o {file} https://github"):
        extractor("inception")
    with pytest.raises(FileNotFoundError, match=r"resnet18-f37072fd.pth, which .* https://download\.pytorch\.org/"):
        extractor("torchvision:resnet18")
    with pytest.raises(ValueError, match=r"'classifier' must have weights=PATH of Classifier\.save, got None"):
        extractor("classifier")


def test_other_names_and_files_are_refused_in_one_sentence(small: tuple[nn.Module, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"extractor must be one of inception, .*did you mean 'inception'"):
        extractor("inceptoin")
    with pytest.raises(ValueError, match=r"extractor 'torchvision:NAME'.*did you mean 'resnet18'"):
        extractor("torchvision:resnet-18", small[1])
    with pytest.raises(ValueError, match=r"extractor must be one of .*, got NoneType"):
        extractor(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"weights must be those of 'torchvision:shuffle\w+', got .*small\.pth"):
        extractor("torchvision:shufflenet_v2_x1_0", small[1])
    torch.save([1], tmp_path / "list.pth")
    with pytest.raises(ValueError, match=r"file of tensors by name, got .*list\.pth with list"):
        extractor(f"torchvision:{SMALL}", tmp_path / "list.pth")


def test_no_code_of_a_weights_file_is_run(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap(), protocol=2))
    torch.save({"x": Trap()}, tmp_path / "zipped.pth")
    for name in ("trap.pth", "zipped.pth"):
        with pytest.raises(ValueError, match="weights must be a file of tensors, got"):
            extractor("inception", tmp_path / name)
    assert not (tmp_path / "ran").exists()
