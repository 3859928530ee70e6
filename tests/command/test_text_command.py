"""Texts on the command line: training on captions, images of texts, and one sentence for what does not fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.generate_cases import small_unet
from helpers.lazy import needs
from helpers.tiny_run import TINY, tiny_data

from diffkern.__main__ import main
from diffkern.data import open_images
from diffkern.diffusion import Diffusion
from diffkern.generate import generate, read_shards, write_shards
from diffkern.metrics import evaluate, train_classifier
from diffkern.nn import TextConditioned, TextEncoderConfig, UNet, UNetConfig, Vocabulary
from diffkern.pixels import to_bytes
from diffkern.schedules.makers import cosine

pytestmark = needs("PIL", "safetensors", "tqdm")

WORDS = Vocabulary.of(["seven, thick", "three"])
TEXTS = ["three", "seven, thick"]


def model() -> Diffusion:
    """Tiny, with random weights."""
    small = {"image_size": 8, "channels": 8, "multipliers": (1,), "blocks": 1, "attention_levels": (0,), "heads": 1}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = UNetConfig(**small, classes=0, transformer_depth=1, context_channels=8)  # type: ignore[arg-type]
        text = TextEncoderConfig.of(WORDS, context_channels=8, width=8, heads=1)
        network = TextConditioned.of(UNet(config), text)
        for parameter in network.parameters():
            parameter.data = 0.3 * torch.randn_like(parameter)
    return Diffusion(network, cosine(100)).eval()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model().save_pretrained(folder)
    return folder


def sample(run: Path, *arguments: object) -> int:
    return main(["sample", "--run", str(run), "--quiet", "--steps", "2", *map(str, arguments)])


# ---------------------------------------------------------------------------------------------------------- generate


def test_texts_are_images_in_turn() -> None:
    diffusion = model()
    parts = list(generate(diffusion, 5, "ddim", 2, texts=TEXTS, guidance=2.0, micro_batch=4))
    tokens = torch.cat([part.classes for part in parts if part.classes is not None])
    assert WORDS.texts(tokens) == [*TEXTS, *TEXTS, "three"]
    images = torch.cat([part.images for part in parts])
    by_tokens = list(generate(diffusion, 5, "ddim", 2, classes=tokens, guidance=2.0, micro_batch=4))
    assert torch.cat([part.images for part in by_tokens]).equal(images)
    # From the fourth on they are the same images, and the text goes on in turn.
    rest = next(iter(generate(diffusion, 1, "ddim", 2, texts=TEXTS, first=4, guidance=2.0, micro_batch=4)))
    assert rest.images.equal(parts[1].images)
    one = next(iter(generate(diffusion, 3, "ddim", 2, texts="three")))
    assert one.classes is not None
    assert WORDS.texts(one.classes) == ["three"] * 3
    other = next(iter(generate(diffusion, 3, "ddim", 2, texts="seven, thick")))
    assert not torch.allclose(other.images, one.images)


def test_what_a_network_does_not_read_is_one_sentence() -> None:
    for options, sentence in (
        (
            {"texts": "sevn"},
            "text must be of the 4 words of the vocabulary, got 'sevn' in 'sevn': did you mean 'seven'?",
        ),
        ({"texts": []}, r"texts must be a text or several, for a network that reads them, got \[\]"),
        ({"texts": "three", "classes": [1]}, "texts must be left out with classes, got 'three'"),
        ({"classes": "even"}, r"classes must be tokens int64 \[2, 4\] for a network that reads texts, got 'even'"),
        (
            {"classes": torch.ones(2, 3, dtype=torch.int64)},
            r"classes must be tokens int64 \[2, 4\] .*, got torch.int64 \[",
        ),
        ({"classes": torch.tensor([0, 1])}, r"classes must be tokens int64 \[2, 4\] .*, got torch.int64 \[2\]"),
        ({"guidance": 2.0}, "guidance must go with texts, got guidance=2.0 without them"),
    ):
        with pytest.raises(ValueError, match=sentence):
            generate(model(), 2, "ddim", 2, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="texts must be a text or several, for a network that reads them, got 'three'"):
        generate(small_unet(), 2, "ddim", 2, texts="three")


def test_shards_have_the_tokens(tmp_path: Path) -> None:
    diffusion = model()
    options = {"texts": TEXTS, "guidance": 2.0, "micro_batch": 2, "shard": 4}
    files = write_shards(tmp_path, diffusion, 6, "ddim", 2, **options)  # type: ignore[arg-type]
    assert [path.name for path in files] == ["shard-000000.npz", "shard-000001.npz"]
    before = [path.stat().st_mtime_ns for path in files]
    assert write_shards(tmp_path, diffusion, 6, "ddim", 2, **options) == files  # type: ignore[arg-type]
    assert [path.stat().st_mtime_ns for path in files] == before, "what is there is kept"
    read = list(read_shards(tmp_path))
    tokens = torch.cat([part.classes for part in read if part.classes is not None])
    assert WORDS.texts(tokens) == TEXTS * 3
    made = torch.cat(
        [part.images for part in generate(diffusion, 6, "ddim", 2, texts=TEXTS, guidance=2.0, micro_batch=2)]
    )
    assert to_bytes(torch.cat([part.images for part in read])).equal(to_bytes(made))
    with pytest.raises(ValueError, match="those of another, whose classes is"):
        write_shards(tmp_path, diffusion, 6, "ddim", 2, **{**options, "texts": "three"})  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------------ sample


def test_a_row_of_the_picture_is_a_text(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    assert sample(run, "--text", "three", "--text", "seven, thick", "--guidance", 2, "--out", tmp_path / "a.png") == 0
    assert f"16 images in {tmp_path / 'a.png'}\n" in capsys.readouterr().out, "8 of each text"
    two = Image.open(tmp_path / "a.png").size
    assert sample(run, "--text", "three", "--n", 8, "--out", tmp_path / "b.png") == 0
    one = Image.open(tmp_path / "b.png").size
    assert two[1] - one[1] == 8 * (8 + 2) + 4, "one row more, of tiles of 8 + 2 pixels, eight times as large"
    assert sample(run, "--n", 4, "--out", tmp_path / "c.png") == 0, "without a text there is the empty one"
    assert sample(run, "--text", "three", "--shards", tmp_path / "shards", "--n", 3) == 0
    assert sum(len(part.images) for part in read_shards(tmp_path / "shards")) == 3


def test_files_have_their_texts_beside_them(run: Path, tmp_path: Path) -> None:
    assert sample(run, "--text", "three", "--text", "seven, thick", "--n", 3, "--first", 1, "--out-dir", tmp_path) == 0
    images = open_images(tmp_path, labels="text", cache=False)
    assert images.vocabulary is not None
    assert images.labels is not None
    assert images.vocabulary.texts(images.labels) == ["seven, thick", "three", "seven, thick"]
    tokens = model().model.tokens(["seven, thick", "three", "seven, thick"])
    laid_out = Diffusion.from_pretrained(run).to(memory_format=torch.channels_last)  # as the command runs it
    made = next(iter(generate(laid_out, 3, None, 2, classes=tokens, first=1)))
    assert to_bytes(images.batch(torch.arange(3))[0]).equal(to_bytes(made.images))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--text", "sevn"],
            "text must be of the 4 words of the vocabulary, got 'sevn' in 'sevn': did you mean 'seven'?",
        ),
        (["--text", "three", "--classes", "1"], "--text must stand without --classes, got both"),
        (["--text", "three", "--per-class", "1"], "--text must stand without --per-class, got both"),
        (["--guidance", "3"], "--guidance must go with --text for a model that reads texts, got 3.0 alone"),
        (["--classes", "1"], "--classes must be left out for a model without classes, got '1'"),
    ],
)
def test_wrong_texts_are_one_sentence(
    run: Path, arguments: list[str], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sample(run, *arguments, "--out", tmp_path / "a.png") == 2
    assert capsys.readouterr().err == f"diffkern sample: {sentence}\n"


def test_a_model_of_classes_reads_no_texts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small_unet().save_pretrained(tmp_path)
    assert sample(tmp_path, "--text", "three", "--out", tmp_path / "a.png") == 2
    sentence = "--text must be left out for a model that reads no texts, got 'three'"
    assert capsys.readouterr().err == f"diffkern sample: {sentence}\n"


# ---------------------------------------------------------------------------------------- training, and measuring it


@pytest.mark.full
def test_from_captions_beside_pictures_to_images_of_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs("yaml", "matplotlib", "jsonargparse", "scipy")
    from PIL import Image

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images, labels = tiny_data()
    (tmp_path / "data").mkdir()
    for i, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        Image.fromarray(image[0].numpy()).save(tmp_path / "data" / f"{i:02d}.png")
        (tmp_path / "data" / f"{i:02d}.txt").write_text(("left", "middle", "right side")[label])
    options = {**TINY.network_options, "attention_levels": [0], "transformer_depth": 1, "context_channels": 8}
    flags = ["--network", "digits", "--iterations", "2", "--batch", "4", "--tensorboard", "false", "--text"]
    flags += [f"--network_options.{name}={value}" for name, value in options.items()]
    flags += ["--text-options.width=8", "--text-options.heads=1", "--quiet"]
    out = tmp_path / "run"
    assert main(["train", "--data", str(tmp_path / "data"), "--out", str(out), *flags]) == 0
    assert sample(out, "--text", "right side", "--out", tmp_path / "grid.png", "--guidance", 2) == 0
    capsys.readouterr()
    measured = ["evaluate", "--run", str(out), "--steps", "2", "--n", "12", "--quiet", "--guidance", "2"]
    assert main([*measured, "--features", "classifier"]) == 2
    assert "images must have one class each for a classifier, got captions, labels [20, 3]" in capsys.readouterr().err
    np.savez(tmp_path / "classes.npz", images=images.numpy(), labels=labels.numpy())
    train_classifier(open_images(tmp_path / "classes.npz"), steps=2).save(tmp_path / "judge")
    assert main([*measured, "--features", "classifier", "--weights", str(tmp_path / "judge")]) == 0
    assert "precision" in capsys.readouterr().out


def test_captions_are_no_classes_to_measure_by() -> None:
    images, labels = tiny_data()
    judge = train_classifier(open_images((images, labels)), steps=2)
    captioned = open_images((images, ["a"] * 10 + ["b"] * 10))
    scores = evaluate(captioned, captioned, judge)
    assert [(c.images, c.precision, c.recall, c.agreement) for c in scores.classes] == [(0, None, None, None)] * 3
    assert sum(c.share for c in scores.classes if c.share is not None) == pytest.approx(1.0)  # the classifier's own
    assert scores.agreement is None
    with pytest.raises(
        ValueError, match=r"images must have one class each for a classifier, got captions, labels \[20, 2\]"
    ):
        train_classifier(captioned)
