"""One optimiser step, whatever the processes, micro-batches and precision: gradient, clipping, update."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffkern import ops, parallel
from diffkern.data import Batch
from diffkern.diffusion import Diffusion
from diffkern.objectives.time_sampling import LossSecondMoment
from diffkern.train.config import TrainConfig

__all__ = ["Stepper", "examples", "in_mode", "prepare"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def prepare(diffusion: Diffusion, config: TrainConfig, device: torch.device) -> Diffusion:
    """The same object, on the device and switched as the configuration says: layout, checkpointing, compilation."""
    diffusion.to(device)
    if config.channels_last:
        diffusion.model.to(memory_format=torch.channels_last)  # convolutions run up to 2.5 times faster on a CPU
        for weight in diffusion.model.parameters():
            if weight.dim() == 4 and weight.shape[2:] == (1, 1):  # in either layout: with the strides of its gradient
                weight.data = weight.data.flatten().view(weight.shape)
    if config.checkpointing:
        network: Any = diffusion.model
        if hasattr(network, "enable_gradient_checkpointing"):  # diffusers
            network.enable_gradient_checkpointing()
        elif hasattr(network, "checkpointing"):
            network.checkpointing = True
        else:
            raise ValueError(
                "TrainConfig.checkpointing needs a network with a switch for it (`checkpointing`, or diffusers' "
                f"enable_gradient_checkpointing), got {type(diffusion.model).__name__}"
            )
    if config.compile:
        diffusion.model.compile()
    return diffusion.train()


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


def examples(
    diffusion: Diffusion, x0: Tensor, labels: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Images as the network takes them, in the dtype of its weights, and its condition: the labels, where the diffusion
    has a ``null`` for none."""
    dtype = next((p.dtype for p in diffusion.parameters() if p.is_floating_point()), x0.dtype)
    cond = None if labels is None or diffusion.null is None else labels.to(device, non_blocking=True)
    return x0.to(device, dtype, non_blocking=True), cond


class Stepper:
    """Turns the micro-batches of an iteration into one step of AdamW.

    The loss of a batch is the mean over all its examples on all processes. Each example's noise, time and lost
    condition are functions of its seed, and dropout inside the network of the micro-batch's first seed, so nothing
    depends on what ran before. ``wrapped`` is what computes the gradient: the diffusion, or DistributedDataParallel
    around it; one that is cut into pieces (``fsdp``) brings its own communication.
    """

    def __init__(
        self,
        diffusion: Diffusion,
        config: TrainConfig,
        device: torch.device,
        resampling: LossSecondMoment | None = None,
    ) -> None:
        self.diffusion, self.config, self.device, self.resampling = diffusion, config, device, resampling
        self.dtype = _DTYPES[config.precision]
        self.skipped, self.bad = 0, 0
        """Steps that were left out since the start, and the last ones in a row."""
        self._check(config)
        self.wrapped: nn.Module = diffusion
        if parallel.world() > 1 and config.shard == "ddp":
            ids = [device] if device.type == "cuda" else None
            wrap: Any = nn.parallel.DistributedDataParallel
            known = inspect.signature(wrap).parameters  # torch 2.14 has another name, and warns of the old one
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            self.wrapped = wrap(diffusion, device_ids=ids, **{buffers: False})
        self.parameters = [p for p in diffusion.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=config.shard == "ddp",
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")

    def _check(self, config: TrainConfig) -> None:
        world = parallel.world()
        if config.batch < world or (config.shard == "fsdp" and config.batch % world):
            rule = "divisible by" if config.shard == "fsdp" else "at least"
            raise ValueError(f"TrainConfig.batch must be {rule} the {world} processes, got {config.batch}")

    def seeds_and_times(self, iteration: int) -> tuple[Tensor, Tensor]:
        """Of the whole batch, [batch] each, the same on every process."""
        batch, diffusion = self.config.batch, self.diffusion
        seeds = ops.seeds(self.config.seed, batch, iteration * batch)
        times = diffusion.times if self.resampling is None else self.resampling
        return seeds, times.sample(batch, diffusion.schedule, seeds=seeds)

    def gradient(self, micro_batches: list[Batch], iteration: int, stop: bool = False) -> tuple[Tensor, bool]:
        """Adds up the gradient of the batch's mean loss; the loss of every example [batch], float64 on the CPU.

        The ``stop`` of any process is true on all. Losses that are not finite are returned as they are; where times are
        drawn by importance they are weighted by it, so that their mean is that of the objective.
        """
        config, start = self.config, iteration * self.config.batch
        _, times = self.seeds_and_times(iteration)
        weights = None if self.resampling is None else self.resampling.weights(times, self.diffusion.schedule).double()
        found = torch.zeros(config.batch + 1, dtype=torch.float64, device=self.device)
        found[-1] = float(stop)
        self.optimizer.zero_grad(set_to_none=True)
        for number, batch in enumerate(micro_batches):
            places = slice(batch.first - start, batch.first - start + len(batch.x0))
            last = number + 1 == len(micro_batches)
            with self._synchronised(last), torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32):
                losses = self._losses(batch, times[places])
                weighted = losses if weights is None else losses * weights[places].to(losses)
                # DistributedDataParallel and FSDP divide the sum over the processes by their number.
                loss = weighted.sum() * (parallel.world() / config.batch)
                self.scaler.scale(loss).backward()
            found[places] = losses.detach().double()
        parallel.summed(found)  # with zeros, so exact: the same losses for every number of processes
        found = found.cpu()
        losses, stopped = found[:-1], bool(found[-1] > 0)
        if self.resampling is not None and weights is not None:
            if bool(torch.isfinite(losses).all()):
                self.resampling.update(times, losses)
            losses = losses * weights
        return losses, stopped

    def _losses(self, batch: Batch, times: Tensor) -> Tensor:
        x0, cond = examples(self.diffusion, batch.x0, batch.labels, self.device)
        if self.config.channels_last:
            x0 = x0.contiguous(memory_format=torch.channels_last)
        torch.manual_seed(int(batch.seeds[0]) % 2**63)
        found: Tensor = self.wrapped(
            x0, times.to(self.device), cond=cond, seeds=batch.seeds.to(self.device), reduction="none"
        )
        return found

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Any:
        """Processes add up their gradients after the last micro-batch only."""
        if isinstance(self.wrapped, nn.parallel.DistributedDataParallel):
            with contextlib.nullcontext() if last else self.wrapped.no_sync():
                yield
            return
        network: Any = self.diffusion.model
        if hasattr(network, "set_requires_gradient_sync"):  # FSDP2
            network.set_requires_gradient_sync(last)
        yield

    def step(self, rate: float) -> float:
        """One step at that learning rate, and the gradient's norm before clipping.

        A gradient that is not finite changes nothing and is counted; see `too_many_bad`.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.unscale_(self.optimizer)
        clip = math.inf if self.config.clip is None else self.config.clip
        norm: Any = nn.utils.clip_grad_norm_(self.parameters, clip)
        norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)  # the pieces' norms together
        finite = math.isfinite(norm)
        self.bad = 0 if finite else self.bad + 1
        self.skipped += not finite
        if finite or self.scaler.is_enabled():  # the scaler leaves out what it found infinite
            self.scaler.step(self.optimizer)
        self.scaler.update()
        return norm

    @property
    def too_many_bad(self) -> bool:
        """Whether more steps in a row than the configuration allows had to be left out."""
        return self.bad > self.config.bad_steps

    def state(self) -> dict[str, Any]:
        """What the next step depends on beside weights and optimiser, as plain data for JSON."""
        times = None if self.resampling is None else self.resampling.state_dict()
        return {
            "skipped": self.skipped,
            "bad": self.bad,
            "scaler": self.scaler.state_dict(),
            "times": None if times is None else {name: value.tolist() for name, value in times.items()},
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """What `state` gave."""
        self.skipped, self.bad = state["skipped"], state["bad"]
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.resampling is not None and state["times"] is not None:
            dtypes = {name: value.dtype for name, value in self.resampling.state_dict().items()}
            times = {name: torch.tensor(value, dtype=dtypes[name]) for name, value in state["times"].items()}
            self.resampling.load_state_dict(times)
