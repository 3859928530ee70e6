"""`diffkern evaluate`: how good a model's images are, against a folder of real ones; a table, JSON, and a picture.

Of a model that gives back what images have lost, those of its run kept apart are the truth.

Under torchrun the processes share sampling and features; the scores are those of one process.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffkern import parallel, pictures, storage
from diffkern.command._arguments import MOST_IMAGES, add_machine, check_count, check_device, output_folder, use_threads
from diffkern.command._model import add_model, diffusion_plan, make_plan, open_model
from diffkern.command._restoration import MOST as MOST_RESTORED
from diffkern.command._restoration import evaluate_restored
from diffkern.generate import Part, described, generate, known_classes, read_shards, reads, write_shards

if TYPE_CHECKING:
    from diffkern.data import Images
    from diffkern.diffusion import Diffusion
    from diffkern.gan import GAN
    from diffkern.metrics import Extractor

__all__ = ["add_command"]

MOST = 10_000
"""Images that are made where --n is not given; and at most as many as the data have."""
SHOWN = 10
"""Images in the picture."""
BOUND = 1024
"""Of the data's images the bits per dimension are estimated on so many."""


def add_command(parser: argparse.ArgumentParser) -> None:
    """The arguments of `evaluate`."""
    add_model(parser)
    parser.add_argument("--data", help="the real images: folder, file or name, see docs/data.md (the run's own)")
    parser.add_argument("--limit", type=int, help="so many of them, drawn at random (all)")
    parser.add_argument("--n", type=int, help=f"how many images to make (as many as the data have, at most {MOST})")
    parser.add_argument("--shards", help="folder to keep them in; run again, it makes only what is missing")
    parser.add_argument("--images", help="images made before, a folder of shards or of files, in place of sampling")
    parser.add_argument(
        "--features",
        help="what sees the images: inception, torchvision:NAME, timm:NAME, or classifier, trained on the data "
        "(inception where its weights are on disk, else classifier)",
    )
    parser.add_argument("--weights", help="file of the features' weights")
    parser.add_argument("--agreement", action="store_true", help="train a classifier of the data for agreement as well")
    parser.add_argument("--out", help="folder for evaluation.json, evaluation.png and what is reused (the run's)")
    parser.add_argument("--ink", action="store_true", help="draw grey images as dark ink on white")
    add_machine(parser)
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    use_threads(arguments.threads)
    device = check_device(arguments.device)
    if arguments.images is not None and arguments.shards is not None:
        raise ValueError(f"give --images or --shards, not both, got {arguments.images!r} and {arguments.shards!r}")
    with parallel.job(parallel.device_of(device)):
        evaluation = _Evaluation(arguments, parallel.device_of(device))
        evaluation.run()
    return 0


class _Evaluation:
    """One evaluation: what is compared with what, by what, and where the results go."""

    def __init__(self, arguments: argparse.Namespace, device: torch.device) -> None:
        from diffkern.data import open_images

        self.arguments, self.device = arguments, device
        self.bars = not arguments.quiet and parallel.is_main()
        self.diffusion: Diffusion | GAN | None = None
        self.images: Images | None = None
        if arguments.images is not None:
            self.images = open_images(arguments.images, progress=self.bars)
            shape: tuple[int, ...] = self.images.shape
            if arguments.out is None and arguments.folder is None:
                raise ValueError("--out must be given where there is no --run, the folder for the results, got none")
        else:
            self.diffusion = open_model(arguments, arguments.device)
            shape = self.diffusion.image_shape or ()
            self.plan = make_plan(self.diffusion, arguments)
        self.data = self._data(shape)
        self.out = Path(arguments.out if arguments.out is not None else arguments.folder)
        self.count, self.classes = self._wanted()

    def run(self) -> None:
        """Everything; prints the table."""
        from diffkern.metrics import evaluate, neighbour_grid, picture, reference_statistics

        arguments = self.arguments
        output_folder(self.out)
        if getattr(self.diffusion, "degradation", None) is not None:
            return self._restored(self.diffusion)
        extractor = self._extractor()
        judge = self._classifier() if arguments.agreement and self._classed() else None
        reference = reference_statistics(
            self.data, extractor, self.out / "reference.safetensors", progress="real images" if self.bars else False
        )
        seen = _Seen(self._shown(), self.data.shape, self.device)
        samples: Any = self.images if self.images is not None else seen.of(self._parts())
        scores = evaluate(
            samples,
            reference,
            extractor,
            classifier=judge,
            names=self.data.classes,
            progress=self.bars and samples is self.images,
        )
        bits = self._bits()
        shown = self.images.batch(torch.tensor(seen.numbers))[0] if self.images is not None else seen.images()
        if not parallel.is_main():
            return
        grid = neighbour_grid(
            shown, self.data, reference, extractor, title=self._words(), ink=arguments.ink and self.data.shape[0] == 1
        )
        pictures.write(picture(scores, grid), self.out / "evaluation.png")
        found = {"images": self._made(), "bits_per_dim": bits, "scores": dataclasses.asdict(scores)}
        storage.write(self.out / "evaluation.json", json.dumps(found, indent=1) + "\n")
        print(scores.table())
        if bits is not None:
            print(f"{'bits per dimension':<20}{bits:>10.4f}  bound on {min(BOUND, len(self.data))} of the real images")
        print(f"{self._words()}; evaluation.json and evaluation.png are in {self.out}", flush=True)

    def _restored(self, diffusion: Any) -> None:
        """Of a model with a degradation."""
        from diffkern.metrics import inception_weights

        arguments = self.arguments
        if arguments.shards is not None or arguments.agreement:
            raise ValueError("--shards and --agreement must be left out for a model that is given images, got one")
        known = arguments.features is not None or self._classed() or inception_weights().is_file()
        evaluate_restored(
            diffusion,
            diffusion_plan(diffusion, arguments),
            self.data,
            self.count,
            self._extractor if known else None,
            self.out,
            seed=arguments.seed,
            guidance=arguments.guidance,
            micro_batch=arguments.micro_batch,
            progress=self.bars,
            ink=arguments.ink,
            source=str(arguments.folder),
        )

    # ------------------------------------------------------------------------------------------------ what is compared

    def _data(self, shape: tuple[int, ...]) -> Images:
        """The real images, of the shape of the others; `all` of them where some are kept apart."""
        from diffkern.data import open_images

        if len(shape) != 3:
            raise ValueError(f"images must have shape (C, H, W) to be compared with data, got {shape}")
        channels, height, width = shape
        source, options = self.arguments.data, self._run_options()
        if source is None:
            source = options["data"]
        elif source != options.get("data"):
            options = {}
        options.pop("data", None)
        apart = options.pop("validation", None)
        if self.arguments.limit is not None:
            options["limit"] = check_count("--limit", self.arguments.limit)
        data = open_images(
            source,
            size=height if height == width else None,
            channels=channels if channels in (1, 3) else None,
            progress=self.bars,
            **options,
        )
        if data.shape != shape:
            raise ValueError(f"--data must be images of shape {shape}, as those to compare, got {data.shape}")
        self.all = data
        return data if apart is None else self._kept_apart(data, apart)

    def _kept_apart(self, data: Images, share: float) -> Images:
        """Of a model that gives back what images have lost, those that its run was not trained on."""
        from diffkern.data import split

        if getattr(self.diffusion, "degradation", None) is None or share == 0.0:  # a GAN has none either
            return data
        return split(data, share if share < 1.0 else int(share))[1]

    def _run_options(self) -> dict[str, Any]:
        """How the run opened its data, from its config.yaml; a ValueError where neither that nor --data says them."""
        from diffkern.train import TrainConfig, read_yaml

        path = None if self.arguments.folder is None else Path(self.arguments.folder) / "config.yaml"
        if path is None or not path.is_file():
            if self.arguments.data is None:
                raise ValueError("--data must be given, the real images, where no run's config.yaml says it, got none")
            return {}
        config = TrainConfig.from_dict(read_yaml(path))
        needed = config.labels or self.arguments.features == "classifier"  # which needs classes
        labels = ("text" if config.text else None) if needed else False
        options = {"data": config.data, "limit": config.limit, "skip_bad": config.skip_bad, "labels": labels}
        return {**options, "validation": config.validation}

    def _wanted(self) -> tuple[int, Tensor | None]:
        """How many images, and of which classes: as often as in the data, one class after the other."""
        if self.images is not None:
            count = len(self.images) if self.arguments.n is None else check_count("--n", self.arguments.n)
            if count != len(self.images):
                raise ValueError(f"--n must be left out, or the {len(self.images)} of --images, got {count}")
            return count, self.images.labels
        assert self.diffusion is not None
        asked = self.arguments.n
        most = MOST if getattr(self.diffusion, "degradation", None) is None else MOST_RESTORED
        count = min(most, len(self.data)) if asked is None else check_count("--n", asked, MOST_IMAGES)
        if reads(self.diffusion):
            from diffkern.train.captions import told

            self.data = told(self.diffusion, self.data)
        known, labels = known_classes(self.diffusion), self.data.labels
        if reads(self.diffusion) and labels is not None:  # the captions of the data, from the first to the last
            return count, labels[torch.arange(count) * len(labels) // count]
        if known is None:
            return count, None
        if labels is None:
            return count, torch.arange(count) % known
        if int(labels.max()) >= known:
            raise ValueError(f"--data must have the {known} classes of the model, got {int(labels.max()) + 1}")
        return count, labels.sort().values[torch.arange(count) * len(labels) // count]

    def _job(self) -> dict[str, Any]:
        arguments = self.arguments
        return {
            "seed": arguments.seed,
            "classes": self.classes,
            "guidance": None if self.classes is None else arguments.guidance,
            "micro_batch": arguments.micro_batch,
            "progress": self.bars and "sampling",
        }

    def _parts(self) -> Iterable[Part]:
        """This process's part of the images, as they are made, or out of their shards."""
        assert self.diffusion is not None
        if self.arguments.shards is None:
            return generate(self.diffusion, self.count, self.plan, **self._job())
        write_shards(self.arguments.shards, self.diffusion, self.count, self.plan, **self._job())
        return read_shards(self.arguments.shards, share=parallel.share)

    # ---------------------------------------------------------------------------------------------------- by what

    def _extractor(self) -> Extractor:
        from diffkern.metrics import extractor, inception_weights

        name, weights = self.arguments.features, self.arguments.weights
        if name is None:
            if weights is not None:
                raise ValueError(f"--weights must go with --features, got {weights!r} alone")
            name = "inception" if inception_weights().is_file() else "classifier"
            if name == "classifier" and not self._classed():
                raise ValueError(
                    f"--features must be given: the data have no classes to train a classifier on, and Inception's "
                    f"weights are not in {inception_weights()}, got none"
                )
        if name == "classifier" and weights is None:
            return self._classifier()
        return extractor(name, weights, self.device)

    def _classed(self) -> bool:
        """Whether the data have classes; captions are none."""
        return self.data.labels is not None and self.data.labels.ndim == 1

    def _classifier(self) -> Any:
        """Of these data: trained once, kept in the folder of the results."""
        from diffkern.metrics import Classifier, train_classifier

        place = self.out / f"classifier-{self.all.fingerprint[:12]}"
        if parallel.is_main() and not place.with_name(place.name + ".json").is_file():
            train_classifier(self.all, device=self.device, progress=self.bars).save(place)
        parallel.barrier()
        return Classifier.load(place, self.device)

    def _bits(self) -> float | None:
        """The bound in bits per dimension, of a model of images on a table."""
        from diffkern.data import Subset
        from diffkern.diffusion import Diffusion
        from diffkern.train.validation import validate

        if not isinstance(self.diffusion, Diffusion) or self.diffusion.autoencoder is not None:
            return None
        count = min(BOUND, len(self.data))
        some = Subset(self.data, torch.arange(count) * len(self.data) // count)
        return validate(self.diffusion, some).bits_per_dim

    # --------------------------------------------------------------------------------------------------- the results

    def _shown(self) -> list[int]:
        """The numbers of the images in the picture: of as many classes as there are."""
        if self.classes is None:
            return list(range(min(SHOWN, self.count)))
        classes = torch.unique(self.classes, dim=0, return_inverse=True)[1]  # of texts too
        found = [torch.nonzero(classes == c)[:, 0].tolist() for c in classes.unique().tolist()]
        if len(found) > SHOWN:
            found = [found[i * len(found) // SHOWN] for i in range(SHOWN)]
        return [of[i] for i in range(SHOWN) for of in found if i < len(of)][:SHOWN]

    def _made(self) -> dict[str, Any]:
        """Where the images are from."""
        if self.images is not None:
            return {"source": str(self.arguments.images)}
        arguments, plan = self.arguments, self.plan
        words = {name: getattr(arguments, name) for name in ("average", "guidance", "seed", "micro_batch")}
        sampler, steps = ("generator", 0) if plan is None else (plan.name, len(plan.steps))
        return {"run": str(arguments.folder), "sampler": sampler, "steps": steps, **words}

    def _words(self) -> str:
        if self.images is not None:
            return f"images of {self.arguments.images}"
        return f"images by {described(self.plan, self._job()['guidance'])}"


class _Seen:
    """The images of some numbers, of all that go by, of whichever process they are."""

    def __init__(self, numbers: list[int], shape: tuple[int, ...], device: torch.device) -> None:
        self.numbers = numbers
        self._places = {number: i for i, number in enumerate(numbers)}
        self._kept = torch.zeros(len(numbers), *shape, device=device)

    def of(self, parts: Iterable[Part]) -> Iterator[Part]:
        """The parts as they are."""
        for part in parts:
            for number in self._places.keys() & range(part.first, part.first + len(part.images)):
                self._kept[self._places[number]] = part.images[number - part.first]
            yield part

    def images(self) -> Tensor:
        """[K, C, H, W], the same in every process."""
        return parallel.summed(self._kept)[0]
