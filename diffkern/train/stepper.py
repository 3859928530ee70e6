"""What training asks of a thing that it trains: the base of every objective's part of the loop.

`fit` goes through the data and the iterations, `Run` keeps the folder; what they do not know is in a `Stepper`:
`diffkern.train.steps.DiffusionStepper` for a `diffkern.Diffusion`, and others beside it for models of two networks.
"""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffkern import parallel
from diffkern.data import Batch, Images
from diffkern.train.config import TrainConfig
from diffkern.train.ema import Averages

__all__ = ["Iteration", "Picture", "Stepper", "Trained", "examples", "in_mode", "prepare"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Trained(Protocol):
    """What is trained, an `nn.Module`: a `diffkern.Diffusion`, or another that a checkpoint can name and store."""

    model: nn.Module
    """All that is trained; checkpoints name parameters as it does."""

    @property
    def shape(self) -> tuple[int, ...] | None:
        """Of one image; None: any."""

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` holds: what must be the same for a run to go on."""

    def save_pretrained(
        self, folder: Path, *, weights: Mapping[str, Tensor] | None = None, average: str | None = None
    ) -> None:
        """Writes ``config.json`` and the weights, ``model.NAME``, as `diffkern.Diffusion.save_pretrained` does."""


class Iteration(NamedTuple):
    """What an iteration gives to the loop."""

    losses: Tensor
    """Of every example of the batch, float64 [batch] on the CPU, the same on every process."""
    norm: float
    """Of the gradient, before clipping."""
    stopped: bool
    """Whether any process was asked to stop."""
    terms: Mapping[str, float] = {}
    """What the log has beside them, as means over its lines."""
    warning: str | None = None
    """A sentence for whoever watches."""


class Picture(NamedTuple):
    """Images of a run."""

    rows: list[Tensor]
    """[N, C, H, W] each, on the CPU."""
    title: str
    names: tuple[str, ...] = ()
    """Of the rows, where they have any."""


class Stepper(abc.ABC):
    """One objective's part of training: what is trained, how an iteration is made of it, and how it is looked at.

    The optimiser is one AdamW, whatever the number of networks: a parameter without a gradient is left alone.
    """

    def __init__(self, trained: Any, config: TrainConfig, device: torch.device) -> None:
        self.trained, self.config, self.device = trained, config, device
        self.dtype = _DTYPES[config.precision]
        self.skipped, self.bad = 0, 0
        """Steps that were left out since the start, and the last ones in a row."""
        world = parallel.world()
        if config.batch < world or (config.shard == "fsdp" and config.batch % world):
            rule = "divisible by" if config.shard == "fsdp" else "at least"
            raise ValueError(f"TrainConfig.batch must be {rule} the {world} processes, got {config.batch}")
        self.optimizer = torch.optim.AdamW(
            self.groups(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=config.shard == "ddp",
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")

    # --------------------------------------------------------------------------------------------------- what is asked

    @classmethod
    @abc.abstractmethod
    def make(cls, config: TrainConfig, images: Images, folder: Path | None) -> Any:
        """What the configuration trains, with its first weights, or with those that ``config.init`` says."""

    @classmethod
    @abc.abstractmethod
    def check(cls, trained: Any, config: TrainConfig, images: Images) -> None:
        """ValueError for images, labels and settings that are not those of what is trained."""

    def groups(self) -> Any:
        """The parameters, or the groups of them, that the optimiser is given."""
        return [p for p in self.trained.parameters() if p.requires_grad]

    @property
    def averaged(self) -> nn.Module:
        """The module whose weights are averaged."""
        found: nn.Module = self.trained
        return found

    def seen(self, images: Images, folder: Path | None, progress: bool | str) -> Images:
        """The images as the loop reads them, once what is trained is on its device; ``folder`` is the run's."""
        return images

    @abc.abstractmethod
    def iterate(self, micro_batches: list[Batch], iteration: int, stop: bool = False) -> Iteration:
        """Gradients and updates of one iteration; the ``stop`` of any process is true on all."""

    @abc.abstractmethod
    def once(self, images: Images) -> None:
        """The forward passes of one example, whose operations are counted; without gradients, and changing nothing."""

    @abc.abstractmethod
    def validate(self, images: Images) -> dict[str, float | None]:
        """What the log says of images kept apart: ``validation_loss`` and others."""

    def check_pictures(self) -> None:
        """ValueError for pictures that cannot be made, before the first step."""
        return None

    @abc.abstractmethod
    def picture(self, images: Images, held_out: Images | None) -> Picture:
        """The picture of this moment, the same noise every time."""

    def finish(self, images: Images, folder: Path, averages: Averages) -> None:
        """What the last iteration leaves in the run's folder beside the checkpoints; called by every process."""
        return None

    # ----------------------------------------------------------------------------------------------------- the update

    def update(self, parameters: list[nn.Parameter]) -> tuple[float, bool]:
        """One step of the optimiser on gradients that are there: their norm before clipping, and whether it is finite.

        A gradient that is not finite changes nothing.
        """
        self.scaler.unscale_(self.optimizer)
        clip = math.inf if self.config.clip is None else self.config.clip
        norm: Any = nn.utils.clip_grad_norm_(parameters, clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # the pieces' norms together
        finite = math.isfinite(norm)
        if finite or self.scaler.is_enabled():  # the scaler leaves out what it found infinite
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm, finite

    def count(self, finite: bool) -> None:
        """Counts an iteration whose gradient was finite, or was not; see `too_many_bad`."""
        self.bad = 0 if finite else self.bad + 1
        self.skipped += not finite

    @property
    def too_many_bad(self) -> bool:
        """Whether more steps in a row than the configuration allows had to be left out."""
        return self.bad > self.config.bad_steps

    def state(self) -> dict[str, Any]:
        """What the next step depends on beside weights and optimiser, as plain data for JSON."""
        return {"skipped": self.skipped, "bad": self.bad, "scaler": self.scaler.state_dict()}

    def load_state(self, state: dict[str, Any]) -> None:
        """What `state` gave."""
        self.skipped, self.bad = state["skipped"], state["bad"]
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])


def prepare(trained: Any, config: TrainConfig, device: torch.device) -> Any:
    """The same object, on the device and switched as the configuration says: layout, checkpointing, compilation."""
    trained.to(device)
    if config.channels_last:
        trained.model.to(memory_format=torch.channels_last)  # convolutions run up to 2.5 times faster on a CPU
        for weight in trained.model.parameters():
            if weight.dim() == 4 and weight.shape[2:] == (1, 1):  # in either layout: with the strides of its gradient
                weight.data = weight.data.flatten().view(weight.shape)
    if config.checkpointing:
        network: Any = trained.model
        if hasattr(network, "enable_gradient_checkpointing"):  # diffusers
            network.enable_gradient_checkpointing()
        elif hasattr(network, "checkpointing"):
            network.checkpointing = True
        else:
            raise ValueError(
                "TrainConfig.checkpointing needs a network with a switch for it (`checkpointing`, or diffusers' "
                f"enable_gradient_checkpointing), got {type(trained.model).__name__}"
            )
    if config.compile:
        trained.model.compile()
    return trained.train()


@contextlib.contextmanager
def in_mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode for a while, put back module by module: one that was frozen is so again."""
    before = [(inside, inside.training) for inside in module.modules()]
    module.train(training)
    try:
        yield
    finally:
        for inside, was in before:
            inside.training = was


def examples(trained: Any, x0: Tensor, labels: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Images as the network takes them, in the dtype of its weights, and its condition: the labels, where the diffusion
    has a ``null`` for none."""
    dtype = next((p.dtype for p in trained.parameters() if p.is_floating_point()), x0.dtype)
    cond = None if labels is None or trained.null is None else labels.to(device, non_blocking=True)
    return x0.to(device, dtype, non_blocking=True), cond
