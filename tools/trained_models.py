"""Trains what diffusion is compared with and built on, and writes a page with pictures and a table for each.

    python tools/trained_models.py latent     # digits of 32 x 32 pixels in latents of 8 x 8: docs/trained-latent.md
    python tools/trained_models.py gan        # a GAN against diffusion, digits of 28 x 28: docs/trained-gan.md
    python tools/trained_models.py vq         # KL, VQ and FSQ autoencoders of photographs: docs/trained-vq.md
    python tools/trained_models.py latent --iterations 5 --out build/try      # everything there, in a minute

Each takes up to 20 minutes on two cores and nothing from the network. A run that was stopped goes on (build/trained).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffkern
from diffkern import ops, pictures
from diffkern.data import Images, open_images, split
from diffkern.generate import described, generate, recommended
from diffkern.metrics import Classifier, psnr, train_classifier
from diffkern.nn import Autoencoder
from diffkern.train import PRESETS, Fitted, TrainConfig, fit

sys.path.insert(0, str(Path(__file__).resolve().parent))

from scaling import processor_name
from trained import COMMON, EXAMPLES, IMAGES, NETWORK, ROOT, RUNS, scores

GUIDANCE = 1.4
COLUMNS = 10


@dataclasses.dataclass
class Place:
    """Where a page's runs and pictures go, and how long it may take."""

    name: str
    runs: Path
    docs: Path
    iterations: int | None

    def fitted(self, method: str, training: Images, held_out: Images, config: TrainConfig) -> tuple[Fitted, float]:
        """Trained, from where it was stopped; and the minutes of it all."""
        folder = self.runs / self.name / method
        if self.iterations is not None:
            config = dataclasses.replace(config, iterations=self.iterations, save_every=self.iterations)
        spent = folder / "minutes.txt"
        minutes, start = float(spent.read_text()) if spent.exists() else 0.0, time.perf_counter()
        found = fit(None, training, config, out=folder, held_out=held_out, progress=method)
        minutes += (time.perf_counter() - start) / 60
        spent.write_text(f"{minutes}\n")
        if found.stopped:
            raise SystemExit(f"stopped after {found.step} iterations; the same command goes on from there")
        return found, minutes

    def draw(self, rows: list[Tensor], title: str, what: str, ink: bool) -> str:
        """The picture, and the line of the page that shows it."""
        name = f"trained_{self.name}_{what}.png"
        pictures.write(pictures.grid(rows, title=title, scale=2, ink=ink), self.docs / "images" / name)
        return f"![{title}](images/{name})"


def latent(place: Place) -> list[str]:
    """The autoencoder, a flow in its latents, and one of the same network and number of iterations in pixels."""
    training, held_out = split(open_images("mnist5k", size=32), 500)
    judge = train_classifier(training, progress=True)
    x0, labels = held_out.batch(torch.arange(len(held_out)))
    begun = time.perf_counter()
    found, minutes = place.fitted("autoencoder", training, held_out, PRESETS["autoencoder-digits"])
    autoencoder = Autoencoder.from_pretrained(place.runs / place.name / "autoencoder")
    r = reconstructed(autoencoder, x0)
    rows: list[dict[str, Any]] = [
        {"method": "real images, kept apart", **scores(x0, labels, training, judge)},
        {"method": "their reconstructions", "training": minutes, **scores(r, labels, training, judge)},
    ]
    ten = torch.arange(4 * COLUMNS)
    shown = [row for pair in zip(x0[ten].split(COLUMNS), r[ten].split(COLUMNS), strict=True) for row in pair]
    ratio = float(psnr(x0, r).mean())
    drawn = [place.draw(shown, "images kept apart, and below each its reconstruction", "autoencoder", True)]
    spaces: dict[str, dict[str, Any]] = {
        "latents of 8 x 8": {
            "latents": str(place.runs / place.name / "autoencoder"),
            "network_options": {**NETWORK, "channels": 64, "multipliers": [1, 2], "attention_levels": [1]},
        },
        "pixels, 32 x 32": {"network_options": NETWORK},
    }
    for number, (method, changes) in enumerate(spaces.items()):
        config = dataclasses.replace(
            COMMON, objective="flow", times="logit_normal", iterations=1500 - 500 * number, **changes
        )
        found, minutes = place.fitted(f"flow-{number}", training, held_out, config)
        made, asked, seconds, title = sampled(found, GUIDANCE)
        rows.append(
            {
                "method": f"flow matching in {method}",
                "training": minutes,
                "sampling": seconds,
                **scores(made, asked, training, judge),
            }
        )
        drawn.append(place.draw(list(made[:80].split(COLUMNS)), f"{method}: {title}", f"flow{number}", True))
    factor = autoencoder.config.factor
    return [
        "# Latent diffusion, trained",
        "",
        f"Digits of 32 x 32 pixels, {len(training)} images, an autoencoder with f = {factor} (latents of",
        f"{32 // factor} x {32 // factor} with {autoencoder.config.latent_channels} channels, PSNR of images kept "
        f"apart {ratio:.1f} dB), and flow matching",
        "in its latents and in pixels. The second line is what the autoencoder gives back of real images: more no",
        "model in its latents can reach.",
        *machine(begun, "latent"),
        *table(rows),
        *drawn,
    ]


def gan(place: Place) -> list[str]:
    """A conditional GAN, one without classes, and flow matching on the same images."""
    training, held_out = split(open_images("mnist5k"), 500)
    judge = train_classifier(training, progress=True)
    x0, labels = held_out.batch(torch.arange(len(held_out)))
    begun, drawn = time.perf_counter(), list[str]()
    rows: list[dict[str, Any]] = [{"method": "real images, kept apart", **scores(x0, labels, training, judge)}]
    for method, with_labels in (("GAN, by classes", True), ("GAN, without", False)):
        config = dataclasses.replace(PRESETS["gan-digits"], data="", labels=with_labels, validation=0.0)
        name = f"gan-{int(with_labels)}"
        found, minutes = place.fitted(name, training, held_out, config)
        trained: Any = found.diffusion
        asked = torch.arange(IMAGES) % 10 if with_labels else None
        with found.averages.used(found.averages.names[0]):
            start = time.perf_counter()
            made = trained.sample(IMAGES, seeds=ops.seeds(0, IMAGES), cond=asked)
            seconds = time.perf_counter() - start
        rows.append(
            {
                "method": method,
                "training": minutes,
                "sampling": seconds,
                "least": least_share(made, judge),
                **scores(made, asked, training, judge),
            }
        )
        drawn.append(place.draw(list(made[:80].split(COLUMNS)), method, name, True))
    example = EXAMPLES["digits28"]
    config = dataclasses.replace(example.config, objective="flow", times="logit_normal")
    found, minutes = place.fitted("flow", training, held_out, config)
    made, asked, seconds, title = sampled(found, GUIDANCE)
    rows.append(
        {
            "method": "flow matching",
            "training": minutes,
            "sampling": seconds,
            "least": least_share(made, judge),
            **scores(made, asked, training, judge),
        }
    )
    drawn.append(place.draw(list(made[:80].split(COLUMNS)), f"flow matching: {title}", "flow", True))
    return [
        "# A GAN against diffusion, trained",
        "",
        f"Digits of 28 x 28 pixels, {len(training)} images: a DCGAN-size generator and discriminator with and without",
        "classes, and flow matching. A GAN samples in one evaluation of its generator, and learns no likelihood: what",
        "it leaves out, no term of its loss asks for. `rarest` is the share of the class that is made least, by a",
        "classifier trained on the same images (a tenth is even; by classes it is asked for).",
        *machine(begun, "gan"),
        *table(rows),
        *drawn,
    ]


def vq(place: Place) -> list[str]:
    """Three regularisations of the same autoencoder, on patches of photographs."""
    training, held_out = split(open_images("photos", flip=True), 739)
    judge = train_classifier(training, progress=True)
    x0, labels = held_out.batch(torch.arange(len(held_out)))
    begun, drawn = time.perf_counter(), list[str]()
    rows: list[dict[str, Any]] = [{"method": "real images, kept apart", **scores(x0, labels, training, judge)}]
    kinds: dict[str, dict[str, Any]] = {
        "KL": {"regularisation": "kl"},
        "VQ": {"regularisation": "vq", "codes": 1024},
        "FSQ": {"regularisation": "fsq", "latent_channels": 4, "fsq_levels": [8, 5, 5, 5]},
    }
    for method, options in kinds.items():
        base = PRESETS["autoencoder-digits"]
        config = dataclasses.replace(
            base, data="", flip=True, validation=0.0, network_options={**base.network_options, **options}
        )
        _, minutes = place.fitted(method.lower(), training, held_out, config)
        autoencoder = Autoencoder.from_pretrained(place.runs / place.name / method.lower())
        r = reconstructed(autoencoder, x0)
        rows.append(
            {
                "method": method,
                "training": minutes,
                "psnr": float(psnr(x0, r).mean()),
                **codes(autoencoder, x0),
                **scores(r, labels, training, judge),
            }
        )
        some = torch.arange(2 * COLUMNS) * len(x0) // (2 * COLUMNS)
        shown = [row for pair in zip(x0[some].split(COLUMNS), r[some].split(COLUMNS), strict=True) for row in pair]
        title = f"{method}: images kept apart, and below each its reconstruction"
        drawn.append(place.draw(shown, title, method.lower(), False))
    return [
        "# VQ against KL, trained",
        "",
        f"Patches of photographs, 32 x 32 in colour, {len(training)} images: the same autoencoder (f = 4) with a",
        "Gaussian for every latent (KL), the nearest of 1024 learned codes (VQ) and each of four channels rounded to",
        "8, 5, 5 and 5 levels (FSQ, 1000 codes without a codebook). `bits` are those of a position's code: the latents",
        "of KL are real numbers. `used` is the share of the codes that the images kept apart use, `perplexity` two to",
        "the entropy of how often they do.",
        *machine(begun, "vq"),
        *table(rows),
        *drawn,
    ]


# ------------------------------------------------------------------------------------------------------ what they share


def sampled(found: Fitted, guidance: float) -> tuple[Tensor, Tensor, float, str]:
    """Images of the classes in turn by the second average, their classes, the seconds, and how they were made."""
    with found.averages.used(found.averages.names[-1]):
        plan = recommended(found.diffusion, "heun", 18)
        start = time.perf_counter()
        parts = list(generate(found.diffusion, IMAGES, plan, classes="even", guidance=guidance, progress=True))
        seconds = time.perf_counter() - start
    classes = torch.cat([part.classes for part in parts if part.classes is not None])
    return torch.cat([part.images for part in parts]), classes, seconds, described(plan, guidance)


@torch.no_grad()
def reconstructed(autoencoder: Autoencoder, x0: Tensor) -> Tensor:
    autoencoder.eval()
    return torch.cat([autoencoder(part)[0] for part in x0.split(64)])


@torch.no_grad()
def codes(autoencoder: Autoencoder, x0: Tensor) -> dict[str, Any]:
    """How many bits a position has, how many codes are used, and their perplexity; of codes alone."""
    if autoencoder.config.regularisation == "kl":
        return {}
    indices = torch.cat([autoencoder.encode(part).indices.flatten() for part in x0.split(64)])
    levels = autoencoder.config.fsq_levels
    number = math.prod(levels) if levels else autoencoder.config.codes
    shares = torch.bincount(indices, minlength=number).double() / len(indices)
    entropy = -(shares * shares.clamp_min(1e-12).log2()).sum()
    return {"bits": math.log2(number), "used": float((shares > 0).double().mean()), "perplexity": 2.0 ** float(entropy)}


@torch.no_grad()
def least_share(images: Tensor, judge: Classifier) -> float:
    found = torch.cat([judge(part).argmax(1) for part in images.split(64)])
    return float(torch.bincount(found, minlength=10).min()) / len(images)


def machine(begun: float, name: str) -> list[str]:
    versions = f"{diffkern.build_info()['isa']}, torch {torch.__version__.split('+')[0]}"
    return [
        "",
        f"`python tools/trained_models.py {name}` made this page in {(time.perf_counter() - begun) / 60:.0f} minutes "
        f"({processor_name()}, {versions}, {time.strftime('%Y-%m-%d')}).",
        f"Each model {IMAGES} samples where it samples; precision, recall and the Fréchet distance are of a",
        "classifier's features, so they compare inside the table only.",
    ]


COLUMN: dict[str, tuple[str, Callable[[float], str]]] = {
    "training": ("training", lambda v: f"{v:.1f} min"),
    "sampling": ("sampling", lambda v: f"{v:.1f} s"),
    "psnr": ("PSNR", lambda v: f"{v:.1f} dB"),
    "bits": ("bits", lambda v: f"{v:.1f}"),
    "used": ("used", lambda v: f"{v:.2f}"),
    "perplexity": ("perplexity", lambda v: f"{v:.0f}"),
    "least": ("rarest", lambda v: f"{v:.3f}"),
    "agreement": ("agreement", lambda v: f"{v:.3f}"),
    "fid": ("Fréchet", lambda v: f"{v:.2f}"),
    "precision": ("precision", lambda v: f"{v:.2f}"),
    "recall": ("recall", lambda v: f"{v:.2f}"),
}


def table(rows: list[dict[str, Any]]) -> list[str]:
    used = [name for name in COLUMN if any(row.get(name) is not None for row in rows)]
    lines = ["", "| | " + " | ".join(COLUMN[name][0] for name in used) + " |", "|---" + "|--:" * len(used) + "|"]
    for row in rows:
        values = ["" if row.get(name) is None else COLUMN[name][1](row[name]) for name in used]
        lines.append(f"| {row['method']} | " + " | ".join(values) + " |")
        print(json.dumps(row), flush=True)
    return [*lines, ""]


PAGES = {"latent": latent, "gan": gan, "vq": vq}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("page", choices=list(PAGES))
    parser.add_argument("--iterations", type=int, help="of each model (its own)")
    parser.add_argument("--out", type=Path, help="folder for runs, page and pictures (build/trained and docs)")
    options = parser.parse_args()
    docs = ROOT / "docs" if options.out is None else options.out
    (docs / "images").mkdir(parents=True, exist_ok=True)
    place = Place(options.page, RUNS if options.out is None else options.out, docs, options.iterations)
    lines = PAGES[options.page](place)
    body = [line if not line.startswith("![") else f"{line}\n" for line in lines]
    (docs / f"trained-{options.page}.md").write_text("\n".join(body).rstrip() + "\n")


if __name__ == "__main__":
    main()
