"""What a training run is: one dataclass of plain values, written beside the run, enough to repeat it."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from diffkern import records, storage
from diffkern.checks import meant
from diffkern.extras import need
from diffkern.names import Crop, DegradationName, SamplerName, TimesName, WeightingName

__all__ = ["Decay", "Encoding", "Objective", "Precision", "Shard", "TrainConfig"]

Objective = Literal["eps", "x0", "v", "edm", "flow", "ncsn", "hybrid", "gan", "autoencoder"]
Decay = Literal["constant", "cosine", "inverse_sqrt"]
Precision = Literal["float32", "bfloat16", "float16"]
Shard = Literal["ddp", "fsdp"]
Encoding = Literal["cached", "on_the_fly"]

_WHOLE = {  # least and largest value of what counts things
    "iterations": (1, 10**9),
    "batch": (1, 2**24),
    "workers": (0, 1024),
    "warmup": (0, 10**9),
    "bad_steps": (0, 10**6),
    "log_every": (1, 10**9),
    "save_every": (1, 10**9),
    "keep": (1, 10**6),
    "sample_n": (1, 10**5),
    "sample_steps": (1, 10**5),
}
_OPTIONAL = {
    "micro_batch": (1, 2**24),
    "size": (1, 2**14),
    "channels": (1, 3),
    "limit": (1, 2**40),
    "threads": (1, 1024),
    "snapshot_every": (1, 10**9),
    "sample_every": (1, 10**9),
    "validate_every": (1, 10**9),
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run: each field is a flag of ``diffkern train``, an entry of ``config.yaml``.

    `diffkern.train.PRESETS` has the configurations of published runs. ValueError, naming field, rule and value.
    """

    objective: Objective = "eps"
    """"eps", "x0", "v" (a table's noise, image, or velocity), "edm", "flow" (flow matching), "ncsn" (denoising score
    matching over geometric noise levels), "hybrid" (eps with learned variance); "gan", "autoencoder": two networks."""
    network: str = "ddpm-cifar10"
    """Name in `diffkern.nn.PRESETS`, of "gan" in `diffkern.nn.GANS`; size, channels and classes are those of the
    data."""
    network_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of that configuration to change; of "gan" the generator's."""
    schedule: str | None = None
    """Name in `diffkern.SCHEDULES`; the objective's own if None."""
    schedule_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Its arguments."""
    weight: WeightingName | None = None
    """Weighting of the loss, `objectives.weightings`; the objective's own if None."""
    times: TimesName | None = None
    """How times are drawn, `objectives.time_sampling`; the objective's own if None."""
    times_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Its constants, where it is named: mean and std of "log_normal", which is EDM's own."""
    init: str | None = None
    """A run or a saved model whose network and weights it starts from, with its objective, schedule, weight, times
    (and their options), degradation and drop in place of those here."""
    degradation: DegradationName | None = None
    """What images lose and the model gives back: "super_resolution", "inpainting", "colourisation", "deblurring"."""
    degradation_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Its fields, `diffkern.degradations`: factor and filter, mask and share, sigma; augmentation, drop."""
    adversarial: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of "gan" and "autoencoder": the discriminator and its loss, `diffkern.train.options.AdversarialOptions`."""
    autoencoder: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Of "autoencoder": the loss's other terms, `diffkern.train.options.AutoencoderOptions`."""
    labels: bool = True
    """Whether the network is given the class or the caption; False trains without, also where the data have them."""
    text: bool = False
    """Whether the data are opened with captions in place of classes: NAME.txt beside NAME.png, metadata.jsonl, KEY.txt
    of tar files; the network, one with a context, is then given an encoder of their words."""
    text_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Fields of that encoder to change, `diffkern.nn.TextEncoderConfig`."""
    drop: float = 0.1
    """Probability that an example loses its class or caption, for classifier-free guidance."""

    latents: str | None = None
    """A saved autoencoder, or a run that trained one: the network sees its latents; docs/latent.md. None: images."""
    encode: Encoding = "cached"
    """Whether images become latents once, in the cache, or in every step ("on_the_fly")."""

    data: str = ""
    """Folder, .npz, .npy, .tar, or a name; see `diffkern.data.open_images`."""
    size: int | None = None
    """Height and width of the images the network sees; the data's own if None."""
    channels: int | None = None
    """1 or 3; the data's own if None."""
    crop: Crop = "center"
    """To a square: "center", or "random" anew in every epoch."""
    flip: bool = False
    """Mirror images at random."""
    limit: int | None = None
    """So many of the images alone, drawn once."""
    skip_bad: bool = False
    """Leave out images that cannot be read, instead of ending with their names."""
    cache: str | None = None
    """Folder for resized images; the system's own if None."""
    validation: float = 0.0
    """Number of images, or share below 1, kept apart."""
    workers: int = 0
    """Processes that read images."""

    iterations: int = 100_000
    """Of the whole run; the learning rate's curve ends there."""
    batch: int = 128
    """Images in an iteration, over all processes."""
    micro_batch: int | None = None
    """Images that go through the network together, on one process; all of its share if None."""
    learning_rate: float = 2e-4
    """Its peak."""
    warmup: int = 1000
    """Iterations of linear rise."""
    decay: Decay = "constant"
    """"constant", "cosine" (to ``final_rate`` of the peak) or "inverse_sqrt" (from the end of warm-up)."""
    final_rate: float = 0.0
    """Share of the peak that "cosine" ends at."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of AdamW."""
    weight_decay: float = 0.0
    """Of AdamW."""
    clip: float | None = 1.0
    """Largest norm of the gradient; None: not clipped."""
    bad_steps: int = 20
    """So many iterations in a row may have a gradient that is not finite; they change nothing."""
    precision: Precision = "float32"
    """"float32", or what the network computes in under autocast: "bfloat16", "float16" (scaled loss)."""
    checkpointing: bool = False
    """Activations are computed again for the gradient instead of being kept."""
    channels_last: bool = True
    """Memory format of the network."""
    compile: bool = False
    """Whether the network goes through torch.compile."""
    averages: tuple[float, ...] = (0.05, 0.1)
    """Widths sigma_rel of the power-function averages of the weights (arXiv 2312.02696)."""
    plain_average: float | None = None
    """Decay of an exponential average of the weights beside these; None: none."""
    shard: Shard = "ddp"
    """"ddp": a whole network on each process; "fsdp": a piece (FSDP2)."""

    log_every: int = 50
    """Iterations between lines of the log."""
    save_every: int = 1000
    """Iterations between checkpoints."""
    keep: int = 2
    """Newest checkpoints that are kept."""
    snapshot_every: int | None = None
    """Checkpoints at its multiples are kept as well, for averages of any width afterwards."""
    validate_every: int | None = None
    """Iterations between validations; None: at the end."""
    sample_every: int | None = None
    """Iterations between pictures; None: none."""
    sampler: SamplerName | None = None
    """Of the pictures; the objective's own if None."""
    sample_steps: int = 20
    """Of that sampler; a table's T if it has fewer."""
    sample_n: int = 64
    """Images of a picture."""
    guidance: float | None = None
    """Its weight in the pictures, where there are classes or captions; None: none."""
    tensorboard: bool | None = None
    """Write its files; None: where it is installed."""
    wandb: str | None = None
    """Project there; None: none."""

    seed: int = 0
    """Of everything: weights, order, noise, times, augmentations."""
    device: Literal["cpu", "cuda"] = "cpu"
    """"cpu" or "cuda"."""
    threads: int | None = None
    """CPU threads; torch's choice if None."""

    def __post_init__(self) -> None:
        records.check_fields(self, "TrainConfig.")
        for name, (least, most) in (_WHOLE | _OPTIONAL).items():
            value = getattr(self, name)
            if not (value is None and name in _OPTIONAL) and not least <= value <= most:
                raise ValueError(_named(f"in {least}..{most}", name, value))
        for name in ("learning_rate", "clip"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ValueError(_named("positive and finite", name, value))
        for name, values in {"drop": [self.drop], "betas": self.betas, "plain_average": [self.plain_average]}.items():
            if not all(value is None or 0.0 <= value < 1.0 for value in values):
                raise ValueError(_named("in [0, 1)", name, getattr(self, name)))
        for name in ("weight_decay", "final_rate", "validation"):
            if not 0.0 <= getattr(self, name) < math.inf:
                raise ValueError(_named("finite and not negative", name, getattr(self, name)))
        if self.validation >= 1.0 and not self.validation.is_integer():
            raise ValueError(_named("a whole number of images, or a share below 1", "validation", self.validation))
        if not all(0.0 < width < 0.28 for width in self.averages):
            raise ValueError(_named("in (0, 0.28), the widths that the power function has", "averages", self.averages))
        if len(set(self.averages)) != len(self.averages):
            raise ValueError(_named("different from each other", "averages", self.averages))
        if not 0 <= self.seed < 2**63:
            raise ValueError(_named("in 0..2**63 - 1", "seed", self.seed))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TrainConfig:
        """A configuration from its plain data; ValueError for an unknown name (with the nearest) and a wrong value."""
        known = [field.name for field in dataclasses.fields(TrainConfig)]
        for name in values:
            if name not in known:
                near = meant(name, known)
                hint = "" if near is None else f": did you mean {near!r}?"
                raise ValueError(f"TrainConfig has no field {records.shown(name)}{hint}")
        return records.record(TrainConfig, values, "TrainConfig.")

    def save(self, path: str | os.PathLike[str]) -> None:
        """As YAML."""
        values = {name: list(v) if isinstance(v, tuple) else v for name, v in self.to_dict().items()}
        storage.write(path, need("yaml", "PyYAML", "train").safe_dump(values, sort_keys=False))

    @staticmethod
    def load(path: str | os.PathLike[str]) -> TrainConfig:
        """What `save` wrote, or a part of it written by hand; ValueError in one sentence for anything else."""
        return TrainConfig.from_dict(read_yaml(path))


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The mapping in a YAML file; ValueError for anything else."""
    yaml = need("yaml", "PyYAML", "train")
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} must be a configuration in YAML, got {records.shown(str(error))}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a configuration in YAML, name: value, got {records.shown(values)}")
    return values


def _named(rule: str, name: str, value: Any) -> str:
    return f"TrainConfig.{name} must be {rule}, got {records.shown(value)}"
