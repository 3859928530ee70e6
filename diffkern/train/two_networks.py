"""What the objectives with a discriminator share: gradients of one network at a time, and one optimiser for both.

DistributedDataParallel does not take a gradient of a gradient, which penalties are: processes add up their gradients
themselves, all in one tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffkern import parallel
from diffkern.data import Batch
from diffkern.objectives.adversarial import CollapseWatch
from diffkern.train.config import TrainConfig
from diffkern.train.learning_rate import learning_rate
from diffkern.train.options import AdversarialOptions
from diffkern.train.stepper import Stepper

__all__ = ["Terms", "TwoNetworks", "each"]

Terms = Mapping[str, Tensor]
"""What examples have by name, [B] each: their "loss", whose mean has the gradient, and what else is to be logged."""


class TwoNetworks(Stepper):
    """Two groups of parameters, each with its own learning rate and betas; the second may be empty.

    Spectral norms take one step of their power iteration an iteration, whatever the micro-batches. A gradient that is
    not finite changes nothing of its network; the iteration counts as one that was left out.
    """

    def __init__(
        self,
        trained: Any,
        config: TrainConfig,
        device: torch.device,
        first: nn.Module,
        discriminator: nn.Module | None,
        options: AdversarialOptions,
    ) -> None:
        self.first, self.discriminator, self.options = first, discriminator, options
        self.first_parameters = [p for p in first.parameters() if p.requires_grad]
        self.critic_parameters = [p for p in discriminator.parameters() if p.requires_grad] if discriminator else []
        super().__init__(trained, config, device)
        kind = options.loss or "non_saturating"
        self.watch = CollapseWatch(options.collapse_steps, kind=kind)
        self._share_weights()

    def groups(self) -> Any:
        """The first network's, then the discriminator's with its own betas."""
        found: list[dict[str, Any]] = [{"params": self.first_parameters}]
        if self.critic_parameters:
            found.append({"params": self.critic_parameters, "betas": self.options.betas or self.config.betas})
        return found

    @property
    def averaged(self) -> nn.Module:
        """The first network alone: nobody samples from a discriminator."""
        return self.first

    def set_rates(self, iteration: int) -> None:
        """The learning rates of the iteration."""
        rate = learning_rate(self.config, iteration)
        own = self.options.learning_rate
        shares = [1.0, 1.0 if own is None else own / self.config.learning_rate]
        for group, share in zip(self.optimizer.param_groups, shares, strict=False):
            group["lr"] = rate * share

    def gradient(
        self,
        micro_batches: list[Batch],
        iteration: int,
        parameters: list[nn.Parameter],
        terms: Callable[[int, Batch], Terms],
        stop: bool = False,
    ) -> tuple[dict[str, Tensor], bool]:
        """The gradient of the batch's mean loss in the parameters, over all processes; no other parameter has one.

        ``terms(number, batch)`` of each micro-batch. Returns those of the whole batch, float64 [batch] each on the CPU,
        the same on every process, and whether any process was asked to stop.
        """
        self.optimizer.zero_grad(set_to_none=True)
        start, size = iteration * self.config.batch, self.config.batch
        found: dict[str, Tensor] = {}
        for number, batch in enumerate(micro_batches):
            place = slice(batch.first - start, batch.first - start + len(batch.x0))
            self.seed(batch)
            made = terms(number, batch)
            (made["loss"].sum() / size).backward(inputs=parameters)
            for name, values in made.items():
                if name not in found:
                    found[name] = torch.zeros(size, dtype=torch.float64, device=self.device)
                found[name][place] = values.detach().double()
        _sum_gradients(parameters)
        asked = torch.full((1, size), float(stop), dtype=torch.float64, device=self.device)
        every = torch.cat([torch.stack(list(found.values())), asked])
        parallel.summed(every)  # with zeros, so exact: the same losses for every number of processes
        every = every.cpu()
        return dict(zip(found, every, strict=False)), bool(every[-1, 0] > 0)

    def seed(self, batch: Batch) -> None:
        """Dropout of what follows is a function of the micro-batch's first example."""
        torch.manual_seed(int(batch.seeds[0]) % 2**63)

    def autocast(self) -> Any:
        """The configuration's precision."""
        return torch.autocast(self.device.type, self.dtype, self.dtype != torch.float32)

    def images(self, batch: Batch) -> Tensor:
        """As the networks take them."""
        dtype = self.first_parameters[0].dtype
        x0 = batch.x0.to(self.device, dtype, non_blocking=True)
        return x0.contiguous(memory_format=torch.channels_last) if self.config.channels_last else x0

    def watched(self, terms: Mapping[str, Tensor]) -> str | None:
        """What the collapse guard says of the discriminator's "discriminator_loss", "real_logit" and "fake_logit"."""
        logits = torch.cat([terms["real_logit"], terms["fake_logit"]])
        return self.watch.see(float(terms["discriminator_loss"].mean()), float(logits.std(correction=0)))

    def power_step(self) -> None:
        """One step of the power iteration of every spectral norm; until the next call it stands still."""
        for module in self.trained.model.modules():
            if parametrize.is_parametrized(module):
                with torch.no_grad():
                    module.parametrizations.train()
                    for name in module.parametrizations:
                        getattr(module, name)
                module.parametrizations.eval()

    def _share_weights(self) -> None:
        """Every process has the first one's, also of networks that were made outside."""
        if parallel.world() > 1:
            with torch.no_grad():
                for tensor in self.trained.model.state_dict().values():
                    if not parallel.is_main():
                        tensor.zero_()
                    parallel.summed(tensor)

    def state(self) -> dict[str, Any]:
        """With the collapse guard's."""
        return {**super().state(), "collapse": self.watch.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """What `state` gave."""
        super().load_state(state)
        self.watch.load_state(state["collapse"])


def _sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Over all processes, in one tensor of each dtype."""
    if parallel.world() == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    for dtype in sorted({grad.dtype for grad in grads}, key=str):
        some = [grad for grad in grads if grad.dtype == dtype]
        flat = torch.cat([grad.flatten() for grad in some])
        parallel.summed(flat)
        for grad, summed in zip(some, flat.split([grad.numel() for grad in some]), strict=True):
            grad.copy_(summed.view(grad.shape))


def each(logits: Tensor) -> Tensor:
    """A sample's mean logit, [B], of logits [B, ...]."""
    return logits if logits.dim() == 1 else logits.flatten(1).mean(1)
