"""One optimiser step of a `Diffusion`, whatever the processes and micro-batches: gradient, clipping, update."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffkern import ops, parallel
from diffkern.data import Batch, Images
from diffkern.diffusion import Diffusion
from diffkern.generate import described, recommended
from diffkern.plan import Plan
from diffkern.schedules.discrete import DiscreteSchedule
from diffkern.train import degraded
from diffkern.train.captions import asked, told
from diffkern.train.checkpoint import newest
from diffkern.train.config import TrainConfig
from diffkern.train.latents import autoencoder_of, check_latents, in_latents
from diffkern.train.learning_rate import learning_rate
from diffkern.train.objectives import OBJECTIVES, make_diffusion, resampling
from diffkern.train.stepper import Iteration, Picture, Stepper, examples, in_mode, prepare
from diffkern.train.validation import validate

__all__ = ["DiffusionStepper", "examples", "in_mode", "prepare"]

PICTURE_SEED = 0


class DiffusionStepper(Stepper):
    """Turns the micro-batches of an iteration into one step of AdamW.

    The loss of a batch is the mean over all its examples on all processes. Each example's noise, time and lost
    condition are functions of its seed, and dropout inside the network of the micro-batch's first seed, so nothing
    depends on what ran before. ``wrapped`` is what computes the gradient: the diffusion, or DistributedDataParallel
    around it; one that is cut into pieces (``fsdp``) brings its own communication.
    """

    def __init__(self, diffusion: Diffusion, config: TrainConfig, device: torch.device) -> None:
        super().__init__(diffusion, config, device)
        self.diffusion, self.resampling = diffusion, resampling(config, diffusion)
        self.wrapped: nn.Module = diffusion
        if parallel.world() > 1 and config.shard == "ddp":
            ids = [device] if device.type == "cuda" else None
            wrap: Any = nn.parallel.DistributedDataParallel
            known = inspect.signature(wrap).parameters  # torch 2.14 has another name, and warns of the old one
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
            self.wrapped = wrap(diffusion, device_ids=ids, **{buffers: False})
        self.parameters = [p for p in diffusion.parameters() if p.requires_grad]

    @classmethod
    def make(cls, config: TrainConfig, images: Images, folder: Path | None) -> Diffusion:
        """What ``init`` says (of a run that goes on its own), or one that is made."""
        if config.init is not None:
            found = None if folder is None else newest(folder)
            return check_latents(config, Diffusion.from_pretrained(found or config.init))
        labelled = config.labels and images.labels is not None
        classes, vocabulary = (images.classes, images.vocabulary) if labelled else (None, None)
        count, autoencoder = 0 if classes is None else len(classes), autoencoder_of(config, folder)
        return make_diffusion(config, images.shape, count, autoencoder=autoencoder, vocabulary=vocabulary)

    @classmethod
    def check(cls, trained: Diffusion, config: TrainConfig, images: Images) -> None:
        """Images of the diffusion's shape, labels that its network has."""
        if trained.shape is not None and images.shape not in (trained.shape, trained.image_shape):
            shape = list(trained.image_shape or ())
            raise ValueError(f"data must have images of the diffusion's shape {shape}, got {list(images.shape)}")
        told(trained, images)  # raises
        null, labels = trained.null, images.labels
        if null is None or labels is None or null.ndim > 0:
            return
        classes = getattr(parallel.bare(trained.model), "null_class", None)  # of diffkern.nn: the one after the last
        wrong = labels[labels == null.to(labels.device)] if classes is None else labels[labels >= classes]
        if len(wrong):
            rule = (
                "other labels than the diffusion's null"
                if classes is None
                else f"labels below {classes}, the network's"
            )
            raise ValueError(f"data must have {rule}, got {int(wrong[0])}")

    def seen(self, images: Images, folder: Path | None, progress: bool | str) -> Images:
        """Captions in the network's own words; latents, of a diffusion that has an autoencoder."""
        return in_latents(self.diffusion, told(self.diffusion, images), self.config, folder, progress)

    def iterate(self, micro_batches: list[Batch], iteration: int, stop: bool = False) -> Iteration:
        """`gradient`, then `step` at the iteration's learning rate."""
        losses, stopped = self.gradient(micro_batches, iteration, stop)
        return Iteration(losses, self.step(learning_rate(self.config, iteration)), stopped)

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
        norm, finite = self.update(self.parameters)
        self.count(finite)
        return norm

    def state(self) -> dict[str, Any]:
        """What the next step depends on beside weights and optimiser, as plain data for JSON."""
        times = None if self.resampling is None else self.resampling.state_dict()
        plain = None if times is None else {name: value.tolist() for name, value in times.items()}
        return {**super().state(), "times": plain}

    def load_state(self, state: dict[str, Any]) -> None:
        """What `state` gave."""
        super().load_state(state)
        if self.resampling is not None and state["times"] is not None:
            dtypes = {name: value.dtype for name, value in self.resampling.state_dict().items()}
            times = {name: torch.tensor(value, dtype=dtypes[name]) for name, value in state["times"].items()}
            self.resampling.load_state_dict(times)

    # ------------------------------------------------------------------------------------------------------- looked at

    def once(self, images: Images) -> None:
        """The loss of one image."""
        x0, cond = examples(self.diffusion, *images.batch(torch.zeros(1, dtype=torch.int64)), self.device)
        shape, degradation = self.diffusion.shape, self.diffusion.degradation
        if shape is not None and degradation is None:
            x0 = x0.new_zeros(1, *shape)  # the encoder has no backward pass to be counted
        self.diffusion.loss(x0, cond=cond, seeds=0)

    def validate(self, images: Images) -> dict[str, float | None]:
        """See `diffkern.train.validation.validate`."""
        found = validate(self.diffusion, images)
        return {"validation_loss": found.loss, "bits_per_dim": found.bits_per_dim}

    def check_pictures(self) -> None:
        """The plan is one for this diffusion."""
        self._plan()

    def _plan(self) -> Plan:
        config, diffusion = self.config, self.diffusion
        parts, guided = OBJECTIVES[config.objective], config.guidance is not None and diffusion.null is not None
        sampler, steps = config.sampler, config.sample_steps
        if sampler is None and diffusion.prediction == parts.prediction:
            sampler = parts.sampler
        if config.sampler is None and diffusion.learned_variance and guided:
            sampler = "ddim"  # guidance is of the prediction alone
        if isinstance(diffusion.schedule, DiscreteSchedule):
            steps = min(steps, diffusion.schedule.T)
        plan = recommended(diffusion, sampler, steps)
        if plan.learned_variance and guided:
            raise ValueError(f"TrainConfig.sampler must be one without a learned variance for guidance, got {sampler}")
        return plan

    def picture(self, images: Images, held_out: Images | None) -> Picture:
        """Samples, of the classes in turn or of some captions; with a degradation of inputs, of images kept apart where
        there are any."""
        config, diffusion = self.config, self.diffusion
        wanted = asked(diffusion, images, config.sample_n, self.device)
        plan, guidance = self._plan(), None if wanted.cond is None else config.guidance
        if diffusion.degradation is not None:
            rows = degraded.picture(diffusion, plan, held_out or images, config.sample_n, guidance)
            return Picture(rows, described(plan, guidance))
        made = diffusion.sample(
            [config.sample_n, *(diffusion.shape or images.shape)],
            plan,
            seeds=PICTURE_SEED,
            cond=wanted.cond,
            guidance=guidance,
        )
        rows = list(made.cpu().split(wanted.columns))
        return Picture(rows, described(plan, guidance), tuple(wanted.names))
